"""Latent attention (DeepSeek) by kernels: one that turns and caches, one that attends absorbed decode rows.

    a few rows of one token    turn, norm, cache, kv_b into the query ▶ latents where they lie, kv_b out
    several                    turn, norm, cache ▶ kv_b into the query ▶ latents where they lie ▶ kv_b out
    pieces of prompts          turn, norm, cache ▶ keys and values of all heads ▶ one call for all pieces

It computes what `LatentAttention.forward` computes before its last linear layer, except that pieces are never absorbed.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from runtime.attention import attend_pieces
from runtime.kernels import Kernels
from runtime.kernels.linear_table import LinearTable
from runtime.kernels.splits import choose_splits
from runtime.latent_attention import EXPANDED_MAX_VALUES, LatentAttention, LatentCache
from runtime.step_tensors import Pieces, StepTensors

if TYPE_CHECKING:
    from runtime.fused_pass import DecodeInputs

HEADS_PER_PROGRAM = 64  # of the kernel for decode rows
# Not measured. Beyond, each row reads the half of kv_b again that makes values: 2 MB in DeepSeek-V2-Lite.
FEW_MAX_ROWS = 4


class FusedLatent:
    """`angles`: of the model's rope, [positions, 2, D]."""

    def __init__(
        self, kernels: Kernels, linears: LinearTable, angles: Tensor, block_tokens: int, num_sms: int
    ) -> None:
        self._kernels, self._linears, self._angles = kernels, linears, angles
        self.block_tokens, self._num_sms = block_tokens, num_sms

    def attend(
        self,
        x: Tensor,
        cache: LatentCache,
        layer: LatentAttention,
        inputs: "DecodeInputs",
        step: StepTensors | None,
    ) -> Tensor:
        """x: [T, hidden], normed; step: None where all rows are of one token. Returns [T, heads * value], which
        `layer.out` takes."""
        query, new = self._projected(x, layer)
        num_apart = len(inputs.contexts)
        if num_apart == len(x) <= FEW_MAX_ROWS:
            return self._few(query, new, cache, layer, inputs)
        turn = query.narrow(2, layer.plain, layer.rope)
        absorbed = x.new_empty(num_apart, layer.num_heads, layer.rank + layer.rope)
        own_turn = absorbed.narrow(2, layer.rank, layer.rope)
        are_all_apart = num_apart == len(x)
        self._kernels.latent_rope_and_cache(
            own_turn if are_all_apart else turn, turn, new, self._angles, inputs.positions, cache.rows, inputs.slots,
            layer.latent_norm.weight, layer.latent_norm.eps, layer.is_interleaved,
        )  # fmt: skip
        found = []
        if num_apart:
            if not are_all_apart:
                own_turn.copy_(turn[:num_apart])
            found.append(self._apart(query[:num_apart], absorbed, cache, layer, inputs))
        if step is not None and step.pieces is not None:
            found.append(self._pieces(query[step.pieces.first :], cache, layer, inputs, step.pieces))
        for row in step.rows if step is not None else ():
            plain, turned = query[row.first : row.last].split((layer.plain, layer.rope), 2)
            found.append(layer.attend_expanded(plain, turned, cache, row))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _projected(self, x: Tensor, layer: LatentAttention) -> tuple[Tensor, Tensor]:
        """Queries, [T, heads, plain + rope], and what is cached, not yet normed or turned: [T, rank + rope]."""
        query, new = self._linears.whole(layer.down, x).split((layer.sizes[0], layer.rank + layer.rope), 1)
        if layer.query is not None:
            norm = layer.query_norm
            assert norm is not None
            normed = self._kernels.add_norm(query, None, norm.weight, norm.eps)
            query = self._linears.whole(layer.query, normed)
        return query.unflatten(1, (layer.num_heads, -1)), new

    def _few(
        self, query: Tensor, new: Tensor, cache: LatentCache, layer: LatentAttention, inputs: "DecodeInputs"
    ) -> Tensor:
        """Rows of one token, so few that launches count for more than what is read twice. As `attend`."""
        absorbed = self._kernels.absorb_and_cache(
            query, new, layer.key_up, self._angles, inputs.positions, cache.rows, inputs.slots,
            layer.latent_norm.weight, layer.latent_norm.eps, layer.is_interleaved,
        )  # fmt: skip
        return self._kernels.latent_values(
            absorbed, cache.rows, inputs.tables, inputs.contexts, self.block_tokens, layer.scaling, layer.value_up,
            self._splits(absorbed),
        )  # fmt: skip

    def _splits(self, absorbed: Tensor) -> int:
        num_rows, heads, _ = absorbed.shape
        return choose_splits(num_rows, -(-heads // HEADS_PER_PROGRAM), self._num_sms)

    def _apart(
        self, query: Tensor, absorbed: Tensor, cache: LatentCache, layer: LatentAttention, inputs: "DecodeInputs"
    ) -> Tensor:  # fmt: skip
        """absorbed: [B, heads, rank + rope], of which the turned part is there already. Returns [B, heads * value]."""
        num_rows, heads = absorbed.shape[:2]
        into = absorbed.narrow(2, 0, layer.rank).transpose(0, 1)
        torch.bmm(query.narrow(2, 0, layer.plain).transpose(0, 1), layer.key_up, out=into)
        latents = self._kernels.paged_latent_decode(
            absorbed, cache.rows, inputs.tables, inputs.contexts, self.block_tokens, layer.scaling, layer.rank,
            self._splits(absorbed),
        )  # fmt: skip
        out = query.new_empty(num_rows, heads, layer.value_dim)
        torch.bmm(latents.transpose(0, 1), layer.value_up, out=out.transpose(0, 1))
        return out.flatten(1)

    def _pieces(
        self,
        query: Tensor,
        cache: LatentCache,
        layer: LatentAttention,
        inputs: "DecodeInputs",
        pieces: Pieces,
    ) -> Tensor:
        """query: of the pieces' tokens. Returns [tokens, heads * value]."""
        slots = inputs.slots[pieces.first :] if pieces.slots is None else pieces.slots
        latent, key_turn = cache.rows.index_select(0, slots).split((layer.rank, layer.rope), 1)
        group = max(1, EXPANDED_MAX_VALUES // (len(slots) * 2 * layer.key_dim))
        outputs = []
        for weight, own in zip(layer.by_head.split(group), query.split(group, 1), strict=True):
            both = linear(latent, weight.flatten(0, 1)).unflatten(1, (len(weight), -1))
            turned = key_turn.unsqueeze(1).expand(-1, len(weight), -1)
            key = torch.cat((both.narrow(2, 0, layer.plain), turned), 2)
            outputs.append(attend_equal(own, key, both, layer, pieces))
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)).flatten(1)


def attend_equal(query: Tensor, key: Tensor, both: Tensor, layer: LatentAttention, pieces: Pieces) -> Tensor:
    """The kernel wants keys and values of one size. Where values are shorter, some of what lies before them in `both`
    is taken for values too: it costs what padding would, without a copy.

    both: [cached tokens, heads, plain + value]. Returns [tokens, heads, value].
    """
    over = layer.key_dim - layer.value_dim
    if 0 <= over <= layer.plain:
        value = both.narrow(2, layer.plain - over, layer.key_dim)
    else:
        value = pad(both.narrow(2, layer.plain, layer.value_dim), (max(0, over), 0))
        query, key = (pad(part, (0, max(0, -over))) for part in (query, key))
    out = attend_pieces(query, key, value, pieces, layer.scaling, None)
    return out.narrow(2, max(0, over), layer.value_dim)
