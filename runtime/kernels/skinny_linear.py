"""Linear layers of a few rows whose outputs are too few to keep a GPU busy: the inputs are shared out too.

Contract: `skinny_linear` in `runtime.kernels.plain`.

A program streams some rows of the weight past all rows of x, over a part of the columns. The parts stay apart: whoever
adds the result to something (`add_norm`) adds them in fixed order on the way, so the same input gives the same output
always, which atomic additions would not, and no kernel is launched for it. The weight is the left factor of the
products: it fills the 64 rows of a tensor core's tile, of which a few rows of x would leave most empty.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.kernels.early_start import early_start

MAX_ROWS = 64
MIN_DOT = 16
COLUMN_BYTES = 256  # of a tile's row: 128 values of two bytes
MAX_SPLIT = 8
MIN_STEPS = 2  # tiles of a part, so that one is loaded while another is multiplied
WANTED_PROGRAMS = 192  # of 132 SMs; llama-8b's 4096 x 4096 took 10.5 to 10.8 us with 128 to 256, 14 in cuBLAS (H200)


class Tiles(NamedTuple):
    """How the work is shared out: rows of the weight a program, columns a step of it, parts of the columns."""

    block_n: int = 64
    block_k: int = 128
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 4


def default_tiles(out_features: int, in_features: int, element_bytes: int = 2) -> Tiles:
    """Split so often that there are programs for all SMs."""
    block_k = COLUMN_BYTES // element_bytes
    programs = triton.cdiv(out_features, Tiles().block_n)
    split_k = 1
    while (
        programs * split_k < WANTED_PROGRAMS
        and split_k < MAX_SPLIT
        and in_features >= 2 * split_k * MIN_STEPS * block_k
    ):
        split_k *= 2
    return Tiles(block_k=block_k, split_k=split_k)


def skinny_linear(x: Tensor, weight: Tensor, tiles: Tiles | None = None) -> Tensor:
    """`tiles`: a guess from the shape where none are given.

    Raises:
        ValueError: x has more than 64 rows.
    """
    (num_rows, in_features), out_features = x.shape, len(weight)
    if num_rows > MAX_ROWS:
        raise ValueError(
            f"x must have at most {MAX_ROWS} rows, but got {num_rows}. Use torch.nn.functional.linear for more."
        )
    tiles = tiles or default_tiles(out_features, in_features, x.element_size())
    split = tiles.split_k
    columns = triton.cdiv(triton.cdiv(in_features, split), tiles.block_k) * tiles.block_k
    parts = torch.empty(split, num_rows, out_features, dtype=torch.float32, device=x.device)
    _skinny[(triton.cdiv(out_features, tiles.block_n), split)](
        x, weight, parts, num_rows, out_features, in_features, columns, x.stride(0), weight.stride(0),
        IS_EVEN=columns * split == in_features,
        BLOCK_M=max(MIN_DOT, triton.next_power_of_2(num_rows)), BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, **early_start(x),
    )  # fmt: skip
    return parts


@triton.jit
def _skinny(
    x: tl.tensor,
    weight: tl.tensor,
    parts: tl.tensor,
    num_rows: int,
    out_features: int,
    in_features: int,
    columns: int,
    x_stride: int,
    weight_stride: int,
    IS_EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    part = tl.program_id(1)
    m, n = tl.arange(0, BLOCK_M), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = part * columns + tl.arange(0, BLOCK_K)
    # Rows beyond the edge read the last one again: that is cheaper than a mask in the loop.
    x_at = x + tl.minimum(m, num_rows - 1)[:, None] * x_stride + k[None]
    weight_at = weight + tl.minimum(n, out_features - 1).to(tl.int64)[:, None] * weight_stride + k[None]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    for done in range(0, columns, BLOCK_K):
        if IS_EVEN:
            some_x = tl.load(x_at + done, eviction_policy="evict_last")
            some = tl.load(weight_at + done, eviction_policy="evict_first")
        else:
            left = (k + done < in_features)[None]
            some_x = tl.load(x_at + done, mask=left, other=0.0, eviction_policy="evict_last")
            some = tl.load(weight_at + done, mask=left, other=0.0, eviction_policy="evict_first")
        acc = tl.dot(some, tl.trans(some_x), acc, input_precision="ieee")
    inside = (m < num_rows)[None] & (n < out_features)[:, None]
    tl.store(parts + (part * num_rows + m)[None] * out_features + n[:, None], acc, mask=inside)
