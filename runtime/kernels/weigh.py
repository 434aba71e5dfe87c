"""What experts gave for each token, weighed and added up in fixed order: no atomic additions, the same bits always.

Contract: `runtime.kernels.plain_experts`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.kernels.early_start import early_start

BLOCK = 512


def weigh(found: Tensor, weights: Tensor, places: Tensor, shared: Tensor | None = None) -> Tensor:
    (num_tokens, top_k), hidden = weights.shape, found.shape[1]
    out = torch.empty(num_tokens, hidden, dtype=found.dtype, device=found.device)
    _weigh[(num_tokens, triton.cdiv(hidden, BLOCK))](
        found, weights, places, found if shared is None else shared, out, 0 if shared is None else shared.stride(0),
        TOP_K=top_k, HIDDEN=hidden, HAS_SHARED=shared is not None, BLOCK=BLOCK,
        num_warps=4, **early_start(out),
    )  # fmt: skip
    return out


@triton.jit
def _weigh(
    found: tl.tensor,
    weights: tl.tensor,
    places: tl.tensor,
    shared: tl.tensor,
    out: tl.tensor,
    shared_stride: int,
    TOP_K: tl.constexpr,
    HIDDEN: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < HIDDEN
    acc = tl.zeros([BLOCK], tl.float32)
    for slot in tl.static_range(TOP_K):
        row = tl.load(places + token * TOP_K + slot).to(tl.int64)
        value = tl.load(found + row * HIDDEN + column, mask=inside, other=0.0).to(tl.float32)
        acc += value * tl.load(weights + token * TOP_K + slot).to(tl.float32)
    if HAS_SHARED:
        acc += tl.load(shared + token * shared_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * HIDDEN + column, acc.to(out.dtype.element_ty), mask=inside)
