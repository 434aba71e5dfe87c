"""Linear layers of a few rows, as fast as their weights can be read.

    skinny_linear   all of the product
    skinny_parts    where outputs are too few to keep a GPU busy: the inputs are shared out too, into parts
    skinny_gated    gate and up of an MLP, multiplied as they are at hand

Contract: `runtime.kernels.plain`.

A program streams some rows of the weight past all rows of x, or past 64 or 128 of them. Whoever adds a product to
something (`add_norm`) adds its parts in fixed order on the way, so the same input gives the same output always, which
atomic additions would not, and no kernel is launched for it. The weight is the left factor of the products: it fills
the 64 rows of a tensor core's tile, of which a few rows of x would leave most empty.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.kernels.launch import FEW_ROWS, LARGE_TILE_BYTES, has_large_tiles, launch

MAX_ROWS = 256
MAX_ROW_BLOCK = 128  # beyond, a program's sums would not fit in its registers
MIN_DOT = 16
COLUMN_BYTES = 256  # of a tile's row: 128 values of two bytes
MAX_SPLIT = 8
MIN_STEPS = 2  # tiles of a part, so that one is loaded while another is multiplied
WANTED_PROGRAMS = (
    192  # of 132 SMs; llama-8b's 4096 x 4096 took 10.5 to 10.8 us with 128 to 256, 14 in cuBLAS (H200)
)
# Below, smaller tiles that more programs share, and parts of products of many rows, are worth their overhead.
ENOUGH_PROGRAMS = 90
STAGED_BYTES = 2**17  # of shared memory, for few rows
SMALL_STAGED_BYTES = 98_304  # where a program may share 99 KiB: consumer GPUs
MAX_STAGES = 6
STAGES_OF_MANY_ROWS = (
    4  # with narrower tiles rather than with fewer: gates and ups of qwen3 9.8 and 10.4 us (H200)
)


class Tiles(NamedTuple):
    """How the work is shared out: rows of x and of the weight a program, columns a step of it, parts of the columns."""

    block_m: int = MIN_DOT
    block_n: int = 64
    block_k: int = 128
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 4


def split_tiles(out_features: int, in_features: int, element_bytes: int = 2, num_rows: int = 1) -> Tiles:
    """Split so often that there are programs for all SMs. Parts of many rows are read and written back, so there are
    fewer, and more programs share the rows (H200, 128 rows of 2048 x 1024 with the norm behind it: 7.4 us with all in a
    program, 5.7 with 64)."""
    block_m, block_k = min(FEW_ROWS, padded(num_rows)), COLUMN_BYTES // element_bytes
    programs = triton.cdiv(out_features, Tiles().block_n) * triton.cdiv(padded(num_rows), block_m)
    wanted = WANTED_PROGRAMS if num_rows <= FEW_ROWS else ENOUGH_PROGRAMS
    split_k = 1
    while (
        programs * split_k < wanted
        and split_k < MAX_SPLIT
        and in_features >= 2 * split_k * MIN_STEPS * block_k
    ):
        split_k *= 2
    return Tiles(block_m, block_k=block_k, split_k=split_k)


def whole_tiles(out_features: int, num_rows: int, element_bytes: int = 2, num_weights: int = 1) -> Tiles:
    """As large as leaves work for all SMs. `num_weights`: 2 for gate and up."""
    block_m, block_n = row_block(num_rows), Tiles().block_n

    def are_enough() -> bool:
        return triton.cdiv(out_features, block_n) * triton.cdiv(padded(num_rows), block_m) >= ENOUGH_PROGRAMS

    while block_m > FEW_ROWS and not are_enough():
        block_m //= 2
    while block_n > MIN_DOT and not are_enough():
        block_n //= 2
    column_bytes, staged_rows = COLUMN_BYTES, num_weights * block_n + block_m
    if num_rows <= FEW_ROWS:
        stages = max(3, min(MAX_STAGES, STAGED_BYTES // (column_bytes * staged_rows)))
    else:
        stages = STAGES_OF_MANY_ROWS
        while stages * column_bytes * staged_rows > LARGE_TILE_BYTES:
            column_bytes //= 2
    return Tiles(block_m, block_n, column_bytes // element_bytes, num_stages=stages)


def fitting_stages(tiles: Tiles, num_weights: int, element_bytes: int, device: torch.device) -> int:
    """Those of the tiles, or fewer where a program may share less memory."""
    if has_large_tiles(device):
        return tiles.num_stages
    staged = element_bytes * tiles.block_k * (num_weights * tiles.block_n + tiles.block_m)
    return min(tiles.num_stages, SMALL_STAGED_BYTES // staged)


def row_block(num_rows: int) -> int:
    return min(MAX_ROW_BLOCK, padded(num_rows))


def padded(num_rows: int) -> int:
    """The number of rows that tiles go by: few forms are compiled for all numbers."""
    return max(MIN_DOT, triton.next_power_of_2(num_rows))


def skinny_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Raises ValueError where x has more than 256 rows; so do the others."""
    out = torch.empty(len(x), len(weight), dtype=x.dtype, device=x.device)
    _multiply(x, weight, out[None], whole_tiles(len(weight), len(x), x.element_size()))
    return out


