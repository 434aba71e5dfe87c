"""Our own forward pass of dense decoders (Llama, Mistral, Qwen2, Qwen3): tier A.

    embed ▶ [ norm ▶ q, k, v at once ▶ rope ▶ cache ▶ attend ▶ out, added ▶ norm ▶ gate, up ▶ down, added ] ▶ head

On small batches a step is as long as the number of its calls, not as its arithmetic: a layer takes 20 calls here and
about 100 in the model's own code. Weights that share an input lie in one tensor, of which the original ones become
views, so that nothing is held twice. Keys and values of a token lie side by side: one write, and one read for padded
rows. All linear layers are `nn.Linear`, so that whatever prepares weights finds them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, rms_norm, silu
from transformers import PreTrainedModel

from runtime.attention import PaddedRows, Row, StepTensors, attend
from runtime.errors import ModelError
from runtime.hf_model import AttentionCall, HFModel
from runtime.paged_model import KVPools, KVShape, PagedModel, probe_tokens

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # their angles depend on the position alone
SHORTEST_ROPE_TABLE = 4096
WIDE = (torch.float32, torch.float64)


class DecoderModel(PagedModel):
    """A decoder over the paged pool. The model that it is made from shares its weights."""

    tier = "A"

    def __init__(self, plain: HFModel) -> None:
        """`plain`: the same model, found to work in tier B.

        Raises:
            ModelError: another architecture, or logits that differ.
        """
        assert isinstance(plain.model, PreTrainedModel)
        self.decoder = Decoder(plain.model, plain.attention_calls)
        shapes = {layer: _joint(call.shape) for layer, call in plain.attention_calls.items()}
        super().__init__(self.decoder, plain.device, shapes)
        self._caches: tuple[KVPools, list[JointCache]] = ({}, [])
        token_ids = probe_tokens(self.decoder.embedding.shape[0], self.device)[0].tolist()
        self.check_against(plain.expected, token_ids)

    def compute(self, step: StepTensors, pools: KVPools) -> Tensor:
        if self._caches[0] is not pools:
            heads = [layer.shape.kv_heads for layer in self.decoder.layers]
            caches = [JointCache.of(pool[0][0], num) for pool, num in zip(pools.values(), heads, strict=True)]
            self._caches = (pools, caches)
        return self.decoder.forward(step, self._caches[1])

    def release(self) -> None:
        super().release()
        self._caches = ({}, [])


def _joint(shape: KVShape) -> KVShape:
    """One head that holds all keys of a token and then all its values."""
    return KVShape(1, shape.kv_heads * (shape.key_dim + shape.value_dim), 0, shape.dtype)


class JointCache(NamedTuple):
    """Keys and values of one layer in one tensor. `rows`: [slots, 2 * kv_heads * D]; `heads`: a view,
    [2, kv_heads, slots, D]."""

    rows: Tensor
    heads: Tensor

    @classmethod
    def of(cls, rows: Tensor, kv_heads: int) -> "JointCache":
        return cls(rows, rows.view(len(rows), 2, kv_heads, -1).permute(1, 2, 0, 3))

    def of_row(self, row: Row) -> tuple[Tensor, Tensor]:
        if isinstance(row.place, slice):
            key, value = self.heads.narrow(2, row.place.start, row.context).split(1)
        else:
            key, value = self.heads.index_select(2, row.place).split(1)
        return key, value

    def of_padded(self, rows: PaddedRows) -> tuple[Tensor, Tensor]:
        found = self.rows.index_select(0, rows.index)
        shape = (rows.last - rows.first, rows.longest, 2, self.heads.shape[1], self.heads.shape[3])
        key, value = found.view(shape).permute(2, 0, 3, 1, 4).unbind()
        return key, value


class Norm:
    """Root mean square norm over the last dimension. x: [..., D]."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        size = weight.shape[-1]
        self._weight, self._eps = weight, eps
        self._scaled = weight * size**0.5
        self._floor = weight.new_tensor((size * eps) ** 0.5)
        self._is_wide = weight.dtype in WIDE and weight.device.type == "cpu"

    def __call__(self, x: Tensor) -> Tensor:
        if not self._is_wide:
            normal = rms_norm(x, x.shape[-1:], None, self._eps)
            return normal.mul_(self._weight)
        # The same by two calls fewer: |x| / sqrt(D) is the root mean square.
        length = torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self._floor)
        return (x * self._scaled).div_(length)


