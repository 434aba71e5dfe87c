"""Which experts each token goes to, and with what weights: the rules of Mixtral, Qwen3-MoE, DeepSeek-V2 and V3."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from runtime.errors import ModelError


class Chosen(NamedTuple):
    """The experts of each token. Both: [T, top_k]."""

    weights: Tensor
    index: Tensor


class Rule(NamedTuple):
    """How a router's logits become a choice. `bias`: [experts], of scores that are sigmoids; None where they are a
    softmax. `factor`: of all weights."""

    top_k: int
    num_groups: int = 1
    kept_groups: int = 1
    is_normalised: bool = False
    factor: float = 1.0
    bias: Tensor | None = None

    def choose(self, logits: Tensor) -> Chosen:
        """logits: [T, experts]."""
        if self.bias is None:
            return by_softmax(logits, *self[:5])
        return by_sigmoid(logits, self.bias, *self[:5])


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


def choice_of(config: Any, bias: Tensor | None) -> Rule:
    """Raises ModelError where the rule is not known here."""
    match config.model_type:
        case "mixtral":
            return Rule(config.num_experts_per_tok, is_normalised=True)
        case "qwen3_moe":
            return Rule(config.num_experts_per_tok, is_normalised=config.norm_topk_prob)
        case "deepseek_v2":  # normalises in no case, whatever its configuration says
            top_k, factor = config.num_experts_per_tok, config.routed_scaling_factor
            if config.topk_method == "greedy":
                return Rule(top_k, factor=factor)
            if config.topk_method == "group_limited_greedy":
                return Rule(top_k, config.n_group, config.topk_group, factor=factor)
            raise ModelError(f"its topk_method is {config.topk_method}, not greedy or group_limited_greedy")
        case "deepseek_v3" if bias is not None:
            return Rule(
                config.num_experts_per_tok, config.n_group, config.topk_group, config.norm_topk_prob,
                config.routed_scaling_factor, bias,
            )  # fmt: skip
    raise ModelError(f"how {config.model_type} chooses experts is not known here")
