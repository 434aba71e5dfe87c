"""What each kernel of experts computes, written with torch: the part of `runtime.kernels.plain` that is about them."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from runtime.expert_choice import Chosen, Rule


class Layout(NamedTuple):
    """Pairs of a token and one of its experts, sorted by expert; each expert begins a block of its own.

    `rows`: int32 [blocks * block_rows], the pair (token * top_k + place) in each row, -1 in rows that are left over;
    `experts`: int32 [blocks], that of each block, -1 for the blocks at the end that nobody needs; `ends`: int32
    [experts], the row behind the last block of each; `places`: int32 [pairs], the row of each pair.
    """

    rows: Tensor
    experts: Tensor
    ends: Tensor
    places: Tensor


def route(x: Tensor, router: Tensor, rule: Rule) -> Chosen:
    """Which experts each token goes to, in any order. Logits are in float32 at least, whatever the model is.

    x: [T, hidden]; router: [experts, hidden]. Returns weights, float32, and indices, [T, top_k] each.
    """
    wide = _wide(x)
    return rule.choose(linear(x.to(wide), router.to(wide)))


def num_blocks(num_pairs: int, num_experts: int, block_rows: int) -> int:
    """Blocks that so many pairs need at most, however they are shared out among experts."""
    return min(num_pairs, (num_pairs + num_experts * (block_rows - 1)) // block_rows)


def lay_out(index: Tensor, num_experts: int, block_rows: int) -> Layout:
    """index: int [T, top_k]. The shapes of what it returns follow from its arguments' shapes alone."""
    pairs = index.flatten().long()
    at, all_experts = (torch.arange(size, device=index.device) for size in (len(pairs), num_experts))
    counts = (pairs[:, None] == all_experts).sum(0)
    ends = (-(-counts // block_rows)).cumsum(0)  # in blocks
    starts = ends - -(-counts // block_rows)
    order = pairs.argsort(stable=True)
    owner = pairs[order]
    place = starts[owner] * block_rows + at - (counts.cumsum(0) - counts)[owner]
    size = num_blocks(len(pairs), num_experts, block_rows)
    rows = torch.full((size * block_rows,), -1, dtype=torch.int32, device=index.device)
    rows.index_copy_(0, place, order.int())
    places = torch.empty_like(order).index_copy_(0, order, place)
    block = torch.arange(size, device=index.device)
    experts = torch.where(block < ends[-1], torch.searchsorted(ends, block, right=True), -1)
    return Layout(rows, experts.int(), (ends * block_rows).int(), places.int())


def expert_gate_up(
    x: Tensor, weight: Tensor, shared: Tensor | None, index: Tensor, layout: Layout | None
) -> Tensor:
    """silu(gate) * up of each token in each of its experts, and in those that all tokens share.

    x: [T, hidden]; weight: [experts, 2 * I, hidden], gates first; shared: [2 * num_shared * I, hidden], the gates of
    all shared experts and then their ups; index: int [T, top_k]; layout: that of `index`, or None where each pair is to
    be a block of its own. Returns [T, top_k + num_shared, I].
    """
    wide = _wide(x)
    every = x.to(wide) @ weight.to(wide).transpose(1, 2)  # [experts, T, 2 * I]
    at = torch.arange(len(x), device=x.device)[:, None]
    gate, up = every[index.long(), at].chunk(2, 2)
    if shared is not None:
        own_gate, own_up = (x.to(wide) @ shared.to(wide).T).unflatten(1, (-1, gate.shape[2])).chunk(2, 1)
        gate, up = torch.cat((gate, own_gate), 1), torch.cat((up, own_up), 1)
    return (silu(gate) * up).to(x.dtype)


def expert_down(
    x: Tensor, weight: Tensor, shared: Tensor | None, index: Tensor, weights: Tensor, layout: Layout | None
) -> Tensor:
    """What each expert adds to each token, as parts that have yet to be added up (`add_norm`).

    x: [T, top_k + num_shared, I], as `expert_gate_up` gives it; weight: [experts, hidden, I]; shared: [hidden,
    num_shared * I]; weights: [T, top_k], of the routed experts' parts. Returns [top_k + num_shared, T, hidden] float32.
    """
    wide, top_k = _wide(x), index.shape[1]
    at, place = torch.meshgrid(*(torch.arange(n, device=x.device) for n in index.shape), indexing="ij")
    every = torch.einsum("tki,ehi->etkh", x[:, :top_k].to(wide), weight.to(wide))
    found = every[index.long(), at, place] * weights.unsqueeze(2)
    if shared is not None:
        own = torch.einsum(
            "tsi,hsi->tsh", x[:, top_k:].to(wide), shared.to(wide).unflatten(1, (-1, x.shape[2]))
        )
        found = torch.cat((found, own), 1)
    return found.transpose(0, 1).contiguous()


def weigh(found: Tensor, weights: Tensor, places: Tensor, shared: Tensor | None = None) -> Tensor:
    """The sum of what experts gave for each token, in the order of its choice.

    found: [pairs, hidden]; weights: [T, top_k]; places: int [T * top_k], the row of each pair; shared: [T, hidden],
    added as it is. Returns [T, hidden].
    """
    rows = found[places.long()].unflatten(0, weights.shape).to(_wide(found))
    out = (rows * weights.unsqueeze(2)).sum(1)
    return (out if shared is None else out + shared).to(found.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
