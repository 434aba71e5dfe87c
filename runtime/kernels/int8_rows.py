"""What lies before and behind a product of integers: rows as whole levels, and sums of them as numbers again.

Contract: `runtime.kernels.plain`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.kernels.launch import launch
from runtime.kernels.plain import INT8_LIMIT, LEAST_INT8_ROWS, LEAST_ROW_MAXIMUM

BLOCK = 2048  # values of a row at a time
SCALED_BLOCK = 1024


def int8_levels(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x if x.stride(1) == 1 else x.contiguous()
    num_rows, size = x.shape
    levels = torch.empty(max(num_rows, LEAST_INT8_ROWS), size, dtype=torch.int8, device=x.device)
    steps = torch.empty(num_rows, 1, dtype=torch.float32, device=x.device)
    launch(
        _levels, (len(levels),), x.device,
        x, levels, steps, num_rows, size, x.stride(0),
        LIMIT=INT8_LIMIT, LEAST=LEAST_ROW_MAXIMUM, BLOCK=BLOCK,
        num_warps=8,
    )  # fmt: skip
    return levels, steps


def int8_scaled(
    product: Tensor, steps: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    num_rows, size = len(steps), product.shape[1]
    out = torch.empty(num_rows, size, dtype=dtype, device=product.device)
    launch(
        _scaled, (num_rows, triton.cdiv(size, SCALED_BLOCK)), product.device,
        product, steps, scale, scale if bias is None else bias, out, size, product.stride(0),
        HAS_BIAS=bias is not None, BLOCK=SCALED_BLOCK,
        num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_rows"])  # or each number of rows is compiled anew
def _levels(
    x: tl.tensor,
    levels: tl.tensor,
    steps: tl.tensor,
    num_rows: int,
    size: int,
    stride: int,
    LIMIT: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = x + row * stride + column
    largest = tl.zeros([BLOCK], tl.float32)
    is_none = tl.zeros([BLOCK], tl.int32)
    for done in range(0, size, BLOCK):
        inside = (column + done < size) & (row < num_rows)
        some = tl.load(at + done, mask=inside, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(some))
        is_none = is_none | (some != some).to(tl.int32)
    step = tl.maximum(tl.max(largest, 0), LEAST) / LIMIT
    # A maximum passes over what is no number.
    step = tl.where(tl.max(is_none, 0) > 0, float("nan"), step)
    tl.store(steps + row, step, mask=row < num_rows)
    for done in range(0, size, BLOCK):
        is_column = column + done < size
        some = tl.load(at + done, mask=is_column & (row < num_rows), other=0.0).to(tl.float32)
        level = tl.floor(some * (1.0 / step) + 0.5)
        tl.store(levels + row * size + column + done, level.to(tl.int8), mask=is_column)


@triton.jit
def _scaled(
    product: tl.tensor,
    steps: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    size: int,
    stride: int,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    of_column = tl.load(scale + column, mask=inside, other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    whole = tl.load(product + row * stride + column, mask=inside, other=0)
    value = whole.to(tl.float32) * of_column * tl.load(steps + row)
    if HAS_BIAS:
        value += tl.load(bias + column, mask=inside, other=0.0)
    tl.store(out + row * size + column, value.to(out.dtype.element_ty), mask=inside)
