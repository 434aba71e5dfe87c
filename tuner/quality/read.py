"""Reading the canary set through the engine: the part of a quality check that waits, and so runs in a thread."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from runtime.knobs import EngineConfig
from tuner.quality.canary import canary_set
from tuner.quality.comparison import Scores

Tokens = list[list[int]]


class ScoringControl(Protocol):
    """What quality checks need of `runtime.client.Control`."""

    def prepare(self, values: Mapping[str, Any]) -> dict[str, Any]: ...

    def tokenize(self, texts: Sequence[str]) -> dict[str, Any]: ...

    def score(
        self, values: Mapping[str, Any], sequences: Sequence[Sequence[int]], piece_tokens: int | None = None
    ) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Read:
    """What a job brought home; seconds of the whole job and of the longest piece between two steps."""

    token_ids: list[list[int]]
    scores: Scores
    timings: dict[str, float]


def read_canary(
    control: ScoringControl, config: EngineConfig, token_ids: Tokens | None, piece_tokens: int, prepare: bool
) -> Read:
    """Scores the set under a configuration; `token_ids` are those of an earlier read, None at the first.

    Raises:
        RuntimeFault: the engine is away, cannot prepare the configuration, or cannot score it.
    """
    timings: dict[str, float] = {}
    if prepare:
        timings["prepare_s"] = float(control.prepare(config.values())["prepare_s"])
    if token_ids is None:
        tokenized = control.tokenize(canary_set().passages)["token_ids"]
        token_ids = [list(ids) for ids in tokenized if len(ids) > 1]
    told = control.score(config.values(), token_ids, piece_tokens)
    timings |= {name: told[name] for name in ("elapsed_s", "busy_s", "longest_piece_s") if name in told}
    return Read(token_ids, Scores(told["nll"], told["top1"]), timings)


def in_thread(work: Callable[[], Read]) -> "Future[Read]":
    """A daemon thread: an engine that never answers must not keep the process from ending."""
    future: Future[Read] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="quality", daemon=True).start()
    return future
