"""Weights that are read straight to where they shall lie, and what a start begins before transformers is loaded."""

import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime import head_start
from runtime import weight_files as files_module
from runtime import weight_stream as stream_module
from runtime.decoder import Decoder
from runtime.errors import ModelError
from runtime.fused_pass import shape_of as shape_of_decoder
from runtime.head_start import begin, shape_of
from runtime.hf_model import HFModel
from runtime.kernels import PLAIN, Kernels, Shape, table
from runtime.loader import LoadedModel, load_model
from runtime.pretrained import assembled, read_config
from runtime.weight_files import WeightsDigest, weight_files
from runtime.weight_stream import Reading, WeightStream, is_straight_type, raw_config
from tests.runtime.tiny_models import save_tiny_model

CPU = torch.device("cpu")
STRAIGHT = ("qwen2", "qwen3", "llama")


def straight(folder: Path, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """As on a GPU."""
    files = weight_files(folder)
    return load_model(folder, CPU, dtype, reading=Reading(WeightsDigest(files), WeightStream(files, CPU)))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(files_module, "DIGEST_PIECE_BYTES", 1000)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", STRAIGHT)
def test_a_streamed_model_is_the_one_that_transformers_loads(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = save_tiny_model(family, tmp_path / "tiny")
    ours, theirs = straight(folder, dtype), load_model(folder, CPU, dtype)
    assert ours.identity == theirs.identity and ours.eos_token_ids == theirs.eos_token_ids
    expected = dict(theirs.model.named_parameters()) | dict(theirs.model.named_buffers())
    found = dict(ours.model.named_parameters()) | dict(ours.model.named_buffers())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    ids = torch.arange(9)[None]
    with torch.inference_mode():
        assert torch.equal(ours.model(ids).logits, theirs.model(ids).logits)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    folder = save_tiny_model("qwen2", tmp_path / "tiny")
    config = (
        (folder / "config.json")
        .read_text()
        .replace('"tie_word_embeddings": false', '"tie_word_embeddings": true')
    )
    (folder / "config.json").write_text(config)
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    tensors = load_file(folder / "model.safetensors")
    assert assembled(folder, read_config(folder), torch.float32, tensors) is not None, "no detour"
    model = straight(folder).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, weights["model.embed_tokens.weight"])


def test_other_names_or_shapes_are_left_to_transformers(tmp_path: Path) -> None:
    folder = save_tiny_model("qwen2", tmp_path / "tiny")
    config = read_config(folder)
    tensors = load_file(folder / "model.safetensors")
    assert assembled(folder, config, torch.float32, dict(tensors)) is not None
    assert assembled(folder, config, torch.float32, None) is None
    assert assembled(folder, config, torch.float32, {**tensors, "more": torch.zeros(1)}) is None
    name = "model.norm.weight"
    assert assembled(folder, config, torch.float32, {**tensors, name: torch.zeros(1)}) is None
    tensors.pop(name)
    assert assembled(folder, config, torch.float32, tensors) is None
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 of the tensors .*model\.norm\.weight"):
        straight(folder)


def test_a_file_that_shrinks_while_it_is_read_is_told(tmp_path: Path) -> None:
    folder = save_tiny_model("qwen2", tmp_path / "tiny")
    (file,) = weight_files(folder)
    stored = list(files_module.stored_tensors(file))
    last = max(stored, key=lambda one: one.offset)
    file.write_bytes(file.read_bytes()[: last.offset])
    chunk = stream_module.Chunk(file, last.offset, torch.empty(last.num_bytes, dtype=torch.uint8))
    with pytest.raises(ModelError, match="ended while it was read"):
        stream_module.read_into(chunk, chunk.target)


@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), ModelError("it ended"), RuntimeError("odd")]
)
def test_reading_that_fails_is_told_to_whoever_waits(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, has_waited = save_tiny_model("llama", tmp_path / "tiny"), threading.Event()

    def fail(chunk: object, target: object) -> None:
        has_waited.wait(10.0)
        raise error

    monkeypatch.setattr(stream_module, "read_into", fail)
    stream = WeightStream(weight_files(folder), CPU)
    threading.Timer(0.1, has_waited.set).start()
    assert isinstance(refusal_of(stream.take), RuntimeError if type(error) is RuntimeError else ModelError)
    assert isinstance(
        refusal_of(lambda: load_model(folder, CPU, torch.float32, may_be_bare=True)), ModelError
    )


def refusal_of(call: Callable[[], object]) -> Exception | None:
    """What it raises; None where it gives no answer in 10 s, or another one."""
    raised: list[Exception] = []

    def run() -> None:
        try:
            call()
        except Exception as error:
            raised.append(error)

    waiting = threading.Thread(target=run, daemon=True)
    waiting.start()
    waiting.join(10.0)
    return raised[0] if raised else None


def test_a_tensor_with_another_number_of_bytes_than_its_shape_is_told(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path / "tiny")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["model.norm.weight"]["dtype"] = "F64"
    changed = json.dumps(header).encode()
    file.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + size :])
    with pytest.raises(
        ModelError, match=r"damaged: model\.norm\.weight .* takes 256 bytes, but 128 are announced"
    ):
        load_model(folder, CPU, torch.float32, may_be_bare=True)


