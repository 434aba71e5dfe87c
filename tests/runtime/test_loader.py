import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime.errors import ModelError
from runtime.loader import LoadedModel, load_model, resolve_device, resolve_dtype
from runtime.weight_stream import Reading
from tests.runtime.tiny_models import EOS, save_tiny_model

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model("qwen2", tmp_path / "tiny-qwen2")


def load(folder: Path, **options: Any) -> LoadedModel:
    return load_model(folder, CPU, torch.float32, **options)


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_identity_says_what_was_loaded(folder: Path) -> None:
    loaded = load(folder, max_model_len=128)
    expected = {
        "name": "tiny-qwen2", "architecture": "Qwen2ForCausalLM", "num_layers": 2, "hidden_size": 32, "vocab_size": 97,
        "max_model_len": 128, "dtype": "float32",
        "weights_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
    }  # fmt: skip
    assert loaded.identity.items() >= expected.items()
    assert loaded.identity["weight_bytes"] == 4 * loaded.identity["num_parameters"] > 0
    assert loaded.eos_token_ids == {EOS} and loaded.max_model_len == 128


def test_dtype_and_device_follow_the_machine() -> None:
    assert resolve_dtype("auto", CPU) is torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) is torch.bfloat16
    with pytest.raises(ModelError, match="--dtype must be auto or one of"):
        resolve_dtype("int3", CPU)
    if not torch.cuda.is_available():
        assert resolve_device("auto") == CPU
        with pytest.raises(ModelError, match="sees no CUDA device"):
            resolve_device("cuda")
    with pytest.raises(ModelError, match="--device must be auto, cpu, cuda or cuda:N, but got 'gpu'"):
        resolve_device("gpu")


def test_a_device_that_is_not_there_is_refused_with_the_number_of_those_that_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda:1") and resolve_device("auto") == torch.device(
        "cuda"
    )
    with pytest.raises(ModelError, match="cuda:2 was asked for, but PyTorch sees 2"):
        resolve_device("cuda:2")


def test_refuses_a_missing_folder_and_one_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model folder at"):
        load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"model_type": "no_such_model"}', '{"model_type": "qwen2", "hidden_size": "x"}']
)
def test_refuses_a_config_that_describes_no_known_model(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ModelError, match="describes no model that transformers knows"):
        load(folder)


def test_refuses_a_model_that_is_no_causal_lm(folder: Path) -> None:
    change_config(folder, model_type="t5")
    with pytest.raises(ModelError, match="t5 model, which is not a causal language model"):
        load(folder)


@pytest.mark.parametrize("cut", [1, 100, 10_000])
def test_refuses_truncated_weights(folder: Path, cut: int) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-cut])
    with pytest.raises(ModelError, match=r"model\.safetensors is truncated"):
        load(folder)


def announced(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize("content", [b"", b"xyz", b"\xff" * 100, announced(b"{" * 20), announced(b"[]")])
def test_refuses_damaged_weights(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="is damaged"):
        load(folder)


def test_refuses_a_folder_without_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"has no \.safetensors weights"):
        load(folder)


def test_refuses_an_index_that_names_a_missing_file(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"model-00002\.safetensors is named in the index but missing"):
        load(folder)


def test_refuses_weights_that_lack_tensors_instead_of_inventing_them(folder: Path) -> None:
    change_config(folder, num_hidden_layers=3, layer_types=["full_attention"] * 3)
    with pytest.raises(ModelError, match="lack 12 of the tensors"):
        load(folder)


def test_refuses_weights_of_another_shape(folder: Path) -> None:
    change_config(folder, intermediate_size=50)
    with pytest.raises(ModelError, match=r"gate_proj.weight must be of shape \(50, 32\), but is \(\d+, 32\)"):
        load(folder)


def test_weights_of_another_model_are_refused_before_they_are_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.pretrained.Reading", None)
    change_config(folder, hidden_size=64)
    with pytest.raises(ModelError, match="of another model than its config"):
        load(folder)


def test_what_is_read_ahead_of_weights_that_are_refused_is_let_go(folder: Path) -> None:
    reading = Reading.begin(folder, CPU)
    change_config(folder, hidden_size=64)
    with pytest.raises(ModelError, match="of another model"):
        load(folder, reading=reading)
    assert all(piece.cancelled() or piece.result(10.0) for piece in reading.digest._pieces)


def test_another_models_weights_beside_the_right_ones_are_transformers_affair(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({name: weights[name][:3].clone()}, folder / "mtp.safetensors", {"format": "pt"})
    assert torch.equal(load(folder).model.state_dict()[name], weights[name])


def test_weights_of_the_bare_model_are_loaded_as_transformers_does(folder: Path) -> None:
    weights = {
        name.removeprefix("model."): part for name, part in load_file(folder / "model.safetensors").items()
    }
    expected = load(folder).model.state_dict()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    found = load(folder).model.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("length", [15, 257])
def test_refuses_a_length_the_model_was_not_made_for(folder: Path, length: int) -> None:
    with pytest.raises(ModelError, match=r"must be in \[16, 256\]"):
        load(folder, max_model_len=length)
