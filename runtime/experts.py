"""Mixtures of experts: what those that each token goes to make of it. Which they are: `runtime.expert_choice`.

Pairs of a token and one of its experts are sorted by expert, so that each expert multiplies its tokens at once.
`multiply_plain` says what is meant; `grouped_mm` does it in one call where a device has it and gives the same.
The experts' weights and the router's stay as loaded in every weight format: they are no `nn.Linear`.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import linear, silu

from runtime.expert_choice import Chosen, choice_of
from runtime.layer_parts import Mlp

log = logging.getLogger(__name__)

# Below, a call an expert is faster on a CPU. Measured on one Zen core, 16 experts of 256 x 256, µs a call each against
# one call: at 4 pairs 34 / 43 in float32 and 127 / 135 in bfloat16, at 16 133 / 122 and 284 / 360, at 64 297 / 262 and
# 652 / 355.
GROUPED_MIN_PAIRS_CPU = 32
WIDE_ROUTERS = ("deepseek_v2", "deepseek_v3")  # they compute logits in float32 whatever the model is


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
        self.rule = choice_of(config, getattr(mlp.gate, "e_score_correction_bias", None))
        # Held twice where the model is narrower than its router's arithmetic: 4 bytes a value of the router.
        router = self.router.detach()
        self._router = router.float() if config.model_type in WIDE_ROUTERS else router
        self._numbers = torch.arange(len(router), device=router.device)
        self._weights_dtype = router.dtype if config.model_type == "qwen3_moe" else torch.float32
        self.has_grouped_form = has_grouped(self.gate_up) and has_grouped(self.down)

    def choose(self, x: Tensor) -> Chosen:
        return self.rule.choose(linear(x.to(self._router.dtype), self._router))

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, hidden]. Returns the same shape and type."""
        weights, index = self.choose(x)
        top_k = index.shape[1]
        experts, pairs = index.flatten().sort()
        ends = torch.searchsorted(experts, self._numbers, right=True, out_int32=True)
        is_grouped = self.has_grouped_form and (x.is_cuda or len(pairs) >= GROUPED_MIN_PAIRS_CPU)
        multiply = multiply_grouped if is_grouped else multiply_plain
        rows = x.index_select(0, pairs.div(top_k, rounding_mode="floor"))
        gate, up = multiply(rows, self.gate_up, ends).chunk(2, 1)
        sorted_out = multiply(silu(gate).mul_(up), self.down, ends)
        by_token = torch.empty_like(sorted_out).index_copy_(0, pairs, sorted_out).unflatten(0, (-1, top_k))
        out = (by_token * weights.to(self._weights_dtype).unsqueeze(2)).sum(1).to(x.dtype)
        return out if self.shared is None else out.add_(self.shared.forward(x))
