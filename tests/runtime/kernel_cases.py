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
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from runtime.kernels import PLAIN, TRITON, Kernels, Shape, self_check
from runtime.kernels.table import TOLERANCE, difference

NO_BLOCK = 2**30
Case = Callable[[torch.device, torch.dtype], None]
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
add("decode_int32_contexts", decode, contexts=[3, 0, 77], contexts_dtype=torch.int32)
add(
    "decode_ten_thousand_in_a_window", decode, contexts=[10_000, 3], kv_heads=1, size=16, window=100, splits=8
)
for heads in (1, 20, 128):
    add(f"latent_heads_{heads}", latent_decode, contexts=[5, 70], heads=heads, splits=2)
add("latent_of_deepseek", latent_decode, contexts=[50, 129, 0], dim=576, value_dim=512, size=16, splits=3)
add("latent_several_thousand", latent_decode, contexts=[3001, 17], size=64, splits=7)


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


def skinny(
    device: torch.device, dtype: torch.dtype, m: int, n: int = 100, k: int = 512, **tiles: int
) -> None:
    from runtime.kernels.skinny_linear import Tiles, skinny_parts

    torch.manual_seed(0)
    x = torch.randn(m, k + 16).to(device, dtype)[:, :k]  # rows lie apart
    weight = (torch.randn(n, k) * k**-0.5).to(device, dtype)
    parts = skinny_parts(x, weight, Tiles(**tiles) if tiles else None)
    assert parts.dtype == torch.float32
    close(parts.sum(0).to(dtype), PLAIN.skinny_parts(x, weight)[0].to(dtype))
    if not tiles:
        close(kernels().skinny_linear(x, weight), PLAIN.skinny_linear(x, weight))
        both = torch.cat((weight, weight.flip(0)))
        close(kernels().skinny_gated(x, both), PLAIN.skinny_gated(x, both))


for m in (1, 3, 16, 17, 33, 64):
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


def embedded(device: torch.device, dtype: torch.dtype, hidden: int) -> None:
    torch.manual_seed(0)
    table = torch.randn(20, hidden + 8).to(device, dtype)[:, :hidden]
    token_ids, drawn = (torch.tensor(one, device=device) for one in ([7, -1, 0, -3, 19], [4, 2**40, 11]))
    assert torch.equal(kernels().embed(token_ids, drawn, table), table[[7, 4, 0, 11, 19]])


for hidden in (8, 1000, 2048):
    add(f"embed_{hidden}", embedded, hidden=hidden)


def checks(device: torch.device, dtype: torch.dtype) -> None:
    shape = Shape(4, 2, 32, 64, 96, 4, window=9, has_qk_norm=True, latent_dim=48, latent_value_dim=32)
    assert self_check(device, dtype, shape) == []


CASES["self_check_passes"] = checks


# -- where there is no GPU ----------------------------------------------------------------------------------------


def compile_only() -> None:
    """From here on kernels are compiled for an H100 and not run, and results are not compared."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from runtime.kernels import early_start

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
    early_start.has_early_start = lambda device: True


def compiled_cases() -> dict[str, Callable[[], object]]:
    """Shapes of real models in bfloat16."""
    from runtime.kernels.skinny_linear import Tiles, skinny_parts

    half, cpu = torch.bfloat16, torch.device("cpu")

    def empty(*size: int, dtype: torch.dtype = half) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=cpu)

    def paged(kv_heads: int, group: int, dim: int, splits: int) -> Callable[[], object]:
        tables, contexts = empty(2, 4, dtype=torch.int32), empty(2, dtype=torch.int64)
        return lambda: kernels().paged_decode(
            empty(2, kv_heads, group, dim),
            empty(64, 2 * kv_heads * dim),
            tables,
            contexts,
            16,
            0.1,
            None,
            splits,
        )

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

    found: dict[str, Callable[[], object]] = {
        "decode_llama": paged(8, 4, 128, 1),
        "decode_llama_split": paged(8, 4, 128, 8),
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
        "embed": lambda: kernels().embed(
            empty(2, dtype=torch.int64), empty(8, dtype=torch.int64), empty(9, 4096)
        ),
        "silu": lambda: kernels().silu_mul(empty(2, 2 * 14336)),
    }
    for rows in (1, 32, 64):
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--compile", action="store_true")
    if parser.parse_args().compile:
        compile_only()
        print(json.dumps({name: told(run) for name, run in compiled_cases().items()}))
        return
    device = torch.device("cpu")  # bfloat16 is left out: the interpreter multiplies its bits as integers
    results = {
        f"{name}-{str(dtype)[6:]}": told(functools.partial(run, device, dtype))
        for name, run in CASES.items()
        for dtype in (torch.float32, torch.float16)
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
