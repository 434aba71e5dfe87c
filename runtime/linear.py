"""Linear layers of a CPU model with their weights laid out as the number of rows wants them.

    plain    as loaded, [out, in]
    parted   the same, a part of the outputs for each thread: one row keeps a single thread busy otherwise
    turned   [in, out] of each part: a matrix times one row reads whole vectors of the output
    packed   oneDNN's blocks, for several rows

Which is faster from how many rows on depends on the CPU, its libraries and the shape, so it is timed. Measured in
float32, plain against packed, µs a layer:

    two cores of     weight       1 row        4 rows       16 rows      32 rows
    Zen 4            1408 x 256     42 / 77     220 / 113*    350 / 215    367 / 255      * 8 rows
    Sapphire Rapids  1408 x 256     23 / 30      32 / 41      155 / 109    148 / 102
                      896 x 4864   503 / 543   1047 / 589    1601 / 1058  2375 / 1803

One row on two Zen 4 cores, weights beyond their caches, GB/s plain / parted / turned / packed: 9728 x 896 11 / 22 /
37 / 20, 4096 x 256 8 / 13 / 27 / 20, 256 x 704 12 / 18 / 11 / 13, 896 x 4864 17 / 23 / 18 / 19. The copies stand beside
the original, so they are made only where memory is plentiful.

oneDNN compiles a product anew for each number of rows: 0.6 ms, and half a megabyte that stays in two caches of 1024
products each. With steps of all sizes an engine grew by 0.9 GB, and compiled at every other step. So rows are padded
to one of few numbers, and an engine keeps CACHED_PRODUCTS (runtime/engine_start.py) at most.
"""

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

log = logging.getLogger(__name__)

PACKED_FOR_ROWS = 16  # the layout chosen for 16 rows was best or equal at every other number too
MAX_RELATIVE_ERROR = 1e-4  # float32, another order of summation
TIMED_ROWS = (1, 2, 4, 8, 16, 32)
NUM_TURNS = 5  # each form is timed so often, in turns; the fastest counts
MIN_TURNS = 2  # the first call of a form for a number of rows makes what later ones use again
MAX_TIMED_S = 1.0  # further turns are left out when they are passed
SAMPLED_BYTES = 2**26  # of weights that are timed one after the other: more than caches hold

EXACT_ROWS = 16  # up to here each number of rows has its own product; above, they are an eighth apart
MIN_GAIN = 0.05  # of the time of few rows, for which it is worth to hold a turned copy

FewRows = Literal["plain", "parted", "turned"]
FEW_ROWS: tuple[FewRows, ...] = ("plain", "parted", "turned")  # the simplest first
FORMS = (*FEW_ROWS, "packed")
Multiply = Callable[[Tensor], Tensor]


class Layout(NamedTuple):
    """`few`: the form for few rows. `packed_from`: rows from which on the packed form is taken, None if never."""

    few: FewRows
    packed_from: int | None

    @property
    def num_copies(self) -> int:
        return (self.few == "turned") + (self.packed_from is not None)

    @property
    def is_as_loaded(self) -> bool:
        return self == ("plain", None)


Shape = tuple[int, int]
# From layers in the order in which a step computes them to the layout of each shape.
Judge = Callable[[Sequence["LaidOutLinear"]], dict[Shape, Layout]]


def lay_out_linears(model: nn.Module, memory_bytes: int, judge: Judge | None = None) -> int:
    """Replaces the forward of float32 linear layers on a CPU by one that takes the fastest form for its rows, while
    the copies fit in `memory_bytes`. Returns how many were replaced. A layer whose forms give other results is left as
    it is. Set the number of threads that decode before.
    """
    modules = [module for module in model.modules() if _can_be_laid_out(module)]
    sample = _sample(modules)
    if 2 * sum(module.weight.nbytes for module in sample) > memory_bytes:
        return 0
    tried = [laid_out for module in sample if (laid_out := _laid_out(module)) is not None]
    layouts = (judge or timed_layouts)(tried)
    del tried
    for shape, layout in layouts.items():
        log.info("%s layers: %s", shape, layout)
    num_replaced = 0
    for module in modules:
        layout = layouts.get(_shape(module))
        if layout is None or layout.is_as_loaded:
            continue
        memory_bytes -= layout.num_copies * module.weight.nbytes
        if memory_bytes < 0:
            break
        laid_out = _laid_out(module, layout)
        if laid_out is not None:
            object.__setattr__(module, "forward", laid_out.forward)
            num_replaced += 1
    return num_replaced


