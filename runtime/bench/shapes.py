"""Shapes of known models, with random weights: what speed depends on, without a download."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.deepseek_v2 import DeepseekV2Config
from transformers.models.llama import LlamaConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config
from transformers.models.qwen3_moe import Qwen3MoeConfig

from runtime.loader import LoadedModel, description_of, load_model
from runtime.pretrained import read_config

# Source: config.json of Qwen/Qwen2-0.5B, Qwen/Qwen3-0.6B, Qwen/Qwen3-30B-A3B, meta-llama/Llama-3.1-8B (without its
# scaled rope) and deepseek-ai/DeepSeek-V2-Lite (without its yarn).
SHAPES: dict[str, PretrainedConfig] = {
    "qwen2-0.5b": Qwen2Config(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=4096, rope_theta=1_000_000.0, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1, pad_token_id=0,
    ),
    "qwen3-0.6b": Qwen3Config(
        vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40_960, rope_theta=1_000_000.0,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=0,
    ),
    "llama-8b": LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=131_072, rope_theta=500_000.0,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=0,
    ),
    "deepseek-v2-lite": DeepseekV2Config(
        vocab_size=102_400, hidden_size=2048, intermediate_size=10_944, moe_intermediate_size=1408,
        num_hidden_layers=27, num_attention_heads=16, num_key_value_heads=16, kv_lora_rank=512, q_lora_rank=None,
        qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=64, n_shared_experts=2,
        num_experts_per_tok=6, first_k_dense_replace=1, n_group=1, topk_group=1, topk_method="greedy",
        norm_topk_prob=False, routed_scaling_factor=1.0, max_position_embeddings=16_384, rope_theta=10_000.0,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=0,
    ),
    "qwen3-30b-a3b": Qwen3MoeConfig(
        vocab_size=151_936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        norm_topk_prob=True, max_position_embeddings=40_960, rope_theta=1_000_000.0, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=1, pad_token_id=0,
    ),
    # For trying a benchmark out where there is no accelerator.
    "tiny-moe": DeepseekV2Config(
        vocab_size=512, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=32, q_lora_rank=None, qk_nope_head_dim=16,
        qk_rope_head_dim=16, v_head_dim=16, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2,
        first_k_dense_replace=1, n_group=1, topk_group=1, topk_method="greedy", norm_topk_prob=False,
        routed_scaling_factor=1.0, max_position_embeddings=8192, tie_word_embeddings=False, bos_token_id=0,
        eos_token_id=1, pad_token_id=0,
    ),
    "tiny": Qwen3Config(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=8192, tie_word_embeddings=True, bos_token_id=0,
        eos_token_id=1, pad_token_id=0,
    ),
}  # fmt: skip


def random_model(
    shape: str, device: torch.device, dtype: torch.dtype, max_model_len: int | None = None
) -> LoadedModel:
    """Made where it is used. Normal weights of sd 0.02, as transformers begins a training; norms of 1."""
    config = SHAPES[shape]
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    length = min(max_model_len or config.max_position_embeddings, config.max_position_embeddings)
    return LoadedModel(model, {"name": shape, **description_of(model)}, frozenset(), length)


def save_random(shape: str, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
    """Writes the weights of `random_model` as a Hugging Face folder, without a tokenizer."""
    random_model(shape, device, dtype).model.save_pretrained(folder)


def source_of(
    model: Path | None, shape: str, device: torch.device, dtype: torch.dtype, max_model_len: int
) -> Callable[[], LoadedModel]:
    """What loads the model folder where there is one, and makes random weights of the shape otherwise."""
    if model is None:
        return lambda: random_model(shape, device, dtype, max_model_len)
    trained = read_config(model).get_text_config().max_position_embeddings
    return lambda: load_model(model, device, dtype, min(max_model_len, trained))


@contextmanager
def model_folder(model: Path, shape: str | None, keep: Path | None) -> Iterator[Path]:
    """The folder given, or one with random weights of a shape; `keep` says where that one shall stay."""
    if shape is None:
        yield model
        return
    with tempfile.TemporaryDirectory() as passing:
        folder = keep or Path(passing) / shape
        if not (folder / "config.json").is_file():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(SHAPES[shape], dtype=torch.float32).save_pretrained(folder)
        yield folder
