"""Steps with pieces of prompts as graphs, beside the same steps kernel by kernel. Fixtures: `test_fused_pass`."""

from collections.abc import Callable, Iterator
from itertools import count, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import runtime.kernels.splits
import runtime.mixed_graph
from runtime.batch import PackedBatch
from runtime.captures import NUM_PARTS, Captured, Captures, Met
from runtime.decode_graph import DecodeGraphs
from runtime.decoder_model import DecoderModel
from runtime.fused_pass import FusedPass
from runtime.kernels import PLAIN
from runtime.kernels.splits import LONG_CONTEXT
from runtime.knobs import EngineConfig
from runtime.kv_cache import BLOCK_TOKENS, BlockPool
from runtime.mixed_graph import (
    MOST_PIECES,
    ROWS_APART,
    Key,
    MixedGraphs,
    most_pieces_of,
    num_tiles_of,
    padded_rows,
    padded_tokens,
)
from runtime.paged_model import KVPools, relative_error
from runtime.request import Request, SamplingParams
from runtime.scheduler import Scheduler
from tests.runtime.test_fused_pass import (
    DENSE,
    EXACT,
    decoder,
    over_other_blocks,
    repeating_decoder,
    steps_ahead,
    three_of,
)
from tests.runtime.tiny_models import VOCAB

MOST_TOKENS = 192
NUM_BLOCKS = 400


class Repeated:
    """A stand-in for CUDA's graph that runs what it was given again."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.replay = run  # not yet: a capture computes nothing


@pytest.fixture(autouse=True)
def repeating(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") is not None:
        return

    monkeypatch.setattr(Captures, "_recorded", lambda self, run, memory: (Repeated(run), None))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", ((0, number) for number in count()).__next__)
    monkeypatch.setattr(Captures, "run_apart", lambda self, run, times: run())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)


def with_graphs(model: DecoderModel, most_tokens: int = MOST_TOKENS) -> DecoderModel:
    """Of prompts alone: rows that decode are launched one by one, so that what is compared is theirs."""
    model._fused = FusedPass(model.decoder, PLAIN, BLOCK_TOKENS, 200, num_sms=4)
    parts = model._fused.parts(NUM_PARTS)
    model._graphs = DecodeGraphs(model.device, 13, parts, model._fused.are_uneven)
    model._graphs.takes = lambda packed: False  # type: ignore[method-assign]
    table = model.decoder.embedding
    model._mixed_graphs = MixedGraphs(
        model.device, most_tokens, 13, table.shape[1], table.dtype, parts, model._fused.are_uneven
    )
    return model


def graphs_of(model: DecoderModel) -> MixedGraphs:
    assert model._mixed_graphs is not None
    return model._mixed_graphs


def captured_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of the steps that are captured from now on, one each time."""
    sizes: list[int] = []
    capture = Captures.capture

    def noting(captures: Captures, run: Callable[[], Any]) -> Captured[Any]:
        sizes.append(run.args[1].num_tokens)  # type: ignore[attr-defined]
        return capture(captures, run)

    monkeypatch.setattr(Captures, "capture", noting)
    return sizes


def steps(block_tokens: int = BLOCK_TOKENS, **knobs: Any) -> tuple[Scheduler, list[Request]]:
    """Prompts of all lengths, of which some come when others have begun to decode, in pieces."""
    rng = np.random.default_rng(0)
    config = EngineConfig.of({"max_batched_tokens": 150, "prefill_chunk": 64, "max_num_seqs": 24, **knobs})
    scheduler = Scheduler(BlockPool(NUM_BLOCKS, block_tokens, wants_runs=False), config, 200)
    requests = [
        Request.of_tokens(str(at), rng.integers(2, VOCAB, int(length)).tolist(), 12, 0.0)
        for at, length in enumerate(rng.integers(1, 180, 48))
    ]
    for request in requests:
        scheduler.add(request)
    return scheduler, requests


