"""Linear layers of a CPU model with their weights laid out as the number of rows wants them.

    plain    as loaded, [out, in]
    turned   [in, out]: a matrix times one row reads whole vectors of the output
    packed   oneDNN's blocks, for several rows

Which is faster from how many rows on depends on the CPU, its libraries and the shape, so it is timed. Measured in
float32, plain against packed, µs a layer:

    two cores of     weight       1 row        4 rows       16 rows      32 rows
    Zen 4            1408 x 256     42 / 77     220 / 113*    350 / 215    367 / 255      * 8 rows
    Sapphire Rapids  1408 x 256     23 / 30      32 / 41      155 / 109    148 / 102
                      896 x 4864   503 / 543   1047 / 589    1601 / 1058  2375 / 1803

One row on one Zen 4 core, beyond its caches, GB/s plain / turned / packed: 9728 x 896 13.2 / 19.6 / 13.2, 151936 x 896
13.9 / 22.4 / 16.6, 896 x 4864 17.7 / 15.5 / 12.7. The copies stand beside the original, so they are made only where
memory is plentiful.

oneDNN compiles a product anew for each number of rows: 0.6 ms, and half a megabyte that stays in two caches of 1024
products each. With steps of all sizes an engine grew by 0.9 GB, and compiled at every other step. So rows are padded
to one of few numbers, and an engine keeps CACHED_PRODUCTS (runtime/engine.py) at most.
"""

import logging
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

log = logging.getLogger(__name__)

PACKED_FOR_ROWS = 16  # the layout chosen for 16 rows was best or equal at every other number too
MAX_RELATIVE_ERROR = 1e-4  # float32, another order of summation
TIMED_ROWS = (1, 2, 4, 8, 16, 32)
NUM_TURNS = 5  # each form is timed so often, in turns; the fastest counts
MIN_TURNS = 2  # the first call of a form for a number of rows makes what later ones use again
MAX_TIMED_S = 0.25  # a shape; further turns are left out when they are passed

EXACT_ROWS = 16  # up to here each number of rows has its own product; above, they are an eighth apart
MIN_GAIN = 0.05  # of the time of few rows, for which it is worth to hold a turned copy

Multiply = Callable[[Tensor], Tensor]


class Layout(NamedTuple):
    """`turned`: whether few rows take the turned form rather than the plain one. `packed_from`: rows from which on the
    packed form is taken, None if never."""

    turned: bool
    packed_from: int | None

    @property
    def num_copies(self) -> int:
        return self.turned + (self.packed_from is not None)


Judge = Callable[["LaidOutLinear"], Layout]


def lay_out_linears(model: nn.Module, memory_bytes: int, judge: Judge | None = None) -> int:
    """Replaces the forward of float32 linear layers on a CPU by one that takes the fastest form for its rows, while
    the copies fit in `memory_bytes`. Returns how many were replaced. A layer whose forms give other results is left as
    it is. Set the number of threads that decode before.
    """
    judge = judge or timed_layout
    num_replaced = 0
    judged: dict[tuple[int, ...], Layout] = {}
    for module in model.modules():
        if (
            type(module) is not nn.Linear
            or module.weight.device.type != "cpu"
            or module.weight.dtype != torch.float32
        ):
            continue
        shape = tuple(module.weight.shape)
        if shape in judged and not judged[shape].num_copies:
            continue
        if memory_bytes < module.weight.nbytes * (judged[shape].num_copies if shape in judged else 2):
            break
        laid_out = _laid_out(module)
        if laid_out is None:
            break
        if not _agrees(module, laid_out):
            log.warning("a %s layer gave other results in another layout; it stays plain", shape)
            continue
        if shape not in judged:
            judged[shape] = judge(laid_out)
            log.info("%s layers: %s", shape, judged[shape])
        layout = judged[shape]
        if layout.num_copies:
            laid_out.keep(layout)
            memory_bytes -= layout.num_copies * module.weight.nbytes
            object.__setattr__(module, "forward", laid_out.forward)
            num_replaced += 1
    return num_replaced


class LaidOutLinear:
    """The forward of one linear layer, whose weights are there in several layouts until `keep` drops some."""

    def __init__(self, module: nn.Linear) -> None:
        self.in_features = module.in_features
        self._weight = module.weight.detach()
        self._bias = module.bias.detach() if module.bias is not None else None
        self._multiply = torch.ops.mkldnn._linear_pointwise.default
        self._packed: Tensor | None = torch.ops.mkldnn._reorder_linear_weight(self._weight, PACKED_FOR_ROWS)
        self._turned: Tensor | None = self._weight.t().contiguous()
        self._few, self._from_rows = self.plain, 1

    def keep(self, layout: Layout) -> None:
        if not layout.turned:
            self._turned = None
        if layout.packed_from is None:
            self._packed = None
        self._few = self.turned if layout.turned else self.plain
        self._from_rows = sys.maxsize if layout.packed_from is None else max(1, layout.packed_from)

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
        out = torch.matmul(x, self._turned)
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
def timed_layout(layer: LaidOutLinear) -> Layout:
    """Times all forms here and now."""
    forms: tuple[Multiply, ...] = (layer.plain, layer.turned, layer.packed)
    best = {(at, rows): float("inf") for rows in TIMED_ROWS for at in range(len(forms))}
    inputs = {rows: torch.randn(rows, layer.in_features) for rows in TIMED_ROWS}
    began = time.perf_counter()
    for turn in range(NUM_TURNS):
        for at, rows in best:
            started = time.perf_counter()
            forms[at](inputs[rows])
            best[at, rows] = min(best[at, rows], time.perf_counter() - started)
        if turn + 1 >= MIN_TURNS and time.perf_counter() - began > MAX_TIMED_S:
            break
    return fastest(*([best[at, rows] for rows in TIMED_ROWS] for at in range(len(forms))))


def fastest(plain_s: Sequence[float], turned_s: Sequence[float], packed_s: Sequence[float]) -> Layout:
    """What loses least against the fastest form, over all numbers of rows that were timed. Seconds by TIMED_ROWS."""
    quickest = [min(times) for times in zip(plain_s, turned_s, packed_s, strict=True)]

    def lost(few_s: Sequence[float], turn: int) -> float:
        taken = (*few_s[:turn], *packed_s[turn:])
        return sum(one / best - 1.0 for one, best in zip(taken, quickest, strict=True))

    turns = range(len(TIMED_ROWS) + 1)
    plain = min((lost(plain_s, turn), -turn) for turn in turns)
    turned = min((lost(turned_s, turn), -turn) for turn in turns)
    is_turned = turned[0] + MIN_GAIN < plain[0]
    turn = -(turned if is_turned else plain)[1]
    return Layout(is_turned, TIMED_ROWS[turn] if turn < len(TIMED_ROWS) else None)


def _laid_out(module: nn.Linear) -> LaidOutLinear | None:
    """None where this build of PyTorch has no such layout."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        return LaidOutLinear(module)
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        log.info("linear layers stay plain: %s", str(error).splitlines()[0])
        return None


@torch.inference_mode()
def _agrees(module: nn.Linear, laid_out: LaidOutLinear) -> bool:
    for num_rows in (1, 5):
        x = torch.randn(1, num_rows, module.in_features, generator=torch.Generator().manual_seed(0))
        expected = linear(x, module.weight, module.bias)
        for form in (laid_out.turned, laid_out.packed):
            error = (form(x) - expected).abs().max()
            if not error <= MAX_RELATIVE_ERROR * expected.abs().max().clamp(min=1e-6):
                return False
    return True
