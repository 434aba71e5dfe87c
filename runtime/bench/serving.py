"""The serving engine in this process: requests go in as frames by the clock, and what it sends is noted.

It is the engine itself, step for step, with the frames that it would encode; what is missing is the socket and the
front end behind it.
"""

import contextlib
import gc
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from runtime.bench.arrivals import Arrival, Draw, Wish
from runtime.clock import Clock
from runtime.engine import Engine
from runtime.engine_start import engine_parts
from runtime.errors import RuntimeFault
from runtime.knobs import EngineConfig, KnobValue
from runtime.link import Frame, encode
from runtime.loader import LoadedModel

IDLE_S = 0.0002  # an engine that waits for the next arrival looks at the clock so often


@dataclass
class Answer:
    """What became of one request. `told_at`: the instants at which tokens came, on the engine's clock; tokens that came
    together count as one instant."""

    arrived_at: float
    wanted: int
    told_at: list[float] = field(default_factory=list)
    num_tokens: int = 0
    finish_reason: str | None = None

    @property
    def is_whole(self) -> bool:
        return self.finish_reason == "length" and self.num_tokens == self.wanted

    @property
    def ttft_s(self) -> float:
        return self.told_at[0] - self.arrived_at

    @property
    def tpot_s(self) -> float:
        return (self.told_at[-1] - self.told_at[0]) / max(1, self.num_tokens - 1)

    def gaps_s(self, since: float = float("-inf"), until: float = float("inf")) -> list[float]:
        """Between two instants of telling, of which the later one is in (since, until]."""
        pairs = zip(self.told_at, self.told_at[1:], strict=False)
        return [later - earlier for earlier, later in pairs if since < later <= until]


class StepEnd(NamedTuple):
    """`seconds`: since the step before ended, or since this one began after a rest: what lies between two counts."""

    at: float
    seconds: float


