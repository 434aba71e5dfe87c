"""Latent attention of a few rows, in which launches count for more than arithmetic: the products with kv_b are computed
where their operands are written and read anyway.

    absorb_and_cache    a program a head and part of the latent: query into latents; one a token: its latent cached
    latent_values       splits as in `paged_decode`, then a program a head and part of its values: merged, latents out

Weights are loaded before the kernel before has ended. Contracts: `runtime.kernels.plain`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.kernels.early_start import early_start
from runtime.kernels.latent_rope import _norm_latent
from runtime.kernels.paged_decode import latent_parts

MAX_ROWS = 16  # a tile for tensor cores has no fewer
MIN_DOT = 16
RANK_TILE = 64
VALUE_TILE = 16
SPLITS_AT_ONCE = 16


def absorb_and_cache(
    query: Tensor,
    new: Tensor,
    key_up: Tensor,
    table: Tensor,
    positions: Tensor,
    rows: Tensor,
    slots: Tensor,
    norm_weight: Tensor,
    eps: float,
    is_interleaved: bool,
) -> Tensor:
    """Raises ValueError for more than 16 rows."""
    num_tokens, heads, _ = query.shape
    if num_tokens > MAX_ROWS:
        raise ValueError(f"query must have at most {MAX_ROWS} rows, but got {num_tokens}. Use bmm for more.")
    plain, rank = key_up.shape[1:]
    dim = table.shape[2]
    out = torch.empty(num_tokens, heads, rank + dim, dtype=query.dtype, device=query.device)
    tiles = triton.cdiv(rank, RANK_TILE)
    _absorb[(heads * tiles + num_tokens,)](
        query, new, key_up, table, positions, rows, slots, norm_weight, out, num_tokens,
        query.stride(0), query.stride(1), new.stride(0), key_up.stride(0), key_up.stride(1), rows.stride(0), eps,
        HEADS=heads, PLAIN=plain, RANK=rank, DIM=dim, IS_INTERLEAVED=is_interleaved, NUM_TILES=tiles,
        PLAIN_BLOCK=max(MIN_DOT, triton.next_power_of_2(plain)), RANK_BLOCK=triton.next_power_of_2(rank),
        HALF_BLOCK=triton.next_power_of_2(dim // 2), ROWS=MAX_ROWS, RANK_TILE=RANK_TILE,
        num_warps=4, **early_start(query),
    )  # fmt: skip
    return out


def latent_values(
    query: Tensor,
    rows: Tensor,
    block_tables: Tensor,
    contexts: Tensor,
    block_tokens: int,
    scaling: float,
    value_up: Tensor,
    num_splits: int = 1,
) -> Tensor:
    (num_rows, heads, _), (rank, value), device = query.shape, value_up.shape[1:], query.device
    splits = max(2, num_splits)  # a single one would have no parts to merge
    parts = torch.empty(num_rows, heads, splits, rank, dtype=torch.float32, device=device)
    sums = torch.empty(num_rows, heads, splits, dtype=torch.float32, device=device)
    latent_parts(query, rows, block_tables, contexts, block_tokens, scaling, rank, splits, parts, sums)
    out = torch.empty(num_rows, heads * value, dtype=query.dtype, device=device)
    _values[(num_rows * heads, triton.cdiv(value, VALUE_TILE))](
        parts, sums, value_up, out, value_up.stride(0), value_up.stride(1), value_up.stride(2),
        HEADS=heads, RANK=rank, VALUE=value, NUM_SPLITS=splits, SPLIT_BLOCK=triton.next_power_of_2(splits),
        AT_ONCE=min(SPLITS_AT_ONCE, triton.next_power_of_2(splits)), RANK_BLOCK=triton.next_power_of_2(rank),
        VALUE_TILE=VALUE_TILE,
        num_warps=8, **early_start(query),
    )  # fmt: skip
    return out


@triton.jit
def _turn(
    source: tl.tensor, place: tl.tensor, angle: tl.tensor, wanted: tl.tensor, DIM: tl.constexpr, RIGHT: tl.constexpr
) -> None:  # fmt: skip
    """All pointers: to the left one of each pair."""
    left = tl.load(source, mask=wanted, other=0.0)
    right = tl.load(source + RIGHT, mask=wanted, other=0.0).to(tl.float32)
    cos_left = tl.load(angle, mask=wanted, other=0.0).to(tl.float32)
    cos_right = tl.load(angle + RIGHT, mask=wanted, other=0.0).to(tl.float32)
    sin_left = tl.load(angle + DIM, mask=wanted, other=0.0).to(tl.float32)
    sin_right = tl.load(angle + DIM + RIGHT, mask=wanted, other=0.0).to(tl.float32)
    new_left = left.to(tl.float32) * cos_left + right * sin_left
    new_right = right * cos_right + left.to(tl.float32) * sin_right
    tl.store(place, new_left.to(left.dtype), mask=wanted)
    tl.store(place + RIGHT, new_right.to(left.dtype), mask=wanted)


@triton.jit(do_not_specialize=["num_tokens"])
def _absorb(
    query: tl.tensor,
    new: tl.tensor,
    key_up: tl.tensor,
    table: tl.tensor,
    positions: tl.tensor,
    rows: tl.tensor,
    slots: tl.tensor,
    norm_weight: tl.tensor,
    out: tl.tensor,
    num_tokens: int,
    query_row: int,
    query_head: int,
    new_row: int,
    up_head: int,
    up_row: int,
    row_stride: int,
    eps: float,
    HEADS: tl.constexpr,
    PLAIN: tl.constexpr,
    RANK: tl.constexpr,
    DIM: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    NUM_TILES: tl.constexpr,
    PLAIN_BLOCK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    RANK_TILE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    STEP: tl.constexpr = 2 if IS_INTERLEAVED else 1
    RIGHT: tl.constexpr = 1 if IS_INTERLEAVED else DIM // 2  # from a value to its partner
    program, half = tl.program_id(0), tl.arange(0, HALF_BLOCK)
    column, in_half = half * STEP, half < DIM // 2
    if program < HEADS * NUM_TILES:
        head, tile = program // NUM_TILES, program % NUM_TILES
        m, k, n = tl.arange(0, ROWS), tl.arange(0, PLAIN_BLOCK), tile * RANK_TILE + tl.arange(0, RANK_TILE)
        up_at = key_up + head.to(tl.int64) * up_head + k[:, None] * up_row + n[None]
        some = tl.load(up_at, mask=(k < PLAIN)[:, None] & (n < RANK)[None], other=0.0)
        if PDL:
            gdc_launch_dependents()
            gdc_wait()
        is_row = m < num_tokens
        source = query + m[:, None] * query_row + head * query_head
        plain = tl.load(source + k[None], mask=is_row[:, None] & (k < PLAIN)[None], other=0.0)
        place = out + (m[:, None] * HEADS + head) * (RANK + DIM)
        found = tl.dot(plain, some, input_precision="ieee")
        tl.store(place + n[None], found.to(out.dtype.element_ty), mask=is_row[:, None] & (n < RANK)[None])
        if tile == 0:
            position = tl.load(positions + m, mask=is_row, other=0).to(tl.int64)
            angle = table + position[:, None] * (2 * DIM) + column[None]
            wanted = is_row[:, None] & in_half[None]
            _turn(source + PLAIN + column[None], place + RANK + column[None], angle, wanted, DIM, RIGHT)
    else:
        if PDL:
            gdc_launch_dependents()
            gdc_wait()
        token = program - HEADS * NUM_TILES
        slot = tl.load(slots + token).to(tl.int64)
        if slot >= 0:
            latent, cached = new + token * new_row, rows + slot * row_stride
            _norm_latent(latent, cached, norm_weight, eps, RANK, RANK_BLOCK)
            turned = table + tl.load(positions + token).to(tl.int64) * (2 * DIM) + column
            _turn(latent + RANK + column, cached + RANK + column, turned, in_half, DIM, RIGHT)


@triton.jit
def _values(
    parts: tl.tensor,
    sums: tl.tensor,
    value_up: tl.tensor,
    out: tl.tensor,
    up_head: int,
    up_rank: int,
    up_value: int,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    VALUE: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    SPLIT_BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    VALUE_TILE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    output = tl.program_id(0).to(tl.int64)
    value, r = tl.program_id(1) * VALUE_TILE + tl.arange(0, VALUE_TILE), tl.arange(0, RANK_BLOCK)
    up_at = value_up + output % HEADS * up_head + value[:, None] * up_value + r[None] * up_rank
    up = tl.load(up_at, mask=(value < VALUE)[:, None] & (r < RANK)[None], other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    split = tl.arange(0, SPLIT_BLOCK)
    logs = tl.load(sums + output * NUM_SPLITS + split, mask=split < NUM_SPLITS, other=float("-inf"))
    top = tl.max(logs, 0)
    top = tl.where(top > float("-inf"), top, 0.0)
    total = tl.maximum(tl.sum(tl.exp2(logs - top), 0), 1e-30)
    latent = tl.zeros([RANK_BLOCK], tl.float32)
    for first in tl.static_range(0, NUM_SPLITS, AT_ONCE):
        some = first + tl.arange(0, AT_ONCE)
        own = tl.load(sums + output * NUM_SPLITS + some, mask=some < NUM_SPLITS, other=float("-inf"))
        weights = tl.exp2(own - top) / total
        at = parts + (output * NUM_SPLITS + some)[:, None] * RANK + r[None]
        found = tl.load(at, mask=(weights > 0)[:, None] & (r < RANK)[None], other=0.0)
        latent += tl.sum(found * weights[:, None], 0)
    result = tl.sum(up.to(tl.float32) * latent[None], 1)
    tl.store(out + output * VALUE + value, result.to(out.dtype.element_ty), mask=value < VALUE)
