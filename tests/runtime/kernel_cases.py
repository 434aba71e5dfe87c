"""Claims about the Triton kernels beside their plain twins, by name. A case takes a device and a dtype, and raises.

    pytest                                     on a GPU, in its own process
    python -m tests.runtime.kernel_cases       under Triton's interpreter or, with --compile, compiled for a GPU
                                               that is not there; prints a JSON object, name -> error or null

Whatever a row must not read is NaN: slots of others, slots before its window, and what its block table holds beyond
its context is no block at all.
"""

import argparse
import functools
import json
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.expert_choice import Rule
from runtime.kernels import PLAIN, TRITON, Kernels, Shape, self_check
from runtime.kernels.expert_trials import ExpertShape, by_expert
from runtime.kernels.splits import tiles_of
from runtime.kernels.table import TOLERANCE, difference
from runtime.rounded_cache import restored, rounded

NO_BLOCK = 2**30
HALF_EVERY = 4
Case = Callable[..., None]  # (device, dtype)
CASES: dict[str, Case] = {}


def kernels() -> Kernels:
    assert TRITON is not None
    return TRITON


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert not expected.isnan().any(), "the twin gave NaN"
    error = difference(actual, expected)
    assert error <= TOLERANCE[expected.dtype], f"differs by {error:.3g} of the largest value"