class Rope:
    """Angles by position, as the model's own module gives them. Rows of the tables are made as they are needed."""

    def __init__(self, module: nn.Module, like: Tensor) -> None:
        self._module, self._like = module, like
        self._table = torch.empty(0)
        self._extend(SHORTEST_ROPE_TABLE)

    def at(self, positions: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Cosines, and sines whose first half is negative: [T, 1, D] each. positions: [T] below `end`."""
        if end > len(self._table):
            self._extend(1 << (end - 1).bit_length())
        cos, sin = self._table.index_select(0, positions).unsqueeze(1).unbind(2)
        return cos, sin

    @torch.inference_mode()
    def _extend(self, num_positions: int) -> None:
        cos, sin = self._module(self._like, torch.arange(num_positions, device=self._like.device)[None])
        half = sin.shape[-1] // 2
        self._table = torch.stack((cos[0], torch.cat((-sin[0, :, :half], sin[0, :, half:]), -1)), 1)


class Layer(nn.Module):
    """One layer, with weights taken over from the model's own."""

    def __init__(self, layer: Any, call: AttentionCall, qk_norm: "Norm | None") -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.shape, self.scaling, self.window = call.shape, call.scaling, call.sliding_window
        self.qk_norm = qk_norm
        self.qkv = fused(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = attention.o_proj
        self.gate_up = fused(mlp.gate_proj, mlp.up_proj)
        self.down = mlp.down_proj
        self.before = norm_of(layer.input_layernorm)
        self.between = norm_of(layer.post_attention_layernorm)
        _, dim, _, _ = self.shape
        self._num_heads = attention.q_proj.out_features // dim
        self._sizes = (self._num_heads * dim, 2 * self.shape.kv_heads * dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: JointCache, step: StepTensors) -> Tensor:
        """Adds the layer to x, [T, hidden], in place."""
        _, kv_heads, dim = len(x), self.shape.kv_heads, self.shape.key_dim
        qkv = self.qkv.forward(self.before(x))
        turned = qkv.unflatten(1, (-1, dim)).narrow(1, 0, self._num_heads + kv_heads)  # [T, heads, D]
        if self.qk_norm is not None:
            turned.copy_(self.qk_norm(turned))
        torch.addcmul(turned * cos, turned.roll(dim // 2, -1), sin, out=turned)
        query, new = qkv.split(self._sizes, 1)
        cache.rows.index_copy_(0, step.slots, new)
        x += self.out.forward(
            attend(query.unflatten(1, (kv_heads, -1, dim)), cache, step, self.scaling, self.window)
        )
        gate, up = self.gate_up.forward(self.between(x)).chunk(2, 1)
        x += self.down.forward(silu(gate).mul_(up))
        return x


class Decoder(nn.Module):
    """The layers between token ids and logits."""

    def __init__(self, model: PreTrainedModel, calls: dict[int, AttentionCall]) -> None:
        """Raises ModelError where the model is not one of those that are computed here."""
        super().__init__()
        check(model, calls)
        inner: Any = model.model
        layers = [
            Layer(layer, calls[index], qk_norm_of(layer.self_attn))
            for index, layer in enumerate(inner.layers)
        ]
        self.layers: Sequence[Layer] = nn.ModuleList(layers)
        self.head = model.lm_head
        self.embedding = inner.embed_tokens.weight
        self.norm = norm_of(inner.norm)
        self.rope = Rope(inner.rotary_emb, self.embedding)

    def forward(self, step: StepTensors, caches: Sequence[JointCache]) -> Tensor:
        """Returns logits [last_tokens, vocab]."""
        x = embedding(step.token_ids[0], self.embedding)
        cos, sin = self.rope.at(step.positions[0], step.longest)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer.forward(x, cos, sin, cache, step)
        logits: Tensor = self.head.forward(self.norm(x.index_select(0, step.last_tokens)))
        return logits


# -- taking over a model's weights -----------------------------------------------------------------------------


def check(model: PreTrainedModel, calls: dict[int, AttentionCall]) -> None:
    """Raises ModelError with what is not computed here."""
    config = model.config
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if config.model_type not in MODEL_TYPES:
        raise ModelError(f"{config.model_type} is not one of {', '.join(MODEL_TYPES)}")
    if rope not in FIXED_ROPE:
        raise ModelError(f"its rope is {rope}, not one of {', '.join(FIXED_ROPE)}")
    if config.hidden_act != "silu":
        raise ModelError(f"its activation is {config.hidden_act}, not silu")
    if any(call.is_special or call.shape.key_dim != call.shape.value_dim for call in calls.values()):
        raise ModelError("its attention has a soft cap, sinks, or values of another size than keys")


@torch.no_grad()
def fused(*parts: nn.Linear) -> nn.Linear:
    """Layers with the same input as one. The weights of the parts become views of its own."""
    first = parts[0]
    sizes = [part.out_features for part in parts]
    whole = nn.Linear(first.in_features, sum(sizes), first.bias is not None, device="meta")
    for name in ("weight", "bias") if first.bias is not None else ("weight",):
        joined = torch.cat([getattr(part, name) for part in parts])
        setattr(whole, name, nn.Parameter(joined, requires_grad=False))
        for part, own in zip(parts, joined.split(sizes), strict=True):
            setattr(part, name, nn.Parameter(own, requires_grad=False))
    return whole


def norm_of(module: Any) -> Norm:
    return Norm(module.weight.detach(), module.variance_epsilon)


def qk_norm_of(attention: Any) -> Norm | None:
    """One norm over the heads of queries and keys together, where the model has them."""
    if not hasattr(attention, "q_norm"):
        return None
    query, key = attention.q_norm, attention.k_norm
    dim = query.weight.shape[0]
    counts = (attention.q_proj.out_features // dim, attention.k_proj.out_features // dim)
    weight = torch.cat(
        [norm.weight.detach().expand(num, dim) for norm, num in zip((query, key), counts, strict=True)]
    )
    return Norm(weight, query.variance_epsilon)
