"""Models without code: the same numbers as with transformers' modules, and nothing that is not understood."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import runtime.decoder
from runtime.bare_model import BareConfig, BareModel
from runtime.decoder_model import DecoderModel
from runtime.errors import ModelError
from runtime.executor import served
from runtime.fused_pass import shape_of as shape_of_decoder
from runtime.head_start import begin, shape_of
from runtime.hf_model import HFModel
from runtime.loader import LoadedModel, load_model
from runtime.paged_model import PROBE_TOKENS, probe_tokens
from runtime.step_weights import weights_of
from tests.runtime.tiny_models import save_tiny_model, tiny_config

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_of_3.1": ("llama", {"rope_parameters": LLAMA3}),
    "llama_of_wide_heads": ("llama", {"head_dim": 12}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3_tied": ("qwen3", {"tie_word_embeddings": True}),
}
# As their makers publish them.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
        "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.42.3", "use_cache": True, "vocab_size": 128256,
    },
    "Qwen2.5-7B": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02,
        "intermediate_size": 18944, "max_position_embeddings": 131072, "max_window_layers": 28, "model_type": "qwen2",
        "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1", "use_cache": True, "use_sliding_window": False, "vocab_size": 152064,
    },
    "Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
        "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960,
        "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    },
    "Mistral-7B-v0.3": {
        "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.42.0.dev0",
        "use_cache": True, "vocab_size": 32768,
    },
}  # fmt: skip


def saved(name: str, folder: Path) -> Path:
    family, changes = CHANGES[name]
    torch.manual_seed(0)
    config = tiny_config(family).to_dict() | changes
    model = AutoModelForCausalLM.from_config(type(tiny_config(family)).from_dict(config)).float()
    for weight in model.parameters():  # norms of one would hide what is done with them
        weight.data.mul_(1 + 0.3 * torch.rand_like(weight))
    model.save_pretrained(folder)
    return folder


def bare(folder: Path, dtype: torch.dtype = torch.float32) -> LoadedModel:
    return load_model(folder, CPU, dtype, may_be_bare=True)


def raw(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def logits_of(model: DecoderModel) -> Tensor:
    return model._in_one_piece([5 * token % 97 for token in range(PROBE_TOKENS)])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda dtype: str(dtype)[6:]
)
@pytest.mark.parametrize("name", CHANGES)
def test_a_bare_model_computes_what_the_decoder_makes_of_transformers_modules(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = saved(name, tmp_path / name)
    ours, theirs = bare(folder, dtype), load_model(folder, CPU, dtype)
    assert isinstance(ours.model, BareModel) and not isinstance(theirs.model, BareModel)
    assert (ours.identity, ours.eos_token_ids) == (theirs.identity, theirs.eos_token_ids)
    assert weights_of(ours.model) == weights_of(theirs.model)
    models = [served(loaded) for loaded in (ours, theirs)]
    assert isinstance(models[0], DecoderModel) and isinstance(models[1], DecoderModel)
    tables = [model.decoder.rope.table(200) for model in models]
    torch.testing.assert_close(tables[0], tables[1], rtol=0, atol=1e-4 if "3.1" in name else 0)
    found, expected = (logits_of(model) for model in models)
    limit = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 0.1}[dtype] if "3.1" in name else 0
    torch.testing.assert_close(found, expected, rtol=limit, atol=limit)
    assert shape_of(raw(folder)) == shape_of_decoder(models[0].decoder)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama_of_3.1", "qwen2_tied", "qwen3"])
def test_on_a_gpu_a_bare_model_goes_on_as_transformers_does(name: str, tmp_path: Path) -> None:
    folder, device = saved(name, tmp_path / name), torch.device("cuda", 0)
    loaded = load_model(folder, device, torch.bfloat16, reading=begin(folder, "auto"), may_be_bare=True)
    assert isinstance(loaded.model, BareModel) and loaded.model.device == device
    model = served(loaded)
    assert model.tier == "A" and model.replaced_kernels == ()
    plain = HFModel(load_model(folder, device, torch.bfloat16).model)  # type: ignore[arg-type]
    model.check_against(plain.expected, probe_tokens(97, device)[0].tolist())


def test_llama_3_scaling_changes_the_angles(tmp_path: Path) -> None:
    plain, scaled = (
        BareModel(BareConfig.of(raw(saved(name, tmp_path / name)))).model.rotary_emb.frequencies  # type: ignore[arg-type]
        for name in ("llama", "llama_of_3.1")
    )
    ratio = scaled / plain
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(1 / 8) and (ratio.diff() <= 0).all()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_understood(name: str) -> None:
    told = PUBLISHED[name]
    config = BareConfig.of(told)
    assert config is not None
    assert config.head_dim == 128 and config.rope_theta == told["rope_theta"]
    assert config.eos_token_id == told["eos_token_id"]
    assert (config.rope_scaling is not None) == (name == "Llama-3.1-8B")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("Llama-3.1-8B", {"model_type": "gemma"}),
        ("Llama-3.1-8B", {"architectures": ["LlamaForSequenceClassification"]}),
        ("Llama-3.1-8B", {"attention_bias": True}),
        ("Llama-3.1-8B", {"mlp_bias": True}),
        ("Llama-3.1-8B", {"hidden_act": "gelu"}),
        ("Llama-3.1-8B", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
        ("Llama-3.1-8B", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("Llama-3.1-8B", {"rope_scaling": {**LLAMA3, "attention_factor": 2.0}}),
        ("Llama-3.1-8B", {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}),
        ("Llama-3.1-8B", {"rope_theta": None}),
        ("Llama-3.1-8B", {"num_key_value_heads": None}),
        ("Llama-3.1-8B", {"hidden_size": "4096"}),
        ("Llama-3.1-8B", {"head_dim": 127}),
        ("Llama-3.1-8B", {"rms_norm_eps": None}),
        ("Llama-3.1-8B", {"tie_word_embeddings": None}),
        ("Llama-3.1-8B", {"quantization_config": {"quant_method": "awq"}}),
        ("Llama-3.1-8B", {"a_key_of_next_year": 1}),
        ("Llama-3.1-8B", {"rope_scaling": "linear"}),
        ("Llama-3.1-8B", {"layer_types": 5}),
        ("Llama-3.1-8B", {"layer_types": ["full_attention"]}),
        ("Llama-3.1-8B", {"model_type": ["llama"]}),
        ("Llama-3.1-8B", {"rope_theta": 10**400}),
        ("Llama-3.1-8B", {"num_key_value_heads": 3}),
        ("Llama-3.1-8B", {"hidden_size": 4095, "head_dim": 128}),
        ("Llama-3.1-8B", {"eos_token_id": "</s>"}),
        ("Mistral-7B-v0.3", {"sliding_window": 4096}),
        ("Qwen2.5-7B", {"use_sliding_window": True}),
        ("Qwen2.5-7B", {"layer_types": ["full_attention", "sliding_attention"] * 14}),
        ("Qwen2.5-7B", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ("Qwen3-0.6B", {"head_dim": None}),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_left_to_transformers(name: str, change: dict[str, Any]) -> None:
    assert BareConfig.of(PUBLISHED[name] | change) is None


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("Mistral-7B-v0.3", "sliding_window"),
        ("Mistral-7B-v0.3", "eos_token_id"),
        ("Llama-3.1-8B", "eos_token_id"),
    ],
)
def test_what_transformers_fills_in_otherwise_is_left_to_it(name: str, key: str) -> None:
    assert BareConfig.of({other: value for other, value in PUBLISHED[name].items() if other != key}) is None


def test_files_that_hold_other_tensors_are_left_to_transformers(tmp_path: Path) -> None:
    folder = saved("qwen2_tied", tmp_path / "tiny")
    weights = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in weights
    tied = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file(tied, folder / "model.safetensors", {"format": "pt"})
    assert not isinstance(bare(folder).model, BareModel)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path / "tiny")
    (folder / "config.json").write_text(json.dumps(raw(folder) | {"intermediate_size": 50}))
    with pytest.raises(ModelError, match=r"gate_proj.weight must be of shape \(50, 32\), but is \(\d+, 32\)"):
        bare(folder)
    (folder / "config.json").write_text(
        json.dumps(raw(folder) | {"num_hidden_layers": 3, "layer_types": None})
    )
    with pytest.raises(ModelError, match="lack 9 of the tensors that LlamaForCausalLM needs"):
        bare(folder)


def test_tier_b_gets_transformers_model_of_the_same_weights(tmp_path: Path) -> None:
    folder = saved("qwen2_tied", tmp_path / "tiny")
    expected = load_model(folder, CPU, torch.float32).model.state_dict()
    model = served(bare(folder), "B")
    found = model.model.state_dict()
    assert model.tier == "B" and found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_a_decoder_that_makes_something_else_of_pieces_gives_way_to_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attend = runtime.decoder.attend

    def wrong(query: Tensor, cache: Any, step: Any, *given: Any) -> Tensor:
        out = attend(query, cache, step, *given)
        return out if len(out) == PROBE_TOKENS else out + 1.0

    monkeypatch.setattr(runtime.decoder, "attend", wrong)
    loaded = bare(saved("llama", tmp_path / "tiny"))
    assert served(loaded).tier == "B"
    assert "transformers' own model is loaded: its logits differ" in caplog.text


def test_neither_transformers_nor_torchs_compiler_is_loaded_before_the_first_token(tmp_path: Path) -> None:
    script = """
import sys, torch
from runtime.clock import Clock
from runtime.engine import Engine
from runtime.engine_start import engine_parts
from runtime.loader import load_model
loaded = load_model(sys.argv[1], torch.device("cpu"), torch.float32, may_be_bare=True)
executor, runner, _ = engine_parts(loaded, 512, {})
sent = []
engine = Engine(executor, runner, Clock.started_now(), sent.append)
engine.submit({"id": "a", "token_ids": [2, 3, 4], "max_tokens": 3, "arrived_at": 0.0, "ignore_eos": True})
while engine.step():
    pass
assert sum(frame["op"] == "tokens" for frame in sent) == 3, sent
print([name for name in ("transformers", "torch._dynamo") if name in sys.modules])
"""
    folder = save_tiny_model("qwen3", tmp_path / "tiny")
    found = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert found.stdout.strip() == "[]", found.stderr
