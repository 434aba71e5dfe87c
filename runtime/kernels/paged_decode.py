"""Decode attention over the paged cache in Triton: the context of a row is shared out among programs, then merged.

    grid (KV head, row, split) ▶ a part's output and log-sum-exp each ▶ grid (row, head): their weighted mean

The grid follows from shapes alone, so that a CUDA graph serves every context: a split beyond a row's context ends at
once. The heads of a group are the rows of one matrix product, padded to the 16 that tensor cores take. Where a tile of
keys lies in one block, the device's tensor memory accelerator fetches it whole, and the number of the next block is
read while this one is worked on; else each token's place is looked up.
Contracts: `runtime.kernels.plain`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from runtime.kernels.launch import has_early_start, has_large_tiles, launch, num_sms_of
from runtime.kernels.splits import FEW_ROWS, PROGRAMS_AN_SM

MIN_DOT = 16
MAX_HEAD_BLOCK = 64  # heads of one program; beyond that, accumulators spill
TILE_VALUES = 8_192  # values of one tile of keys: 64 tokens of 128
OTHER_TILE_VALUES = 16_384  # of latents, and of a rounded cache
SMALL_SUMS = 2_048  # values of a program's output that two warps hold: 16 heads of 128
# A load whose address is loaded itself takes two stages of the pipeline: with 3, one tile is under way, in a third of
# the shared memory that two take with 5 stages, so more programs share an SM. On an H200, llama-8b, us with 3 and 5:
# 256 rows of 256 tokens 77 and 90, 32 of 2,048 in two splits 72 and 91, one 11.2 and 11.7.
STAGES = 3
LATENT_STAGES = 5
# Tiles that are fetched whole: of 64 tokens of 128 two are under way, and an SM has room for two programs. Where there
# are no more than that they are fastest, else those of half the size. On an H200, 8 KV heads of 128, us looked up and
# fetched, in as many splits as are chosen: 8 rows of 2,000 tokens 37.2 and 22.1, 32 of 2,048 78.8 and 65.1, 256 of 256
# 70.0 and 67.5; rows of 100 to 2,000, longest first, 25 of them 64.7 and 44.8, 69 99.0 and 94.8, 256 144.5 and 143.7.
# With large tiles the 256 took 155.8, with small ones the 25 54.2; with a stage more 149.4 and 49.0.
MOST_FETCHED = 64
SMALL_FETCHED_BYTES = 65_536  # of shared memory under way, where a program may have 99 KiB in all
UNBOUNDED = 2**30  # a window wider than any context


def paged_decode(
    query: Tensor,
    rows: Tensor,
    block_tables: Tensor,
    contexts: Tensor,
    block_tokens: int,
    scaling: float,
    window: int | None = None,
    num_splits: int = 1,
    scales: Tensor | None = None,
) -> Tensor:
    num_rows, kv_heads, group, dim = query.shape
    heads = kv_heads * group
    head_block = min(MAX_HEAD_BLOCK, max(MIN_DOT, triton.next_power_of_2(group)))
    dim_block = max(MIN_DOT, triton.next_power_of_2(dim))
    out = torch.empty(num_rows, heads * dim, dtype=query.dtype, device=query.device)
    parts, sums = parts_of(out, num_rows, heads, num_splits, dim)
    # The heads of a row side by side, since their keys lie side by side. On an H200, in us, qwen3's 256 rows of 800
    # tokens: 208 with the rows side by side, tiles of 128 tokens and four warps, 203 with the heads so, 196 with tiles
    # of 64 and two warps as well; llama-8b's 256 rows of 256 70.4 and 69.8, one 6.2 and 5.4. By pointers, a tile
    # that lies in one block, whose number is then read once, changed nothing.
    grid = (kv_heads * triton.cdiv(group, head_block), num_rows, num_splits)
    num_warps = 2 if head_block * dim_block <= SMALL_SUMS and scales is None else 4
    tile = _tile(dim_block, rows, TILE_VALUES if scales is None else OTHER_TILE_VALUES)
    has_room = has_large_tiles(out.device)
    fetched = fetched_tokens(tile, num_rows, kv_heads, num_splits, num_sms_of(out.device), has_room)
    in_block = (
        window is None and scales is None and dim == dim_block and block_tokens % fetched == 0
        and (out.device.type != "cuda" or has_early_start(out.device))
        and (has_room or 2 * STAGES * fetched * dim * rows.element_size() <= SMALL_FETCHED_BYTES)
    )  # fmt: skip
    tile = fetched if in_block else tile
    launch(
        _decode, grid, out.device,
        query, rows, TensorDescriptor.from_tensor(rows, [tile, dim]) if in_block else rows, block_tables, contexts,
        parts, sums, rows if scales is None else scales,
        query.stride(0), query.stride(1), query.stride(2), rows.stride(0), block_tables.stride(0),
        0 if scales is None else scales.stride(0), scaling, UNBOUNDED if window is None else window,
        KV_HEADS=kv_heads, GROUP=group, DIM=dim, BLOCK_TOKENS=block_tokens, NUM_SPLITS=num_splits,
        IS_ROUNDED=scales is not None, IN_BLOCK=in_block, HEAD_BLOCK=head_block, DIM_BLOCK=dim_block, TILE=tile,
        num_warps=num_warps, num_stages=STAGES,
    )  # fmt: skip
    merge_into(out, parts, sums, num_splits, dim)
    return out


def paged_decode_fp8(
    query: Tensor,
    rows: Tensor,
    scales: Tensor,
    block_tables: Tensor,
    contexts: Tensor,
    block_tokens: int,
    scaling: float,
    window: int | None = None,
    num_splits: int = 1,
) -> Tensor:
    return paged_decode(
        query, rows, block_tables, contexts, block_tokens, scaling, window, num_splits, scales
    )


def paged_latent_decode(
    query: Tensor,
    rows: Tensor,
    block_tables: Tensor,
    contexts: Tensor,
    block_tokens: int,
    scaling: float,
    value_dim: int,
    num_splits: int = 1,
) -> Tensor:
    num_rows, heads, _ = query.shape
    out = torch.empty(num_rows, heads, value_dim, dtype=query.dtype, device=query.device)
    parts, sums = parts_of(out, num_rows, heads, num_splits, value_dim)
    latent_parts(
        query, rows, block_tables, contexts, block_tokens, scaling, value_dim, num_splits, parts, sums
    )
    merge_into(out, parts, sums, num_splits, value_dim)
    return out


def latent_parts(
    query: Tensor,
    rows: Tensor,
    block_tables: Tensor,
    contexts: Tensor,
    block_tokens: int,
    scaling: float,
    value_dim: int,
    num_splits: int,
    parts: Tensor,
    sums: Tensor,
) -> None:
    """Writes what each split finds: parts [B, heads, splits, value_dim] and their log-sum-exp [B, heads, splits]; of a
    single one only the parts."""
    num_rows, heads, dim = query.shape
    for name, size in (("value_dim", value_dim), ("the rest of D", dim - value_dim)):
        if size < MIN_DOT or size & (size - 1):
            raise ValueError(f"{name} must be a power of two of at least {MIN_DOT}, but got {size}.")
    head_block = min(MAX_HEAD_BLOCK, max(MIN_DOT, triton.next_power_of_2(heads)))
    grid = (num_rows, triton.cdiv(heads, head_block), num_splits)
    launch(
        _latent_decode, grid, query.device,
        query, rows, block_tables, contexts, parts, sums,
        query.stride(0), query.stride(1), rows.stride(0), block_tables.stride(0),
        scaling,
        HEADS=heads, VALUE_DIM=value_dim, ROPE_DIM=dim - value_dim, BLOCK_TOKENS=block_tokens,
        NUM_SPLITS=num_splits, HEAD_BLOCK=head_block, TILE=_tile(value_dim, rows, OTHER_TILE_VALUES),
        num_warps=4 if head_block == MIN_DOT else 8, num_stages=LATENT_STAGES,
    )  # fmt: skip


def _tile(dim: int, rows: Tensor, num_values: int) -> int:
    """Tokens of one tile: fewer where a token is larger."""
    wide = rows.element_size() // 2 or 1
    return int(max(MIN_DOT, min(128, num_values // (dim * wide))))


def fetched_tokens(
    tile: int, num_rows: int, kv_heads: int, num_splits: int, num_sms: int, has_room: bool
) -> int:
    """Of one tile that is fetched whole, where by pointers it would be of `tile` tokens. Each form is that of some
    batch for which it is compiled (`decode_graph.COMPILED_BUCKETS`). `has_room`: for large tiles."""
    is_room_for_all = num_rows * kv_heads <= PROGRAMS_AN_SM * num_sms
    are_few = num_splits > 1 or (num_rows <= FEW_ROWS and is_room_for_all)
    return max(MIN_DOT, min(MOST_FETCHED, tile if are_few and has_room else tile // 2))


def parts_of(out: Tensor, num_rows: int, heads: int, num_splits: int, dim: int) -> tuple[Tensor, Tensor]:
    """Where the splits write: parts [B, heads, splits, D] and their log-sum-exp [B, heads, splits], both float32. A
    single split writes the output itself."""
    if num_splits == 1:
        return out, out
    device = out.device
    return (
        torch.empty(num_rows, heads, num_splits, dim, dtype=torch.float32, device=device),
        torch.empty(num_rows, heads, num_splits, dtype=torch.float32, device=device),
    )


def merge_into(out: Tensor, parts: Tensor, sums: Tensor, num_splits: int, dim: int) -> None:
    if num_splits == 1:
        return
    num_outputs = sums.numel() // num_splits
    split_block, dim_block = triton.next_power_of_2(num_splits), triton.next_power_of_2(dim)
    launch(
        _merge, (num_outputs,), out.device,
        parts, sums, out,
        NUM_SPLITS=num_splits, DIM=dim, SPLIT_BLOCK=split_block, DIM_BLOCK=dim_block,
        num_warps=min(8, max(1, split_block * dim_block // 1024)),
    )  # fmt: skip


@triton.jit
def _span(
    context: tl.tensor, window: tl.tensor, split: tl.tensor, NUM_SPLITS: tl.constexpr, TILE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Tokens [start, end) of one split: equal parts in whole tiles; empty where the context is used up."""
    first = tl.maximum(context - window, 0)
    share = tl.cdiv(context - first, NUM_SPLITS * TILE) * TILE
    start = first + split * share
    return start, tl.minimum(start + share, context)


