"""Stops a challenger at once, and keeps its lease alive while nothing is wrong. No statistics, no database.

`breach` is the pure rule. `Watchman` is the one thread that applies it: twice a second it renews the
lease of the plan in force and looks at the engine's own counters for the challenger's slice. When the
daemon hangs or dies, this thread stops too, the lease lapses and the engine returns to the champion.
"""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from runtime.client import Control
from runtime.errors import EngineNotReady, RuntimeFault, RuntimeUnreachable
from tuner.judging.harm import HarmReference, HarmRule, SliceWatch, harm_reference

logger = logging.getLogger(__name__)

WATCH_INTERVAL_S = 0.5
MIN_CHAMPION_REQUESTS = 5
PLAN_END_S = 1.0  # a plan that is gone this close to its end has simply ended


@dataclass(frozen=True)
class Limits:
    """What a challenger may not do. Shares are of the requests that arrived in its scored part."""

    max_error_ratio: float
    min_requests: int
    max_running_s: float | None = None  # age of the oldest unfinished request


@dataclass(frozen=True)
class Watch:
    """One plan under watch: which slices belong to the challenger, and what the champion looks like."""

    plan_id: str
    experiment_id: str
    lease_s: float
    until_at: float
    challenger_slices: Mapping[str, float]  # slice_id -> end of its burn-in
    limits: Limits
    reference: HarmReference | None  # None: the champion is not known well enough yet
    num_engine_restarts: int
    champion_before: Mapping[str, str] = field(
        default_factory=dict
    )  # its slice just before, in the same pair
    past_means: Sequence[float] = ()


@dataclass(frozen=True)
class Stop:
    """Why a plan ended early. kind: harm (the challenger's doing), engine (its process ended), lost (nobody's)."""

    experiment_id: str
    plan_id: str
    kind: str
    reason: str
    at: float
    in_challenger: bool


def breach(state: Mapping[str, Any], watch: Watch, rule: HarmRule, now: float) -> str | None:
    """The rule that the challenger breaks now, in words, or None.

    `state` is the runtime's /control/state; only the slices of the challenger are looked at.
    """
    slice_id = state.get("slice_id")
    if slice_id is None or slice_id not in watch.challenger_slices:
        return None
    stats = state["slice_stats"].get(slice_id)
    if stats is None:
        return None
    num_ended = stats["num_finished"] + stats["num_errors"]
    if (
        num_ended >= watch.limits.min_requests
        and stats["num_errors"] > watch.limits.max_error_ratio * num_ended
    ):
        return (
            f"{stats['num_errors']} of {num_ended} requests failed under the challenger "
            f"(limit {watch.limits.max_error_ratio:.1%})."
        )
    reference = latest_reference(state, watch, slice_id)
    if reference is None:
        return None
    seen = SliceWatch(
        scored_s=max(0.0, now - watch.challenger_slices[slice_id]),
        num_finished=stats["num_finished"],
        sum_log=stats["sum_log_e2e"],
        sumsq_log=stats["sumsq_log_e2e"],
        num_pending=stats["num_pending"],
        sum_log_pending_age=stats["sum_log_pending_age"],
        oldest_pending_s=stats["oldest_pending_s"],
    )
    return rule.breach(seen, reference)


def latest_reference(state: Mapping[str, Any], watch: Watch, slice_id: str) -> HarmReference | None:
    """The champion's slice just before this one where the pair's coin put it there, else the reference at hand."""
    known = watch.reference
    stats = state["slice_stats"].get(watch.champion_before.get(slice_id, ""))
    if known is None or stats is None:
        return known
    num_seen = stats["num_finished"] + stats["num_pending"]
    if num_seen < MIN_CHAMPION_REQUESTS:
        return known
    mean_log = (stats["sum_log_e2e"] + stats["sum_log_pending_age"]) / num_seen
    return (
        harm_reference(watch.past_means, mean_log, 1, known.num_challenger_slices, known.slowest_s) or known
    )


class Watchman:
    """The thread beside the tick. One plan at a time; stops come out of `stops`, read by the tick."""

    def __init__(self, control: Control, rule: HarmRule, clock: Callable[[], float]) -> None:
        self.stops: queue.SimpleQueue[Stop] = queue.SimpleQueue()
        self._control, self._rule, self._clock = control, rule, clock
        self._watch: Watch | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchman", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5.0)

    def watch(self, watch: Watch) -> None:
        with self._lock:
            self._watch = watch

    def release(self) -> None:
        with self._lock:
            self._watch = None

    def _run(self) -> None:
        while not self._ended.wait(WATCH_INTERVAL_S):
            with self._lock:
                watch = self._watch
            if watch is None:
                continue
            try:
                self.look(watch, self._clock())
            except (
                Exception
            ):  # this thread must outlive every surprise; without renewal the lease ends the plan
                logger.exception("The look at %s failed", watch.plan_id)

    def look(self, watch: Watch, now: float) -> None:
        """One iteration: renew, look, stop if need be."""
        if now >= watch.until_at:
            self._forget(watch)
            return
        try:
            self._control.lease(watch.plan_id, watch.lease_s)
            state = self._control.state()
        except RuntimeUnreachable as error:
            # The lease may lapse while we try: then the next answer is NoPlan, which says so.
            logger.warning("Lease of %s not renewed: %s", watch.plan_id, error)
            return
        except RuntimeFault as error:
            self._lost(watch, error, now)
            return
        in_challenger = state.get("slice_id") in watch.challenger_slices
        if state["num_engine_restarts"] != watch.num_engine_restarts:
            self._stop(watch, "engine", "The engine process ended and was restarted.", now, in_challenger)
            return
        reason = breach(state, watch, self._rule, now)
        if reason is not None:
            self._abort(watch, reason)
            self._stop(watch, "harm", reason, now, True)

    def _lost(self, watch: Watch, error: RuntimeFault, now: float) -> None:
        """The plan is gone. Whether its engine died decides who is to blame; at its end nobody is."""
        if self._clock() >= watch.until_at - PLAN_END_S:
            self._forget(watch)  # it ended while we asked
            return
        died = isinstance(error, EngineNotReady)
        with contextlib.suppress(RuntimeFault):
            died = died or self._control.state()["num_engine_restarts"] != watch.num_engine_restarts
        if died:
            self._stop(watch, "engine", "The engine process ended and was restarted.", now, False)
        else:
            self._stop(watch, "lost", f"The plan is no longer in force: {error}", now, False)

    def _abort(self, watch: Watch, reason: str) -> None:
        for attempt in range(3):
            try:
                self._control.abort(watch.plan_id, reason)
                return
            except RuntimeFault as error:  # not renewed any more: at the latest the lease ends it
                logger.warning("Abort of %s failed (attempt %d): %s", watch.plan_id, attempt + 1, error)
                time.sleep(0.1)

    def _stop(self, watch: Watch, kind: str, reason: str, now: float, in_challenger: bool) -> None:
        self._forget(watch)
        self.stops.put(Stop(watch.experiment_id, watch.plan_id, kind, reason, now, in_challenger))

    def _forget(self, watch: Watch) -> None:
        with self._lock:
            if self._watch is watch:
                self._watch = None
