"""The pass that a GPU takes, beside the decoder's own: with plain kernels here, with Triton's and graphs on a GPU."""

import contextlib
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import count, pairwise
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

import runtime.fused_latent
import runtime.fused_pass
import runtime.kernels.splits
from runtime.attention import attend_plain
from runtime.batch import Batch, PackedBatch
from runtime.captures import NUM_PARTS, STEPS_UNDER_WAY, Captured, Captures
from runtime.decode_graph import BUCKETS, PUT_OFF, WARM_UPS, Decoded, DecodeGraphs, Key, Run
from runtime.decoder_model import DecoderModel
from runtime.fused_pass import DecodeInputs, FusedPass, Midway
from runtime.hf_model import HFModel
from runtime.kernels import PLAIN
from runtime.kernels.linear_table import TIMED_ROWS, Choice, LinearShape
from runtime.knobs import EngineConfig
from runtime.kv_cache import BLOCK_TOKENS, BlockPool
from runtime.paged_model import block_copier, block_gatherer, block_rearranger, relative_error
from runtime.request import Request, SamplingParams
from runtime.retable import BlockMove
from runtime.sampling import draw, sample, tokens_of
from runtime.scheduler import Scheduler
from runtime.step_tensors import Pieces, StepTensors, allowed_positions
from runtime.weights import linear_layers
from tests.runtime.test_latent_attention import deepseek
from tests.runtime.tiny_models import VOCAB, repeating_model, tiny_model

DEEPSEEK = ("deepseek_v2", "deepseek_v2_lite", "deepseek_v3")
DENSE = ("llama", "mistral", "qwen2", "qwen2_window", "qwen3")
MIXED = ("mixtral", "qwen3_moe")
OWN_HEADS = (*DENSE, *MIXED)
FAMILIES = (*OWN_HEADS, *DEEPSEEK)
# Routers of DeepSeek compute in float32 whatever the model is; all else is float64 here.
EXACT, BY_FLOAT32 = {"rtol": 1e-9, "atol": 1e-9}, {"rtol": 1e-5, "atol": 1e-6}


def limits_of(family: str) -> dict[str, float]:
    return BY_FLOAT32 if family in DEEPSEEK else EXACT


def decoder(family: str, dtype: torch.dtype = torch.float64, device: str = "cpu") -> DecoderModel:
    return DecoderModel(HFModel(tiny_model(family, dtype).to(device)), max_model_len=200)


def repeating_decoder(family: str, dtype: torch.dtype = torch.float64, device: str = "cpu") -> DecoderModel:
    return DecoderModel(HFModel(repeating_model(family, dtype).to(device)), max_model_len=200)


def mixed_steps(
    num_blocks: int, block_tokens: int = BLOCK_TOKENS, output_tokens: int = 12, **knobs: Any
) -> tuple[Scheduler, list[Request]]:
    """A scheduler with requests of all lengths, for a pool that shares blocks and so scatters them."""
    rng = np.random.default_rng(0)
    asked = [rng.integers(2, VOCAB, length).tolist() for length in (1, 5, 17, 40, 33, 70, 9)]
    config = EngineConfig.of({"max_batched_tokens": 40, "prefill_chunk": 16, **knobs})
    scheduler = Scheduler(BlockPool(num_blocks, block_tokens, wants_runs=False), config, 200)
    requests = [Request.of_tokens(str(at), ids, output_tokens, 0.0) for at, ids in enumerate(asked)]
    for request in requests:
        scheduler.add(request)
    return scheduler, requests


def written_out(
    query: Tensor, key: Tensor, value: Tensor, pieces: Pieces, scaling: float, window: int | None
) -> Tensor:
    """What `attend_pieces` means, row by row: FlashAttention is not to be had on a CPU."""
    outputs, new, cached = [], pieces.new_edges.tolist(), pieces.context_edges.tolist()
    for (start, end), (first, last) in zip(pairwise(new), pairwise(cached), strict=True):
        allowed = allowed_positions(end - start, last - first, window, query.device)
        q = query[start:end].unflatten(1, (key.shape[1], -1)).permute(1, 2, 0, 3)
        k, v = key[first:last].transpose(0, 1), value[first:last].transpose(0, 1)
        outputs.append(attend_plain(q, k, v, allowed, scaling).permute(2, 0, 1, 3).flatten(1, 2))
    return torch.cat(outputs)


