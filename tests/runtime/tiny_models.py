"""Random models of a few thousand parameters, in float64 so that greedy tokens cannot differ by rounding."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.bert import BertConfig
from transformers.models.bloom import BloomConfig
from transformers.models.deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v3 import DeepseekV3Config
from transformers.models.gemma import GemmaConfig
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.gpt_oss import GptOssConfig
from transformers.models.jamba import JambaConfig
from transformers.models.lfm2 import Lfm2Config
from transformers.models.llama import LlamaConfig
from transformers.models.mamba import MambaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.mixtral import MixtralConfig
from transformers.models.phi3 import Phi3Config
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config
from transformers.models.qwen3_moe import Qwen3MoeConfig

torch.set_num_threads(1)  # nothing here is worth a second thread, and threads that spin slow every other test

VOCAB = 97
EOS = 1

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3, "eos_token_id": EOS,
    "bos_token_id": 0, "pad_token_id": EOS, "tie_word_embeddings": False,
}  # fmt: skip
_DEEPSEEK: dict[str, Any] = {
    **_SHAPE, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 8, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "qk_nope_head_dim": 16, "n_group": 2, "topk_group": 1,
}  # fmt: skip


def tiny_config(family: str) -> PretrainedConfig:
    match family:
        case "qwen2":
            return Qwen2Config(**_SHAPE)
        case "qwen2_window":
            return Qwen2Config(**_SHAPE, use_sliding_window=True, sliding_window=20, max_window_layers=1)
        case "qwen3":
            return Qwen3Config(**_SHAPE, head_dim=16)
        case "llama":
            return LlamaConfig(**_SHAPE)
        case "mistral":
            return MistralConfig(**_SHAPE, sliding_window=20)
        case "mixtral":
            return MixtralConfig(**_SHAPE, num_local_experts=4, num_experts_per_tok=2)
        case "qwen3_moe":
            return Qwen3MoeConfig(
                **_SHAPE, head_dim=16, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2
            )
        case "phi3":
            return Phi3Config(**_SHAPE)
        case "gemma":
            return GemmaConfig(**_SHAPE, head_dim=8)
        case "gemma3":
            return Gemma3TextConfig(
                **_SHAPE, head_dim=8, sliding_window=20, query_pre_attn_scalar=8,
                layer_types=["sliding_attention", "full_attention"],
            )  # fmt: skip
        case "gemma2":
            return Gemma2Config(**_SHAPE, head_dim=8, sliding_window=20, query_pre_attn_scalar=8)
        case "gpt_oss":
            return GptOssConfig(
                **_SHAPE, head_dim=8, sliding_window=20, num_local_experts=4, num_experts_per_tok=2,
                layer_types=["sliding_attention", "full_attention"],
            )  # fmt: skip
        case "deepseek_v2":
            return DeepseekV2Config(**_DEEPSEEK, q_lora_rank=24, topk_method="group_limited_greedy")
        case "deepseek_v2_lite":
            return DeepseekV2Config(**{**_DEEPSEEK, "n_group": 1, "topk_group": 1}, q_lora_rank=None)
        case "deepseek_v3":
            return DeepseekV3Config(**_DEEPSEEK, q_lora_rank=24)
        # Those whose texts are no matter of keys and values, or whose attention cannot be replaced.
        case "mamba":
            return MambaConfig(**_SHAPE, state_size=4)
        case "bloom":
            return BloomConfig(**_SHAPE, n_head=4)
        case "lfm2":  # short convolutions beside attention
            return Lfm2Config(**_SHAPE, layer_types=["conv", "full_attention"])
        case "jamba":  # Mamba beside attention
            return JambaConfig(
                **_SHAPE,
                attn_layer_period=2,
                attn_layer_offset=1,
                num_experts=1,
                mamba_d_state=4,
                mamba_dt_rank=4,
            )
        case "bert":  # every token sees those after it, so no text can be continued
            return BertConfig(**_SHAPE)
    raise ValueError(f"no tiny {family}")


def tiny_model(family: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    torch.manual_seed(0)
    config = tiny_config(family)
    config._experts_implementation = "eager"  # the grouped kernels know no float64
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).eval()
    model.generation_config.eos_token_id = None
    return model


def save_tiny_model(family: str, folder: Path) -> Path:
    tiny_model(family, torch.float32).save_pretrained(folder)
    return folder


def repeating_model(family: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """One whose next token follows from the last one above all, so that its texts soon come back to where they were."""
    model = tiny_model(family, dtype)
    for name, weight in model.named_parameters():
        if name.endswith("o_proj.weight"):
            weight.data.mul_(0.05)
    return model


def save_repeating_model(family: str, folder: Path) -> Path:
    repeating_model(family, torch.float32).save_pretrained(folder)
    return folder


def save_tiny_tokenizer(folder: Path) -> None:
    """Beside a model: every token is a word of its own, none is special, so that a text says which tokens it is."""
    words = models.WordLevel({f"t{token}": token for token in range(VOCAB)}, unk_token="t0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)).save_pretrained(folder)


@torch.inference_mode()
def generate(model: PreTrainedModel, prompt: list[int], max_tokens: int) -> list[int]:
    """What transformers itself continues greedily, never stopping."""
    token_ids = torch.tensor([prompt], device=model.device)
    mask = torch.ones_like(token_ids)
    out = model.generate(token_ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False)
    return out[0, len(prompt) :].tolist()