@triton.jit
def _write_part(
    parts: tl.tensor,
    sums: tl.tensor,
    acc: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    output: tl.tensor,
    columns: tl.tensor,
    in_head: tl.tensor,
    in_dim: tl.tensor,
    split: tl.tensor,
    NUM_SPLITS: tl.constexpr,
    DIM: tl.constexpr,
) -> None:
    """acc: [heads, D], not yet divided by `total`; output: [heads], the number of each in all outputs."""
    divisor = tl.where(total > 0, total, 1.0)
    where = (output * NUM_SPLITS + split)[:, None] * DIM + columns[None]
    value = (acc / divisor[:, None]).to(parts.dtype.element_ty)
    tl.store(parts + where, value, mask=in_head[:, None] & in_dim[None])
    if NUM_SPLITS > 1:
        tl.store(sums + output * NUM_SPLITS + split, top + tl.log2(divisor), mask=in_head)


@triton.jit
def _read_blocks(
    acc: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    number: tl.tensor,
    q: tl.tensor,
    blocks: tl.tensor,
    table: tl.tensor,
    column: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    end: tl.tensor,
    to_log2: tl.tensor,
    KEYS_WIDTH: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    IS_END: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Tokens [first, last) of a span that ends at `end`, from whole tiles; the last one reaches beyond where IS_END.
    `number`: of the block at `first`, and returned of that at `last`."""
    for at in range(first, last, TILE):
        slot, ahead = number * BLOCK_TOKENS + at % BLOCK_TOKENS, at + TILE
        number = tl.load(table + ahead // BLOCK_TOKENS, mask=ahead < end, other=0).to(tl.int32)
        k = blocks.load([slot, column])
        v = blocks.load([slot, column + KEYS_WIDTH])
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * to_log2
        if IS_END:
            seen = at + tl.arange(0, TILE) < end
            scores = tl.where(seen[None], scores, float("-inf"))
            v = tl.where(seen[:, None], v, 0.0)  # what lies behind the context may be no number
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = higher
    return acc, top, total, number


@triton.jit(do_not_specialize=["table_stride"])  # outside of graphs it is the longest context of the step
def _decode(
    query: tl.tensor,
    rows: tl.tensor,
    blocks: tl.tensor,
    block_tables: tl.tensor,
    contexts: tl.tensor,
    parts: tl.tensor,
    sums: tl.tensor,
    scales: tl.tensor,
    query_row: int,
    query_kv_head: int,
    query_head: int,
    row_stride: int,
    table_stride: int,
    scale_stride: int,
    scaling: float,
    window: int,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    IS_ROUNDED: tl.constexpr,
    IN_BLOCK: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    blocks_per_head: tl.constexpr = (GROUP + HEAD_BLOCK - 1) // HEAD_BLOCK
    kv_head = tl.program_id(0) // blocks_per_head
    member = (tl.program_id(0) % blocks_per_head) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
    columns = tl.arange(0, DIM_BLOCK)
    in_head, in_dim = member < GROUP, columns < DIM
    table = block_tables + row * table_stride
    context = tl.load(contexts + row).to(tl.int32)
    start, end = _span(context, window, split, NUM_SPLITS, TILE)
    if IN_BLOCK and NUM_SPLITS == 1:  # which it begins with is known before the context is: a wait less
        number = tl.load(table).to(tl.int32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()

    at = query + row * query_row + kv_head * query_kv_head + member[:, None] * query_head + columns[None]
    q = tl.load(at, mask=in_head[:, None] & in_dim[None] & (start < end), other=0.0)
    top = tl.full([HEAD_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([HEAD_BLOCK], tl.float32)
    acc = tl.zeros([HEAD_BLOCK, DIM_BLOCK], tl.float32)
    to_log2 = scaling * 1.4426950408889634
    if IN_BLOCK:
        if NUM_SPLITS > 1:
            number = tl.load(table + start // BLOCK_TOKENS, mask=start < end, other=0).to(tl.int32)
        whole = tl.maximum(start, end // TILE * TILE)
        acc, top, total, number = _read_blocks(
            acc, top, total, number, q, blocks, table, kv_head * DIM, start, whole, end, to_log2, KV_HEADS * DIM,
            BLOCK_TOKENS, TILE, False,
        )  # fmt: skip
        acc, top, total, number = _read_blocks(
            acc, top, total, number, q, blocks, table, kv_head * DIM, whole, end, end, to_log2, KV_HEADS * DIM,
            BLOCK_TOKENS, TILE, True,
        )  # fmt: skip
    else:
        keys = rows + kv_head * DIM
        values = keys + KV_HEADS * DIM
        for first in range(start, end, TILE):
            token = first + tl.arange(0, TILE)
            seen = token < end
            block = tl.load(table + token // BLOCK_TOKENS, mask=seen, other=0).to(tl.int64)
            place = block * BLOCK_TOKENS + token % BLOCK_TOKENS
            slot = place * row_stride
            k = tl.load(keys + slot[None] + columns[:, None], mask=seen[None] & in_dim[:, None], other=0)
            v = tl.load(values + slot[:, None] + columns[None], mask=seen[:, None] & in_dim[None], other=0)
            if IS_ROUNDED:
                k = k.to(tl.float8e4nv, bitcast=True).to(q.dtype)
                v = v.to(tl.float8e4nv, bitcast=True).to(q.dtype)
            scores = tl.dot(q, k, input_precision="ieee") * to_log2
            if IS_ROUNDED:  # a scale is the same for all values of a head: it goes to the products
                scale_at = scales + place * scale_stride + kv_head
                scores *= tl.load(scale_at, mask=seen, other=0.0).to(tl.float32)[None]
            scores = tl.where(seen[None], scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp2(scores - higher[:, None])
            shrink = tl.exp2(top - higher)
            total = total * shrink + tl.sum(weights, 1)
            if IS_ROUNDED:
                # Without a scale's headroom, which would cost float16 bits of the weights.
                weights *= tl.load(scale_at + KV_HEADS, mask=seen, other=0.0).to(tl.float32)[None] * 128.0
            acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            top = higher
        if IS_ROUNDED:
            acc *= 0.0078125
    output = row * (KV_HEADS * GROUP) + kv_head * GROUP + member
    _write_part(parts, sums, acc, top, total, output, columns, in_head, in_dim, split, NUM_SPLITS, DIM)


@triton.jit(do_not_specialize=["table_stride"])
def _latent_decode(
    query: tl.tensor,
    rows: tl.tensor,
    block_tables: tl.tensor,
    contexts: tl.tensor,
    parts: tl.tensor,
    sums: tl.tensor,
    query_row: int,
    query_head: int,
    row_stride: int,
    table_stride: int,
    scaling: float,
    HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """A tile is read once: it is the keys' first part, and the values."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    head = tl.program_id(1) * HEAD_BLOCK + tl.arange(0, HEAD_BLOCK)
    columns, turned = tl.arange(0, VALUE_DIM), VALUE_DIM + tl.arange(0, ROPE_DIM)
    in_head, in_dim = head < HEADS, columns < VALUE_DIM
    context = tl.load(contexts + row).to(tl.int32)
    start, end = _span(context, context, split, NUM_SPLITS, TILE)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()

    at, wanted = query + row * query_row + head[:, None] * query_head, in_head[:, None] & (start < end)
    q = tl.load(at + columns[None], mask=wanted, other=0.0)
    q_turned = tl.load(at + turned[None], mask=wanted, other=0.0)
    table = block_tables + row * table_stride
    top = tl.full([HEAD_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([HEAD_BLOCK], tl.float32)
    acc = tl.zeros([HEAD_BLOCK, VALUE_DIM], tl.float32)
    to_log2 = scaling * 1.4426950408889634
    for first in range(start, end, TILE):
        token = first + tl.arange(0, TILE)
        seen = token < end
        block = tl.load(table + token // BLOCK_TOKENS, mask=seen, other=0).to(tl.int64)
        slot = (block * BLOCK_TOKENS + token % BLOCK_TOKENS) * row_stride
        latent = tl.load(rows + slot[:, None] + columns[None], mask=seen[:, None], other=0.0)
        key = tl.load(rows + slot[None] + turned[:, None], mask=seen[None], other=0.0)
        scores = tl.dot(q, tl.trans(latent), input_precision="ieee")
        scores = tl.dot(q_turned, key, scores, input_precision="ieee") * to_log2
        scores = tl.where(seen[None], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(latent.dtype), latent, input_precision="ieee")
        top = higher
    output = row * HEADS + head
    _write_part(parts, sums, acc, top, total, output, columns, in_head, in_dim, split, NUM_SPLITS, VALUE_DIM)


@triton.jit
def _merge(
    parts: tl.tensor,
    sums: tl.tensor,
    out: tl.tensor,
    NUM_SPLITS: tl.constexpr,
    DIM: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    output = tl.program_id(0).to(tl.int64)
    split, column = tl.arange(0, SPLIT_BLOCK), tl.arange(0, DIM_BLOCK)
    sums_at = sums + output * NUM_SPLITS + split
    logs = tl.load(sums_at, mask=split < NUM_SPLITS, other=float("-inf"))
    top = tl.max(logs, 0)
    weights = tl.exp2(logs - tl.where(top > float("-inf"), top, 0.0))
    weights = weights / tl.maximum(tl.sum(weights, 0), 1e-30)
    at = parts + (output * NUM_SPLITS + split)[:, None] * DIM + column[None]
    found = tl.load(at, mask=(weights > 0)[:, None] & (column < DIM)[None], other=0.0)
    mean = tl.sum(found * weights[:, None], 0)
    tl.store(out + output * DIM + column, mean.to(out.dtype.element_ty), mask=column < DIM)
