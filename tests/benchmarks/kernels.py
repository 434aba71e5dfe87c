"""How right and how fast the kernels of the decode path are on the GPU at hand: python -m tests.benchmarks.kernels.

Needs torch, triton and numpy. First every claim of tests/runtime/kernel_cases.py, in several processes; then times in
a CUDA graph, over so much memory that the L2 cache does not help. "of copy" is the share of the bandwidth that a copy
reaches here. Exit 1 where a claim does not hold.
"""

import argparse
import functools
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from runtime.kernels import PLAIN, TRITON, WHY_NO_TRITON, Kernels, Shape, paged_decode, self_check
from runtime.kernels.linear_table import LinearTable, Use, graphed_us
from runtime.kernels.splits import are_uneven, choose_splits, uneven_splits
from tests.runtime.kernel_cases import CASES, told

HALF = torch.bfloat16
STREAMED_BYTES = 300 * 2**20
BATCHES, CONTEXTS = (1, 8, 32, 256), (256, 2048)
UNEVEN = ((32, 4_096), (32, 16_384), (96, 4_096), (96, 32_768), (256, 16_384))  # rows, and the longest context
SPLITS = (1, 2, 4, 8, 16, 32, 64)
USES: dict[str, Use] = {"qkv": "whole", "out": "parts", "gate_up": "gated", "down": "parts", "head": "whole"}
CHECKED = (torch.bfloat16, torch.float16, torch.float32)
BLOCK_TOKENS, SMALL_BLOCK_TOKENS = 64, 16  # tiles of keys are fetched whole, or looked up token by token


class Model(NamedTuple):
    name: str
    shape: Shape
    vocab: int


QWEN = Model("qwen3-0.6b", Shape(16, 8, 128, 1024, 3072, has_qk_norm=True), 151_936)
LLAMA = Model("llama-8b", Shape(32, 8, 128, 4096, 14_336), 128_256)
MODELS = (QWEN, LLAMA)
SDPA_TOO = [model.name for model in MODELS]  # where all rows are of one context
LATENT_HEADS, LATENT_DIM, LATENT_VALUE_DIM = 16, 576, 512  # deepseek-v2-lite


def linear_shapes(model: Model) -> dict[str, tuple[int, int]]:
    """Name -> out_features, in_features."""
    heads, kv_heads, dim, hidden, intermediate = model.shape[:5]
    return {
        "qkv": ((heads + 2 * kv_heads) * dim, hidden),
        "out": (hidden, heads * dim),
        "gate_up": (2 * intermediate, hidden),
        "down": (hidden, intermediate),
        "head": (model.vocab, hidden),
    }


def kernels() -> Kernels:
    assert TRITON is not None
    return TRITON


# -- attention ----------------------------------------------------------------------------------------------------


