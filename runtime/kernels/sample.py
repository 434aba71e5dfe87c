"""A token of each row by temperature, min-p, top-k and top-p, without sorting the vocabulary.

    highest logit of a row ▶ cut of top-k ▶ sums of what is left ▶ cut of top-p ▶ sums ▶ the token that was drawn

A row is cut at a weight, which is found four bits at a time: each pass counts, or sums, what weighs at least as much as
each of fifteen thresholds. Sums are of whole numbers, so the order in which programs add does not matter, and a row
gets the same token whatever batch it shares. Contract: `sample` in `runtime.kernels.plain`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.kernels import plain
from runtime.kernels.greedy import BLOCK, best_of_blocks
from runtime.kernels.launch import launch

SHIFTS = tuple(range(28, -1, -4))  # of the 32 bits of a weight
PLACES = tl.constexpr(16)  # thresholds of a pass, of which the first is what the pass before it has found
FIRST_SHIFT = tl.constexpr(SHIFTS[0])
LEVELS, LEAST_TEMPERATURE = tl.constexpr(plain.LEVELS), tl.constexpr(plain.LEAST_TEMPERATURE)
ABOVE_ALL = tl.constexpr(2**30)  # bits of no weight
SLACK = tl.constexpr(8)  # bits by which the exponential of one logit may differ from that among others
# What `params` holds in turn; kernels call it otherwise, since Triton has a variable of that name.
TEMPERATURE, MIN_P, TOP_P, TOP_K, DRAW = (tl.constexpr(place) for place in range(5))


def sample(logits: Tensor, params: Tensor, has_top_k: bool, has_top_p: bool) -> Tensor:
    device = logits.device
    params = params.contiguous()
    best, at = best_of_blocks(logits)
    num_rows, num_blocks = best.shape
    rows, blocks = (num_rows,), (num_rows, num_blocks)
    of_row = {"NUM_BLOCKS": num_blocks, "ROW": triton.next_power_of_2(num_blocks)}
    given, sizes = (
        (logits, best, params, num_rows, logits.stride(0)),
        {"VOCAB": logits.shape[1], "BLOCK": BLOCK},
    )

    def ints(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.int64, device=device)

    # By row: where it is cut, how many of those at the cut stay, what all weigh, and what top-p shall reach.
    cut, num_equal, total, wanted = (ints(num_rows) for _ in range(4))
    # By block: what weighs more than the cut, together, how many these are, and how many lie at the cut.
    above, num_above, equal = (ints(*blocks) for _ in range(3))
    for by in ("top_k" if has_top_k else "min_p", *["top_p"] * has_top_p):
        # In turns: a pass reads what the one before it has found.
        found = [ints(num_rows) for _ in range(2)]
        parts = [ints(*blocks, PLACES.value) for _ in range(2)]
        for turn, shift in enumerate(SHIFTS if by != "min_p" else ()):
            launch(
                _count, blocks, device,
                *given, wanted, found[1 - turn % 2], parts[1 - turn % 2], found[turn % 2], parts[turn % 2], shift,
                BY=by, **of_row, **sizes, num_warps=4,
            )  # fmt: skip
        last, (cut_before, cut) = (len(SHIFTS) - 1) % 2, (cut, ints(num_rows))
        launch(
            _sum_up, blocks, device,
            *given, wanted, found[last], parts[last], cut_before, cut, above, num_above, equal,
            BY=by, **of_row, **sizes, num_warps=8,
        )  # fmt: skip
        launch(
            _settle, rows, device, params, num_rows, cut, above, num_above, equal, num_equal, total, wanted,
            BY=by, **of_row, num_warps=1,
        )  # fmt: skip
    out = torch.empty(2, num_rows, dtype=torch.int64, device=device)
    launch(
        _choose, rows, device, *given, at, cut, num_equal, total, above, equal, out, **of_row, **sizes, num_warps=8,
    )  # fmt: skip
    return out


@triton.jit
def _scale(
    best: tl.tensor, asked: tl.tensor, num_rows: int, row: int, NUM_BLOCKS: tl.constexpr, ROW: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The highest logit of a row, and what it is divided by."""
    place = tl.arange(0, ROW)
    highest = tl.max(
        tl.load(best + row * NUM_BLOCKS + place, mask=place < NUM_BLOCKS, other=float("-inf")), 0
    )
    divisor = tl.load(asked + TEMPERATURE * num_rows + row)
    return highest, tl.maximum(tl.where(divisor > 0, divisor, 1.0).to(tl.float32), LEAST_TEMPERATURE)


@triton.jit
def _heaviest(
    best: tl.tensor,
    asked: tl.tensor,
    num_rows: int,
    row: int,
    block: int,
    NUM_BLOCKS: tl.constexpr,
    ROW: tl.constexpr,
) -> tl.tensor:
    """Bits of the largest weight of a block; those of infinity where they are not known."""
    highest, divisor = _scale(best, asked, num_rows, row, NUM_BLOCKS, ROW)
    weight = tl.exp((tl.load(best + row * NUM_BLOCKS + block) - highest) / divisor)
    weight = tl.where(weight == weight, weight, float("inf"))
    return weight.to(tl.int32, bitcast=True).to(tl.int64)


