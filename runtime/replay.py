"""Serves recorded arrivals on paper: the real scheduler, a virtual clock, and a step model for the seconds.

    arrivals ──advance(until)──▶ Scheduler.schedule ──▶ StepModel.step_s ──▶ Scheduler.finish_step ──▶ finished
                                      ▲─────────────── clock += step ────────────────┘

The backlog is kept between calls, so a long history can be replayed as it becomes known. Only lengths
matter: a request ends after the output tokens that it really had.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from runtime.batch import Batch
from runtime.knobs import EngineConfig
from runtime.kv_cache import BlockPool
from runtime.request import Request
from runtime.scheduler import Scheduler
from runtime.step_model import StepModel


class Arrival(NamedTuple):
    """A request as recorded: its instant (epoch seconds, or any clock used throughout) and its lengths."""

    id: str
    arrived_at: float
    prompt_tokens: int
    output_tokens: int


class Decoding(NamedTuple):
    """A request in the middle of its answer: at least one and not all of its output tokens are done."""

    arrival: Arrival
    num_done: int


class ReplayedRequest(NamedTuple):
    id: str
    arrived_at: float
    first_token_at: float
    finished_at: float


class Replay:
    """One engine on paper. `finished` grows in order of finishing; `take_finished` empties it.

    Not replayed: refusals at the door (a request that was refused never became an arrival) and clients that
    hung up (they count as finished after the tokens they got).
    """

    def __init__(
        self,
        config: EngineConfig,
        step_model: StepModel,
        kv_blocks: int,
        block_tokens: int,
        max_model_len: int,
    ) -> None:
        self.scheduler = Scheduler(
            BlockPool(kv_blocks, block_tokens),
            config,
            max_model_len,
            attention_cost=step_model.attention_cost,
        )
        self.step_model = step_model
        self.now = float("-inf")  # the engine idles since ever, until something arrives
        self.busy_s = 0.0  # seconds spent in steps
        self.num_steps = 0
        self.finished: list[ReplayedRequest] = []
        self._arrivals: deque[Arrival] = deque()

    @property
    def backlog(self) -> int:
        """Requests that have arrived and are not finished."""
        return len(self.scheduler.waiting) + len(self.scheduler.running)

    def resume(self, at: float, decoding: Sequence[Decoding], waiting: Iterable[Arrival]) -> None:
        """Starts from an engine that is not empty: at instant `at` it held `decoding` and queued `waiting`.

        Only before the first `advance`. Each decoding request's cache is rebuilt at once and at no cost; should
        rounding leave the pool too small for all of them, the last ones wait in front of the queue. What a
        half-computed prompt had got done is forgotten: it belongs to `waiting`.
        """
        self.now = at
        admit_all = {
            "max_num_seqs": 1024,
            "max_batched_tokens": 32768,
            "prefill_chunk": 16384,
            "batch_wait_ms": 0.0,
            "long_prompt_threshold": 1_048_576,
            "kv_watermark": 0.0,
            "mixed_step_tokens": 32768,
        }
        config, self.scheduler.config = self.scheduler.config, self.scheduler.config.patched(admit_all)
        for arrival, num_done in decoding:
            # Known up to the last token but one; the free step below computes that prefix and draws the last.
            known = arrival.prompt_tokens + num_done - 1
            left = arrival.output_tokens - num_done + 1
            self.scheduler.add(Request.of_lengths(arrival.id, known, left, arrival.arrived_at))
        batch = self.scheduler.schedule(at) if decoding else None
        if batch is not None:
            self._note(self.scheduler.finish_step(batch, None, at))
        self.scheduler.config = config
        self._arrivals.extend(sorted(waiting, key=lambda arrival: arrival.arrived_at))

    def advance(self, arrivals: Iterable[Arrival], until: float) -> None:
        """Takes every arrival before `until` that was not given yet, and runs the steps that start before it.

        The last step may end after `until`. Advancing in pieces gives what one call over all of them gives.

        Raises:
            InvalidRequest: an arrival that the engine could never serve.
        """
        self._arrivals.extend(sorted(arrivals, key=lambda arrival: arrival.arrived_at))
        while self.now < until:
            self._admit_arrived()
            batch = self.scheduler.schedule(self.now) if self.scheduler.has_requests else None
            if batch is not None:
                self._run(batch)
                continue
            wake = self._next_wake()
            if wake is None or wake >= until:
                return
            self.now = wake

    def take_finished(self) -> list[ReplayedRequest]:
        finished, self.finished = self.finished, []
        return finished

    def step_s(self, batch: Batch) -> float:
        """Seconds that the step starting at `now` takes."""
        num_seqs = len(batch.requests)
        return self.step_model.step_s(batch.num_tokens, batch.context_tokens, batch.attention_pairs, num_seqs)

    def _admit_arrived(self) -> None:
        while self._arrivals and self._arrivals[0].arrived_at <= self.now:
            arrival = self._arrivals.popleft()
            self.scheduler.add(
                Request.of_lengths(
                    arrival.id, arrival.prompt_tokens, arrival.output_tokens, arrival.arrived_at
                )
            )

    def _run(self, batch: Batch) -> None:
        seconds = self.step_s(batch)
        self.busy_s += seconds
        self.num_steps += 1
        self.now += seconds
        self._note(self.scheduler.finish_step(batch, None, self.now))

    def _note(self, requests: Iterable[Request]) -> None:
        for request in requests:
            assert request.first_token_at is not None and request.finished_at is not None
            self.finished.append(
                ReplayedRequest(request.id, request.arrived_at, request.first_token_at, request.finished_at)
            )

    def _next_wake(self) -> float | None:
        """When there may be work: the next arrival, or the end of a hold (`batch_wait_ms`)."""
        wakes = [self.scheduler.next_wake(self.now), self._arrivals[0].arrived_at if self._arrivals else None]
        return min((wake for wake in wakes if wake is not None), default=None)
