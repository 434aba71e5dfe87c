"""Keys and values in 8 bits (float8 e4m3), with a scale for each head of each token.

One scale for a whole layer would have to be measured beforehand, and 1, which needs no measuring, fails at both ends:
448 is the largest e4m3 number, and values below 2^-6 lose their bits one by one, until nothing is left below 2^-10. A
scale for each head of each token follows every range, costs 2 bytes beside a head's D, and is written where the head
is: no token's rounding depends on another one's.

A scale is a power of two, so it rounds nothing itself: what was rounded once stays as it is, however often it moves
between pools of either kind.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from runtime.step_tensors import PaddedRows, Row

EXPONENT_BITS = 0x7F800000  # of a float32
HEADROOM = 2.0**-7  # the largest value of a head becomes one in [128, 256), of 448 at most
LEAST = 2.0**-100  # the largest value of a head of zeros
SCALE_DTYPE = torch.bfloat16  # it holds every power of two that float32 does
STORED = torch.uint8  # bits of e4m3: few functions of torch take the type itself


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: [..., D]. Returns the bits of each value, uint8 [..., D], and the scale of each D, bfloat16 [...]."""
    wide = x.float()
    largest = wide.abs().amax(-1).clamp(min=LEAST)
    scale = (largest.view(torch.int32) & EXPONENT_BITS).view(torch.float32) * HEADROOM
    bits = (wide / scale.unsqueeze(-1)).to(torch.float8_e4m3fn).view(STORED)
    return bits, scale.to(SCALE_DTYPE)


def restored(bits: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """bits: uint8 [..., D]; scales: [...]. Returns [..., D] of `dtype`."""
    found: Tensor = bits.view(torch.float8_e4m3fn).to(dtype)
    return found.mul_(scales.to(dtype).unsqueeze(-1))


class RoundedCache(NamedTuple):
    """Keys and values of one layer. `rows`: uint8 [slots, 2 * kv_heads * D]; `scales`: bfloat16 [slots, 2 * kv_heads];
    `dtype`: of what is read."""

    rows: Tensor
    scales: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, pool: tuple[Tensor, Tensor], dtype: torch.dtype) -> "RoundedCache":
        """pool: uint8 [1, slots, 2 * kv_heads * D] and the bytes of the scales, [1, slots, 4 * kv_heads]."""
        return cls(pool[0][0], pool[1][0].view(SCALE_DTYPE), dtype)

    def write(self, slots: Tensor, new: Tensor) -> None:
        """new: [T, 2 * kv_heads * D]."""
        bits, scales = rounded(new.unflatten(1, (self.scales.shape[1], -1)))
        self.rows.index_copy_(0, slots, bits.flatten(1))
        self.scales.index_copy_(0, slots, scales)

    def read(self, slots: Tensor | slice) -> Tensor:
        """Returns [slots, 2 * kv_heads * D]."""
        if isinstance(slots, slice):
            bits, scales = self.rows[slots], self.scales[slots]
        else:
            bits, scales = self.rows.index_select(0, slots), self.scales.index_select(0, slots)
        return restored(bits.unflatten(1, (scales.shape[1], -1)), scales, self.dtype).flatten(1)

    def of_row(self, row: Row) -> tuple[Tensor, Tensor]:
        key, value = self._by_head(self.read(row.place), (row.context,))
        return key.transpose(0, 1)[None], value.transpose(0, 1)[None]

    def of_padded(self, rows: PaddedRows) -> tuple[Tensor, Tensor]:
        key, value = self._by_head(self.read(rows.index), (rows.last - rows.first, rows.longest))
        return key.transpose(1, 2), value.transpose(1, 2)

    def _by_head(self, found: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Keys and values, [*shape, kv_heads, D] each."""
        key, value = found.view(*shape, 2, self.scales.shape[1] // 2, -1).unbind(-3)
        return key, value
