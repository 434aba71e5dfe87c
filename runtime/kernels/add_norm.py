"""Residual added and normed in one pass.

Contract: `runtime.kernels.plain`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    num_rows, hidden = x.shape
    out = torch.empty(num_rows, hidden, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(hidden)
    added = x if delta is None else delta
    _add_norm[(num_rows,)](
        x, added, weight, out, x.stride(0), added.stride(0), eps,
        HIDDEN=hidden, HAS_DELTA=delta is not None, BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )  # fmt: skip
    return out


@triton.jit
def _add_norm(
    x: tl.tensor,
    delta: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    x_stride: int,
    delta_stride: int,
    eps: float,
    HIDDEN: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < HIDDEN
    at = x + row * x_stride + column
    whole = tl.load(at, mask=inside, other=0.0)
    if HAS_DELTA:
        added = tl.load(delta + row * delta_stride + column, mask=inside, other=0.0)
        # The norm is that of the sum as it is kept, rounded.
        whole = (whole.to(tl.float32) + added.to(tl.float32)).to(whole.dtype)
        tl.store(at, whole, mask=inside)
    wide = whole.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / HIDDEN + eps)
    normal = wide * scale * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * HIDDEN + column, normal.to(whole.dtype), mask=inside)
