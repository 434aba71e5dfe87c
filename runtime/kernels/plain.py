"""What each kernel of our decoder computes, written with torch: specification and stand-in at once.

None of them but `paged_prefill` waits for the device, so that a CUDA graph can capture them too. Arithmetic is in
float32 at least, and rounded once, where the result is written.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from runtime.rounded_cache import restored, rounded

PREFILL_TOKENS = 128  # whose scores are there at once
INT8_LIMIT = 127  # symmetric: -128 is not used
LEAST_INT8_ROWS = 32  # torch._int_mm wants more than 16 rows on CUDA
LEVELS = 2.0**40  # of the likeliest token's weight
LEAST_TEMPERATURE = 1e-30  # less is 0 in float32, and a request that asks for it is not greedy
SORTED_FIRST = 1024  # of a vocabulary
LEAST_ROW_MAXIMUM = 1e-30  # of a row's values: one of zeros has levels too


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


def paged_prefill(
    query: Tensor,
    rows: Tensor,
    block_tables: Tensor,
    contexts: Tensor,
    first_row: int,
    edges: Tensor,
    tiles: Tensor,
    num_splits: int,
    block_tokens: int,
    scaling: float,
    window: int | None = None,
) -> Tensor:
    """Attention of pieces of prompts, whose keys and values are cached already: each token sees those up to its own.

    query: [tokens, kv_heads, group, D], a token of each row before `first_row`, then piece behind piece; edges: int32
    [pieces + 1], where each begins behind those; rows, block_tables, contexts: as in `paged_decode`, of all rows.
    `tiles`, `num_splits`: what `splits` says; the result does not depend on them. Reads `edges` and `contexts` on the
    host, so it cannot be captured. Returns [tokens, kv_heads * group * D], of which those before the first piece and
    behind the last one are for someone else to fill.
    """
    kv_heads, dim = query.shape[1], query.shape[3]
    found = query.new_zeros(len(query), query[0].numel())
    starts = [first_row + edge for edge in edges.tolist()]
    for number, (start, end) in enumerate(pairwise(starts)):
        row = first_row + number
        context = int(contexts[row])
        token = torch.arange(context, device=query.device)
        slots = block_tables[row].long()[token // block_tokens] * block_tokens + token % block_tokens
        cached = rows[slots].view(context, 2, kv_heads, dim).to(_wide(query))
        for first in range(start, end, PREFILL_TOKENS):  # scores of all at once would take gigabytes
            part = query[first : min(first + PREFILL_TOKENS, end)].permute(1, 2, 0, 3).to(cached.dtype)
            position = context - (end - first) + torch.arange(part.shape[2], device=query.device)[:, None]
            seen = token <= position
            if window is not None:
                seen &= token > position - window
            visible = cached[seen.any(0)]  # what none sees may be no number
            key, value = visible.permute(1, 2, 0, 3)
            weights = _weights(part @ key[:, None].transpose(2, 3) * scaling, seen[:, seen.any(0)])
            outputs = (weights @ value[:, None]).permute(2, 0, 1, 3).flatten(1)
            found[first : first + len(outputs)] = outputs.to(query.dtype)
    return found


def paged_decode_fp8(
    query: Tensor,
    rows: Tensor,
    scales: Tensor,
    block_tables: Tensor,
    contexts: Tensor,
    block_tokens: int,
    scaling: float,
    window: int | None = None,
    num_splits: int = 1,
) -> Tensor:
    """`paged_decode` over a cache that is rounded to 8 bits. rows: uint8 [slots, 2 * kv_heads * D], the bits of e4m3;
    scales: [slots, 2 * kv_heads], by which they are multiplied."""
    kv_heads, dim = query.shape[1], query.shape[3]
    index, seen = _slots(block_tables, contexts, block_tokens, window)
    found = restored(rows[index].unflatten(2, (2 * kv_heads, dim)), scales[index], _wide(query))
    found = found.unflatten(2, (2, kv_heads)).masked_fill(~seen[:, :, None, None, None], 0)
    key, value = found.permute(2, 0, 3, 1, 4).unbind()
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
    new = _turn(qkv, table, positions, kv_heads, norm_weight, eps)
    _write(rows, slots, new)


def rope_and_cache_fp8(
    qkv: Tensor,
    table: Tensor,
    positions: Tensor,
    rows: Tensor,
    scales: Tensor,
    slots: Tensor,
    kv_heads: int,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """The same for a cache that is rounded to 8 bits, as `runtime.rounded_cache.rounded` says. rows: uint8; scales:
    [slots, 2 * kv_heads]."""
    new = _turn(qkv, table, positions, kv_heads, norm_weight, eps)
    bits, found = rounded(new.unflatten(1, (2 * kv_heads, -1)))
    source, target, is_any = _written(slots)
    rows.index_copy_(0, target, torch.where(is_any, bits.flatten(1)[source], rows[target]))
    scales.index_copy_(0, target, torch.where(is_any, found[source].to(scales.dtype), scales[target]))


def round_rows(into: Tensor, scales: Tensor, rows: Tensor, sources: Tensor, targets: Tensor) -> None:
    """Writes cached rows to a cache of 8 bits. into: uint8 [slots, heads * D]; scales: [slots, heads]; rows: [slots,
    heads * D]; sources, targets: int64 [T], slots of either."""
    bits, steps = rounded(rows.index_select(0, sources).unflatten(1, (scales.shape[1], -1)))
    into.index_copy_(0, targets, bits.flatten(1))
    scales.index_copy_(0, targets, steps)


def restore_rows(into: Tensor, rows: Tensor, scales: Tensor, sources: Tensor, targets: Tensor) -> None:
    """The way back. into: [slots, heads * D]; rows: uint8 [slots, heads * D]; scales: [slots, heads]."""
    bits = rows.index_select(0, sources).unflatten(1, (scales.shape[1], -1))
    into.index_copy_(0, targets, restored(bits, scales.index_select(0, sources), into.dtype).flatten(1))


def row_steps(x: Tensor) -> Tensor:
    """x: [..., K]. Returns [..., 1]: the width of one level, so that the row's largest value is 127 of them."""
    largest = torch.linalg.vector_norm(x, float("inf"), -1, keepdim=True)
    return largest.clamp_(min=LEAST_ROW_MAXIMUM) / INT8_LIMIT


