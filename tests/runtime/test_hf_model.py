import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import runtime.attention
import runtime.hf_model
import runtime.step_tensors
from runtime.attention import PagedAttention, attend_plain
from runtime.batch import PackedBatch
from runtime.errors import ModelError
from runtime.hf_model import HFModel
from runtime.knobs import EngineConfig
from runtime.kv_cache import BlockPool
from runtime.paged_model import relative_error
from runtime.request import Request
from runtime.sampling import sample
from runtime.scheduler import Scheduler
from runtime.step_tensors import (
    LIKE_MAX_CONTEXT,
    LIKE_MAX_TOKENS,
    LIKE_MIN_ROWS,
    LIKE_SPAN,
    StepTensors,
    allowed_positions,
    like_groups,
)
from tests.runtime.tiny_models import VOCAB, generate, tiny_model

BLOCK_TOKENS = 4
FAMILIES = (
    "llama", "qwen2", "qwen2_window", "qwen3", "qwen3_moe", "mistral", "mixtral", "phi3", "gemma", "gemma2", "gemma3",
    "gpt_oss", "deepseek_v2", "deepseek_v2_lite", "deepseek_v3",
)  # fmt: skip


def prompts(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, VOCAB, length).tolist() for length in lengths]


def run(model: HFModel, scheduler: Scheduler, requests: list[Request]) -> int:
    """Serves the requests to their end. Returns how many of the rows had scattered blocks."""
    for request in requests:
        scheduler.add(request)
    num_scattered = 0
    while scheduler.has_requests:
        batch = scheduler.schedule(0.0)
        assert batch is not None
        packed = scheduler.pack(batch)
        num_scattered += sum(
            bool((np.diff(table[: -(-context // BLOCK_TOKENS)]) != 1).any())
            for table, context in zip(packed.block_tables, packed.contexts, strict=True)
        )
        logits = model.forward(packed)
        tokens = sample(logits, batch.sampled_requests()) if len(logits) else []
        scheduler.finish_step(batch, [token for token in tokens if token is not None], 0.0)
    return num_scattered


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_generate_in_mixed_chunked_and_preempted_batches(family: str) -> None:
    reference = tiny_model(family)
    asked = prompts(1, 5, 17, 40, 33, 70, 9, 3, 12, 7)
    expected = [generate(reference, prompt, 24) for prompt in asked]
    model, pool = HFModel(reference), BlockPool(52, BLOCK_TOKENS)
    model.allocate(pool.num_blocks, BLOCK_TOKENS)
    config = EngineConfig.of({"max_num_seqs": 9, "max_batched_tokens": 40, "prefill_chunk": 16})
    scheduler = Scheduler(pool, config, 200)
    requests = [Request.of_tokens(str(i), prompt, 24, arrived_at=0.0) for i, prompt in enumerate(asked)]
    num_scattered = run(model, scheduler, requests)
    assert [request.output_ids.tolist() for request in requests] == expected
    assert scheduler.num_preemptions > 0 and num_scattered > 0, "the test must reach what it claims"


def test_float32_with_default_settings_gives_the_tokens_of_generate() -> None:
    reference = tiny_model("qwen2", torch.float32)
    asked = prompts(30, 8)
    expected = [generate(reference, prompt, 10) for prompt in asked]
    model, pool = HFModel(reference), BlockPool(32)
    model.allocate(pool.num_blocks)
    requests = [Request.of_tokens(str(i), prompt, 10, arrived_at=0.0) for i, prompt in enumerate(asked)]
    run(model, Scheduler(pool, EngineConfig(), 100), requests)
    assert [request.output_ids.tolist() for request in requests] == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("copies", [False, True])
def test_greedy_tokens_behind_a_shared_prefix_are_those_of_generate(family: str, copies: bool) -> None:
    reference = tiny_model(family)
    (shared,) = prompts(30)
    asked = [[*shared[:28], *own] for own in prompts(3, 9, 17, 1, 12)]
    expected = [generate(reference, prompt, 12) for prompt in asked]
    model, pool = HFModel(reference), BlockPool(60, BLOCK_TOKENS, wants_runs=copies)
    model.allocate(pool.num_blocks, BLOCK_TOKENS)
    config = EngineConfig.of({"max_batched_tokens": 40, "prefill_chunk": 16, "prefix_cache": "on"})
    scheduler = Scheduler(pool, config, 200)
    requests = [Request.of_tokens(str(i), prompt, 12, arrived_at=0.0) for i, prompt in enumerate(asked)]
    run(model, scheduler, requests[:1])
    run(model, scheduler, requests[1:])
    assert [request.output_ids.tolist() for request in requests] == expected
    assert scheduler.num_hit_tokens >= 4 * 28, "the test must reach what it claims"


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_on_a_gpu_are_those_of_generate(family: str) -> None:
    reference = tiny_model(family).to("cuda")
    asked = prompts(1, 17, 40, 70, 9)
    expected = [generate(reference, prompt, 16) for prompt in asked]
    model, pool = HFModel(reference), BlockPool(40, BLOCK_TOKENS)
    model.allocate(pool.num_blocks, BLOCK_TOKENS)
    config = EngineConfig.of({"max_num_seqs": 4, "max_batched_tokens": 40, "prefill_chunk": 16})
    requests = [Request.of_tokens(str(i), prompt, 16, arrived_at=0.0) for i, prompt in enumerate(asked)]
    run(model, Scheduler(pool, config, 150), requests)
    assert [request.output_ids.tolist() for request in requests] == expected


@pytest.mark.gpu
def test_bfloat16_on_a_gpu_keeps_close_to_transformers_in_every_form_of_attention() -> None:
    reference = tiny_model("llama", torch.bfloat16).to("cuda")
    (prompt,) = prompts(64)
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt], device="cuda")).logits[0]
    model, pool = HFModel(reference), BlockPool(8)
    model.allocate(pool.num_blocks)
    scheduler = Scheduler(pool, EngineConfig.of({"prefill_chunk": 16}), 100)
    scheduler.add(Request.of_tokens("chunks", prompt[:-1], 2, arrived_at=0.0))
    logits = []
    while (batch := scheduler.schedule(0.0)) is not None:
        logits += list(model.forward(scheduler.pack(batch)))
        scheduler.finish_step(batch, [prompt[-1]] * int(batch.sampled.sum()), 0.0)
    assert relative_error(logits[0], expected[-2]) < 0.1 and relative_error(logits[1], expected[-1]) < 0.1


def test_two_models_in_one_process_do_not_share_a_pool() -> None:
    references = [tiny_model("qwen2"), tiny_model("llama")]
    (prompt,) = prompts(20)
    expected = [generate(reference, prompt, 8) for reference in references]
    outputs = []
    models = [HFModel(reference) for reference in references]
    for model in models:
        model.allocate(8)
    for model in models:
        request = Request.of_tokens("a", prompt, 8, arrived_at=0.0)
        run(model, Scheduler(BlockPool(8), EngineConfig(), 100), [request])
        outputs.append(request.output_ids.tolist())
    assert outputs == expected


def test_refuses_a_model_whose_attention_cannot_be_replaced() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(ModelError, match="MambaForCausalLM cannot be served with a paged cache"):
        HFModel(MambaForCausalLM(config))


@pytest.mark.parametrize("family", ["jamba", "lfm2"])
def test_refuses_layers_that_keep_more_than_keys_and_values_although_the_logits_of_a_probe_agree(
    family: str,
) -> None:
    model = tiny_model(family)
    for name, parameter in model.named_parameters():
        if "mamba" in name or "conv" in name:
            parameter.detach().mul_(1e-4)  # what these layers add is too little to be seen
    with pytest.raises(ModelError, match=r"it has layers of (linear_attention|conv)"):
        HFModel(model)


@pytest.mark.parametrize("family", ["jamba", "lfm2"])
def test_refuses_a_state_that_the_model_does_not_tell_of(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime.hf_model, "check_layers", lambda model: None)
    with pytest.raises(ModelError, match="logits differ from those of transformers"):
        HFModel(tiny_model(family))


def test_refuses_a_model_whose_logits_differ_when_served(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = PagedAttention.attend
    monkeypatch.setattr(PagedAttention, "attend", lambda self, *args, **kw: attend(self, *args, **kw) * 1.5)
    with pytest.raises(ModelError, match="logits differ from those of transformers"):
        HFModel(tiny_model("llama"))


# -- the forms of attention against the plain one ---------------------------------------------------------------

KV_HEADS, GROUP, DIM, NUM_BLOCKS = 2, 3, 8, 40


def packed_rows(rows: list[tuple[int, int]], scattered: bool, rng: np.random.Generator) -> PackedBatch:
    """rows: (tokens cached before, new tokens) of each."""
    free = rng.permutation(NUM_BLOCKS) if scattered else np.arange(NUM_BLOCKS)
    width = max(-(-(start + new) // BLOCK_TOKENS) for start, new in rows)
    tables, taken = np.zeros((len(rows), width), np.int32), 0
    for row, (start, new) in enumerate(rows):
        count = -(-(start + new) // BLOCK_TOKENS)
        tables[row, :count] = free[taken : taken + count]
        taken += count
    new_tokens = np.array([new for _, new in rows])
    positions = np.concatenate([np.arange(start, start + new) for start, new in rows])
    owners = np.repeat(np.arange(len(rows)), new_tokens)
    slots = (
        tables[owners, positions // BLOCK_TOKENS].astype(np.int64) * BLOCK_TOKENS + positions % BLOCK_TOKENS
    )
    row_starts = np.concatenate(([0], np.cumsum(new_tokens)))
    contexts = np.array([start + new for start, new in rows])
    return PackedBatch(
        positions, positions, slots, row_starts, contexts, tables, row_starts[1:] - 1, BLOCK_TOKENS
    )


def slots_of(packed: PackedBatch, row: int) -> Tensor:
    slots = packed.block_tables[row].repeat(BLOCK_TOKENS) * BLOCK_TOKENS + np.tile(
        np.arange(BLOCK_TOKENS), packed.block_tables.shape[1]
    )
    return torch.from_numpy(slots[: packed.contexts[row]])


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("padded", ["none", "all", "like"])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("special", [False, True])
def test_every_form_of_attention_agrees_with_the_plain_one(
    scattered: bool, padded: str, window: int | None, special: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime.step_tensors, "PADDED_MIN_ROWS_CPU", 1 if padded == "all" else 1000)
    monkeypatch.setattr(runtime.step_tensors, "LIKE_SPAN", 10)
    monkeypatch.setattr(runtime.step_tensors, "LIKE_MIN_ROWS", 1)
    monkeypatch.setattr(
        runtime.attention, "_has_fused_gqa", lambda query, value: padded == "all"
    )  # both are the forms of a GPU
    monkeypatch.setattr(runtime.step_tensors, "PADDED_MAX_TOKENS", 48)  # so that the rows form three groups
    generator = torch.Generator().manual_seed(0)
    packed = packed_rows(
        [(9, 1), (0, 1), (30, 1), (4, 1), (0, 7), (13, 10)], scattered, np.random.default_rng(0)
    )
    step = StepTensors.of(packed, torch.device("cpu"), pads_like=padded == "like")
    is_padded = padded != "none"
    assert len(step.padded) == (3 if is_padded else 0) and len(step.rows) == (2 if is_padded else 6)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    attention = PagedAttention()
    keys, values = (
        random(KV_HEADS, NUM_BLOCKS * BLOCK_TOKENS, DIM),
        random(KV_HEADS, NUM_BLOCKS * BLOCK_TOKENS, DIM),
    )
    used = torch.cat([slots_of(packed, row) for row in range(6)])
    unused = torch.ones(keys.shape[1], dtype=torch.bool).index_fill_(0, used, False)
    keys[:, unused], values[:, unused] = torch.nan, torch.nan  # nothing of another request may be read
    attention.pools[0], attention.step = (keys, values), step
    num_tokens = len(packed.token_ids)
    query, key = random(1, KV_HEADS * GROUP, num_tokens, DIM), random(1, KV_HEADS, num_tokens, DIM)
    value = random(1, KV_HEADS, num_tokens, DIM)
    module = torch.nn.Module()
    object.__setattr__(module, "layer_idx", 0)
    extra = {"softcap": 2.0, "s_aux": random(KV_HEADS * GROUP)} if special else {}
    out = attention.attend(module, query, key, value, 0.3, window, **extra)

    assert torch.equal(keys[:, torch.from_numpy(packed.slots)], key[0])
    for row in range(6):
        new = slice(packed.row_starts[row], packed.row_starts[row + 1])
        allowed = allowed_positions(new.stop - new.start, int(packed.contexts[row]), window, query.device)
        grouped = query[0, :, new].unflatten(0, (KV_HEADS, GROUP))
        cached = slots_of(packed, row)
        expected = attend_plain(
            grouped,
            keys[:, cached],
            values[:, cached],
            allowed,
            0.3,
            extra.get("softcap"),
            extra.get("s_aux"),
        )
        torch.testing.assert_close(out[0, new], expected.permute(2, 0, 1, 3).flatten(1, 2))


@given(st.lists(st.integers(1, 1200), max_size=40), st.booleans())
@example([500] * 20, True)
@example([100, 120, 900, 110], False)
def test_rows_are_padded_with_their_like_as_long_as_copies_stay_small(
    lengths: list[int], is_sorted: bool
) -> None:
    contexts = np.array(sorted(lengths) if is_sorted else lengths, np.int64)
    groups = like_groups(contexts)
    assert [first for first, _ in groups] == [0, *(last for _, last in groups)][: len(groups)], "one by one"
    num_padded = groups[-1][1] if groups else 0
    assert (contexts[:num_padded] <= LIKE_MAX_CONTEXT).all()
    for first, last in groups:
        some = contexts[first:last]
        assert len(some) and np.ptp(some) <= LIKE_SPAN
        assert len(some) == 1 or len(some) * some.max() <= LIKE_MAX_TOKENS
    num_short = next((at for at, one in enumerate(contexts) if one > LIKE_MAX_CONTEXT), len(contexts))
    assert num_padded in (0, num_short) and len(groups) * LIKE_MIN_ROWS <= num_padded


def test_rows_that_have_no_like_are_attended_to_one_by_one() -> None:
    assert like_groups(np.array([60, 170, 280, 390, 500, 610, 720])) == []
    assert like_groups(np.array([100, 110, 120, 300, 310, 320, 330, 900])) == [(0, 3), (3, 7)]
    assert like_groups(np.array([500] * 20)) == [(0, 8), (8, 16), (16, 20)]
