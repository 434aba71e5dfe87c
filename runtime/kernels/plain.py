"""What each kernel of the decode path computes, written with torch: specification and stand-in at once.

None of them waits for the device, so that a CUDA graph can capture them too. Arithmetic is in float32 at least, and
rounded once, where the result is written.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

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


def paged_decode(
    query: Tensor,
    rows: Tensor,
    block_tables: Tensor,
    contexts: Tensor,
    block_tokens: int,
    scaling: float,
    window: int | None = None,
    num_splits: int = 1,
) -> Tensor:
    """Attention of one new token a row over its cached ones, its own among them.

    query: [B, kv_heads, group, D], whose rows may lie apart; rows: [slots, 2 * kv_heads * D], a token's keys of all
    heads and then its values; block_tables: int [B, max_blocks], of which only a row's first ceil(context /
    block_tokens) are read; contexts: int [B]; block_tokens: a power of two. A row of context 0 gives zeros.
    `num_splits`: among how many programs a context is shared out; the result does not depend on it.
    Returns [B, kv_heads * group * D].
    """
    kv_heads, dim = query.shape[1], query.shape[3]
    index, seen = _slots(block_tables, contexts, block_tokens, window)
    found = rows[index].view(*index.shape, 2, kv_heads, dim).to(_wide(query))  # [B, L, 2, kv_heads, D]
    key, value = found.masked_fill(~seen[:, :, None, None, None], 0).permute(2, 0, 3, 1, 4).unbind()
    weights = _weights(query.to(key.dtype) @ key.transpose(2, 3) * scaling, seen[:, None, None])
    return (weights @ value).to(query.dtype).flatten(1)


def paged_latent_decode(
    query: Tensor,
    rows: Tensor,
    block_tables: Tensor,
    contexts: Tensor,
    block_tokens: int,
    scaling: float,
    value_dim: int,
    num_splits: int = 1,
) -> Tensor:
    """The same over latents (MLA): all heads share one key, a row of the cache, and one value, its first part.

    query: [B, heads, D]; rows: [slots, D], 576 values in DeepSeek's models, of which `value_dim` = 512 are the value.
    Returns [B, heads, value_dim].
    """
    index, seen = _slots(block_tables, contexts, block_tokens, None)
    key = rows[index].to(_wide(query)).masked_fill(~seen[:, :, None], 0)  # [B, L, D]
    weights = _weights(query.to(key.dtype) @ key.transpose(1, 2) * scaling, seen[:, None])
    return (weights @ key[..., :value_dim]).to(query.dtype)


def rope_and_cache(
    qkv: Tensor,
    table: Tensor,
    positions: Tensor,
    rows: Tensor,
    slots: Tensor,
    kv_heads: int,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Turns queries and keys by their positions, in place, and writes keys and values to the cache.

    qkv: [T, (heads + 2 * kv_heads) * D]; table: [P, 2, D], cosines, and sines whose first half is negative;
    positions: int [T]; rows: [slots, 2 * kv_heads * D]; slots: int [T], negative where a token is padding and nothing
    is written; norm_weight: [heads + kv_heads, D] of a root mean square norm of each head before it is turned.
    """
    dim = table.shape[2]
    num_turned = qkv.shape[1] // dim - kv_heads
    turned = qkv.unflatten(1, (-1, dim))[:, :num_turned]
    x = turned.to(_wide(qkv))
    if norm_weight is not None:
        x = _normal(x, eps) * norm_weight
    cos, sin = table[positions].unsqueeze(2).unbind(1)
    turned.copy_(x * cos + x.roll(dim // 2, -1) * sin)
    _write(rows, slots, qkv[:, (num_turned - kv_heads) * dim :])


def latent_rope_and_cache(
    target: Tensor,
    turn: Tensor,
    new: Tensor,
    table: Tensor,
    positions: Tensor,
    rows: Tensor,
    slots: Tensor,
    norm_weight: Tensor,
    eps: float,
    is_interleaved: bool,
) -> None:
    """The same for latents (MLA): turns the last part of each query, and of the one key, and norms the latent.

    turn: [T, heads, D], what is turned of the queries; target: the same shape, where it goes, `turn` itself if wanted;
    new: [T, rank + D], latents and keys that are not turned yet; table, positions, slots: as above, but pairs lie side
    by side where `is_interleaved`; rows: [slots, rank + D]; norm_weight: [rank]. Rows may lie apart in all of them.
    """
    rank, dim = len(norm_weight), table.shape[2]
    x = torch.cat((turn, new[:, None, rank:]), 1).to(_wide(turn))
    other = x.unflatten(2, (-1, 2)).flip(3).flatten(2) if is_interleaved else x.roll(dim // 2, 2)
    cos, sin = table[positions].unsqueeze(2).unbind(1)
    turned = (x * cos + other * sin).to(turn.dtype)
    target.copy_(turned[:, :-1])
    latent = _normal(new[:, :rank].to(_wide(new)), eps) * norm_weight
    _write(rows, slots, torch.cat((latent.to(new.dtype), turned[:, -1]), 1))


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Adds `delta` to x in place, and returns the root mean square norm of the sum, times `weight`.

    x: [T, hidden]; delta: the same, or parts [S, T, hidden] in float32; weight: [hidden].
    """
    if delta is not None:
        x += delta if delta.ndim == 2 else delta.sum(0)
    return (_normal(x.to(_wide(x)), eps) * weight).to(x.dtype)


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up: [T, 2 * I], gates first. Returns silu(gate) * up, [T, I]."""
    gate, up = gate_up.to(_wide(gate_up)).chunk(2, 1)
    return (silu(gate) * up).to(gate_up.dtype)


def skinny_linear(x: Tensor, weight: Tensor) -> Tensor:
    """The product in parts that have yet to be added up. x: [M, K], M at most 64; weight: [N, K].

    Returns [S, M, N] float32.
    """
    return torch.nn.functional.linear(x.to(_wide(x)), weight.to(_wide(x)))[None]


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token of each row, the first of equals, and whether it may be taken: not where a logit is NaN or
    none is finite. logits: [B, vocab]. Returns int64 [2, B].
    """
    best, tokens = logits.max(dim=-1)  # NaN wins a max, so `best` tells of it
    return torch.stack((tokens, torch.isfinite(best).to(tokens.dtype)))


def embed(token_ids: Tensor, drawn: Tensor, table: Tensor) -> Tensor:
    """token_ids: int64 [T], in which -1 - k is the k-th of `drawn`, int64; table: [vocab, hidden].

    Returns [T, hidden].
    """
    known = torch.where(token_ids < 0, drawn[(-1 - token_ids).clamp(min=0)], token_ids)
    return torch.nn.functional.embedding(known, table)


# -- experts -----------------------------------------------------------------------------------------------------


def route(x: Tensor, router: Tensor, rule: Rule) -> Chosen:
    """Which experts each token goes to, in any order. Logits are in float32 at least, whatever the model is.

    x: [T, hidden]; router: [experts, hidden]. Returns weights, float32, and indices, [T, top_k] each.
    """
    wide = _wide(x)
    return rule.choose(torch.nn.functional.linear(x.to(wide), router.to(wide)))


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


def _write(rows: Tensor, slots: Tensor, new: Tensor) -> None:
    """Padding repeats the first real token, or where there is none, what lies in the first slot."""
    real = slots >= 0
    source = torch.where(real, torch.arange(len(slots), device=slots.device), real.int().argmax())
    target = slots[source].clamp(min=0)
    rows.index_copy_(0, target, torch.where(real.any(), new[source], rows[target]))


def _slots(
    block_tables: Tensor, contexts: Tensor, block_tokens: int, window: int | None
) -> tuple[Tensor, Tensor]:
    """Slots of all tokens that fit the tables, [B, L], slot 0 for those not attended to, and which are: bool [B, L]."""
    within = torch.arange(block_tokens, device=block_tables.device)
    slots = (block_tables.long()[:, :, None] * block_tokens + within).flatten(1)
    at, context = torch.arange(slots.shape[1], device=slots.device)[None], contexts[:, None]
    seen = at < context
    if window is not None:
        seen &= at >= context - window
    return torch.where(seen, slots, 0), seen


def _weights(scores: Tensor, seen: Tensor) -> Tensor:
    """Softmax over what is seen; zeros where nothing is."""
    return torch.softmax(scores.masked_fill(~seen, float("-inf")), -1).masked_fill(~seen, 0)


def _normal(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
