"""The weights of a model's linear layers in other formats, prepared beside the loaded ones and swapped in.

A `WeightSet` holds the forward of every linear layer in one format; installing it swaps references and takes
microseconds. The loaded weights are never dropped: every other format is made from them. Embeddings, norms
and biases are shared by all sets, and so are keys and values: a request goes on across a swap.

Measured on one Zen 4 core (AVX-512 with BF16 and VNNI), µs a layer at 1, 8, 16 and 256 rows:

    weight        float32 packed          bfloat16 packed        int8
    704 x 256     40 /  64 /  69 /  962   57 /  73 /  65 /  528  127 / 103 /  - / 742
    4096 x 256    81 / 195 / 361 / 5692   83 / 112 / 213 / 3450  100 / 387 / 181 /  -
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from runtime.kernels import PLAIN, Kernels
from runtime.kernels.plain import INT8_LIMIT, row_steps
from runtime.linear import PACKED_FOR_ROWS

log = logging.getLogger(__name__)

Forward = Callable[[Tensor], Tensor]
LevelsOf = Callable[[Tensor], tuple[Tensor, Tensor]]

FEW_ROWS = 256  # of a weight
# Of a weight that are widened at a time: what serves beside waits for no long kernel, nor for the driver to find
# gigabytes, and what is written is found in the cache of a GPU.
WIDENED_VALUES = 2**23
# Relative to the largest value of the specification's result: other orders of summation, one rounding to bfloat16
# on the way out, a value between two levels that a fused multiplication rounds the other way.
MAX_ERROR = {"bfloat16": 2e-2, "int8": 5e-3}


def formats_from(loaded: torch.dtype) -> tuple[str, ...]:
    """The formats that weights of this type can be served in, as loaded first. Never a finer one: it would say
    nothing more and take more memory."""
    name = str(loaded).removeprefix("torch.")
    return {
        "float32": ("float32", "bfloat16", "int8"),
        "bfloat16": ("bfloat16", "int8"),
        "float16": ("float16", "int8"),
    }.get(name, (name,))


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight: [out, in]. Returns int8 [out, in] and float32 scales [out] with weight ≈ int8 * scale."""
    weight = weight.detach()
    levels, scale = (
        torch.empty_like(weight, dtype=torch.int8),
        weight.new_empty(len(weight), dtype=torch.float32),
    )
    for part, level, step in _in_parts(weight, levels, scale):
        wide = part.float()
        torch.div(wide.abs().amax(dim=1).clamp_(min=1e-12), INT8_LIMIT, out=step)
        level.copy_((wide / step[:, None]).round_())
    return levels, scale


def linear_bfloat16_plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The specification of bfloat16: inputs and weights rounded, the sum in float32. Returns x's type."""
    out = linear(x.bfloat16().float(), weight.bfloat16().float())
    return (out if bias is None else out + bias.float()).to(x.dtype)


