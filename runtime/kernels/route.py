"""A router: logits, then the choice among them, without a word from the device to the host.

    grid (tokens, experts, parts of the columns) ▶ logits in float32 ▶ grid (token): scores, groups, the best of them

Contract: `route` in `runtime.kernels.plain_experts`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from runtime.expert_choice import Chosen, Rule
from runtime.kernels.early_start import early_start

MIN_DOT = 16
MAX_ROWS = 64  # of one program
EXPERTS_PER_PROGRAM = 32
WANTED_PROGRAMS = 128
MAX_SPLIT = 16  # the second kernel adds so many parts one after the other


def route(x: Tensor, router: Tensor, rule: Rule) -> Chosen:
    x = x.to(router.dtype)  # equal, in all models but those that keep their routers wider
    (num_tokens, hidden), num_experts = x.shape, len(router)
    block_m = min(MAX_ROWS, max(MIN_DOT, triton.next_power_of_2(num_tokens)))
    block_k = min(128 if x.element_size() == 2 else 64, max(MIN_DOT, triton.next_power_of_2(hidden)))
    tiles = triton.cdiv(num_tokens, block_m), triton.cdiv(num_experts, EXPERTS_PER_PROGRAM)
    split = 1
    while (
        split < MAX_SPLIT and tiles[0] * tiles[1] * split < WANTED_PROGRAMS and hidden > 2 * split * block_k
    ):
        split *= 2
    parts = torch.empty(split, num_tokens, num_experts, dtype=torch.float32, device=x.device)
    _logits[(*tiles, split)](
        x, router, parts, num_tokens, x.stride(0), router.stride(0),
        EXPERTS=num_experts, HIDDEN=hidden, PART=triton.cdiv(triton.cdiv(hidden, split), block_k) * block_k,
        BLOCK_M=block_m, BLOCK_N=EXPERTS_PER_PROGRAM, BLOCK_K=block_k,
        num_warps=4, num_stages=4, **early_start(x),
    )  # fmt: skip
    weights = torch.empty(num_tokens, rule.top_k, dtype=torch.float32, device=x.device)
    index = torch.empty(num_tokens, rule.top_k, dtype=torch.int32, device=x.device)
    size = num_experts // rule.num_groups
    _choose[(num_tokens,)](
        parts, parts if rule.bias is None else rule.bias, weights, index, num_tokens, rule.factor,
        EXPERTS=num_experts, GROUPS=rule.num_groups, KEPT=rule.kept_groups, TOP_K=rule.top_k, SPLIT=split,
        IS_SIGMOID=rule.bias is not None, IS_NORMALISED=rule.is_normalised,
        GROUP_BLOCK=triton.next_power_of_2(rule.num_groups), SIZE_BLOCK=triton.next_power_of_2(size),
        SLOT_BLOCK=triton.next_power_of_2(rule.top_k),
        num_warps=1, **early_start(x),
    )  # fmt: skip
    return Chosen(weights, index)


@triton.jit(do_not_specialize=["num_tokens"])
def _logits(
    x: tl.tensor,
    router: tl.tensor,
    parts: tl.tensor,
    num_tokens: int,
    x_stride: int,
    router_stride: int,
    EXPERTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    part = tl.program_id(2)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = part * PART + tl.arange(0, BLOCK_K)
    x_at = x + tl.minimum(m, num_tokens - 1).to(tl.int64)[:, None] * x_stride + k[None]
    router_at = router + tl.minimum(n, EXPERTS - 1)[None] * router_stride + k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for done in range(0, PART, BLOCK_K):
        left = k + done < HIDDEN
        some_x = tl.load(x_at + done, mask=left[None], other=0.0)
        some = tl.load(router_at + done, mask=left[:, None], other=0.0)
        # Products of half types are exact in float32: this is the arithmetic of a router in float32.
        acc = tl.dot(some_x, some, acc, input_precision="ieee")
    at = (part * num_tokens + m).to(tl.int64)[:, None] * EXPERTS + n[None]
    tl.store(parts + at, acc, mask=(m < num_tokens)[:, None] & (n < EXPERTS)[None])


@triton.jit
def _kept(ranked: tl.tensor, group: tl.tensor, member: tl.tensor, GROUPS: tl.constexpr, KEPT: tl.constexpr,
          IS_SIGMOID: tl.constexpr) -> tl.tensor:  # fmt: skip
    """Which groups stay, bool [groups]: by their best expert, or by the sum of their two best."""
    best = tl.max(ranked, 1)
    if IS_SIGMOID:
        first = tl.argmax(ranked, 1)
        best += tl.max(tl.where(member[None] == first[:, None], float("-inf"), ranked), 1)
    best = tl.where(group < GROUPS, best, float("-inf"))
    kept = group < 0
    for _ in tl.static_range(KEPT):
        at = tl.argmax(best, 0)
        kept = kept | (group == at)
        best = tl.where(group == at, float("-inf"), best)
    return kept


@triton.jit(do_not_specialize=["num_tokens"])
def _choose(
    parts: tl.tensor,
    bias: tl.tensor,
    weights: tl.tensor,
    index: tl.tensor,
    num_tokens: int,
    factor: float,
    EXPERTS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    TOP_K: tl.constexpr,
    SPLIT: tl.constexpr,
    IS_SIGMOID: tl.constexpr,
    IS_NORMALISED: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    SIZE_BLOCK: tl.constexpr,
    SLOT_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    SIZE: tl.constexpr = EXPERTS // GROUPS
    token = tl.program_id(0).to(tl.int64)
    group, member, slot = tl.arange(0, GROUP_BLOCK), tl.arange(0, SIZE_BLOCK), tl.arange(0, SLOT_BLOCK)
    expert = group[:, None] * SIZE + member[None]
    inside = (group < GROUPS)[:, None] & (member < SIZE)[None]
    logits = tl.zeros([GROUP_BLOCK, SIZE_BLOCK], tl.float32)
    for part in tl.static_range(SPLIT):
        at = (part * num_tokens + token) * EXPERTS + expert
        logits += tl.load(parts + at, mask=inside, other=0.0)
    if IS_SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-logits))
        ranked = scores + tl.load(bias + expert, mask=inside, other=0.0).to(tl.float32)
    else:
        logits = tl.where(inside, logits, float("-inf"))
        scores = tl.exp(logits - tl.max(tl.max(logits, 1), 0))
        scores = scores / tl.sum(tl.sum(scores, 1), 0)
        ranked = scores
    ranked = tl.where(inside, ranked, float("-inf"))
    if KEPT < GROUPS:
        kept = _kept(ranked, group, member, GROUPS, KEPT, IS_SIGMOID)
        ranked = tl.where(kept[:, None] & inside, ranked, float("-inf") if IS_SIGMOID else -1.0)
        ranked = tl.where(inside, ranked, float("-inf"))
    chosen_weights = tl.zeros([SLOT_BLOCK], tl.float32)
    chosen = tl.zeros([SLOT_BLOCK], tl.int32)
    for place in tl.static_range(TOP_K):
        best = tl.max(tl.max(ranked, 1), 0)
        one = tl.min(tl.min(tl.where(ranked == best, expert, EXPERTS - 1), 1), 0)  # also where all are NaN
        is_one = expert == one
        weight = tl.sum(tl.sum(tl.where(is_one, scores, 0.0), 1), 0)
        if not IS_SIGMOID:
            weight = tl.where(best < 0, 0.0, weight)  # of a group that is left out
        ranked = tl.where(is_one, float("-inf"), ranked)
        chosen_weights = tl.where(slot == place, weight, chosen_weights)
        chosen = tl.where(slot == place, one, chosen)
    if IS_NORMALISED:
        chosen_weights = chosen_weights / (tl.sum(chosen_weights, 0) + 1e-20)
    at = token * TOP_K + slot
    tl.store(weights + at, chosen_weights * factor, mask=slot < TOP_K)
    tl.store(index + at, chosen, mask=slot < TOP_K)