def serve(
    model: DecoderModel, depth: int, pools: KVPools | None = None, **knobs: Any
) -> tuple[list[list[int]], list[int | None]]:
    """Greedily, with so many steps under way while the next is launched, over pools that are made if not given. Tokens,
    and by step with prompts those of the graph that was replayed."""
    scheduler, requests = steps(**knobs)
    if pools is None:
        model.allocate(NUM_BLOCKS)
    else:
        model.pools = pools
    replayed: list[int | None] = []
    for batch, _ in steps_ahead(model, scheduler, depth):
        if batch.num_prefill_rows:
            replayed.append(model.graph_rows)
            assert model.graph_rows is None or model.graph_rows >= batch.num_tokens
    return [request.output_ids.tolist() for request in requests], replayed


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("depth", [0, 1])
def test_replayed_steps_with_prompts_give_the_same_tokens_also_one_ahead(family: str, depth: int) -> None:
    expected, _ = serve(decoder(family), 0)
    model = with_graphs(decoder(family))
    tokens, replayed = serve(model, depth)
    assert tokens == expected
    assert len(set(replayed)) > 2 and replayed.count(None) < len(replayed) / 2, (
        "the test must reach what it claims"
    )


@pytest.mark.parametrize("asked", [{}, {"num_prompt_logprobs": 0}])
@pytest.mark.parametrize("drafts", [0, 3])
def test_all_logits_that_somebody_wants_are_those_of_the_decoder(asked: dict[str, int], drafts: int) -> None:
    """Of a prompt that is scored, of drafts, and where none are wanted."""
    model, plain = with_graphs(repeating_decoder("qwen3")), repeating_decoder("qwen3")
    scheduler = Scheduler(
        BlockPool(NUM_BLOCKS, wants_runs=False),
        EngineConfig.of(
            {
                "prefill_chunk": 64, "max_batched_tokens": 150, "speculation_length": drafts,
                "speculation_max_seqs": 64,
            }
        ),
        200,
    )  # fmt: skip
    requests = [
        Request.of_tokens(
            str(at), [3 + at % 4, 4, 5, 9] * (38 if at == 0 else 3 + 7 * at % 40), 30, 0.0,
            SamplingParams(num_prompt_logprobs=asked.get("num_prompt_logprobs") if at % 8 == 1 else None),
        )
        for at in range(24)
    ]  # fmt: skip
    scheduler.add(requests[0])  # whose first piece is alone
    for each in (model, plain):
        each.allocate(NUM_BLOCKS)
    wanted, num_replayed = set(), 0
    while (batch := scheduler.schedule(0.0)) is not None:
        for request in requests[1:] if not wanted else ():
            scheduler.add(request)
        packed = scheduler.pack(batch)
        logits = plain.forward(packed)
        torch.testing.assert_close(model.forward(packed), logits, **EXACT)
        if model.graph_rows is not None:
            num_replayed += 1
            wanted |= {"none"} if not len(packed.last_tokens) else set()
            wanted |= {"scored"} if batch.scored is not None else set()
            wanted |= {"drafts"} if batch.num_drafted else set()
        tokens = logits[: len(batch.drawing_requests())].argmax(-1).tolist()
        scheduler.finish_step(batch, tokens, 0.0)
    assert num_replayed > 10, "the test must reach what it claims"
    expected = {"scored"} if asked else set()
    assert wanted == {"none"} | expected | ({"drafts"} if drafts else set())


def test_a_size_is_captured_part_by_part_where_others_wait_meanwhile_and_else_at_once() -> None:
    model = with_graphs(decoder("qwen3"))
    assert model._fused is not None and model._mixed_graphs is not None
    graphs, num_parts = model._mixed_graphs, len(graphs_of(model)._parts)
    _, replayed = serve(model, 0)
    assert num_parts == len(model.decoder.layers) > 1, "as many as there are, at most"
    keys = list(graphs._graphs)
    assert {key.num_tokens for key in keys} <= {64, 128, 192} and len({key.num_apart for key in keys}) > 2
    assert replayed[0] is not None, "no row was decoded beside it"
    beside = [key for key in keys if key.num_apart]
    assert len(beside) <= replayed.count(None) <= num_parts * len(beside)
    assert all(len(graphs._graphs[key]) == num_parts for key in keys if not key.num_apart)


