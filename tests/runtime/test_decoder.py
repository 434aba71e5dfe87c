"""Our own forward pass beside the model's: the same tokens in float64, the same logits, weights held once."""

import weakref
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import runtime.layer_parts
from runtime.decoder_model import DecoderModel
from runtime.errors import ModelError
from runtime.executor import servable
from runtime.hf_model import HFModel
from runtime.knobs import EngineConfig
from runtime.kv_cache import BlockPool
from runtime.layer_parts import Norm
from runtime.paged_model import PagedModel, relative_error
from runtime.request import Request
from runtime.sampling import sample
from runtime.scheduler import Scheduler
from runtime.weights import prepared
from tests.runtime.tiny_models import VOCAB, generate, tiny_config, tiny_model

BLOCK_TOKENS = 4
CLOSE = {"rtol": 1e-3, "atol": 1e-4}  # norms of transformers are float32 whatever the model is
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen2_window", "qwen3", "mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v2_lite",
    "deepseek_v3",
)  # fmt: skip
MIXED = ("mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v2_lite", "deepseek_v3")


def decoder(reference: PreTrainedModel) -> DecoderModel:
    return DecoderModel(HFModel(reference))


def prompts(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, VOCAB, length).tolist() for length in lengths]


def serve(
    model: PagedModel,
    asked: list[list[int]],
    max_tokens: int,
    num_blocks: int,
    copies: bool = True,
    **knobs: Any,
) -> tuple[list[list[int]], Scheduler]:
    pool = BlockPool(num_blocks, BLOCK_TOKENS, wants_runs=copies)
    model.allocate(pool.num_blocks, BLOCK_TOKENS)
    scheduler = Scheduler(pool, EngineConfig.of(knobs), 200)
    requests = [
        Request.of_tokens(str(i), prompt, max_tokens, arrived_at=0.0) for i, prompt in enumerate(asked)
    ]
    for request in requests:
        scheduler.add(request)
    while (batch := scheduler.schedule(0.0)) is not None:
        logits = model.forward(scheduler.pack(batch))
        tokens = sample(logits, batch.sampled_requests()) if len(logits) else []
        scheduler.finish_step(batch, [token or 0 for token in tokens], 0.0)
    return [request.output_ids.tolist() for request in requests], scheduler


