"""Drafts: what is guessed, and that no answer depends on it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.batch import Batch
from runtime.executor import servable
from runtime.knobs import EngineConfig
from runtime.kv_cache import BlockPool
from runtime.request import Request, SamplingParams
from runtime.sampling import sample
from runtime.scheduler import Scheduler
from runtime.speculate import (
    FIRST_REST_TOKENS,
    MAX_DRAFT_TOKENS,
    MAX_NGRAM,
    MAX_REST_TOKENS,
    MIN_NGRAM,
    Lookup,
    foresees_draft,
    right_of,
    write_draft,
)
from tests.runtime.test_engine import InProcess, ends_of, submission, tokens_of
from tests.runtime.tiny_models import VOCAB, repeating_model, save_repeating_model

Text = list[int]


def ids(text: Sequence[int]) -> np.ndarray:
    return np.array(text, np.int32)


def plain_draft(text: Text, most: int) -> Text:
    """The specification: a scan for the longest end of the text that stood before, the last such place, and on from
    there, through the draft itself."""
    for length in range(MAX_NGRAM, MIN_NGRAM - 1, -1):
        for end in range(len(text) - 2, length - 2, -1):
            if len(text) > length and text[end + 1 - length : end + 1] == text[-length:]:
                going = list(text)
                for place in range(most):
                    going.append(going[end + 1 + place])
                return going[len(text) :]
    return []


# -- the draft ----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, MAX_DRAFT_TOKENS), st.data())
def test_a_draft_is_what_a_scan_finds_however_often_it_was_asked_for_before(
    text: Text, most: int, data: st.DataObject
) -> None:
    lookup = Lookup()
    for length in sorted(data.draw(st.sets(st.integers(1, len(text)))) | {len(text)}):
        found = lookup.draft(ids(text), length, most).tolist()
        assert found == plain_draft(text[:length], most)


def test_a_text_of_one_period_is_drafted_whole() -> None:
    assert Lookup().draft(ids([5, 6, 5, 6, 5]), 5, 6).tolist() == [6, 5, 6, 5, 6, 5]


def test_what_stood_there_last_and_longest_is_taken() -> None:
    text = [1, 2, 3, 9, 8, 2, 3, 7, 1, 2, 3]
    assert Lookup().draft(ids(text), len(text), 1).tolist() == [9], "three tokens tell more than two"
    assert Lookup().draft(ids([2, 3, 9, 2, 3, 7, 2, 3]), 8, 1).tolist() == [7]
    assert not len(Lookup().draft(ids([1, 2, 3, 4]), 4, 8))


def test_wrong_drafts_are_made_rarely_and_right_ones_long_again() -> None:
    lookup, text = Lookup(), ids([7, 8] * 100)
    known, rests = 10, []
    for _ in range(8):
        assert len(lookup.draft(text, known, MAX_DRAFT_TOKENS))
        lookup.told(8, 0, known)
        rest = next(more for more in range(100) if len(lookup.draft(text, known + more, 8)))
        rests.append(rest)
        known += rest
    assert rests[:2] == [FIRST_REST_TOKENS, 2 * FIRST_REST_TOKENS] and rests[-1] == MAX_REST_TOKENS
    widths = []
    for _ in range(5):
        widths.append(len(lookup.draft(text, known, MAX_DRAFT_TOKENS)))
        lookup.told(widths[-1], widths[-1], known)
    assert widths == [1, 2, 4, 8, 8]
    lookup.told(8, 2, known)
    assert len(lookup.draft(text, known, MAX_DRAFT_TOKENS)) == 3


def test_a_token_foreseen_wrongly_counts_as_a_failed_draft() -> None:
    for token, may_draft in ((8, True), (9, False)):
        lookup, text = Lookup(), ids([7, 8, 7, 8, 7, token, 7, 8, 7])
        assert lookup.foresees(text, 5)  # an 8
        assert bool(len(lookup.draft(text, 6, 4))) == may_draft
        if token == 9:
            assert len(lookup.draft(text, 6 + FIRST_REST_TOKENS + 1, 4))


@pytest.mark.parametrize(
    ("drawn", "taken"),
    [
        ([4, 5, 6, 7], [4, 5, 6, 7]), ([4, 5, 9, 7], [4, 5, 9]), ([9, 5, 6, 7], [9]), ([None, 5, 6, 7], [None]),
        ([4, None, 6, 7], [4, None]), ([4, 5, 6, None], [4, 5, 6, None]),
    ],
)  # fmt: skip
def test_tokens_count_up_to_the_first_that_is_another(drawn: Any, taken: Any) -> None:
    assert right_of(drawn, ids([4, 5, 6]), frozenset()) == taken
    assert right_of([4, 5, 6, 7], ids([4, 5, 6]), frozenset({5})) == [4, 5]


def test_nothing_is_drafted_before_the_first_token_nor_beyond_the_last() -> None:
    request = Request.of_tokens("a", [1, 2] * 8, 3, 0.0)
    assert write_draft(request, 8) == 0 and not foresees_draft(request)
    request.append(1, 0.0)
    assert foresees_draft(request)
    assert write_draft(request, 8) == 1, "of two tokens that are left, the last is drawn behind the draft"
    assert request.num_tokens == 17 and request.token_ids is not None and request.token_ids[17] == 2
    assert write_draft(Request.of_lengths("b", 5, 5, 0.0), 8) == 0


# -- the scheduler, with a text instead of a model -----------------------------------------------------------------


def scheduler(num_blocks: int = 64, block_tokens: int = 4, **knobs: object) -> Scheduler:
    return Scheduler(BlockPool(num_blocks, block_tokens), EngineConfig.of(knobs), 128)


def next_token(text: Sequence[int]) -> int:
    """What a text goes on with: often what it had before."""
    return int((3 * text[-1] + text[-2] + (len(text) % 11 == 0)) % 5)


def drawn_by(batch: Batch) -> list[int]:
    """What a model would draw that goes on with `next_token`, drafts or not."""
    found = []
    for request, num in zip(batch.sampled_requests(), batch.num_drawn.tolist(), strict=True):
        assert request.token_ids is not None
        known = request.num_tokens
        found += [next_token(request.token_ids[: known + place].tolist()) for place in range(num)]
    return found


def expected(prompt: Text, num: int) -> Text:
    text = list(prompt)
    for _ in range(num):
        text.append(next_token(text))
    return text[len(prompt) :]


def test_a_row_with_a_draft_has_logits_at_each_of_its_tokens_and_comes_behind_single_ones() -> None:
    s = scheduler(speculation_length=3)
    repeats = Request.of_tokens("repeats", [1, 2, 1, 2, 1, 2], 20, 0.0)
    other = Request.of_tokens("other", [9, 8, 7], 20, 0.0)
    for request in (repeats, other):
        s.add(request)
    s.finish_step(s.schedule(0.0), [1, 5], 0.0)  # type: ignore[arg-type]
    batch = s.schedule(0.0)
    assert batch is not None and [one.id for one in batch.requests] == ["other", "repeats"]
    assert batch.drafted is not None and batch.drafted.tolist() == [0, 3] and batch.num_drafted == 3
    assert (batch.num_decode, batch.num_prefill_rows, batch.num_prefill_tokens) == (2, 0, 3)
    packed = s.pack(batch)
    assert packed.token_ids.tolist() == [5, 1, 2, 1, 2] and packed.positions.tolist() == [3, 6, 7, 8, 9]
    assert packed.last_tokens.tolist() == [0, 1, 2, 3, 4] and packed.contexts.tolist() == [4, 10]
    finished = s.finish_step(batch, [6, 2, 1, 4, 2], 0.0)
    assert finished == [] and other.output_ids.tolist() == [5, 6]
    assert repeats.output_ids.tolist() == [1, 2, 1, 4], "the third of the draft is another"
    assert (s.num_drafted_tokens, s.num_right_tokens) == (3, 2)
    batch = s.schedule(0.0)
    assert batch is not None
    starts = dict(zip([one.id for one in batch.requests], batch.starts.tolist(), strict=True))
    assert starts == {"other": 4, "repeats": 9}, "what was computed of the wrong token is written over"


def test_a_stop_token_within_a_draft_ends_the_request_there() -> None:
    s = scheduler(speculation_length=4)
    request = Request.of_tokens("a", [1, 2, 3, 1, 2, 3], 20, 0.0, stop_token_ids=[3])
    s.add(request)
    s.finish_step(s.schedule(0.0), [1], 0.0)  # type: ignore[arg-type]
    batch = s.schedule(0.0)
    assert batch is not None and batch.num_drafted == 4
    assert s.finish_step(batch, [2, 3, 1, 2, 3], 0.0) == [request]
    assert request.output_ids.tolist() == [1, 2, 3] and request.finish_reason == "stop"
    assert s.pool.num_held == 0 and s.num_right_tokens == 1


def test_nothing_is_drafted_with_more_running_requests_than_said_nor_past_the_budget() -> None:
    for knobs, drafted in (
        ({}, 12), ({"speculation_max_seqs": 3}, 12), ({"speculation_max_seqs": 2}, 0), ({"max_batched_tokens": 16}, 12),
        ({"speculation_length": 8, "max_batched_tokens": 16}, 13), ({"speculation_length": 0}, 0),
    ):  # fmt: skip
        s = scheduler(**{"speculation_length": 4, **knobs})
        for name in "abc":
            s.add(Request.of_tokens(name, [1, 2, 1, 2], 20, 0.0))
        s.finish_step(s.schedule(0.0), [1, 1, 1], 0.0)  # type: ignore[arg-type]
        batch = s.schedule(0.0)
        assert batch is not None and batch.num_drafted == drafted, knobs
        assert batch.num_tokens <= s.config.max_batched_tokens


def test_a_draft_takes_no_block_that_others_need() -> None:
    s = scheduler(num_blocks=4, speculation_length=8)  # of 4 tokens
    for name in "ab":
        s.add(Request.of_tokens(name, [1, 2, 1, 2], 12, 0.0))
    s.finish_step(s.schedule(0.0), [1, 1], 0.0)  # type: ignore[arg-type]
    batch = s.schedule(0.0)
    assert batch is not None and s.num_preemptions == 0
    assert batch.num_drafted == 6, "three tokens each, within the block that the next token needs anyway"


@pytest.mark.parametrize("pending", [False, True])
def test_steps_overlap_as_long_as_no_draft_is_to_be_expected(pending: bool) -> None:
    for prompt, overlaps in (([1, 2, 3, 4], True), ([1, 2, 1, 2, 1, 2], False)):
        s = scheduler(speculation_length=4)
        s.add(Request.of_tokens("a", prompt, 20, 0.0))
        s.finish_step(s.schedule(0.0), [1], 0.0)  # type: ignore[arg-type]
        if pending:
            s.advance(s.schedule(0.0))  # type: ignore[arg-type]
        assert s.may_overlap == overlaps


def test_what_a_draft_says_of_a_token_under_way_is_held_to_it() -> None:
    for token, drafted in ((2, 4), (9, 0)):  # both have been drawn after a 1
        s = scheduler()
        s.add(Request.of_tokens("a", [1, 9, 8, 2, 1, 2, 1, 2], 20, 0.0))
        s.finish_step(s.schedule(0.0), [1], 0.0)  # type: ignore[arg-type]
        under_way = s.schedule(0.0)
        assert under_way is not None
        s.advance(under_way)
        s.config = s.config.patched({"speculation_length": 4})
        assert not s.may_overlap, "a 2 is foreseen, and more behind it"
        s.settle(under_way, [token], 0.0)
        batch = s.schedule(0.0)
        assert batch is not None and batch.num_drafted == drafted


KNOBS = st.fixed_dictionaries(
    {
        "max_num_seqs": st.integers(1, 8), "max_batched_tokens": st.integers(16, 64),
        "prefill_chunk": st.integers(16, 40), "prefix_cache": st.just("on"),
        "speculation_length": st.integers(0, 8), "speculation_max_seqs": st.integers(1, 8),
        "kv_watermark": st.sampled_from([0.0, 0.3]),
    }
)  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(
    data=st.data(), num_blocks=st.integers(20, 60), wants_runs=st.booleans(),
    lengths=st.lists(st.tuples(st.integers(2, 30), st.integers(1, 30)), min_size=1, max_size=12),
)  # fmt: skip
def test_every_request_gets_its_text_whatever_is_drafted(
    data: st.DataObject, num_blocks: int, wants_runs: bool, lengths: list[tuple[int, int]]
) -> None:
    s = Scheduler(BlockPool(num_blocks, 4, wants_runs), EngineConfig.of({"prefix_cache": "on"}), 64)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    requests = [
        Request.of_tokens(str(at), rng.integers(0, 5, prompt).tolist(), output, 0.0)
        for at, (prompt, output) in enumerate(lengths)
    ]
    prompts = [request.token_ids[: request.prompt_tokens].tolist() for request in requests]  # type: ignore[index]
    to_come = list(requests)
    for step in range(5000):
        if step < 40:
            s.config = EngineConfig.of(data.draw(KNOBS))
            num_arriving = len(to_come) if step == 39 else data.draw(st.integers(0, 3))
            for request in to_come[:num_arriving]:
                s.add(request)
            del to_come[:num_arriving]
        batch = s.schedule(0.0)
        s.pool.check_integrity([s._seats.blocks_of(request.seat) for request in s.running])  # type: ignore[arg-type]
        if batch is None:
            if step >= 40:
                break
            continue
        assert 0 < batch.num_tokens <= s.config.max_batched_tokens
        capacities = s._seats.num_blocks[batch.seats] * 4
        assert (batch.contexts <= capacities).all()
        assert len(s.pack(batch).last_tokens) == batch.num_drawn.sum()
        s.finish_step(batch, drawn_by(batch), 0.0)
    assert s.pool.num_held == 0 and not s.has_requests
    for request, prompt in zip(requests, prompts, strict=True):
        assert request.output_ids.tolist() == expected(prompt, request.max_tokens)
    assert s.num_right_tokens <= s.num_drafted_tokens


# -- with a model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["qwen2", "mistral"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_repeating_model(request.param, tmp_path_factory.mktemp("model") / "tiny")


def asked(num: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Requests whose texts repeat, greedy and drawn, with all that changes logits from token to token."""
    shapes: list[dict[str, Any]] = [
        {}, {"num_logprobs": 2}, {"temperature": 0.3}, {"temperature": 0.4, "top_p": 0.9, "num_logprobs": 0},
        {"temperature": 0.3, "frequency_penalty": 0.05, "top_k": 20}, {"repetition_penalty": 1.02},
        {"min_tokens": 9}, {"presence_penalty": 0.1}, {"num_prompt_logprobs": 1},
    ]  # fmt: skip
    frames = []
    for at in range(num):
        piece = rng.integers(2, VOCAB, rng.integers(2, 6)).tolist()
        sampling = {**shapes[at % len(shapes)], "seed": at}
        stops = rng.integers(2, VOCAB, 2).tolist()
        frames.append(
            submission(str(at), piece * int(rng.integers(2, 8)), int(rng.integers(2, 90)), sampling=sampling,
                       stop_token_ids=stops)
        )  # fmt: skip
    return frames


