"""Which linear layers of a few rows are faster in our kernel than in cuBLAS: measured on the device, by shape."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

TIMED_ROWS = (1, 16, 32, 64)  # a batch goes by the next of them
NUM_CALLS = 24  # of one timing, over all weights of a shape in turns, so that few are found in the L2 cache
NUM_REPLAYS = 5
ADDED_US = 1.0  # what it costs to add the parts up

Multiply = Callable[[Tensor, Tensor], Tensor]


class LinearShape(NamedTuple):
    out_features: int
    in_features: int
    num_rows: int
    dtype: torch.dtype


class Choice(NamedTuple):
    """Microseconds of a call."""

    ours_us: float
    cublas_us: float

    @property
    def is_ours(self) -> bool:
        return self.ours_us + ADDED_US < self.cublas_us


@dataclass(slots=True)
class LinearTable:
    """Computes what a linear layer adds to the residual: by `skinny` where that was found faster, otherwise as the
    layer does itself. `skinny`: the kernel of this name."""

    skinny: Multiply
    choices: dict[LinearShape, Choice] = field(default_factory=dict)

    def added(self, layer: nn.Module, x: Tensor) -> Tensor:
        """x: [M, K]. Returns [M, N], or its parts [S, M, N] in float32, as `add_norm` takes both."""
        if is_plain(layer):
            weight: Tensor = layer.weight
            timed = next((rows for rows in TIMED_ROWS if rows >= len(x)), None)
            choice = None if timed is None else self.choices.get(_shape(weight, timed))
            if choice is not None and choice.is_ours:
                return self.skinny(x, weight)
        out: Tensor = layer.forward(x)
        return out

    @torch.inference_mode()
    def measure(self, layers: Iterable[nn.Module]) -> None:
        """Times every shape among the layers that is not known yet, here and now."""
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for layer in layers:
            if is_plain(layer):
                by_shape.setdefault(layer.weight.shape, []).append(layer.weight)
        for weights in by_shape.values():
            for rows in TIMED_ROWS:
                shape = _shape(weights[0], rows)
                if shape not in self.choices:
                    self.choices[shape] = self._timed(shape, weights)

    def _timed(self, shape: LinearShape, weights: Sequence[Tensor]) -> Choice:
        x = torch.randn(shape.num_rows, shape.in_features, device=weights[0].device, dtype=shape.dtype)
        in_turns = [weights[i % len(weights)] for i in range(NUM_CALLS)]
        ours, cublas = (graphed_us([partial(call, x, one) for one in in_turns]) for call in (self.skinny, linear))
        return Choice(ours, cublas)


def is_plain(layer: nn.Module) -> bool:
    """Whether the layer multiplies with its weight as it is: no bias, no format that replaced its forward."""
    forward = getattr(layer.forward, "__func__", None)
    return isinstance(layer, nn.Linear) and layer.bias is None and forward is nn.Linear.forward


def _shape(weight: Tensor, num_rows: int) -> LinearShape:
    out_features, in_features = weight.shape
    return LinearShape(out_features, in_features, num_rows, weight.dtype)


def graphed_us(calls: Sequence[Callable[[], object]]) -> float:
    """Microseconds of one call where they follow one another in a CUDA graph, as they do in a step."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    rounds = math.ceil(20 / len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
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
