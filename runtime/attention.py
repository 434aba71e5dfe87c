"""Attention of packed rows over the paged pool, for our decoder and for any Hugging Face model.

New keys and values of all rows are written to their slots; then rows are attended to one by one, or decode rows
padded, all at once, as `runtime.step_tensors` says.
`attend_plain` says what is meant; the faster forms are tested against it.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from runtime.step_tensors import PaddedRows, Pieces, Row, StepTensors


def attend_plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention written out, the specification of every other form here.

    query: [kv_heads, group, T, D]; key, value: [kv_heads, context, D]; allowed: bool [T, context];
    sinks: [heads] logits that take part in the softmax and carry no value. Returns [kv_heads, group, T, Dv].
    """
    scores = torch.matmul(query, key[:, None].transpose(2, 3)) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~allowed, float("-inf"))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if sinks is not None:
        column = sinks.to(scores.dtype).view(*query.shape[:2], 1, 1).expand(*query.shape[:3], 1)
        scores = torch.cat((scores, column), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : key.shape[1]]
    return torch.matmul(weights.to(value.dtype), value[:, None])


def attend_pieces(
    query: Tensor, key: Tensor, value: Tensor, pieces: Pieces, scaling: float, window: int | None
) -> Tensor:
    """FlashAttention over rows of all lengths (CUDA, half precision): a query sees the cached tokens up to its own.

    query: [new tokens, heads, D]; key, value: [cached tokens, kv_heads, D]. Returns [new tokens, heads, D].
    """
    found: tuple[Tensor, ...] = torch.ops.aten._flash_attention_forward(
        query, key, value, pieces.new_edges, pieces.context_edges, pieces.max_new, pieces.max_context, 0.0, True, False,
        scale=scaling, window_size_left=None if window is None else window - 1, window_size_right=None,
    )  # fmt: skip
    return found[0]


class LayerCache(Protocol):
    """One layer's keys and values, wherever they lie."""

    def of_row(self, row: Row) -> tuple[Tensor, Tensor]:
        """Keys and values of one row, [1, kv_heads, context, D] each: views where possible."""
        ...

    def of_padded(self, rows: PaddedRows) -> tuple[Tensor, Tensor]:
        """Keys and values of several rows, [rows, kv_heads, longest, D] each."""
        ...


class SplitCache(NamedTuple):
    """Keys and values in a tensor each, [kv_heads, slots, D]."""

    keys: Tensor
    values: Tensor

    def of_row(self, row: Row) -> tuple[Tensor, Tensor]:
        return _gather(self.keys, row)[None], _gather(self.values, row)[None]

    def of_padded(self, rows: PaddedRows) -> tuple[Tensor, Tensor]:
        return self._padded(self.keys, rows), self._padded(self.values, rows)

    @staticmethod
    def _padded(pool: Tensor, rows: PaddedRows) -> Tensor:
        return pool.index_select(1, rows.index).unflatten(1, (rows.last - rows.first, -1)).transpose(0, 1)


def _gather(pool: Tensor, row: Row) -> Tensor:
    """pool: [kv_heads, slots, D]. Returns [kv_heads, context, D]: a view where possible."""
    if isinstance(row.place, slice):
        return pool.narrow(1, row.place.start, row.context)
    return pool.index_select(1, row.place)