def test_beside_others_one_part_is_captured_while_the_device_computes_those_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last one first, so that the device has what to do meanwhile, and what follows is replayed."""
    model = with_graphs(decoder("qwen3"))
    num_parts = len(graphs_of(model)._parts)
    done: list[str] = []
    capture, computed = Captures.capture, MixedGraphs._computed

    def noting_capture(captures: Captures, run: Callable[[], Any]) -> Captured[Any]:
        done.append("capture")
        return capture(captures, run)

    def noting_computed(self: MixedGraphs, run: Any, key: Key, part: range) -> None:
        done.append(str(self._parts.index(part)))
        computed(self, run, key, part)

    monkeypatch.setattr(Captures, "capture", noting_capture)
    monkeypatch.setattr(MixedGraphs, "_computed", noting_computed)
    orders: dict[bool, set[str]] = {True: set(), False: set()}
    model.allocate(NUM_BLOCKS)
    scheduler, _ = steps()
    while (batch := scheduler.schedule(0.0)) is not None:
        done.clear()
        drawn = model.forward(scheduler.pack(batch)).argmax(-1)
        if batch.num_prefill_rows:
            orders[batch.num_decode > 0].add(" ".join(done))
        scheduler.finish_step(batch, drawn.tolist(), 0.0)
    assert num_parts == 2
    assert orders[True] == {"0 capture 1", "capture 0 1", "0 1"}
    assert orders[False] == {"capture capture capture 0 1", "0 1"}, "at once, and first of all the largest one"


def test_beside_others_the_memory_of_the_largest_step_is_held_by_a_step_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And does not go before the first one is captured in it, however long its size is not met."""
    model = with_graphs(decoder("qwen3"))
    graphs, sizes = graphs_of(model), captured_sizes(monkeypatch)
    model.allocate(NUM_BLOCKS)
    scheduler, _ = steps()
    is_first, has_met_first = False, False
    while (batch := scheduler.schedule(0.0)) is not None:
        are_beside = batch.num_decode > 0 and batch.num_prefill_rows > 0
        is_first, has_met_first = are_beside and not has_met_first, has_met_first or are_beside
        if is_first:
            model.forget(weights_key=model.weights_key)  # as other weights would come
            sizes.clear()
        before, drawn = len(sizes), model.forward(scheduler.pack(batch)).argmax(-1)
        assert not are_beside or len(sizes) - before <= 1, "others wait meanwhile"
        if is_first:
            assert sizes == [MOST_TOKENS] and not graphs._graphs[next(reversed(graphs._graphs))]
            for _ in range(5):
                graphs.captures.end_step()
            assert graphs.captures.memory is not None and len(graphs._held) == 1
        scheduler.finish_step(batch, drawn.tolist(), 0.0)
    assert has_met_first and len(sizes) > 2 and not graphs._held


@pytest.mark.parametrize("has_room", [False, True])
def test_uneven_contexts_have_graphs_of_their_own_if_there_is_room(
    monkeypatch: pytest.MonkeyPatch, has_room: bool
) -> None:
    monkeypatch.setattr(runtime.kernels.splits, "UNEVEN_FROM", 100)
    monkeypatch.setattr(runtime.mixed_graph, "UNEVEN_BESIDE_PROMPTS", 100)
    monkeypatch.setattr(runtime.kernels.splits, "IDLE_TOKENS", 0)
    monkeypatch.setattr(Captures, "has_spare_room", lambda self: has_room)
    expected, _ = serve(decoder("qwen3"), 0)
    model = with_graphs(decoder("qwen3"))
    tokens, replayed = serve(model, 1)
    graphs = graphs_of(model)
    assert tokens == expected and any(replayed)
    whole = {key for key, parts in graphs._graphs.items() if len(parts) == len(graphs._parts)}
    assert {key.are_uneven for key in whole} == ({False, True} if has_room else {False})
    assert bool(graphs._lacked_memory) == (not has_room)
    model.forget()
    scheduler, requests = steps()
    again: list[int | None] = []
    for batch, _ in steps_ahead(model, scheduler, 1):  # the same sizes, which are captured
        if batch.num_prefill_rows and batch.num_decode:
            again.append(model.graph_rows)
    assert [request.output_ids.tolist() for request in requests] == expected and None not in again[20:]