@torch.inference_mode()
def logits_of(model: PreTrainedModel, prompt: list[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([prompt], device=model.device), use_cache=False).logits[0]
    return logits


@torch.inference_mode()
def prompt_logits(model: PagedModel, prompt: list[int], chunk: int) -> Tensor:
    """[len(prompt), vocab], computed in chunks."""
    pool = BlockPool(64)
    model.allocate(pool.num_blocks)
    scheduler = Scheduler(pool, EngineConfig.of({"prefill_chunk": chunk}), 200)
    scheduler.add(Request.of_tokens("a", prompt, 1, arrived_at=0.0))
    rows = []
    while (batch := scheduler.schedule(0.0)) is not None:
        packed = scheduler.pack(batch)
        object.__setattr__(packed, "last_tokens", np.arange(len(packed.token_ids)))
        rows.append(model.forward(packed))
        scheduler.finish_step(batch, [0] * int(batch.sampled.sum()), 0.0)
    return torch.cat(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_generate_in_mixed_chunked_and_preempted_batches(family: str) -> None:
    reference = tiny_model(family)
    asked = prompts(1, 5, 17, 40, 33, 70, 9, 3, 12, 7)
    expected = [generate(reference, prompt, 24) for prompt in asked]
    outputs, scheduler = serve(
        decoder(reference), asked, 24, num_blocks=52, max_num_seqs=9, max_batched_tokens=40, prefill_chunk=16
    )
    assert outputs == expected
    assert scheduler.num_preemptions > 0, "the test must reach what it claims"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("copies", [False, True])
def test_greedy_tokens_behind_a_shared_prefix_are_those_of_generate(family: str, copies: bool) -> None:
    reference = tiny_model(family)
    (shared,) = prompts(30)
    asked = [[*shared[:28], *own] for own in prompts(3, 9, 17, 1, 12)]
    expected = [generate(reference, prompt, 12) for prompt in asked]
    outputs, scheduler = serve(
        decoder(reference), asked, 12, 60, copies, max_num_seqs=2, prefill_chunk=16, prefix_cache="on"
    )
    assert outputs == expected
    assert scheduler.num_hit_tokens > 0, "the test must reach what it claims"


def llama(**changes: Any) -> PreTrainedModel:
    config = LlamaConfig(**{**tiny_config("llama").to_dict(), **changes})
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, attn_implementation="eager").double().eval()
    with torch.no_grad():
        for name, bias in model.named_parameters():
            if name.endswith("bias"):
                bias.normal_()
    return model


YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": True},
        {"head_dim": 16},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"rope_parameters": YARN},
        {"rope_parameters": LLAMA_3},
    ],
    ids=str,
)
def test_logits_are_those_of_transformers_in_every_variant(changes: dict[str, Any]) -> None:
    reference = llama(**changes)
    (prompt,) = prompts(150)
    expected = logits_of(reference, prompt)
    model = decoder(reference)
    for chunk in (16, 200):
        torch.testing.assert_close(prompt_logits(model, prompt, chunk), expected, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_in_float32_differ_by_rounding_only(family: str) -> None:
    reference = tiny_model(family, torch.float32)
    (prompt,) = prompts(150)
    expected = logits_of(reference, prompt)
    assert relative_error(prompt_logits(decoder(reference), prompt, 64), expected) < 1e-5


def test_angles_are_made_as_positions_need_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.layer_parts, "SHORTEST_ROPE_TABLE", 8)
    reference = tiny_model("qwen2")
    (prompt,) = prompts(100)
    expected = generate(reference, prompt, 40)
    assert serve(decoder(reference), [prompt], 40, 64)[0] == [expected]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norms_are_those_of_transformers_also_of_rows_that_are_nearly_nothing(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    theirs = LlamaRMSNorm(48, eps=1e-5).to(dtype)
    nn.init.normal_(theirs.weight)
    x = torch.randn(6, 48, dtype=dtype) * torch.tensor([0.0, 1e-9, 1e-3, 1.0, 1e3, 1e9], dtype=dtype)[:, None]
    with torch.inference_mode():
        limits = {"rtol": 1e-5, "atol": 1e-9} if dtype != torch.bfloat16 else {"rtol": 2e-2, "atol": 1e-4}
        torch.testing.assert_close(Norm(theirs.weight, 1e-5)(x), theirs(x), **limits)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_it_is_made_from_shares_its_weights(family: str) -> None:
    reference = tiny_model(family)
    model = decoder(reference)
    ours = {tensor.untyped_storage().data_ptr() for tensor in model.decoder.parameters()}
    theirs = {
        tensor.untyped_storage().data_ptr()
        for name, tensor in reference.named_parameters()
        if "norm" not in name
    }
    assert theirs == ours


def test_weights_of_one_input_are_rounded_together_as_they_would_be_apart() -> None:
    reference = tiny_model("llama", torch.float32)
    model = decoder(reference)
    whole, parts = prepared(model.decoder, "int8"), prepared(reference, "int8")
    x = torch.randn(5, 32)
    joined = dict(whole.forwards)[model.decoder.layers[0].attention.qkv](x)
    attention = reference.model.layers[0].self_attn
    apart = [dict(parts.forwards)[part](x) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
    torch.testing.assert_close(joined, torch.cat(apart, -1), rtol=1e-4, atol=1e-5)


def test_two_models_in_one_process_do_not_share_a_pool() -> None:
    references = [tiny_model("qwen2"), tiny_model("llama")]
    (prompt,) = prompts(20)
    expected = [generate(reference, prompt, 8) for reference in references]
    models = [decoder(reference) for reference in references]
    assert [serve(model, [prompt], 8, 64)[0][0] for model in models] == expected


def test_a_pool_that_is_forgotten_gives_its_memory_back() -> None:
    model = decoder(tiny_model("qwen3"))
    serve(model, prompts(20), 2, 64)
    rows = [weakref.ref(cache.rows) for cache in model._caches_of(model.pools)]
    gone, model.pools = model.pools, model.new_pools(64)
    model.forget(gone)
    assert [row() for row in rows] == [None] * len(rows)


def test_scoring_area_is_apart_from_the_pool_that_serves() -> None:
    reference = tiny_model("qwen3")
    (prompt, other) = prompts(40, 30)
    expected = logits_of(reference, prompt)[-1]
    model = decoder(reference)
    model.allocate(64)
    area = model.new_pools(64)
    results = []
    for pools, text in ((None, prompt), (area, other), (None, prompt)):
        scheduler = Scheduler(BlockPool(64), EngineConfig(), 200)
        scheduler.add(Request.of_tokens("a", text, 1, arrived_at=0.0))
        batch = scheduler.schedule(0.0)
        assert batch is not None
        results.append(model.forward(scheduler.pack(batch), pools)[0])
    torch.testing.assert_close(results[0], expected, **CLOSE)
    torch.testing.assert_close(results[2], expected, **CLOSE)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}},
            "its rope is dynamic",
        ),
        ({"hidden_act": "gelu"}, "its activation is gelu"),
        ({"quantization_config": {"quant_method": "fp8"}}, "its weights are quantised"),
    ],
)
def test_what_it_does_not_compute_is_served_by_the_next_tier(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        decoder(llama(**changes))
    assert servable(llama(**changes)).tier == "B"


def test_the_first_tier_that_can_serve_does() -> None:
    assert servable(tiny_model("llama")).tier == "A" and servable(tiny_model("llama"), "BC").tier == "B"
    assert servable(tiny_model("gemma2")).tier == "B"


def test_a_decoder_whose_logits_differ_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    normal = Norm.__call__
    monkeypatch.setattr(Norm, "__call__", lambda self, x: normal(self, x) * 1.1)
    with pytest.raises(ModelError, match="logits differ"):
        decoder(tiny_model("llama"))
    assert servable(tiny_model("llama")).tier == "B"


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_on_a_gpu_keeps_close_to_transformers(family: str) -> None:
    """Both are compared with the same weights in float64. Rounding turns some experts' routes round in each of them: a
    token that went to another expert is off by ten times the others' error, on a CPU too, and says nothing here."""
    reference = tiny_model(family, torch.bfloat16).to("cuda")
    (prompt,) = prompts(150)
    exact = logits_of(deepcopy(reference).double(), prompt)
    theirs = logits_of(reference, prompt)
    ours = prompt_logits(decoder(reference), prompt, 16)
    for share in (50, 75 if family in MIXED else 99):
        our_error, their_error = (error_of_tokens(logits, exact, share) for logits in (ours, theirs))
        assert our_error < 1.5 * their_error + 0.01


def error_of_tokens(logits: Tensor, exact: Tensor, share: float) -> float:
    """Percentile `share` of the tokens' relative errors."""
    errors = [relative_error(row, expected) for row, expected in zip(logits, exact, strict=True)]
    return float(np.percentile(errors, share))