class Pool:
    """Blocks in random order for rows of these contexts; a slot that no row may see is NaN."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, contexts: list[int], row: int, size: int,
        window: int | None = None,
    ) -> None:  # fmt: skip
        counts = [-(-context // size) for context in contexts]
        order = torch.randperm(sum(counts) + 3).tolist()
        self.tables = torch.full((len(contexts), max(1, *counts)), NO_BLOCK, dtype=torch.int32)
        self.rows = torch.full(((sum(counts) + 3) * size, row), float("nan"))
        for i, (context, count) in enumerate(zip(contexts, counts, strict=True)):
            self.tables[i, :count] = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int32)
            for at in range(0 if window is None else max(0, context - window), context):
                slot = int(self.tables[i, at // size]) * size + at % size
                self.rows[slot] = torch.randn(row)
        self.rows = self.rows.to(device, dtype)
        self.tables, self.contexts = self.tables.to(device), torch.tensor(contexts, device=device)


# -- decode attention ---------------------------------------------------------------------------------------------


def decode(
    device: torch.device, dtype: torch.dtype, contexts: list[int], kv_heads: int = 2, group: int = 4, dim: int = 32,
    size: int = 4, window: int | None = None, splits: int = 1, contexts_dtype: torch.dtype = torch.int64,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    pool = Pool(device, dtype, contexts, 2 * kv_heads * dim, size, window)
    # A view of the fused row, as the decoder has it.
    qkv = torch.randn(len(contexts), (kv_heads * group + 2 * kv_heads) * dim).to(device, dtype)
    query = qkv[:, : kv_heads * group * dim].unflatten(1, (kv_heads, group, dim))
    given = (query, pool.rows, pool.tables, pool.contexts.to(contexts_dtype), size, dim**-0.5, window)
    expected = PLAIN.paged_decode(*given, splits)
    close(kernels().paged_decode(*given, splits), expected)
    assert bool((expected[pool.contexts == 0] == 0).all())


def latent_decode(
    device: torch.device, dtype: torch.dtype, contexts: list[int], heads: int = 16, dim: int = 48, value_dim: int = 32,
    size: int = 4, splits: int = 1,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    pool = Pool(device, dtype, contexts, dim, size)
    query = torch.randn(len(contexts), heads, dim).to(device, dtype)
    given = (query, pool.rows, pool.tables, pool.contexts, size, dim**-0.5, value_dim, splits)
    close(kernels().paged_latent_decode(*given), PLAIN.paged_latent_decode(*given))


def add(name: str, function: Callable[..., None], **options: Any) -> None:
    assert name not in CASES
    CASES[name] = functools.partial(function, **options)


def decode_fp8(
    device: torch.device, dtype: torch.dtype, contexts: list[int], kv_heads: int = 2, group: int = 4, dim: int = 32,
    size: int = 4, window: int | None = None, splits: int = 1, scale: float = 1.0,
) -> None:  # fmt: skip
    """`scale`: of all values, so that none would be left, or all too large, without scales."""
    torch.manual_seed(0)
    pool = Pool(device, torch.float32, contexts, 2 * kv_heads * dim, size, window)
    bits, scales = rounded(pool.rows.unflatten(1, (2 * kv_heads, dim)) * scale)
    query = torch.randn(len(contexts), kv_heads, group, dim).to(device, dtype)
    given = (
        query,
        bits.flatten(1),
        scales,
        pool.tables,
        pool.contexts,
        size,
        dim**-0.5 / scale,
        window,
        splits,
    )
    expected = PLAIN.paged_decode_fp8(*given)
    close(kernels().paged_decode_fp8(*given), expected)
    # And both are what the kernel of whole values makes of the same ones.
    whole = restored(bits, scales, torch.float32).flatten(1)
    same = (query.float(), whole, *given[3:])
    close(PLAIN.paged_decode(*same).to(dtype), expected)


def rope_fp8(
    device: torch.device, dtype: torch.dtype, num_heads: int = 4, kv_heads: int = 2, dim: int = 32,
    slots: tuple[int, ...] = (3, -1, 0, 17, -1), has_norm: bool = False, scale: float = 1.0,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    num_tokens = len(slots)
    qkv = (torch.randn(num_tokens, (num_heads + 2 * kv_heads) * dim + 8) * scale).to(device, dtype)
    qkv[0, num_heads * dim : (num_heads + 1) * dim] = 0  # a head of zeros
    angles = torch.rand(64, dim // 2) * 6.28
    cos, sin = angles.cos(), angles.sin()
    table = torch.stack((torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1)), 1).to(device, dtype)
    weight = torch.randn(num_heads + kv_heads, dim).to(device, dtype) if has_norm else None
    positions = torch.arange(num_tokens, device=device) * 7 % 64
    before = rounded(torch.randn(24, 2 * kv_heads, dim).to(device))
    results = []
    for kernel in (kernels().rope_and_cache_fp8, PLAIN.rope_and_cache_fp8):
        new, rows, scales = qkv.clone(), before[0].flatten(1), before[1].clone()
        kernel(
            new[:, :-8],
            table,
            positions,
            rows,
            scales,
            torch.tensor(slots, device=device),
            kv_heads,
            weight,
            1e-6,
        )
        results.append((new, restored(rows.unflatten(1, (2 * kv_heads, dim)), scales, torch.float32)))
    close(results[0][0], results[1][0])
    actual, expected = results[0][1], results[1][1]
    assert not expected.isnan().any()
    # A value on the edge may be rounded to either side, but few are.
    assert bool(
        ((actual - expected).abs() <= expected.abs() / 7 + 2.0**-9 * expected.abs().amax(-1, True)).all()
    )
    assert float((actual - expected).abs().sum()) <= 0.01 * float(expected.abs().sum())
    written = torch.tensor([slot for slot in slots if slot >= 0], dtype=torch.long)
    others = torch.ones(24, dtype=torch.bool)
    others[written] = False
    assert torch.equal(actual[others.to(device)], restored(*before, torch.float32)[others.to(device)])


def moved_rows(device: torch.device, dtype: torch.dtype, heads: int, dim: int, scale: float = 1.0) -> None:
    """There and back: rounded as the twin rounds, to the last bit, and what was not named stays."""
    torch.manual_seed(0)
    rows = (torch.randn(24, heads * dim) * scale).to(device, dtype)
    rows[7, :dim] = 0  # a head of zeros
    sources, targets = torch.tensor([7, 0, 23, 2], device=device), torch.tensor([1, 15, 0, 8], device=device)
    bits, scales = rounded(torch.randn(16, heads, dim).to(device))
    results = []
    for table in (kernels(), PLAIN):
        cached, steps, back = bits.flatten(1).clone(), scales.clone(), rows.clone()
        table.round_rows(cached, steps, rows, sources, targets)
        table.restore_rows(back, cached, steps, targets, sources)
        results.append((cached, steps, back))
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)
    assert torch.equal(results[0][2][1], rows[1]) and not torch.equal(results[0][2][0], rows[0])


for splits in (1, 4):
    add(f"decode_fp8_ragged_{splits}", decode_fp8, contexts=[3, 200, 64, 65, 1, 129, 0], splits=splits)
    add(f"decode_fp8_window_{splits}", decode_fp8, contexts=[1, 63, 300], window=5, splits=splits)
add("decode_fp8_of_small_values", decode_fp8, contexts=[5, 70], scale=1e-3)
add("decode_fp8_of_large_values", decode_fp8, contexts=[5, 70], scale=1e3)
for dim in (64, 96, 128):
    add(f"decode_fp8_head_of_{dim}", decode_fp8, contexts=[3, 77], dim=dim, splits=2, size=64)
    add(f"rope_fp8_head_of_{dim}", rope_fp8, dim=dim)
add("rope_fp8_normed", rope_fp8, has_norm=True)
add("rope_fp8_of_small_values", rope_fp8, scale=1e-3)
add("rope_fp8_nothing_but_padding", rope_fp8, slots=(-1, -1))
add("rope_fp8_one_key_head_of_many", rope_fp8, num_heads=71, kv_heads=1, dim=64)
for heads, dim in ((4, 32), (16, 128), (2, 96), (40, 64)):
    add(f"round_rows_{heads}_of_{dim}", moved_rows, heads=heads, dim=dim)
add("round_rows_of_small_values", moved_rows, heads=4, dim=32, scale=1e-3)
add("round_rows_of_large_values", moved_rows, heads=4, dim=32, scale=1e3)
for splits in (1, 4):
    add(f"decode_context_of_one_{splits}", decode, contexts=[1], splits=splits)
    add(f"decode_exactly_a_block_{splits}", decode, contexts=[4, 8, 128, 256], splits=splits)
    add(f"decode_ragged_{splits}", decode, contexts=[3, 200, 64, 65, 1, 129], splits=splits)
    add(f"decode_padding_rows_{splits}", decode, contexts=[0, 9, 0, 130, 0], splits=splits)
    add(f"decode_nothing_but_padding_{splits}", decode, contexts=[0, 0], splits=splits)
    for window in (1, 5, 64, 1000):
        add(
            f"decode_window_{window}_{splits}", decode, contexts=[1, 5, 63, 64, 65, 300], window=window,
            splits=splits,
        )  # fmt: skip
    add(f"latent_ragged_{splits}", latent_decode, contexts=[1, 0, 31, 32, 200], splits=splits)
for group in (1, 4, 7, 8, 16, 20, 71):
    add(f"decode_group_{group}", decode, contexts=[5, 70], group=group, kv_heads=1, splits=2)
for dim in (16, 64, 80, 96, 128, 256):
    add(f"decode_head_of_{dim}", decode, contexts=[3, 77], dim=dim, splits=2)
for size in (1, 2, 16, 256):
    add(f"decode_blocks_of_{size}", decode, contexts=[1, 40, 257], size=size, splits=3)
for splits in (2, 5, 16, 64):
    add(
        f"decode_several_thousand_{splits}",
        decode,
        contexts=[3001, 4096, 17],
        kv_heads=1,
        size=16,
        splits=splits,
    )
for dim in (16, 64, 128):
    add(f"decode_in_blocks_of_heads_of_{dim}", decode, contexts=[1, 64, 65, 0, 200], dim=dim, size=64)
    add(
        f"decode_in_blocks_split_heads_of_{dim}",
        decode,
        contexts=[7, 129, 0, 256],
        dim=dim,
        size=64,
        splits=3,
    )
add("decode_in_blocks_of_heads_of_256", decode, contexts=[3, 130], dim=256, size=64)
add("decode_in_blocks_group_71", decode, contexts=[66, 5], kv_heads=1, group=71, size=64)
add("decode_in_blocks_of_many_rows", decode, contexts=[5, 33, 0, 64, 100] * 14, kv_heads=1, dim=128, size=64)
add("decode_in_blocks_in_a_window", decode, contexts=[70, 5], dim=128, size=64, window=40)
add("decode_int32_contexts", decode, contexts=[3, 0, 77], contexts_dtype=torch.int32)
add(
    "decode_ten_thousand_in_a_window", decode, contexts=[10_000, 3], kv_heads=1, size=16, window=100, splits=8
)
for heads in (1, 20, 128):
    add(f"latent_heads_{heads}", latent_decode, contexts=[5, 70], heads=heads, splits=2)
add("latent_of_deepseek", latent_decode, contexts=[50, 129, 0], dim=576, value_dim=512, size=16, splits=3)
add("latent_several_thousand", latent_decode, contexts=[3001, 17], size=64, splits=7)


# -- attention of pieces ------------------------------------------------------------------------------------------


def prefill(
    device: torch.device, dtype: torch.dtype, pieces: list[tuple[int, int]], kv_heads: int = 2, group: int = 2,
    dim: int = 32, size: int = 4, window: int | None = None, table_dtype: torch.dtype = torch.int32, splits: int = 1,
) -> None:  # fmt: skip
    """`pieces`: new tokens and context of each; they stand behind two rows that decode."""
    torch.manual_seed(0)
    new, contexts = (np.array(part) for part in zip(*pieces, strict=True))
    pool = Pool(device, dtype, [5, 9, *contexts.tolist()], 2 * kv_heads * dim, size)
    qkv = torch.randn(2 + int(new.sum()), (kv_heads * group + 2 * kv_heads) * dim).to(device, dtype)
    query = qkv[:, : kv_heads * group * dim].unflatten(1, (kv_heads, group, dim))
    edges = torch.tensor([0, *np.cumsum(new)], dtype=torch.int32, device=device)
    tiles = torch.from_numpy(tiles_of(new, contexts)).to(device)
    tables = pool.tables.to(table_dtype)
    given = (query, pool.rows, tables, pool.contexts, 2, edges, tiles, splits, size, dim**-0.5, window)
    close(kernels().paged_prefill(*given)[2:], PLAIN.paged_prefill(*given)[2:])


add("prefill_of_one_token", prefill, pieces=[(1, 1)])
add("prefill_behind_a_context", prefill, pieces=[(1, 130), (3, 66), (70, 200)])
add("prefill_ragged", prefill, pieces=[(63, 63), (64, 64), (65, 65), (1, 1), (129, 130)])
add("prefill_of_a_long_context", prefill, pieces=[(40, 3001)], kv_heads=1, size=16)
add("prefill_int64_tables", prefill, pieces=[(5, 80)], table_dtype=torch.int64)
for window in (1, 64, 100):
    add(f"prefill_window_{window}", prefill, pieces=[(70, 300), (130, 130), (1, 65)], window=window)
for splits, window in ((2, None), (8, None), (4, 70)):
    pieces = [(66, 200), (1, 65)]
    add(f"prefill_splits_{splits}", prefill, pieces=pieces, kv_heads=1, size=64, window=window, splits=splits)
add("prefill_splits_of_small_blocks", prefill, pieces=[(5, 600)], kv_heads=1, splits=4)
for group in (1, 7):
    add(f"prefill_group_{group}", prefill, pieces=[(20, 70)], group=group, kv_heads=1)
for dim in (16, 80, 128, 256):
    add(f"prefill_head_of_{dim}", prefill, pieces=[(66, 90)], dim=dim)
for size in (1, 16, 64, 256):
    add(f"prefill_blocks_of_{size}", prefill, pieces=[(20, 300), (40, 40)], size=size)


def prefill_padded(
    device: torch.device, dtype: torch.dtype, pieces: list[tuple[int, int]], num_empty: int = 2,
    window: int | None = None,
) -> None:  # fmt: skip
    """As graphs have them: tokens before and behind the pieces, pieces without tokens, and tiles of these."""
    torch.manual_seed(0)
    kv_heads, dim, size, before, behind = 2, 64, 64, 3, 9
    new, contexts = (np.array(part) for part in zip(*pieces, strict=True))
    pool = Pool(device, dtype, [*contexts.tolist(), *[0] * num_empty], 2 * kv_heads * dim, size)
    query = torch.randn(before + int(new.sum()) + behind, kv_heads, 2, dim).to(device, dtype)
    starts = before + np.array([0, *np.cumsum(new), *[new.sum()] * num_empty])
    tiles = np.concatenate((tiles_of(new, contexts), [[len(pieces) + num_empty - 1, 0]] * 5))
    edges, tiles = (torch.from_numpy(one.astype(np.int32)).to(device) for one in (starts, tiles))
    given = (query, pool.rows, pool.tables, pool.contexts, 0, edges, tiles, 1, size, dim**-0.5, window)
    close(*(of.paged_prefill(*given)[before:-behind] for of in (kernels(), PLAIN)))


for window in (None, 70):
    add(f"prefill_padded_{window}", prefill_padded, pieces=[(66, 200), (1, 1), (70, 70)], window=window)
add("prefill_padded_of_one", prefill_padded, pieces=[(1, 65)], num_empty=1)


def a_row_alone_gives_the_same_bits(device: torch.device, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    pool = Pool(device, dtype, [5, 200, 77, 0, 130], 2 * 32, 4)
    query = torch.randn(5, 1, 4, 32).to(device, dtype)
    whole = kernels().paged_decode(query, pool.rows, pool.tables, pool.contexts, 4, 0.2, None, 3)
    for i in range(5):
        row = slice(i, i + 1)
        alone = kernels().paged_decode(
            query[row], pool.rows, pool.tables[row], pool.contexts[row], 4, 0.2, None, 3
        )
        assert torch.equal(alone[0], whole[i])


CASES["decode_a_row_alone_gives_the_same_bits"] = a_row_alone_gives_the_same_bits


# -- the small ones -----------------------------------------------------------------------------------------------


def rope(
    device: torch.device, dtype: torch.dtype, num_heads: int = 4, kv_heads: int = 2, dim: int = 32,
    slots: tuple[int, ...] = (3, -1, 0, 17, -1), has_norm: bool = False, wide_table: bool = False,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    num_tokens = len(slots)
    # Rows lie apart, and the cache's too: both may be views.
    qkv = torch.randn(num_tokens, (num_heads + 2 * kv_heads) * dim + 8).to(device, dtype)
    cache = torch.randn(24, 2 * kv_heads * dim + 8).to(device, dtype)
    angles = torch.rand(64, dim // 2) * 6.28
    cos, sin = angles.cos(), angles.sin()
    table = torch.stack((torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1)), 1)
    table = table.to(device, torch.float32 if wide_table else dtype)
    weight = torch.randn(num_heads + kv_heads, dim).to(device, dtype) if has_norm else None
    results = []
    for kernel in (kernels().rope_and_cache, PLAIN.rope_and_cache):
        new, rows = qkv.clone(), cache.clone()
        kernel(
            new[:, :-8], table, torch.arange(num_tokens, device=device) * 7 % 64, rows[:, :-8],
            torch.tensor(slots, device=device), kv_heads, weight, 1e-6,
        )  # fmt: skip
        results.append((new, rows))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)
    written = torch.tensor([slot for slot in slots if slot >= 0], dtype=torch.long)
    others = torch.ones(24, dtype=torch.bool)
    others[written] = False
    assert torch.equal(results[0][1][others.to(device)], cache[others.to(device)])
    value = slice((num_heads + kv_heads) * dim, (num_heads + 2 * kv_heads) * dim)
    assert torch.equal(results[0][0][:, value], qkv[:, value])


for dim in (16, 64, 96, 128, 256):
    add(f"rope_head_of_{dim}", rope, dim=dim, has_norm=dim % 128 == 0)
add("rope_normed", rope, has_norm=True)
add("rope_of_one_token", rope, slots=(5,))
add("rope_nothing_but_padding", rope, slots=(-1, -1))
add("rope_padding_first", rope, slots=(-1, 0))
add("rope_odd_heads", rope, num_heads=7, kv_heads=1, has_norm=True)
add("rope_one_key_head_of_many", rope, num_heads=71, kv_heads=1, dim=64)
add("rope_float32_table", rope, wide_table=True)


def norm(
    device: torch.device, dtype: torch.dtype, hidden: int, has_delta: bool = True, scale: float = 1.0,
    num_parts: int = 0,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    x, delta = (torch.randn(3, hidden).mul(scale).to(device, dtype) for _ in range(2))
    delta = torch.cat((delta, delta), 1)[:, :hidden]  # rows lie apart
    if num_parts:
        delta = (
            torch.randn(num_parts, 3, hidden, device=device).mul_(0.5).round_().mul_(2)
        )  # exact in any order
    weight = torch.randn(hidden).to(device, dtype)
    sums, results = [], []
    for kernel in (kernels().add_norm, PLAIN.add_norm):
        sums.append(x.clone())
        results.append(kernel(sums[-1], delta if has_delta else None, weight, 1e-5))
    assert torch.equal(*sums)
    close(*results)


for hidden in (1, 96, 1000, 1024, 4096, 8192):
    add(f"norm_of_{hidden}", norm, hidden=hidden)
add("norm_without_delta", norm, hidden=100, has_delta=False)
add("norm_of_parts", norm, hidden=1000, num_parts=3)
add("norm_of_one_part", norm, hidden=64, num_parts=1)
add("norm_of_zeros", norm, hidden=64, scale=0.0)
add("norm_whose_squares_overflow_float16", norm, hidden=64, scale=3000.0)


def silu(device: torch.device, dtype: torch.dtype, size: int, scale: float = 1.0) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(3, 2 * size).mul(scale).to(device, dtype)
    close(kernels().silu_mul(gate_up), PLAIN.silu_mul(gate_up))


for size in (1, 96, 1025, 3072):
    add(f"silu_of_{size}", silu, size=size)
add("silu_of_large_values", silu, size=200, scale=40.0)


def int8_levels(
    device: torch.device, dtype: torch.dtype, num_rows: int, size: int, scale: float = 1.0, gap: int = 8,
    every: int = 1,
) -> None:  # fmt: skip
    """Both may round a value between two levels either way, as one of them multiplies and adds at once."""
    torch.manual_seed(0)
    whole = torch.randn(num_rows, every * (size + gap)).mul(scale).to(device, dtype)
    whole[0] = 0
    x = whole[:, : every * size : every]
    x[-1, -1] *= 100
    (levels, steps), (expected, widths) = (kernel(x) for kernel in (kernels().int8_levels, PLAIN.int8_levels))
    close(steps, widths)
    assert levels.shape == expected.shape and levels.dtype == torch.int8
    assert len(levels) > 16 and not levels[num_rows:].any(), "as torch._int_mm wants it"
    off = (levels.int() - expected.int()).abs()
    assert off.max() <= 1 and off.float().mean() < 1e-3
    largest = levels[:num_rows].int().abs().amax(1)
    assert largest[0] == 0 and bool((largest[1:] == 127).all())
    assert bool(((levels[:num_rows] * steps - x.float()).abs() <= 0.51 * steps).all())


def int8_levels_of_what_is_no_number(device: torch.device, dtype: torch.dtype) -> None:
    x = torch.ones(4, 5000).to(device, dtype)
    x[1, 3], x[2, 4999] = float("nan"), -float("inf")
    for kernel in (kernels().int8_levels, PLAIN.int8_levels):
        levels, steps = kernel(x)
        assert steps.isnan().flatten().tolist() == [False, True, False, False]
        assert steps.isinf().flatten().tolist() == [False, False, True, False]
        assert levels[[0, 3]].eq(127).all()


for num_rows, size in ((1, 1), (3, 96), (40, 100), (2, 5000)):
    add(f"int8_levels_of_{num_rows}_by_{size}", int8_levels, num_rows=num_rows, size=size)
add("int8_levels_of_small_values", int8_levels, num_rows=3, size=64, scale=1e-3)
add("int8_levels_of_very_small_values", int8_levels, num_rows=2, size=64, scale=1e-6)
add("int8_levels_side_by_side", int8_levels, num_rows=3, size=64, gap=0)
add("int8_levels_of_every_other_value", int8_levels, num_rows=3, size=64, every=2)
CASES["int8_levels_of_what_is_no_number"] = int8_levels_of_what_is_no_number


def int8_scaled(
    device: torch.device, dtype: torch.dtype, num_rows: int, size: int, has_bias: bool, num_more: int = 0
) -> None:
    torch.manual_seed(0)
    steps, scale = torch.rand(num_rows, 1, device=device) * 1e-4, torch.rand(size, device=device) * 1e-2
    bias = torch.randn(size, device=device) if has_bias else None
    # Made last: the scale is read before what was launched just before is waited for.
    product = torch.randint(-(2**24), 2**24, (num_rows + num_more, size), dtype=torch.int32, device=device)
    close(*(one.int8_scaled(product, steps, scale, bias, dtype) for one in (kernels(), PLAIN)))


add("int8_scaled", int8_scaled, num_rows=1, size=3000, has_bias=False, num_more=31)
add("int8_scaled_and_added_to", int8_scaled, num_rows=33, size=40, has_bias=True)


def skinny(
    device: torch.device, dtype: torch.dtype, m: int, n: int = 100, k: int = 512, **tiles: int
) -> None:
    from runtime.kernels.skinny_linear import Tiles, row_block, skinny_parts

    torch.manual_seed(0)
    x = torch.randn(m, k + 16).to(device, dtype)[:, :k]  # rows lie apart
    weight = (torch.randn(n, k) * k**-0.5).to(device, dtype)
    parts = skinny_parts(x, weight, Tiles(row_block(m), **tiles) if tiles else None)
    assert parts.dtype == torch.float32
    close(parts.sum(0).to(dtype), PLAIN.skinny_parts(x, weight)[0].to(dtype))
    if not tiles:
        close(kernels().skinny_linear(x, weight), PLAIN.skinny_linear(x, weight))
        both = torch.cat((weight, weight.flip(0)))
        close(kernels().skinny_gated(x, both), PLAIN.skinny_gated(x, both))


for m in (1, 3, 16, 17, 33, 64, 65, 128, 200, 256):
    add(f"linear_rows_{m}", skinny, m=m)
for k in (16, 100, 1000, 4096):
    add(f"linear_inputs_{k}", skinny, m=2, k=k)
for n in (1, 15, 1030):
    add(f"linear_outputs_{n}", skinny, m=2, n=n)
for split in (1, 2, 3, 8):
    add(f"linear_split_{split}", skinny, m=5, k=520, block_n=32, block_k=64, split_k=split)
add("linear_more_splits_than_columns", skinny, m=2, k=64, block_n=16, block_k=64, split_k=4)
add("linear_split_even", skinny, m=5, k=512, block_n=16, block_k=64, split_k=4)


def likeliest(
    device: torch.device, dtype: torch.dtype, vocab: int, fill: float | None = None, at: int = 0
) -> None:
    """`fill`: what stands at `at` in the second row."""
    torch.manual_seed(0)
    logits = (
        torch.randn(3, vocab + 5).round_(decimals=1).to(device, dtype)[:, :vocab]
    )  # rows lie apart, many equal
    if fill is not None:
        logits[1, at] = fill
    tokens, may_be_taken = kernels().greedy(logits)
    expected_may = PLAIN.greedy(logits)[1]
    assert may_be_taken.tolist() == expected_may.tolist()
    assert torch.equal(tokens[expected_may == 1], logits.argmax(-1)[expected_may == 1])


for vocab in (1, 100, 4096, 9000):
    add(f"greedy_of_{vocab}", likeliest, vocab=vocab)
for name, value in {"nan": float("nan"), "inf": float("inf"), "minus_inf": float("-inf")}.items():
    add(f"greedy_with_{name}", likeliest, vocab=5000, fill=value, at=4999)
add("greedy_of_minus_inf_alone", likeliest, vocab=1, fill=float("-inf"))


def sampled(
    device: torch.device,
    dtype: torch.dtype,
    vocab: int,
    temperature: float = 1.0,
    min_p: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    spread: float = 3.0,
    fill: float | None = None,
) -> None:
    """In every second row, between rows that ask for nothing or are greedy. `fill`: what stands in the first row."""
    torch.manual_seed(0)
    num_rows = 4
    logits = (spread * torch.randn(num_rows, vocab + 5)).round_(decimals=1).to(device, dtype)[:, :vocab]
    if fill is not None:
        logits[0, vocab // 2] = fill
    params = torch.zeros(5, num_rows, dtype=torch.float64)
    params[0, ::2], params[0, 3] = temperature, 1.0
    params[1, ::2], params[3, ::2], params[2] = min_p, top_k, 1.0
    params[2, ::2], params[4] = top_p, torch.rand(num_rows, dtype=torch.float64)
    given = params.to(device), top_k > 0, top_p < 1.0
    tokens, may_be_taken = kernels().sample(logits, *given)
    expected, expected_may = PLAIN.sample(logits, *given)
    assert may_be_taken.tolist() == expected_may.tolist()
    is_other = (tokens != expected) & (expected_may == 1)
    # A draw may lie so near to a border that another rounding of the exponential takes it across.
    assert int(is_other.sum()) <= (device.type == "cuda"), (tokens.tolist(), expected.tolist())
    assert not is_other[1], "a greedy row"


for name, wish in {
    "all": {}, "cool": {"temperature": 0.2}, "min_p": {"min_p": 0.2}, "top_k": {"top_k": 3}, "top_p": {"top_p": 0.8},
    "of_none": {"top_p": 0.0}, "of_both": {"top_k": 40, "top_p": 0.9},
    "of_three": {"min_p": 0.1, "top_k": 9, "top_p": 0.5},
    "of_equals": {"top_k": 700, "top_p": 0.9, "spread": 0.0}, "of_nearly_all": {"top_p": 0.999, "temperature": 5.0},
    "nan": {"fill": float("nan"), "top_p": 0.9}, "inf": {"fill": float("inf"), "top_k": 2},
    "minus_inf": {"fill": float("-inf"), "top_p": 0.9},
}.items():  # fmt: skip
    add(f"sample_{name}", sampled, vocab=5000, **wish)
add("sample_of_many_equals", sampled, vocab=5000, top_k=3000, top_p=0.9, spread=0.0)
add("sample_of_least_temperature", sampled, vocab=5000, temperature=1e-46, top_k=3)
add("sample_of_one", sampled, vocab=1, top_p=0.5)
add("sample_of_a_block", sampled, vocab=4096, top_p=0.5, top_k=20)


def embedded(device: torch.device, dtype: torch.dtype, hidden: int) -> None:
    torch.manual_seed(0)
    table = torch.randn(20, hidden + 8).to(device, dtype)[:, :hidden]
    token_ids, drawn = (torch.tensor(one, device=device) for one in ([7, -1, 0, -3, 19], [4, 2**40, 11]))
    assert torch.equal(kernels().embed(token_ids, drawn, table), table[[7, 4, 0, 11, 19]])


for hidden in (8, 1000, 2048):
    add(f"embed_{hidden}", embedded, hidden=hidden)
# -- latents and experts ------------------------------------------------------------------------------------------


def latent_rope(
    device: torch.device, dtype: torch.dtype, heads: int = 4, plain: int = 16, dim: int = 8, rank: int = 16,
    slots: tuple[int, ...] = (3, -1, 0, 17, -1), is_interleaved: bool = True, is_in_place: bool = False,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    # Queries with the part that is not turned, and behind them what is cached, as one linear layer puts them out.
    whole = torch.randn(len(slots), heads * (plain + dim) + rank + dim + 8).to(device, dtype)
    cache = torch.randn(24, rank + dim + 8).to(device, dtype)
    table, weight = torch.randn(64, 2, dim).to(device), torch.randn(rank).to(device, dtype)
    results = []
    for kernel in (kernels().latent_rope_and_cache, PLAIN.latent_rope_and_cache):
        given, rows = whole.clone(), cache.clone()
        turn = given[:, : heads * (plain + dim)].unflatten(1, (heads, -1))[..., plain:]
        absorbed = torch.zeros(len(slots), heads, rank + dim, dtype=dtype, device=device)
        kernel(
            turn if is_in_place else absorbed[..., rank:], turn, given[:, heads * (plain + dim) : -8], table,
            torch.arange(len(slots), device=device) * 7 % 64, rows[:, :-8], torch.tensor(slots, device=device), weight,
            1e-6, is_interleaved,
        )  # fmt: skip
        results.append((given, rows, absorbed))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


for is_interleaved in (True, False):
    name = "pairs" if is_interleaved else "halves"
    add(f"latent_rope_{name}", latent_rope, is_interleaved=is_interleaved)
    add(f"latent_rope_{name}_in_place", latent_rope, is_interleaved=is_interleaved, is_in_place=True)
add("latent_rope_of_deepseek", latent_rope, heads=16, plain=128, dim=64, rank=512)
add("latent_rope_odd", latent_rope, heads=71, plain=3, dim=6, rank=20)
add("latent_rope_nothing_but_padding", latent_rope, slots=(-1, -1))


def absorbed(
    device: torch.device, dtype: torch.dtype, num_tokens: int, heads: int = 4, plain: int = 16, dim: int = 8,
    rank: int = 16, is_interleaved: bool = True,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    whole = torch.randn(num_tokens, heads * (plain + dim) + rank + dim + 8).to(device, dtype)
    cache = torch.randn(24, rank + dim + 8).to(device, dtype)
    key_up = torch.randn(heads, plain + 5, rank).mul(plain**-0.5).to(device, dtype)[:, :plain]
    table, weight = torch.randn(64, 2, dim).to(device), torch.randn(rank).to(device, dtype)
    slots = torch.randperm(24)[:num_tokens].to(device)
    slots[num_tokens // 2] = -1
    results = []
    for kernel in (kernels().absorb_and_cache, PLAIN.absorb_and_cache):
        rows = cache.clone()
        out = kernel(
            whole[:, : heads * (plain + dim)].unflatten(1, (heads, -1)), whole[:, heads * (plain + dim) : -8], key_up,
            table, torch.arange(num_tokens, device=device) * 7 % 64, rows[:, :-8], slots, weight, 1e-6, is_interleaved,
        )  # fmt: skip
        results.append((out, rows))
    for actual, expected in zip(*results, strict=True):
        close(actual, expected)


for num_tokens in (1, 4, 16):
    add(f"absorb_{num_tokens}", absorbed, num_tokens=num_tokens)
add("absorb_halves", absorbed, num_tokens=3, is_interleaved=False)
add("absorb_of_deepseek", absorbed, num_tokens=2, heads=16, plain=128, dim=64, rank=512)
add("absorb_odd", absorbed, num_tokens=2, heads=3, plain=20, dim=6, rank=100)


def latent_values(
    device: torch.device, dtype: torch.dtype, contexts: list[int], heads: int = 3, dim: int = 48, rank: int = 32,
    value: int = 24, splits: int = 4,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    pool = Pool(device, dtype, contexts, dim, 4)
    query = torch.randn(len(contexts), heads, dim).to(device, dtype)
    up = torch.randn(heads, value, rank).mul(rank**-0.5).to(device, dtype).transpose(1, 2)
    given = (query, pool.rows, pool.tables, pool.contexts, 4, dim**-0.5, up, splits)
    close(kernels().latent_values(*given), PLAIN.latent_values(*given))


for splits in (1, 2, 7, 64):
    add(f"latent_values_in_{splits}", latent_values, contexts=[1, 0, 31, 200], splits=splits)
add(
    "latent_values_of_deepseek",
    latent_values,
    contexts=[129],
    heads=16,
    dim=576,
    rank=512,
    value=128,
    splits=8,
)


def routed(
    device: torch.device, dtype: torch.dtype, rule: Rule, num_experts: int, num_tokens: int = 5, hidden: int = 96,
    is_biased: bool = False, is_wide: bool = False,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    x = torch.randn(num_tokens, hidden + 8).to(device, dtype)[:, :hidden]
    router = (
        torch.randn(num_experts, hidden).mul(hidden**-0.5).to(device, torch.float32 if is_wide else dtype)
    )
    if is_biased:
        rule = rule._replace(bias=torch.randn(num_experts, device=device))
    actual, expected = (kernel(x, router, rule) for kernel in (kernels().route, PLAIN.route))
    assert actual.weights.shape == expected.weights.shape == actual.index.shape
    close(by_expert(actual, num_experts), by_expert(expected, num_experts))


for num_tokens in (1, 17, 70):
    add(f"route_tokens_{num_tokens}", routed, rule=Rule(2), num_experts=8, num_tokens=num_tokens)
for num_experts in (3, 8, 60, 64, 256):
    add(f"route_experts_{num_experts}", routed, rule=Rule(3, factor=2.0), num_experts=num_experts)
add("route_normalised", routed, rule=Rule(2, is_normalised=True), num_experts=8, hidden=1000)
add("route_wider_than_the_model", routed, rule=Rule(2), num_experts=8, is_wide=True)
add("route_all", routed, rule=Rule(6), num_experts=6)
add("route_groups", routed, rule=Rule(3, 4, 2), num_experts=16)
add("route_groups_of_three", routed, rule=Rule(2, 5, 3), num_experts=15)
add("route_of_one_group_with_fewer_than_asked", routed, rule=Rule(3, 4, 1), num_experts=8)
add("route_sigmoid", routed, rule=Rule(3, 4, 2, True, 2.5), num_experts=16, is_biased=True)
add("route_sigmoid_of_deepseek", routed, rule=Rule(8, 8, 4, True, 2.5), num_experts=256, is_biased=True)
add("route_sigmoid_without_groups", routed, rule=Rule(3), num_experts=16, is_biased=True)


def laid_out(
    device: torch.device, dtype: torch.dtype, num_tokens: int, num_experts: int = 8, top_k: int = 2,
    block_rows: int = 16, only: int | None = None,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    index = torch.rand(num_tokens, num_experts).topk(top_k)[1].int().to(device)
    if only is not None:
        index.fill_(only)
    actual, expected = (
        kernel(index, num_experts, block_rows) for kernel in (kernels().lay_out, PLAIN.lay_out)
    )
    for name, ours, theirs in zip(actual._fields, actual, expected, strict=True):
        assert torch.equal(ours, theirs), name


for block_rows in (1, 16, 64):
    for num_tokens in (1, 5, 300, 1500):
        add(f"layout_{num_tokens}_in_{block_rows}", laid_out, num_tokens=num_tokens, block_rows=block_rows)
add("layout_many_experts", laid_out, num_tokens=40, num_experts=127, top_k=8)
add("layout_one_expert_takes_all", laid_out, num_tokens=100, only=7)
add("layout_the_first_expert_takes_all", laid_out, num_tokens=100, only=0, num_experts=70)


def experts(
    device: torch.device, dtype: torch.dtype, num_tokens: int, block_rows: int | None = None, num_shared: int = 0,
    num_experts: int = 6, top_k: int = 2, hidden: int = 64, size: int = 48, only: int | None = None,
) -> None:  # fmt: skip
    torch.manual_seed(0)

    def normal(*of: int) -> Tensor:
        return torch.randn(*of).mul(of[-1] ** -0.5).to(device, dtype)

    index = torch.rand(num_tokens, num_experts).topk(top_k)[1].int().to(device)
    if only is not None:
        index.fill_(only)
    layout = None if block_rows is None else PLAIN.lay_out(index, num_experts, block_rows)
    x = torch.randn(num_tokens, hidden + 16).to(device, dtype)[:, :hidden]
    gate_up, down = normal(num_experts, 2 * size, hidden), normal(num_experts, hidden, size)
    unused = torch.ones(num_experts, dtype=torch.bool, device=device)
    unused[index.flatten().long()] = False
    seen_up, seen_down = (part.clone() for part in (gate_up, down))
    seen_up[unused] = seen_down[unused] = float("nan")
    own_up = normal(2 * num_shared * size, hidden) if num_shared else None
    own_down = normal(hidden, num_shared * size) if num_shared else None
    inner = kernels().expert_gate_up(x, seen_up, own_up, index, layout)
    close(inner, PLAIN.expert_gate_up(x, gate_up, own_up, index, layout))
    weights = torch.rand(num_tokens, top_k, device=device)
    actual = kernels().expert_down(inner, seen_down, own_down, index, weights, layout)
    expected = PLAIN.expert_down(inner, down, own_down, index, weights, layout)
    close(actual.to(dtype), expected.to(dtype))


for num_shared in (0, 1, 2):
    add(f"experts_a_pair_a_block_{num_shared}", experts, num_tokens=1, num_shared=num_shared)
    add(f"experts_of_three_tokens_a_pair_a_block_{num_shared}", experts, num_tokens=3, num_shared=num_shared)
    for block_rows in (16, 32, 64, 128):
        add(
            f"experts_in_blocks_of_{block_rows}_with_{num_shared}", experts, num_tokens=2 * block_rows + 5,
            block_rows=block_rows, num_shared=num_shared,
        )  # fmt: skip
add("experts_odd_sizes", experts, num_tokens=20, block_rows=16, hidden=100, size=52, num_shared=1)
add("experts_wide", experts, num_tokens=2, hidden=272, size=208, block_rows=16)
add("experts_all_on_one", experts, num_tokens=50, block_rows=16, only=3, num_shared=1)
add("experts_many", experts, num_tokens=7, block_rows=16, num_experts=40, top_k=8)


def weighed(
    device: torch.device, dtype: torch.dtype, num_tokens: int = 5, top_k: int = 3, hidden: int = 100,
    has_shared: bool = False,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    found = torch.randn(num_tokens * top_k, hidden).to(device, dtype)
    weights = torch.rand(num_tokens, top_k, device=device)
    places = torch.randperm(num_tokens * top_k).int().to(device)
    shared = torch.randn(num_tokens, hidden).to(device, dtype) if has_shared else None
    close(*(kernel(found, weights, places, shared) for kernel in (kernels().weigh, PLAIN.weigh)))


add("weigh", weighed)
add("weigh_wide", weighed, hidden=1030)
add("weigh_with_shared_experts_beside", weighed, has_shared=True, top_k=8)


def an_expert_gives_the_same_bits_in_any_company(device: torch.device, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, index = torch.randn(30, 64).to(device, dtype), torch.rand(30, 6).topk(2)[1].int().to(device)
    gate_up = torch.randn(6, 96, 64).to(device, dtype)
    whole = kernels().expert_gate_up(x, gate_up, None, index, PLAIN.lay_out(index, 6, 16))
    for i in range(0, 30, 7):
        own = index[i : i + 1]
        alone = kernels().expert_gate_up(x[i : i + 1], gate_up, None, own, PLAIN.lay_out(own, 6, 16))
        assert torch.equal(alone[0], whole[i])


CASES["an_expert_gives_the_same_bits_in_any_company"] = an_expert_gives_the_same_bits_in_any_company


def checks(device: torch.device, dtype: torch.dtype) -> None:
    shape = Shape(
        4, 2, 32, 64, 96, 4, window=9, has_qk_norm=True, latent_dim=48, latent_value_dim=32,
        experts=ExpertShape(8, 48, 2, Rule(3, 4, 2), is_biased=True),
    )  # fmt: skip
    assert self_check(device, dtype, shape) == []


CASES["self_check_passes"] = checks


# -- where there is no GPU ----------------------------------------------------------------------------------------


def compile_only() -> None:
    """From here on kernels are compiled for an H100 and not run, and results are not compared."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from runtime.kernels import launch

    class AbsentGPU:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int = 0) -> int:
            return 0

    driver.set_active(AbsentGPU())
    run = JITFunction.run

    def compiled(self: Any, *given: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *given, grid=grid, warmup=True, **options)

    JITFunction.run = compiled
    launch.has_early_start = lambda device: True


