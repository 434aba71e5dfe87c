"""What the layers of our own decoder are made of: norms, rotations, linear layers as one, dense MLPs.

Weights are taken over from a model's own modules, never copied beside them.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

SHORTEST_ROPE_TABLE = 4096
WIDE = (torch.float32, torch.float64)


class Norm:
    """Root mean square norm over the last dimension. x: [..., D]."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        size = weight.shape[-1]
        self.weight, self.eps = weight, eps
        self._scaled = weight * size**0.5
        self._floor = weight.new_tensor((size * eps) ** 0.5)
        self._is_wide = weight.dtype in WIDE and weight.device.type == "cpu"

    def __call__(self, x: Tensor) -> Tensor:
        if not self._is_wide:
            normal = rms_norm(x, x.shape[-1:], None, self.eps)
            return normal.mul_(self.weight)
        # The same by two calls fewer: |x| / sqrt(D) is the root mean square.
        length = torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self._floor)
        return (x * self._scaled).div_(length)


def norm_of(module: Any) -> Norm:
    return Norm(module.weight.detach(), module.variance_epsilon)


class Rope:
    """Angles by position, as the model's own module gives them. Rows of the tables are made as they are needed.

    A rotation turns pairs of values: the first half with the second half or, where it is interleaved, each value at an
    even place with the next one. With `other` the partner of each value, it is x * cos + other * sin.
    """

    def __init__(self, module: nn.Module, like: Tensor, is_interleaved: bool = False) -> None:
        self._module, self._like, self._is_interleaved = module, like, is_interleaved
        self._table = torch.empty(0)
        self._extend(SHORTEST_ROPE_TABLE)

    def at(self, positions: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Cosines, and sines that are negative for the first of a pair: [T, 1, D] each. positions: [T] below `end`."""
        if end > len(self._table):
            self._extend(1 << (end - 1).bit_length())
        cos, sin = self._table.index_select(0, positions).unsqueeze(1).unbind(2)
        return cos, sin

    def table(self, num_positions: int) -> Tensor:
        """[num_positions or more, 2, D]; it lies where it is from now on unless more are asked for."""
        if num_positions > len(self._table):
            self._extend(num_positions)
        return self._table

    @torch.inference_mode()
    def _extend(self, num_positions: int) -> None:
        positions = torch.arange(num_positions, device=self._like.device)[None]
        found = self._module(self._like, positions)
        if isinstance(found, Tensor):  # complex numbers, one a pair; float32 whatever the model is
            cos, sin = found[0].real, found[0].imag
        else:  # the angle of a pair stands twice
            cos, sin = (part[0, :, : part.shape[-1] // 2] for part in found)
        dim = -1 if self._is_interleaved else -2
        table = torch.stack((torch.stack((cos, cos), dim), torch.stack((-sin, sin), dim)), 1)
        self._table = table.flatten(2)  # [positions, 2, D]


def fused(*parts: nn.Linear) -> nn.Linear:
    """Layers with the same input as one. The weights of the parts become views of its own."""
    first = parts[0]
    has_bias = any(part.bias is not None for part in parts)
    sizes = [part.out_features for part in parts]
    whole = nn.Linear(first.in_features, sum(sizes), has_bias, device="meta")
    for name in ("weight", "bias") if has_bias else ("weight",):
        with torch.no_grad():
            joined = torch.cat([_or_zeros(part, name) for part in parts])
        setattr(whole, name, nn.Parameter(joined, requires_grad=False))
        for part, own in zip(parts, joined.split(sizes), strict=True):
            if getattr(part, name) is not None:
                setattr(part, name, nn.Parameter(own, requires_grad=False))
    return whole


def _or_zeros(part: nn.Linear, name: str) -> Tensor:
    found: Tensor | None = getattr(part, name)
    return part.weight.new_zeros(part.out_features) if found is None else found


class Mlp(nn.Module):
    """silu(gate) * up, and down again."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_up = fused(mlp.gate_proj, mlp.up_proj)
        self.down = mlp.down_proj

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up.forward(x).chunk(2, 1)
        out: Tensor = self.down.forward(silu(gate).mul_(up))
        return out
