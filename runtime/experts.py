"""Mixtures of experts: which experts each token goes to, and what they make of it.

Pairs of a token and one of its experts are sorted by expert, so that each expert multiplies its tokens at once.
`multiply_plain` says what is meant; `grouped_mm` does it in one call where a device has it and gives the same.
The experts' weights and the router's stay as loaded in every weight format: they are no `nn.Linear`.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import linear, silu

from runtime.errors import ModelError
from runtime.layer_parts import Mlp

log = logging.getLogger(__name__)

# Below, a call an expert is faster on a CPU. Measured on one Zen core, 16 experts of 256 x 256, µs a call each against
# one call: at 4 pairs 34 / 43 in float32 and 127 / 135 in bfloat16, at 16 133 / 122 and 284 / 360, at 64 297 / 262 and
# 652 / 355.
GROUPED_MIN_PAIRS_CPU = 32
WIDE_ROUTERS = ("deepseek_v2", "deepseek_v3")  # they compute logits in float32 whatever the model is


class Chosen(NamedTuple):
    """The experts of each token. Both: [T, top_k]."""

    weights: Tensor
    index: Tensor


Choice = Callable[[Tensor], Chosen]  # from logits [T, experts]


def by_softmax(
    logits: Tensor,
    top_k: int,
    num_groups: int = 1,
    kept_groups: int = 1,
    is_normalised: bool = False,
    factor: float = 1.0,
) -> Chosen:
    """The likeliest experts; with groups, those in the groups whose best expert is likeliest."""
    scores = torch.softmax(logits, -1, dtype=torch.float32)
    if kept_groups < num_groups:
        best = scores.unflatten(1, (num_groups, -1)).amax(-1)
        scores = scores.masked_fill(~in_best_groups(best, kept_groups, logits.shape[1]), 0.0)
    weights, index = scores.topk(top_k)
    if is_normalised:
        weights = weights / weights.sum(-1, keepdim=True)
    return Chosen(weights if factor == 1.0 else weights * factor, index)


def by_sigmoid(
    logits: Tensor,
    bias: Tensor,
    top_k: int,
    num_groups: int,
    kept_groups: int,
    is_normalised: bool,
    factor: float,
) -> Chosen:
    """Those with the highest biased scores, in the groups whose two best have the highest sum. The bias, [experts],
    has no part in the weights."""
    scores = logits.sigmoid()
    biased = scores + bias
    if kept_groups < num_groups:
        best = biased.unflatten(1, (num_groups, -1)).topk(2)[0].sum(-1)
        biased = biased.masked_fill(~in_best_groups(best, kept_groups, logits.shape[1]), float("-inf"))
    index = biased.topk(top_k, sorted=False)[1]  # as transformers does: the order decides how a sum rounds
    weights = scores.gather(1, index)
    if is_normalised:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return Chosen(weights * factor, index)


def in_best_groups(scores: Tensor, kept_groups: int, num_experts: int) -> Tensor:
    """scores: [T, groups]. Returns bool [T, experts]."""
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(kept_groups)[1], True)
    return kept.repeat_interleave(num_experts // scores.shape[1], 1)


def choice_of(config: Any, bias: Tensor | None) -> Choice:
    """Raises ModelError where the rule is not known here."""
    match config.model_type:
        case "mixtral":
            return partial(by_softmax, top_k=config.num_experts_per_tok, is_normalised=True)
        case "qwen3_moe":
            normalised = config.norm_topk_prob
            return partial(by_softmax, top_k=config.num_experts_per_tok, is_normalised=normalised)
        case "deepseek_v2":  # normalises in no case, whatever its configuration says
            top_k, factor = config.num_experts_per_tok, config.routed_scaling_factor
            if config.topk_method == "greedy":
                return partial(by_softmax, top_k=top_k, factor=factor)
            if config.topk_method == "group_limited_greedy":
                groups = {"num_groups": config.n_group, "kept_groups": config.topk_group}
                return partial(by_softmax, top_k=top_k, factor=factor, **groups)
            raise ModelError(f"its topk_method is {config.topk_method}, not greedy or group_limited_greedy")
        case "deepseek_v3" if bias is not None:
            return partial(
                by_sigmoid,
                bias=bias,
                top_k=config.num_experts_per_tok,
                num_groups=config.n_group,
                kept_groups=config.topk_group,
                is_normalised=config.norm_topk_prob,
                factor=config.routed_scaling_factor,
            )
    raise ModelError(f"how {config.model_type} chooses experts is not known here")


def multiply_plain(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Each expert's rows by its weight, the specification of the grouped form.

    rows: [pairs, in], sorted by expert; weights: [experts, out, in]; ends: [experts], where the rows of each expert
    end. Returns [pairs, out].
    """
    outputs, start = [], 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            outputs.append(linear(rows[start:end], weights[expert]))
        start = end
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def multiply_grouped(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """`multiply_plain` in one call, without a word from the device to the host."""
    out: Tensor = functional.grouped_mm(rows, weights.transpose(1, 2), offs=ends)
    return out


@torch.inference_mode()
def has_grouped(weights: Tensor) -> bool:
    """Whether the grouped form takes these weights here, and gives what the plain one does."""
    num_experts, _, in_features = weights.shape
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(7, in_features, generator=generator).to(weights.device, weights.dtype)
    ends = torch.full((num_experts,), 7, dtype=torch.int32, device=weights.device)
    ends[0], ends[1:-1] = 2, 5  # experts with and without rows
    expected = multiply_plain(rows, weights, ends)
    try:
        error = (multiply_grouped(rows, weights, ends) - expected).abs().max()
    except (AttributeError, NotImplementedError, RuntimeError) as refused:
        log.info("experts multiply one by one: %s", str(refused).splitlines()[0])
        return False
    # Another order of summation; half types round what they put out.
    limit = 8 * torch.finfo(weights.dtype).eps * expected.abs().max().clamp(min=1e-6)
    return bool(error <= limit)


class Experts(nn.Module):
    """The routed experts of a layer, and its shared ones as one MLP. Weights are the model's own tensors."""

    def __init__(self, mlp: Any, config: Any) -> None:
        super().__init__()
        self.router, self.gate_up, self.down = (
            mlp.gate.weight,  # [experts, hidden]
            mlp.experts.gate_up_proj,  # [experts, 2 * size, hidden]
            mlp.experts.down_proj,  # [experts, hidden, size]
        )
        self.shared = Mlp(mlp.shared_experts) if hasattr(mlp, "shared_experts") else None
        self._choice = choice_of(config, getattr(mlp.gate, "e_score_correction_bias", None))
        # Held twice where the model is narrower than its router's arithmetic: 4 bytes a value of the router.
        router = self.router.detach()
        self._router = router.float() if config.model_type in WIDE_ROUTERS else router
        self._numbers = torch.arange(len(router), device=router.device)
        self._weights_dtype = router.dtype if config.model_type == "qwen3_moe" else torch.float32
        self._has_grouped = has_grouped(self.gate_up) and has_grouped(self.down)

    def choose(self, x: Tensor) -> Chosen:
        return self._choice(linear(x.to(self._router.dtype), self._router))

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, hidden]. Returns the same shape and type."""
        weights, index = self.choose(x)
        top_k = index.shape[1]
        experts, pairs = index.flatten().sort()
        ends = torch.searchsorted(experts, self._numbers, right=True, out_int32=True)
        is_grouped = self._has_grouped and (x.is_cuda or len(pairs) >= GROUPED_MIN_PAIRS_CPU)
        multiply = multiply_grouped if is_grouped else multiply_plain
        rows = x.index_select(0, pairs.div(top_k, rounding_mode="floor"))
        gate, up = multiply(rows, self.gate_up, ends).chunk(2, 1)
        sorted_out = multiply(silu(gate).mul_(up), self.down, ends)
        by_token = torch.empty_like(sorted_out).index_copy_(0, pairs, sorted_out).unflatten(0, (-1, top_k))
        out = (by_token * weights.to(self._weights_dtype).unsqueeze(2)).sum(1).to(x.dtype)
        return out if self.shared is None else out.add_(self.shared.forward(x))
