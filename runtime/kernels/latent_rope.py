"""Turns queries and the one key of a latent cache, norms the latent, and writes both in one pass.

Contract: `latent_rope_and_cache` in `runtime.kernels.plain`.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.kernels.early_start import early_start

VALUES_PER_PROGRAM = 1024


def latent_rope_and_cache(
    target: Tensor,
    turn: Tensor,
    new: Tensor,
    table: Tensor,
    positions: Tensor,
    rows: Tensor,
    slots: Tensor,
    norm_weight: Tensor,
    eps: float,
    is_interleaved: bool,
) -> None:
    num_tokens, heads, dim = turn.shape
    rank, half_block = len(norm_weight), triton.next_power_of_2(dim // 2)
    head_block = min(triton.next_power_of_2(heads), max(1, VALUES_PER_PROGRAM // half_block))
    _latent_rope[(num_tokens, 1 + triton.cdiv(heads, head_block))](
        target, turn, new, table, positions, rows, slots, norm_weight,
        target.stride(0), target.stride(1), turn.stride(0), turn.stride(1), new.stride(0), rows.stride(0), eps,
        HEADS=heads, RANK=rank, DIM=dim, IS_INTERLEAVED=is_interleaved,
        HEAD_BLOCK=head_block, HALF_BLOCK=half_block, RANK_BLOCK=triton.next_power_of_2(rank),
        num_warps=4, **early_start(turn),
    )  # fmt: skip


@triton.jit
def _norm_latent(
    source: tl.tensor, place: tl.tensor, norm_weight: tl.tensor, eps: tl.tensor, RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    value = tl.arange(0, RANK_BLOCK)
    latent = tl.load(source + value, mask=value < RANK, other=0.0)
    wide = latent.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / RANK + eps)
    normal = wide * scale * tl.load(norm_weight + value, mask=value < RANK, other=0.0).to(tl.float32)
    tl.store(place + value, normal.to(latent.dtype), mask=value < RANK)


@triton.jit
def _latent_rope(
    target: tl.tensor,
    turn: tl.tensor,
    new: tl.tensor,
    table: tl.tensor,
    positions: tl.tensor,
    rows: tl.tensor,
    slots: tl.tensor,
    norm_weight: tl.tensor,
    target_row: int,
    target_head: int,
    turn_row: int,
    turn_head: int,
    new_row: int,
    row_stride: int,
    eps: float,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    DIM: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """The first program of a token caches its latent and key, the others turn its queries."""
    STEP: tl.constexpr = 2 if IS_INTERLEAVED else 1
    RIGHT: tl.constexpr = 1 if IS_INTERLEAVED else DIM // 2  # from a value to its partner
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half = tl.arange(0, HALF_BLOCK)
    inside = half < DIM // 2
    column = half * STEP
    angle = table + tl.load(positions + token).to(tl.int64) * (2 * DIM) + column
    cos_left = tl.load(angle, mask=inside, other=0.0).to(tl.float32)
    cos_right = tl.load(angle + RIGHT, mask=inside, other=0.0).to(tl.float32)
    sin_left = tl.load(angle + DIM, mask=inside, other=0.0).to(tl.float32)
    sin_right = tl.load(angle + DIM + RIGHT, mask=inside, other=0.0).to(tl.float32)
    if part > 0:
        head = (part - 1) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
        wanted = (head < HEADS)[:, None] & inside[None]
        at = turn + token * turn_row + head[:, None] * turn_head + column[None]
        left = tl.load(at, mask=wanted, other=0.0)
        right = tl.load(at + RIGHT, mask=wanted, other=0.0).to(tl.float32)
        new_left = left.to(tl.float32) * cos_left[None] + right * sin_left[None]
        new_right = right * cos_right[None] + left.to(tl.float32) * sin_right[None]
        place = target + token * target_row + head[:, None] * target_head + column[None]
        tl.store(place, new_left.to(left.dtype), mask=wanted)
        tl.store(place + RIGHT, new_right.to(left.dtype), mask=wanted)
    else:
        slot = tl.load(slots + token).to(tl.int64)
        if slot >= 0:
            source, place = new + token * new_row, rows + slot * row_stride
            _norm_latent(source, place, norm_weight, eps, RANK, RANK_BLOCK)
            key_left = tl.load(source + RANK + column, mask=inside, other=0.0)
            key_right = tl.load(source + RANK + column + RIGHT, mask=inside, other=0.0).to(tl.float32)
            turned_left = key_left.to(tl.float32) * cos_left + key_right * sin_left
            turned_right = key_right * cos_right + key_left.to(tl.float32) * sin_right
            tl.store(place + RANK + column, turned_left.to(key_left.dtype), mask=inside)
            tl.store(place + RANK + column + RIGHT, turned_right.to(key_left.dtype), mask=inside)