def told(frames: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """By request, tokens with their ends and logprobs, the latter rounded."""
    found: dict[str, list[Any]] = {}
    for frame in frames:
        for id, token, end, _, _, *logprobs in frame["items"] if frame["op"] == "tokens" else ():
            rounded = [(round(one.logprob, 6), [token for token, _ in one.top]) for one in logprobs]
            found.setdefault(id, []).append((token, end, rounded))
    return found


@pytest.mark.parametrize("family", ["deepseek_v3", "gemma2", "gpt_oss"])
def test_rows_with_drafts_are_computed_in_every_form_of_attention(family: str) -> None:
    """Latents, soft caps, sinks and windows: those that the engine's tests above do not have."""
    model = servable(repeating_model(family))
    texts = []
    for length in (0, 6):
        s = Scheduler(BlockPool(64), EngineConfig.of({"speculation_length": length}), 200)
        model.allocate(64)
        requests = [Request.of_tokens(str(at), [5 + at, 9, 30, 12] * 3, 90, 0.0) for at in range(8)]
        for request in requests:
            s.add(request)
        while (batch := s.schedule(0.0)) is not None:
            drawn = sample(model.forward(s.pack(batch)), batch.drawing_requests())
            s.finish_step(batch, [token or 0 for token in drawn], 0.0)
        texts.append([request.output_ids.tolist() for request in requests])
    assert texts[1] == texts[0] and s.num_right_tokens > 5


def at_once(frame: dict[str, Any]) -> set[str]:
    """Requests that got several tokens in one step."""
    named = [item[0] for item in frame["items"]]
    return {id for id in named if named.count(id) > 1}


@pytest.mark.parametrize("knobs", [{}, {"overlap_depth": 1}, {"max_num_seqs": 4, "prefill_chunk": 16}])
def test_answers_are_those_without_drafts(folder: Path, knobs: dict[str, Any]) -> None:
    load = asked(45, np.random.default_rng(3))
    answers, counts = [], []
    for length in (0, 6):
        here = InProcess(folder, pool_tokens=768, speculation_length=length, speculation_max_seqs=64, **knobs)
        for frame in load:
            here.engine.submit(frame)
        here.run()
        answers.append(told(here.frames))
        scheduler = here.engine.scheduler
        counts.append((scheduler.num_drafted_tokens, scheduler.num_right_tokens))
        assert scheduler.pool.num_held == 0 and len(ends_of(here.frames)) == len(load)
        records = [frame["record"] for frame in here.frames if frame["op"] == "step"]
        assert sum(record["num_drafted"] for record in records) == scheduler.num_drafted_tokens
        assert sum(record["num_right"] for record in records) == scheduler.num_right_tokens
    assert answers[1] == answers[0]
    assert counts[0] == (0, 0) and counts[1][1] > 100, "the test must reach what it claims"
    several = {id for frame in here.frames if frame["op"] == "tokens" for id in at_once(frame)}
    kinds = {tuple(frame["sampling"])[:-1] for frame in load if frame["id"] in several}
    assert len(kinds) == len({tuple(frame["sampling"]) for frame in load}), "right drafts of each kind"


def test_a_number_that_is_none_within_a_draft_fails_its_request_only_when_it_is_reached(folder: Path) -> None:
    here = InProcess(folder, speculation_length=4)
    prompt = [5, 9, 30] * 6
    here.engine.submit(submission("a", prompt, 4))
    here.engine.submit(submission("b", [4, 8, 40] * 6, 4))
    here.engine.step()
    land = here.executor.land

    def spoiled(launched: Any) -> Any:
        done = land(launched)
        return done._replace(tokens=[None, *done.tokens[1:]])

    here.executor.land = spoiled  # type: ignore[method-assign]
    here.engine.step()
    here.executor.land = land  # type: ignore[method-assign]
    here.run()
    failed = [frame["id"] for frame in here.frames if frame["op"] == "failed"]
    assert len(failed) == 1 and len(tokens_of(here.frames, "b" if failed == ["a"] else "a")) == 4
    assert here.engine.scheduler.pool.num_held == 0


def test_the_gauge_tells_how_drafts_fare(folder: Path) -> None:
    here = InProcess(folder, speculation_length=8)
    here.engine.submit(submission("a", [5, 9] * 10, 30))
    here.run()
    here.engine.send_gauge_if_due()
    gauge = next(frame for frame in here.frames if frame["op"] == "gauge")
    assert gauge["drafted_tokens_total"] >= gauge["draft_right_tokens_total"] > 0


def test_a_request_knows_only_what_matters_to_the_draw_behind_a_draft() -> None:
    plain = Request.of_tokens("a", [1, 2], 9, 0.0)
    assert plain.ahead(3) is plain
    drawn = Request.of_tokens("b", [1, 2], 9, 0.0, SamplingParams(temperature=1.0))
    assert drawn.ahead(0) is drawn and drawn.ahead(2).num_output_tokens == 2 and drawn.num_output_tokens == 0
