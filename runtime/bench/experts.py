"""Mixtures of experts, one layer at a time: python -m runtime.bench.experts.

    touched    how many experts of a layer the tokens of a step go to, by the model's own routers
    timed      the parts of a layer's experts at each number of rows; with --tiles, ways to share out their work

Random weights; inputs in turns, so that experts change from call to call as they do from step to step. On a GPU calls
follow one another in a CUDA graph. `TB/s` counts the weights of the experts touched, once.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from runtime.bench.shapes import SHAPES
from runtime.experts import Experts
from runtime.fused_experts import PAIR_A_BLOCK_MAX_ROWS, FusedExperts, block_rows
from runtime.kernels import PLAIN, TRITON, Kernels
from runtime.kernels.linear_table import LinearTable, graphed_us
from runtime.loader import resolve_device, resolve_dtype

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
TOUCHED_ROWS = (1, 32, 256)
PROMPT_TOKENS = 16  # before the token whose experts are counted
NUM_INPUTS = 4
CPU_CALLS = 3


@torch.inference_mode()
def experts_touched(model: PreTrainedModel, num_rows: int, seed: int = 0) -> float | None:
    """Experts of a layer that the last tokens of so many random prompts go to, mean over layers; None where no layer
    has any. By transformers' own forward pass, whose attention is another meanwhile."""
    gates = [
        module.gate for module in model.modules() if hasattr(module, "experts") and hasattr(module, "gate")
    ]
    if not gates:
        return None
    found: list[int] = []

    def count(module: nn.Module, given: Any, result: tuple[Tensor, Tensor, Tensor]) -> None:
        last = result[2].unflatten(0, (num_rows, PROMPT_TOKENS))[:, -1]
        found.append(len(last.unique()))

    hooks = [gate.register_forward_hook(count) for gate in gates]
    ours = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(model.config.vocab_size, (num_rows, PROMPT_TOKENS), generator=generator)
        model.base_model(ids.to(model.device), use_cache=False)
    finally:
        model.set_attn_implementation(ours)
        for hook in hooks:
            hook.remove()
    return sum(found) / len(found)


def print_touched(name: str, model: PreTrainedModel) -> None:
    """Nothing for a model without experts."""
    counts = {rows: experts_touched(model, rows) for rows in TOUCHED_ROWS}
    told = [f"{count:.1f} by {rows} rows" for rows, count in counts.items() if count is not None]
    if told:
        print(
            f"{name}: experts of a layer that a step goes to, mean over layers: {', '.join(told)}", flush=True
        )


class Timing(NamedTuple):
    """One number of rows. Microseconds of the parts and of all in either form; `many_us`: None where there is no
    grouped_mm."""

    num_rows: int
    block_rows: int
    touched: int
    route_us: float
    layout_us: float
    gate_up_us: float
    down_us: float
    few_us: float
    many_us: float | None
    gate_up_tb_per_s: float
    down_tb_per_s: float


def layer_of(shape: str, device: torch.device, dtype: torch.dtype) -> Experts:
    """The last layer's experts of a model of this shape, with random weights, and nothing else of it."""
    config = type(SHAPES[shape])(**SHAPES[shape].to_dict())
    config.num_hidden_layers, config.vocab_size = 2, 512
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return Experts(model.model.layers[-1].mlp, config)


def mean_us(device: torch.device, calls: list[Callable[[], object]]) -> float:
    """Microseconds of one call."""
    if device.type == "cuda":
        return graphed_us(calls)
    started = time.perf_counter()
    for _ in range(CPU_CALLS):
        for call in calls:
            call()
    return 1e6 * (time.perf_counter() - started) / (CPU_CALLS * len(calls))


class Load(NamedTuple):
    """Inputs of a layer, in turns: what is given to each kernel."""

    x: list[Tensor]
    indices: list[Tensor]
    layouts: list[Any]
    inner: list[Tensor]
    shared: tuple[Tensor | None, Tensor | None]
    weights: list[Tensor]


def load_of(kernels: Kernels, layer: Experts, num_rows: int, rows: int) -> Load:
    hidden, num_experts = layer.gate_up.shape[2], len(layer.gate_up)
    x = [
        torch.randn(num_rows, hidden, device=layer.gate_up.device, dtype=layer.gate_up.dtype)
        for _ in range(NUM_INPUTS)
    ]
    chosen = [kernels.route(one, layer.router, layer.rule) for one in x]
    index = [one.index for one in chosen]
    is_single = num_rows <= PAIR_A_BLOCK_MAX_ROWS
    layouts = [None if is_single else kernels.lay_out(one, num_experts, rows) for one in index]
    shared = (None, None) if layer.shared is None else (layer.shared.gate_up.weight, layer.shared.down.weight)
    inner = [
        kernels.expert_gate_up(one, layer.gate_up, shared[0], own, layout)
        for one, own, layout in zip(x, index, layouts, strict=True)
    ]
    return Load(x, index, layouts, inner, shared, [one.weights for one in chosen])


