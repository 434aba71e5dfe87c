"""The forward pass of our decoder on a GPU, with kernels that do several things at once.

The weights are those of `runtime.decoder`; what differs is how they are multiplied and what lies between: the
residual is added where the next norm reads it, rope and the cache's write are one kernel, decode rows read their
blocks where they lie. It computes what `Decoder.forward` computes, and a test compares the two.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.attention import Pieces, StepTensors, attend_chunk, attend_pieces
from runtime.decoder import Attention, Decoder, JointCache
from runtime.kernels import TRITON, Kernels, Shape, checked
from runtime.kernels.linear_table import LinearTable
from runtime.kernels.splits import choose_splits
from runtime.kv_cache import BLOCK_TOKENS
from runtime.layer_parts import Mlp

Attend = Callable[[Tensor, JointCache, Attention], Tensor]


class DecodeInputs(NamedTuple):
    """Rows of one token each, on the device. Padding rows have slot -1 and context 0.

    `token_ids`, `positions`, `slots`, `contexts`: int64 [B]; `tables`: int32 [B, blocks]; `drawn`: int64, the tokens
    that token ids below 0 stand for.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    contexts: Tensor
    tables: Tensor
    drawn: Tensor


class FusedPass:
    """A decoder of attention with heads of its own and dense MLPs, computed by kernels."""

    def __init__(
        self, decoder: Decoder, kernels: Kernels, block_tokens: int, max_model_len: int, num_sms: int
    ) -> None:
        self._decoder, self._kernels, self._block_tokens = decoder, kernels, block_tokens
        self._num_sms = num_sms
        self.linears = LinearTable(kernels)
        # A captured graph reads the table where it lies, so it is made whole.
        self._angles = decoder.rope.table(max_model_len)

    def forward(self, step: StepTensors, caches: Sequence[JointCache]) -> Tensor:
        """Any rows. Returns logits [last_tokens, vocab]."""
        num_single = step.num_apart
        inputs = DecodeInputs(
            step.token_ids[0],
            step.positions[0],
            step.slots,
            step.contexts[:num_single],
            step.tables[:num_single],
            drawn=step.token_ids[0],  # all are known
        )
        splits = self._splits(num_single)

        def attend(qkv: Tensor, cache: JointCache, layer: Attention) -> Tensor:
            found = []
            if num_single:
                found.append(self._decode(qkv[:num_single], cache, layer, inputs, splits))
            if step.pieces is not None:
                found.append(self._pieces(qkv[step.pieces.first :], cache, layer, step.pieces))
            for row in step.rows:
                q = queries_of(qkv[row.first : row.last], layer).permute(1, 2, 0, 3)
                out = attend_chunk(q, *cache.of_row(row), row, layer.scaling, layer.window)
                found.append(out.flatten(1))
            return found[0] if len(found) == 1 else torch.cat(found)

        return self._logits(self._hidden(inputs, caches, attend).index_select(0, step.last_tokens))

    def decode(self, inputs: DecodeInputs, caches: Sequence[JointCache]) -> Tensor:
        """Rows of one token. Depends on nothing but the inputs' shapes, so that it can be captured.

        Returns logits [B, vocab].
        """
        splits = self._splits(len(inputs.contexts))

        def attend(qkv: Tensor, cache: JointCache, layer: Attention) -> Tensor:
            return self._decode(qkv, cache, layer, inputs, splits)

        return self._logits(self._hidden(inputs, caches, attend))

    def measure_linears(self) -> None:
        """Finds the faster form of each layer."""
        attentions = [
            layer.attention for layer in self._decoder.layers if isinstance(layer.attention, Attention)
        ]
        mlps = [layer.mlp for layer in self._decoder.layers if isinstance(layer.mlp, Mlp)]
        self.linears.measure("whole", [self._decoder.head, *(one.qkv for one in attentions)])
        self.linears.measure("gated", [one.gate_up for one in mlps])
        self.linears.measure("parts", [*(one.out for one in attentions), *(one.down for one in mlps)])

    def _pieces(self, qkv: Tensor, cache: JointCache, layer: Attention, pieces: Pieces) -> Tensor:
        """qkv: of the pieces' tokens. Returns [tokens, heads * D]."""
        heads, kv_heads, dim = layer.num_heads, layer.kv_heads, layer.dim
        query, key, value = qkv.unflatten(1, (-1, dim)).split((heads, kv_heads, kv_heads), 1)
        if pieces.slots is not None:
            cached = cache.rows.index_select(0, pieces.slots)
            key, value = cached.unflatten(1, (2, kv_heads, dim)).unbind(1)
        return attend_pieces(query, key, value, pieces, layer.scaling, layer.window).flatten(1)

    def _splits(self, num_rows: int) -> int:
        return choose_splits(num_rows, self._decoder.layers[0].attention.kv_heads, self._num_sms)

    def _decode(
        self, qkv: Tensor, cache: JointCache, layer: Attention, inputs: DecodeInputs, splits: int
    ) -> Tensor:
        return self._kernels.paged_decode(
            queries_of(qkv, layer), cache.rows, inputs.tables, inputs.contexts, self._block_tokens, layer.scaling,
            layer.window, splits,
        )  # fmt: skip

    def _hidden(self, inputs: DecodeInputs, caches: Sequence[JointCache], attend: Attend) -> Tensor:
        """Returns the normed output of the last layer, [T, hidden]."""
        kernels, decoder = self._kernels, self._decoder
        x = kernels.embed(inputs.token_ids, inputs.drawn, decoder.embedding)
        delta: Tensor | None = None
        for layer, cache in zip(decoder.layers, caches, strict=True):
            attention, mlp = layer.attention, layer.mlp
            assert isinstance(attention, Attention) and isinstance(mlp, Mlp)
            y = kernels.add_norm(x, delta, layer.before.weight, layer.before.eps)
            qkv = self.linears.whole(attention.qkv, y)
            norm = attention.qk_norm
            kernels.rope_and_cache(
                qkv, self._angles, inputs.positions, cache.rows, inputs.slots, attention.kv_heads,
                None if norm is None else norm.weight, 0.0 if norm is None else norm.eps,
            )  # fmt: skip
            delta = self.linears.added(attention.out, attend(qkv, cache, attention))
            y = kernels.add_norm(x, delta, layer.between.weight, layer.between.eps)
            delta = self.linears.added(mlp.down, self.linears.gated(mlp.gate_up, y))
        return kernels.add_norm(x, delta, decoder.norm.weight, decoder.norm.eps)

    def greedy(self, logits: Tensor) -> Tensor:
        """The likeliest tokens, and whether each may be taken: int64 [2, rows]."""
        return self._kernels.greedy(logits)

    def _logits(self, x: Tensor) -> Tensor:
        return self.linears.whole(self._decoder.head, x)


