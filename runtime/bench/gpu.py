"""Our engine against the limits of an accelerator: python -m runtime.bench gpu.

    ceilings: copy bandwidth, reading weights, GEMM ──▶ the floor of each cell
    shape x workload: wall time, prefill and decode apart, tokens a second, share of the floor
    traffic: latencies of arrivals by the clock, through the serving engine; where the time between two tokens goes, and
        how far the model of a step's time is off
    start: seconds from the start of a process to its first token

Random weights and token ids; greedy, unless `--sampling` says otherwise; nothing ends early. Each part takes minutes;
`--shape` and `--workload` choose cells. The last line is one JSON document.
"""

import argparse
import gc
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from runtime.bench.ceilings import Ceilings, measure_ceilings
from runtime.bench.cells import MAX_MODEL_LEN, Bench, measure, print_cells
from runtime.bench.experts import print_touched
from runtime.bench.loads import WORKLOADS
from runtime.bench.serving import Serving
from runtime.bench.shapes import SHAPES, save_random, source_of
from runtime.bench.start import START_BAR_S, print_starts, read_once, start_once
from runtime.bench.step_log import (
    fitted_on,
    itl_parts,
    longest_of,
    print_itl,
    print_longest,
    print_step_model,
)
from runtime.bench.traffic import ROWS, TRAFFIC_MODEL_LEN, Row, Scale, print_rows, traffic
from runtime.bench.waterfall import print_waterfalls, waterfall
from runtime.bench.words import patches_of
from runtime.host import cpu_model
from runtime.knobs import KnobValue
from runtime.loader import resolve_device, resolve_dtype
from runtime.request import SamplingParams
from runtime.step_weights import weights_of

BATCHES = ("b1", "b32", "b256", "mix300")
CELLS: dict[str, dict[str, Sequence[str]]] = {  # by part: workloads of shapes
    "dense": {"qwen3-0.6b": (*BATCHES, "nano256"), "llama-8b": BATCHES},
    "deepseek": {"deepseek-v2-lite": BATCHES},
}
SAMPLED = {"temperature": 2.0, "min_p": 1.0, "top_p": 1.0, "top_k": 1e6}  # and what is the most of each
PARTS = (*CELLS, "traffic", "start")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of()
    options = parser.parse_args(arguments)
    try:
        (knobs,), variants = patches_of([",".join(options.knob)]), patches_of(options.variant) or [{}]
        options.sampling_found = sampling_of(options.sampling)
    except ValueError as error:
        parser.error(str(error))
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    options.device_found, options.dtype_found = device, dtype
    if options.save_weights is not None:
        shape = (options.shape or ["llama-8b"])[0]
        save_random(shape, options.save_weights, device, dtype)
        print(json.dumps({"shape": shape, "folder": str(options.save_weights), "dtype": name_of(dtype)}))
        return 0
    about: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "dtype": name_of(dtype), "torch": torch.__version__, "knobs": knobs,
    }  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    if options.part == "traffic":
        about |= traffic_part(options, knobs, variants)
    elif options.part == "start":
        about |= start_part(options, knobs)
    else:
        about |= cells_part(options, knobs)
    print(json.dumps(about))
    return 0


