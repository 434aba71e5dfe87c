"""The forward pass of our decoder on a GPU, with kernels that do several things at once.

The weights are those of `runtime.decoder`; what differs is how they are multiplied and what lies between: the
residual is added where the next norm reads it, rope and the cache's write are one kernel, decode rows read their
blocks where they lie. It computes what `Decoder.forward` computes, and a test compares the two. Layers with heads of
their own and dense MLPs are computed here, latents in `runtime.fused_latent`, experts in `runtime.fused_experts`.
"""

from collections.abc import Callable, Sequence
from copy import copy
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from runtime.attention import attend_chunk, attend_pieces
from runtime.decoder import Attention, Decoder, KVCache
from runtime.experts import Experts
from runtime.fused_experts import FusedExperts
from runtime.fused_latent import FusedLatent
from runtime.kernels import TRITON, Kernels, Shape, checked
from runtime.kernels.expert_trials import ExpertShape
from runtime.kernels.launch import has_early_start, num_sms_of
from runtime.kernels.linear_table import LinearTable
from runtime.kernels.splits import (
    QUERY_TILE,
    IntArray,
    are_uneven,
    choose_splits,
    choose_tile_splits,
    tiles_of,
    uneven_splits,
)
from runtime.kv_cache import BLOCK_TOKENS
from runtime.latent_attention import LatentAttention
from runtime.layer_parts import Mlp
from runtime.step_tensors import Pieces, StepTensors
from runtime.transfer import sent

Attend = Callable[[Tensor, KVCache, Attention], Tensor]


