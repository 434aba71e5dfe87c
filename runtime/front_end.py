"""Admission and the live requests: from a client's prompt to an engine's queue, and from its tokens back.

One thread, the event loop. A new request goes to one of the engines in force, the one that owes the fewest
tokens, and stays there. Requests wait here while no engine is ready. When an engine dies, its requests without
a token are given to another one with their original arrival, and those with tokens end with an error.
"""

import asyncio
import logging
import math
import uuid
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from runtime.clock import Clock
from runtime.engine_state import EngineState
from runtime.errors import (
    EngineNotReady,
    InvalidRequest,
    QueueFull,
    RequestFailed,
    RequestTimedOut,
    RuntimeFault,
)
from runtime.exchange import Exchange, Finish, Sampling, Wake, error_kind
from runtime.exposition import Meter
from runtime.link import Frame
from runtime.replica import Phase, Replica, least_loaded
from runtime.slice_stats import SliceLedger
from runtime.timings import FinishReason, RecordBuffer

log = logging.getLogger(__name__)

RATE_WINDOW_S = 30.0  # completions younger than this say how fast the queue moves
LONGEST_RETRY_S = 60
UNASKED = 0  # the number of a control call whose answer nobody waits for


@dataclass
class FrontEnd:
    """The clients' requests, and what each of the engines was given of them."""

    clock: Clock
    request_timeout_s: float
    engine: EngineState = field(default_factory=EngineState)
    records: RecordBuffer = field(default_factory=RecordBuffer)
    slices: SliceLedger = field(default_factory=SliceLedger)
    meter: Meter = field(default_factory=Meter)
    live: dict[str, Exchange] = field(default_factory=dict)
    draining: bool = False
    records_read_at: float | None = None  # by a daemon, which drains them again and again
    _num_queued: int = 0  # live without a first token
    _completed_at: deque[float] = field(default_factory=lambda: deque(maxlen=4096))

    # -- the client's side -------------------------------------------------------------------------------

    def open(self, num: int, arrived_at: float, streamed: bool, wake: Wake) -> list[Exchange]:
        """Admits `num` requests of one call, or none.

        Raises:
            EngineNotReady: draining, or the engine is given up.
            QueueFull: too many wait for their first token already.
        """
        self.meter.requests_total += num
        exchanges = [self._new_exchange(arrived_at, streamed, wake) for _ in range(num)]
        refusal = self._refusal()
        if refusal is not None:
            for exchange in exchanges:
                self._close(exchange, "rejected", refusal)
            raise refusal
        for exchange in exchanges:
            self.live[exchange.id] = exchange
            self._num_queued += 1
            wait_s = max(0.0, arrived_at + self.request_timeout_s - self.clock.now())
            exchange.deadline = asyncio.get_running_loop().call_later(wait_s, self._expire, exchange)
        return exchanges

    def submit(self, exchange: Exchange, prompt_ids: list[int], sampling: Sampling) -> None:
        """Hands an admitted request to an engine, or keeps it until there is one."""
        exchange.prompt_ids, exchange.sampling = prompt_ids, sampling
        if exchange.finish is None:
            self.meter.prompt_tokens_total += len(prompt_ids)
            self._route(exchange)

    def leave(self, exchange: Exchange) -> None:
        """The client is gone: frees the request at once."""
        self._end_early(exchange, Finish("abort"))

    def refuse(self, exchange: Exchange, error: RuntimeFault) -> None:
        """An admitted request turned out not to be servable as asked; it was never submitted."""
        self._end_early(exchange, Finish("rejected", error))

    def stop(self, exchange: Exchange) -> None:
        """A stop string was found: the answer is whole."""
        self._end_early(exchange, Finish("stop"))

    def end_all(self, error: RuntimeFault) -> None:
        for exchange in list(self.live.values()):
            self._end_early(exchange, Finish("error", error))

    # -- the engine's side -------------------------------------------------------------------------------

    def on_frame(self, replica: Replica, frame: Frame) -> None:
        """Raises KeyError, TypeError or ValueError for a frame that breaks the protocol."""
        op = frame["op"]
        if op == "tokens":
            self._on_tokens(replica, frame)
        elif op == "prompt_logprobs":
            self._on_prompt_logprobs(replica, frame)
        elif op == "step":
            frame["record"]["replica"] = replica.index
            self.records.append("step", frame["record"])
        elif op == "event":
            self._on_engine_event(replica, {key: value for key, value in frame.items() if key != "op"})
        elif op == "gauge":
            self.engine.gauge(replica, frame)
        elif op == "failed":
            self._on_failed(frame)

    def engine_ready(self, replica: Replica, frame: Frame) -> None:
        """Gives the engine what waits for one. The only engine that is ready also says what the group is."""
        alone = self.engine.phase != "ready"
        replica.phase = "ready"
        if alone:
            self.engine.ready(frame)
        self.record_event("engine_ready", replica=replica.index, version=self.engine.version,
                          config_id=self.engine.config_id, num_restarts=self.engine.num_restarts)  # fmt: skip
        self._route_waiting()

    def engine_lost(self, replica: Replica, phase: Phase) -> None:
        """Ends the requests of that engine which have tokens; its others go to the engines that are left, or wait.

        A plan that needs the engine ends with it, on all the others too.
        """
        was_ready, replica.phase = replica.phase == "ready", phase
        self.engine.gone(replica)
        plan_id = self.engine.plan_id
        if self.engine.phase != "ready" or (was_ready and replica.index < self.engine.plan_replicas):
            for event in self.engine.lost():
                self._on_event({"at": self.clock.now(), **event})
            self.slices.end()
            if plan_id is not None:
                self._abort_everywhere(plan_id, "an engine was lost")
        mine = [one for one in self.live.values() if one.replica is replica]
        self.record_event("engine_lost", replica=replica.index, num_live=len(mine))
        lost = RequestFailed(
            "The engine restarted while it answered this request. Send it again.", "engine_restarted"
        )
        for exchange in mine:
            if exchange.num_tokens > 0:
                self._close(exchange, "error", lost)
            else:
                self._take_back(exchange)
                exchange.admitted_at = None
        self._route_waiting()

    def engine_given_up(self, replica: Replica) -> None:
        replica.phase = "failed"
        self.record_event("engine_failed", replica=replica.index)
        if self.engine.phase == "failed":
            self.end_all(EngineNotReady("The engine failed and was given up. Restart the server."))

    def engine_stopped(self, replica: Replica) -> None:
        """An engine that nobody needs, and that has no request, was stopped."""
        self.engine.gone(replica)
        self.engine.replicas.remove(replica)
        self.record_event("engine_stopped", replica=replica.index)

    def record_event(self, event: str, **details: Any) -> None:
        self.records.append("event", {"at": self.clock.now(), "event": event, **details})

    # -- what others read ----------------------------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        return self.engine.phase == "ready" and not self.draining

    @property
    def num_queued(self) -> int:
        """Requests that wait for their first token."""
        return self._num_queued

    def retry_after_s(self) -> int:
        """How long the queue needs at the recent rate of completions: whole seconds in [1, 60]."""
        now = self.clock.now()
        recent = sum(1 for at in self._completed_at if at > now - RATE_WINDOW_S)
        if recent == 0:
            return LONGEST_RETRY_S if self.engine.phase == "ready" else 5
        return min(LONGEST_RETRY_S, max(1, math.ceil(self._num_queued * RATE_WINDOW_S / recent)))

    # -- inside ----------------------------------------------------------------------------------------------

    def _route(self, exchange: Exchange) -> None:
        """Gives a request to the engine in force that owes the fewest tokens; without an engine it waits."""
        replica = least_loaded(self.engine.replicas, self.engine.num_in_force)
        if replica is not None:
            exchange.replica = replica
            replica.num_live += 1
            replica.outstanding_tokens += exchange.outstanding_tokens
            replica.send(exchange.submission())

    def _route_waiting(self) -> None:
        for exchange in self.live.values():  # in the order of arrival
            if exchange.replica is None and exchange.prompt_ids is not None:
                self._route(exchange)

    def _take_back(self, exchange: Exchange) -> None:
        """Its engine no longer has it. Does nothing to a request that no engine had."""
        replica, exchange.replica = exchange.replica, None
        if replica is not None:
            replica.num_live -= 1
            replica.outstanding_tokens -= exchange.outstanding_tokens

    def _on_engine_event(self, replica: Replica, event: dict[str, Any]) -> None:
        """The leader's word is the group's. A plan that any engine leaves early has ended on all of them."""
        if event["kind"] in ("plan_aborted", "lease_lapsed") and len(self.engine.replicas) > 1:
            self._abort_everywhere(event["plan_id"], "another engine left the plan")
        if replica is self.engine.leader and not self.engine.is_late(event):
            self._on_event(event)

    def _abort_everywhere(self, plan_id: str, reason: str) -> None:
        """An engine that does not have the plan in force leaves this as it is."""
        args = {"plan_id": plan_id, "reason": reason}
        for replica in self.engine.replicas:
            if replica.phase == "ready":
                replica.send({"op": "control", "call": UNASKED, "name": "abort", "args": args})

    def _new_exchange(self, arrived_at: float, streamed: bool, wake: Wake) -> Exchange:
        slice_id, stats = self.slices.arrival(arrived_at)
        exchange = Exchange(
            id=uuid.uuid4().hex, arrived_at=arrived_at, streamed=streamed, wake=wake,
            config_id=self.engine.config_id or "", arrival_slice=slice_id, stats=stats,
        )  # fmt: skip
        if stats is not None:
            stats.arrived(exchange.id, arrived_at)
        return exchange

    def _refusal(self) -> RuntimeFault | None:
        if self.draining:
            return EngineNotReady("The server is shutting down. Send the request to another one.")
        if self.engine.phase == "failed":
            return EngineNotReady("The engine failed and was given up. Restart the server.")
        cap = self.engine.max_queued_requests
        if self._num_queued >= cap:
            return QueueFull(
                f"At most {cap} requests may wait for their first token, and {self._num_queued} do. Try again later.",
                self.retry_after_s(),
            )
        return None

    def _on_tokens(self, replica: Replica, frame: Frame) -> None:
        at, config_id, slice_id = frame["at"], frame["config_id"], frame["slice_id"]
        meter, live, interval = self.meter, self.live, frame.get("stream_interval", 1)
        meter.tokens_total += len(frame["items"])
        for request_id, token, finish_reason, admitted_at, num_preemptions, *logprobs in frame["items"]:
            exchange = live.get(request_id)
            if exchange is None or exchange.replica is not replica:  # cancelled while the step ran
                continue
            gap_s = exchange.add_token(token, at, config_id, slice_id)
            if logprobs:
                exchange.logprobs += logprobs
            replica.outstanding_tokens -= 1
            exchange.num_preemptions = num_preemptions
            if gap_s is None:
                exchange.admitted_at = admitted_at
                self._first_token(replica, exchange)
            else:
                meter.gap_s.observe(gap_s)
            if finish_reason is not None:
                self._close(exchange, finish_reason, at=at)
            elif interval == 1 or gap_s is None or exchange.is_due(interval):
                exchange.wake.set()

    def _on_prompt_logprobs(self, replica: Replica, frame: Frame) -> None:
        exchange = self.live.get(frame["id"])
        if exchange is not None and exchange.replica is replica:
            exchange.add_prompt_logprobs(frame["start"], frame["logprobs"])

    def _first_token(self, replica: Replica, exchange: Exchange) -> None:
        assert exchange.first_token_at is not None and exchange.prompt_ids is not None
        self._num_queued -= 1
        replica.outstanding_tokens -= len(exchange.prompt_ids)
        self.meter.ttft_s.observe(exchange.first_token_at - exchange.arrived_at)
        if exchange.stats is not None:
            exchange.stats.first_token()

    def _on_event(self, event: dict[str, Any]) -> None:
        self.engine.event(event)
        if event["kind"] == "slice_started":
            self.slices.start(event["slice_id"], event["start_at"], event["end_at"], event["burn_in_s"])
        elif event["kind"] == "slice_ended":
            self.slices.end(event["slice_id"])
        record = {key: value for key, value in event.items() if key != "kind"}
        self.records.append("event", {"event": event["kind"], **record})

    def _on_failed(self, frame: Frame) -> None:
        exchange = self.live.get(frame["id"])
        if exchange is None:
            return
        log.warning("request %s failed in the engine: %s", exchange.id, frame["kind"])
        error: RuntimeFault
        if frame["kind"] in ("too_long", "invalid_request"):
            error = InvalidRequest(str(frame["message"]))
        else:
            error = RequestFailed(
                f"The engine could not finish this request ({frame['kind']}).", frame["kind"]
            )
        self._close(exchange, "error", error)

    def _expire(self, exchange: Exchange) -> None:
        error = RequestTimedOut(
            f"The request was not finished within {self.request_timeout_s:g} s of its arrival."
        )
        self._end_early(exchange, Finish("timeout", error))

    def _end_early(self, exchange: Exchange, finish: Finish) -> None:
        """Ends a live request before the engine does, and tells the engine. Does nothing to one that is over."""
        if exchange.finish is not None:
            return
        if exchange.replica is not None:
            exchange.replica.send({"op": "cancel", "id": exchange.id})
        self._close(exchange, finish.reason, finish.error)

    def _close(
        self,
        exchange: Exchange,
        reason: FinishReason,
        error: RuntimeFault | None = None,
        at: float | None = None,
    ) -> None:
        if exchange.finish is not None:
            return
        finished_at = self.clock.now() if at is None else at
        exchange.finish = Finish(reason, error)
        if exchange.deadline is not None:
            exchange.deadline.cancel()
        if self.live.pop(exchange.id, None) is not None and exchange.first_token_at is None:
            self._num_queued -= 1
        self._take_back(exchange)
        self._count(exchange, reason, error, finished_at)
        if not isinstance(error, InvalidRequest):
            self.records.append("request", exchange.timing(finished_at).to_record())
        exchange.wake.set()

    def _count(
        self, exchange: Exchange, reason: FinishReason, error: RuntimeFault | None, finished_at: float
    ) -> None:
        self.meter.finished_by_reason[reason] += 1
        e2e_s = finished_at - exchange.arrived_at
        if error is not None:
            self.meter.errors_by_kind[error_kind(error)] += 1
        if reason in ("stop", "length"):
            self.meter.e2e_s.observe(e2e_s)
            self._completed_at.append(finished_at)
        if exchange.stats is None:
            return
        if reason in ("stop", "length"):
            exchange.stats.finished(exchange.id, e2e_s)
        elif reason == "abort" or isinstance(error, InvalidRequest):
            exchange.stats.aborted(exchange.id)
        else:
            exchange.stats.failed(exchange.id)