def int8_levels(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row as whole levels of its own, so that its largest value is 127 of them.

    x: [T, K], whose rows may lie apart. Returns int8 [max(T, 32), K], zeros behind the rows of x, and the width of a
    level, float32 [T, 1]. A row that holds what is no number has a width that is none.
    """
    wide = x.float()
    step = row_steps(wide)
    # Filled on the device: a constant sent there could not be captured.
    half = torch.full((), 0.5, device=x.device)
    levels = torch.addcmul(half, wide, step.reciprocal()).floor_().to(torch.int8)
    return pad(levels, (0, 0, 0, max(0, LEAST_INT8_ROWS - len(x)))), step


def int8_scaled(
    product: Tensor, steps: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What a product of levels stands for: product * scale * steps + bias.

    product: int32 [T or more, N]; steps: float32 [T, 1]; scale, bias: float32 [N]. Returns [T, N] of `dtype`.
    """
    out = product[: len(steps)].float() * scale
    out = out.mul_(steps) if bias is None else torch.addcmul(bias, out, steps)
    return out.to(dtype)


def _turn(
    qkv: Tensor, table: Tensor, positions: Tensor, kv_heads: int, norm_weight: Tensor | None, eps: float
) -> Tensor:
    """Turns queries and keys in place. Returns a view of keys and values, [T, 2 * kv_heads * D]."""
    dim = table.shape[2]
    num_turned = qkv.shape[1] // dim - kv_heads
    turned = qkv.unflatten(1, (-1, dim))[:, :num_turned]
    x = turned.to(_wide(qkv))
    if norm_weight is not None:
        x = _normal(x, eps) * norm_weight
    cos, sin = table[positions].unsqueeze(2).unbind(1)
    turned.copy_(x * cos + x.roll(dim // 2, -1) * sin)
    return qkv[:, (num_turned - kv_heads) * dim :]


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


def absorb_and_cache(
    query: Tensor,
    new: Tensor,
    key_up: Tensor,
    table: Tensor,
    positions: Tensor,
    rows: Tensor,
    slots: Tensor,
    norm_weight: Tensor,
    eps: float,
    is_interleaved: bool,
) -> Tensor:
    """`latent_rope_and_cache`, and what is not turned of the queries taken into the space of latents.

    query: [T, heads, plain + D]; key_up: [heads, plain, rank]. Returns [T, heads, rank + D].
    """
    plain, rank = key_up.shape[1:]
    out = query.new_empty(*query.shape[:2], rank + query.shape[2] - plain)
    turn = query[..., plain:]
    latent_rope_and_cache(
        out[..., rank:], turn, new, table, positions, rows, slots, norm_weight, eps, is_interleaved
    )
    wide = _wide(query)
    out[..., :rank] = torch.einsum("thp,hpr->thr", query[..., :plain].to(wide), key_up.to(wide))
    return out


def latent_values(
    query: Tensor,
    rows: Tensor,
    block_tables: Tensor,
    contexts: Tensor,
    block_tokens: int,
    scaling: float,
    value_up: Tensor,
    num_splits: int = 1,
) -> Tensor:
    """`paged_latent_decode`, and its latents taken to the values of each head.

    value_up: [heads, rank, value]. Returns [B, heads * value].
    """
    rank = value_up.shape[1]
    found = paged_latent_decode(
        query.to(_wide(query)), rows, block_tables, contexts, block_tokens, scaling, rank
    )
    return torch.einsum("thr,hrv->thv", found, value_up.to(found.dtype)).to(query.dtype).flatten(1)


def _written(slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which token goes to which slot, both [T], and whether any does: padding repeats the first real token, or where
    there is none, what lies in the first slot."""
    real = slots >= 0
    source = torch.where(real, torch.arange(len(slots), device=slots.device), real.int().argmax())
    return source, slots[source].clamp(min=0), real.any()


def _write(rows: Tensor, slots: Tensor, new: Tensor) -> None:
    source, target, is_any = _written(slots)
    rows.index_copy_(0, target, torch.where(is_any, new[source], rows[target]))


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
    """x: [M, K], M at most 256; weight: [N, K]. Returns [M, N]."""
    return torch.nn.functional.linear(x, weight)


def skinny_gated(x: Tensor, weight: Tensor) -> Tensor:
    """weight: [2 * I, K], gates first. Returns silu(gate) * up, [M, I]."""
    return silu_mul(torch.nn.functional.linear(x, weight))


def skinny_parts(x: Tensor, weight: Tensor) -> Tensor:
    """The product in parts that have yet to be added up. Returns [S, M, N] float32."""
    return torch.nn.functional.linear(x.to(_wide(x)), weight.to(_wide(x)))[None]


def greedy(logits: Tensor) -> Tensor:
    """The likeliest token of each row, the first of equals, and whether it may be taken: not where a logit is NaN or
    none is finite. logits: [B, vocab]. Returns int64 [2, B].
    """
    best, tokens = logits.max(dim=-1)  # NaN wins a max, so `best` tells of it
    return torch.stack((tokens, torch.isfinite(best).to(tokens.dtype)))


def sample(logits: Tensor, params: Tensor, has_top_k: bool, has_top_p: bool) -> Tensor:
    """A token of each row, as `greedy` returns it: the likeliest where the temperature is 0, else one drawn.

    logits: [B, vocab]; params: float64 [5, B], in turn temperature, min-p, top-p (1: all), top-k (0: all) and a number
    in [0, 1) that is the draw. `has_top_k`, `has_top_p`: whether any row asks for it.

    Weights are whole numbers, 2^40 for the likeliest token, so that a sum of them is the same in any order. The tokens
    that stay are ordered by weight, equals by number: no more than top-k, none with a weight below min-p, and of the
    sum of these no more than reach top-p; the likeliest always. Of them, by number, the first is taken at which the
    summed weights exceed the draw's share of all.
    """
    temperature, min_p, top_p, top_k, draw = params[:, :, None].unbind()
    best, likeliest = logits.max(dim=-1)
    divisor = torch.where(temperature > 0, temperature, 1.0).float().clamp(min=LEAST_TEMPERATURE)
    weights = ((logits.float() - best.float()[:, None]) / divisor).exp()
    is_out = weights < min_p.float()
    levels = _levels(weights).masked_fill_(is_out, 0)
    if has_top_k or has_top_p:
        levels.masked_fill_(_is_cut(weights, levels.sum(-1, True), min_p.float(), top_k, top_p), 0)
    summed = levels.cumsum_(dim=-1)
    total = summed[:, -1:]
    target = torch.minimum((draw * total).long(), total - 1)
    drawn = torch.searchsorted(summed, target, right=True)[:, 0].clamp(max=weights.shape[1] - 1)
    tokens = torch.where(temperature[:, 0] > 0, drawn, likeliest)
    return torch.stack((tokens, torch.isfinite(best).to(tokens.dtype)))


def _is_cut(weights: Tensor, total: Tensor, min_p: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """What top-k and top-p leave out, [B, vocab]. `total`: of the levels that min-p leaves."""
    vocab_size = weights.shape[1]
    # A CPU sorts all of them only where the first ones do not do; a device would be waited for to know.
    for size in (vocab_size,) if weights.is_cuda else (min(SORTED_FIRST, vocab_size), vocab_size):
        ordered = weights.topk(size)[0] if size < vocab_size else weights.sort(dim=-1, descending=True)[0]
        stays = (ordered >= min_p) & ((top_k == 0) | (torch.arange(size, device=weights.device) < top_k))
        levels = _levels(ordered).masked_fill_(~stays, 0)
        summed = levels.cumsum(dim=-1)
        wanted = (top_p * torch.where(top_k > 0, summed[:, -1:], total)).ceil().long().clamp(min=1)
        stays &= (top_p >= 1.0) | (summed - levels < wanted)
        num = stays.sum(-1, True)
        if size == vocab_size or bool(((num < size) & (top_k <= size)).all()):
            break
    last = ordered.gather(1, (num - 1).clamp(min=0))
    num_equal = num - (ordered > last).sum(-1, True)
    is_equal = weights == last
    return (weights < last) | (is_equal & (is_equal.cumsum(-1) > num_equal))


def _levels(weights: Tensor) -> Tensor:
    return (weights * LEVELS).long()


def embed(token_ids: Tensor, drawn: Tensor, table: Tensor) -> Tensor:
    """token_ids: int64 [T], in which -1 - k is the k-th of `drawn`, int64; table: [vocab, hidden].

    Returns [T, hidden].
    """
    known = torch.where(token_ids < 0, drawn[(-1 - token_ids).clamp(min=0)], token_ids)
    return torch.nn.functional.embedding(known, table)


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