class DecodeInputs(NamedTuple):
    """Rows of one token each, on the device. Padding rows have slot -1 and context 0.

    `token_ids`, `positions`, `slots`, `contexts`: int64 [B]; `tables`: int32 [B, blocks]; `drawn`: int64, the tokens
    that token ids below 0 stand for; `are_uneven`: the contexts, as `kernels.splits` says.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    contexts: Tensor
    tables: Tensor
    drawn: Tensor
    are_uneven: bool = False


class Attending(NamedTuple):
    """The tokens of a step and how they attend, in the last layer those whose logits somebody wants. `step`: None where
    these are all."""

    inputs: DecodeInputs
    attend: Attend
    attend_last: Attend
    step: StepTensors | None = None


class Midway(NamedTuple):
    """Between two layers, or behind the last one: the residual, and what is normed of it, [B, hidden] each."""

    x: Tensor
    y: Tensor


class MixedInputs(NamedTuple):
    """Rows of one token each and behind them pieces of prompts, in tensors that are as large whatever the step.

    `tokens`: all of them, padded; of its `contexts` and `tables` those of the first tokens, with context 0 for tokens
    that belong to no row of one token. `contexts` [P + 1], `tables` [P + 1, blocks], `edges` int32 [P + 2]: of pieces,
    of which those beyond the step's have no tokens. `tiles` int32 [N, 2]: as `splits.tiles_of` says, padded with those
    of the last piece, which has none.
    """

    tokens: DecodeInputs
    contexts: Tensor
    tables: Tensor
    edges: Tensor
    tiles: Tensor


class PiecesInputs(NamedTuple):
    """Pieces of prompts for attention over the pool. `tables`, `contexts`: of all rows of the step; `tiles`,
    `num_splits`: as `kernels.splits` says."""

    pieces: Pieces
    tables: Tensor
    contexts: Tensor
    tiles: Tensor
    num_splits: int

    @classmethod
    def of_step(
        cls, step: StepTensors, tables: Tensor, num_heads: int, num_sms: int
    ) -> "PiecesInputs | None":
        pieces = step.pieces
        if pieces is None:
            return None
        tiles = sent(tiles_of(pieces.new_tokens, pieces.contexts), step.contexts.device)
        splits = choose_tile_splits(len(tiles), num_heads, pieces.max_context, num_sms)
        return cls(pieces, tables, step.contexts, tiles, splits)


class FusedPass:
    """A decoder computed by kernels."""

    def __init__(
        self, decoder: Decoder, kernels: Kernels, block_tokens: int, max_model_len: int, num_sms: int
    ) -> None:
        self._decoder, self.kernels = decoder, kernels
        self._num_sms = num_sms
        # Latents choose their own splits.
        own = [layer.attention for layer in decoder.layers if isinstance(layer.attention, Attention)]
        self._kv_heads = own[0].kv_heads if own else 1
        self._most_seen = max((one.window or max_model_len for one in own), default=0)  # tokens of a context
        self.replaced_kernels: tuple[str, ...] = ()  # those that failed their check, by their plain twins
        self.reads_pieces_in_place = True
        self.linears = LinearTable(kernels)
        # A captured graph reads the table where it lies, so it is made whole.
        self._angles = decoder.rope.table(max_model_len)
        self._latent = FusedLatent(kernels, self.linears, self._angles, block_tokens, num_sms)
        self._experts = FusedExperts(kernels, self.linears)
        self.use_blocks(block_tokens)

    def use_blocks(self, block_tokens: int) -> None:
        """From here on the pool's blocks are of so many tokens."""
        self._block_tokens = self._latent.block_tokens = block_tokens

    def over_blocks(self, block_tokens: int) -> "FusedPass":
        """The same over blocks of so many tokens, for another thread."""
        other = copy(self)
        other._latent = copy(self._latent)
        other.use_blocks(block_tokens)
        return other

    def forward(self, step: StepTensors, caches: Sequence[Any]) -> Tensor:
        """Any rows. Returns logits [last_tokens, vocab]."""
        return self.logits(self._hidden(self._mixed(step, caches[0]), caches))

    def decode(
        self, inputs: DecodeInputs, caches: Sequence[Any], part: range, midway: Midway | None = None
    ) -> Midway:
        """Some layers for rows of one token, from what `midway` says of the layers before, which it adds to. Depends on
        nothing but the inputs' shapes, so that it can be captured."""
        attend = self._single(inputs)
        if midway is None:
            x = self._embedded(inputs)
            midway = Midway(x, self._normed_for(x, None, 0))
        return midway._replace(y=self._through(*midway, part, Attending(inputs, attend, attend), caches))

    @property
    def may_capture_pieces(self) -> bool:
        """Whether steps with pieces of prompts depend on nothing but their inputs' shapes: not where experts are chosen
        or latents gathered."""
        layers = self._decoder.layers
        are_plain = all(isinstance(one.attention, Attention) and isinstance(one.mlp, Mlp) for one in layers)
        return self.reads_pieces_in_place and are_plain

    def parts(self, num: int) -> list[range]:
        """The layers in so many parts, or as many as there are."""
        num_layers = len(self._decoder.layers)
        edges = [at * num_layers // num for at in range(num + 1)]
        return [range(*pair) for pair in pairwise(edges) if pair[0] < pair[1]]

    def mixed(self, inputs: MixedInputs, caches: Sequence[Any], x: Tensor, y: Tensor, part: range) -> None:
        """Some layers, one behind the other. Depends on nothing but the inputs' shapes, so that it can be captured.

        x, y: the residual and what is normed of it, [T, hidden], as the part before has left them and in place as this
        one leaves them: y is at last the normed output of the last layer.
        """
        tokens, num_apart = inputs.tokens, len(inputs.tokens.contexts)
        splits = self._splits(num_apart, tokens.are_uneven)
        is_apart = (tokens.contexts > 0)[:, None]

        def attend(qkv: Tensor, cache: KVCache, layer: Attention) -> Tensor:
            found = self.kernels.paged_prefill(
                queries_of(qkv, layer), cache.rows, inputs.tables, inputs.contexts, 0, inputs.edges, inputs.tiles, 1,
                self._block_tokens, layer.scaling, layer.window,
            )  # fmt: skip
            if num_apart:
                first = found[:num_apart]
                alone = self._decode(qkv[:num_apart], cache, layer, tokens, splits)
                torch.where(is_apart, alone, first, out=first)
            return found

        if not part.start:
            x.copy_(self._embedded(tokens))
            y.copy_(self._normed_for(x, None, 0))
        y.copy_(self._through(x, y, part, Attending(tokens, attend, attend), caches))

    def logits(self, x: Tensor) -> Tensor:
        """x: the normed output of the last layer, [rows, hidden]. Returns [rows, vocab]."""
        return self.linears.whole(self._decoder.head, x)

    def attend_only(self, step: StepTensors | DecodeInputs, layer: Attention, cache: Any) -> None:
        """Launches what such a step launches over the cache of one layer, and multiplies no weights."""
        if isinstance(step, StepTensors):
            inputs, *attends, _ = self._mixed(step, cache)
        else:
            inputs, attends = step, [self._single(step)]
        width = (layer.num_heads + 2 * layer.kv_heads) * layer.dim
        dtype, device = self._decoder.embedding.dtype, inputs.slots.device
        qkv = torch.zeros(len(inputs.slots), width, dtype=dtype, device=device)
        self._turn(qkv, cache, layer, inputs)
        for attend in attends:
            attend(qkv, cache, layer)

    def _single(self, inputs: DecodeInputs) -> Attend:
        splits = self._splits(len(inputs.contexts), inputs.are_uneven)

        def attend(qkv: Tensor, cache: KVCache, layer: Attention) -> Tensor:
            return self._decode(qkv, cache, layer, inputs, splits)

        return attend

    def _mixed(self, step: StepTensors, cache: Any) -> Attending:
        """`cache`: of any layer."""
        num_single = step.num_apart
        tables = (
            step.tables.int()
        )  # as graphs have them: with others, kernels would be compiled while serving
        inputs = DecodeInputs(
            step.token_ids[0],
            step.positions[0],
            step.slots,
            step.contexts[:num_single],
            tables[:num_single],
            drawn=step.token_ids[0],  # all are known
            are_uneven=step.are_uneven,
        )
        splits = self._splits(num_single, step.are_uneven)
        pieces = self._pieces_in_place(step, tables, cache)

        def attend(qkv: Tensor, cache: KVCache, layer: Attention) -> Tensor:
            found = []
            if num_single:
                found.append(self._decode(qkv[:num_single], cache, layer, inputs, splits))
            if pieces is not None:
                whole = self._read_pieces(qkv, cache, layer, pieces)
                if num_single:
                    whole[:num_single] = found[0]
                return whole
            if step.pieces is not None:
                found.append(self._gather_pieces(qkv[num_single:], cache, layer, step.pieces))
            for row in step.rows:
                q = queries_of(qkv[row.first : row.last], layer).permute(1, 2, 0, 3)
                out = attend_chunk(q, *cache.of_row(row), row, layer.scaling, layer.window)
                found.append(out.flatten(1))
            return found[0] if len(found) == 1 else torch.cat(found)

        # Scored tokens are too many to read the cache for each of them anew.
        if pieces is not None and len(step.last_tokens) <= len(step.contexts):
            return Attending(inputs, attend, self._last(step, inputs, tables), step)

        def attend_last(qkv: Tensor, cache: KVCache, layer: Attention) -> Tensor:
            return attend(qkv, cache, layer).index_select(0, step.last_tokens)

        return Attending(inputs, attend, attend_last, step)

    def _last(self, step: StepTensors, inputs: DecodeInputs, tables: Tensor) -> Attend:
        """Each of the step's last tokens as a row of its own, behind what is cached before it."""
        at = step.last_tokens
        if not len(at):
            return lambda qkv, cache, layer: qkv[:0]
        rows = inputs._replace(
            contexts=inputs.positions.index_select(0, at) + 1, tables=tables.index_select(0, step.last_rows)
        )
        single = self._single(rows)

        def attend(qkv: Tensor, cache: KVCache, layer: Attention) -> Tensor:
            return single(qkv.index_select(0, at), cache, layer)

        return attend

    def measure_linears(self) -> None:
        """Finds the faster form of each layer, and has the other one ready for steps of all sizes."""
        attentions = [layer.attention for layer in self._decoder.layers]
        mlps = [layer.mlp for layer in self._decoder.layers if isinstance(layer.mlp, Mlp)]
        whole = [self._decoder.head, *(part for one in attentions for part in layers_into(one))]
        gated = [one.gate_up for one in mlps]
        parts = [*(one.out for one in attentions), *(one.down for one in mlps)]
        self.linears.measure({"whole": whole, "gated": gated, "parts": parts})
        self.linears.wake([*whole, *gated, *parts])

    def _pieces_in_place(self, step: StepTensors, tables: Tensor, cache: Any) -> "PiecesInputs | None":
        """None where there are none, or latents or a rounded cache, which are gathered."""
        attention = self._decoder.layers[0].attention
        is_read = self.reads_pieces_in_place and isinstance(attention, Attention) and cache.scales is None
        return PiecesInputs.of_step(step, tables, attention.num_heads, self._num_sms) if is_read else None

    def _read_pieces(self, qkv: Tensor, cache: KVCache, layer: Attention, inputs: "PiecesInputs") -> Tensor:
        """qkv: of all tokens. Returns [tokens, heads * D], without those before the pieces."""
        pieces = inputs.pieces
        # Only for these are more than one compiled at the start.
        is_split = self._block_tokens == QUERY_TILE and layer.window is None
        return self.kernels.paged_prefill(
            queries_of(qkv, layer), cache.rows, inputs.tables, inputs.contexts, pieces.first_row, pieces.new_edges,
            inputs.tiles, inputs.num_splits if is_split else 1, self._block_tokens, layer.scaling, layer.window,
        )  # fmt: skip

    def _gather_pieces(self, qkv: Tensor, cache: KVCache, layer: Attention, pieces: Pieces) -> Tensor:
        """With keys and values in one piece, as FlashAttention wants them. qkv: of the pieces' tokens. Returns
        [tokens, heads * D]."""
        heads, kv_heads, dim = layer.num_heads, layer.kv_heads, layer.dim
        query, key, value = qkv.unflatten(1, (-1, dim)).split((heads, kv_heads, kv_heads), 1)
        if pieces.slots is not None:
            cached = cache.read(pieces.slots)
            key, value = cached.unflatten(1, (2, kv_heads, dim)).unbind(1)
        return attend_pieces(query, key, value, pieces, layer.scaling, layer.window).flatten(1)

    def are_uneven(self, contexts: IntArray, num_rows: int) -> bool:
        """Of so many rows of one token, padding among them."""
        if not len(contexts) or not self._most_seen:
            return False
        return are_uneven(np.minimum(contexts, self._most_seen), num_rows, self._kv_heads, self._num_sms)

    def _splits(self, num_rows: int, are_uneven: bool) -> int:
        choose = uneven_splits if are_uneven else choose_splits
        return choose(num_rows, self._kv_heads, self._num_sms)

    def _turn(self, qkv: Tensor, cache: KVCache, layer: Attention, inputs: DecodeInputs) -> None:
        """Queries and keys where they are, and keys and values to the cache."""
        norm = layer.qk_norm
        turn = (None if norm is None else norm.weight, 0.0 if norm is None else norm.eps)
        written = (qkv, self._angles, inputs.positions, cache.rows)
        if cache.scales is not None:
            self.kernels.rope_and_cache_fp8(*written, cache.scales, inputs.slots, layer.kv_heads, *turn)
        else:
            self.kernels.rope_and_cache(*written, inputs.slots, layer.kv_heads, *turn)

    def _decode(
        self, qkv: Tensor, cache: KVCache, layer: Attention, inputs: DecodeInputs, splits: int
    ) -> Tensor:
        if cache.scales is not None:
            return self.kernels.paged_decode_fp8(
                queries_of(qkv, layer), cache.rows, cache.scales, inputs.tables, inputs.contexts, self._block_tokens,
                layer.scaling, layer.window, splits,
            )  # fmt: skip
        return self.kernels.paged_decode(
            queries_of(qkv, layer), cache.rows, inputs.tables, inputs.contexts, self._block_tokens, layer.scaling,
            layer.window, splits,
        )  # fmt: skip

    def _hidden(self, how: Attending, caches: Sequence[Any]) -> Tensor:
        """Returns the normed output of the last layer, [T, hidden], or that of the step's `last_tokens`: what no logits
        need is left out of it behind keys and values."""
        x, layers = self._embedded(how.inputs), range(len(self._decoder.layers))
        return self._through(x, self._normed_for(x, None, 0), layers, how, caches)

    def _embedded(self, inputs: DecodeInputs) -> Tensor:
        return self.kernels.embed(inputs.token_ids, inputs.drawn, self._decoder.embedding)

    def _normed_for(self, x: Tensor, delta: Tensor | None, at: int) -> Tensor:
        """What layer `at` reads, or behind the last one the head; adds `delta` to x."""
        layers = self._decoder.layers
        norm = layers[at].before if at < len(layers) else self._decoder.norm
        return self.kernels.add_norm(x, delta, norm.weight, norm.eps)

    def _through(self, x: Tensor, y: Tensor, part: range, how: Attending, caches: Sequence[Any]) -> Tensor:
        """Some layers, from what the first of them reads to what the next one would; x is added to."""
        layers, step = self._decoder.layers, how.step
        for at in part:
            layer, cache = layers[at], caches[at]
            attention, mlp = layer.attention, layer.mlp
            kept = step.last_tokens if step is not None and at == len(layers) - 1 else None
            if kept is not None:
                x = x.index_select(0, kept)
            if isinstance(attention, LatentAttention):
                found = self._latent.attend(y, cache, attention, how.inputs, step)
                found = found if kept is None else found.index_select(0, kept)
            else:
                qkv = self.linears.whole(attention.qkv, y)
                self._turn(qkv, cache, attention, how.inputs)
                found = (how.attend if kept is None else how.attend_last)(qkv, cache, attention)
            if not len(x):
                return x
            delta = self.linears.added(attention.out, found)
            y = self.kernels.add_norm(x, delta, layer.between.weight, layer.between.eps)
            if isinstance(mlp, Experts):
                delta = self._experts.forward(y, mlp)
            else:
                delta = self.linears.added(mlp.down, self.linears.gated(mlp.gate_up, y))
            y = self._normed_for(x, delta, at + 1)
        return y

    def greedy(self, logits: Tensor) -> Tensor:
        """The likeliest tokens, and whether each may be taken: int64 [2, rows]."""
        return self.kernels.greedy(logits)


def queries_of(qkv: Tensor, layer: Attention) -> Tensor:
    """A view, [T, kv_heads, group, D]."""
    query = qkv.narrow(1, 0, layer.num_heads * layer.dim)
    return query.unflatten(1, (layer.kv_heads, -1, layer.dim))


def layers_into(attention: Attention | LatentAttention) -> list[nn.Module]:
    """The linear layers before the cache."""
    if isinstance(attention, Attention):
        return [attention.qkv]
    return [attention.down] if attention.query is None else [attention.down, attention.query]


def fused_pass(decoder: Decoder, device: torch.device, max_model_len: int) -> FusedPass | None:
    """The pass where there is a GPU with Triton. A kernel that fails its check is replaced by its plain twin."""
    if device.type != "cuda" or TRITON is None:
        return None
    kernels, replaced = checked(TRITON, device, decoder.embedding.dtype, shape_of(decoder))
    num_sms = num_sms_of(device)
    found = FusedPass(decoder, kernels, BLOCK_TOKENS, max_model_len, num_sms)
    found.replaced_kernels = tuple(replaced)
    # Elsewhere FlashAttention 2 is at home, and the twin of this kernel waits for the device.
    found.reads_pieces_in_place = has_early_start(device) and "paged_prefill" not in replaced
    found.measure_linears()
    return found


def shape_of(decoder: Decoder) -> Shape:
    """What the kernels see of the model."""
    hidden = decoder.embedding.shape[1]
    attention = decoder.layers[0].attention
    dense = next((layer.mlp for layer in decoder.layers if isinstance(layer.mlp, Mlp)), None)
    mixed = next((layer.mlp for layer in decoder.layers if isinstance(layer.mlp, Experts)), None)
    experts = None
    if mixed is not None:
        num_experts, _, size = mixed.down.shape
        num_shared = 0 if mixed.shared is None else mixed.shared.down.in_features // size
        rule, is_biased = mixed.rule._replace(bias=None), mixed.rule.bias is not None
        experts = ExpertShape(num_experts, size, num_shared, rule, is_biased)
    intermediate = hidden if dense is None else dense.down.in_features
    if isinstance(attention, LatentAttention):
        return Shape(
            attention.num_heads, 1, attention.key_dim, hidden, intermediate, BLOCK_TOKENS,
            latent_dim=attention.rank + attention.rope, latent_value_dim=attention.rank, has_own_heads=False,
            experts=experts,
        )  # fmt: skip
    return Shape(
        attention.num_heads, attention.kv_heads, attention.dim, hidden, intermediate, BLOCK_TOKENS, attention.window,
        attention.qk_norm is not None, experts=experts,
    )  # fmt: skip
