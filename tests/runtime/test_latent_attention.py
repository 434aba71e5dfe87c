"""Attention over latents: both forms give the same, in every variant of DeepSeek, and whatever format weights have."""

from collections import Counter
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import runtime.latent_attention
from runtime.attention import attend_plain
from runtime.knobs import EngineConfig
from runtime.kv_cache import BlockPool
from runtime.latent_attention import LatentAttention, LatentCache
from runtime.paged_model import KVShape, PagedModel, relative_error
from runtime.request import Request
from runtime.scheduler import Scheduler
from runtime.step_tensors import Row, allowed_positions
from runtime.weights import WeightSet, prepared, wanted_bytes
from tests.runtime.test_decoder import CLOSE, decoder, logits_of, prompt_logits, prompts, serve
from tests.runtime.tiny_models import generate, tiny_config, tiny_model

FAMILIES = ("deepseek_v2", "deepseek_v2_lite", "deepseek_v3")
RANK, ROPE, HEADS = 16, 8, 4


def attention_of(family: str) -> LatentAttention:
    attention = decoder(tiny_model(family)).decoder.layers[0].attention
    assert isinstance(attention, LatentAttention)
    return attention


def filled_cache(slots: int) -> LatentCache:
    generator = torch.Generator().manual_seed(1)
    return LatentCache(torch.randn(slots, RANK + ROPE, generator=generator, dtype=torch.float64))


def written_out(attention: LatentAttention, plain: Tensor, turn: Tensor, latents: Tensor) -> Tensor:
    """What both forms mean: keys and values of each head, and attention as it is specified."""
    num_new, context = len(plain), len(latents)
    both = (latents[:, :RANK] @ attention.kv_b.T).unflatten(1, (HEADS, -1))
    key = torch.cat((both[..., :16], latents[:, None, RANK:].expand(-1, HEADS, -1)), 2).transpose(0, 1)
    query = torch.cat((plain, turn), 2).transpose(0, 1)[:, None]
    allowed = allowed_positions(num_new, context, None, plain.device)
    out = attend_plain(query, key, both[..., 16:].transpose(0, 1), allowed, attention.scaling)
    return out.permute(2, 0, 1, 3).flatten(1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("num_new", "context"), [(1, 1), (1, 30), (7, 7), (7, 30), (30, 30)])
@pytest.mark.parametrize("is_scattered", [False, True])
@torch.inference_mode()
def test_latents_are_attended_to_as_the_keys_and_values_that_they_expand_to(
    family: str, num_new: int, context: int, is_scattered: bool
) -> None:
    attention, cache = attention_of(family), filled_cache(64)
    place = torch.randperm(64)[:context] if is_scattered else slice(5, 5 + context)
    row = Row(0, num_new, context, place)
    plain = torch.randn(num_new, HEADS, 16, dtype=torch.float64)
    turn = torch.randn(num_new, HEADS, ROPE, dtype=torch.float64)
    expected = written_out(attention, plain, turn, cache.rows[place])
    torch.testing.assert_close(attention.attend_absorbed(plain, turn, cache, row), expected)
    torch.testing.assert_close(attention.attend_expanded(plain, turn, cache, row), expected)


@torch.inference_mode()
def test_heads_are_expanded_in_groups_where_the_context_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    attention, cache, row = attention_of("deepseek_v3"), filled_cache(64), Row(0, 7, 40, slice(0, 40))
    plain = torch.randn(7, HEADS, 16, dtype=torch.float64)
    turn = torch.randn(7, HEADS, ROPE, dtype=torch.float64)
    expected = attention.attend_expanded(plain, turn, cache, row)
    for num_values in (1, 3 * 40 * 2 * 24):  # one head at a time, and three and one
        monkeypatch.setattr(runtime.latent_attention, "EXPANDED_MAX_VALUES", num_values)
        torch.testing.assert_close(attention.attend_expanded(plain, turn, cache, row), expected)


