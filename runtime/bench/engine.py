"""Our engine beside others on the same weights, threads and token ids: python -m runtime.bench engine.

Each engine serves the same loads in turns, and another one begins each turn, so that the machine's mood is the same
for all; what is compared are the medians of ratios within a turn. `--shape` takes random weights of a known shape.
openvino-genai takes part from an environment of its own; runtime/bench/openvino_child.py says how to make one.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from runtime.bench.loads import Load, equal_load, ragged_load, trace_lengths
from runtime.bench.peers import ContinuousBatching, Engine, Generate, OpenVino, Ours, Served
from runtime.bench.shapes import SHAPES, model_folder
from runtime.executor import cpu_model, num_cores
from runtime.knobs import default_config
from runtime.loader import load_model, resolve_device, resolve_dtype

ROOT = Path(__file__).parents[2]
DEMO_MODEL = ROOT / "runtime" / "demo_model"
TIER_B = "tier B"
TRACE = ROOT / "configs" / "traces" / "azure_code_cut.csv"


class Row(NamedTuple):
    """One engine under one load. `ratio_to_generate`: of tokens a second, the median over turns. `same_share`: of the
    requests, those whose tokens are all those of `generate`. `ttft_s`: median over requests. `products_share`: of our
    own engines on a CPU, the share of their time in products with weights."""

    load: str
    num_at_once: int
    engine: str
    tokens_per_s: float
    ratio_to_generate: float
    lowest_ratio: float
    highest_ratio: float
    same_share: float
    ttft_s: float | None
    products_share: float | None


def compare(engines: Sequence[Engine], load: Load, num_turns: int) -> list[Row]:
    """The engine named `generate` is what the others are measured by."""
    served: dict[str, list[Served]] = {engine.name: [] for engine in engines}
    for turn in range(num_turns):
        for index in np.roll(np.arange(len(engines)), turn).tolist():
            engine = engines[index]
            served[engine.name].append(engine.serve(load))
            print(f"{load.name} {load.num_at_once}: {engine.name} {served[engine.name][-1].seconds:.2f} s",
                  file=sys.stderr, flush=True)  # fmt: skip
    reference = served[Generate.name]
    shares = {
        one.name: one.products_share(load) for one in engines if isinstance(one, Ours) and one.is_on_cpu
    }
    rows = []
    for name, turns in served.items():
        ratios = [beside.seconds / one.seconds for one, beside in zip(turns, reference, strict=True)]
        pairs = zip(turns[0].outputs, reference[0].outputs, strict=True)
        same = sum(ours == theirs for ours, theirs in pairs) / len(load.prompts)
        firsts = [median(one.ttft_s) for one in turns if one.ttft_s]
        rows.append(
            Row(
                load.name, load.num_at_once, name, median(load.num_tokens / one.seconds for one in turns),
                median(ratios), min(ratios), max(ratios), same, median(firsts) if firsts else None,
                shares.get(name),
            )
        )  # fmt: skip
    return rows


def print_rows(rows: Sequence[Row]) -> None:
    print(
        f"{'load':<8}{'at once':>8}  {'engine':<16}{'tokens/s':>10}{'x generate (range)':>26}{'same tokens':>13}"
        f"{'products':>10}"
    )
    for row in rows:
        ratio = f"{row.ratio_to_generate:.2f} ({row.lowest_ratio:.2f} to {row.highest_ratio:.2f})"
        print(
            f"{row.load:<8}{row.num_at_once:>8}  {row.engine:<16}{row.tokens_per_s:>10.1f}{ratio:>26}"
            f"{row.same_share:>13.0%}{'' if row.products_share is None else format(row.products_share, '>10.0%')}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m runtime.bench engine", description=str(__doc__).splitlines()[0]
    )
    add = parser.add_argument
    add("--model", type=Path, default=DEMO_MODEL, help="model folder (default: the demo's)")
    add("--shape", choices=sorted(SHAPES), help="random weights of this shape instead of a model")
    add("--keep", type=Path, help="folder for those weights, which is used again where it exists")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", default="auto", help="auto, float32 or bfloat16")
    add("--threads", type=int, default=num_cores(), help="CPU threads of every engine")
    add("--at-once", type=int, nargs="+", default=[1, 8, 32], help="requests that are served at once")
    add("--scale", type=float, default=1.0, help="of the 128 prompt and 64 output tokens a request")
    add("--turns", type=int, default=3, help="times that each engine serves each load")
    add("--trace", type=Path, default=TRACE, help="trace that ragged lengths are taken from")
    add(
        "--without",
        nargs="+",
        default=[],
        choices=[ContinuousBatching.name, TIER_B],
        help="engines that are left out",
    )
    add("--openvino-python", type=Path, help="Python of an environment that holds openvino-genai")
    add("--openvino-model", type=Path, help="the same model, exported for OpenVINO")
    add("--seed", type=int, default=0)
    add("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args(arguments)
    if (options.openvino_python is None) != (options.openvino_model is None):
        parser.error("--openvino-python and --openvino-model belong together")
    torch.set_num_interop_threads(1)
    torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    if options.openvino_python is not None and (device.type != "cpu" or dtype != torch.float32):
        parser.error("openvino-genai is compared in float32 on a CPU: add --device cpu --dtype float32")
    rng = np.random.default_rng(options.seed)
    config = default_config(device.type, num_cores()).patched(
        {"threads_decode": options.threads, "threads_prefill": options.threads}
    )
    with model_folder(options.model, options.shape, options.keep) as folder:
        plain = load_model(folder, device, dtype)
        engines: list[Engine] = [Ours(load_model(folder, device, dtype), config), Generate(plain.model)]
        if TIER_B not in options.without:
            engines.append(Ours(load_model(folder, device, dtype), config, tiers="B"))
        if ContinuousBatching.name not in options.without:
            engines.append(ContinuousBatching(load_model(folder, device, dtype).model, config))
        if options.openvino_python is not None:
            engines.append(OpenVino(options.openvino_python, options.openvino_model, options.threads, config))
        vocab_size, lengths = plain.identity["vocab_size"], trace_lengths(options.trace)
        rows: list[Row] = []
        for num in options.at_once:
            for load in (
                equal_load(num, vocab_size, options.scale, rng),
                ragged_load(num, vocab_size, options.scale, lengths, rng),
            ):
                rows += compare(engines, load, options.turns)
    about: dict[str, Any] = {
        "model": options.shape or plain.identity["name"], "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "threads": options.threads, "torch": torch.__version__, "scale": options.scale, "turns": options.turns,
        "seed": options.seed,
    }  # fmt: skip
    if options.json:
        print(json.dumps({**about, "rows": [row._asdict() for row in rows]}))
        return 0
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print_rows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