@triton.jit
def _weights(
    logits: tl.tensor,
    best: tl.tensor,
    asked: tl.tensor,
    num_rows: int,
    stride: int,
    row: int,
    block: int,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    ROW: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Weights of a block as their bits, -1 outside of the vocabulary, and as whole numbers."""
    highest, divisor = _scale(best, asked, num_rows, row, NUM_BLOCKS, ROW)
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < VOCAB
    found = tl.load(logits + row * stride + token, mask=inside, other=float("-inf")).to(tl.float32)
    weight = tl.exp((found - highest) / divisor)
    weight = tl.where(weight == weight, weight, 0.0)
    level = (weight * LEVELS).to(tl.int64)
    return tl.where(inside, weight.to(tl.int32, bitcast=True), -1), tl.where(inside, level, 0)


@triton.jit
def _wanted(asked: tl.tensor, wanted: tl.tensor, num_rows: int, row: int, BY: tl.constexpr) -> tl.tensor:
    """Tokens that stay, or what they shall weigh; 0 where the row does not ask for it."""
    if BY == "top_p":
        return tl.load(wanted + row)
    return tl.load(asked + TOP_K * num_rows + row).to(tl.int64)


@triton.jit
def _found(
    found: tl.tensor,
    parts: tl.tensor,
    row: int,
    wanted: tl.tensor,
    shift: int,
    NUM_BLOCKS: tl.constexpr,
    ROW: tl.constexpr,
) -> tl.tensor:
    """The highest threshold of a pass at which there is as much as is wanted."""
    block, place = tl.arange(0, ROW)[:, None], tl.arange(0, PLACES)[None, :]
    used = (block < NUM_BLOCKS) & (place > 0)
    counted = tl.sum(tl.load(parts + (row * NUM_BLOCKS + block) * PLACES + place, mask=used, other=0), 0)
    return tl.load(found + row) + (tl.sum((counted >= wanted).to(tl.int64), 0) << shift)


@triton.jit(do_not_specialize=["num_rows", "shift"])  # or each value of them is compiled anew
def _count(
    logits: tl.tensor,
    best: tl.tensor,
    asked: tl.tensor,
    num_rows: int,
    stride: int,
    wanted: tl.tensor,
    found_before: tl.tensor,
    parts_before: tl.tensor,
    found: tl.tensor,
    parts: tl.tensor,
    shift: int,
    BY: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    ROW: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    num_wanted = _wanted(asked, wanted, num_rows, row, BY)
    if num_wanted > 0:
        low = num_wanted * 0
        if shift < FIRST_SHIFT:
            low = _found(found_before, parts_before, row, num_wanted, shift + 4, NUM_BLOCKS, ROW)
        if block == 0:
            tl.store(found + row, low)
        here = parts + (row * NUM_BLOCKS + block) * PLACES
        one = tl.full((), 1, tl.int64) << shift
        if _heaviest(best, asked, num_rows, row, block, NUM_BLOCKS, ROW) + SLACK < low + one:
            tl.store(
                here + tl.arange(0, PLACES), tl.zeros((PLACES,), tl.int64)
            )  # most blocks, after a few passes
        else:
            bits, level = _weights(
                logits, best, asked, num_rows, stride, row, block, VOCAB, BLOCK, NUM_BLOCKS, ROW
            )
            for place in tl.static_range(1, PLACES):
                is_over = bits >= tl.minimum(low + place * one, ABOVE_ALL).to(tl.int32)
                if BY == "top_p":
                    counted = tl.sum(tl.where(is_over, level, 0), 0)
                else:
                    counted = tl.sum(is_over.to(tl.int32), 0).to(tl.int64)
                tl.store(here + place, counted)


@triton.jit(do_not_specialize=["num_rows"])
def _sum_up(
    logits: tl.tensor,
    best: tl.tensor,
    asked: tl.tensor,
    num_rows: int,
    stride: int,
    wanted: tl.tensor,
    found: tl.tensor,
    parts: tl.tensor,
    cut_before: tl.tensor,
    cut: tl.tensor,
    above: tl.tensor,
    num_above: tl.tensor,
    equal: tl.tensor,
    BY: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    ROW: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if BY == "top_p":
        at = tl.load(cut_before + row)
    else:
        at = tl.load(asked + MIN_P * num_rows + row).to(tl.float32).to(tl.int32, bitcast=True).to(tl.int64)
    if BY != "min_p":
        num_wanted = _wanted(asked, wanted, num_rows, row, BY)
        if num_wanted > 0:
            at = tl.maximum(at, _found(found, parts, row, num_wanted, 0, NUM_BLOCKS, ROW))
    bits, level = _weights(logits, best, asked, num_rows, stride, row, block, VOCAB, BLOCK, NUM_BLOCKS, ROW)
    here = row * NUM_BLOCKS + block
    tl.store(above + here, tl.sum(tl.where(bits > at, level, 0), 0))
    tl.store(num_above + here, tl.sum((bits > at).to(tl.int32), 0).to(tl.int64))
    tl.store(equal + here, tl.sum((bits == at).to(tl.int32), 0).to(tl.int64))
    if block == 0:
        tl.store(cut + row, at)


@triton.jit
def _level_of(bits: tl.tensor) -> tl.tensor:
    return (bits.to(tl.int32).to(tl.float32, bitcast=True) * LEVELS).to(tl.int64)


@triton.jit(do_not_specialize=["num_rows"])
def _settle(
    asked: tl.tensor,
    num_rows: int,
    cut: tl.tensor,
    above: tl.tensor,
    num_above: tl.tensor,
    equal: tl.tensor,
    num_equal: tl.tensor,
    total: tl.tensor,
    wanted: tl.tensor,
    BY: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    ROW: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """How many of those at the cut stay, what all that stay weigh, and what top-p is to reach of it."""
    row, block = tl.program_id(0).to(tl.int64), tl.arange(0, ROW)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    inside, of_row = block < NUM_BLOCKS, row * NUM_BLOCKS + block
    weighs = tl.sum(tl.load(above + of_row, mask=inside, other=0), 0)
    stay = tl.sum(tl.load(equal + of_row, mask=inside, other=0), 0)
    level = _level_of(tl.load(cut + row))
    if BY == "top_k":
        num_wanted = _wanted(asked, wanted, num_rows, row, BY)
        if num_wanted > 0:
            stay = tl.minimum(stay, num_wanted - tl.sum(tl.load(num_above + of_row, mask=inside, other=0), 0))
    if BY == "top_p":
        num_wanted = tl.load(wanted + row)
        if num_wanted > 0:  # the last one crosses it
            stay = tl.minimum(stay, (num_wanted - weighs + level - 1) // tl.maximum(level, 1))
        else:
            stay = tl.load(num_equal + row)
    weighs += stay * level
    tl.store(num_equal + row, stay)
    tl.store(total + row, weighs)
    if BY != "top_p":
        top_p = tl.load(asked + TOP_P * num_rows + row)
        reach = tl.maximum(tl.ceil(top_p * weighs.to(tl.float64)).to(tl.int64), 1)
        tl.store(wanted + row, tl.where(top_p < 1.0, reach, 0))


@triton.jit(do_not_specialize=["num_rows"])
def _choose(
    logits: tl.tensor,
    best: tl.tensor,
    asked: tl.tensor,
    num_rows: int,
    stride: int,
    best_at: tl.tensor,
    cut: tl.tensor,
    num_equal: tl.tensor,
    total: tl.tensor,
    above: tl.tensor,
    equal: tl.tensor,
    out: tl.tensor,
    NUM_BLOCKS: tl.constexpr,
    ROW: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    row, place = tl.program_id(0).to(tl.int64), tl.arange(0, ROW)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    inside, of_row = place < NUM_BLOCKS, row * NUM_BLOCKS + place
    at, stay, weigh = tl.load(cut + row), tl.load(num_equal + row), tl.load(total + row)
    target = (tl.load(asked + DRAW * num_rows + row) * weigh.to(tl.float64)).to(tl.int64)
    target = tl.minimum(target, weigh - 1)
    # Of equals at the cut the first ones stay.
    equals = tl.load(equal + of_row, mask=inside, other=0)
    before = tl.cumsum(equals, 0) - equals
    masses = tl.load(above + of_row, mask=inside, other=0)
    masses += tl.maximum(tl.minimum(equals, stay - before), 0) * _level_of(at)
    summed = tl.cumsum(masses, 0)
    passed = summed <= target
    block = tl.sum((passed & inside).to(tl.int32), 0)
    stay -= tl.sum(tl.where(passed & inside, equals, 0), 0)
    target -= tl.sum(tl.where(passed & inside, masses, 0), 0)

    bits, level = _weights(logits, best, asked, num_rows, stride, row, block, VOCAB, BLOCK, NUM_BLOCKS, ROW)
    is_equal = (bits == at).to(tl.int32)
    stays = (bits > at) | ((bits == at) & (tl.cumsum(is_equal, 0) <= stay))
    token = block * BLOCK + tl.sum((tl.cumsum(tl.where(stays, level, 0), 0) <= target).to(tl.int32), 0)

    found = tl.load(best + of_row, mask=inside, other=float("-inf"))
    highest = tl.max(found, 0)
    likeliest = tl.load(best_at + of_row, mask=inside, other=2**31 - 1)
    likeliest = tl.min(tl.where((found == highest) & inside, likeliest, 2**31 - 1), 0)
    is_drawn = tl.load(asked + TEMPERATURE * num_rows + row) > 0
    tl.store(out + row, tl.minimum(tl.where(is_drawn, token, likeliest), VOCAB - 1).to(tl.int64))
    is_finite = (highest < float("inf")) & (highest > float("-inf"))
    tl.store(out + num_rows + row, is_finite.to(tl.int64))