def test_a_short_piece_behind_a_long_context_is_absorbed_and_a_fresh_prompt_is_not() -> None:
    attention = attention_of("deepseek_v3")
    assert attention.is_absorbed(Row(0, 16, 200, slice(0, 200)))
    assert not attention.is_absorbed(Row(0, 100, 200, slice(0, 200)))
    assert not attention.is_absorbed(Row(0, 16, 16, slice(0, 16)))


@pytest.mark.parametrize("is_absorbed", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_have_the_same_logits_in_either_form(
    family: str, is_absorbed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LatentAttention, "is_absorbed", lambda *_: is_absorbed)
    reference = tiny_model(family)
    (prompt,) = prompts(60)
    expected = logits_of(reference, prompt)
    torch.testing.assert_close(prompt_logits(decoder(reference), prompt, 16), expected, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_of_both_forms_beside_decoded_rows_give_the_tokens_of_generate(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms: Counter[bool] = Counter()
    chosen = LatentAttention.is_absorbed

    def counted(attention: LatentAttention, row: Row) -> bool:
        forms[chosen(attention, row)] += 1
        return chosen(attention, row)

    reference = tiny_model(family)
    asked = prompts(150, 4, 90, 30, 8, 60, 12, 5, 20)
    expected = [generate(reference, prompt, 20) for prompt in asked]
    model = decoder(reference)
    monkeypatch.setattr(LatentAttention, "is_absorbed", counted)
    outputs, _ = serve(model, asked, 20, 200, max_num_seqs=9, max_batched_tokens=60, prefill_chunk=16)
    assert outputs == expected
    assert forms[True] > 0 and forms[False] > 0, "the test must reach what it claims"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_takes_one_latent_and_one_rotated_key_a_layer(family: str) -> None:
    model = decoder(tiny_model(family, torch.float32))
    assert set(model.kv_shapes.values()) == {KVShape(1, RANK + ROPE, 0, torch.float32)}
    assert model.kv_bytes_per_token == 2 * 4 * (RANK + ROPE)


YARN = {
    "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64,
    "mscale": 1.0, "mscale_all_dim": 0.5,
}  # fmt: skip


def deepseek(family: str, dtype: torch.dtype = torch.float64, **changes: Any) -> PreTrainedModel:
    config = type(tiny_config(family))(**{**tiny_config(family).to_dict(), **changes})
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("bias"):  # those of the routers too, which start as zeros
                tensor.normal_()
    return model


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("deepseek_v2", {"rope_parameters": YARN}),
        ("deepseek_v2_lite", {"rope_parameters": YARN}),
        ("deepseek_v3", {"rope_parameters": YARN}),
        ("deepseek_v2", {"rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}}),
        ("deepseek_v3", {"rope_interleave": False}),
        ("deepseek_v3", {"q_lora_rank": None}),
        ("deepseek_v2", {"attention_bias": True, "mlp_bias": True}),
        ("deepseek_v2_lite", {"attention_bias": True}),
        ("deepseek_v3", {"v_head_dim": 32}),
        ("deepseek_v3", {"n_shared_experts": 2, "norm_topk_prob": False, "routed_scaling_factor": 2.5}),
        ("deepseek_v3", {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}),
        ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
        ("deepseek_v2", {"n_shared_experts": 2, "routed_scaling_factor": 16.0}),
        ("deepseek_v2", {"n_group": 4, "topk_group": 3}),
        ("deepseek_v2_lite", {"first_k_dense_replace": 0, "norm_topk_prob": True}),
        ("deepseek_v3", {"first_k_dense_replace": 2}),
        ("deepseek_v2_lite", {"tie_word_embeddings": True}),
    ],
    ids=str,
)
def test_logits_are_those_of_transformers_in_every_variant(family: str, changes: dict[str, Any]) -> None:
    (prompt,) = prompts(150)
    reference = deepseek(family, **changes)
    expected = logits_of(reference, prompt)
    model = decoder(reference)
    for chunk in (16, 200):
        torch.testing.assert_close(prompt_logits(model, prompt, chunk), expected, **CLOSE)
    narrow = deepseek(family, torch.float32, **changes)
    expected = logits_of(narrow, prompt)
    assert relative_error(prompt_logits(decoder(narrow), prompt, 64), expected) < 1e-4


@torch.inference_mode()
def decode_logits(model: PagedModel, prompt: list[int], start: int) -> Tensor:
    """Those after each token of the prompt from `start` on, each computed as a row of one token beside another
    prompt that is still read: [len(prompt) - start, vocab]."""
    pool = BlockPool(64)
    model.allocate(pool.num_blocks)
    scheduler = Scheduler(pool, EngineConfig.of({"prefill_chunk": 16}), 250)
    scheduler.add(Request.of_tokens("a", prompt[:start], len(prompt) - start + 1, arrived_at=0.0))
    scheduler.add(Request.of_tokens("b", prompts(100)[0], 1, arrived_at=0.0))
    rows, num_known = [], start
    while (batch := scheduler.schedule(0.0)) is not None:
        logits, sampled = model.forward(scheduler.pack(batch)), batch.sampled_requests()
        tokens = [0] * len(logits)
        for i, request in enumerate(sampled):
            if request.id == "a":
                rows.append(logits[i])
                tokens[i] = prompt[num_known % len(prompt)]
                num_known += 1
        scheduler.finish_step(batch, tokens, 0.0)
    return torch.stack(rows)[1:]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("format", "limit"), [("bfloat16", 0.05), ("int8", 0.1)])
def test_another_weight_format_keeps_decoded_and_prompt_rows_near(
    family: str, format: str, limit: float
) -> None:
    # Every token goes to all experts: otherwise a rounding sends some to another one, which is far away.
    everyone = {"num_experts_per_tok": 8, "n_group": 1, "topk_group": 1}
    model = decoder(deepseek(family, torch.float32, **everyone))
    (prompt,) = prompts(40)
    loaded = WeightSet.of_installed(model.model, "float32")
    other = prepared(model.model, format)
    assert 0 < other.nbytes <= wanted_bytes(model.model, format)
    found = {}
    for weights in (loaded, other, loaded):
        weights.install()
        found.setdefault(weights.format, []).append(
            (prompt_logits(model, prompt, 64), decode_logits(model, prompt, 30))
        )
    (prompt_rows, decoded), again = found["float32"]
    assert torch.equal(again[0], prompt_rows) and torch.equal(again[1], decoded)
    assert relative_error(decoded, prompt_rows[30:]) < 1e-5
    ((rounded_rows, rounded_decoded),) = found[format]
    assert 0 < relative_error(rounded_rows, prompt_rows) < limit
    assert 0 < relative_error(rounded_decoded, decoded) < limit
    assert relative_error(rounded_decoded, rounded_rows[30:]) < 0.6 * limit


def test_absorption_holds_nothing_of_the_weights_twice() -> None:
    attention = attention_of("deepseek_v2")
    storage = attention.kv_b.untyped_storage().data_ptr()
    for view in (attention.key_up, attention.value_up, attention.by_head):
        assert view.untyped_storage().data_ptr() == storage


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_on_a_gpu_keeps_close_to_transformers_in_either_form(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = tiny_model(family, torch.bfloat16).to("cuda")
    (prompt,) = prompts(150)
    exact = logits_of(deepcopy(reference).double(), prompt)
    limit = 1.5 * relative_error(logits_of(reference, prompt), exact) + 0.01
    model = decoder(reference)
    for is_absorbed in (True, False):
        monkeypatch.setattr(LatentAttention, "is_absorbed", lambda *_, form=is_absorbed: form)
        assert relative_error(prompt_logits(model, prompt, 16), exact) < limit
    assert relative_error(decode_logits(model, prompt[:60], 40), exact[40:60]) < 2 * limit  # few rows
