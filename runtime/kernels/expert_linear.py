"""Each expert's rows by its weights, in one launch, as fast as the weights of the experts that are asked can be read.

    grid (block of rows of one expert, part of the outputs)     blocks of the shared experts follow those of the routed

A block knows its expert from the layout, so nothing is read of an expert that no token goes to; blocks beyond those in
use end at once. Contracts: `expert_gate_up` and `expert_down` in `runtime.kernels.plain_experts`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.kernels.early_start import early_start
from runtime.kernels.plain_experts import Layout

MIN_DOT = 16


class ExpertTiles(NamedTuple):
    """How a block's work is shared out: outputs of a program, columns of a step of it."""

    block_n: int
    block_k: int
    num_warps: int = 4
    num_stages: int = 4


# By rows of a block: (gate and up, of which a program has `block_n` each; down).
TILES = {
    16: (ExpertTiles(32, 64), ExpertTiles(32, 128)),
    32: (ExpertTiles(64, 64), ExpertTiles(64, 64)),
    64: (ExpertTiles(64, 64), ExpertTiles(128, 64)),
    128: (ExpertTiles(64, 64, 8, 3), ExpertTiles(128, 64, 8, 3)),
}


def expert_gate_up(
    x: Tensor, weight: Tensor, shared: Tensor | None, index: Tensor, layout: Layout | None,
    tiles: ExpertTiles | None = None,
) -> Tensor:  # fmt: skip
    (num_tokens, hidden), top_k, size = x.shape, index.shape[1], weight.shape[1] // 2
    num_shared = 0 if shared is None else len(shared) // (2 * size)
    block_m, num_routed = _blocks(index, layout)
    block_n, block_k, num_warps, num_stages = tiles or TILES[block_m][0]
    out = torch.empty(num_tokens, top_k + num_shared, size, dtype=x.dtype, device=x.device)
    block_k = _fitting(block_k, x, hidden)
    grid = (num_routed + num_shared * triton.cdiv(num_tokens, block_m), triton.cdiv(size, block_n))
    _gate_up[grid](
        x, weight, weight if shared is None else shared, index if layout is None else layout.rows,
        index if layout is None else layout.experts, out, num_tokens, num_routed, x.stride(0),
        TOP_K=top_k, SHARED=num_shared, SIZE=size, HIDDEN=hidden, HAS_LAYOUT=layout is not None,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        num_warps=num_warps, num_stages=num_stages, **early_start(x),
    )  # fmt: skip
    return out


def expert_down(
    x: Tensor, weight: Tensor, shared: Tensor | None, index: Tensor, weights: Tensor, layout: Layout | None,
    tiles: ExpertTiles | None = None,
) -> Tensor:  # fmt: skip
    (num_tokens, slots, size), top_k, hidden = x.shape, index.shape[1], weight.shape[1]
    block_m, num_routed = _blocks(index, layout)
    block_n, block_k, num_warps, num_stages = tiles or TILES[block_m][1]
    out = torch.empty(slots, num_tokens, hidden, dtype=torch.float32, device=x.device)
    block_k = _fitting(block_k, x, size)
    grid = (num_routed + (slots - top_k) * triton.cdiv(num_tokens, block_m), triton.cdiv(hidden, block_n))
    _down[grid](
        x, weight, weight if shared is None else shared, index if layout is None else layout.rows,
        index if layout is None else layout.experts, weights, out, num_tokens, num_routed,
        TOP_K=top_k, SHARED=slots - top_k, SIZE=size, HIDDEN=hidden, HAS_LAYOUT=layout is not None,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        num_warps=num_warps, num_stages=num_stages, **early_start(x),
    )  # fmt: skip
    return out


def _blocks(index: Tensor, layout: Layout | None) -> tuple[int, int]:
    """Rows of a block, and blocks of routed experts."""
    if layout is None:
        return MIN_DOT, index.numel()
    return len(layout.rows) // len(layout.experts), len(layout.experts)