def queries_of(qkv: Tensor, layer: Attention) -> Tensor:
    """A view, [T, kv_heads, group, D]."""
    query = qkv.narrow(1, 0, layer.num_heads * layer.dim)
    return query.unflatten(1, (layer.kv_heads, -1, layer.dim))


def shape_of(decoder: Decoder) -> Shape:
    """Of a decoder whose layers are all of the kinds that the kernels know."""
    first = decoder.layers[0]
    attention, mlp = first.attention, first.mlp
    assert isinstance(attention, Attention) and isinstance(mlp, Mlp)
    return Shape(
        attention.num_heads, attention.kv_heads, attention.dim, decoder.embedding.shape[1], mlp.down.in_features,
        BLOCK_TOKENS, attention.window, attention.qk_norm is not None,
    )  # fmt: skip


def fused_pass(decoder: Decoder, device: torch.device, max_model_len: int) -> FusedPass | None:
    """The pass where there is a GPU with Triton, and layers of the kinds that the kernels know. A kernel that fails
    its check is replaced by its plain twin."""
    layers = decoder.layers
    known = all(isinstance(layer.attention, Attention) and isinstance(layer.mlp, Mlp) for layer in layers)
    if device.type != "cuda" or TRITON is None or not known:
        return None
    kernels, _ = checked(TRITON, device, decoder.embedding.dtype, shape_of(decoder))
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    found = FusedPass(decoder, kernels, BLOCK_TOKENS, max_model_len, num_sms)
    found.measure_linears()
    return found
