"""Experts by kernels give what the decoder's own do, however they are grouped whatever the shared ones look like."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime.experts import Experts
from runtime.fused_experts import BLOCK_ROWS, GROUPED_MIN_ROWS, FusedExperts, are_experts, block_rows
from runtime.kernels import PLAIN, TRITON
from runtime.kernels.linear_table import LinearTable
from runtime.kernels.plain_experts import num_blocks
from runtime.weights import prepared
from tests.runtime.test_experts import VARIANTS, both, hidden
from tests.runtime.tiny_models import tiny_model

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # routers compute in float32


def whole(found: Tensor) -> Tensor:
    """Parts added up, as the next norm does."""
    return found if found.ndim == 2 else found.sum(0)


def fused(kernels: Any) -> FusedExperts:
    return FusedExperts(kernels, LinearTable(kernels))


class Counted:
    """Plain kernels that remember which of them were called with shared experts, or at all."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*given: Any) -> Any:
            self.called.append(name)
            self.given = given
            return getattr(PLAIN, name)(*given)

        return call


@pytest.mark.parametrize("num_tokens", [1, 2, 40])
@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=str)
@torch.inference_mode()
def test_fused_experts_give_what_those_of_the_decoder_do(
    family: str, changes: dict[str, Any], num_tokens: int
) -> None:
    _, ours = both(family, torch.float64, changes)
    x = hidden(num_tokens, torch.float64)
    torch.testing.assert_close(whole(fused(PLAIN).forward(x, ours)), ours(x), **CLOSE)


@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=str)
@torch.inference_mode()
def test_the_form_for_many_rows_gives_the_same(family: str, changes: dict[str, Any]) -> None:
    _, ours = both(family, torch.float32, changes)
    if not ours.has_grouped_form:
        pytest.skip("this build of PyTorch has no grouped_mm")
    x = hidden(50, torch.float32)
    torch.testing.assert_close(fused(PLAIN)._many(x, ours), ours(x), rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_one_row_needs_no_layout_and_shared_experts_no_mlp_of_their_own() -> None:
    _, ours = both("deepseek_v3", torch.float64, {"n_shared_experts": 2})
    kernels = Counted()
    fused(kernels).forward(hidden(1, torch.float64), ours)
    assert kernels.called == ["route", "expert_gate_up", "expert_down"]


@torch.inference_mode()
def test_shared_experts_in_another_format_are_computed_beside() -> None:
    _, ours = both("deepseek_v3", torch.float32, {})
    x, assembled = hidden(5, torch.float32), both("deepseek_v3", torch.float32, {})[1]
    assert ours.shared is not None and are_experts(ours.shared, ours)
    prepared(ours, "int8").install()
    assert not are_experts(ours.shared, ours)
    kernels = Counted()
    found = whole(fused(kernels).forward(x, ours))
    assert "silu_mul" in kernels.called
    torch.testing.assert_close(found, ours(x), rtol=1e-4, atol=1e-4)
    assert not torch.equal(found, assembled(x))


@torch.inference_mode()
def test_shared_experts_of_another_size_or_with_biases_are_computed_beside() -> None:
    _, ours = both("deepseek_v2", torch.float64, {"mlp_bias": True})
    assert ours.shared is not None and not are_experts(ours.shared, ours)
    x = hidden(5, torch.float64)
    torch.testing.assert_close(whole(fused(PLAIN).forward(x, ours)), ours(x), **CLOSE)


def test_blocks_have_room_for_more_than_the_mean_and_never_more_rows_than_the_largest() -> None:
    assert block_rows(6, 64) == 16
    assert block_rows(32 * 6, 64) == 16
    assert block_rows(256 * 6, 64) == 32
    assert block_rows(10**6, 64) == BLOCK_ROWS[-1]


@pytest.mark.parametrize("block", [1, 16, 64])
def test_there_are_blocks_enough_for_every_choice(block: int) -> None:
    torch.manual_seed(0)
    spread = torch.rand(50, 8).topk(3)[1]
    for index in (spread, spread % 2, torch.zeros_like(spread), spread[:1]):
        layout = PLAIN.lay_out(index, 8, block)
        assert len(layout.experts) == num_blocks(index.numel(), 8, block)
        pairs = layout.rows[layout.rows >= 0].sort()[0]
        assert torch.equal(pairs, torch.arange(index.numel(), dtype=torch.int32))
        assert torch.equal(layout.rows[layout.places.long()], torch.arange(index.numel(), dtype=torch.int32))
        owners = layout.experts.repeat_interleave(block)[layout.places.long()]
        assert torch.equal(owners.long(), index.flatten())


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 2, 40, 300, GROUPED_MIN_ROWS])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v2_lite", "deepseek_v3"])
@torch.inference_mode()
def test_bfloat16_experts_on_a_gpu_are_as_close_as_the_decoders_own(family: str, num_tokens: int) -> None:
    assert TRITON is not None
    model = tiny_model(family, torch.bfloat16).to("cuda")
    ours = Experts(model.model.layers[1].mlp, model.config)
    x = hidden(num_tokens, torch.bfloat16).to("cuda")
    exact = Experts(deepcopy(model).double().model.layers[1].mlp, model.config)(x.double())
    found = whole(fused(TRITON).forward(x, ours))
    # A token whose choice is a near tie goes elsewhere: most do not.
    errors = ((found.double() - exact).norm(dim=1) / exact.norm(dim=1)).sort()[0]
    assert float(errors[: -(-9 * num_tokens // 10)].max()) < 0.03


@pytest.mark.gpu
@torch.inference_mode()
def test_a_graph_serves_choices_that_change_after_its_capture() -> None:
    assert TRITON is not None
    torch.manual_seed(0)
    model = tiny_model("deepseek_v2_lite", torch.bfloat16).to("cuda")
    ours, layer = Experts(model.model.layers[1].mlp, model.config), fused(TRITON)
    for num_tokens in (1, 24):
        x = torch.randn(num_tokens, 32, device="cuda", dtype=torch.bfloat16)
        layer.forward(x, ours)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer.forward(x, ours)
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            graph.replay()
            again: Tensor = layer.forward(x, ours)
            assert torch.equal(out, again), "the same input gives the same bits"