class Failing:
    """Captures that fail as they are told to. `tries`: sizes and first layers, those of other sizes left out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, graphs: MixedGraphs) -> None:
        self.tries: list[tuple[Key, int]] = []
        self.failed_at: dict[Key, list[int]] = {}
        self.error: RuntimeError = RuntimeError("the capture was invalidated")
        self.fails: Callable[[Key, int], bool] = lambda key, number: True
        capture = Captures.capture

        def fail(captures: Captures, run: Callable[[], Any]) -> Captured[Any]:
            key, part = run.args[1:]  # type: ignore[attr-defined]
            is_of_step = key in graphs._graphs
            self.tries += [(key, part.start)] * is_of_step
            if is_of_step and self.fails(key, sum(one == key for one, _ in self.tries)):
                self.failed_at.setdefault(key, []).append(graphs._num_steps)
                raise self.error
            return capture(captures, run)

        monkeypatch.setattr(Captures, "capture", fail)


@pytest.mark.parametrize("always", [False, True])
def test_where_a_capture_fails_the_step_is_run_and_tried_once_more(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, always: bool
) -> None:
    expected, _ = serve(decoder("qwen3"), 0)
    model = with_graphs(decoder("qwen3"))
    graphs = graphs_of(model)
    failing = Failing(monkeypatch, graphs)
    failing.fails = lambda key, number: always or number == 2
    tokens, replayed = serve(model, 1)
    assert tokens == expected
    tried = [sum(one == key for one, _ in failing.tries) for key in {key for key, _ in failing.tries}]
    assert any(replayed) != always and max(tried) == (2 if always else 3)
    assert ("are not captured" in caplog.text) == always == bool(graphs._refused)
    model.forget(model.pools)
    assert not graphs._refused and not graphs._failed and not graphs._graphs
    model.give_back()
    assert graphs.captures.memory is None


def test_where_memory_is_lacking_a_size_is_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.mixed_graph, "RETRY_STEPS", 3)
    expected, _ = serve(decoder("qwen3"), 0)
    model = with_graphs(decoder("qwen3"))
    graphs = graphs_of(model)
    failing = Failing(monkeypatch, graphs)
    failing.error = torch.OutOfMemoryError("CUDA out of memory")
    failing.fails = lambda key, number: graphs._num_steps <= 8
    tokens, replayed = serve(model, 1)
    assert tokens == expected and not graphs._refused and not graphs._failed
    assert not any(replayed[:8]) and any(replayed[8:]), "the test must reach what it claims"
    assert any(len(some) > 1 for some in failing.failed_at.values()), "the test must reach what it claims"
    assert all(later - step >= 3 for some in failing.failed_at.values() for step, later in pairwise(some))


def test_the_largest_step_is_prepared_and_else_the_first_that_is_captured(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By other weights, too, so that smaller ones find its memory."""
    model = with_graphs(decoder("qwen3"))
    graphs, sizes = graphs_of(model), captured_sizes(monkeypatch)
    model.allocate(NUM_BLOCKS)
    assert graphs.prepare(model._pools_in(BLOCK_TOKENS), model.weights_key, model._mixed)
    assert [(key.num_tokens, key.num_apart) for key in graphs._graphs] == [(MOST_TOKENS, MOST_TOKENS)]
    assert sizes == [MOST_TOKENS] * 2
    for name, expected in (
        (model.weights_key, [64, 64]), ("others", [MOST_TOKENS, 64, 64]), ("others", []),
    ):  # fmt: skip
        sizes.clear()
        scheduler = Scheduler(BlockPool(NUM_BLOCKS), EngineConfig.of({}), 200)
        scheduler.add(Request.of_tokens("one", [5] * 30, 1, 0.0))
        batch = scheduler.schedule(0.0)
        assert batch is not None
        model.weights_key = name
        model.forward(scheduler.pack(batch))
        assert sizes == expected
    failing = Failing(monkeypatch, graphs)
    model.weights_key = "third"
    failing.error = torch.OutOfMemoryError("CUDA out of memory")
    assert not graphs.prepare(model._pools_in(BLOCK_TOKENS), "third", model._mixed)
    assert "cannot be captured: CUDA out of memory" in caplog.text
    failing.error = RuntimeError("what else goes wrong is none of the pool's business")
    assert graphs.prepare(model._pools_in(BLOCK_TOKENS), "third", model._mixed)
    assert {key.weights for key in graphs._graphs} == {"float64", "others"}


def test_graphs_go_with_the_pools_and_weights_that_they_read() -> None:
    model = with_graphs(decoder("qwen3"))
    expected, _ = serve(model, 0)
    graphs = model._mixed_graphs
    assert graphs is not None and graphs._graphs
    first = model.pools  # kept, so that no other ones are named so
    assert {key.pools.identity for key in graphs._graphs} == {id(first)}
    tokens, replayed = serve(model, 0)  # which makes pools anew
    assert tokens == expected and any(replayed)
    assert {key.pools.identity for key in graphs._graphs} == {id(model.pools)} != {id(first)}
    model.use_backend("triton")
    scheduler, _ = steps()
    batch = scheduler.schedule(0.0)
    assert batch is not None
    model.forward(scheduler.pack(batch))
    assert {key.backend for key in graphs._graphs} == {"auto", "triton"}
    graphs.forget(None, model.weights_key)
    assert not graphs._graphs and graphs.captures.memory is not None


