"""Linear layers of a few rows, as fast as their weights can be read.

Contract: `linear` in `runtime.kernels.plain`.

A program streams some rows of the weight past all rows of x. Where the weight has too few rows to give every SM work,
its columns are shared out too (`split_k`), and the parts are added by a second kernel in fixed order: the same input
gives the same output always, which atomic additions would not.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ROWS = 64
MIN_DOT = 16
REDUCED_PER_PROGRAM = 512


class Tiles(NamedTuple):
    """How the work is shared out: rows of the weight a program, columns a step of it, parts of the columns."""

    block_n: int = 32
    block_k: int = 256
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 4


def default_tiles(num_rows: int, out_features: int, in_features: int, element_bytes: int = 2) -> Tiles:
    """A guess for where nothing was measured: narrow tiles for few rows, wide ones for many, whose x is read again by
    each program; split where fewer than about two programs an SM would be left."""
    block_n = 16 if num_rows <= 16 else 64
    block_k = 256 if num_rows <= 16 else 128
    while block_k > 32 and block_k * element_bytes > 2 * 256:
        block_k //= 2
    programs = triton.cdiv(out_features, block_n)
    split_k = 1
    while programs * split_k < 192 and in_features // (split_k * 2) >= 2 * block_k:
        split_k *= 2
    return Tiles(block_n, block_k, split_k)


def skinny_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, tiles: Tiles | None = None
) -> Tensor:
    """`tiles`: measured ones where they are known.

    Raises:
        ValueError: x has more than 64 rows.
    """
    (num_rows, in_features), out_features = x.shape, len(weight)
    if num_rows > MAX_ROWS:
        raise ValueError(
            f"x must have at most {MAX_ROWS} rows, but got {num_rows}. Use torch.nn.functional.linear for more."
        )
    tiles = tiles or default_tiles(num_rows, out_features, in_features, x.element_size())
    out = torch.empty(num_rows, out_features, dtype=x.dtype, device=x.device)
    split = tiles.split_k
    parts = out
    if split > 1:
        parts = torch.empty(split, num_rows, out_features, dtype=torch.float32, device=x.device)
    _skinny[(triton.cdiv(out_features, tiles.block_n), split)](
        x, weight, weight if bias is None else bias, parts, num_rows, x.stride(0), weight.stride(0),
        N=out_features, K=in_features, PART=triton.cdiv(triton.cdiv(in_features, split), tiles.block_k) * tiles.block_k,
        SPLIT=split, HAS_BIAS=bias is not None,
        BLOCK_M=max(MIN_DOT, triton.next_power_of_2(num_rows)), BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    if split > 1:
        _add_parts[(num_rows, triton.cdiv(out_features, REDUCED_PER_PROGRAM))](
            parts, weight if bias is None else bias, out, num_rows,
            N=out_features, SPLIT=split, HAS_BIAS=bias is not None, BLOCK=REDUCED_PER_PROGRAM,
            num_warps=4,
        )  # fmt: skip
    return out


@triton.jit
def _skinny(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    num_rows: int,
    x_stride: int,
    weight_stride: int,
    N: tl.constexpr,
    K: tl.constexpr,
    PART: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    part = tl.program_id(1)
    m, n = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = part * PART + tl.arange(0, BLOCK_K)
    # Rows beyond the edge read the last one again: that is cheaper than a mask in the loop.
    x_at = x + tl.minimum(m, num_rows - 1)[:, None] * x_stride + k[None]
    weight_at = weight + tl.minimum(n, N - 1).to(tl.int64)[None] * weight_stride + k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for done in range(0, PART, BLOCK_K):
        if K == PART * SPLIT:
            some_x = tl.load(x_at + done, eviction_policy="evict_last")
            some = tl.load(weight_at + done, eviction_policy="evict_first")
        else:
            left = k + done < K
            some_x = tl.load(x_at + done, mask=left[None], other=0.0, eviction_policy="evict_last")
            some = tl.load(weight_at + done, mask=left[:, None], other=0.0, eviction_policy="evict_first")
        acc = tl.dot(some_x, some, acc, input_precision="ieee")
    inside = (m < num_rows)[:, None] & (n < N)[None]
    if SPLIT > 1:
        tl.store(out + (part * num_rows + m)[:, None] * N + n[None], acc, mask=inside)
    else:
        if HAS_BIAS:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None]
        tl.store(out + m[:, None] * N + n[None], acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_parts(
    parts: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    num_rows: int,
    N: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row, n = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    acc = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(SPLIT):
        acc += tl.load(parts + (part * num_rows + row) * N + n, mask=inside, other=0.0)
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * N + n, acc.to(out.dtype.element_ty), mask=inside)
