"""Pairs of tokens and experts sorted by expert, into blocks whose number follows from shapes alone.

A program an expert counts all pairs, finds its own and writes them where the experts before it end; one more program
blanks what is left over. Nothing is sorted by comparison and nothing is added up out of order, so equal choices give
equal layouts. Contract: `lay_out` in `runtime.kernels.plain_experts`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.kernels.early_start import early_start
from runtime.kernels.plain_experts import Layout, num_blocks

CHUNKS = (256, 2048)  # pairs that a program looks at at once: few sizes, as each is compiled by itself


def lay_out(index: Tensor, num_experts: int, block_rows: int) -> Layout:
    num_pairs, device = index.numel(), index.device
    size = num_blocks(num_pairs, num_experts, block_rows)
    found = Layout(
        torch.empty(size * block_rows, dtype=torch.int32, device=device),
        torch.empty(size, dtype=torch.int32, device=device),
        torch.empty(num_experts, dtype=torch.int32, device=device),
        torch.empty(num_pairs, dtype=torch.int32, device=device),
    )
    chunk = CHUNKS[0] if num_pairs <= CHUNKS[0] else CHUNKS[1]
    _lay_out[(num_experts + 1,)](
        index, *found, num_pairs, size,
        EXPERTS=num_experts, BLOCK_ROWS=block_rows, CHUNK=chunk, BINS=triton.next_power_of_2(num_experts + 1),
        num_warps=4 if chunk == CHUNKS[0] else 8, **early_start(index),
    )  # fmt: skip
    return found


@triton.jit(do_not_specialize=["num_pairs", "num_blocks"])
def _lay_out(
    index: tl.tensor,
    rows: tl.tensor,
    experts: tl.tensor,
    ends: tl.tensor,
    places: tl.tensor,
    num_pairs: int,
    num_blocks: int,
    EXPERTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    own, bins, lane = tl.program_id(0), tl.arange(0, BINS), tl.arange(0, CHUNK)
    counts = tl.zeros([BINS], tl.int32)
    for first in range(0, num_pairs, CHUNK):
        pair = first + lane
        found = tl.load(index + pair, mask=pair < num_pairs, other=EXPERTS).to(tl.int32)
        counts += tl.histogram(found, BINS)
    blocks = tl.where(bins < EXPERTS, (counts + BLOCK_ROWS - 1) // BLOCK_ROWS, 0)
    start = tl.sum(tl.where(bins < own, blocks, 0), 0)  # of the last program: all that are used
    count = tl.sum(tl.where(bins == own, tl.where(bins < EXPERTS, counts, 0), 0), 0)
    num_own = (count + BLOCK_ROWS - 1) // BLOCK_ROWS
    if own == EXPERTS:
        for first in range(start, num_blocks, CHUNK):
            tl.store(experts + first + lane, tl.full([CHUNK], -1, tl.int32), mask=first + lane < num_blocks)
        for first in range(start * BLOCK_ROWS, num_blocks * BLOCK_ROWS, CHUNK):
            unused = first + lane < num_blocks * BLOCK_ROWS
            tl.store(rows + first + lane, tl.full([CHUNK], -1, tl.int32), mask=unused)
    else:
        tl.store(ends + own, (start + num_own) * BLOCK_ROWS)
        for first in range(0, num_own, CHUNK):
            tl.store(experts + start + first + lane, own + lane * 0, mask=first + lane < num_own)
        seen = start * BLOCK_ROWS
        for first in range(0, num_pairs, CHUNK):
            pair = first + lane
            mine = tl.load(index + pair, mask=pair < num_pairs, other=EXPERTS).to(tl.int32) == own
            place = seen + tl.cumsum(mine.to(tl.int32), 0) - 1
            tl.store(rows + place, pair, mask=mine)
            tl.store(places + pair, place, mask=mine)
            seen += tl.sum(mine.to(tl.int32), 0)
        over = tl.arange(0, BLOCK_ROWS)
        left = seen + over < (start + num_own) * BLOCK_ROWS
        tl.store(rows + seen + over, tl.full([BLOCK_ROWS], -1, tl.int32), mask=left)
