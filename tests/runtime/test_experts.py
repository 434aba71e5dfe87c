"""Experts are chosen and computed as transformers does, in any form, with weights held once."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from runtime import experts
from runtime.errors import ModelError
from runtime.expert_choice import choice_of
from runtime.experts import Experts, has_grouped, multiply_grouped, multiply_plain
from runtime.layer_parts import Mlp
from runtime.weights import linear_layers
from tests.runtime.test_decoder import decoder
from tests.runtime.test_latent_attention import deepseek as changed
from tests.runtime.tiny_models import tiny_config, tiny_model

HIDDEN = 32
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("mixtral", {}),
    ("mixtral", {"num_experts_per_tok": 3}),
    ("qwen3_moe", {"norm_topk_prob": True}),
    ("qwen3_moe", {"norm_topk_prob": False}),
    ("deepseek_v2", {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}),
    ("deepseek_v2", {"routed_scaling_factor": 16.0}),
    ("deepseek_v2_lite", {"n_shared_experts": 2, "num_experts_per_tok": 6}),
    ("deepseek_v3", {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}),
    ("deepseek_v3", {"norm_topk_prob": False, "routed_scaling_factor": 2.5, "n_shared_experts": 2}),
    ("deepseek_v3", {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 8}),
)


def both(family: str, dtype: torch.dtype, changes: dict[str, Any]) -> tuple[nn.Module, Experts]:
    """The experts of transformers, and ours."""
    model = changed(family, dtype, **changes)
    theirs = model.model.layers[1].mlp
    return theirs, Experts(theirs, model.config)


def hidden(num_tokens: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(num_tokens, HIDDEN, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=str)
@torch.inference_mode()
def test_experts_are_chosen_and_weighed_as_transformers_does(
    family: str, changes: dict[str, Any], dtype: torch.dtype
) -> None:
    theirs, ours = both(family, dtype, changes)
    x = hidden(200, dtype)
    _, weights, index = theirs.gate(x)
    chosen = ours.choose(x)
    order, own_order = index.argsort(1), chosen.index.argsort(1)
    assert torch.equal(index.gather(1, order), chosen.index.gather(1, own_order))
    own = chosen.weights.to(ours._weights_dtype).gather(1, own_order)
    assert own.dtype == weights.dtype
    torch.testing.assert_close(own, weights.gather(1, order), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("num_tokens", [1, 5, 40])
@pytest.mark.parametrize(("family", "changes"), VARIANTS, ids=str)
@torch.inference_mode()
def test_experts_compute_what_those_of_transformers_do(
    family: str, changes: dict[str, Any], num_tokens: int
) -> None:
    for dtype, limits in ((torch.float64, {"rtol": 1e-6, "atol": 1e-9}), (torch.float32, {})):
        theirs, ours = both(family, dtype, changes)
        x = hidden(num_tokens, dtype)
        torch.testing.assert_close(ours(x), theirs(x[None])[0], **limits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_pairs", [1, 16, 100])
@torch.inference_mode()
def test_one_call_for_all_experts_gives_what_a_call_each_does(num_pairs: int, dtype: torch.dtype) -> None:
    weights, rows = torch.randn(8, 24, 16).to(dtype), torch.randn(num_pairs, 16).to(dtype)
    if not has_grouped(weights):
        pytest.skip("this build of PyTorch has no grouped_mm")
    chosen = torch.randint(0, 8, (num_pairs,)).sort()[0]
    ends = torch.searchsorted(chosen, torch.arange(8), right=True, out_int32=True)
    expected = torch.stack([weights[expert] @ row for expert, row in zip(chosen.tolist(), rows, strict=True)])
    limits = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
    torch.testing.assert_close(multiply_plain(rows, weights, ends), expected, **limits)
    torch.testing.assert_close(multiply_grouped(rows, weights, ends), expected, **limits)


@torch.inference_mode()
def test_experts_multiply_one_by_one_where_one_call_is_not_to_be_had_or_differs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = torch.randn(8, 24, 16)
    assert not has_grouped(weights.double()), "the kernel knows no float64"
    monkeypatch.setattr(experts, "multiply_grouped", lambda *args: multiply_plain(*args) * 1.001)
    assert not has_grouped(weights)
    theirs, ours = both("qwen3_moe", torch.float32, {})
    x = hidden(40, torch.float32)
    torch.testing.assert_close(ours(x), theirs(x[None])[0])


@torch.inference_mode()
def test_a_token_does_not_depend_on_its_company() -> None:
    _, ours = both("deepseek_v3", torch.float64, {})
    x = hidden(40, torch.float64)
    # Only the router's float32 sums can come in another order.
    torch.testing.assert_close(ours(x)[7:8], ours(x[7:8]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3"])
def test_experts_and_routers_stay_as_loaded_in_every_format(family: str) -> None:
    theirs, ours = both(family, torch.float32, {})
    assert ours.gate_up is theirs.experts.gate_up_proj and ours.down is theirs.experts.down_proj
    assert ours.router is theirs.gate.weight
    found = {id(layer) for layer in linear_layers(ours)}
    assert found == ({id(ours.shared.gate_up), id(ours.shared.down)} if ours.shared is not None else set())


@pytest.mark.parametrize(
    ("family", "changes"),
    [("qwen3_moe", {"mlp_only_layers": [0]}), ("qwen3_moe", {"decoder_sparse_step": 2}), ("deepseek_v2", {})],
    ids=str,
)
def test_dense_layers_among_those_with_experts_stay_dense(family: str, changes: dict[str, Any]) -> None:
    first, second = decoder(changed(family, **changes)).decoder.layers
    assert isinstance(first.mlp, Mlp) and isinstance(second.mlp, Experts)


def test_a_rule_of_choosing_that_is_not_known_is_named() -> None:
    config = tiny_config("deepseek_v2")
    config.topk_method = "noaux_tc"
    with pytest.raises(ModelError, match="topk_method is noaux_tc"):
        choice_of(config, None)
    with pytest.raises(ModelError, match="how llama chooses experts"):
        choice_of(tiny_config("llama"), None)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3"])
@torch.inference_mode()
def test_experts_of_bfloat16_on_a_gpu_multiply_in_one_call(family: str) -> None:
    model = tiny_model(family, torch.bfloat16).to("cuda")
    theirs = model.model.layers[1].mlp
    ours = Experts(theirs, model.config)
    assert ours.has_grouped_form
    for num_tokens in (1, 5, 40):
        x = hidden(num_tokens, torch.bfloat16).to("cuda")
        expected = theirs(x[None])[0]
        torch.testing.assert_close(ours(x), expected, rtol=5e-2, atol=2e-2 * float(expected.abs().max()))