def compare_steps(
    model: DecoderModel, packs_pieces: bool, limits: dict[str, float], monkeypatch: pytest.MonkeyPatch,
    in_parts: bool = False, scheduler: Scheduler | None = None, draw: Callable[[PackedBatch], list[int]] | None = None,
) -> tuple[int, int]:  # fmt: skip
    """Both passes on the same steps. Returns how many were mixed, and how many had pieces behind cached tokens."""
    for module in (runtime.fused_pass, runtime.fused_latent):
        monkeypatch.setattr(module, "attend_pieces", written_out)
    fused = FusedPass(model.decoder, PLAIN, BLOCK_TOKENS, 200, num_sms=4)
    if in_parts:
        fused.linears.choices = {
            LinearShape(use, *layer.weight.shape, rows, torch.float64): Choice(1.0, 9.0)
            for use in ("whole", "gated", "parts")
            for layer in linear_layers(model.decoder)
            for rows in TIMED_ROWS
        }
    scheduler = scheduler or mixed_steps(40)[0]
    model.allocate(scheduler.pool.num_blocks)
    pools = model.new_pools(scheduler.pool.num_blocks)
    caches = [
        layer.attention.cache_of(pool[0][0])
        for layer, pool in zip(model.decoder.layers, pools.values(), strict=True)
    ]
    num_mixed = num_behind = 0
    while (batch := scheduler.schedule(0.0)) is not None:
        packed = scheduler.pack(batch)
        step = StepTensors.of(packed, model.device, has_kernel=True, packs_pieces=packs_pieces)
        num_mixed += 0 < batch.num_decode < len(batch.requests)
        num_behind += step.pieces is not None and step.pieces.slots is not None
        expected = model.forward(packed)
        with torch.inference_mode():
            torch.testing.assert_close(fused.forward(step, caches), expected, **limits)
        tokens = expected.argmax(-1).tolist() if draw is None else draw(packed)
        # First those that are drawn, then those of a prompt that is scored.
        num_drawn = len(tokens) if batch.num_drafted else int(batch.sampled.sum())
        scheduler.finish_step(batch, tokens[:num_drawn], 0.0)
    return num_mixed, num_behind


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packs_pieces", [False, True])
@pytest.mark.parametrize("in_parts", [False, True])
def test_a_step_gives_the_logits_of_the_decoder_whatever_its_rows(
    family: str, packs_pieces: bool, in_parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = limits_of(family)
    num_mixed, num_behind = compare_steps(decoder(family), packs_pieces, limits, monkeypatch, in_parts)
    assert num_mixed > 0 and (num_behind > 0) == packs_pieces, "the test must reach what it claims"


@pytest.mark.parametrize("family", ["qwen2_window", "qwen3", "deepseek_v3"])
@pytest.mark.parametrize(
    ("lengths", "asked", "met"),
    [
        ([70, 21], {}, "none"),
        ([70, 21], {"num_prompt_logprobs": 0}, "more than rows"),
        ([21, *[150] * 8], {"drafts": 3}, "several of a row"),  # beside pieces that want none
    ],
    ids=str,
)
def test_of_the_last_layer_only_tokens_are_computed_whose_logits_somebody_wants(
    family: str, lengths: list[int], asked: dict[str, int], met: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    knobs = {"prefill_chunk": 16, "speculation_length": asked.get("drafts", 0)}
    config = EngineConfig.of({**knobs, "speculation_max_seqs": 16})
    scheduler = Scheduler(BlockPool(120, wants_runs=False), config, 200)
    wanted = SamplingParams(num_prompt_logprobs=asked.get("num_prompt_logprobs"))
    for at, length in enumerate(lengths):
        scheduler.add(Request.of_tokens(str(at), [3, 4, 5] * (length // 3), 24, 0.0, wanted))
    seen, compute = set(), FusedPass.forward

    def noting(self: FusedPass, step: StepTensors, caches: Any) -> Tensor:
        rows = step.last_rows.tolist()
        if step.pieces is None:
            return compute(self, step, caches)
        kind = "several of a row" if len(set(rows)) < len(rows) else "one of a row"
        seen.add("none" if not rows else "more than rows" if len(rows) > len(step.contexts) else kind)
        return compute(self, step, caches)

    def repeat(packed: PackedBatch) -> list[int]:
        return [3 + (position + 1) % 3 for position in packed.positions[packed.last_tokens].tolist()]

    monkeypatch.setattr(FusedPass, "forward", noting)
    compare_steps(decoder(family), True, limits_of(family), monkeypatch, scheduler=scheduler, draw=repeat)
    assert met in seen, "the test must reach what it claims"


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("deepseek_v3", {"rope_interleave": False}),
        ("deepseek_v3", {"q_lora_rank": None}),
        ("deepseek_v3", {"v_head_dim": 32}),  # values longer than keys
        ("deepseek_v3", {"v_head_dim": 4}),  # and so short that padding is needed
        ("deepseek_v2", {"attention_bias": True, "mlp_bias": True}),
        ("deepseek_v2_lite", {"first_k_dense_replace": 0}),
        ("deepseek_v2_lite", {"first_k_dense_replace": 2}),
        ("qwen3_moe", {"mlp_only_layers": [0]}),
    ],
    ids=str,
)
@pytest.mark.parametrize("max_values", [1 << 26, 1, 3 * 40 * 2 * 24])  # one head at a time, and some
def test_variants_of_latents_and_experts_give_the_logits_of_the_decoder(
    family: str, changes: dict[str, Any], max_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime.fused_latent, "EXPANDED_MAX_VALUES", max_values)
    model = DecoderModel(HFModel(deepseek(family, **changes)), max_model_len=200)
    compare_steps(model, True, limits_of(family), monkeypatch)


def inputs_of(packed: PackedBatch, num_rows: int, max_blocks: int) -> DecodeInputs:
    count = len(packed.contexts)
    tables = torch.zeros(num_rows, max_blocks, dtype=torch.int32)
    tables[:count, : packed.block_tables.shape[1]] = torch.from_numpy(packed.block_tables)

    def padded(values: Any, fill: int) -> Tensor:
        found = torch.full((num_rows,), fill, dtype=torch.int64)
        found[:count] = torch.from_numpy(values)
        return found

    return DecodeInputs(
        padded(packed.token_ids, 0), padded(packed.positions, 0), padded(packed.slots, -1),
        padded(packed.contexts, 0), tables, drawn=torch.zeros(1, dtype=torch.int64),
    )  # fmt: skip


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", *DEEPSEEK])
@torch.inference_mode()
def test_padding_rows_change_nothing(family: str) -> None:
    model, limits = decoder(family), limits_of(family)
    fused = FusedPass(model.decoder, PLAIN, BLOCK_TOKENS, 200, num_sms=4)
    scheduler, _ = mixed_steps(40)
    model.allocate(40)
    num_compared = 0
    while (batch := scheduler.schedule(0.0)) is not None:
        packed = scheduler.pack(batch)
        if batch.num_prefill_rows == 0:
            caches = model._caches_of(model.pools)
            before = [cache.rows.clone() for cache in caches]
            every = range(len(model.decoder.layers))
            padded = fused.logits(fused.decode(inputs_of(packed, 10, 13), caches, every).y)
            after = [cache.rows.clone() for cache in caches]
            for cache, rows in zip(caches, before, strict=True):
                cache.rows.copy_(rows)
            expected = model.forward(packed)
            torch.testing.assert_close(padded[: len(expected)], expected, **limits)
            for cache, rows in zip(caches, after, strict=True):
                torch.testing.assert_close(cache.rows, rows, **limits, equal_nan=True)
            num_compared += 1
        else:
            expected = model.forward(packed)
        scheduler.finish_step(batch, expected.argmax(-1).tolist(), 0.0)
    assert num_compared > 3, "the test must reach what it claims"


def three_of(family: str) -> tuple[DecoderModel, DecoderModel, DecoderModel]:
    """One model in float64, in bfloat16 by kernels on a GPU, and there by the decoder's own pass."""
    reference = tiny_model(family, torch.bfloat16)
    exact = DecoderModel(HFModel(deepcopy(reference).double()), max_model_len=200)
    model, plain = (
        DecoderModel(HFModel(deepcopy(reference).to("cuda")), max_model_len=200) for _ in range(2)
    )
    assert model._fused is not None
    plain._fused = None
    return exact, model, plain


@pytest.mark.gpu
@pytest.mark.parametrize("block_tokens", [16, 64, 256])
@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_steps_are_as_close_to_exact_ones_as_the_decoders_own(
    family: str, block_tokens: int
) -> None:
    """Where a token's experts are a near tie, one rounding sends it elsewhere: so no two passes in bfloat16 agree in
    all rows, and both are compared with float64."""
    exact, model, plain = three_of(family)
    scheduler, _ = mixed_steps(40, block_tokens)
    for each in (exact, model, plain):
        each.allocate(40, block_tokens)
    assert model.prepare_steps(8, block_tokens)
    errors: list[tuple[float, float]] = []
    while (batch := scheduler.schedule(0.0)) is not None:
        packed = scheduler.pack(batch)
        expected, own, other = exact.forward(packed), model.forward(packed).cpu(), plain.forward(packed).cpu()
        errors += [
            (relative_error(a, e), relative_error(b, e)) for a, b, e in zip(own, other, expected, strict=True)
        ]
        scheduler.finish_step(batch, expected.argmax(-1).tolist(), 0.0)
    assert model._graphs is not None and model._graphs._graphs and not model._graphs._refused
    for share in (50, 75 if family in MIXED else 90):  # there a tenth of the rows goes to another expert
        own_error, plain_error = (float(np.percentile(part, share)) for part in zip(*errors, strict=True))
        assert own_error < 1.5 * plain_error + 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen3", "deepseek_v2"])
def test_a_step_of_several_graphs_gives_the_logits_of_one(family: str) -> None:
    """Several are captured while steps are served over pools for which none was prepared."""
    model = decoder(family, torch.bfloat16, "cuda")
    model.allocate(40)
    assert model.prepare_steps(8) and model._graphs is not None
    graphs, runs = model._graphs, []
    for _ in range(2):
        scheduler, _ = mixed_steps(40, output_tokens=40)
        logits: list[Tensor] = []
        while (batch := scheduler.schedule(0.0)) is not None:
            found = model.forward(scheduler.pack(batch)).clone()
            tokens = (runs[0][len(logits)] if runs else found).argmax(-1).tolist()
            logits.append(found)
            scheduler.finish_step(batch, tokens, 0.0)
        runs.append(logits)
        model.pools = model.new_pools(40)
    num_graphs = Counter(len(captured) for captured in graphs._graphs.values())
    assert num_graphs[1] == 4 and num_graphs[len(graphs._parts)] > 1 and len(graphs._parts) > 1
    assert max(relative_error(one, several) for one, several in zip(*runs, strict=True)) < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("family", DENSE)
def test_uneven_contexts_give_the_logits_of_plain_ones(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.kernels.splits, "UNEVEN_FROM", 60)
    monkeypatch.setattr(runtime.kernels.splits, "IDLE_TOKENS", 0)
    monkeypatch.setattr(Captures, "has_spare_room", lambda self: True)
    model, plain = decoder(family, torch.bfloat16, "cuda"), decoder(family, torch.bfloat16, "cuda")
    assert model._fused is not None
    model._fused._num_sms, plain._fused = 4, None
    model.allocate(40)
    plain.allocate(40)
    assert model.prepare_steps(8) and model._graphs is not None
    scheduler, _ = mixed_steps(40, output_tokens=40)
    errors: list[float] = []
    while (batch := scheduler.schedule(0.0)) is not None:
        packed = scheduler.pack(batch)
        expected, actual = plain.forward(packed), model.forward(packed)
        errors += [relative_error(a, b) for a, b in zip(actual, expected, strict=True)]
        scheduler.finish_step(batch, expected.argmax(-1).tolist(), 0.0)
    assert any(key.are_uneven for key in model._graphs._graphs) == (family != "mistral"), "of 20 tokens at most"
    assert not model._graphs._refused
    assert max(errors) < 0.1 and float(np.median(errors)) < 0.02


@pytest.mark.gpu
def test_a_deepseek_of_its_kernels_sizes_uses_all_of_them(caplog: pytest.LogCaptureFixture) -> None:
    changes = {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32}
    model = DecoderModel(HFModel(deepseek("deepseek_v2_lite", torch.bfloat16, **changes).to("cuda")), 200)
    assert model._fused is not None and "plain twin" not in caplog.text
    model.allocate(40)
    model.prepare_steps(8)
    assert model._graphs is not None and not model._graphs._refused
    scheduler, requests = mixed_steps(40)
    while (batch := scheduler.schedule(0.0)) is not None:
        logits = model.forward(scheduler.pack(batch))
        assert bool(logits.isfinite().all())
        scheduler.finish_step(batch, logits.argmax(-1).tolist(), 0.0)
    assert all(request.finish_reason is not None for request in requests)


@pytest.mark.gpu
@pytest.mark.parametrize("family", OWN_HEADS)
def test_replayed_steps_over_a_rounded_cache_give_the_logits_of_plain_ones(family: str) -> None:
    """Nearly: a value on the edge goes to either side, and what a step brings itself is not rounded in pieces."""
    model, plain = decoder(family, torch.bfloat16, "cuda"), decoder(family, torch.bfloat16, "cuda")
    plain._fused = None
    scheduler, _ = mixed_steps(40)
    model.kv_dtype = plain.kv_dtype = "fp8"
    model.allocate(40)
    plain.allocate(40)
    assert model.prepare_steps(8)
    errors = []
    while (batch := scheduler.schedule(0.0)) is not None:
        packed = scheduler.pack(batch)
        expected = plain.forward(packed)
        actual = model.forward(packed)
        errors += [relative_error(a, b) for a, b in zip(actual, expected, strict=True)]
        scheduler.finish_step(batch, expected.argmax(-1).tolist(), 0.0)
    assert max(errors) < 0.5 and float(np.median(errors)) < 0.15


@pytest.mark.gpu
@pytest.mark.parametrize("family", DENSE)
def test_replayed_steps_with_drafts_give_the_logits_of_plain_ones(family: str) -> None:
    model, plain = (
        repeating_decoder(family, torch.bfloat16, "cuda"),
        repeating_decoder(family, torch.bfloat16, "cuda"),
    )
    plain._fused = None
    scheduler, _ = mixed_steps(40, output_tokens=60, speculation_length=6)
    model.allocate(40)
    plain.allocate(40)
    model.prepare_steps(8)
    errors, num_replayed = [], 0
    while (batch := scheduler.schedule(0.0)) is not None:
        packed = scheduler.pack(batch)
        expected, actual = plain.forward(packed), model.forward(packed)
        if batch.num_drafted:
            assert model._graphs is not None
            num_replayed += model._graphs.takes(packed)
            errors += [relative_error(a, b) for a, b in zip(actual, expected, strict=True)]
        scheduler.finish_step(batch, expected.argmax(-1).tolist(), 0.0)
    assert num_replayed > 5 and scheduler.num_right_tokens > 0, "the test must reach what it claims"
    assert max(errors) < 0.1 and float(np.median(errors)) < 0.02


def test_parts_of_a_step_begin_where_16_bytes_do_whatever_their_sizes() -> None:
    model, (scheduler, _) = decoder("llama"), mixed_steps(40)
    sizes = set()
    while (batch := scheduler.schedule(0.0)) is not None:
        packed = scheduler.pack(batch)
        step = StepTensors.of(packed, model.device, has_kernel=True)
        sent = (
            step.token_ids[0],
            step.positions[0],
            step.slots,
            step.last_tokens,
            step.contexts,
            step.tables,
        )
        given = (
            packed.token_ids, packed.positions, packed.slots, packed.last_tokens, packed.contexts, packed.block_tables,
        )  # fmt: skip
        for part, values in zip(sent, given, strict=True):
            np.testing.assert_array_equal(part, values)
            assert (part.data_ptr() - sent[0].data_ptr()) % 16 == 0
        sizes.add(len(packed.token_ids) % 2)
        scheduler.finish_step(batch, [0] * int(batch.sampled.sum()), 0.0)
    assert sizes == {0, 1}, "the test must reach what it claims"


@pytest.mark.gpu
@pytest.mark.parametrize("family", DENSE)
def test_no_kernel_is_compiled_once_steps_are_prepared(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that waits for a compiler is felt by all who are served."""
    from triton import knobs

    model = decoder(family, torch.bfloat16, "cuda")
    model.allocate(40)
    model.prepare_steps(8)
    compiled: list[str] = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **told: compiled.append(told["repr"]))
    scheduler, _ = mixed_steps(40)
    while (batch := scheduler.schedule(0.0)) is not None:
        logits = model.forward(scheduler.pack(batch))
        scheduler.finish_step(batch, logits.argmax(-1).tolist(), 0.0)
    assert not compiled


SERVE = """
import torch
from triton import knobs
from runtime.bench.shapes import random_model
from runtime.engine_start import engine_parts
from runtime.request import Request, SamplingParams
from runtime.scheduler import Scheduler

model = random_model("qwen3-0.6b", torch.device("cuda"), torch.bfloat16, 1024)
executor, runner, _ = engine_parts(model, None, STARTED_WITH)
warm, pool, compiled, replayed = executor.warm, executor.pool, [], set()
knobs.runtime.jit_post_compile_hook = lambda **told: compiled.append(told["repr"])
SAMPLED = [
    SamplingParams(1.0), SamplingParams(0.7, 0.9), SamplingParams(1.0, top_k=20),
    SamplingParams(0.5, 0.8, top_k=9, min_p=0.1), SamplingParams(logit_bias=((3, 1.0),)),
    SamplingParams(0.9, 0.9, frequency_penalty=0.5), SamplingParams(),
]

def serve(config):
    global pool
    for num_rows in (1, 2, 3, 5, 9, 17, 33, 70):
        scheduler = Scheduler(pool, config, executor.max_model_len)
        warm.install(config, scheduler)
        for row in range(num_rows):
            asked = SAMPLED[row % len(SAMPLED)] if num_rows > 5 else SamplingParams()
            scheduler.add(Request.of_tokens(str(row), [7] * (1 + 37 * row % 300), 20, 0.0, asked))
        for turn in range(8):  # and pieces beside rows that decode
            if turn in (3, 5):
                scheduler.add(Request.of_tokens(f"late {turn}", [5] * 333, 3, 0.0))
            batch = scheduler.schedule(0.0)
            executed = executor.execute(batch, scheduler.pack(batch), config)
            assert 0 < executed.device_s < 1.1 * executed.forward_s, "by the device's clock and by ours"
            assert executed.graph_rows is None or executed.graph_rows >= batch.num_tokens
            replayed.add(executed.graph_rows)
            scheduler.finish_step(batch, executed.tokens, 0.0)
        for request in list(scheduler.running):
            scheduler.cancel(request.id)
        pool = scheduler.pool
    assert not compiled, compiled

serve(runner.champion)
for change in CHANGES:
    config = runner.champion.patched(change)
    if not {"linear_backend", "max_num_seqs"} & change.keys():
        assert not warm.is_ready(config, True)
        wanted = warm.make_room(warm.missing(config), [runner.champion], True)
        warm.add(wanted, *warm.build(wanted))
    assert warm.is_ready(config, True)
    compiled.clear()
    serve(config)
    assert not executor._model._graphs._refused
assert replayed >= {None, 1, 2, 4, 8, 16, 24, 48, 96}, replayed
"""


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("started_with", "changes"),
    [
        ({}, []),
        ({}, [{"linear_backend": "triton"}, {"linear_backend": "cublas"}]),
        ({}, [{"kv_block": "16"}, {"kv_dtype": "fp8"}, {"weight_format": "int8"}]),
        ({"max_num_seqs": 24}, [{"max_num_seqs": 256}]),
    ],
)
def test_an_engine_compiles_nothing_once_it_serves(
    started_with: dict[str, int], changes: list[dict[str, Any]]
) -> None:
    """In a process of its own, where nobody has compiled anything before: not at first, not over other pools that were
    prepared, and not where more are served at once than at the start."""
    script = SERVE.replace("CHANGES", repr(changes)).replace("STARTED_WITH", repr(started_with))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
def test_other_pools_get_graphs_of_their_own_and_those_that_go_take_theirs_along() -> None:
    model = decoder("qwen3", torch.bfloat16, "cuda")
    model.allocate(40)
    model.prepare_steps(4)
    assert model._graphs is not None
    assert len(model._graphs._graphs) == len([size for size in BUCKETS if size <= 4])
    before = model.pools
    model.pools = model.new_pools(60)
    scheduler, requests = mixed_steps(60)
    while (batch := scheduler.schedule(0.0)) is not None:
        logits = model.forward(scheduler.pack(batch))
        scheduler.finish_step(batch, logits.argmax(-1).tolist(), 0.0)
    assert all(request.finish_reason is not None for request in requests)
    assert {key.pools.identity for key in model._graphs._graphs} == {id(before), id(model.pools)}
    model.forget(before)
    assert {key.pools.identity for key in model._graphs._graphs} == {id(model.pools)}


@pytest.mark.gpu
@torch.inference_mode()
def test_a_capture_that_fails_is_made_again_after_a_run_and_spoils_no_other() -> None:
    model = decoder("qwen3", torch.bfloat16, "cuda")
    model.allocate(40)
    model.prepare_steps(4)
    assert model._graphs is not None
    whole, captures = model._decode, []

    def waits_once(inputs: DecodeInputs, *midway: Any) -> Decoded | Midway:
        if torch.cuda.is_current_stream_capturing():
            captures.append(len(inputs.contexts))
            if len(captures) == 1:
                torch.cuda.synchronize()  # which ends a capture
        return whole(inputs, *midway)

    model._graphs.forget(id(model.pools), None)
    assert model._graphs.prepare(2, model._pools_in(BLOCK_TOKENS), model.weights_key, waits_once)
    assert captures == [2, 2, 1] and not model._graphs._refused
    scheduler, requests = mixed_steps(40)
    plain = decoder("qwen3", torch.bfloat16, "cuda")
    plain._graphs = None
    plain.allocate(40)
    while (batch := scheduler.schedule(0.0)) is not None:
        packed = scheduler.pack(batch)
        logits = model.forward(packed)
        assert relative_error(logits, plain.forward(packed)) < 0.05
        scheduler.finish_step(batch, logits.argmax(-1).tolist(), 0.0)
    assert all(request.finish_reason is not None for request in requests)


@pytest.mark.parametrize("heads", [1, 2])
def test_blocks_that_follow_one_another_are_gathered_as_they_are_copied(heads: int) -> None:
    move = BlockMove(np.array([5, 0, 7], np.int32), np.array([2, 3, 4], np.int32))
    pool = (torch.randn(heads, 128, 8), torch.randn(heads, 128, 4))
    results = []
    for way in (block_gatherer, block_copier, block_rearranger):
        target = (torch.zeros(heads, 96, 8), torch.zeros(heads, 96, 4))
        way(move, BLOCK_TOKENS, torch.device("cpu"))(pool, target)
        results.append(target)
    assert torch.equal(results[0][0][:, 32:48], pool[0][:, 80:96])
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


# -- graphs, with a stand-in for CUDA's that runs what it was given again ----------------------------------------------


class Repeated:
    def __init__(self, run: Callable[[], Decoded | Midway]) -> None:
        self.run, self.out = run, run()

    def replay(self) -> None:
        for kept, new in zip(self.out, self.run(), strict=True):
            kept.copy_(new)


@pytest.fixture
def repeating(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(self: Captures, run: Callable[[], Decoded | Midway]) -> Captured[Any]:
        graphs = run.func.__self__  # type: ignore[attr-defined]
        graphs._drawn_by = None  # unlike CUDA's this one computes
        graphs._blank()
        graph = Repeated(run)
        return Captured(graph, graph.out, (0, 1), 0.0)  # type: ignore[arg-type]

    monkeypatch.setattr(DecodeGraphs, "_warm_up", lambda *_: None)
    monkeypatch.setattr(Captures, "capture", capture)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)


def with_graphs(model: DecoderModel) -> DecoderModel:
    model._fused = FusedPass(model.decoder, PLAIN, BLOCK_TOKENS, 200, num_sms=4)
    fused = model._fused
    model._graphs = DecodeGraphs(model.device, 13, fused.parts(NUM_PARTS), fused.are_uneven)
    return model


def serve(model: DecoderModel, depth: int) -> tuple[list[list[int]], int]:
    """Greedily, with so many steps under way while the next is launched. Tokens, and how many steps were replayed."""
    scheduler, requests = mixed_steps(40)
    model.allocate(40)
    num_replayed = 0
    for _, packed in steps_ahead(model, scheduler, depth):
        num_replayed += model._graphs is not None and model._graphs.takes(packed)
    return [request.output_ids.tolist() for request in requests], num_replayed


def steps_ahead(
    model: DecoderModel, scheduler: Scheduler, depth: int
) -> Iterator[tuple[Batch, PackedBatch]]:
    """Each step when it was launched; so many are under way when the next one is."""
    under_way: list[tuple[Batch, Tensor]] = []
    while (batch := scheduler.schedule(0.0)) is not None or under_way:
        if batch is not None:
            packed = scheduler.pack(batch)
            logits = model.forward(packed)
            yield batch, packed
            drawn = torch.empty(2, 0, dtype=torch.int64)
            if batch.sampled.any():
                drawn = draw(logits, batch.sampled_requests()) if model.greedy is None else model.greedy
            model.drawn = drawn[0]
            scheduler.advance(batch)
            under_way.append((batch, drawn.clone()))  # as it is read from the device before the next replay
        while len(under_way) > (depth if batch is not None else 0):
            done, drawn = under_way.pop(0)
            scheduler.settle(done, [token or 0 for token in tokens_of(drawn)], 0.0)


@pytest.mark.parametrize("family", ["qwen2_window", "qwen3", "mixtral", *DEEPSEEK])
@pytest.mark.parametrize("depth", [0, 1])
def test_replayed_steps_give_the_same_tokens_also_one_ahead(repeating: None, family: str, depth: int) -> None:
    expected, _ = serve(decoder(family), 0)
    tokens, num_replayed = serve(with_graphs(decoder(family)), depth)
    assert tokens == expected and num_replayed > 5


def test_each_backend_of_linear_layers_has_graphs_of_its_own(repeating: None) -> None:
    """And goes back to those that there were. On a CPU nothing is timed, so all of them multiply alike."""
    expected, _ = serve(decoder("qwen3"), 0)
    model = with_graphs(decoder("qwen3"))
    assert model._graphs is not None and model._fused is not None
    captured = []
    for backend in ("auto", "triton", "auto"):
        model.use_backend(backend)
        assert model._fused.linears.backend == backend
        scheduler, requests = mixed_steps(40)
        if not model.pools:
            model.allocate(40)
        while (batch := scheduler.schedule(0.0)) is not None:
            logits = model.forward(scheduler.pack(batch))
            scheduler.finish_step(batch, sample(logits, batch.drawing_requests()), 0.0)  # type: ignore[arg-type]
        assert [request.output_ids.tolist() for request in requests] == expected
        captured.append({key.backend for key in model._graphs._graphs})
    sizes = [len({key for key in model._graphs._graphs if key.backend == one}) for one in ("auto", "triton")]
    assert captured == [{"auto"}, {"auto", "triton"}, {"auto", "triton"}] and sizes[0] == sizes[1] > 0


@pytest.mark.parametrize("family", ["qwen2_window", "qwen3"])
def test_rows_with_drafts_are_replayed_too_and_give_the_same_tokens(repeating: None, family: str) -> None:
    """Beside the decoder's own pass over the very same steps, and beside a text without drafts."""
    model, plain = with_graphs(repeating_decoder(family)), repeating_decoder(family)
    scheduler, requests = mixed_steps(40, output_tokens=60, speculation_length=6)
    model.allocate(40)
    plain.allocate(40)
    num_replayed = 0
    while (batch := scheduler.schedule(0.0)) is not None:
        packed = scheduler.pack(batch)
        assert model._graphs is not None
        num_replayed += batch.num_drafted > 0 and model._graphs.takes(packed)
        logits = plain.forward(packed)
        torch.testing.assert_close(model.forward(packed), logits, rtol=1e-9, atol=1e-9)
        scheduler.finish_step(batch, [token or 0 for token in sample(logits, batch.drawing_requests())], 0.0)
    assert num_replayed > 5 and scheduler.num_right_tokens > 20, "the test must reach what it claims"
    scheduler, others = mixed_steps(40, output_tokens=60)
    while (batch := scheduler.schedule(0.0)) is not None:
        scheduler.finish_step(batch, plain.forward(scheduler.pack(batch)).argmax(-1).tolist(), 0.0)
    assert [one.output_ids.tolist() for one in requests] == [one.output_ids.tolist() for one in others]


def test_steps_that_cannot_be_captured_are_launched_and_tried_once(
    monkeypatch: pytest.MonkeyPatch, repeating: None, caplog: pytest.LogCaptureFixture
) -> None:
    tries: list[Key] = []

    def fail(self: DecodeGraphs, key: Key, run: Run) -> Captured[Decoded]:
        tries.append(key)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DecodeGraphs, "_capture", fail)
    expected, _ = serve(decoder("qwen3"), 0)
    model = with_graphs(decoder("qwen3"))
    assert serve(model, 1)[0] == expected
    assert tries and len(tries) == len(set(tries)) and "are not captured" in caplog.text
    model.forget(model.pools)
    assert model._graphs is not None and not model._graphs._refused


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("family", ["qwen3", "deepseek_v2"])
def test_sizes_are_captured_by_parts_behind_launches_and_not_right_behind_a_change(
    repeating: None, monkeypatch: pytest.MonkeyPatch, family: str, depth: int
) -> None:
    """Where all that they launch has been launched before."""
    expected, _ = serve(decoder(family), 0)
    model, captured = with_graphs(decoder(family)), []
    graphs, replay = model._graphs, DecodeGraphs.replay
    assert graphs is not None and len(graphs._parts) > 1
    graphs.take_as_awake("auto", BLOCK_TOKENS)
    graphs._launched.update(BUCKETS)

    def parts_of(self: DecodeGraphs) -> dict[int, int]:
        return {key.num_rows: len(parts) for key, parts in (self._begun | self._graphs).items()}

    def counted(self: DecodeGraphs, *given: Any) -> Decoded | None:
        parts = parts_of(self)
        decoded = replay(self, *given)
        assert parts_of(self) == parts, "nobody waits for a capture"
        size = next(size for size in BUCKETS if size >= len(given[0].token_ids))
        assert self.replayed_rows == (size if parts.get(size) == len(self._parts) else None)
        captured.append(sum(parts.values()))
        return decoded

    monkeypatch.setattr(DecodeGraphs, "replay", counted)
    for _ in range(2):  # of other pools each time
        captured.clear()
        assert serve(model, depth)[0] == expected
        assert not any(captured[: PUT_OFF + 1]) and captured[PUT_OFF + 1], "put off, and not for longer"
        assert {after - before for before, after in pairwise(captured)} == {0, 1}, "a part behind each"
        assert len(graphs._graphs) > 1, "the test must reach what it claims"
        assert all(parts[0].out is None for parts in graphs._graphs.values()), "room for others"


def test_uneven_contexts_have_graphs_of_their_own_and_share_them_out_among_more_programs(
    repeating: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime.kernels.splits, "UNEVEN_FROM", 60)
    monkeypatch.setattr(runtime.kernels.splits, "IDLE_TOKENS", 0)
    expected, _ = serve(decoder("qwen3"), 0)
    model, used = with_graphs(decoder("qwen3")), set()
    assert model._fused is not None and model._graphs is not None
    decode = PLAIN.paged_decode

    def noting(query: Tensor, *given: Any) -> Tensor:
        used.add((len(query), given[-1]))
        return decode(query, *given)

    model._fused.kernels = PLAIN._replace(paged_decode=noting)
    assert serve(model, 1)[0] == expected
    assert {key.are_uneven for key in model._graphs._graphs} == {False, True}
    assert (8, 4) in used and {splits for rows, splits in used if rows > 2} == {1, 4}


@pytest.mark.parametrize("has_room", [False, True])
def test_steps_of_uneven_contexts_replay_the_graph_for_even_ones_until_theirs_is_captured(
    repeating: None, monkeypatch: pytest.MonkeyPatch, has_room: bool
) -> None:
    """Or for good, where there is no room for it or the capture fails."""
    monkeypatch.setattr(runtime.kernels.splits, "UNEVEN_FROM", 60)
    monkeypatch.setattr(runtime.kernels.splits, "IDLE_TOKENS", 0)
    monkeypatch.setattr(Captures, "has_spare_room", lambda self: has_room)
    expected, _ = serve(decoder("qwen3"), 0)
    model = with_graphs(decoder("qwen3"))
    graphs = model._graphs
    assert graphs is not None
    graphs._launched.update(BUCKETS)
    model.allocate(40)
    assert graphs.prepare(8, model._pools_in(BLOCK_TOKENS), model.weights_key, model._decode)
    capture, fails = Captures.capture, False

    def may_fail(self: Captures, run: Any) -> Captured[Any]:
        if fails:
            raise RuntimeError("the capture was invalidated")
        return capture(self, run)

    monkeypatch.setattr(Captures, "capture", may_fail)
    for fails in (False, True):
        scheduler, requests = mixed_steps(40)
        for _, packed in steps_ahead(model, scheduler, 1):
            assert model.graph_rows is not None or not graphs.takes(packed)
        assert [request.output_ids.tolist() for request in requests] == expected
        uneven = [len(parts) for key, parts in graphs._graphs.items() if key.are_uneven]
        assert set(uneven) == ({len(graphs._parts)} if has_room and not fails else set())
        assert bool(graphs._refused) == (fails or not has_room) and all(key.are_uneven for key in graphs._refused)
        for key in [key for key in graphs._graphs if key.are_uneven]:
            del graphs._graphs[key]


def test_where_a_part_cannot_be_captured_the_whole_step_is(
    repeating: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    expected, _ = serve(decoder("qwen3"), 0)
    model, capture, let_go = with_graphs(decoder("qwen3")), Captures.capture, []
    graphs = model._graphs
    assert graphs is not None
    graphs.take_as_awake("auto", BLOCK_TOKENS)
    graphs._launched.update(BUCKETS)

    def fails(self: Captures, run: Any) -> Captured[Any]:
        if run.args[2:] and run.args[2].start:
            raise RuntimeError("the capture was invalidated")
        return capture(self, run)

    monkeypatch.setattr(Captures, "capture", fails)
    monkeypatch.setattr(Captures, "let_go", lambda self, some: let_go.extend(some))
    assert serve(model, 1)[0] == expected
    assert graphs._graphs and all(len(parts) == 1 for parts in graphs._graphs.values())
    assert len(let_go) == len(graphs._graphs) and "not captured by parts" in caplog.text
    others = [one for parts in (*graphs._graphs.values(), *graphs._begun.values()) for one in parts]
    let_go.clear()
    model.forget(model.pools)
    assert {id(one) for one in let_go} == {id(one) for one in others} and not graphs._graphs and not graphs._begun


def test_what_is_prepared_finds_the_steps_captured_that_were_met_last(
    repeating: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = serve(decoder("qwen3"), 0)
    model = with_graphs(decoder("qwen3"))
    graphs, capture, fails = model._graphs, DecodeGraphs._capture, set(BUCKETS)
    assert graphs is not None and serve(model, 0)[0] == expected
    graphs._launched.update(BUCKETS)
    (last, *earlier), first, others = list(graphs._met), model.pools, model.new_pools(40)
    assert earlier and not model.capture_ahead(others, "auto", BLOCK_TOKENS, "float64", "auto"), "not awake"
    graphs.take_as_awake("auto", BLOCK_TOKENS)
    captured: list[int] = []

    def counted(self: DecodeGraphs, key: Key, run: Run) -> Captured[Decoded]:
        captured.append(key.num_rows)
        if key.num_rows in fails:
            raise RuntimeError("the capture was invalidated")
        return capture(self, key, run)

    def served_by_parts() -> set[int]:
        keys = graphs._begun.keys() | {key for key, parts in graphs._graphs.items() if len(parts) > 1}
        return {key.num_rows for key in keys}

    monkeypatch.setattr(DecodeGraphs, "_capture", counted)
    scheduler, _ = mixed_steps(40)
    for _ in steps_ahead(model, scheduler, 0):  # which go on to meet what fails
        model.capture_ahead(others, "auto", BLOCK_TOKENS, "float64", "auto")
        assert model.pools is first
    assert sorted(captured) == sorted([last, *earlier]), "once each"
    model.forget(weights_key="float64")
    captured.clear()
    fails -= set(earlier)
    while model.capture_ahead(others, "auto", BLOCK_TOKENS, "float64", "auto"):
        pass
    assert sorted(captured) == sorted([last, *earlier])
    captured.clear()
    fails.clear()
    scheduler, requests = mixed_steps(40)
    model.pools = others
    for _ in steps_ahead(model, scheduler, 0):
        pass
    assert [one.output_ids.tolist() for one in requests] == expected
    assert not captured and served_by_parts() == {last}, "one that failed is left to the steps"


def over_other_blocks(
    model: DecoderModel, scheduler: Scheduler, requests: list[Request], num_blocks: int
) -> list[list[int]]:
    """Tokens, greedily, while the pool is cut into blocks of 32, 16 and 64 in turn."""
    model.allocate(num_blocks)
    sizes = [64, 16, 32]
    for step in count():
        if step % 6 == 5 and sizes:
            move = scheduler.move_to(scheduler.pool.resized(num_blocks * 16, sizes.pop()), stays=True)
            copy = block_rearranger(move.move, move.block_tokens, model.device)
            for pool in model.pools.values():
                copy(pool, pool)
        if (batch := scheduler.schedule(0.0)) is None:
            break
        logits = model.forward(scheduler.pack(batch))
        scheduler.finish_step(batch, logits.argmax(-1).tolist(), 0.0)
    assert not sizes, "the test must reach what it claims"
    return [request.output_ids.tolist() for request in requests]


@torch.inference_mode()
def test_blocks_of_another_size_get_graphs_of_their_own(repeating: None) -> None:
    model = with_graphs(decoder("qwen3"))
    outputs = [over_other_blocks(one, *mixed_steps(64), 64) for one in (decoder("qwen3"), model)]
    assert outputs[0] == outputs[1]
    assert model._graphs is not None and {key.pools.block_tokens for key in model._graphs._graphs} >= {
        32,
        16,
        64,
    }


class Recorded:
    """A stand-in for CUDA's graph that notes what it is asked, and fails as often as it is told to."""

    fails = 0
    begun: ClassVar[list[object]] = []

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        self.begun.append(pool)

    def capture_end(self) -> None:
        if Recorded.fails:
            Recorded.fails -= 1
            raise RuntimeError("the capture was invalidated")


def test_a_step_is_run_before_it_is_captured_only_where_it_may_be_new_or_a_capture_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended: list[object] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", ((0, number) for number in count()).__next__)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda index, pool: ended.append(pool), raising=False)
    monkeypatch.setattr(Recorded, "begun", [])
    model = with_graphs(decoder("qwen3"))
    graphs = model._graphs
    assert graphs is not None
    graphs.captures.stream = SimpleNamespace(wait_stream=lambda other: None)  # type: ignore[assignment]
    runs: list[int] = []

    def run(inputs: DecodeInputs, *midway: Any) -> Decoded | Midway:
        runs.append(len(inputs.contexts))
        return model._decode(inputs, *midway)

    model.allocate(40)
    assert graphs.prepare(4, model._pools_in(16), "float64", run)
    assert runs == [size for size in (4, 2, 1) for _ in range(WARM_UPS + 1)]
    runs.clear()
    first = model.pools
    model.pools = model.new_pools(60)
    assert graphs.prepare(8, model._pools_in(16), "float64", run)
    assert runs == [8] * (WARM_UPS + 1) + [4, 2, 1], "of eight rows nothing was ever launched"
    assert set(Recorded.begun) == {(0, 0)} and len(graphs._graphs) == 7
    runs.clear()
    model.pools, Recorded.fails = model.new_pools(50), 2  # also when it is ended for good
    assert graphs.prepare(2, model._pools_in(16), "float64", run)
    assert runs == [2] * (WARM_UPS + 2) + [1] and not graphs._refused
    assert ended == [(0, 0)] * 2 and Recorded.begun[-3:] == [(0, 0), (0, 1), (0, 1)]
    graphs.forget(id(model.pools), None)
    assert graphs.captures.memory == (0, 1), "a step that replays one may be under way"
    for _ in range(STEPS_UNDER_WAY):
        graphs.captures.end_step()
    assert graphs.captures.memory == (0, 1)
    graphs.captures.end_step()
    assert graphs._graphs and graphs.captures.memory is None, "none of those left lies in the last pool"
    graphs.forget(id(first), None)
    assert {key.pools.identity for key in graphs._graphs} != {id(first)}


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_other_pools_are_woken_by_all_that_steps_launch_over_them_beside_those_that_serve(
    repeating: None, kv_dtype: str
) -> None:
    dtype = (
        torch.bfloat16 if kv_dtype == "auto" else torch.float32
    )  # pieces of rounded ones are attended to on a GPU
    model, launched = with_graphs(decoder("qwen2_window", dtype)), set()

    def noting(name: str) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            constants = given[7:] if name == "paged_prefill" else given  # the row it begins with is none
            launched.add((name, *(one for one in constants if isinstance(one, int | None))))
            return getattr(PLAIN, name)(*given)

        return call

    assert model._fused is not None and model._graphs is not None
    over_cache = [name for name in PLAIN._fields if name.startswith(("paged_", "rope_and_cache"))]
    model._fused.kernels = PLAIN._replace(**{name: noting(name) for name in over_cache})
    model.allocate(40)
    before = model._caches
    assert not model.is_awake(kv_dtype, 32)
    model.wake(kv_dtype, 32)
    assert model.is_awake(kv_dtype, 32) and model._caches is before
    assert model._fused._block_tokens == BLOCK_TOKENS, "of the steps that go on meanwhile"
    woken, launched = launched, set()
    model.kv_dtype = kv_dtype
    model.allocate(80)
    scheduler, _ = mixed_steps(40, 32)
    while (batch := scheduler.schedule(0.0)) is not None:
        logits = model.forward(scheduler.pack(batch))
        scheduler.finish_step(batch, logits.argmax(-1).tolist(), 0.0)
    assert {"paged_decode" if kv_dtype == "auto" else "paged_decode_fp8"} < {name for name, *_ in launched}
    assert launched <= woken
