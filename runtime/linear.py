"""Linear layers of a CPU model with weights laid out for batches.

oneDNN multiplies several rows faster when the weights are stored in its own blocked layout; how many rows it takes
depends on the CPU and on the shape, so it is timed. Measured in float32, plain against packed, µs a layer:

    two cores of     weight       1 row        4 rows       16 rows      32 rows
    Zen 4            1408 x 256     42 / 77     220 / 113*    350 / 215    367 / 255      * 8 rows
    Sapphire Rapids  1408 x 256     23 / 30      32 / 41      155 / 109    148 / 102
                      896 x 4864   503 / 543   1047 / 589    1601 / 1058  2375 / 1803

The packed copy stands beside the original, so it is made only where memory is plentiful.

oneDNN compiles a product anew for each number of rows: 0.6 ms, and half a megabyte that stays in two caches of 1024
products each. With steps of all sizes an engine grew by 0.9 GB, and compiled at every other step. So rows are padded
to one of few numbers, and an engine keeps CACHED_PRODUCTS (runtime/engine.py) at most.
"""

import logging
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

log = logging.getLogger(__name__)

PACKED_FOR_ROWS = 16  # the layout chosen for 16 rows was best or equal at every other number too
MAX_RELATIVE_ERROR = 1e-4  # float32, another order of summation
TIMED_ROWS = (1, 2, 4, 8, 16, 32)
NUM_TURNS = 5  # each form is timed so often, in turns; the fastest counts
EXACT_ROWS = 16  # up to here each number of rows has its own product; above, they are an eighth apart
MAX_TIMED_S = 0.25  # a shape; later turns are left out when they are passed

Multiply = Callable[[Tensor], Tensor]
# From how many rows on the packed form of (the plain one, the packed one) is used; None if never.
Judge = Callable[[Multiply, Multiply, int], int | None]


def pack_linears(model: nn.Module, memory_bytes: int, judge: Judge | None = None) -> int:
    """Replaces the forward of float32 linear layers on a CPU by one that takes the packed weights for as many rows as
    make it faster, while the copies fit in `memory_bytes`. Returns how many were replaced. A layer whose packed
    result differs is left as it is. Set the number of threads that decode before.
    """
    judge = judge or packed_from
    num_packed = 0
    judged: dict[tuple[int, ...], int | None] = {}
    for module in model.modules():
        if (
            type(module) is not nn.Linear
            or module.weight.device.type != "cpu"
            or module.weight.dtype != torch.float32
        ):
            continue
        shape = tuple(module.weight.shape)
        if shape in judged and judged[shape] is None:
            continue
        if memory_bytes < module.weight.nbytes:
            break
        packed = _packed(module)
        if packed is None:
            break
        if not _agrees(module, packed):
            log.warning("a %s layer gave other results when packed; it stays plain", shape)
            continue
        if shape not in judged:
            judged[shape] = judge(packed.plain, packed.packed, module.in_features)
            log.info("%s layers are packed from %s rows on", shape, judged[shape])
        num_rows = judged[shape]
        if num_rows is not None:
            packed.from_rows = num_rows
            memory_bytes -= module.weight.nbytes
            object.__setattr__(module, "forward", packed.forward)
            num_packed += 1
    return num_packed


class PackedLinear:
    """The forward of one linear layer: packed weights from `from_rows` rows on, plain ones below."""

    def __init__(self, module: nn.Linear) -> None:
        self.from_rows = 1
        self._multiply = torch.ops.mkldnn._linear_pointwise.default
        self._weight = module.weight.detach()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(self._weight, PACKED_FOR_ROWS)
        self._bias = module.bias.detach() if module.bias is not None else None
        self._in_features = module.in_features

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features]. Returns [..., out_features]."""
        num_rows = x.numel() // self._in_features
        if num_rows < max(1, self.from_rows):
            return self.plain(x)
        num_more = padded_rows(num_rows) - num_rows
        if not num_more:
            return self.packed(x)
        rows = pad(x.reshape(num_rows, -1), (0, 0, 0, num_more))
        return self.packed(rows)[:num_rows].view(*x.shape[:-1], -1)

    def plain(self, x: Tensor) -> Tensor:
        return linear(x, self._weight, self._bias)

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
def packed_from(plain: Multiply, packed: Multiply, in_features: int) -> int | None:
    """Times both forms here and now."""
    best = {(form, rows): float("inf") for form in (plain, packed) for rows in TIMED_ROWS}
    inputs = {rows: torch.randn(rows, in_features) for rows in TIMED_ROWS}
    began = time.perf_counter()
    for _ in range(NUM_TURNS):
        for form, rows in best:
            started = time.perf_counter()
            form(inputs[rows])
            best[form, rows] = min(best[form, rows], time.perf_counter() - started)
        if time.perf_counter() - began > MAX_TIMED_S:
            break
    return turning_point(
        [best[plain, rows] for rows in TIMED_ROWS], [best[packed, rows] for rows in TIMED_ROWS]
    )


def turning_point(plain_s: Sequence[float], packed_s: Sequence[float]) -> int | None:
    """The number of rows from which on the packed form loses least against the faster of both, over all that were
    timed. `plain_s`, `packed_s`: seconds by TIMED_ROWS. None where that is never."""
    ratios = [packed / plain for plain, packed in zip(plain_s, packed_s, strict=True)]

    def lost(turn: int) -> float:
        below = sum(max(0.0, 1.0 / ratio - 1.0) for ratio in ratios[:turn])
        return below + sum(max(0.0, ratio - 1.0) for ratio in ratios[turn:])

    turn = min(range(len(ratios) + 1), key=lambda at: (lost(at), -at))
    return TIMED_ROWS[turn] if turn < len(ratios) else None


def _packed(module: nn.Linear) -> PackedLinear | None:
    """None where this build of PyTorch has no such layout."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        return PackedLinear(module)
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        log.info("linear layers stay plain: %s", str(error).splitlines()[0])
        return None


@torch.inference_mode()
def _agrees(module: nn.Linear, packed: PackedLinear) -> bool:
    for num_rows in (1, 5):
        x = torch.randn(1, num_rows, module.in_features, generator=torch.Generator().manual_seed(0))
        expected = linear(x, module.weight, module.bias)
        error = (packed.packed(x) - expected).abs().max()
        if not error <= MAX_RELATIVE_ERROR * expected.abs().max().clamp(min=1e-6):
            return False
    return True
