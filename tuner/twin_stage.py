"""Fits the champion twin before experiments and keeps it going beside them. Writes TwinFit rows.

The twin is fitted on a stretch in which the champion alone served, and never again until the champion or
the daemon changes: what an experiment subtracts was fixed before its first coin.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any, NamedTuple

from runtime.errors import RuntimeFault
from runtime.knobs import EngineConfig
from runtime.replay import Arrival
from runtime.step_model import fit_step_model
from store import queries
from store.database import Store
from store.tables import TwinFit
from tuner.objective import Metric, Timing
from tuner.rows import tell
from tuner.twin import ChampionTwin, ServedRequest, TwinParameters, calibrate_twin

logger = logging.getLogger(__name__)

WINDOW_S = 6.0  # windows in which the twin's error is looked at: half a short slice
MAX_STRETCH_S = 900.0  # older steps tell of another hour
WARM_UP_S = 60.0  # arrivals replayed before the first slice, so that the simulated backlog is the real one


class TwinStage:
    """Holds the twin of the champion that serves now, or the reason why there is none."""

    def __init__(self, store: Store, snapshot_id: str, identity: Mapping[str, Any]) -> None:
        self._store, self._snapshot_id, self._identity = store, snapshot_id, identity
        self._twin: ChampionTwin | None = None
        self._given_until = 0.0
        self.fit: TwinFit | None = None
        self.windows = ChampionWindows((), 0.0)

    def forget(self) -> None:
        """The champion changed: its twin is no longer the twin of anything."""
        self._twin, self.fit = None, None

    def prepare(self, champion: EngineConfig, since_at: float, now: float, slice_s: float) -> TwinFit | None:
        """Fits on the champion's own stretch [since_at, now]. None where too few steps were seen."""
        start_at = max(since_at, now - MAX_STRETCH_S)
        with self._store.metrics() as session:
            steps = [vars(step) for step in queries.steps_between(session, start_at, now, champion.config_id)]
            served = served_by_champion(queries.timings_between(session, start_at, now))
        self.windows = champion_windows(served, start_at, now, slice_s)
        try:
            fitted = fit_step_model(steps, self._identity)
        except RuntimeFault as too_few:
            logger.info("No twin: %s", too_few)
            return None
        kv_tokens, block_tokens = self._identity["kv_total_tokens"], self._identity.get("kv_block_tokens", 64)
        parameters = TwinParameters(
            champion, fitted.model, kv_tokens // block_tokens, block_tokens, self._identity["model"]["max_model_len"]
        )
        parameters, error = calibrate_twin(parameters, served, WINDOW_S)
        self.fit = TwinFit(
            snapshot_id=self._snapshot_id, config_id=champion.config_id, fitted_at=now,
            parameters=parameters.to_dict() | {"error": asdict(error)}, num_steps=fitted.num_steps,
            step_error_ratio=fitted.relative_error, latency_error_ratio=error.relative_error, is_used=error.usable,
            reason=error.reason,
        )
        with self._store.journal() as session:
            session.add(self.fit)
            tell(session, now, "experiment", f"{error.reason} A step is predicted to {fitted.relative_error:.1%}.")
        self._twin = ChampionTwin(parameters) if error.usable else None
        self._given_until = now - WARM_UP_S
        return self.fit

    def advance(self, now: float, state: Mapping[str, Any]) -> None:
        """Feeds the arrivals that are known whole: those before the oldest request still under way."""
        if self._twin is None:
            return
        until = now - max([1.0, *(stats.get("oldest_pending_s") or 0.0 for stats in state["slice_stats"].values())])
        if until <= self._given_until:
            return
        with self._store.metrics() as session:
            rows = queries.timings_between(session, self._given_until, until)
        self._twin.advance(
            [Arrival(row.request_id, row.arrived_at, row.prompt_tokens, row.output_tokens) for row in rows], until
        )
        self._given_until = until
        self._twin.forget_before(now - MAX_STRETCH_S)

    def predictions(self, metric: Metric, timings: Sequence[Timing]) -> dict[str, float] | None:
        """request_id -> ln(metric) under the champion; None where no twin is in use for this metric."""
        if self._twin is None or metric == "tpot_s":
            return None
        known = self._twin.predictions
        seen = {timing.request_id: known[timing.request_id] for timing in timings if timing.request_id in known}
        return {id: found.log_e2e if metric == "e2e_s" else found.log_ttft for id, found in seen.items()}


class ChampionWindows(NamedTuple):
    """What the champion's latency was like, window after window as long as a slice: the scale of harm."""

    means: tuple[float, ...]  # mean ln(e2e)
    slowest_s: float


def champion_windows(served: Sequence[ServedRequest], start_at: float, end_at: float, slice_s: float) -> ChampionWindows:
    """Neighbouring windows by arrival, oldest first; one without a request ends the row, for its neighbours are none."""
    means: list[float] = []
    for index in range(int((end_at - start_at) // slice_s)):
        low = start_at + index * slice_s
        latencies = [one.finished_at - one.arrived_at for one in served if low <= one.arrived_at < low + slice_s]
        if latencies:
            means.append(fmean(math.log(max(latency, 1e-6)) for latency in latencies))
        else:
            means.clear()
    return ChampionWindows(tuple(means), max((one.finished_at - one.arrived_at for one in served), default=0.0))


def served_by_champion(rows: Sequence[Any]) -> list[ServedRequest]:
    """Finished requests with a first token, as the calibration wants them."""
    return [
        ServedRequest(row.request_id, row.arrived_at, row.prompt_tokens, row.output_tokens, row.first_token_at, row.finished_at)
        for row in rows
        if row.first_token_at is not None and row.finish_reason in ("stop", "length")
    ]
