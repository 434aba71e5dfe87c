"""What an accelerator can do at most, measured where it is: copying, reading weights, GEMM."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear

COPY_BYTES = 2**30
GEMM_SIZE = 8192
TIMED = 10
HELD_S = 1.5  # behind which a device computes at the clock that its power limit allows


class Ceilings(NamedTuple):
    """Bytes and floating-point operations a second. `copy`: of bytes read and of bytes written, together.
    `gemm`: of the fastest of a few products; `gemm_held`: of one behind the other for as long as a batch of prompts
    takes. An H200 falls from 750 to 650 TFLOP/s then, at 690 of 700 W."""

    copy_bytes_per_s: float
    read_bytes_per_s: float
    gemm_flop_per_s: float
    gemm_held_flop_per_s: float


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    scale = 1 if device.type == "cuda" else 64
    source = torch.empty(COPY_BYTES // scale, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = best_s(device, lambda: target.copy_(source))
    size = GEMM_SIZE if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = best_s(device, lambda: a @ b)  # before the device is warm
    held_s = held_seconds(device, lambda: a @ b)
    gemm_s = min(best, held_s)
    weights = [torch.randn(size, size, device=device, dtype=dtype) for _ in range(4)]
    x = torch.randn(1, size, device=device, dtype=dtype)
    read_s = best_s(device, lambda: [linear(x, weight) for weight in weights])
    read_bytes = sum(weight.nbytes for weight in weights)
    gemm_flop = 2 * size**3
    return Ceilings(2 * source.nbytes / copy_s, read_bytes / read_s, gemm_flop / gemm_s, gemm_flop / held_s)


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


def held_seconds(device: torch.device, work: Callable[[], Any]) -> float:
    """Of one call, on average over the last TIMED of those that follow one another for HELD_S."""
    until = time.perf_counter() + HELD_S
    while True:
        started = time.perf_counter()
        for _ in range(TIMED):
            work()
        synchronize(device)
        if (now := time.perf_counter()) >= until:
            return (now - started) / TIMED


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