def attend(
    query: Tensor,
    cache: LayerCache,
    step: StepTensors,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of all rows of a step, whose keys and values are in the cache already.

    query: [T, kv_heads, group, D]. Returns [T, heads * Dv].
    """
    special = softcap is not None or sinks is not None
    outputs = [
        _attend_padded(query, *cache.of_padded(rows), rows, scaling, window, softcap, sinks)
        for rows in step.padded
    ]
    by_token = query.split(1) if step.has_single_rows else ()
    for row in step.rows:
        key, value = cache.of_row(row)
        if special:
            q, allowed = query[row.first : row.last].permute(1, 2, 0, 3), row.allowed(window, query.device)
            out = attend_plain(q, key[0], value[0], allowed, scaling, softcap, sinks)
            outputs.append(out.permute(2, 0, 1, 3))
        elif row.num_new == 1:
            outputs.append(_attend_one(by_token[row.first], key, value, scaling, window))
        else:
            q = query[row.first : row.last].permute(1, 2, 0, 3)
            outputs.append(attend_chunk(q, key, value, row, scaling, window))
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)  # [T, kv_heads, group, Dv]
    return out.flatten(1)


class PagedAttention:
    """The attention of one Hugging Face model: its pools, and the step that is being computed."""

    def __init__(self) -> None:
        self.pools: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys, values: [kv_heads, slots, D]
        self.step: StepTensors | None = None

    def attend(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
    ) -> Tensor:
        """query: [1, heads, T, D]; key, value: [1, kv_heads, T, D]. Returns [1, T, heads, Dv]."""
        step = self.step
        assert step is not None, "attention was called outside a step"
        keys, values = self.pools[module.layer_idx]
        keys.index_copy_(1, step.slots, key[0])
        values.index_copy_(1, step.slots, value[0])
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        grouped = query[0].unflatten(0, (keys.shape[0], -1)).permute(2, 0, 1, 3)  # [T, kv_heads, group, D]
        out = attend(grouped, SplitCache(keys, values), step, scaling, sliding_window, softcap, s_aux)
        return out.view(1, len(out), -1, values.shape[-1])


def _attend_one(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
    """One new token: the group's heads are the queries of one KV head, so nothing is repeated or masked.

    query: [1, kv_heads, group, D]. Returns [1, kv_heads, group, Dv].
    """
    if window is not None and key.shape[2] > window:
        key, value = key[:, :, -window:], value[:, :, -window:]
    return scaled_dot_product_attention(query, key, value, scale=scaling)


def attend_chunk(
    query: Tensor, key: Tensor, value: Tensor, row: Row, scaling: float, window: int | None
) -> Tensor:
    """A piece of a prompt. query: [kv_heads, group, T, D]. Returns [T, kv_heads, group, Dv]."""
    num_new, context = row.num_new, row.context
    plain = window is None or context <= window
    if plain and _has_fused_gqa(query, value):
        mask = {"is_causal": True} if num_new == context else {"attn_mask": _lower_right(num_new, context)}
        out = scaled_dot_product_attention(
            query.flatten(0, 1)[None], key, value, scale=scaling, enable_gqa=True, **mask
        )[0].unflatten(0, query.shape[:2])
    else:  # KV heads as the batch, so that the group shares keys and values without a copy
        shape = (*query.shape[:2], -1, -1)
        causal = plain and num_new == context
        out = scaled_dot_product_attention(
            query,
            key.transpose(0, 1).expand(shape),
            value.transpose(0, 1).expand(shape),
            scale=scaling,
            is_causal=causal,
            attn_mask=None if causal else row.allowed(window if not plain else None, query.device),
        )
    return out.permute(2, 0, 1, 3)


def _lower_right(num_new: int, context: int) -> Any:
    # Here, since it brings torch's compiler along, which takes a second to load.
    from torch.nn.attention.bias import causal_lower_right

    return causal_lower_right(num_new, context)


def _has_fused_gqa(query: Tensor, value: Tensor) -> bool:
    """Whether a kernel takes grouped heads and a causal mask at the lower right (flash attention on CUDA)."""
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    return query.device.type == "cuda" and is_half and query.shape[-1] == value.shape[-1] <= 256


def _attend_padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: PaddedRows,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Decode rows in one call. query: [T, kv_heads, group, D]. Returns [rows, kv_heads, group, Dv]."""
    query = query.narrow(0, rows.first, rows.last - rows.first)
    bias = rows.bias(window, query.dtype)
    if softcap is None and sinks is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling)
    outputs = [
        attend_plain(q.unsqueeze(2), k, v, allowed[0] == 0, scaling, softcap, sinks)[:, :, 0]
        for q, k, v, allowed in zip(query, key, value, bias, strict=True)
    ]
    return torch.stack(outputs)


def registered_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls; the module carries the `PagedAttention` of its model (or its probe)."""
    known = {
        name: options[name]
        for name in ("sliding_window", "softcap", "s_aux")
        if options.get(name) is not None
    }
    return module.paged_attention.attend(module, query, key, value, scaling, **known), None
