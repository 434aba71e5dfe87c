"""A dense decoder's modules under the names of its files, without anybody's code: what our decoder takes over.

    config.json ──▶ BareConfig ──▶ BareModel, without weights ──▶ weights put in ──▶ runtime.decoder

transformers makes the same modules and could compute with them too, but takes seconds to be loaded. Whatever a
configuration says that is not understood here is left to it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from runtime.paged_model import AttentionCall, KVShape

ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}  # fmt: skip
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings",
)  # fmt: skip
# Each may be missing, or be one of these: anything else is computed another way.
PLAIN_VALUES: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "use_sliding_window": (False,),
    "pretraining_tp": (1,), "partial_rotary_factor": (1, None), "is_decoder": (True, False),
    "add_cross_attention": (False,), "tie_encoder_decoder": (False,), "is_encoder_decoder": (False,),
}  # fmt: skip
# For those who train, who sample, or who wrote the file.
IDLE_KEYS = {
    "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "use_cache", "initializer_range",
    "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "max_window_layers", "_name_or_path",
    "auto_map", "output_attentions", "output_hidden_states", "return_dict", "tokenizer_class", "unsloth_fixed",
    "unsloth_version", "chunk_size_feed_forward", "id2label", "label2id", "problem_type",
}  # fmt: skip
READ_KEYS = {
    *SIZES, "rms_norm_eps", "head_dim", "tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters",
    "layer_types", "sliding_window",
}  # fmt: skip


@dataclass(frozen=True)
class Llama3Scaling:
    """Rotations that take less than `low` turns within the `trained` positions are slowed down by `factor`, those with
    more than `high` turns are not. Source: Llama 3.1, "rope_type": "llama3"."""

    factor: float
    low: float
    high: float
    trained: int

    def of(self, frequencies: Tensor) -> Tensor:
        """frequencies: radians a position."""
        turns = self.trained * frequencies / (2 * math.pi)
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return kept * frequencies + (1 - kept) * frequencies / self.factor


@dataclass(frozen=True)
class BareConfig:
    """What config.json says of a model that is understood here, by transformers' names."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope_theta: float
    rope_scaling: Llama3Scaling | None = None
    eos_token_id: int | list[int] | None = None
    hidden_act: str = "silu"
    rope_parameters: Mapping[str, str] = field(default_factory=lambda: {"rope_type": "default"})

    @property
    def architectures(self) -> list[str]:
        return [ARCHITECTURES[self.model_type]]

    def get_text_config(self) -> Self:
        return self

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> "BareConfig | None":
        """None where anything is missing, or is not understood here. raw: as read from config.json."""
        try:
            return cls._of(raw)
        except (
            TypeError,
            ValueError,
            ArithmeticError,
        ):  # a value of another kind, which transformers will tell
            return None

    @classmethod
    def _of(cls, raw: Mapping[str, Any]) -> "BareConfig | None":
        kind = raw.get("model_type")
        if kind not in ARCHITECTURES or raw.get("architectures") != [ARCHITECTURES[kind]]:
            return None
        if raw.keys() - READ_KEYS - IDLE_KEYS - PLAIN_VALUES.keys():
            return None
        if any(raw.get(name, plain[0]) not in plain for name, plain in PLAIN_VALUES.items()) or has_windows(
            raw
        ):
            return None
        sizes: dict[str, Any] = {name: raw.get(name) for name in SIZES}
        head_dim: Any = raw.get("head_dim") or dim_of(raw)
        eps, is_tied = raw.get("rms_norm_eps"), raw.get("tie_word_embeddings")
        numbers = (*sizes.values(), head_dim)
        if not all(type(number) is int and number > 0 for number in numbers) or head_dim % 2:
            return None
        heads, num_layers = sizes["num_attention_heads"], sizes["num_hidden_layers"]
        if sizes["hidden_size"] % heads or heads % sizes["num_key_value_heads"]:
            return None
        if len(raw.get("layer_types") or [None] * num_layers) != num_layers:
            return None
        rope = rope_of(raw)
        if not isinstance(eps, float) or not isinstance(is_tied, bool) or rope is None:
            return None
        if not has_plain_ends(raw):
            return None
        theta, scaling = rope
        return cls(
            kind, **sizes, head_dim=head_dim, rms_norm_eps=eps, tie_word_embeddings=is_tied, rope_theta=theta,
            rope_scaling=scaling, eos_token_id=raw.get("eos_token_id"),
        )  # fmt: skip


def has_windows(raw: Mapping[str, Any]) -> bool:
    """Whether any layer attends to the last tokens only. Mistral's do unless it is said that they do not."""
    if any(layer != "full_attention" for layer in raw.get("layer_types") or ()):
        return True
    unless_told = 4096 if raw["model_type"] == "mistral" else None
    return raw["model_type"] in ("mistral", "llama") and raw.get("sliding_window", unless_told) is not None


