"""Residual added and normed in one pass.

Contract: `runtime.kernels.plain`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.kernels.early_start import early_start


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    num_rows, hidden = x.shape
    out = torch.empty(num_rows, hidden, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(hidden)
    added = x if delta is None else delta
    num_parts = 0 if delta is None else len(delta) if delta.ndim == 3 else 1
    _add_norm[(num_rows,)](
        x, added, weight, out, x.stride(0), added.stride(-2), added.stride(0), eps,
        HIDDEN=hidden, NUM_PARTS=num_parts, BLOCK=block,
        num_warps=min(16, max(1, block // 512)), **early_start(x),
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
    part_stride: int,
    eps: float,
    HIDDEN: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < HIDDEN
    scale_of = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = x + row * x_stride + column
    whole = tl.load(at, mask=inside, other=0.0)
    if NUM_PARTS > 0:
        added = tl.zeros([BLOCK], tl.float32)
        for part in tl.static_range(NUM_PARTS):
            part_at = delta + part * part_stride + row * delta_stride + column
            added += tl.load(part_at, mask=inside, other=0.0).to(tl.float32)
        # The norm is that of the sum as it is kept, rounded.
        whole = (whole.to(tl.float32) + added).to(whole.dtype)
        tl.store(at, whole, mask=inside)
    wide = whole.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / HIDDEN + eps)
    tl.store(out + row * HIDDEN + column, (wide * scale * scale_of).to(whole.dtype), mask=inside)
