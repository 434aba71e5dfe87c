"""Which linear layers of a few rows are faster in our kernels than in cuBLAS: measured on the device, by shape."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from runtime.kernels.launch import FEW_ROWS, compiled_ahead, has_large_tiles
from runtime.kernels.table import Kernels

log = logging.getLogger(__name__)

TIMED_ROWS = (1, 16, 32, 64, 128, 256)  # a batch goes by the next of them
# With more than FEW_ROWS only products of smaller weights are timed: others take so long that launching them, which is
# what our kernels save, does not count.
VALUES_OF_MANY_ROWS = 2**24
# Of small graphs, of steps with pieces of prompts, and of the rows whose logits are wanted behind a step of any size.
WOKEN_ROWS = (*range(1, 64), *range(64, 512, 32), *range(512, 2049, 64))
MOST_WOKEN_VALUES = 2**27  # of an output
NUM_CALLS = 24  # of one timing, over all weights of a shape in turns, so that few are found in the L2 cache
NUM_REPLAYS = 5
Multiply = Callable[[Tensor, Tensor], Tensor]  # (x, weight)
Use = Literal["whole", "gated", "parts"]


class LinearShape(NamedTuple):
    use: Use
    out_features: int
    in_features: int
    num_rows: int
    dtype: torch.dtype


class Choice(NamedTuple):
    """Microseconds of a call with the norm before it, or behind it where the product is added to the residual."""

    ours_us: float
    cublas_us: float

    @property
    def is_ours(self) -> bool:
        return self.ours_us < self.cublas_us


@dataclass(slots=True)
class LinearTable:
    """Linear layers in the faster form of each shape that was measured, and as the layer does it for all others."""

    kernels: Kernels
    choices: dict[LinearShape, Choice] = field(default_factory=dict)
    backend: str = "auto"  # `linear_backend`: the faster one, or one of both for all that was measured

    def whole(self, layer: nn.Module, x: Tensor) -> Tensor:
        """x: [M, K]. Returns [M, N]."""
        return (
            self.kernels.skinny_linear(x, layer.weight)
            if self._is_ours("whole", layer, x)
            else layer.forward(x)
        )

    def gated(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Of gates and ups: silu(gate) * up, [M, N / 2]."""
        if self._is_ours("gated", layer, x):
            return self.kernels.skinny_gated(x, layer.weight)
        return self.kernels.silu_mul(layer.forward(x))

    def added(self, layer: nn.Module, x: Tensor) -> Tensor:
        """What is added to the residual: [M, N], or its parts [S, M, N] in float32, as `add_norm` takes both."""
        return (
            self.kernels.skinny_parts(x, layer.weight)
            if self._is_ours("parts", layer, x)
            else layer.forward(x)
        )

    @torch.inference_mode()
    def measure(self, layers: Mapping[Use, Iterable[nn.Module]]) -> None:
        """Times every shape among the layers that is not known yet, here and now. All kernels are compiled first."""
        wanted = {}
        for use, some in layers.items():
            for weights in _by_shape(some):
                for rows in timed_rows(weights[0]):
                    shape = _shape(use, weights[0], rows)
                    if shape not in self.choices:
                        wanted[shape] = weights
        if not wanted:
            return
        device = next(iter(wanted.values()))[0].device
        with compiled_ahead():
            for shape, weights in wanted.items():
                self._forms(shape, device)[0](_input(shape, device), weights[0])
        for shape, weights in wanted.items():
            self.choices[shape] = self._timed(shape, weights)

    @torch.inference_mode()
    def wake(self, layers: Iterable[nn.Module]) -> None:
        """Multiplies once with a layer of each shape for many numbers of rows. cuBLAS takes another kernel for other
        numbers, and the device loads it when it first runs: better here than where somebody waits."""
        by_shape = {layer.weight.shape: layer for layer in layers if isinstance(layer, nn.Linear)}
        for (out_features, in_features), layer in by_shape.items():
            most = MOST_WOKEN_VALUES // out_features
            x = layer.weight.new_zeros(min(most, WOKEN_ROWS[-1]), in_features)
            for rows in WOKEN_ROWS:
                if rows <= most:
                    layer.forward(x[:rows])

    def _is_ours(self, use: Use, layer: nn.Module, x: Tensor) -> bool:
        timed = next((rows for rows in TIMED_ROWS if rows >= len(x)), None)
        if timed is None or not len(x) or not is_plain(layer):  # a step without logits has a head of no rows
            return False
        choice = self.choices.get(_shape(use, layer.weight, timed))
        if choice is None or self.backend == "cublas":
            return False
        return choice.is_ours if self.backend == "auto" else math.isfinite(choice.ours_us)

    def _timed(self, shape: LinearShape, weights: Sequence[Tensor]) -> Choice:
        x = _input(shape, weights[0].device)
        num_calls = min(NUM_CALLS, max(4, NUM_CALLS * 2**26 // weights[0].nbytes))
        in_turns = [weights[i % len(weights)] for i in range(num_calls)]
        ours, cublas = self._forms(shape, weights[0].device)
        try:
            ours_us = graphed_us([partial(ours, x, one) for one in in_turns])
        except Exception as error:  # of a compiler or a driver: tiles may not fit in the shared memory
            log.warning(
                "layers of %d to %d values are left to cuBLAS at %d rows, since our kernel cannot be run: %s",
                shape.in_features, shape.out_features, shape.num_rows, error,
            )  # fmt: skip
            ours_us = math.inf
        return Choice(ours_us, graphed_us([partial(cublas, x, one) for one in in_turns]))

    def _forms(self, shape: LinearShape, device: torch.device) -> tuple[Multiply, Multiply]:
        """Ours, and that of cuBLAS, each beside the norm that it has in a step: what it gains by starting early, or
        costs its neighbours, is part of its time. Chosen by times of products alone, llama-8b takes 4.45 ms a step at
        one row and 4.91 at 32; by these 4.24 and 4.75 (H200)."""
        kernels = self.kernels
        is_added = shape.use == "parts"
        normed_size = shape.out_features if is_added else shape.in_features
        scale = torch.ones(normed_size, device=device, dtype=shape.dtype)
        residual = torch.zeros(shape.num_rows, normed_size, device=device, dtype=shape.dtype)

        def beside_norm(multiply: Multiply) -> Multiply:
            if is_added:
                return lambda x, weight: kernels.add_norm(residual, multiply(x, weight), scale, 1e-6)
            return lambda x, weight: multiply(kernels.add_norm(x, None, scale, 1e-6), weight)

        if is_added:
            forms: tuple[Multiply, Multiply] = kernels.skinny_parts, linear
        elif shape.use == "whole":
            forms = kernels.skinny_linear, linear
        else:
            forms = kernels.skinny_gated, lambda x, weight: kernels.silu_mul(linear(x, weight))
        return beside_norm(forms[0]), beside_norm(forms[1])


def is_plain(layer: nn.Module) -> bool:
    """Whether the layer multiplies with its weight as it is: no bias, no format that replaced its forward."""
    forward = getattr(layer.forward, "__func__", None)
    return isinstance(layer, nn.Linear) and layer.bias is None and forward is nn.Linear.forward


def _by_shape(layers: Iterable[nn.Module]) -> list[list[Tensor]]:
    found: dict[torch.Size, list[Tensor]] = {}
    for layer in layers:
        if is_plain(layer):
            found.setdefault(layer.weight.shape, []).append(layer.weight)
    return list(found.values())


def timed_rows(weight: Tensor) -> tuple[int, ...]:
    are_many = weight.numel() < VALUES_OF_MANY_ROWS and has_large_tiles(weight.device)
    return tuple(rows for rows in TIMED_ROWS if rows <= FEW_ROWS or are_many)


def _shape(use: Use, weight: Tensor, num_rows: int) -> LinearShape:
    out_features, in_features = weight.shape
    return LinearShape(use, out_features, in_features, num_rows, weight.dtype)


def _input(shape: LinearShape, device: torch.device) -> Tensor:
    return torch.randn(shape.num_rows, shape.in_features, device=device, dtype=shape.dtype)


def graphed_us(calls: Sequence[Callable[[], object]]) -> float:
    """Microseconds of one call where they follow one another in a CUDA graph, as they do in a step."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    rounds = math.ceil(4 / len(calls))
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
