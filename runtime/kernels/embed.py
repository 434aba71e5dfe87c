"""Rows of the embedding, of tokens that may have been drawn a moment ago and were never on the host.

Contract: `runtime.kernels.plain`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.kernels.early_start import early_start

BLOCK = 1024


def embed(token_ids: Tensor, drawn: Tensor, table: Tensor) -> Tensor:
    num_rows, hidden = len(token_ids), table.shape[1]
    out = torch.empty(num_rows, hidden, dtype=table.dtype, device=table.device)
    _embed[(num_rows, triton.cdiv(hidden, BLOCK))](
        token_ids,
        drawn,
        table,
        out,
        table.stride(0),
        HIDDEN=hidden,
        BLOCK=BLOCK,
        num_warps=4,
        **early_start(out),
    )
    return out


@triton.jit
def _embed(
    token_ids: tl.tensor,
    drawn: tl.tensor,
    table: tl.tensor,
    out: tl.tensor,
    stride: int,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.load(token_ids + row)
    if token < 0:
        token = tl.load(drawn - 1 - token)
    inside = column < HIDDEN
    found = tl.load(table + token * stride + column, mask=inside, other=0.0)
    tl.store(out + row * HIDDEN + column, found, mask=inside)