def parser_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m runtime.bench gpu", description=str(__doc__).splitlines()[0]
    )
    add = parser.add_argument
    add("--part", choices=PARTS, help="what is measured; without one, the cells of --shape and --workload")
    add(
        "--shape",
        nargs="+",
        choices=sorted(SHAPES),
        help="of known models (traffic and start take the first)",
    )
    add("--workload", nargs="+", choices=sorted(WORKLOADS), help="what the cells are served")
    add("--model", type=Path, help="model folder instead of a shape's random weights")
    add(
        "--save-weights",
        type=Path,
        help="write the random weights of the first shape into this folder and end",
    )
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", default="auto", help="auto, float32 or bfloat16")
    add("--runs", type=int, default=3, help="timed runs of each cell, after one that is not timed; of starts")
    add(
        "--generate",
        nargs="+",
        choices=sorted(WORKLOADS),
        default=[],
        help="workloads that generate does too",
    )
    add("--knob", nargs="+", default=[], metavar="NAME=VALUE", help="knobs that are not at their default")
    add("--sampling", nargs="+", default=[], metavar="NAME=VALUE",
        help=f"how tokens of cells are drawn ({', '.join(SAMPLED)}); greedy if not said, as generate is")  # fmt: skip
    add(
        "--waterfall",
        action="store_true",
        help="say where the time of a cell's decode steps goes on the device",
    )
    add("--profile", action="store_true", help="one more start, which says where its time went by function")
    add("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="kinds of traffic")
    add("--variant", nargs="+", default=[], metavar="NAME=VALUE,...",
        help="knobs under which each kind of traffic is served in turn, changed while the engine runs")  # fmt: skip
    default = Scale()
    add("--rate", type=float, default=default.rate_per_s, help="arrivals a second of Poisson traffic")
    add("--seconds", type=float, default=default.seconds, help="of each kind of traffic that is counted")
    add(
        "--at-once",
        type=int,
        default=default.num_at_once,
        help="requests at once of the other kinds of traffic",
    )
    add("--scale", type=float, default=default.lengths, help="of all lengths of traffic")
    add("--seed", type=int, default=0)
    return parser


def cells_part(options: argparse.Namespace, knobs: Mapping[str, KnobValue]) -> dict[str, Any]:
    device, dtype = options.device_found, options.dtype_found
    ceilings = measure_ceilings(device, dtype)
    print(", ".join(f"{key} {value}" for key, value in told(ceilings).items()))
    cells, waterfalls = [], []
    for shape, names in cells_of(options).items():
        load = source_of(options.model, shape, device, dtype, MAX_MODEL_LEN)
        bench = Bench(load, knobs, options.sampling_found)
        print_touched(bench.name, bench.loaded.model)
        for name in names:
            with_generate = name in options.generate
            cells.append(measure(bench, name, ceilings, options.runs, options.seed, with_generate))
            print_cells(cells[-1:])
            if options.waterfall and (found := waterfall(bench, name, ceilings, options.seed)) is not None:
                waterfalls.append(found)
        config = bench.config.values()
        del bench
        let_go(device)
    print()
    print_cells(cells)
    if waterfalls:
        print_waterfalls(waterfalls)
    return {
        **told(ceilings), "runs": options.runs, "sampling": options.sampling_found.told(), "config": config,
        "cells": [cell._asdict() for cell in cells],
        "waterfalls": [one._asdict() for one in waterfalls],
    }  # fmt: skip


def sampling_of(words: Sequence[str]) -> SamplingParams:
    """Of NAME=VALUE. Raises ValueError for another name, or a value out of its range."""
    (values,) = patches_of([",".join(words)])
    for name, value in values.items():
        if name not in SAMPLED:
            raise ValueError(f"--sampling takes {', '.join(SAMPLED)}, but got {name!r}")
        is_number = isinstance(value, int) or (isinstance(value, float) and name != "top_k")
        if not is_number or not 0 <= float(value) <= SAMPLED[name]:
            kind = "a whole number" if name == "top_k" else "a number"
            raise ValueError(f"{name} must be {kind} in [0, {SAMPLED[name]:g}], but got {value!r}")
    params: dict[str, Any] = dict(values)
    return SamplingParams(**params)


def cells_of(options: argparse.Namespace) -> Mapping[str, Sequence[str]]:
    """Workloads by shape, in the order in which they are measured."""
    every = dict.fromkeys(("qwen3-0.6b", "llama-8b", "deepseek-v2-lite"), BATCHES)
    chosen = CELLS.get(options.part) or every
    if options.shape:
        chosen = {shape: chosen.get(shape, BATCHES) for shape in options.shape}
    if options.model is not None:
        chosen = {"": next(iter(chosen.values()))}
    return {shape: options.workload or names for shape, names in chosen.items()}


def traffic_part(
    options: argparse.Namespace, knobs: Mapping[str, KnobValue], variants: Sequence[Mapping[str, KnobValue]]
) -> dict[str, Any]:
    shape = (options.shape or ["llama-8b"])[0]
    ceilings = measure_ceilings(options.device_found, options.dtype_found)
    loaded = source_of(options.model, shape, options.device_found, options.dtype_found, TRAFFIC_MODEL_LEN)()
    serving, weights = Serving(loaded, knobs), weights_of(loaded.model)
    identity = serving.executor.identity()
    scale = Scale(options.rate, options.seconds, options.at_once, options.scale)
    logs: list[dict[str, Any]] = []

    def tell(row: Row) -> None:
        print_rows([row])
        gaps_s = [gap for answer in serving.answers.values() for gap in answer.gaps_s()]
        parts = itl_parts(serving.records, gaps_s, weights, identity["kv_bytes_per_token"], ceilings)
        if parts is not None:
            print_itl(row.row, parts)
        if (fit := fitted_on(serving.records, identity)) is not None:
            print_step_model(row.row, serving.records, fit)
        print_longest(row.row, longest_of(serving.records))  # also of traffic that is not counted
        logs.append({
            "row": row.row, "itl": None if parts is None else parts._asdict(),
            "step_model": None if fit is None else asdict(fit),
        })  # fmt: skip

    rows = traffic(serving, options.rows, variants, scale, options.seed, tell)
    print()
    print_rows(rows)
    return {
        **told(ceilings),
        "model": serving.executor.identity()["model"]["name"], "config": serving.config.values(),
        "kv_tokens": serving.executor.pool.num_tokens, "scale": scale._asdict(),
        "rows": [{**row._asdict(), "missed": row.missed()} for row in rows], "step_logs": logs,
    }  # fmt: skip


def start_part(options: argparse.Namespace, knobs: Mapping[str, KnobValue]) -> dict[str, Any]:
    shape = (options.shape or ["llama-8b"])[0]
    with TemporaryDirectory() as passing:
        folder = options.model
        if folder is None:
            folder = Path(passing) / shape
            save_random(shape, folder, options.device_found, options.dtype_found)
            let_go(options.device_found)
        num_bytes = read_once(folder)
        dtype = name_of(options.dtype_found)
        starts = [start_once(folder, options.device, dtype, knobs) for _ in range(options.runs)]
        if options.profile:
            start_once(folder, options.device, dtype, knobs, ["--profile"])
    print_starts(starts)
    return {
        "model": folder.name, "weight_bytes": num_bytes, "bar_s": START_BAR_S,
        "starts": [one._asdict() for one in starts],
    }  # fmt: skip


def told(ceilings: Ceilings) -> dict[str, float]:
    return {
        "copy_tb_per_s": round(ceilings.copy_bytes_per_s / 1e12, 3),
        "read_tb_per_s": round(ceilings.read_bytes_per_s / 1e12, 3),
        "gemm_tflop_per_s": round(ceilings.gemm_flop_per_s / 1e12, 1),
        "gemm_held_tflop_per_s": round(ceilings.gemm_held_flop_per_s / 1e12, 1),
    }


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def let_go(device: torch.device) -> None:
    gc.collect()  # an executor holds itself in circles, and its pool is most of the memory
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
