"""Teacher-forced scores: equal to transformers', the same however serving goes on, and no disturbance of it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.errors import InvalidRequest
from runtime.knobs import EngineConfig
from runtime.link import Frame
from runtime.scoring import (
    BUSY_SHARE,
    MAX_PIECE_TOKENS,
    MAX_SEQUENCES,
    MAX_TOKENS,
    MAX_WAITING,
    Scored,
    Scorer,
    checked_sequences,
    pieces_of,
)
from tests.runtime.test_engine import PROMPT, InProcess, submission, tokens_of
from tests.runtime.tiny_models import VOCAB, save_tiny_model, tiny_model

TEXTS = [[5, 9, 30, 12, 7, 44, 81, 3, 60, 21] * 4, [8, 8], list(range(2, 70))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model("qwen2", tmp_path / "tiny")


def score_call(call: int = 1, sequences: Any = TEXTS, **args: Any) -> Frame:
    return {
        "op": "control",
        "call": call,
        "name": "score",
        "args": {"values": {}, "sequences": sequences, **args},
    }


def reply_of(frames: list[Frame], call: int = 1) -> Frame:
    (reply,) = [frame for frame in frames if frame["op"] == "reply" and frame["call"] == call]
    return reply


def value_of(here: InProcess, call: int = 1) -> dict[str, Any]:
    while here.engine.score():
        pass
    value: dict[str, Any] = reply_of(here.frames, call)["value"]
    return value


def test_scores_are_those_of_transformers_however_the_text_is_cut(folder: Path) -> None:
    here = InProcess(folder)
    reference = tiny_model("qwen2", torch.float32).double()
    for call, piece_tokens in enumerate((1, 7, 16, MAX_PIECE_TOKENS), start=1):
        here.engine.control(score_call(call, piece_tokens=piece_tokens))
        scored = value_of(here, call)
        for text, nll, top1 in zip(TEXTS, scored["nll"], scored["top1"], strict=True):
            with torch.inference_mode():
                logits = reference(torch.tensor([text]), use_cache=False).logits[0, :-1]
            expected = torch.nn.functional.cross_entropy(logits, torch.tensor(text[1:]), reduction="none")
            assert nll == pytest.approx(expected.tolist(), abs=1e-5)
            assert top1 == logits.argmax(-1).tolist()


def test_scoring_beside_live_streams_changes_no_token_and_no_score(folder: Path) -> None:
    alone = InProcess(folder)
    for name in ("a", "b"):
        alone.engine.submit(submission(name, max_tokens=40))
    alone.run()
    quiet = InProcess(folder)
    quiet.engine.control(score_call(piece_tokens=8))
    scored_alone = value_of(quiet)

    here = InProcess(folder)
    here.engine.scorer._due_at = -math.inf  # every step is followed by a piece, however short the pauses
    for name in ("a", "b"):
        here.engine.submit(submission(name, max_tokens=40))
    here.engine.control(score_call(piece_tokens=8))
    num_pieces_between = 0
    while here.engine.step():
        here.engine.scorer._due_at = -math.inf
        num_pieces_between += here.engine.score()
    assert num_pieces_between == value_of(here)["num_pieces"] == len(pieces_of([40, 2, 68], 8))
    for name in ("a", "b"):
        assert tokens_of(here.frames, name) == tokens_of(alone.frames, name)
    scored = value_of(here)
    assert (scored["nll"], scored["top1"]) == (scored_alone["nll"], scored_alone["top1"])


class TickingExecutor:
    """Counts its pieces; each takes a second of the timer that it owns."""

    vocab_size, max_model_len = VOCAB, 64

    def __init__(self) -> None:
        self.now = 0.0
        self.pieces: list[int] = []
        self.error: Exception | None = None

    def score_area(self, num_blocks: int, config: EngineConfig) -> str:
        return "area"

    def score(self, packed: Any, targets: Any, area: Any, config: EngineConfig) -> Scored:
        self.now += 1.0
        self.pieces.append(len(targets))
        if self.error is not None:
            raise self.error
        return Scored([0.5] * len(targets), [1] * len(targets))


@pytest.fixture
def ticking() -> tuple[TickingExecutor, Scorer, list[Frame]]:
    executor, frames = TickingExecutor(), []
    return executor, Scorer(executor, frames.append, lambda: executor.now), frames


def args(sequences: Any = ((3,) * 40,), **more: Any) -> dict[str, Any]:
    return {"sequences": [list(sequence) for sequence in sequences], **more}


def test_a_request_waits_for_one_piece_and_serving_keeps_nine_tenths_of_the_time(
    ticking: tuple[TickingExecutor, Scorer, list[Frame]],
) -> None:
    executor, scorer, frames = ticking
    scorer.add(1, args(piece_tokens=10), EngineConfig())
    steps = 0
    while scorer.has_work:
        computed = scorer.step(is_busy=True)
        assert len(executor.pieces) <= 1 + steps * BUSY_SHARE / (1 - BUSY_SHARE) + 1e-9
        if not computed:
            executor.now += 1.0  # a step of serving
            steps += 1
    assert executor.pieces == [10, 10, 10, 9] and steps >= 3 * 9
    assert frames[0]["value"]["longest_piece_s"] == 1.0


def test_an_idle_engine_scores_without_pause(ticking: tuple[TickingExecutor, Scorer, list[Frame]]) -> None:
    executor, scorer, _ = ticking
    scorer.add(1, args(piece_tokens=10), EngineConfig())
    assert [scorer.step(is_busy=False) for _ in range(5)] == [True] * 4 + [False]
    assert scorer.due_in_s(is_busy=False) is None and executor.now == 4.0


def test_a_piece_that_fails_ends_its_call_alone(ticking: tuple[TickingExecutor, Scorer, list[Frame]]) -> None:
    executor, scorer, frames = ticking
    scorer.add(1, args(), EngineConfig())
    scorer.add(2, args(), EngineConfig())
    executor.error = RuntimeError("CUDA out of memory. Tried to allocate much.\nA long trace.")
    scorer.step(is_busy=False)
    executor.error = None
    while scorer.step(is_busy=False):
        pass
    assert reply_of(frames, 1)["error"] == {
        "kind": "score_failed",
        "message": "RuntimeError: CUDA out of memory. Tried to allocate much.",
    }
    assert reply_of(frames, 2)["value"]["nll"] == [[0.5] * 39]


def test_a_call_past_its_time_ends_with_an_error(
    ticking: tuple[TickingExecutor, Scorer, list[Frame]],
) -> None:
    executor, scorer, frames = ticking
    scorer.add(1, args(piece_tokens=10, limit_s=5), EngineConfig())
    scorer.step(is_busy=False)
    executor.now += 5.0
    scorer.step(is_busy=False)
    assert "not done within 5 s" in reply_of(frames)["error"]["message"] and not scorer.has_work


@pytest.mark.parametrize(
    ("sequences", "rule"),
    [
        ([], "1 to 256 lists"),
        ([[1, 2]] * (MAX_SEQUENCES + 1), "1 to 256 lists"),
        ("text", "list"),
        ([[1, "a"]], "whole numbers"),
        ([[1]], "2 to 64 tokens"),
        ([[1] * 65], "2 to 64 tokens"),
        ([[0, VOCAB]], rf"\[0, {VOCAB - 1}\]"),
        ([[-1, 3]], rf"\[0, {VOCAB - 1}\]"),
    ],
)
def test_refuses_sequences_over_a_limit_with_the_rule(sequences: Any, rule: str) -> None:
    with pytest.raises(InvalidRequest, match=rule):
        checked_sequences(sequences, VOCAB, max_model_len=64)


def test_refuses_too_many_tokens_together_and_too_many_calls(
    ticking: tuple[TickingExecutor, Scorer, list[Frame]],
) -> None:
    _, scorer, _ = ticking
    with pytest.raises(InvalidRequest, match=str(MAX_TOKENS)):
        checked_sequences([[1] * 4096] * 9, VOCAB, max_model_len=8192)
    with pytest.raises(InvalidRequest, match="piece_tokens"):
        scorer.add(1, args(piece_tokens=MAX_PIECE_TOKENS + 1), EngineConfig())
    for call in range(MAX_WAITING):
        scorer.add(call, args(), EngineConfig())
    with pytest.raises(InvalidRequest, match="may wait"):
        scorer.add(9, args(), EngineConfig())


def test_output_that_is_no_number_is_told_as_none(folder: Path) -> None:
    def spoil(model: torch.nn.Module) -> None:
        model.lm_head.weight[7] = math.nan

    here = InProcess(folder, spoil)
    here.engine.control(score_call(sequences=[PROMPT]))
    scored = value_of(here)
    assert scored["nll"] == [[None] * 6] and scored["top1"] == [[None] * 6]


def test_an_engine_with_only_a_text_to_score_does_not_sleep(folder: Path) -> None:
    here = InProcess(folder)
    here.engine.send_gauge_if_due()
    assert here.engine.idle_s() > 0.1
    here.engine.control(score_call())
    assert here.engine.idle_s() == 0.0
