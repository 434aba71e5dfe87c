"""Experts by kernels: the router, the rows of each expert, and their sum, without a word from the device to the host.

    1 row         route ▶ gate, up ▶ down               each of its experts is a block; the shared ones are experts too
    several       route ▶ lay out ▶ gate, up ▶ down     blocks of rows of one expert
    a prompt's    route ▶ lay out ▶ grouped_mm ▶ silu ▶ grouped_mm ▶ weigh    the shared ones are an MLP beside

It computes what `Experts.forward` computes, except that logits and weights of the routers are in float32 in all models.
"""

import torch
from torch import Tensor, nn

from runtime.experts import Experts, multiply_grouped
from runtime.kernels import Kernels
from runtime.kernels.linear_table import LinearTable, is_plain
from runtime.layer_parts import Mlp

PAIR_A_BLOCK_MAX_ROWS = 1  # several rows may share an expert, whose weights would be read for each
GROUPED_MIN_ROWS = 1024  # not measured: there a block of 128 rows an expert is full in DeepSeek-V2-Lite
BLOCK_ROWS = (16, 32, 64, 128)
# A block holds so much more than the mean, so that most experts need only one: a second one reads weights again.
ROOM = 4 / 3


class FusedExperts:
    """The experts of any layer."""

    def __init__(self, kernels: Kernels, linears: LinearTable) -> None:
        self._kernels, self._linears = kernels, linears

    def forward(self, x: Tensor, layer: Experts) -> Tensor:
        """x: [T, hidden], normed. Returns the same shape, or parts [S, T, hidden] in float32, as `add_norm` takes
        both."""
        if layer.has_grouped_form and x.is_cuda and len(x) >= GROUPED_MIN_ROWS:
            return self._many(x, layer)
        return self._few(x, layer)

    def _few(self, x: Tensor, layer: Experts) -> Tensor:
        kernels, shared = self._kernels, layer.shared
        weights, index = kernels.route(x, layer.router, layer.rule)
        layout = None
        if len(x) > PAIR_A_BLOCK_MAX_ROWS:
            num_experts = len(layer.gate_up)
            layout = kernels.lay_out(index, num_experts, block_rows(index.numel(), num_experts))
        up = down = beside = None
        if shared is not None and are_experts(shared, layer):
            up, down = shared.gate_up.weight, shared.down.weight
        elif shared is not None:
            beside = self._mlp(x, shared)
        inner = kernels.expert_gate_up(x, layer.gate_up, up, index, layout)
        parts = kernels.expert_down(inner, layer.down, down, index, weights, layout)
        return parts if beside is None else torch.cat((parts, beside.unsqueeze(0).to(parts.dtype)))

    def _many(self, x: Tensor, layer: Experts) -> Tensor:
        kernels = self._kernels
        weights, index = kernels.route(x, layer.router, layer.rule)
        layout = kernels.lay_out(index, len(layer.gate_up), 1)
        rows = x.index_select(0, layout.rows.div(index.shape[1], rounding_mode="floor"))
        inner = kernels.silu_mul(multiply_grouped(rows, layer.gate_up, layout.ends))
        found = multiply_grouped(inner, layer.down, layout.ends)
        beside = None if layer.shared is None else self._mlp(x, layer.shared)
        return kernels.weigh(found, weights, layout.places, beside)

    def _mlp(self, x: Tensor, mlp: Mlp) -> Tensor:
        out: Tensor = mlp.down.forward(self._linears.gated(mlp.gate_up, x))
        return out


def block_rows(num_pairs: int, num_experts: int) -> int:
    """Rows of a block, from shapes alone."""
    wanted = ROOM * num_pairs / num_experts
    return next((size for size in BLOCK_ROWS if size >= wanted), BLOCK_ROWS[-1])


def are_experts(shared: Mlp, layer: Experts) -> bool:
    """Whether the shared MLP can be taken for experts of the routed ones' size: its weights are as loaded and those of
    several such experts side by side."""
    parts: tuple[nn.Linear, ...] = (shared.gate_up, shared.down)
    return all(is_plain(part) for part in parts) and shared.down.in_features % layer.down.shape[2] == 0