def compiled_cases() -> dict[str, Callable[[], object]]:
    """Shapes of real models in bfloat16."""
    from runtime.kernels.skinny_linear import Tiles, skinny_parts

    half, wide, cpu = torch.bfloat16, torch.float32, torch.device("cpu")

    def empty(*size: int, dtype: torch.dtype = half) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=cpu)

    def paged(
        kv_heads: int, group: int, dim: int, splits: int, size: int = 16, num_rows: int = 2
    ) -> Callable[[], object]:
        tables, contexts = empty(num_rows, 4, dtype=torch.int32), empty(num_rows, dtype=torch.int64)
        return lambda: kernels().paged_decode(
            empty(num_rows, kv_heads, group, dim), empty(64, 2 * kv_heads * dim), tables, contexts, size, 0.1, None,
            splits,
        )  # fmt: skip

    def pieces(
        kv_heads: int, group: int, dim: int, window: int | None, size: int = 64, splits: int = 1
    ) -> Callable[[], object]:
        new, contexts = np.array([70]), np.array([100])
        tables, edges = empty(1, -(-100 // size), dtype=torch.int64), torch.tensor([0, 70], dtype=torch.int32)
        return lambda: kernels().paged_prefill(
            empty(70, kv_heads, group, dim), empty(128, 2 * kv_heads * dim), tables, empty(1, dtype=torch.int64), 0,
            edges, torch.from_numpy(tiles_of(new, contexts)), splits, size, 0.1, window,
        )  # fmt: skip

    def latent(heads: int) -> Callable[[], object]:
        tables, contexts = empty(2, 4, dtype=torch.int32), empty(2, dtype=torch.int64)
        return lambda: kernels().paged_latent_decode(
            empty(2, heads, 576), empty(64, 576), tables, contexts, 16, 0.1, 512, 4
        )

    def turned(heads: int, kv_heads: int, dim: int, has_norm: bool) -> Callable[[], object]:
        whole, at = empty(2, (heads + 2 * kv_heads) * dim), empty(2, dtype=torch.int64)
        weight = empty(heads + kv_heads, dim) if has_norm else None
        return lambda: kernels().rope_and_cache(
            whole, empty(8, 2, dim), at, empty(64, 2 * kv_heads * dim), at, kv_heads, weight, 1e-6
        )

    def mixed(num_tokens: int, block_rows: int | None) -> Callable[[], object]:
        index = torch.arange(num_tokens * 6, dtype=torch.int32).view(-1, 6) % 8
        layout = None if block_rows is None else PLAIN.lay_out(index, 8, block_rows)
        gate_up, own_up = empty(8, 2 * 1408, 2048), empty(4 * 1408, 2048)
        down, own_down = empty(8, 2048, 1408), empty(2048, 2 * 1408)

        def run() -> None:
            inner = kernels().expert_gate_up(empty(num_tokens, 2048), gate_up, own_up, index, layout)
            kernels().expert_down(inner, down, own_down, index, empty(num_tokens, 6, dtype=wide), layout)

        return run

    def chosen(num_tokens: int, num_experts: int, rule: Rule) -> Callable[[], object]:
        return lambda: kernels().route(empty(num_tokens, 2048), empty(num_experts, 2048), rule)

    def paged_fp8(kv_heads: int, group: int, dim: int, splits: int) -> Callable[[], object]:
        tables, contexts = empty(2, 4, dtype=torch.int32), empty(2, dtype=torch.int64)
        rows, scales = empty(64, 2 * kv_heads * dim, dtype=torch.uint8), empty(64, 2 * kv_heads)
        return lambda: kernels().paged_decode_fp8(
            empty(2, kv_heads, group, dim), rows, scales, tables, contexts, 64, 0.1, None, splits
        )

    def turned_fp8(heads: int, kv_heads: int, dim: int, has_norm: bool) -> Callable[[], object]:
        whole, at = empty(2, (heads + 2 * kv_heads) * dim), empty(2, dtype=torch.int64)
        rows, scales = empty(64, 2 * kv_heads * dim, dtype=torch.uint8), empty(64, 2 * kv_heads)
        weight = empty(heads + kv_heads, dim) if has_norm else None
        return lambda: kernels().rope_and_cache_fp8(
            whole, empty(8, 2, dim), at, rows, scales, at, kv_heads, weight, 1e-6
        )

    at = empty(2, dtype=torch.int64)
    found: dict[str, Callable[[], object]] = {
        "prefill_llama": pieces(8, 4, 128, None),
        "prefill_small_blocks": pieces(8, 4, 128, None, 16),
        "prefill_split": pieces(8, 4, 128, None, splits=4),
        "prefill_window": pieces(8, 4, 128, 4096),
        "prefill_head_of_64": pieces(8, 2, 64, None),
        "prefill_head_of_96": pieces(32, 1, 96, None),
        "prefill_head_of_256": pieces(4, 2, 256, None),
        "decode_fp8_llama": paged_fp8(8, 4, 128, 1),
        "decode_fp8_llama_split": paged_fp8(8, 4, 128, 8),
        "decode_fp8_head_of_96": paged_fp8(32, 1, 96, 4),
        "round_rows": lambda: kernels().round_rows(
            empty(64, 2048, dtype=torch.uint8), empty(64, 16), empty(64, 2048), at, at
        ),
        "restore_rows": lambda: kernels().restore_rows(
            empty(64, 2048), empty(64, 2048, dtype=torch.uint8), empty(64, 16), at, at
        ),
        "rope_fp8": turned_fp8(32, 8, 128, False),
        "rope_fp8_normed": turned_fp8(16, 8, 128, True),
        "latent_rope": lambda: kernels().latent_rope_and_cache(
            empty(2, 16, 576)[..., 512:],
            empty(2, 16, 192)[..., 128:],
            empty(2, 576),
            empty(8, 2, 64, dtype=wide),
            empty(2, dtype=torch.int64),
            empty(64, 576),
            empty(2, dtype=torch.int64),
            empty(512),
            1e-6,
            True,
        ),
        "absorb": lambda: kernels().absorb_and_cache(
            empty(1, 16, 192),
            empty(1, 576),
            empty(16, 256, 512)[:, :128],
            empty(8, 2, 64, dtype=wide),
            empty(1, dtype=torch.int64),
            empty(64, 576),
            empty(1, dtype=torch.int64),
            empty(512),
            1e-6,
            True,
        ),
        "latent_values": lambda: kernels().latent_values(
            empty(1, 16, 576),
            empty(64, 576),
            empty(1, 4, dtype=torch.int32),
            empty(1, dtype=torch.int64),
            16,
            0.1,
            empty(16, 128, 512).transpose(1, 2),
            64,
        ),
        "route": chosen(1, 64, Rule(6)),
        "route_many": chosen(300, 64, Rule(6)),
        "route_groups": chosen(32, 256, Rule(8, 8, 4, True, 2.5, empty(256, dtype=wide))),
        "layout": lambda: kernels().lay_out(empty(32, 6, dtype=torch.int32), 64, 16),
        "layout_many": lambda: kernels().lay_out(empty(4096, 6, dtype=torch.int32), 64, 1),
        "experts_of_one_token": mixed(1, None),
        **{f"experts_in_blocks_of_{rows}": mixed(40, rows) for rows in (16, 32, 64, 128)},
        "weigh": lambda: kernels().weigh(
            empty(12, 2048), empty(2, 6, dtype=wide), empty(12, dtype=torch.int32), empty(2, 2048)
        ),
        "decode_llama": paged(8, 4, 128, 1),
        "decode_llama_split": paged(8, 4, 128, 8),
        "decode_llama_in_blocks": paged(8, 4, 128, 1, 64),
        "decode_llama_in_blocks_split": paged(8, 4, 128, 8, 64),
        "decode_llama_in_blocks_of_many": paged(8, 4, 128, 1, 64, 96),
        "decode_in_blocks_head_of_256": paged(4, 2, 256, 4, 64),
        "decode_in_blocks_head_of_64": paged(8, 2, 64, 1, 64, 96),
        "decode_head_of_256": paged(4, 2, 256, 4),
        "decode_head_of_96": paged(32, 1, 96, 4),
        "latent_16": latent(16),
        "latent_128": latent(128),
        "rope": turned(32, 8, 128, False),
        "rope_normed": turned(16, 8, 128, True),
        "norm": lambda: kernels().add_norm(empty(2, 4096), empty(2, 4096), empty(4096), 1e-6),
        "norm_of_parts": lambda: kernels().add_norm(
            empty(2, 4096), empty(8, 2, 4096, dtype=torch.float32), empty(4096), 1e-6
        ),
        "norm_without_delta": lambda: kernels().add_norm(empty(2, 8192), None, empty(8192), 1e-6),
        "greedy": lambda: kernels().greedy(empty(2, 128256)),
        "sample": lambda: kernels().sample(empty(2, 128256), empty(5, 2, dtype=torch.float64), True, True),
        "sample_by_top_p": lambda: kernels().sample(
            empty(2, 128256), empty(5, 2, dtype=torch.float64), False, True
        ),
        "sample_of_wide": lambda: kernels().sample(
            empty(2, 151936, dtype=wide), empty(5, 2, dtype=torch.float64), True, False
        ),
        "embed": lambda: kernels().embed(
            empty(2, dtype=torch.int64), empty(8, dtype=torch.int64), empty(9, 4096)
        ),
        "silu": lambda: kernels().silu_mul(empty(2, 2 * 14336)),
        "int8_levels": lambda: kernels().int8_levels(empty(2, 14336)),
        "int8_scaled": lambda: kernels().int8_scaled(
            empty(32, 4096, dtype=torch.int32), empty(2, 1, dtype=wide), empty(4096, dtype=wide), None, half
        ),
    }
    for rows in (1, 32, 64, 256):
        found[f"linear_{rows}"] = lambda m=rows: kernels().skinny_linear(empty(m, 4096), empty(4096, 4096))
        found[f"gated_{rows}"] = lambda m=rows: kernels().skinny_gated(empty(m, 4096), empty(28672, 4096))
        found[f"parts_{rows}"] = lambda m=rows: kernels().skinny_parts(empty(m, 4096), empty(4096, 4096))
    found["parts_tiled"] = lambda: skinny_parts(empty(2, 3072), empty(1024, 3072), Tiles(split_k=4))
    return found


def told(run: Callable[[], object]) -> str | None:
    try:
        run()
    except Exception:
        return traceback.format_exc(limit=-3)
    return None


def interpreted_cases() -> dict[str, Case]:
    """Each in float32; and of each claim one in HALF_EVERY in float16, where rounding is what differs: on a GPU all are
    tried in all types. bfloat16 is left out: the interpreter multiplies its bits as integers."""
    found: dict[str, Case] = {}
    seen: Counter[object] = Counter()
    for name, run in CASES.items():
        claim = getattr(run, "func", run)
        found[f"{name}-float32"] = functools.partial(run, dtype=torch.float32)
        if seen[claim] % HALF_EVERY == 0 and run is not checks:  # all of them once more, and slow
            found[f"{name}-float16"] = functools.partial(run, dtype=torch.float16)
        seen[claim] += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--compile", action="store_true")
    if parser.parse_args().compile:
        compile_only()
        print(json.dumps({name: told(run) for name, run in compiled_cases().items()}))
        return
    device = torch.device("cpu")
    results = {name: told(functools.partial(run, device=device)) for name, run in interpreted_cases().items()}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
