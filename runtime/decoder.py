"""Our own forward pass of decoders (Llama, Mistral, Qwen2, Qwen3; Mixtral, Qwen3-MoE, DeepSeek-V2, V3): tier A.

    embed ▶ [ norm ▶ q, k, v at once ▶ rope ▶ cache ▶ attend ▶ out, added ▶ norm ▶ gate, up ▶ down, added ] ▶ head

A layer is an attention (`Attention` here, `LatentAttention`) and an MLP (`Mlp`, `Experts`).

On small batches a step is as long as the number of its calls, not as its arithmetic: a layer takes 20 calls here and
about 100 in the model's own code. Weights that share an input lie in one tensor, of which the original ones become
views, so that nothing is held twice. Keys and values of a token lie side by side: one write, and one read for padded
rows. All linear layers are `nn.Linear`, so that whatever prepares weights finds them.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from runtime.attention import LayerCache, attend
from runtime.errors import ModelError
from runtime.experts import Experts
from runtime.latent_attention import LatentAttention
from runtime.layer_parts import Mlp, Norm, Rope, fused, norm_of
from runtime.paged_model import AttentionCall, KVShape
from runtime.rounded_cache import STORED, RoundedCache
from runtime.step_tensors import PaddedRows, Row, StepTensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from runtime.bare_model import BareModel

LATENT_TYPES = ("deepseek_v2", "deepseek_v3")
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", *LATENT_TYPES)
FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # their angles depend on the position alone


class JointCache(NamedTuple):
    """Keys and values of one layer in one tensor. `rows`: [slots, 2 * kv_heads * D]; `heads`: a view,
    [2, kv_heads, slots, D]."""

    rows: Tensor
    heads: Tensor

    @classmethod
    def of(cls, rows: Tensor, kv_heads: int) -> "JointCache":
        return cls(rows, rows.view(len(rows), 2, kv_heads, -1).permute(1, 2, 0, 3))

    @property
    def scales(self) -> None:
        """None: what lies here is what was written."""

    def write(self, slots: Tensor, new: Tensor) -> None:
        """new: [T, 2 * kv_heads * D]."""
        self.rows.index_copy_(0, slots, new)

    def read(self, slots: Tensor) -> Tensor:
        """Returns [slots, 2 * kv_heads * D]."""
        return self.rows.index_select(0, slots)

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


KVCache = JointCache | RoundedCache


class Attention(nn.Module):
    """The attention of one layer, heads of queries over heads of keys and values, with weights taken over from the
    model's own."""

    def __init__(self, attention: Any, call: AttentionCall) -> None:
        super().__init__()
        self.kv_heads, self.dim, _, dtype = call.shape
        self.scaling, self.window = call.scaling, call.sliding_window
        self.kv_shape = KVShape(1, 2 * self.kv_heads * self.dim, 0, dtype)  # keys of a token, then its values
        self.rounded_shape = KVShape(
            1, 2 * self.kv_heads * self.dim, 2 * 2 * self.kv_heads, STORED
        )  # and its scales
        self.qk_norm = qk_norm_of(attention)
        self.qkv = fused(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = attention.o_proj
        self.num_heads = attention.q_proj.out_features // self.dim
        self._sizes = (self.num_heads * self.dim, 2 * self.kv_heads * self.dim)

    def cache_of(self, pool: Tensor) -> JointCache:
        """pool: [slots, 2 * kv_heads * D]."""
        return JointCache.of(pool, self.kv_heads)

    def rounded_cache_of(self, pool: tuple[Tensor, Tensor]) -> RoundedCache:
        return RoundedCache.of(pool, self.kv_shape.dtype)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache, step: StepTensors) -> Tensor:
        """x: [T, hidden]. Returns [T, heads * D], which `out` takes."""
        kv_heads, dim = self.kv_heads, self.dim
        qkv = self.qkv.forward(x)
        turned = qkv.unflatten(1, (-1, dim)).narrow(1, 0, self.num_heads + kv_heads)  # [T, heads, D]
        if self.qk_norm is not None:
            turned.copy_(self.qk_norm(turned))
        torch.addcmul(turned * cos, turned.roll(dim // 2, -1), sin, out=turned)
        query, new = qkv.split(self._sizes, 1)
        cache.write(step.slots, new)
        return attend(query.unflatten(1, (kv_heads, -1, dim)), cache, step, self.scaling, self.window)


class Layer(nn.Module):
    """One layer: attention and an MLP, each added to its input."""

    def __init__(self, layer: Any, call: AttentionCall, config: Any) -> None:
        super().__init__()
        self.attention: Attention | LatentAttention
        if is_latent(config):
            self.attention = LatentAttention(layer.self_attn, call, is_interleaved(config))
        else:
            self.attention = Attention(layer.self_attn, call)
        self.mlp = Experts(layer.mlp, config) if hasattr(layer.mlp, "experts") else Mlp(layer.mlp)
        self.before = norm_of(layer.input_layernorm)
        self.between = norm_of(layer.post_attention_layernorm)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: Any, step: StepTensors, kept: Tensor | None = None
    ) -> Tensor:
        """Adds the layer to x, [T, hidden], in place. `cache`: as the attention's `cache_of` gives it. `kept`: the
        tokens whose output is wanted, and returned, where these are not all."""
        found = self.attention.forward(self.before(x), cos, sin, cache, step)
        if kept is not None:
            x, found = x.index_select(0, kept), found.index_select(0, kept)
        if len(x):
            x += self.attention.out.forward(found)
            x += self.mlp.forward(self.between(x))
        return x


class Decoder(nn.Module):
    """The layers between token ids and logits."""

    def __init__(self, model: "PreTrainedModel | BareModel", calls: dict[int, AttentionCall]) -> None:
        """Raises ModelError where the model is not one of those that are computed here."""
        super().__init__()
        check(model, calls)
        inner: Any = model.model
        layers = [Layer(layer, calls[index], model.config) for index, layer in enumerate(inner.layers)]
        self.layers: Sequence[Layer] = nn.ModuleList(layers)
        self.head = model.lm_head
        self.embedding = inner.embed_tokens.weight
        self.norm = norm_of(inner.norm)
        self.rope = Rope(inner.rotary_emb, self.embedding, is_interleaved(model.config))

    def forward(self, step: StepTensors, caches: Sequence[LayerCache]) -> Tensor:
        """Returns logits [last_tokens, vocab]. Of the last layer, what no logits need is left out behind attention."""
        x = embedding(step.token_ids[0], self.embedding)
        cos, sin = self.rope.at(step.positions[0], step.longest)
        *layers, last = self.layers
        for layer, cache in zip(layers, caches, strict=False):
            x = layer.forward(x, cos, sin, cache, step)
        x = last.forward(x, cos, sin, caches[-1], step, step.last_tokens)
        logits: Tensor = self.head.forward(self.norm(x))
        return logits


# -- taking over a model's weights -----------------------------------------------------------------------------


def check(model: "PreTrainedModel | BareModel", calls: dict[int, AttentionCall]) -> None:
    """Raises ModelError with what is not computed here."""
    config: Any = model.config
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if config.model_type not in MODEL_TYPES:
        raise ModelError(f"{config.model_type} is not one of {', '.join(MODEL_TYPES)}")
    if rope not in FIXED_ROPE:
        raise ModelError(f"its rope is {rope}, not one of {', '.join(FIXED_ROPE)}")
    if config.hidden_act != "silu":
        raise ModelError(f"its activation is {config.hidden_act}, not silu")
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError("its weights are quantised")
    shapes = [call.shape for call in calls.values()]
    other = not is_latent(config) and any(shape.key_dim != shape.value_dim for shape in shapes)
    if other or any(call.is_special for call in calls.values()):
        raise ModelError("its attention has a soft cap, sinks, or values of another size than keys")


def is_latent(config: Any) -> bool:
    return config.model_type in LATENT_TYPES


def is_interleaved(config: Any) -> bool:
    """Whether each value is rotated with its neighbour. DeepSeek-V2 knows no other way."""
    return config.model_type == "deepseek_v2" or bool(getattr(config, "rope_interleave", False))


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
