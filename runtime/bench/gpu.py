"""Our engine against the limits of an accelerator: python -m runtime.bench gpu.

    ceilings: copy bandwidth, reading weights, GEMM ──▶ the floor of each cell
    shape x workload: wall time, prefill and decode apart, tokens a second, share of the floor

`ms a step` is wall time divided by output tokens of a request, prefill included. The floor of a cell is what its
weights and cached tokens take at the measured copy rate, or its arithmetic at the measured GEMM rate, whichever is
longer, step by step. Random weights and token ids; greedy; nothing ends early; no prefix cache.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import linear
from transformers.utils import logging as transformers_logging

from runtime.bench.loads import WORKLOADS, Load, workload
from runtime.bench.peers import Generate, steps_of
from runtime.bench.shapes import SHAPES, random_model
from runtime.executor import Executor, cpu_model, num_cores
from runtime.knobs import EngineConfig, default_config
from runtime.loader import LoadedModel, resolve_device, resolve_dtype
from runtime.request import Request
from runtime.scheduler import Batch, Scheduler

COPY_BYTES = 2**30
GEMM_SIZE = 8192
TIMED = 10
MAX_MODEL_LEN = 4608  # the longest prompt of the workloads with its answer


class Ceilings(NamedTuple):
    """Bytes and floating-point operations a second. `copy`: of bytes read and of bytes written, together."""

    copy_bytes_per_s: float
    read_bytes_per_s: float
    gemm_flop_per_s: float


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
    ttft_p95_s: float
    generate_ms_a_step: float | None


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    scale = 1 if device.type == "cuda" else 64
    source = torch.empty(COPY_BYTES // scale, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = best_s(device, lambda: target.copy_(source))
    size = GEMM_SIZE if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    gemm_s = best_s(device, lambda: a @ b)
    weights = [torch.randn(size, size, device=device, dtype=dtype) for _ in range(4)]
    x = torch.randn(1, size, device=device, dtype=dtype)
    read_s = best_s(device, lambda: [linear(x, weight) for weight in weights])
    read_bytes = sum(weight.nbytes for weight in weights)
    return Ceilings(2 * source.nbytes / copy_s, read_bytes / read_s, 2 * size**3 / gemm_s)


def best_s(device: torch.device, work: Callable[[], Any]) -> float:
    """The fastest of TIMED calls after as many that are not timed."""
    found = []
    for turn in range(2 * TIMED):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        if turn >= TIMED:
            found.append(time.perf_counter() - started)
    return min(found)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Bench:
    """One model in its executor."""

    def __init__(self, shape: str, device: torch.device, dtype: torch.dtype, config: EngineConfig) -> None:
        began = time.perf_counter()
        self.loaded: LoadedModel = random_model(shape, device, dtype, MAX_MODEL_LEN)
        made = time.perf_counter()
        self.shape, self.config = shape, config
        self.executor = Executor(self.loaded, None, config)
        told = self.executor.identity()
        share = told["kv_total_tokens"] / max(1, told["kv_tokens_possible"])
        print(f"{shape}: weights {made - began:.1f} s, engine {time.perf_counter() - made:.1f} s, tier "
              f"{told['tier']}, KV {told['kv_total_tokens']} tokens, {share:.1%} of the "
              f"{told['kv_tokens_possible']} that the bytes allow",
              file=sys.stderr, flush=True)  # fmt: skip
        self.weight_bytes, self.active_weights = weights_of(self.loaded)

    def run(self, load: Load) -> tuple[float, list[Step], list[float]]:
        """Seconds, the steps, and the seconds to each request's first token."""
        executor = self.executor
        config = self.config.patched({"max_num_seqs": load.num_at_once})
        scheduler = Scheduler(executor.pool, config, executor.max_model_len)
        asked = zip(load.prompts, load.output_tokens, strict=True)
        requests = [Request.of_tokens(str(at), ids, num, 0.0) for at, (ids, num) in enumerate(asked)]
        steps: list[Step] = []
        began = time.perf_counter()
        for request in requests:
            scheduler.add(request)
        ended = began
        for batch in steps_of(executor, scheduler, config):
            started, ended = ended, time.perf_counter()
            steps.append(step_of(batch, ended - started))
        return ended - began, steps, [request.first_token_at or 0.0 for request in requests]

    def floor_s(self, steps: Sequence[Step], ceilings: Ceilings) -> float:
        """Seconds that the steps take at least."""
        config = self.loaded.model.config.get_text_config()
        kv_bytes = self.executor.identity()["kv_bytes_per_token"]
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        flop_a_pair = 4 * config.num_hidden_layers * config.num_attention_heads * dim
        total = 0.0
        for step in steps:
            num_bytes = self.weight_bytes + kv_bytes * step.context_tokens
            flop = 2 * self.active_weights * step.num_tokens + flop_a_pair * step.attention_pairs
            total += max(num_bytes / ceilings.copy_bytes_per_s, flop / ceilings.gemm_flop_per_s)
        return total


