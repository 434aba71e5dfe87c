"""Attention of pieces of prompts over the paged cache in Triton: new tokens in tiles, each over all that is before it.

    grid (head, tile of new tokens, split), longest context first ▶ their outputs, or parts that are merged

The cache holds the new tokens too, so keys and values are read from one place, block by block, and never gathered.
Of what a tile sees, all but the end is seen by all of its tokens: only the end is masked, unless there is a window.
Where a tile of keys lies in one block, the device's tensor memory accelerator fetches it whole, and the number of the
next block is read while this one is worked on; else each token's place is looked up.
Contract: `runtime.kernels.plain`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from runtime.kernels.launch import launch
from runtime.kernels.paged_decode import merge_into, parts_of
from runtime.kernels.splits import QUERY_TILE

MIN_DOT = 16
KEY_VALUES = 8_192  # of one tile of keys: 64 tokens of 128
# On an H200, llama-8b, TFLOP/s of 1,024 tokens after 31,744, of 2,048 alone and of 8,192 in eight pieces: 528, 410 and
# 369. With 128 new tokens a tile in 8 warps 473, 350, 293; with 2 stages 407, 386, 328; without looking ahead 407, 383,
# 322; looking ahead, by plain loads 487, 387, 338; looked up token by token 323, 292, 256. FlashAttention 2, which
# wants keys and values in one piece, 354, 198 and 221, and a twentieth of its time to gather them.
STAGES = 3
WARPS = 4
UNBOUNDED = 2**30  # a window wider than any context


def paged_prefill(
    query: Tensor,
    rows: Tensor,
    block_tables: Tensor,
    contexts: Tensor,
    first_row: int,
    edges: Tensor,
    tiles: Tensor,
    num_splits: int,
    block_tokens: int,
    scaling: float,
    window: int | None = None,
) -> Tensor:
    _, kv_heads, group, dim = query.shape
    heads = kv_heads * group
    dim_block = max(MIN_DOT, triton.next_power_of_2(dim))
    out = torch.empty(len(query), heads * dim, dtype=query.dtype, device=query.device)
    wide = query.element_size() // 2 or 1
    tile = max(MIN_DOT, min(64, KEY_VALUES // (dim_block * wide)))
    in_block = block_tokens % tile == 0 and dim == dim_block
    blocks = TensorDescriptor.from_tensor(rows, [tile, dim]) if in_block else rows
    new = out[first_row:]
    parts, sums = parts_of(new, len(new), heads, num_splits, dim)
    launch(
        _prefill, (heads, len(tiles), num_splits), out.device,
        query, rows, blocks, block_tables, contexts, edges, tiles, parts, sums,
        query.stride(0), query.stride(2), rows.stride(0), block_tables.stride(0), first_row, scaling,
        UNBOUNDED if window is None else window,
        KV_HEADS=kv_heads, GROUP=group, DIM=dim, BLOCK_TOKENS=block_tokens, DIM_BLOCK=dim_block,
        BLOCK_M=QUERY_TILE, BLOCK_N=tile, NUM_SPLITS=num_splits, IN_BLOCK=in_block, HAS_WINDOW=window is not None,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    merge_into(new, parts, sums, num_splits, dim)
    return out


@triton.jit(do_not_specialize=["table_stride", "first_row"])  # they change from step to step
def _prefill(
    query: tl.tensor,
    rows: tl.tensor,
    blocks: tl.tensor,
    block_tables: tl.tensor,
    contexts: tl.tensor,
    edges: tl.tensor,
    tiles: tl.tensor,
    parts: tl.tensor,
    sums: tl.tensor,
    query_row: int,
    query_head: int,
    row_stride: int,
    table_stride: int,
    first_row: int,
    scaling: float,
    window: int,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    IN_BLOCK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    head, number, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    piece, tile = tl.load(tiles + 2 * number), tl.load(tiles + 2 * number + 1)
    first_new = tl.load(edges + piece)
    num_new = tl.load(edges + piece + 1) - first_new
    row = (first_row + piece).to(tl.int64)
    context = tl.load(contexts + row).to(tl.int32)
    columns, member = tl.arange(0, DIM_BLOCK), tile * BLOCK_M + tl.arange(0, BLOCK_M)
    in_dim, is_new = columns < DIM, member < num_new
    start = context - num_new + tile * BLOCK_M  # the position of the tile's first token
    position = start + tl.arange(0, BLOCK_M)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()

    token = (first_new + member).to(tl.int64)
    asked = (
        query + (first_row + token)[:, None] * query_row + head * query_head + columns[None]
    )  # a token a row before
    q = tl.load(asked, mask=is_new[:, None] & in_dim[None], other=0.0)
    table = block_tables + row * table_stride
    kv_column = (head // GROUP) * DIM
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIM_BLOCK], tl.float32)
    to_log2 = scaling * 1.4426950408889634
    begin, end = 0, tl.minimum(start + BLOCK_M, context)
    if HAS_WINDOW:
        begin = tl.maximum(start - window + 1, 0) // BLOCK_N * BLOCK_N
    share = tl.cdiv(end - begin, NUM_SPLITS * BLOCK_N) * BLOCK_N
    begin += split * share
    end = tl.minimum(begin + share, end)
    seen_by_all = begin  # with a window none: all of it is masked
    if not HAS_WINDOW:
        seen_by_all = tl.maximum(begin, tl.minimum((start + 1) // BLOCK_N * BLOCK_N, end))
        acc, top, total = _attend(
            acc, top, total, q, rows, blocks, table, kv_column, position, columns, in_dim, begin, seen_by_all, context,
            window, row_stride, to_log2, KV_HEADS, DIM, BLOCK_TOKENS, BLOCK_N, IN_BLOCK, False, False, False,
        )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, q, rows, blocks, table, kv_column, position, columns, in_dim, seen_by_all, end, context,
        window, row_stride, to_log2, KV_HEADS, DIM, BLOCK_TOKENS, BLOCK_N, IN_BLOCK, True, HAS_WINDOW,
        HAS_WINDOW or NUM_SPLITS > 1,
    )  # fmt: skip
    divisor = tl.where(total > 0, total, 1.0)
    output = token * (KV_HEADS * GROUP) + head
    at = parts + (output * NUM_SPLITS + split)[:, None] * DIM + columns[None]
    tl.store(at, (acc / divisor[:, None]).to(parts.dtype.element_ty), mask=is_new[:, None] & in_dim[None])
    if NUM_SPLITS > 1:
        tl.store(sums + output * NUM_SPLITS + split, top + tl.log2(divisor), mask=is_new)


@triton.jit
def _attend(
    acc: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    q: tl.tensor,
    rows: tl.tensor,
    blocks: tl.tensor,
    table: tl.tensor,
    kv_column: tl.tensor,
    position: tl.tensor,
    columns: tl.tensor,
    in_dim: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    context: tl.tensor,
    window: tl.tensor,
    row_stride: int,
    to_log2: tl.tensor,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IN_BLOCK: tl.constexpr,
    IS_MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    MAY_SEE_NOTHING: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Adds what the tile finds among tokens [first, last). The largest score so far is `top`, in powers of two."""
    number = tl.load(table + first // BLOCK_TOKENS, mask=first < last, other=0).to(tl.int32)
    for at in range(first, last, BLOCK_N):
        token = at + tl.arange(0, BLOCK_N)
        exists = token < context
        if IN_BLOCK:
            slot = number * BLOCK_TOKENS + at % BLOCK_TOKENS
            ahead = at + BLOCK_N
            number = tl.load(table + ahead // BLOCK_TOKENS, mask=ahead < last, other=0).to(tl.int32)
            k = blocks.load([slot, kv_column])
        else:
            block = tl.load(table + token // BLOCK_TOKENS, mask=exists, other=0).to(tl.int64)
            slots = block * BLOCK_TOKENS + token % BLOCK_TOKENS
            place = slots[:, None] * row_stride + kv_column + columns[None]
            is_there = exists[:, None] & in_dim[None]
            k = tl.load(rows + place, mask=is_there, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if IS_MASKED:
            is_seen = (token[None] <= position[:, None]) & exists[None]
            if HAS_WINDOW:
                is_seen &= token[None] > position[:, None] - window
            scores = tl.where(is_seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1) * to_log2)
        level = higher
        if MAY_SEE_NOTHING:  # some token, so far
            level = tl.where(higher > float("-inf"), higher, 0.0)
        weights = tl.exp2(scores * to_log2 - level[:, None])
        shrink = tl.exp2(top - level)
        total = total * shrink + tl.sum(weights, 1)
        if IN_BLOCK:
            v = blocks.load([slot, kv_column + KV_HEADS * DIM])
            if IS_MASKED:  # what lies behind the context may be no number
                v = tl.where(exists[:, None], v, 0.0)
        else:
            v = tl.load(rows + place + KV_HEADS * DIM, mask=is_there, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = higher
    return acc, top, total
