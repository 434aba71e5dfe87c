"""Where a decode step's time goes on the device: multiplying weights, attention, other kernels, and what lies between.

Read from a few steps under torch.profiler, apart from all that is timed. Kernels are told apart by their names. What is
shorter than HOST_GAP_US between two kernels is launching; what is longer is the device waiting for the host.
"""

import re
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from runtime.batch import Batch
from runtime.bench.ceilings import Ceilings, synchronize
from runtime.bench.cells import Bench
from runtime.bench.loads import workload
from runtime.bench.peers import steps_of
from runtime.scheduler import Scheduler

NUM_STEPS = 16
HOST_GAP_US = 30.0
NUM_LONGEST, NAME_LENGTH = 10, 80
# Of libraries and torch by what their names hold, of our own kernels by their names.
KINDS = (
    ("kv", re.compile(r"attn|attention|flash|fmha|^_(latent_)?decode$|^_merge$", re.IGNORECASE)),
    (
        "weights",
        re.compile(
            r"gemm|gemv|cutlass|nvjet|cublas|splitk|linear|::(add)?mm$|^_(skinny|gate_up|down)$",
            re.I,
        ),
    ),
)


class Kernel(NamedTuple):
    name: str
    start_us: float
    end_us: float


class Waterfall(NamedTuple):
    """Milliseconds a step, on average over `num_steps`; weights to host add up to `step_ms`. A kernel that starts
    before the one in front of it has ended counts from that end on."""

    shape: str
    workload: str
    num_steps: int
    step_ms: float
    weights_ms: float
    kv_ms: float
    other_ms: float
    launch_ms: float
    host_ms: float
    weights_floor_ms: float
    kv_floor_ms: float
    longest: dict[str, float]  # milliseconds a step of the kernels that take most, by name


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS if pattern.search(name)), "other")


class Busy(NamedTuple):
    """Microseconds by kind of kernel and by name, and between kernels by the length of the gap."""

    by_kind: dict[str, float]
    by_name: dict[str, float]
    launch_us: float
    host_us: float


def busy_of(kernels: Sequence[Kernel]) -> Busy:
    by_kind = {"weights": 0.0, "kv": 0.0, "other": 0.0}
    by_name: dict[str, float] = {}
    launch = host = 0.0
    ordered = sorted(kernels, key=lambda one: one.start_us)
    until = ordered[0].start_us if ordered else 0.0
    for kernel in ordered:
        gap = max(0.0, kernel.start_us - until)
        launch, host = (launch, host + gap) if gap > HOST_GAP_US else (launch + gap, host)
        took = max(0.0, kernel.end_us - max(kernel.start_us, until))
        by_kind[kind_of(kernel.name)] += took
        by_name[kernel.name] = by_name.get(kernel.name, 0.0) + took
        until = max(until, kernel.end_us)
    return Busy(by_kind, by_name, launch, host)


def waterfall(bench: Bench, name: str, ceilings: Ceilings, seed: int) -> Waterfall | None:
    """None where the device tells of no kernel, or the workload has no step that only decodes."""
    device = bench.loaded.model.device
    activities = [ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]
    profiler = profile(activities=activities)
    batches: list[Batch] = []
    began = seconds = 0.0
    load = workload(name, bench.loaded.identity["vocab_size"], np.random.default_rng(seed))
    config, executor = bench.config.patched({"max_num_seqs": load.num_at_once}), bench.executor
    scheduler = Scheduler(
        executor.pool, config, executor.max_model_len, attention_cost=executor.attention_cost
    )
    executor.warm.install(config, scheduler)
    for request in bench.requests_of(load):
        scheduler.add(request)
    num_steps = min(NUM_STEPS, max(load.output_tokens) // 2)
    for batch in steps_of(bench.executor, scheduler, config):
        only_decodes = not scheduler.waiting and batch.num_decode == len(scheduler.running)
        if not batches and not (only_decodes and batch.sampled.all()):
            continue
        if not batches:
            synchronize(device)
            profiler.start()
            began = time.perf_counter()
        batches.append(batch)
        if len(batches) > num_steps:
            break
    if batches:
        synchronize(device)
        seconds = time.perf_counter() - began
        profiler.stop()
    for request in [*scheduler.running, *scheduler.waiting]:
        scheduler.cancel(request.id)
    if len(batches) < 2 or not (kernels := list(kernels_of(profiler, device))):
        return None
    return waterfall_of(bench, name, batches[1:], seconds, busy_of(kernels), ceilings)


def waterfall_of(
    bench: Bench, name: str, batches: Sequence[Batch], seconds: float, busy: Busy, ceilings: Ceilings
) -> Waterfall:
    num = len(batches)
    kv_bytes = bench.executor.identity()["kv_bytes_per_token"]
    read = [bench.weights.read_bytes(batch.num_tokens) for batch in batches]
    cached = [kv_bytes * batch.context_tokens for batch in batches]
    ms = {kind: us / 1e3 / num for kind, us in busy.by_kind.items()}
    longest = sorted(busy.by_name.items(), key=lambda item: -item[1])[:NUM_LONGEST]
    host_ms = 1e3 * seconds / num - sum(ms.values()) - busy.launch_us / 1e3 / num
    return Waterfall(
        shape=bench.name, workload=name, num_steps=num, step_ms=1e3 * seconds / num, weights_ms=ms["weights"],
        kv_ms=ms["kv"], other_ms=ms["other"], launch_ms=busy.launch_us / 1e3 / num, host_ms=host_ms,
        weights_floor_ms=1e3 * sum(read) / num / ceilings.copy_bytes_per_s,
        kv_floor_ms=1e3 * sum(cached) / num / ceilings.copy_bytes_per_s,
        longest={name[:NAME_LENGTH]: us / 1e3 / num for name, us in longest},
    )  # fmt: skip


def kernels_of(profiler: Any, device: torch.device) -> Iterator[Kernel]:
    """What ran on the device; on a CPU the outermost operations, to try this out."""
    on_cuda = device.type == "cuda"
    for event in profiler.events():
        is_asked = event.device_type == DeviceType.CUDA if on_cuda else event.cpu_parent is None
        if is_asked and event.time_range.end > event.time_range.start:
            yield Kernel(event.name, event.time_range.start, event.time_range.end)


def print_waterfalls(waterfalls: Sequence[Waterfall]) -> None:
    columns = (
        "step", "weights", "(floor)", "KV", "(floor)", "other", "launch", "host",
    )  # fmt: skip
    print(f"{'shape':<18}{'workload':<10}" + "".join(f"{name:>9}" for name in columns) + "  ms a decode step")
    for one in waterfalls:
        cells = (
            one.step_ms, one.weights_ms, one.weights_floor_ms, one.kv_ms, one.kv_floor_ms, one.other_ms,
            one.launch_ms, one.host_ms,
        )  # fmt: skip
        print(f"{one.shape:<18}{one.workload:<10}" + "".join(f"{cell:>9.3f}" for cell in cells))