def test_what_is_prepared_finds_the_sizes_captured_that_were_met_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = with_graphs(decoder("qwen3"))
    expected, replayed = serve(model, 0)
    graphs, first = graphs_of(model), model.pools
    met, num_before = list(graphs._met), len(graphs._graphs)  # the last one first

    def ahead(pools: KVPools, weights: str = "float64") -> int:
        count = 0
        while model.capture_ahead(pools, "auto", BLOCK_TOKENS, weights, "auto"):
            count += 1
        assert model.pools is first and model.kv_dtype == "auto"
        return count

    others = model.new_pools(NUM_BLOCKS)
    assert ahead(others) == len(met) * len(graphs._parts) > 8 and len(graphs._graphs) == num_before + len(met)
    assert ahead(others) == 0, "they are there"
    assert 0 < ahead(first) <= replayed.count(None), "parts that steps had left"
    assert not model.capture_ahead(others, "fp8", BLOCK_TOKENS, "float64", "auto"), "never captured"
    tokens, replayed = serve(model, 0, others)
    assert tokens == expected and None not in replayed

    model.pools = first
    failing = Failing(monkeypatch, graphs)
    assert ahead(others, "int8") - 1 == len(failing.tries) == len(met), "and the largest first of all"
    failing.fails = lambda key, number: number == 2
    model.weights_key = "int8"
    assert serve(model, 0, others)[0] == expected
    assert not graphs._refused, "one that failed is tried anew by steps, once before a run and once behind it"
    graphs.forget(None, "int8")
    assert not graphs._failed_ahead
    model.weights_key, failing.fails = "float64", lambda key, number: False
    graphs._met = Met(2)
    assert serve(model, 0, first)[0] == expected
    assert ahead(others, "int8") == 1 + 2 * len(graphs._parts)
    assert [key[:2] for key in graphs._graphs][-2:] == met[:2]


def test_the_one_that_was_not_replayed_for_longest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_graphs(decoder("qwen3"))
    expected, _ = serve(model, 0)
    assert model._mixed_graphs is not None
    sizes = len(model._mixed_graphs._graphs)
    monkeypatch.setattr(runtime.mixed_graph, "MOST_SIZES", 3)
    model = with_graphs(decoder("qwen3"))
    assert serve(model, 0)[0] == expected and len(graphs_of(model)._graphs) == 3 < sizes
    graphs, pools = graphs_of(with_graphs(decoder("qwen3"))), model._pools_in(BLOCK_TOKENS)
    for size in (64, 128, 192, 64, 256):
        graphs._graphs_of(Key(size, 0, pools, "float64", "auto"))
    assert [key.num_tokens for key in graphs._graphs] == [192, 64, 256]


@torch.inference_mode()
def test_blocks_of_another_size_get_graphs_of_their_own() -> None:
    model = with_graphs(decoder("qwen3"))
    outputs = [over_other_blocks(one, *steps(), NUM_BLOCKS) for one in (decoder("qwen3"), model)]
    assert outputs[0] == outputs[1]
    assert model._mixed_graphs is not None
    assert {key.pools.block_tokens for key in model._mixed_graphs._graphs} >= {16, 32, 64}


def packed_of(new_tokens: list[int], contexts: list[int]) -> PackedBatch:
    starts = np.cumsum([0, *new_tokens])
    zeros = np.zeros(starts[-1], np.int64)
    tables = np.zeros((len(contexts), 4), np.int32)
    return PackedBatch(zeros, zeros, zeros, starts, np.array(contexts), tables, np.zeros(1, np.int64), 16)


@pytest.mark.parametrize(
    ("new_tokens", "contexts", "kv_dtype", "is_taken"),
    [
        ([1, 1, 30], [5, 6, 30], "auto", True),
        ([1, 1, 30], [5, 6, 30], "fp8", False),
        ([1, 1], [5, 6], "auto", False),
        ([30], [LONG_CONTEXT - 1], "auto", True),
        ([30], [LONG_CONTEXT], "auto", False),
        ([1, 30], [9 * LONG_CONTEXT, 30], "auto", True),
        ([MOST_TOKENS], [MOST_TOKENS], "auto", True),
        ([MOST_TOKENS + 1], [MOST_TOKENS + 1], "auto", False),
        ([2] * 4, [2] * 4, "auto", True),
        ([2] * 5, [2] * 5, "auto", False),
        ([*[1] * 60, *[2] * 8], [2] * 68, "auto", True),
    ],
)
def test_steps_that_a_graph_can_compute(
    new_tokens: list[int], contexts: list[int], kv_dtype: str, is_taken: bool
) -> None:
    graphs = MixedGraphs(torch.device("cpu"), MOST_TOKENS, 8, 16, torch.float32, [range(2)], lambda *_: False)
    assert graphs.takes(packed_of(new_tokens, contexts), kv_dtype) == is_taken