def skinny_gated(x: Tensor, weight: Tensor) -> Tensor:
    size = len(weight) // 2
    out = torch.empty(len(x), size, dtype=x.dtype, device=x.device)
    _multiply(x, weight, out[None], whole_tiles(size, len(x), x.element_size(), 2), is_gated=True)
    return out


def skinny_parts(x: Tensor, weight: Tensor, tiles: Tiles | None = None) -> Tensor:
    """`tiles`: a guess from the shape where none are given."""
    tiles = tiles or split_tiles(len(weight), weight.shape[1], x.element_size(), len(x))
    out = torch.empty(tiles.split_k, len(x), len(weight), dtype=torch.float32, device=x.device)
    _multiply(x, weight, out, tiles)
    return out


def _multiply(x: Tensor, weight: Tensor, out: Tensor, tiles: Tiles, is_gated: bool = False) -> None:
    """out: [parts, M, outputs]."""
    num_rows, in_features = x.shape
    if num_rows > MAX_ROWS:
        raise ValueError(
            f"x must have at most {MAX_ROWS} rows, but got {num_rows}. Use torch.nn.functional.linear for more."
        )
    split, _, out_features = out.shape
    columns = triton.cdiv(triton.cdiv(in_features, split), tiles.block_k) * tiles.block_k
    launch(
        _skinny, (triton.cdiv(num_rows, tiles.block_m), triton.cdiv(out_features, tiles.block_n), split), x.device,
        x, weight, out, num_rows, out_features, in_features, columns, x.stride(0), weight.stride(0),
        IS_GATED=is_gated, IS_EVEN=columns * split == in_features,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k,
        num_warps=tiles.num_warps,
        num_stages=fitting_stages(tiles, 1 + is_gated, x.element_size(), x.device),
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])  # or each number of rows is compiled anew
def _skinny(
    x: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    num_rows: int,
    out_features: int,
    in_features: int,
    columns: int,
    x_stride: int,
    weight_stride: int,
    IS_GATED: tl.constexpr,
    IS_EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    # Those that read the same weights are neighbours, so that only the first one waits for memory.
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    k = part * columns + tl.arange(0, BLOCK_K)
    # Rows of x beyond the edge are not read: cheaper than the last one again, which all programs would fetch at once
    # (H200: 34.0 us for the last layer of llama-8b's MLP at one row, 31.9 with a mask).
    in_rows = (m < num_rows)[:, None]
    x_at = x + m[:, None] * x_stride + k[None]
    weight_at = weight + tl.minimum(n, out_features - 1).to(tl.int64)[:, None] * weight_stride + k[None]
    up_at = weight_at + tl.cast(out_features, tl.int64) * weight_stride
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    for done in range(0, columns, BLOCK_K):
        left = (k + done < in_features)[None]
        wanted = in_rows if IS_EVEN else in_rows & left
        some_x = tl.load(x_at + done, mask=wanted, other=0.0, eviction_policy="evict_last")
        acc = tl.dot(_tile(weight_at + done, left, IS_EVEN), tl.trans(some_x), acc, input_precision="ieee")
        if IS_GATED:
            up = tl.dot(_tile(up_at + done, left, IS_EVEN), tl.trans(some_x), up, input_precision="ieee")
    if IS_GATED:
        # Rounded as it would be on its way through memory.
        gate, up = acc.to(x.dtype.element_ty).to(tl.float32), up.to(x.dtype.element_ty).to(tl.float32)
        acc = gate / (1.0 + tl.exp(-gate)) * up
    inside = (m < num_rows)[None] & (n < out_features)[:, None]
    at = out + (part * num_rows + m)[None] * out_features + n[:, None]
    tl.store(at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _tile(at: tl.tensor, left: tl.tensor, IS_EVEN: tl.constexpr) -> tl.tensor:
    if IS_EVEN:
        found = tl.load(at, eviction_policy="evict_first")
    else:
        found = tl.load(at, mask=left, other=0.0, eviction_policy="evict_first")
    return found