class Serving:
    """An engine that serves, and what it told."""

    def __init__(self, loaded: LoadedModel, knobs: Mapping[str, Any], kv_tokens: int | None = None) -> None:
        self.executor, self.runner, self.reports = engine_parts(loaded, kv_tokens, dict(knobs))
        self.clock = Clock.started_now()
        self.engine = Engine(self.executor, self.runner, self.clock, self._take)
        self.vocab_size: int = loaded.identity["vocab_size"]
        self.answers: dict[str, Answer] = {}
        self.steps: list[StepEnd] = []
        self.records: list[dict[str, Any]] = []  # of the same steps, as the step log has them
        self.num_failed = 0
        self._why_failed = ""
        self._draw: Draw | None = None  # what follows a request that has ended
        self._num_followers = 0
        self._replies: dict[int, Frame] = {}
        self._num_calls = self._num_submitted = 0
        self._busy_since: float | None = None

    @property
    def config(self) -> EngineConfig:
        return self.engine.tick.config

    def submit(self, wish: Wish, arrived_at: float | None = None) -> str:
        """Returns the request's id. `arrived_at`: by the engine's clock, now if not given.

        Raises:
            RuntimeError: the engine refused it.
        """
        self._num_submitted += 1
        id = str(self._num_submitted)
        arrived_at = self.clock.now() if arrived_at is None else arrived_at
        self.answers[id] = Answer(arrived_at, wish.output_tokens)
        num_failed = self.num_failed
        self.engine.submit({
            "op": "submit", "id": id, "token_ids": wish.token_ids, "max_tokens": wish.output_tokens, "sampling": {},
            "stop_token_ids": [], "ignore_eos": True, "arrived_at": arrived_at,
        })  # fmt: skip
        if self.num_failed > num_failed:
            raise RuntimeError(f"A request of the benchmark was refused: {self._why_failed}")
        return id

    def step(self) -> bool:
        """One turn of the engine's loop. False if there was nothing to compute."""
        if self._draw is not None:
            for _ in range(self._num_followers):
                self.submit(self._draw())
            self._num_followers = 0
        if self._busy_since is None:
            self._busy_since = self.clock.now()
        if not self.engine.step():
            self._busy_since = None
            return False
        self.engine.send_gauge_if_due()
        return True

    def ask(self, name: str, args: Mapping[str, Any]) -> int:
        """Makes a control call; `reply` has the answer once steps have brought it."""
        self._num_calls += 1
        self.engine.control({"op": "control", "call": self._num_calls, "name": name, "args": dict(args)})
        return self._num_calls

    def reply(self, call: int) -> dict[str, Any] | None:
        """None while it is not there.

        Raises:
            RuntimeFault: the call was refused, with its reason.
        """
        frame = self._replies.pop(call, None)
        if frame is None:
            return None
        if "error" in frame:
            raise RuntimeFault(frame["error"]["message"])
        value: dict[str, Any] = frame["value"]
        return value

    def reconfigure(self, patch: Mapping[str, KnobValue]) -> dict[str, Any]:
        """Goes on serving until the patch is in force. Returns the engine's answer."""
        call = self.ask("reconfigure", {"patch": dict(patch)})
        while (value := self.reply(call)) is None:
            if not self.step():
                time.sleep(IDLE_S)
        return value

    def play(self, arrivals: Sequence[Arrival]) -> list[Answer]:
        """Serves requests as they arrive, until all have ended. Returns their answers in the order given."""
        waiting, ids, began = deque(arrivals), [], self.clock.now()
        while waiting or self.engine.scheduler.has_requests:
            while waiting and began + waiting[0].at_s <= self.clock.now():
                arrival = waiting.popleft()
                ids.append(self.submit(arrival.wish, began + arrival.at_s))
            if not self.step():
                time.sleep(IDLE_S)
        return [self.answers[id] for id in ids]

    def keep_busy(self, draw: Draw, num_at_once: int) -> None:
        """From now on each request that ends is followed by another one; so many begin. `drain` ends that."""
        self._draw, self._num_followers = draw, 0
        for _ in range(num_at_once):
            self.submit(draw())

    def drain(self) -> None:
        """Nobody follows any more; serves those who are there to their end."""
        self._draw, self._num_followers = None, 0
        while self.engine.scheduler.has_requests or self.step():
            self.step()

    def cancel(self, ids: Sequence[str]) -> None:
        for id in ids:
            if self.engine.scheduler.cancel(id):
                self.answers[id].finish_reason = "cancelled"

    def forget(self) -> None:
        """Of requests and steps that are over."""
        self.answers = {id: one for id, one in self.answers.items() if one.finish_reason is None}
        self.steps.clear()
        self.records.clear()

    def _take(self, frame: Frame) -> None:
        encode(frame)  # as it would be sent: the engine's step pays for it
        match frame["op"]:
            case "tokens":
                self._take_tokens(frame)
            case "step":
                now = self.clock.now()
                began = self.steps[-1].at if self.steps else now
                if self._busy_since is not None:
                    began = max(began, self._busy_since)
                self.steps.append(StepEnd(now, now - began))
                self.records.append(frame["record"])
            case "failed":
                self.num_failed += 1
                self._why_failed = str(frame["message"])
            case "reply":
                self._replies[frame["call"]] = frame

    def _take_tokens(self, frame: Frame) -> None:
        at = frame["at"]
        for id, _, finish_reason, *_ in frame["items"]:
            answer = self.answers[id]
            answer.num_tokens += 1
            if not answer.told_at or answer.told_at[-1] != at:
                answer.told_at.append(at)
            if finish_reason is not None:
                answer.finish_reason = finish_reason
                self._num_followers += 1


@contextlib.contextmanager
def quiet_collector() -> Iterator[None]:
    """As in the engine's process: what is there already is not walked again by each collection of garbage."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def percentile_ms(seconds: Sequence[float], percent: float) -> float | None:
    """None of nothing."""
    return 1e3 * float(np.percentile(seconds, percent)) if len(seconds) else None
