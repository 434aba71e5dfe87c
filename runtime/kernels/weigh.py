"""What experts gave for each token, weighed and added up in fixed order: no atomic additions, the same bits always.

Contract: `runtime.kernels.plain`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512


def weigh(
    found: Tensor, weights: Tensor, places: Tensor | None = None, shared: Tensor | None = None
) -> Tensor:
    (num_tokens, top_k), hidden = weights.shape, found.shape[1]
    out = torch.empty(num_tokens, hidden, dtype=found.dtype, device=found.device)
    _weigh[(num_tokens, triton.cdiv(hidden, BLOCK))](
        found, weights, weights if places is None else places, found if shared is None else shared, out,
        0 if shared is None else shared.stride(0),
        TOP_K=top_k, SLOTS=top_k if places is not None else len(found) // num_tokens, HIDDEN=hidden,
        HAS_PLACES=places is not None, HAS_SHARED=shared is not None, BLOCK=BLOCK,
        num_warps=4,
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
    SLOTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    HAS_PLACES: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < HIDDEN
    acc = tl.zeros([BLOCK], tl.float32)
    for slot in tl.static_range(SLOTS):
        row = token * SLOTS + slot
        if HAS_PLACES:
            row = tl.load(places + row).to(tl.int64)
        value = tl.load(found + row * HIDDEN + column, mask=inside, other=0.0).to(tl.float32)
        if slot < TOP_K:
            value *= tl.load(weights + token * TOP_K + slot).to(tl.float32)
        acc += value
    if HAS_SHARED:
        acc += tl.load(shared + token * shared_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * HIDDEN + column, acc.to(out.dtype.element_ty), mask=inside)
