"""Norms, turns and caches the queries, keys and values of new tokens in one pass.

Contract: `runtime.kernels.plain`.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.kernels.e4m3 import e4m3, rounding_step
from runtime.kernels.launch import launch

VALUES_PER_PROGRAM = 1024


def rope_and_cache(
    qkv: Tensor,
    table: Tensor,
    positions: Tensor,
    rows: Tensor,
    slots: Tensor,
    kv_heads: int,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
    scales: Tensor | None = None,
) -> None:
    dim = table.shape[2]
    heads = qkv.shape[1] // dim - 2 * kv_heads
    half_block = triton.next_power_of_2(dim // 2)
    head_block = min(
        triton.next_power_of_2(heads + 2 * kv_heads), max(1, VALUES_PER_PROGRAM // half_block // 2)
    )
    launch(
        _rope_and_cache, (len(qkv), triton.cdiv(heads + 2 * kv_heads, head_block)), qkv.device,
        qkv, table, positions, rows, slots, table if norm_weight is None else norm_weight,
        rows if scales is None else scales,
        qkv.stride(0), rows.stride(0), 0 if scales is None else scales.stride(0), eps,
        HEADS=heads, KV_HEADS=kv_heads, DIM=dim, HAS_NORM=norm_weight is not None, IS_ROUNDED=scales is not None,
        HEAD_BLOCK=head_block, HALF_BLOCK=half_block,
        num_warps=4,
    )  # fmt: skip


def rope_and_cache_fp8(
    qkv: Tensor,
    table: Tensor,
    positions: Tensor,
    rows: Tensor,
    scales: Tensor,
    slots: Tensor,
    kv_heads: int,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    rope_and_cache(qkv, table, positions, rows, slots, kv_heads, norm_weight, eps, scales)


@triton.jit
def _rope_and_cache(
    qkv: tl.tensor,
    table: tl.tensor,
    positions: tl.tensor,
    rows: tl.tensor,
    slots: tl.tensor,
    norm_weight: tl.tensor,
    scales: tl.tensor,
    qkv_stride: int,
    row_stride: int,
    scale_stride: int,
    eps: float,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HAS_NORM: tl.constexpr,
    IS_ROUNDED: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """A head's two halves are two tiles, as each is turned with the other."""
    HALF: tl.constexpr = DIM // 2
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
    column = tl.arange(0, HALF_BLOCK)
    inside = (head < HEADS + 2 * KV_HEADS)[:, None] & (column < HALF)[None]
    is_turned = inside & (head < HEADS + KV_HEADS)[:, None]
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = qkv + token * qkv_stride + head[:, None] * DIM + column[None]
    raw_left = tl.load(at, mask=inside, other=0.0)
    raw_right = tl.load(at + HALF, mask=inside, other=0.0)
    left, right = raw_left.to(tl.float32), raw_right.to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt((tl.sum(left * left, 1) + tl.sum(right * right, 1)) / DIM + eps)[:, None]
        weight = norm_weight + head[:, None] * DIM + column[None]
        left = left * scale * tl.load(weight, mask=is_turned, other=0.0).to(tl.float32)
        right = right * scale * tl.load(weight + HALF, mask=is_turned, other=0.0).to(tl.float32)
    angle = table + tl.load(positions + token).to(tl.int64) * (2 * DIM) + column
    in_half = column < HALF
    cos_left = tl.load(angle, mask=in_half, other=0.0).to(tl.float32)[None]
    cos_right = tl.load(angle + HALF, mask=in_half, other=0.0).to(tl.float32)[None]
    sin_left = tl.load(angle + DIM, mask=in_half, other=0.0).to(tl.float32)[None]
    sin_right = tl.load(angle + DIM + HALF, mask=in_half, other=0.0).to(tl.float32)[None]
    new_left = (left * cos_left + right * sin_left).to(raw_left.dtype)
    new_right = (right * cos_right + left * sin_right).to(raw_left.dtype)
    tl.store(at, new_left, mask=is_turned)
    tl.store(at + HALF, new_right, mask=is_turned)
    # Keys of all heads, then values of all heads: what follows the queries, as it is.
    slot = tl.load(slots + token).to(tl.int64)
    is_cached = inside & (head >= HEADS)[:, None] & (slot >= 0)
    place = rows + slot * row_stride + (head - HEADS)[:, None] * DIM + column[None]
    cached_left = tl.where(is_turned, new_left, raw_left)
    cached_right = tl.where(is_turned, new_right, raw_right)
    if IS_ROUNDED:  # as `runtime.rounded_cache` has it
        wide_left, wide_right = cached_left.to(tl.float32), cached_right.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(wide_left), 1), tl.max(tl.abs(wide_right), 1))
        step = rounding_step(largest)
        is_head = (head >= HEADS) & (head < HEADS + 2 * KV_HEADS) & (slot >= 0)
        tl.store(scales + slot * scale_stride + head - HEADS, step.to(scales.dtype.element_ty), mask=is_head)
        tl.store(place, e4m3(wide_left / step[:, None]), mask=is_cached)
        tl.store(place + HALF, e4m3(wide_right / step[:, None]), mask=is_cached)
    else:
        tl.store(place, cached_left, mask=is_cached)
        tl.store(place + HALF, cached_right, mask=is_cached)
