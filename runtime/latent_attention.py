"""Attention whose cache holds one latent of a token for all heads (DeepSeek-V2 and V3).

A latent expands through `kv_b` to the keys and values of every head. Two forms of the same sum:

    expanded   keys and values of the context are made, then attended to: dear for each cached token
    absorbed   kv_b goes into the query and out of the result, and the latents themselves are attended to as keys
               and values of a single head: dear for each new token

Rows of one token are absorbed, a piece of a prompt takes the form with less arithmetic. Both read the loaded
kv_b, in every weight format: it is no `nn.Linear`, and absorbed rows read its transpose in place, so nothing of it is
held twice.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from runtime.attention import attend, attend_chunk
from runtime.layer_parts import fused, norm_of
from runtime.paged_model import AttentionCall, KVShape
from runtime.step_tensors import PaddedRows, Row, StepTensors

# Expanding takes memory by the context: heads are computed in groups of so many values of keys and values.
EXPANDED_MAX_VALUES = 1 << 26


class LatentCache(NamedTuple):
    """rows: [slots, rank + rope], a latent and the rotated part of the key.

    The values are the first `rank` values of the keys. They are read whole, and the end of the result is left out:
    kernels are faster where both have one size (on one Zen core, 2048 tokens, 16 heads: 1.0 against 1.3 ms).
    """

    rows: Tensor

    def of_row(self, row: Row) -> tuple[Tensor, Tensor]:
        rows = self.latents(row)[None, None]
        return rows, rows

    def of_padded(self, rows: PaddedRows) -> tuple[Tensor, Tensor]:
        found = self.rows.index_select(0, rows.index)
        found = found.view(rows.last - rows.first, 1, rows.longest, found.shape[1])
        return found, found

    def latents(self, row: Row) -> Tensor:
        """[context, rank + rope]: a view where possible."""
        if isinstance(row.place, slice):
            return self.rows.narrow(0, row.place.start, row.context)
        return self.rows.index_select(0, row.place)


class LatentAttention(nn.Module):
    """The attention of one layer, with weights taken over from the model's own."""

    def __init__(self, attention: Any, call: AttentionCall, is_interleaved: bool) -> None:
        super().__init__()
        self.num_heads, self.key_dim, self.value_dim, dtype = call.shape
        self.scaling, self.is_interleaved = call.scaling, is_interleaved
        into_latent, rank = attention.kv_a_proj_with_mqa, attention.kv_a_layernorm.weight.shape[0]
        rope = into_latent.out_features - rank
        self.rank, self.rope, self.plain = rank, rope, self.key_dim - rope
        self.kv_shape = KVShape(1, rank + rope, 0, dtype)
        into_query = getattr(attention, "q_a_proj", None)
        self.down = fused(attention.q_proj if into_query is None else into_query, into_latent)
        self.query = None if into_query is None else attention.q_b_proj
        self.query_norm = None if into_query is None else norm_of(attention.q_a_layernorm)
        self.latent_norm = norm_of(attention.kv_a_layernorm)
        self.kv_b = attention.kv_b_proj.weight  # [heads * (plain + value), rank]
        self.by_head = self.kv_b.detach().unflatten(0, (self.num_heads, -1))
        self.key_up, value_up = self.by_head.split((self.plain, self.value_dim), 1)
        self.value_up = value_up.transpose(1, 2)
        self.out = attention.o_proj
        self.sizes = (self.down.out_features - rank - rope, rank, rope)

    def cache_of(self, pool: Tensor) -> LatentCache:
        """pool: [slots, rank + rope]."""
        return LatentCache(pool)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: LatentCache, step: StepTensors) -> Tensor:
        """x: [T, hidden]. Returns [T, heads * value], which `out` takes."""
        query, latent, key_turn = self.down.forward(x).split(self.sizes, 1)
        if self.query is not None:
            assert self.query_norm is not None
            query = self.query.forward(self.query_norm(query))
        plain, turn = query.unflatten(1, (self.num_heads, -1)).split((self.plain, self.rope), 2)
        turned = self._turned(torch.cat((turn, key_turn.unsqueeze(1)), 1), cos, sin)
        turn, key_turn = turned.narrow(1, 0, self.num_heads), turned.select(1, self.num_heads)
        cache.rows.narrow(1, 0, self.rank).index_copy_(0, step.slots, self.latent_norm(latent))
        cache.rows.narrow(1, self.rank, self.rope).index_copy_(0, step.slots, key_turn)

        pieces = [row for row in step.rows if row.num_new > 1]  # those of one token come first
        num_single = pieces[0].first if pieces else len(x)
        outputs = []
        if num_single:
            singles = replace(step, rows=step.rows[: -len(pieces)]) if pieces else step
            absorbed = self._absorbed(plain[:num_single], turn[:num_single])
            outputs.append(self._heads_of(attend(absorbed.unsqueeze(1), cache, singles, self.scaling)))
        for row in pieces:
            own = slice(row.first, row.last)
            attend_piece = self.attend_absorbed if self.is_absorbed(row) else self.attend_expanded
            outputs.append(attend_piece(plain[own], turn[own], cache, row))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def is_absorbed(self, row: Row) -> bool:
        """Whether the absorbed form takes fewer multiplications for a piece of a prompt: a short one behind a long
        context."""
        more_a_pair = 2 * self.rank - self.plain - self.value_dim  # of a new token with a cached one
        per_expanded = self.rank * (self.plain + self.value_dim)  # the same for a new token absorbed
        return row.num_new * row.context * more_a_pair < (row.context - row.num_new) * per_expanded

    def attend_absorbed(self, plain: Tensor, turn: Tensor, cache: LatentCache, row: Row) -> Tensor:
        """plain: [T, heads, plain]; turn: [T, heads, rope]. Returns [T, heads * value]."""
        query = self._absorbed(plain, turn).transpose(0, 1).unsqueeze(0)  # [1, heads, T, rank + rope]
        return self._heads_of(attend_chunk(query, *cache.of_row(row), row, self.scaling, None))

    def attend_expanded(self, plain: Tensor, turn: Tensor, cache: LatentCache, row: Row) -> Tensor:
        """As `attend_absorbed`, by the keys and values of every head."""
        latent, key_turn = cache.latents(row).split((self.rank, self.rope), 1)
        query = torch.cat((plain, turn), 2).transpose(0, 1).unsqueeze(1)  # [heads, 1, T, D]
        group = max(1, EXPANDED_MAX_VALUES // (row.context * 2 * self.key_dim))
        outputs = []
        for weight, own in zip(self.by_head.split(group), query.split(group), strict=True):
            both = linear(latent, weight.flatten(0, 1)).unflatten(1, (len(own), -1))
            key, value = both.split((self.plain, self.value_dim), 2)
            key = torch.cat((key, key_turn.unsqueeze(1).expand(-1, len(own), -1)), 2)
            # Values as long as keys: otherwise no fused kernel takes them, on a CPU or on CUDA.
            value = pad(value, (0, max(0, self.key_dim - self.value_dim)))
            key, value = key.transpose(0, 1).unsqueeze(0), value.transpose(0, 1).unsqueeze(0)
            outputs.append(attend_chunk(own, key, value, row, self.scaling, None))  # [T, heads, 1, D]
        return torch.cat(outputs, 1)[..., : self.value_dim].flatten(1)

    def _absorbed(self, plain: Tensor, turn: Tensor) -> Tensor:
        """Queries of latents: [T, heads, rank + rope]."""
        return torch.cat((torch.bmm(plain.transpose(0, 1), self.key_up).transpose(0, 1), turn), 2)

    def _heads_of(self, found: Tensor) -> Tensor:
        """Sums of latents, with T first, to sums of values: [T, heads * value]."""
        latents = found.reshape(len(found), self.num_heads, -1).narrow(2, 0, self.rank)
        return torch.bmm(latents.transpose(0, 1), self.value_up).transpose(0, 1).flatten(1)

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [T, heads, rope]. Halves or pairs, keys and queries alike: their order has no part in a product."""
        if self.is_interleaved:
            other = x.unflatten(2, (-1, 2)).flip(3).flatten(2)
        else:
            other = x.roll(self.rope // 2, 2)
        return torch.addcmul(x * cos, other, sin).to(x.dtype)