def gate_up_calls(kernels: Kernels, layer: Experts, load: Load, *tiles: object) -> list[Callable[[], object]]:
    kernel: Callable[..., Tensor] = kernels.expert_gate_up
    given = zip(load.x, load.indices, load.layouts, strict=True)
    return [partial(kernel, x, layer.gate_up, load.shared[0], *more, *tiles) for x, *more in given]


def down_calls(kernels: Kernels, layer: Experts, load: Load, *tiles: object) -> list[Callable[[], object]]:
    kernel: Callable[..., Tensor] = kernels.expert_down
    given = zip(load.inner, load.indices, load.weights, load.layouts, strict=True)
    return [partial(kernel, x, layer.down, load.shared[1], *more, *tiles) for x, *more in given]


@torch.inference_mode()
def timing_of(kernels: Kernels, layer: Experts, num_rows: int) -> Timing:
    device, num_experts = layer.gate_up.device, len(layer.gate_up)
    rows = block_rows(num_rows * layer.rule.top_k, num_experts)
    load, fused = load_of(kernels, layer, num_rows, rows), FusedExperts(kernels, LinearTable(kernels))
    timed = partial(mean_us, device)
    gate_up_us = timed(gate_up_calls(kernels, layer, load))
    down_us = timed(down_calls(kernels, layer, load))
    many_us = timed([partial(fused._many, x, layer) for x in load.x]) if layer.has_grouped_form else None
    touched = sum(len(one.unique()) for one in load.indices) / len(load.indices)
    up_bytes, down_bytes = (
        touched * weight[0].nbytes + (0 if shared is None else shared.nbytes)
        for weight, shared in zip((layer.gate_up, layer.down), load.shared, strict=True)
    )
    return Timing(
        num_rows, rows, round(touched),
        timed([partial(kernels.route, x, layer.router, layer.rule) for x in load.x]),
        timed([partial(kernels.lay_out, index, num_experts, rows) for index in load.indices]),
        gate_up_us, down_us, timed([partial(fused._few, x, layer) for x in load.x]), many_us,
        up_bytes / gate_up_us / 1e6, down_bytes / down_us / 1e6,
    )  # fmt: skip


def tilings(rows: int) -> Iterator[tuple[int, int, int, int]]:
    """(block_n, block_k, num_warps, num_stages) worth a try for blocks of so many rows."""
    sizes = {16: ((16, 128), (16, 256), (32, 64), (32, 128), (64, 64)), 32: ((32, 128), (64, 64), (128, 64))}
    warps = (4,) if rows <= 32 else (4, 8)
    for (n, k), num_warps, stages in product(sizes.get(rows, ((64, 64), (128, 64))), warps, (3, 4, 5)):
        yield n, k, num_warps, stages


@torch.inference_mode()
def print_tilings(kernels: Kernels, layer: Experts, num_rows: int) -> None:
    """The fastest tilings of both kernels; those that do not fit a multiprocessor are left out."""
    from runtime.kernels.expert_linear import ExpertTiles

    device = layer.gate_up.device
    rows = block_rows(num_rows * layer.rule.top_k, len(layer.gate_up))
    load = load_of(kernels, layer, num_rows, rows)
    for name, calls in (("gate_up", gate_up_calls), ("down", down_calls)):
        found: list[tuple[float, ExpertTiles]] = []
        for tiles in map(ExpertTiles._make, tilings(rows)):
            try:
                found.append((mean_us(device, calls(kernels, layer, load, tiles)), tiles))
            except Exception as raised:  # too much shared memory, or whatever else the compiler finds
                if isinstance(raised, torch.cuda.OutOfMemoryError):
                    raise
        best = ", ".join(f"{tuple(tiles)} {us:.1f}" for us, tiles in sorted(found)[:4])
        print(f"{num_rows:>6} rows in blocks of {rows}: {name} {best} us", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m runtime.bench.experts", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="deepseek-v2-lite")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument(
        "--tiles", nargs="*", type=int, default=[], help="numbers of rows to try all tilings at"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    options = parser.parse_args(arguments)
    device = resolve_device(options.device)
    layer = layer_of(options.shape, device, resolve_dtype(options.dtype, device))
    kernels = TRITON if TRITON is not None and device.type == "cuda" else PLAIN
    print("".join(f"{name.removesuffix('_us'):>{len(name) + 2}}" for name in Timing._fields))
    timings = []
    for num_rows in options.rows:
        timings.append(timing_of(kernels, layer, num_rows))
        values = ("-" if value is None else f"{value:.4g}" for value in timings[-1])
        print(
            "".join(f"{value:>{len(name) + 2}}" for name, value in zip(Timing._fields, values, strict=True)),
            flush=True,
        )
    for num_rows in options.tiles if kernels is TRITON else ():
        print_tilings(kernels, layer, num_rows)
    print(json.dumps({"shape": options.shape, "timings": [timing._asdict() for timing in timings]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
