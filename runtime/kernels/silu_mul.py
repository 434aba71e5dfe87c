"""Gate and up of an MLP in one pass.

Contract: `runtime.kernels.plain`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.kernels.early_start import early_start

BLOCK = 1024


def silu_mul(gate_up: Tensor) -> Tensor:
    num_rows, size = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty(num_rows, size, dtype=gate_up.dtype, device=gate_up.device)
    grid = (num_rows, triton.cdiv(size, BLOCK))
    _silu_mul[grid](gate_up, out, gate_up.stride(0), SIZE=size, BLOCK=BLOCK, num_warps=4, **early_start(out))
    return out


@triton.jit
def _silu_mul(
    gate_up: tl.tensor,
    out: tl.tensor,
    stride: int,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    gate = tl.load(gate_up + row * stride + column, mask=inside, other=0.0)
    up = tl.load(gate_up + row * stride + SIZE + column, mask=inside, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    value = wide / (1.0 + tl.exp(-wide)) * up
    tl.store(out + row * SIZE + column, value.to(gate.dtype), mask=inside)