def linear_int8_plain(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The specification of int8: each row of x and each row of the weight is rounded to 255 levels of its own,
    so that no row depends on its company. weight: int8 [out, in]; scale: [out]. Returns x's type."""
    step = row_steps(x.float())
    rounded = (x.float() / step + 0.5).floor()
    restored = rounded * step
    out = restored.new_empty(*x.shape[:-1], len(weight))
    done = 0
    for part, of_part in _in_parts(weight, scale):
        out[..., done : done + len(part)] = linear(restored, part.float() * of_part[:, None])
        done += len(part)
    return (out if bias is None else out.add_(bias.float())).to(x.dtype)


def _in_parts(weight: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of so many rows of each that WIDENED_VALUES of the weight are in them."""
    num_rows = max(1, WIDENED_VALUES // max(1, weight.shape[1]))
    return zip(*(one.split(num_rows) for one in (weight, *others)), strict=True)


def unsigned_levels(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: [T, in]. Returns uint8 [T, in], levels with 128 added, and their widths, [T, 1]."""
    wide = x.float()
    step = row_steps(wide)
    half = torch.full((), 128.5, device=x.device)
    # Truncating what is positive is flooring it.
    return torch.addcmul(half, wide, step.reciprocal()).to(torch.uint8), step


class Form(Protocol):
    """A linear layer's weight in one format. `plain` is its specification."""

    nbytes: int

    def keep_fastest(self) -> None: ...

    def drop_fast(self) -> None: ...

    def forward(self, x: Tensor) -> Tensor: ...

    def plain(self, x: Tensor) -> Tensor: ...


class BFloat16Form:
    def __init__(self, module: nn.Linear) -> None:
        self._out_features = module.out_features
        self._weight = module.weight.detach().bfloat16()
        self._bias = module.bias.detach() if module.bias is not None else None
        self._packed: Tensor | None = None
        self.nbytes = self._weight.nbytes
        if self._weight.device.type == "cpu" and torch.backends.mkldnn.is_available():
            packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(self._weight, PACKED_FOR_ROWS)
            self._packed = packed

    def keep_fastest(self) -> None:
        if self._packed is not None:
            self._weight = self._weight.new_empty(0)

    def drop_fast(self) -> None:
        self._packed = None

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features]. Returns [..., out_features] of x's type."""
        if x.numel() == 0:
            return x.new_empty((*x.shape[:-1], self._out_features))
        rounded = x.bfloat16()
        out: Tensor
        if self._packed is not None:
            out = torch.ops.mkldnn._linear_pointwise.default(rounded, self._packed, None, "none", [], "")
        else:
            out = linear(rounded, self._weight)
        out = out.to(x.dtype)
        return out if self._bias is None else out.add_(self._bias)

    def plain(self, x: Tensor) -> Tensor:
        return linear_bfloat16_plain(x, self._weight, self._bias)


class Rounding:
    """Rows as whole levels, for the layers of one model. Layers that read the same rows (queries, keys and values)
    share one rounding: nobody writes into what a norm has put out."""

    def __init__(self) -> None:
        self._x: Tensor | None = None
        self._levels_of: LevelsOf | None = None
        self._last: tuple[Tensor, Tensor] | None = None

    def of(self, x: Tensor, levels_of: LevelsOf) -> tuple[Tensor, Tensor]:
        """x: [..., in]. Returns what `levels_of` gives for its rows."""
        if x is not self._x or levels_of is not self._levels_of or self._last is None:
            self._x, self._levels_of = x, levels_of
            self._last = levels_of(x.reshape(-1, x.shape[-1]))
        return self._last

    def forget(self) -> None:
        self._x = self._last = None


class Int8Form:
    """Dynamic per row, per output channel; multiplied in integers by oneDNN on a CPU and by cuBLAS on CUDA."""

    def __init__(self, module: nn.Linear, rounding: Rounding, kernels: Kernels) -> None:
        self._out_features, self._rounding, self._kernels = module.out_features, rounding, kernels
        self._weight, self._scale = quantised(module.weight)
        self._bias = module.bias.detach().float() if module.bias is not None else None
        self._packed: Tensor | None = None
        self._integers = True
        self.nbytes = self._weight.nbytes + self._scale.nbytes
        if self._weight.device.type == "cpu":
            self._zeros = torch.zeros(len(self._scale), dtype=torch.int32)
            self._packed = _packed_int8(self._weight)

    def keep_fastest(self) -> None:
        if self._packed is not None:
            self._weight = self._weight.new_empty(0)

    def drop_fast(self) -> None:
        self._packed, self._integers = None, False

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features]. Returns [..., out_features] of x's type."""
        if x.numel() == 0:
            return x.new_empty((*x.shape[:-1], self._out_features))
        if not self._integers:
            return self.plain(x)
        out = self._multiplied(x) if self._packed is None else self._multiplied_packed(x, self._packed)
        return out.view(*x.shape[:-1], self._out_features)

    def _multiplied(self, x: Tensor) -> Tensor:
        """Returns [rows, out_features] of x's type."""
        levels, step = self._rounding.of(x, self._kernels.int8_levels)
        product = torch._int_mm(levels, self._weight.t())
        return self._kernels.int8_scaled(product, step, self._scale, self._bias, x.dtype)

    def _multiplied_packed(self, x: Tensor, packed: Tensor) -> Tensor:
        """The same by oneDNN. Unsigned: signed rows take a path there that is a thousand times slower."""
        levels, step = self._rounding.of(x, unsigned_levels)
        out: Tensor = torch.ops.onednn.qlinear_pointwise.default(
            levels, 1.0, 128, packed, self._scale, self._zeros, None, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip
        out = out.mul_(step) if self._bias is None else torch.addcmul(self._bias, out, step)
        return out.to(x.dtype)

    def plain(self, x: Tensor) -> Tensor:
        return linear_int8_plain(x, self._weight, self._scale, self._bias)


@dataclass(frozen=True)
class WeightSet:
    """The forwards of all linear layers in one format. `nbytes`: what it takes beside the loaded weights."""

    format: str
    forwards: tuple[tuple[nn.Module, Forward], ...]
    nbytes: int

    @torch.inference_mode()
    def wake(self, row_counts: Sequence[int]) -> None:
        """Multiplies so many rows in one layer of each shape: a library loads what it chooses by their number."""
        by_shape = {module.weight.shape: (module, forward) for module, forward in self.forwards}
        for module, forward in by_shape.values():
            for num_rows in row_counts:
                forward(module.weight.new_zeros(num_rows, module.in_features))

    @classmethod
    def of_installed(cls, model: nn.Module, format: str) -> "WeightSet":
        """What the model computes with now."""
        forwards = tuple((module, module.forward) for module in linear_layers(model))
        return cls(format, forwards, 0)

    def install(self) -> None:
        """Swaps references. Only between two steps."""
        for module, forward in self.forwards:
            object.__setattr__(module, "forward", forward)


def linear_layers(model: nn.Module) -> Iterator[nn.Linear]:
    return (module for module in model.modules() if type(module) is nn.Linear)


def wanted_bytes(model: nn.Module, format: str) -> int:
    """What a set of this format will take, known before it is made."""
    itemsize = {"bfloat16": 2, "int8": 1}[format]
    return sum(module.weight.numel() * itemsize + 4 * module.out_features for module in linear_layers(model))


@torch.inference_mode()
def prepared(
    model: nn.Module, format: str, after_each: Callable[[], None] = lambda: None, kernels: Kernels = PLAIN
) -> WeightSet:
    """Makes every layer's weight in the format, from the loaded one. `after_each` is called between two layers.
    `kernels`: of the device on which the model lies.

    A layer whose fast result is not that of the specification is served by the specification.

    Raises:
        RuntimeError: out of memory, as PyTorch says it.
    """
    rounding = Rounding()
    made: dict[int, Form] = {}  # layers that share one weight share its form
    forwards: list[tuple[nn.Module, Forward]] = []
    for module in linear_layers(model):
        key = module.weight.data_ptr()
        if key not in made or module.bias is not None:
            form = _form_of(module, format, rounding, kernels)
            if _agrees(form, module, MAX_ERROR[format]):
                form.keep_fastest()
            else:
                log.warning(
                    "a %s layer computes otherwise in %s: the plain form serves",
                    tuple(module.weight.shape),
                    format,
                )
                form.drop_fast()
            made[key] = form
        forwards.append((module, made[key].forward))
        after_each()
    rounding.forget()
    return WeightSet(format, tuple(forwards), sum(form.nbytes for form in made.values()))


@torch.inference_mode()
def wake_preparations(model: nn.Module, formats: Sequence[str], kernels: Kernels = PLAIN) -> None:
    """Launches what `prepared` does, for a few rows of one layer: a GPU loads it when it is launched for the first
    time, and whatever others launch waits for that. To be called in a thread like those that prepare: libraries begin
    anew in each. Raises RuntimeError where there is no memory."""
    layer = next(linear_layers(model), None)
    if layer is None:
        return
    rows = layer.weight.detach()[:FEW_ROWS]
    few = nn.Linear(layer.in_features, len(rows), bias=False, device="meta")
    few.weight = nn.Parameter(rows, requires_grad=False)
    for format in formats:
        _agrees(_form_of(few, format, Rounding(), kernels), few, MAX_ERROR[format])


def _form_of(module: nn.Linear, format: str, rounding: Rounding, kernels: Kernels) -> Form:
    return Int8Form(module, rounding, kernels) if format == "int8" else BFloat16Form(module)


def _agrees(form: Form, module: nn.Linear, limit: float) -> bool:
    weight = module.weight
    generator = torch.Generator().manual_seed(0)
    # Integers of few rows are multiplied alike on CUDA, where each check holds up those who are served.
    for num_rows in (5,) if weight.is_cuda and isinstance(form, Int8Form) else (1, 5):
        x = torch.randn(num_rows, module.in_features, generator=generator).to(weight.device, weight.dtype)
        expected = form.plain(x)
        try:
            error = (form.forward(x) - expected).abs().max()
        # A shape that the kernel does not take; of a compiler or a driver, anything.
        except Exception as refused:
            log.info("%s", str(refused).partition("\n")[0])
            return False
        if not error <= max(limit, 4 * torch.finfo(x.dtype).eps) * expected.abs().max().clamp(min=1e-6):
            return False
    return True


def _packed_int8(weight: Tensor) -> Tensor | None:
    """None where this build of PyTorch has no such multiplication."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        packed: Tensor = torch.ops.onednn.qlinear_prepack(weight, None)
        return packed
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        log.info("int8 layers are not packed: %s", str(error).splitlines()[0])
        return None
