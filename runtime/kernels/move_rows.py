"""Moves cached rows between a cache of whole values and one of 8 bits, in one pass.

Contract: `runtime.kernels.plain`.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.kernels.e4m3 import e4m3, rounding_step
from runtime.kernels.launch import launch

VALUES_PER_PROGRAM = 2048


def round_rows(into: Tensor, scales: Tensor, rows: Tensor, sources: Tensor, targets: Tensor) -> None:
    heads, dim = scales.shape[1], rows.shape[1] // scales.shape[1]
    head_block, dim_block = _blocks(heads, dim)
    launch(
        _round_rows, (len(sources), triton.cdiv(heads, head_block)), rows.device,
        rows, sources, targets, into, scales, rows.stride(0), into.stride(0), scales.stride(0),
        HEADS=heads, DIM=dim, HEAD_BLOCK=head_block, DIM_BLOCK=dim_block,
        num_warps=4,
    )  # fmt: skip


def restore_rows(into: Tensor, rows: Tensor, scales: Tensor, sources: Tensor, targets: Tensor) -> None:
    heads, dim = scales.shape[1], into.shape[1] // scales.shape[1]
    head_block, dim_block = _blocks(heads, dim)
    launch(
        _restore_rows, (len(sources), triton.cdiv(heads, head_block)), rows.device,
        rows, scales, sources, targets, into, rows.stride(0), scales.stride(0), into.stride(0),
        HEADS=heads, DIM=dim, HEAD_BLOCK=head_block, DIM_BLOCK=dim_block,
        num_warps=4,
    )  # fmt: skip


def _blocks(heads: int, dim: int) -> tuple[int, int]:
    dim_block = triton.next_power_of_2(dim)
    return min(triton.next_power_of_2(heads), max(1, VALUES_PER_PROGRAM // dim_block)), dim_block


@triton.jit
def _round_rows(
    rows: tl.tensor,
    sources: tl.tensor,
    targets: tl.tensor,
    into: tl.tensor,
    scales: tl.tensor,
    row_stride: int,
    into_stride: int,
    scale_stride: int,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
    column = tl.arange(0, DIM_BLOCK)
    inside = (head < HEADS)[:, None] & (column < DIM)[None]
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    source, target = tl.load(sources + at), tl.load(targets + at)
    place = head[:, None] * DIM + column[None]
    wide = tl.load(rows + source * row_stride + place, mask=inside, other=0.0).to(tl.float32)
    step = rounding_step(tl.max(tl.abs(wide), 1))
    tl.store(scales + target * scale_stride + head, step.to(scales.dtype.element_ty), mask=head < HEADS)
    tl.store(into + target * into_stride + place, e4m3(wide / step[:, None]), mask=inside)


@triton.jit
def _restore_rows(
    rows: tl.tensor,
    scales: tl.tensor,
    sources: tl.tensor,
    targets: tl.tensor,
    into: tl.tensor,
    row_stride: int,
    scale_stride: int,
    into_stride: int,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    at = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
    column = tl.arange(0, DIM_BLOCK)
    inside = (head < HEADS)[:, None] & (column < DIM)[None]
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    source, target = tl.load(sources + at), tl.load(targets + at)
    place = head[:, None] * DIM + column[None]
    bits = tl.load(rows + source * row_stride + place, mask=inside, other=0)
    step = tl.load(scales + source * scale_stride + head, mask=head < HEADS, other=0.0).to(tl.float32)
    # A half holds every e4m3 number, and there is a conversion to it on every GPU.
    found = bits.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(tl.float32) * step[:, None]
    tl.store(into + target * into_stride + place, found.to(into.dtype.element_ty), mask=inside)