def test_the_digest_is_that_of_the_pieces_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"x" * 2500)
    second.write_bytes(b"y" * 10)
    assert WeightsDigest([second]).result() == hashlib.sha256(b"y" * 10).hexdigest(), "one piece: of the file"
    monkeypatch.setattr(files_module, "DIGEST_PIECE_BYTES", 1000)
    pieces = [b"x" * 1000, b"x" * 1000, b"x" * 500, b"y" * 10]
    expected = hashlib.sha256(b"".join(hashlib.sha256(piece).digest() for piece in pieces)).hexdigest()
    assert WeightsDigest([first, second]).result() == expected
    assert WeightsDigest([second, first]).result() != expected


@pytest.mark.parametrize("family", STRAIGHT)
def test_kernels_are_compiled_for_the_shape_that_the_model_has(family: str, tmp_path: Path) -> None:
    folder = save_tiny_model(family, tmp_path / "tiny")
    plain = HFModel(load_model(folder, CPU, torch.float32).model)
    assert shape_of(raw_config(folder)) == shape_of_decoder(Decoder(plain.model, plain.attention_calls))


def test_windows_and_other_types_get_no_head_start(tmp_path: Path) -> None:
    assert shape_of(raw_config(save_tiny_model("mistral", tmp_path / "window"))) is None
    assert not is_straight_type(raw_config(save_tiny_model("mixtral", tmp_path / "experts")))
    assert not is_straight_type({"model_type": "llama", "quantization_config": {}})
    assert raw_config(tmp_path / "nowhere") == {}


def test_a_head_start_is_used_and_a_folder_at_fault_is_told_by_the_loading(tmp_path: Path) -> None:
    folder = save_tiny_model("qwen2", tmp_path / "tiny")
    reading = begin(folder, "cpu")
    assert reading is not None and reading.stream is None, (
        "on a CPU the names in the files are compared first"
    )
    loaded = load_model(folder, CPU, torch.float32, reading=reading)
    assert loaded.identity["weights_sha256"] == reading.digest.result()
    assert begin(tmp_path / "nowhere", "cpu") is None and begin(folder, "no such device") is not None


def test_waking_a_device_checks_the_kernels_once_and_never_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Shape] = []

    def check(device: torch.device, dtype: torch.dtype, shape: Shape, kernels: Kernels | None) -> list[str]:
        seen.append(shape)
        return []

    monkeypatch.setattr(table, "self_check", check)
    monkeypatch.setattr(table, "_failed", {})
    folder = save_tiny_model("llama", tmp_path / "tiny")
    for _ in range(2):
        head_start._wake(folder, CPU, PLAIN)
    assert seen == [shape_of(raw_config(folder))]
    (folder / "config.json").write_text('{"model_type": "llama"}')
    head_start._wake(folder, CPU, PLAIN)


@pytest.mark.gpu
def test_weights_reach_the_gpu_through_pinned_memory(tmp_path: Path) -> None:
    folder = save_tiny_model("llama", tmp_path / "tiny")
    device = torch.device("cuda", 0)
    tensors = WeightStream(weight_files(folder), device).take()
    assert tensors is not None
    for name, expected in load_file(folder / "model.safetensors").items():
        assert tensors[name].device == device and torch.equal(tensors[name].cpu(), expected), name
    loaded = load_model(folder, device, torch.bfloat16, reading=begin(folder, "auto"))
    assert {parameter.device for parameter in loaded.model.parameters()} == {device}
    assert {buffer.device for buffer in loaded.model.buffers()} == {device}