class Attention:
    """Calls of decode attention on rows of one context, each call over memory of its own. `is_ragged`: on rows of an
    eighth of it to all of it, the longest first, as a step has them. `longest`: context of the first row."""

    def __init__(
        self, num_rows: int, context: int, row: int, query: tuple[int, ...], device: torch.device,
        is_ragged: bool = False, longest: int = 0,
    ) -> None:  # fmt: skip
        num_more = max(0, longest - context)
        each = (num_rows * context + num_more) * row * HALF.itemsize
        self.copies = min(64, math.ceil(STREAMED_BYTES / each))
        self.rows = torch.randn(self.copies * (num_rows * context + num_more), row, device=device, dtype=HALF)
        blocks = torch.randperm(len(self.rows) // BLOCK_TOKENS, device=device).int().view(self.copies, -1)
        more, blocks = blocks.split([num_more // BLOCK_TOKENS, num_rows * context // BLOCK_TOKENS], dim=1)
        self.tables = blocks.reshape(self.copies, num_rows, -1)
        self.contexts = torch.full((num_rows,), context, device=device)
        if num_more:
            self.tables = torch.nn.functional.pad(self.tables, (0, more.shape[1]))
            self.tables[:, 0, context // BLOCK_TOKENS :] = more
            self.contexts[0] = longest
        if is_ragged:
            shortest = torch.Generator(device).manual_seed(0)
            found = torch.randint(context // 8, context + 1, (num_rows,), generator=shortest, device=device)
            self.contexts = found.sort(descending=True).values
        self.bytes = int(self.contexts.sum()) * row * HALF.itemsize
        self.query = torch.randn(num_rows, *query, device=device, dtype=HALF)

    def paged(self, splits: int, size: int = BLOCK_TOKENS) -> list[Callable[[], object]]:
        """The same memory in blocks of `size` tokens."""
        parts = torch.arange(BLOCK_TOKENS // size, device=self.tables.device, dtype=torch.int32)
        tables = (self.tables[..., None] * len(parts) + parts).flatten(2)
        return [
            functools.partial(
                kernels().paged_decode, self.query, self.rows, table, self.contexts, size, 0.1, None, splits
            )
            for table in tables
        ]

    def latent(self, splits: int) -> list[Callable[[], object]]:
        return [
            functools.partial(
                kernels().paged_latent_decode,
                self.query, self.rows, table, self.contexts, BLOCK_TOKENS, 0.1, LATENT_VALUE_DIM, splits,
            )
            for table in self.tables
        ]  # fmt: skip

    def sdpa(self) -> list[Callable[[], object]]:
        """Torch's attention over consecutive rows: what it would take if nothing had to be gathered."""
        num_rows, kv_heads, _, dim = self.query.shape
        query = self.query.flatten(1, 2).unsqueeze(2)
        found = self.rows.view(self.copies, num_rows, -1, 2, kv_heads, dim)
        calls = []
        for copy in found:
            key, value = copy.permute(2, 0, 3, 1, 4).unbind()
            attend = functools.partial(scaled_dot_product_attention, scale=0.1, enable_gqa=True)
            calls.append(functools.partial(attend, query, key, value))
        return calls


def attentions(device: torch.device) -> Iterator[tuple[str, int, int, int, Attention]]:
    """Name, rows, context, key heads."""
    cases = list(itertools.product(BATCHES, CONTEXTS))
    for model in MODELS:
        heads, kv_heads, dim = model.shape[:3]
        given = 2 * kv_heads * dim, (kv_heads, heads // kv_heads, dim), device
        for num_rows, context in cases:
            yield model.name, num_rows, context, kv_heads, Attention(num_rows, context, *given)
        for num_rows in BATCHES[1:]:
            ragged = Attention(num_rows, CONTEXTS[-1], *given, is_ragged=True)
            yield f"{model.name} ragged", num_rows, int(ragged.contexts.sum()) // num_rows, kv_heads, ragged
        for num_rows, longest in UNEVEN:
            uneven = Attention(num_rows, CONTEXTS[0], *given, longest=longest)
            yield f"{model.name} uneven", num_rows, int(uneven.contexts.sum()) // num_rows, kv_heads, uneven
    for num_rows, context in cases:
        query = (LATENT_HEADS, LATENT_DIM)
        yield "latent", num_rows, context, 1, Attention(num_rows, context, LATENT_DIM, query, device)


def splits_tried(num_rows: int, kv_heads: int, context: int, num_sms: int) -> list[int]:
    return [
        splits
        for splits in SPLITS
        if splits == 1 or (splits * num_rows * kv_heads <= 16 * num_sms and splits * 16 <= context)
    ]


def time_attention(device: torch.device, copy_bytes_per_s: float, late: Callable[[], bool]) -> None:
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    print(
        f"\n{'decode attention':18}{'rows':>5}{'context':>8}  {'chosen':>14}  {'best':>14}  GB/s  of copy"
        f"  looked up    sdpa"
    )
    for name, num_rows, context, kv_heads, case in attentions(device):
        if late():
            return
        calls = case.latent if name == "latent" else case.paged
        uneven = name != "latent" and are_uneven(case.contexts.cpu().numpy(), num_rows, kv_heads, num_sms)
        chosen = (uneven_splits if uneven else choose_splits)(num_rows, kv_heads, num_sms)
        tried = {*splits_tried(num_rows, kv_heads, context, num_sms), chosen}
        took_us = {splits: graphed_us(calls(splits)) for splits in sorted(tried)}
        best = min(took_us, key=took_us.__getitem__)
        rate = case.bytes / took_us[best] / 1e-6
        others = ""
        if name != "latent":
            others = f"{graphed_us(case.paged(chosen, SMALL_BLOCK_TOKENS)):11.1f}"
        if name in SDPA_TOO:
            others += f"{graphed_us(case.sdpa()):8.1f}"
        print(
            f"{name:18}{num_rows:5}{context:8}  {took_us[chosen]:7.1f} in {chosen:<3}  {took_us[best]:7.1f} in"
            f" {best:<3} {rate / 1e9:6.0f}   {rate / copy_bytes_per_s:4.0%}{others}",
            flush=True,
        )


def sweep_tiles(device: torch.device, late: Callable[[], bool]) -> None:
    """Stages and sizes of tiles other than those that are set, on llama-8b; left out where they do not fit an SM."""
    import triton

    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    kept = paged_decode.STAGES, paged_decode.TILE_VALUES
    heads, kv_heads, dim = LLAMA.shape[:3]
    cases = {
        (num_rows, context): Attention(
            num_rows, context, 2 * kv_heads * dim, (kv_heads, heads // kv_heads, dim), device
        )
        for num_rows, context in ((1, 2048), (32, 2048), (256, 256))
    }
    print("\nllama-8b, tiles     " + "".join(f"{rows:>6} x {context:<6}" for rows, context in cases) + " µs")
    for stages, values in TILINGS:
        if late():
            break
        paged_decode.STAGES, paged_decode.TILE_VALUES = stages, values
        try:
            took_us = [
                graphed_us(case.paged(choose_splits(rows, kv_heads, num_sms)))
                for (rows, _), case in cases.items()
            ]
        except triton.OutOfResources:
            continue
        print(f"stages {stages} values {values:<6}" + "".join(f"{us:15.1f}" for us in took_us), flush=True)
    paged_decode.STAGES, paged_decode.TILE_VALUES = kept


TILINGS = [(stages, values) for stages in (3, 5, 7) for values in (4096, 8192, 16_384)]


# -- the small ones, and linear layers ----------------------------------------------------------------------------


def time_small(device: torch.device, copy_bytes_per_s: float, late: Callable[[], bool]) -> None:
    print(f"\n{'small kernels':32}{'rows':>5}{'µs':>8}  GB/s  of copy  plain twin µs")
    for model in MODELS:
        for rows in BATCHES:
            if late():
                return
            for name, num_bytes, call in small_calls(model, rows, device):
                ours, plain = (
                    graphed_us([functools.partial(call, of)] * 20) for of in (kernels(), PLAIN)
                )  # what these read was just written, so it lies in the L2 cache in a step too
                rate = num_bytes / ours / 1e-6
                print(
                    f"{model.name:12}{name:20}{rows:5}{ours:8.1f} {rate / 1e9:6.0f}  {rate / copy_bytes_per_s:5.0%}"
                    f"  {plain:9.1f}",
                    flush=True,
                )


def small_calls(
    model: Model, rows: int, device: torch.device
) -> Iterator[tuple[str, int, Callable[[Kernels], object]]]:
    heads, kv_heads, dim, hidden, intermediate = model.shape[:5]

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=HALF)

    x, delta, weight = normal(rows, hidden), normal(rows, hidden) * 1e-3, normal(hidden)
    yield "add_norm", 4 * x.nbytes, lambda of: of.add_norm(x, delta, weight, 1e-6)
    gate_up = normal(rows, 2 * intermediate)
    yield "silu_mul", gate_up.nbytes * 3 // 2, lambda of: of.silu_mul(gate_up)
    qkv, table = normal(rows, (heads + 2 * kv_heads) * dim), normal(4096, 2, dim)
    cache, slots = normal(4 * rows, 2 * kv_heads * dim), torch.arange(rows, device=device) * 4
    norm = normal(heads + kv_heads, dim) if model.shape.has_qk_norm else None
    yield (
        "rope_and_cache",
        2 * qkv.nbytes + rows * 2 * kv_heads * dim * HALF.itemsize,
        lambda of: of.rope_and_cache(qkv, table, slots, cache, slots, kv_heads, norm, 1e-6),
    )
    logits = 4 * normal(rows, model.vocab)  # about as peaked as those of a text
    yield "greedy", logits.nbytes, lambda of: of.greedy(logits)
    draws = torch.rand(rows, device=device, dtype=torch.float64)
    for top_k, top_p in ((0, 1.0), (50, 1.0), (0, 0.9), (50, 0.9)):
        params = torch.stack([torch.full_like(draws, one) for one in (1.0, 0.0, top_p, top_k)] + [draws])
        sample = functools.partial(_sampled, logits, params, top_k > 0, top_p < 1.0)
        yield f"sample {top_k} {top_p}", logits.nbytes, sample  # top-k and top-p


def _sampled(logits: Tensor, params: Tensor, has_top_k: bool, has_top_p: bool, of: Kernels) -> object:
    return of.sample(logits, params, has_top_k, has_top_p)


def time_linears(device: torch.device, copy_bytes_per_s: float, late: Callable[[], bool]) -> None:
    print(f"\n{'layers with a norm':22}{'N x K':>16}{'M':>4}{'cuBLAS µs':>11}{'ours µs':>9}   GB/s  of copy")
    for model in MODELS:
        for name, (out_features, in_features) in linear_shapes(model).items():
            if late():
                return
            num_bytes = out_features * in_features * HALF.itemsize
            copies = math.ceil(STREAMED_BYTES / num_bytes)
            layers = [
                nn.Linear(in_features, out_features, False, device, HALF).requires_grad_(False)
                for _ in range(copies)
            ]
            table = LinearTable(kernels())
            table.measure({USES[name]: layers})
            for shape, choice in table.choices.items():
                rate = num_bytes / min(choice.ours_us, choice.cublas_us) / 1e-6
                print(
                    f"{model.name:12}{name:10}{out_features:>9} x {in_features:<5}{shape.num_rows:3}"
                    f"{choice.cublas_us:11.1f}{choice.ours_us:9.1f}{rate / 1e9:7.0f}{rate / copy_bytes_per_s:8.0%}",
                    flush=True,
                )


def copy_rate(device: torch.device) -> float:
    """Bytes read and written a second by a copy of 1 GiB."""
    source = torch.ones(2**29, dtype=HALF, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / graphed_us([lambda: target.copy_(source)]) / 1e-6


# -- checks, in processes of their own ----------------------------------------------------------------------------


def check_part(part: int, num_parts: int, device: torch.device) -> dict[str, str | None]:
    """Runs its share of the claims, and compiles its share of what is timed later."""
    runs = [
        (f"{name}-{str(dtype)[6:]}", functools.partial(run, device, dtype))
        for name, run in CASES.items()
        for dtype in CHECKED
    ]
    results = {name: told(run) for name, run in runs[part::num_parts]}
    return results


def check_all(num_parts: int) -> dict[str, str | None]:
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.kernels", "--part", str(part), "--parts", str(num_parts)],
            stdout=subprocess.PIPE, text=True,
        )
        for part in range(num_parts)
    ]  # fmt: skip
    results: dict[str, str | None] = {}
    for part, child in enumerate(children):
        out, _ = child.communicate()
        results |= (
            json.loads(out.splitlines()[-1]) if child.returncode == 0 else {f"process {part}": "it ended"}
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--limit-s", type=float, default=170.0, help="nothing is started after so many seconds"
    )
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    parser.add_argument(
        "--parts", type=int, default=min(10, os.cpu_count() or 1), help="processes that check"
    )
    parser.add_argument("--no-checks", action="store_true")
    asked = parser.parse_args()
    if WHY_NO_TRITON is not None or not torch.cuda.is_available():
        sys.exit(
            f"A GPU and Triton are needed, but: {WHY_NO_TRITON or 'torch.cuda.is_available() is false'}."
        )
    device = torch.device("cuda")
    if asked.part is not None:
        print(json.dumps(check_part(asked.part, asked.parts, device)))
        return
    began = time.perf_counter()

    def late() -> bool:
        if time.perf_counter() - began < asked.limit_s:
            return False
        print("(the rest is left out: time is up)")
        return True

    import triton

    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, triton {triton.__version__}")
    failed = {}
    if not asked.no_checks:
        results = check_all(asked.parts)
        failed = {name: error for name, error in results.items() if error is not None}
        print(
            f"{len(results) - len(failed)} of {len(results)} claims hold ({time.perf_counter() - began:.0f} s)"
        )
        for name, error in list(failed.items())[:12]:
            print(f"-- {name}\n{error}")
        print(f"not shown: {list(failed)[12:]}" if len(failed) > 12 else "", flush=True)
    for model in MODELS:
        shape = model.shape._replace(latent_dim=LATENT_DIM, latent_value_dim=LATENT_VALUE_DIM)
        print(f"self-check of {model.name}: differs in {self_check(device, HALF, shape)}")
    with torch.inference_mode():
        copy_bytes_per_s = copy_rate(device)
        print(f"copy: {copy_bytes_per_s / 1e9:.0f} GB/s")
        time_small(device, copy_bytes_per_s, late)
        time_attention(device, copy_bytes_per_s, late)
        time_linears(device, copy_bytes_per_s, late)
        sweep_tiles(device, late)
    print(f"\n{time.perf_counter() - began:.0f} s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