def test_every_step_has_room_in_the_graph_of_its_size() -> None:
    for num_tokens in range(1, 9000):
        size = padded_tokens(num_tokens)
        assert num_tokens <= size and padded_tokens(size) == size and (size > 2048 or size < num_tokens + 64)
        pieces = most_pieces_of(size)
        assert 4 <= pieces <= MOST_PIECES
        tiles = (num_tokens - pieces) // 64 + pieces if num_tokens >= pieces else num_tokens
        assert num_tiles_of(size) >= tiles, "all but one of the smallest size"
        for num_apart in (0, 1, 16, 17, 200, 512):
            if num_apart <= num_tokens:
                assert num_apart <= padded_rows(num_apart, num_tokens) <= size
    assert padded_rows(0, 5) == 0 and ROWS_APART[-1] == padded_rows(512, 600)


@pytest.mark.parametrize(
    ("family", "may"),
    [*((family, True) for family in DENSE), ("mixtral", False), ("deepseek_v2_lite", False)],
)
def test_experts_and_latents_are_launched(family: str, may: bool) -> None:
    assert FusedPass(decoder(family).decoder, PLAIN, BLOCK_TOKENS, 200, num_sms=4).may_capture_pieces == may


# -- on a GPU ----------------------------------------------------------------------------------------------------------


def steps_of(*models: DecoderModel, block_tokens: int) -> Iterator[tuple[list[Tensor], int | None]]:
    """The logits of each model, of which the first says what is drawn, and the size of the graph that the second one
    replayed."""
    scheduler, _ = steps(block_tokens)
    for each in models:
        each.allocate(NUM_BLOCKS * block_tokens // BLOCK_TOKENS, block_tokens)
    while (batch := scheduler.schedule(0.0)) is not None:
        packed = scheduler.pack(batch)
        logits = [each.forward(packed).cpu() for each in models]
        if batch.num_prefill_rows:
            yield logits, models[1].graph_rows
        scheduler.finish_step(batch, logits[0].argmax(-1).tolist(), 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("block_tokens", [16, 64, 256])
@pytest.mark.parametrize("family", DENSE)
def test_replayed_steps_with_prompts_are_as_close_to_exact_ones_as_the_decoders_own(
    family: str, block_tokens: int
) -> None:
    exact, model, plain = three_of(family)
    assert model._fused is not None
    model.most_mixed_tokens = MOST_TOKENS
    model.allocate(NUM_BLOCKS * block_tokens // BLOCK_TOKENS, block_tokens)
    assert model.prepare_steps(8, block_tokens)
    graphs = model._mixed_graphs
    assert (graphs is not None) == model._fused.may_capture_pieces
    errors, num_replayed = [], 0
    for (expected, own, other), replayed in steps_of(exact, model, plain, block_tokens=block_tokens):
        num_replayed += replayed is not None
        errors += [
            (relative_error(a, e), relative_error(b, e)) for a, b, e in zip(own, other, expected, strict=True)
        ]
    if graphs is not None:
        assert num_replayed > 10 and not graphs._refused, "the test must reach what it claims"
    for share in (50, 90):
        own_error, plain_error = (float(np.percentile(part, share)) for part in zip(*errors, strict=True))
        assert own_error < 1.5 * plain_error + 0.01


@pytest.mark.gpu
def test_no_kernel_is_compiled_for_them_once_steps_are_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    model = decoder("llama", torch.bfloat16, "cuda")
    model.most_mixed_tokens = MOST_TOKENS
    model.allocate(NUM_BLOCKS)
    model.prepare_steps(24)
    key = Key(MOST_TOKENS, MOST_TOKENS, model._pools_in(BLOCK_TOKENS), model.weights_key, "auto")
    assert list(graphs_of(model)._graphs) == [key] and len(graphs_of(model)._graphs[key]) > 1
    compiled: list[str] = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **told: compiled.append(told["repr"]))
    scheduler, _ = steps()
    while (batch := scheduler.schedule(0.0)) is not None:
        logits = model.forward(scheduler.pack(batch))
        scheduler.finish_step(batch, logits.argmax(-1).tolist(), 0.0)
    assert not compiled and len(graphs_of(model)._graphs) > 3