def step_of(batch: Batch, seconds: float) -> Step:
    return Step(
        seconds, batch.num_tokens, int(batch.sampled.sum()), batch.num_prefill_rows > 0, batch.context_tokens,
        batch.attention_pairs,
    )  # fmt: skip


def weights_of(loaded: LoadedModel) -> tuple[int, int]:
    """Bytes that a step reads at most, and weights that multiply one token: of routed experts those that are chosen."""
    config = loaded.model.config.get_text_config()
    embedding = loaded.model.get_input_embeddings().weight
    num_bytes = num_active = 0
    for name, weight in loaded.model.named_parameters():
        if weight is embedding and not config.tie_word_embeddings:
            continue
        num_bytes += weight.nbytes
        is_routed = ".experts." in name
        share = config.num_experts_per_tok / config.n_routed_experts if is_routed else 1.0
        num_active += int(share * weight.numel())
    return num_bytes, num_active


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
    floor_s = bench.floor_s(steps, ceilings)
    generate_s = None
    if with_generate:
        model = bench.loaded.model
        ours = model.config._attn_implementation  # of tier B, which computes with these modules
        model.set_attn_implementation("sdpa")
        generate_s = Generate(model).serve(load).seconds
        model.set_attn_implementation(ours)
    return Cell(
        bench.shape, name, 1e3 * seconds / num_steps, 1e3 * prefill_s, 1e3 * median(decode_s or [0.0]),
        load.num_tokens / seconds, (load.num_tokens + sum(map(len, load.prompts))) / seconds,
        1e3 * floor_s / num_steps, floor_s / seconds, float(np.percentile(ttft_s, 95)),
        None if generate_s is None else 1e3 * generate_s / num_steps,
    )  # fmt: skip


def print_cells(cells: Sequence[Cell]) -> None:
    print(
        f"{'shape':<18}{'workload':<10}{'ms a step':>10}{'prefill ms':>12}{'decode ms':>11}{'out tok/s':>11}"
        f"{'all tok/s':>11}{'floor ms':>10}{'of floor':>10}{'p95 TTFT s':>12}{'generate':>10}"
    )
    for cell in cells:
        generate = "" if cell.generate_ms_a_step is None else f"{cell.generate_ms_a_step:.2f}"
        print(
            f"{cell.shape:<18}{cell.workload:<10}{cell.ms_a_step:>10.2f}{cell.prefill_ms:>12.1f}"
            f"{cell.decode_ms_a_step:>11.2f}{cell.output_tokens_per_s:>11.0f}{cell.total_tokens_per_s:>11.0f}"
            f"{cell.floor_ms_a_step:>10.2f}{cell.share_of_floor:>10.0%}{cell.ttft_p95_s:>12.3f}{generate:>10}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m runtime.bench gpu", description=str(__doc__).splitlines()[0]
    )
    add = parser.add_argument
    add("--shape", nargs="+", choices=sorted(SHAPES), default=["qwen3-0.6b", "llama-8b", "deepseek-v2-lite"])
    add("--workload", nargs="+", choices=sorted(WORKLOADS), default=["b1", "b32", "b256", "mix300"])
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", default="auto", help="auto, float32 or bfloat16")
    add("--runs", type=int, default=3, help="timed runs of each cell, after one that is not timed")
    add(
        "--generate",
        nargs="+",
        choices=sorted(WORKLOADS),
        default=[],
        help="workloads that generate does too",
    )
    add("--knob", nargs="+", default=[], metavar="NAME=VALUE", help="knobs that are not at their default")
    add("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    transformers_logging.set_verbosity_error()
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    config = default_config(device.type, num_cores()).patched(
        {
            name: json.loads(value) if value[0].isdigit() else value
            for name, value in (knob.split("=", 1) for knob in options.knob)
        }
    )
    ceilings = measure_ceilings(device, dtype)
    about = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "dtype": str(dtype).removeprefix("torch."), "torch": torch.__version__, "runs": options.runs,
        "copy_tb_per_s": round(ceilings.copy_bytes_per_s / 1e12, 3),
        "read_tb_per_s": round(ceilings.read_bytes_per_s / 1e12, 3),
        "gemm_tflop_per_s": round(ceilings.gemm_flop_per_s / 1e12, 1), "config": config.values(),
    }  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in about.items() if key != "config"))
    cells: list[Cell] = []
    for shape in options.shape:
        bench = Bench(shape, device, dtype, config)
        for name in options.workload:
            cells.append(measure(bench, name, ceilings, options.runs, options.seed, name in options.generate))
            print_cells(cells[-1:])
        del bench
        gc.collect()  # an executor holds itself in circles, and its pool is most of the memory
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print()
    print_cells(cells)
    print(json.dumps({**about, "cells": [cell._asdict() for cell in cells]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