def has_plain_ends(raw: Mapping[str, Any]) -> bool:
    """Whether it says which tokens end a text: transformers knows of one where Llama and Mistral say nothing."""
    if "eos_token_id" not in raw:
        return raw["model_type"] not in ("mistral", "llama")
    ends = raw["eos_token_id"]
    return ends is None or all(type(end) is int for end in (ends if isinstance(ends, list) else [ends]))


def dim_of(raw: Mapping[str, Any]) -> int | None:
    """Of a head, where it follows from the other sizes: not for Qwen3."""
    hidden, heads = raw.get("hidden_size"), raw.get("num_attention_heads")
    if raw["model_type"] == "qwen3" or type(hidden) is not int or type(heads) is not int or heads < 1:
        return None
    return hidden // heads if hidden % heads == 0 else None


def rope_of(raw: Mapping[str, Any]) -> tuple[float, Llama3Scaling | None] | None:
    """The base of its angles, and their scaling; None where that is not understood. In files before transformers 5 both
    stand apart."""
    told = raw.get("rope_parameters")
    if told is None:
        told = {"rope_theta": raw.get("rope_theta"), **(raw.get("rope_scaling") or {})}
    elif raw.get("rope_scaling") is not None or "rope_theta" in raw:
        return None
    if not isinstance(told, dict):
        return None
    told = dict(told)
    theta, kind = told.pop("rope_theta", None), told.pop("rope_type", None) or told.pop("type", None)
    told.pop("type", None)
    if not isinstance(theta, int | float) or theta <= 0:
        return None
    if kind in (None, "default"):
        return None if told else (float(theta), None)
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if kind != "llama3" or told.keys() != set(names):
        return None
    values = [told[name] for name in names]
    if not all(isinstance(value, int | float) and value > 0 for value in values) or values[1] >= values[2]:
        return None
    factor, low, high, trained = values
    return float(theta), Llama3Scaling(factor, low, high, trained)


class NormWeight(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.variance_epsilon = eps


class Angles(nn.Module):
    """Cosines and sines of positions, each angle twice, as `layer_parts.Rope` takes them."""

    frequencies: Tensor

    def __init__(self, config: BareConfig) -> None:
        super().__init__()
        exponents = torch.arange(0, config.head_dim, 2, device="cpu").float() / config.head_dim
        found = 1.0 / config.rope_theta**exponents
        if config.rope_scaling is not None:
            found = config.rope_scaling.of(found)
        self.register_buffer("frequencies", found, persistent=False)

    def forward(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions: [1, T]. Returns [1, T, D] twice, of the type of `like`."""
        angles = (positions[..., None].float() * self.frequencies).repeat(1, 1, 2)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


class BareAttention(nn.Module):
    def __init__(self, config: BareConfig) -> None:
        super().__init__()
        hidden, dim, has_bias = config.hidden_size, config.head_dim, config.model_type == "qwen2"
        queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
        self.q_proj = nn.Linear(hidden, queries, has_bias)
        self.k_proj = nn.Linear(hidden, keys, has_bias)
        self.v_proj = nn.Linear(hidden, keys, has_bias)
        self.o_proj = nn.Linear(queries, hidden, bias=False)
        if config.model_type == "qwen3":
            self.q_norm = NormWeight(dim, config.rms_norm_eps)
            self.k_norm = NormWeight(dim, config.rms_norm_eps)


class BareMlp(nn.Module):
    def __init__(self, config: BareConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)


class BareLayer(nn.Module):
    def __init__(self, config: BareConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = BareAttention(config), BareMlp(config)
        self.input_layernorm = NormWeight(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = NormWeight(config.hidden_size, config.rms_norm_eps)


class BareLayers(nn.Module):
    def __init__(self, config: BareConfig) -> None:
        super().__init__()
        shape = (config.vocab_size, config.hidden_size)
        # Given, since drawing normal values on no device brings torch's compiler along, which takes a second to load.
        self.embed_tokens = nn.Embedding(*shape, _weight=torch.empty(shape))
        self.layers = nn.ModuleList(BareLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = NormWeight(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = Angles(config)


class BareModel(nn.Module):
    """All modules, on no device until `put_in` brings weights."""

    def __init__(self, config: BareConfig) -> None:
        super().__init__()
        self.config = config
        with torch.device("meta"):
            self.model = BareLayers(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._tie()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the weights, by their names in the files."""
        return {name: tuple(weight.shape) for name, weight in self.named_parameters()}

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def attention_calls(self) -> dict[int, AttentionCall]:
        config = self.config
        shape = KVShape(config.num_key_value_heads, config.head_dim, config.head_dim, self.dtype)
        call = AttentionCall(shape, config.head_dim**-0.5, None, is_special=False)
        return dict.fromkeys(range(config.num_hidden_layers), call)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def put_in(self, weights: dict[str, Tensor], dtype: torch.dtype) -> Self:
        """Takes the weights, by name, which are not kept here."""
        for name in self.shapes:
            place, _, leaf = name.rpartition(".")
            weight = weights.pop(name).to(dtype)  # of another type, the one read is let go at once
            setattr(self.get_submodule(place), leaf, nn.Parameter(weight, requires_grad=False))
        self._tie()
        return self

    def _tie(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
