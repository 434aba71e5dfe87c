"""The pass that a GPU takes, beside the decoder's own: with plain kernels here, with Triton's and graphs on a GPU."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import runtime.fused_pass
from runtime.attention import Pieces, StepTensors, allowed_positions, attend_plain
from runtime.decode_graph import BUCKETS, Captured, Decoded, DecodeGraphs, Key, Run
from runtime.decoder_model import DecoderModel
from runtime.fused_pass import DecodeInputs, FusedPass
from runtime.hf_model import HFModel
from runtime.kernels import PLAIN
from runtime.kernels.linear_table import TIMED_ROWS, Choice, LinearShape
from runtime.knobs import EngineConfig
from runtime.kv_cache import BLOCK_TOKENS, BlockPool
from runtime.paged_model import relative_error
from runtime.request import Request
from runtime.sampling import draw, sample, tokens_of
from runtime.scheduler import Batch, PackedBatch, Scheduler
from tests.runtime.tiny_models import VOCAB, repeating_model, tiny_model

FAMILIES = ("llama", "mistral", "qwen2", "qwen2_window", "qwen3")


def decoder(family: str, dtype: torch.dtype = torch.float64, device: str = "cpu") -> DecoderModel:
    return DecoderModel(HFModel(tiny_model(family, dtype).to(device)), max_model_len=200)


def repeating(family: str, dtype: torch.dtype = torch.float64, device: str = "cpu") -> DecoderModel:
    return DecoderModel(HFModel(repeating_model(family, dtype).to(device)), max_model_len=200)


def mixed_steps(num_blocks: int, output_tokens: int = 12, **knobs: Any) -> tuple[Scheduler, list[Request]]:
    """A scheduler with requests of all lengths, for a pool that shares blocks and so scatters them."""
    rng = np.random.default_rng(0)
    asked = [rng.integers(2, VOCAB, length).tolist() for length in (1, 5, 17, 40, 33, 70, 9)]
    config = EngineConfig.of({"max_batched_tokens": 40, "prefill_chunk": 16, **knobs})
    scheduler = Scheduler(BlockPool(num_blocks, wants_runs=False), config, 200)
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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packs_pieces", [False, True])
@pytest.mark.parametrize("in_parts", [False, True])
def test_a_step_gives_the_logits_of_the_decoder_whatever_its_rows(
    family: str, packs_pieces: bool, in_parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime.fused_pass, "attend_pieces", written_out)
    model = decoder(family)
    fused = FusedPass(model.decoder, PLAIN, BLOCK_TOKENS, 200, num_sms=4)
    if in_parts:
        layer = model.decoder.layers[0]
        uses = {"whole": layer.attention.qkv, "gated": layer.mlp.gate_up, "parts": layer.attention.out}
        fused.linears.choices = {
            LinearShape(use, *one.weight.shape, rows, torch.float64): Choice(1.0, 9.0)
            for use, one in (*uses.items(), ("parts", layer.mlp.down))
            for rows in TIMED_ROWS
        }
    scheduler, _ = mixed_steps(40)
    model.allocate(40)
    pools = model.new_pools(40)
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
            torch.testing.assert_close(fused.forward(step, caches), expected, rtol=1e-9, atol=1e-9)
        tokens = expected.argmax(-1).tolist()
        scheduler.finish_step(batch, tokens, 0.0)
    assert num_mixed > 0 and (num_behind > 0) == packs_pieces, "the test must reach what it claims"


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


@torch.inference_mode()
def test_padding_rows_change_nothing() -> None:
    model = decoder("qwen3")
    fused = FusedPass(model.decoder, PLAIN, BLOCK_TOKENS, 200, num_sms=4)
    scheduler, _ = mixed_steps(40)
    model.allocate(40)
    num_compared = 0
    while (batch := scheduler.schedule(0.0)) is not None:
        packed = scheduler.pack(batch)
        if batch.num_prefill_rows == 0:
            caches = model._caches_of(model.pools)
            before = [cache.rows.clone() for cache in caches]
            padded = fused.decode(inputs_of(packed, 10, 13), caches)
            after = [cache.rows.clone() for cache in caches]
            for cache, rows in zip(caches, before, strict=True):
                cache.rows.copy_(rows)
            expected = model.forward(packed)
            torch.testing.assert_close(padded[: len(expected)], expected, rtol=1e-9, atol=1e-9)
            for cache, rows in zip(caches, after, strict=True):
                torch.testing.assert_close(cache.rows, rows, rtol=1e-9, atol=1e-9, equal_nan=True)
            num_compared += 1
        else:
            expected = model.forward(packed)
        scheduler.finish_step(batch, expected.argmax(-1).tolist(), 0.0)
    assert num_compared > 3, "the test must reach what it claims"


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_steps_give_the_logits_of_plain_ones(family: str) -> None:
    model, plain = decoder(family, torch.bfloat16, "cuda"), decoder(family, torch.bfloat16, "cuda")
    assert model._fused is not None
    plain._fused = None
    scheduler, _ = mixed_steps(40)
    model.allocate(40)
    plain.allocate(40)
    model.prepare_steps(8)
    errors = []
    while (batch := scheduler.schedule(0.0)) is not None:
        packed = scheduler.pack(batch)
        expected = plain.forward(packed)
        actual = model.forward(packed)
        errors += [relative_error(a, b) for a, b in zip(actual, expected, strict=True)]
        scheduler.finish_step(batch, expected.argmax(-1).tolist(), 0.0)
    assert max(errors) < 0.1 and float(np.median(errors)) < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_steps_with_drafts_give_the_logits_of_plain_ones(family: str) -> None:
    model, plain = repeating(family, torch.bfloat16, "cuda"), repeating(family, torch.bfloat16, "cuda")
    plain._fused = None
    scheduler, _ = mixed_steps(40, 60, speculation_length=6)
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
    assert {key.pools for key in model._graphs._graphs} == {id(before), id(model.pools)}
    model.forget(before)
    assert {key.pools for key in model._graphs._graphs} == {id(model.pools)}


# -- graphs, with a stand-in for CUDA's that runs what it was given again ----------------------------------------------


class Repeated:
    def __init__(self, run: Callable[[], Decoded]) -> None:
        self.run, self.out = run, run()

    def replay(self) -> None:
        for kept, new in zip(self.out, self.run(), strict=True):
            kept.copy_(new)


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(self: DecodeGraphs, key: Key, run: Run) -> Captured:
        self._drawn_by = None
        self._blank()
        graph = Repeated(partial(self._decoded, run, self._inputs(key.num_rows)))
        self._graphs[key] = Captured(graph, graph.out)  # type: ignore[arg-type]
        return self._graphs[key]

    monkeypatch.setattr(DecodeGraphs, "_capture", capture)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)


def with_graphs(model: DecoderModel) -> DecoderModel:
    model._fused = FusedPass(model.decoder, PLAIN, BLOCK_TOKENS, 200, num_sms=4)
    model._graphs = DecodeGraphs(model.device, 13)
    return model


def serve(model: DecoderModel, depth: int) -> tuple[list[list[int]], int]:
    """Greedily, with so many steps under way while the next is launched. Tokens, and how many steps were replayed."""
    scheduler, requests = mixed_steps(40)
    model.allocate(40)
    under_way: list[tuple[Batch, Tensor]] = []
    num_replayed = 0
    while (batch := scheduler.schedule(0.0)) is not None or under_way:
        if batch is not None:
            packed = scheduler.pack(batch)
            num_replayed += model._graphs is not None and model._graphs.takes(packed)
            logits = model.forward(packed)
            drawn = torch.empty(2, 0, dtype=torch.int64)
            if batch.sampled.any():
                drawn = draw(logits, batch.sampled_requests()) if model.greedy is None else model.greedy
            model.drawn = drawn[0]
            scheduler.advance(batch)
            under_way.append((batch, drawn.clone()))  # as it is read from the device before the next replay
        while len(under_way) > (depth if batch is not None else 0):
            done, drawn = under_way.pop(0)
            scheduler.settle(done, [token or 0 for token in tokens_of(drawn)], 0.0)
    return [request.output_ids.tolist() for request in requests], num_replayed


@pytest.mark.parametrize("family", ["qwen2_window", "qwen3"])
@pytest.mark.parametrize("depth", [0, 1])
def test_replayed_steps_give_the_same_tokens_also_one_ahead(replayed: None, family: str, depth: int) -> None:
    expected, _ = serve(decoder(family), 0)
    tokens, num_replayed = serve(with_graphs(decoder(family)), depth)
    assert tokens == expected and num_replayed > 5


@pytest.mark.parametrize("family", ["qwen2_window", "qwen3"])
def test_rows_with_drafts_are_replayed_too_and_give_the_same_tokens(replayed: None, family: str) -> None:
    """Beside the decoder's own pass over the very same steps, and beside a text without drafts."""
    model, plain = with_graphs(repeating(family)), repeating(family)
    scheduler, requests = mixed_steps(40, 60, speculation_length=6)
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
    scheduler, others = mixed_steps(40, 60)
    while (batch := scheduler.schedule(0.0)) is not None:
        scheduler.finish_step(batch, plain.forward(scheduler.pack(batch)).argmax(-1).tolist(), 0.0)
    assert [one.output_ids.tolist() for one in requests] == [one.output_ids.tolist() for one in others]


def test_steps_that_cannot_be_captured_are_launched_and_tried_once(
    monkeypatch: pytest.MonkeyPatch, replayed: None, caplog: pytest.LogCaptureFixture
) -> None:
    tries: list[Key] = []

    def fail(self: DecodeGraphs, key: Key, run: Run) -> Captured:
        tries.append(key)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DecodeGraphs, "_capture", fail)
    expected, _ = serve(decoder("qwen3"), 0)
    model = with_graphs(decoder("qwen3"))
    assert serve(model, 1)[0] == expected
    assert tries and len(tries) == len(set(tries)) and "are not captured" in caplog.text
    model.forget(model.pools)
    assert model._graphs is not None and not model._graphs._refused