def _fitting(block_k: int, x: Tensor, size: int) -> int:
    """Wider values take as much shared memory in fewer columns."""
    return max(MIN_DOT, min(block_k * 2 // x.element_size(), triton.next_power_of_2(size)))


@triton.jit
def _rows_of_block(
    rows: tl.tensor,
    experts: tl.tensor,
    num_tokens: tl.tensor,
    num_routed: tl.tensor,
    TOP_K: tl.constexpr,
    HAS_LAYOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The expert (among routed or shared ones; negative where the block is empty), whether it is routed, and of each
    row its token, which of the token's experts this is, and whether it is one."""
    block, lane = tl.program_id(0), tl.arange(0, BLOCK_M)
    past = block - num_routed
    is_routed = past < 0
    expert = tl.load(experts + block, mask=is_routed, other=0).to(tl.int64)
    if HAS_LAYOUT:
        pair = tl.load(rows + block * BLOCK_M + lane, mask=is_routed, other=-1)
    else:
        pair = tl.where(lane == 0, block, -1)
    num_own = tl.cdiv(num_tokens, BLOCK_M)  # blocks of one shared expert
    token = tl.where(is_routed, pair // TOP_K, past % num_own * BLOCK_M + lane)
    is_real = tl.where(is_routed, pair >= 0, token < num_tokens)
    place = tl.where(is_routed, pair % TOP_K, TOP_K + past // num_own)
    token, place = tl.where(is_real, token, 0).to(tl.int64), tl.where(is_real, place, 0)
    return tl.where(is_routed, expert, (past // num_own).to(tl.int64)), is_routed, token, place, is_real


@triton.jit(do_not_specialize=["num_tokens", "num_routed"])
def _gate_up(
    x: tl.tensor,
    routed: tl.tensor,
    shared: tl.tensor,
    rows: tl.tensor,
    experts: tl.tensor,
    out: tl.tensor,
    num_tokens: int,
    num_routed: int,
    x_stride: int,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    SIZE: tl.constexpr,
    HIDDEN: tl.constexpr,
    HAS_LAYOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    expert, is_routed, token, place, is_real = _rows_of_block(
        rows, experts, num_tokens, num_routed, TOP_K, HAS_LAYOUT, BLOCK_M
    )
    if expert < 0:
        return
    n, k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    # The gates of one expert, from which its ups lie so far away.
    weight = tl.where(is_routed, routed + expert * (2 * SIZE * HIDDEN), shared + expert * (SIZE * HIDDEN))
    to_up = tl.where(is_routed, SIZE * HIDDEN, SHARED * SIZE * HIDDEN)
    gate_at = weight + tl.minimum(n, SIZE - 1)[None] * HIDDEN + k[:, None]
    up_at = gate_at + to_up
    x_at = x + token[:, None] * x_stride + k[None]
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for done in range(0, HIDDEN, BLOCK_K):
        if HIDDEN % BLOCK_K == 0:
            some_x, some_gate, some_up = tl.load(x_at + done), tl.load(gate_at + done), tl.load(up_at + done)
        else:
            left = k + done < HIDDEN
            some_x = tl.load(x_at + done, mask=left[None], other=0.0)
            some_gate = tl.load(gate_at + done, mask=left[:, None], other=0.0)
            some_up = tl.load(up_at + done, mask=left[:, None], other=0.0)
        gate = tl.dot(some_x, some_gate, gate, input_precision="ieee")
        up = tl.dot(some_x, some_up, up, input_precision="ieee")
    value = gate / (1.0 + tl.exp(-gate)) * up
    at = out + (token * (TOP_K + SHARED) + place)[:, None] * SIZE + n[None]
    tl.store(at, value.to(out.dtype.element_ty), mask=is_real[:, None] & (n < SIZE)[None])


@triton.jit(do_not_specialize=["num_tokens", "num_routed"])
def _down(
    x: tl.tensor,
    routed: tl.tensor,
    shared: tl.tensor,
    rows: tl.tensor,
    experts: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    num_tokens: int,
    num_routed: int,
    TOP_K: tl.constexpr,
    SHARED: tl.constexpr,
    SIZE: tl.constexpr,
    HIDDEN: tl.constexpr,
    HAS_LAYOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    expert, is_routed, token, place, is_real = _rows_of_block(
        rows, experts, num_tokens, num_routed, TOP_K, HAS_LAYOUT, BLOCK_M
    )
    if expert < 0:
        return
    n, k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    weight = tl.where(is_routed, routed + expert * (SIZE * HIDDEN), shared + expert * SIZE)
    stride = tl.where(is_routed, SIZE, SHARED * SIZE)
    weight_at = weight + tl.minimum(n, HIDDEN - 1)[None] * stride + k[:, None]
    x_at = x + (token * (TOP_K + SHARED) + place)[:, None] * SIZE + k[None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for done in range(0, SIZE, BLOCK_K):
        if SIZE % BLOCK_K == 0:
            some_x, some = tl.load(x_at + done), tl.load(weight_at + done)
        else:
            left = k + done < SIZE
            some_x = tl.load(x_at + done, mask=left[None], other=0.0)
            some = tl.load(weight_at + done, mask=left[:, None], other=0.0)
        acc = tl.dot(some_x, some, acc, input_precision="ieee")
    is_weighed = is_real & (place < TOP_K)
    acc *= tl.load(weights + token * TOP_K + place, mask=is_weighed, other=1.0).to(tl.float32)[:, None]
    at = out + (place * num_tokens + token)[:, None] * HIDDEN + n[None]
    tl.store(at, acc, mask=is_real[:, None] & (n < HIDDEN)[None])
