"""The likeliest token of each row, by many programs a row: one alone reads 128,000 logits in 27 us (H200).

Contract: `runtime.kernels.plain`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.kernels.launch import launch

BLOCK = 4096


def greedy(logits: Tensor) -> Tensor:
    best, at = best_of_blocks(logits)
    num_rows, num_blocks = best.shape
    out = torch.empty(2, num_rows, dtype=torch.int64, device=logits.device)
    launch(
        _best_of_row, (num_rows,), out.device,
        best, at, out, num_rows,
        NUM_BLOCKS=num_blocks, BLOCK=triton.next_power_of_2(num_blocks), num_warps=1,
    )  # fmt: skip
    return out


def best_of_blocks(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The highest logit of each BLOCK of a row, float32 [rows, blocks], infinity for NaN, and its token, int32."""
    (num_rows, vocab_size), device = logits.shape, logits.device
    num_blocks = triton.cdiv(vocab_size, BLOCK)
    best = torch.empty(num_rows, num_blocks, dtype=torch.float32, device=device)
    at = torch.empty(num_rows, num_blocks, dtype=torch.int32, device=device)
    launch(
        _best_of_block, (num_rows, num_blocks), device,
        logits, best, at, logits.stride(0), VOCAB=vocab_size, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return best, at


@triton.jit
def _best_of_block(
    logits: tl.tensor,
    best: tl.tensor,
    at: tl.tensor,
    stride: int,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    found = tl.load(logits + row * stride + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
    found = tl.where(found == found, found, float("inf"))  # NaN wins, as it does in torch
    highest = tl.max(found, 0)
    tl.store(best + row * tl.num_programs(1) + block, highest)
    tl.store(at + row * tl.num_programs(1) + block, tl.min(tl.where(found == highest, token, VOCAB), 0))


@triton.jit(do_not_specialize=["num_rows"])  # or each number of rows is compiled anew
def _best_of_row(
    best: tl.tensor,
    at: tl.tensor,
    out: tl.tensor,
    num_rows: int,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row, block = tl.program_id(0), tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    inside = block < NUM_BLOCKS
    found = tl.load(best + row * NUM_BLOCKS + block, mask=inside, other=float("-inf"))
    tokens = tl.load(at + row * NUM_BLOCKS + block, mask=inside, other=2**31 - 1)
    highest = tl.max(found, 0)
    token = tl.min(tl.where((found == highest) & inside, tokens, 2**31 - 1), 0)
    tl.store(out + row, token.to(tl.int64))
    is_finite = (highest < float("inf")) & (highest > float("-inf"))
    tl.store(out + num_rows + row, is_finite.to(tl.int64))