def _can_be_laid_out(module: nn.Module) -> bool:
    if type(module) is not nn.Linear:
        return False
    return module.weight.device.type == "cpu" and module.weight.dtype == torch.float32


def _shape(module: nn.Linear) -> Shape:
    return module.out_features, module.in_features


def _sample(modules: Sequence[nn.Linear]) -> list[nn.Linear]:
    """Enough of the layers to leave every cache behind, and one at least of each shape."""
    sample, num_bytes, seen = [], 0, set()
    for module in modules:
        if num_bytes < SAMPLED_BYTES or _shape(module) not in seen:
            sample.append(module)
            seen.add(_shape(module))
            num_bytes += module.weight.nbytes
    return sample


class LaidOutLinear:
    """The forward of one linear layer, whose weights are there in several layouts until `keep` drops some."""

    def __init__(self, module: nn.Linear, layout: Layout | None = None) -> None:
        """With the copies that the layout needs; with all of them without one."""
        self.in_features, self.shape = module.in_features, _shape(module)
        self._weight = module.weight.detach()
        self._bias = module.bias.detach() if module.bias is not None else None
        self._multiply = torch.ops.mkldnn._linear_pointwise.default
        self._packed: Tensor | None = None
        if layout is None or layout.packed_from is not None:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self._weight, PACKED_FOR_ROWS)
        parts = torch.get_num_threads() if self.shape[0] % torch.get_num_threads() == 0 else 1
        self._parts = self._weight.view(parts, -1, self.in_features).transpose(
            1, 2
        )  # [parts, in, out / parts]
        self._turned: Tensor | None = None
        if layout is None or layout.few == "turned":
            self._turned = self._parts.contiguous()
        self._few: Multiply = self.plain if layout is None else getattr(self, layout.few)
        packed_from = 1 if layout is None else layout.packed_from
        self._from_rows = sys.maxsize if packed_from is None else max(1, packed_from)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features]. Returns [..., out_features]."""
        num_rows = x.numel() // self.in_features
        if num_rows < self._from_rows:
            return self._few(x) if num_rows else self.plain(x)
        num_more = padded_rows(num_rows) - num_rows
        if not num_more:
            return self.packed(x)
        rows = pad(x.reshape(num_rows, -1), (0, 0, 0, num_more))
        return self.packed(rows)[:num_rows].view(*x.shape[:-1], -1)

    def plain(self, x: Tensor) -> Tensor:
        return linear(x, self._weight, self._bias)

    def turned(self, x: Tensor) -> Tensor:
        assert self._turned is not None, "this form was not kept"
        return self._in_parts(x, self._turned)

    def parted(self, x: Tensor) -> Tensor:
        return self._in_parts(x, self._parts)

    def _in_parts(self, x: Tensor, weight: Tensor) -> Tensor:
        """weight: [parts, in, out / parts]."""
        rows = x.reshape(1, -1, self.in_features).expand(len(weight), -1, -1)
        out = torch.bmm(rows, weight).transpose(0, 1).reshape(*x.shape[:-1], -1)
        return out if self._bias is None else out.add_(self._bias)

    def packed(self, x: Tensor) -> Tensor:
        out: Tensor = self._multiply(x, self._packed, self._bias, "none", [], "")
        return out


def padded_rows(num_rows: int) -> int:
    """The next number of rows that has a product of its own: 1 to 16, 18, 20, .. 32, 36, .. 64, 72, .. 128, 144, .."""
    if num_rows <= EXACT_ROWS:
        return num_rows
    step = 1 << ((num_rows - 1).bit_length() - 4)
    return -(-num_rows // step) * step


@torch.inference_mode()
def timed_layouts(layers: Sequence[LaidOutLinear]) -> dict[Shape, Layout]:
    """Times all forms here and now, one layer after the other as in a step: a weight that was read just before would
    still lie in a cache, where another form is fastest."""
    best: dict[tuple[Shape, str, int], float] = {}
    inputs = {
        (rows, layer.in_features): torch.randn(rows, layer.in_features)
        for rows in TIMED_ROWS
        for layer in layers
    }
    began = time.perf_counter()
    for turn in range(NUM_TURNS):
        for rows in TIMED_ROWS:
            for form in FORMS:
                for shape, seconds in _passed(layers, form, rows, inputs).items():
                    key = (shape, form, rows)
                    best[key] = min(best.get(key, seconds), seconds)
        if turn + 1 >= MIN_TURNS and time.perf_counter() - began > MAX_TIMED_S:
            break
    shapes = dict.fromkeys(layer.shape for layer in layers)
    return {
        shape: fastest({form: [best[shape, form, rows] for rows in TIMED_ROWS] for form in FORMS})
        for shape in shapes
    }


def _passed(
    layers: Sequence[LaidOutLinear], form: str, rows: int, inputs: Mapping[tuple[int, int], Tensor]
) -> dict[Shape, float]:
    """Seconds of all layers of a shape together, in one pass over all of them."""
    taken: dict[Shape, float] = {}
    for layer in layers:
        multiply, x = getattr(layer, form), inputs[rows, layer.in_features]
        started = time.perf_counter()
        multiply(x)
        taken[layer.shape] = taken.get(layer.shape, 0.0) + time.perf_counter() - started
    return taken


def fastest(seconds: Mapping[str, Sequence[float]]) -> Layout:
    """What loses least against the fastest form, over all numbers of rows that were timed; the simplest of those that
    lose about the same. seconds: by form, and in it by TIMED_ROWS."""
    quickest = [min(times) for times in zip(*seconds.values(), strict=True)]

    def lost(few: str, turn: int) -> float:
        taken = (*seconds[few][:turn], *seconds["packed"][turn:])
        return sum(one / best - 1.0 for one, best in zip(taken, quickest, strict=True))

    turns = range(len(TIMED_ROWS), -1, -1)
    best: tuple[float, FewRows, int] | None = None
    for few in FEW_ROWS:
        loss, turn = min((lost(few, turn), -turn) for turn in turns)
        if best is None or loss + MIN_GAIN < best[0]:
            best = loss, few, -turn
    assert best is not None
    _, few, turn = best
    return Layout(few if turn else "plain", TIMED_ROWS[turn] if turn < len(TIMED_ROWS) else None)


def _laid_out(module: nn.Linear, layout: Layout | None = None) -> LaidOutLinear | None:
    """None where this build of PyTorch has no such layout, or where it gives other results."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        laid_out = LaidOutLinear(module, layout)
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        log.info("linear layers stay plain: %s", str(error).splitlines()[0])
        return None
    if layout is not None or _agrees(module, laid_out):
        return laid_out
    log.warning("a %s layer gave other results in another layout; it stays plain", _shape(module))
    return None


@torch.inference_mode()
def _agrees(module: nn.Linear, laid_out: LaidOutLinear) -> bool:
    for num_rows in (1, 5):
        x = torch.randn(1, num_rows, module.in_features, generator=torch.Generator().manual_seed(0))
        expected = laid_out.plain(x)
        for form in (laid_out.parted, laid_out.turned, laid_out.packed):
            error = (form(x) - expected).abs().max()
            if not error <= MAX_RELATIVE_ERROR * expected.abs().max().clamp(min=1e-6):
                return False
    return True
