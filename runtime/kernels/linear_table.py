"""Which linear layers are faster in our kernel than in cuBLAS: measured on the device, a shape at a time."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from runtime.kernels.skinny_linear import MAX_ROWS, Tiles, skinny_linear
from runtime.kernels.table import TOLERANCE, difference

TIMED_ROWS = (1, 8, 16, 32, 64)  # a batch goes by the next of them
STREAMED_BYTES = 200 * 2**20  # copies of a weight are read in turns, so that none is found in the L2 cache
MIN_GAIN = 1.03  # cuBLAS stays where ours is not at least so much faster
NUM_REPLAYS = 5


class LinearShape(NamedTuple):
    out_features: int
    in_features: int
    num_rows: int
    dtype: torch.dtype


class Choice(NamedTuple):
    """The faster one of a shape. `tiles`: None for cuBLAS."""

    tiles: Tiles | None
    ours_us: float
    cublas_us: float


@dataclass(slots=True)
class LinearTable:
    """A linear layer that takes the faster form of each shape that was measured, and cuBLAS for all others."""

    choices: dict[LinearShape, Choice] = field(default_factory=dict)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: [M, K]; weight: [N, K]; bias: [N]. Returns [M, N]."""
        tiles = self.tiles_of(len(x), weight)
        return linear(x, weight, bias) if tiles is None else skinny_linear(x, weight, bias, tiles)

    def tiles_of(self, num_rows: int, weight: Tensor) -> Tiles | None:
        timed = next((rows for rows in TIMED_ROWS if rows >= num_rows), None)
        if timed is None:
            return None
        choice = self.choices.get(_shape(weight, timed))
        return None if choice is None else choice.tiles

    def measure(self, weights: Iterable[Tensor], max_s: float = math.inf) -> None:
        """Times every shape among `weights` that is not known yet, until `max_s` seconds are over."""
        until = time.perf_counter() + max_s
        for rows in TIMED_ROWS:
            for weight in weights:
                shape = _shape(weight, rows)
                if shape not in self.choices and time.perf_counter() < until:
                    self.choices[shape] = measure(shape, weight.device)


def _shape(weight: Tensor, num_rows: int) -> LinearShape:
    out_features, in_features = weight.shape
    return LinearShape(out_features, in_features, num_rows, weight.dtype)


@torch.inference_mode()
def measure(shape: LinearShape, device: torch.device) -> Choice:
    """Times cuBLAS and each tiling. One that gives another result, or does not compile, is left out."""
    out_features, in_features, num_rows, dtype = shape
    copies = max(1, math.ceil(STREAMED_BYTES / (out_features * in_features * dtype.itemsize)))
    weights = torch.randn(copies, out_features, in_features, device=device, dtype=dtype).mul_(
        in_features**-0.5
    )
    x = torch.randn(num_rows, in_features, device=device, dtype=dtype)
    expected = linear(x, weights[0])
    cublas_us = graphed_us([partial(linear, x, weight) for weight in weights])
    best, best_us = None, math.inf
    for tiles in candidates(shape):
        try:
            error = difference(skinny_linear(x, weights[0], None, tiles), expected)
        except Exception as raised:  # too much shared memory, or whatever else the compiler finds
            if isinstance(raised, torch.cuda.OutOfMemoryError):
                raise
            continue
        if not error <= TOLERANCE[dtype]:
            continue
        took_us = graphed_us([partial(skinny_linear, x, weight, None, tiles) for weight in weights])
        if took_us < best_us:
            best, best_us = tiles, took_us
    return Choice(best if best_us * MIN_GAIN < cublas_us else None, best_us, cublas_us)


def candidates(shape: LinearShape) -> Iterator[Tiles]:
    """Tilings worth a try: those that keep between one and sixteen programs an SM of about 132."""
    out_features, in_features, num_rows, _ = shape
    if num_rows > MAX_ROWS:
        return
    sizes = (
        ((16, 256), (16, 512), (32, 128), (32, 256), (64, 128))
        if num_rows <= 16
        else ((32, 128), (64, 64), (64, 128))
    )
    for block_n, block_k in sizes:
        for split_k in (1, 2, 4, 8):
            programs = -(-out_features // block_n) * split_k
            if in_features // split_k < 2 * block_k or (split_k > 1 and programs > 132 * 8):
                continue
            if programs >= 96 or split_k == 8:
                yield Tiles(block_n, block_k, split_k, 4, 4)


def graphed_us(calls: list[Callable[[], object]]) -> float:
    """Microseconds of one call where they follow one another in a CUDA graph, as they do in a step."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    rounds = max(1, 20 // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    times = []
    for _ in range(NUM_REPLAYS + 1):
        started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        started.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        times.append(started.elapsed_time(ended) * 1000 / (rounds * len(calls)))
    return median(times[1:])
