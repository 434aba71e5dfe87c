"""The rate of products and the default that follows from it; the timing itself with small layers on a CPU."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe import Qwen3MoeConfig

from runtime import gemm_rate
from runtime.bench.shapes import random_model
from runtime.engine_start import engine_parts
from runtime.executor import Executor
from runtime.gemm_rate import STEP_S, flop_per_s, largest_linear, measured_step_tokens, step_tokens
from runtime.knobs import EngineConfig, default_config, knob_named
from runtime.step_model import StepModel
from runtime.step_weights import weights_of


def test_a_step_has_as_many_tokens_as_the_time_allows_in_whole_tiles() -> None:
    assert step_tokens(700e12, 7_500_000_000) == 1792  # 1820 in 39 ms
    assert step_tokens(650e12, 7_500_000_000) == 1664  # 1690
    assert step_tokens(1e12, 7_500_000_000) == 256, "fewer are not worth a step"
    assert f"is what takes {1e3 * STEP_S:.0f} ms." in knob_named("mixed_step_tokens").help, "as it is told"


def test_the_largest_layer_beside_the_head_is_timed() -> None:
    layers = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 24), nn.Linear(16, 500)])
    assert largest_linear(layers, vocab_size=500) is layers[1]
    assert largest_linear(nn.ModuleList([nn.Linear(16, 500)]), vocab_size=500) is None
    assert measured_step_tokens(nn.ModuleList(), num_active=1, vocab_size=500) is None


def test_a_rate_is_that_of_the_products_that_were_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def half_a_second(x: torch.Tensor, weight: torch.Tensor) -> float:
        shapes.append((tuple(x.shape), tuple(weight.shape)))
        return 0.5

    monkeypatch.setattr(gemm_rate, "WARM_UP_S", 0.0)
    monkeypatch.setattr(gemm_rate, "_product_s", half_a_second)
    assert flop_per_s(torch.zeros(24, 16), num_rows=10) == 2 * 10 * 24 * 16 / 0.5
    assert set(shapes) == {((10, 16), (24, 16))}


def test_products_are_timed_where_there_is_no_gpu_too() -> None:
    assert flop_per_s(torch.zeros(64, 64), num_rows=16) > 1e6
    model = random_model("tiny", torch.device("cpu"), torch.float32)
    weights = weights_of(model.model)
    tokens = measured_step_tokens(model.model, weights.num_active, model.identity["vocab_size"])
    assert tokens is not None and tokens >= 256 and tokens % 128 == 0


def test_of_experts_those_that_a_token_chooses_are_active_and_no_embedding() -> None:
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=8, num_experts_per_tok=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    routed = sum(weight.numel() for name, weight in model.named_parameters() if ".experts." in name)
    total = sum(weight.numel() for weight in model.parameters())
    found = weights_of(model)
    assert routed == 8 * 3 * 16 * 8 and found.chosen_share == 0.25
    assert found.num_active == total - 64 * 16 - routed + routed // 4


def test_on_a_cpu_the_knob_stays_off_and_the_identity_tells_what_attention_costs() -> None:
    executor = Executor(random_model("tiny", torch.device("cpu"), torch.float32, 128), 512, EngineConfig())
    identity = executor.identity()
    assert "mixed_step_tokens" not in identity["fitted_knobs"]
    assert executor.attention_cost == StepModel.of_shape(identity).attention_cost
    assert executor.attention_cost == 4 * 2 * 64 / (2 * identity["num_active_parameters"])


def test_an_engine_starts_with_what_was_measured_unless_it_is_asked_for_something_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Executor, "_measured_step_tokens", lambda self: 1536)
    for asked, expected in (({}, 1536), ({"mixed_step_tokens": 512, "kv_tokens": 256}, 512)):
        loaded = random_model("tiny", torch.device("cpu"), torch.float32, 128)
        executor, runner, reports = engine_parts(loaded, 512, asked)
        told = {report["name"]: report for report in reports}["mixed_step_tokens"]
        assert runner.champion.mixed_step_tokens == expected and told["default"] == 1536
        assert executor.identity()["fitted_knobs"]["mixed_step_tokens"] == 1536


@pytest.mark.gpu
def test_on_a_gpu_the_default_is_measured() -> None:
    device = torch.device("cuda")
    executor = Executor(
        random_model("qwen3-0.6b", device, torch.bfloat16, 512), 4096, default_config("cuda", 4)
    )
    tokens = executor.identity()["fitted_knobs"]["mixed_step_tokens"]
    cap = default_config("cuda", 4).max_batched_tokens
    assert 256 <= tokens <= cap and tokens % 128 == 0
    layer = torch.randn(28_672, 4096, device=device, dtype=torch.bfloat16)
    assert 5e13 < flop_per_s(layer) < 5e15, "what GPUs reach, so the clock waited for the product"
