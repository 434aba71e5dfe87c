"""Cells of a table: one model under one workload, all of it there at the start, beside what the machine allows.

`ms a step` is wall time divided by output tokens of a request, prefill included. The floor of a cell is what its
weights and cached tokens take at the measured copy rate, or its arithmetic at the measured GEMM rate, whichever is
longer, step by step; of routed experts what so many tokens choose on average is read. `of held` is by the GEMM rate
that the device holds, where its power ends. Greedy if not asked otherwise; nothing ends early; no prefix cache.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from runtime.batch import Batch
from runtime.bench.ceilings import Ceilings
from runtime.bench.loads import Load, workload
from runtime.bench.peers import Generate, steps_of
from runtime.engine_start import engine_parts
from runtime.loader import LoadedModel
from runtime.request import Request, SamplingParams
from runtime.scheduler import Scheduler
from runtime.step_weights import Weights, weights_of

GREEDY = SamplingParams()
MAX_MODEL_LEN = 4608  # the longest prompt of the workloads with its answer


class Step(NamedTuple):
    """What one step did. `seconds`: scheduling to finished."""

    seconds: float
    num_tokens: int
    num_sampled: int
    has_prefill: bool
    context_tokens: int
    attention_pairs: int


class Cell(NamedTuple):
    """One shape under one workload, medians over runs."""

    shape: str
    workload: str
    ms_a_step: float
    prefill_ms: float
    decode_ms_a_step: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    floor_ms_a_step: float
    share_of_floor: float
    share_of_held_floor: float  # by what products reach when they are held
    ttft_p95_s: float
    generate_ms_a_step: float | None


class Bench:
    """One model in its executor, under the configuration that an engine would start with."""

    def __init__(
        self,
        load: Callable[[], LoadedModel],
        knobs: Mapping[str, Any],
        sampling: SamplingParams = GREEDY,
    ) -> None:
        self.sampling = sampling
        began = time.perf_counter()
        self.loaded = load()
        made = time.perf_counter()
        self.name: str = self.loaded.identity["name"]
        self.executor, runner, _ = engine_parts(self.loaded, None, dict(knobs))
        self.config = runner.champion
        told = self.executor.identity()
        share = told["kv_total_tokens"] / max(1, told["kv_tokens_possible"])
        print(f"{self.name}: weights {made - began:.1f} s, engine {time.perf_counter() - made:.1f} s, tier "
              f"{told['tier']}, KV {told['kv_total_tokens']} tokens, {share:.1%} of the {told['kv_tokens_possible']} "
              "that the bytes allow",
              file=sys.stderr, flush=True)  # fmt: skip
        self.weights = weights_of(self.loaded.model)

    def run(self, load: Load) -> tuple[float, list[Step], list[float]]:
        """Seconds, the steps, and the seconds to each request's first token. Where tokens are drawn, each request has a
        seed of its own."""
        executor = self.executor
        config = self.config.patched({"max_num_seqs": load.num_at_once})
        scheduler = Scheduler(
            executor.pool, config, executor.max_model_len, attention_cost=executor.attention_cost
        )
        executor.warm.install(config, scheduler)
        requests = self.requests_of(load)
        steps: list[Step] = []
        began = time.perf_counter()
        for request in requests:
            scheduler.add(request)
        ended = began
        for batch in steps_of(executor, scheduler, config):
            started, ended = ended, time.perf_counter()
            steps.append(step_of(batch, ended - started))
        return ended - began, steps, [request.first_token_at or 0.0 for request in requests]

    def requests_of(self, load: Load) -> list[Request]:
        asked = zip(load.prompts, load.output_tokens, strict=True)
        return [
            Request.of_tokens(str(at), ids, num, 0.0, replace(self.sampling, seed=at))
            for at, (ids, num) in enumerate(asked)
        ]

    def floor_s(self, steps: Sequence[Step], ceilings: Ceilings) -> float:
        """Seconds that the steps take at least."""
        config = self.loaded.model.config.get_text_config()
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        flop_a_pair = 4 * config.num_hidden_layers * config.num_attention_heads * dim
        kv_bytes = self.executor.identity()["kv_bytes_per_token"]
        return floor_s(steps, self.weights, kv_bytes, flop_a_pair, ceilings)


def floor_s(
    steps: Sequence[Step], weights: Weights, kv_bytes: int, flop_a_pair: int, ceilings: Ceilings
) -> float:
    """Seconds that the steps take at least. `kv_bytes`: of one cached token; `flop_a_pair`: of one token that attends
    to another."""
    total = 0.0
    for step in steps:
        num_bytes = weights.read_bytes(step.num_tokens) + kv_bytes * step.context_tokens
        flop = 2 * weights.num_active * step.num_tokens + flop_a_pair * step.attention_pairs
        total += max(num_bytes / ceilings.copy_bytes_per_s, flop / ceilings.gemm_flop_per_s)
    return total


def step_of(batch: Batch, seconds: float) -> Step:
    return Step(
        seconds, batch.num_tokens, int(batch.sampled.sum()), batch.num_prefill_rows > 0, batch.context_tokens,
        batch.attention_pairs,
    )  # fmt: skip


def measure(
    bench: Bench, name: str, ceilings: Ceilings, num_runs: int, seed: int, with_generate: bool
) -> Cell:
    vocab_size = bench.loaded.identity["vocab_size"]
    bench.run(workload(name, vocab_size, np.random.default_rng(seed + 1)))  # the same shape, other tokens
    load = workload(name, vocab_size, np.random.default_rng(seed))
    runs = [bench.run(load) for _ in range(num_runs)]
    seconds, steps, ttft_s = sorted(runs, key=lambda run: run[0])[len(runs) // 2]
    num_steps = max(load.output_tokens)
    prefill_s = sum(step.seconds for step in steps if step.has_prefill)
    decode_s = [step.seconds for step in steps if not step.has_prefill]
    least_s = bench.floor_s(steps, ceilings)
    held_s = bench.floor_s(steps, ceilings._replace(gemm_flop_per_s=ceilings.gemm_held_flop_per_s))
    generate_s = None
    if with_generate:
        model: Any = bench.loaded.model
        ours = model.config._attn_implementation  # of tier B, which computes with these modules
        model.set_attn_implementation("sdpa")
        generate_s = Generate(model).serve(load).seconds
        model.set_attn_implementation(ours)
    return Cell(
        bench.name, name, 1e3 * seconds / num_steps, 1e3 * prefill_s, 1e3 * median(decode_s or [0.0]),
        load.num_tokens / seconds, (load.num_tokens + sum(map(len, load.prompts))) / seconds,
        1e3 * least_s / num_steps, least_s / seconds, held_s / seconds, float(np.percentile(ttft_s, 95)),
        None if generate_s is None else 1e3 * generate_s / num_steps,
    )  # fmt: skip


def print_cells(cells: Sequence[Cell]) -> None:
    print(
        f"{'shape':<18}{'workload':<10}{'ms a step':>10}{'prefill ms':>12}{'decode ms':>11}{'out tok/s':>11}"
        f"{'all tok/s':>11}{'floor ms':>10}{'of floor':>10}{'of held':>9}{'p95 TTFT s':>12}{'generate':>10}"
    )
    for cell in cells:
        generate = "" if cell.generate_ms_a_step is None else f"{cell.generate_ms_a_step:.2f}"
        print(
            f"{cell.shape:<18}{cell.workload:<10}{cell.ms_a_step:>10.2f}{cell.prefill_ms:>12.1f}"
            f"{cell.decode_ms_a_step:>11.2f}{cell.output_tokens_per_s:>11.0f}{cell.total_tokens_per_s:>11.0f}"
            f"{cell.floor_ms_a_step:>10.2f}{cell.share_of_floor:>10.0%}{cell.share_of_held_floor:>9.0%}"
            f"{cell.ttft_p95_s:>12.3f}{generate:>10}"
        )
