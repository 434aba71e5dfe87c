"""Which metric is fitted next, from what, and what becomes of the answer. One metric at a time, never in the tick.

    minutes in memory ─▶ due? ─▶ ForecastProcess ─▶ Forecast rows (bands), a ForecastFit row, the band in memory

A metric is fitted for the first time when it has enough of a past, then daily in its own slot of the day, and
an hour after another champion began to serve. What fails keeps its last bands, and is tried again, less and less often.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.database import Store
from store.noticing import forecast_fits, latest_bands, save_forecast_fits
from store.samples import save_forecasts
from store.tables import Forecast, ForecastFit
from tuner.notice.forecast_process import ForecastProcess
from tuner.notice.statistics_stage import Band, BandPoint, SeriesState, StatisticsStage
from tuner.notice.watched import FORECAST_LABELS

logger = logging.getLogger(__name__)

BAND_SD = 4.0
STEP_S = 600.0
HORIZON_S = 36 * 3600.0  # bands end here: older ones are stale, and layer B stands alone
RETRY_S, MAX_RETRY_S = 60.0, 3600.0  # twice as long each time
AFTER_CHANGE_S = 3600.0
TELL_LEARNING_S = 600.0


@dataclass(frozen=True)
class ForecastRules:
    """When a metric is fitted. Durations in s."""

    min_points: int = 30
    min_history_s: float = 2 * 86400.0
    refit_s: float = 86400.0
    timeout_s: float = 300.0


@dataclass
class _Plan:
    """One metric's schedule. `fit` is its row as it stands in the store."""

    slot: float  # share of the refit interval at which its turn is
    due_at: float = 0.0
    fit: ForecastFit | None = None
    told_at: float = -1e18
    num_failures: int = 0  # in a row


@dataclass
class ForecastStage:
    """`step` once a tick."""

    store: Store
    statistics: StatisticsStage
    rules: ForecastRules = field(default_factory=ForecastRules)
    process: ForecastProcess | None = None
    history: list[float] = field(default_factory=list)  # s that each fit of this life took, the newest 1000
    _plans: dict[str, _Plan] = field(default_factory=dict)
    _changed_at: list[float] = field(default_factory=list)
    _asked: tuple[int, str, NDArray[np.float64]] | None = None
    _num_asked: int = 0

    def __post_init__(self) -> None:
        self.process = self.process or ForecastProcess(self.rules.timeout_s)
        names = list(FORECAST_LABELS)
        self._plans = {name: _Plan(slot=index / len(names)) for index, name in enumerate(names)}

    def start(self, now: float) -> None:
        """Takes up the bands and fits of an earlier life."""
        with self.store.metrics() as session:
            fits = {fit.metric: fit for fit in forecast_fits(session)}
            for metric, plan in self._plans.items():
                plan.fit = fits.get(metric)
                if plan.fit is None or plan.fit.fitted_at is None:
                    continue
                plan.due_at = self._next_at(plan, plan.fit.fitted_at)
                if plan.fit.state == "FAILED":
                    plan.due_at = now
                rows = latest_bands(session, metric, now - STEP_S, plan.fit.fitted_at)
                if len(rows) > 1:
                    self.statistics.bands[metric] = Band([BandPoint(*row) for row in rows])

    def close(self) -> None:
        if self.process is not None:
            self.process.close()

    @property
    def is_busy(self) -> bool:
        return self.process is not None and self.process.is_busy

    def champion_changed(self, now: float) -> None:
        """What depends on the configuration is learnt anew once an hour of it is known."""
        self._changed_at = [at for at in self._changed_at if at > now - 30 * 86400.0] + [now]
        for state in self._states().values():
            if state.how.by_config:
                plan = self._plans[state.key[0]]
                plan.due_at = now + AFTER_CHANGE_S * (1.0 + plan.slot)

    def step(self, now: float) -> None:
        assert self.process is not None
        if self.process.is_busy:
            found = self.process.poll()
            if found is not None:
                self._take(found, now)
            return
        self._tell_learning(now)
        for metric, state in self._states().items():
            if now >= self._plans[metric].due_at and self._is_ready(state):
                self._ask(metric, state, now)
                return

    # -- asking --------------------------------------------------------------------------------------------

    def _states(self) -> dict[str, SeriesState]:
        """metric -> the series of it that has a forecast, where it was sampled at all."""
        series = self.statistics.series
        return {
            name: series[name, label] for name, label in FORECAST_LABELS.items() if (name, label) in series
        }

    def _is_ready(self, state: SeriesState) -> bool:
        ats = state.minute_ats.values()
        return len(ats) >= self.rules.min_points and ats[-1] - ats[0] >= self.rules.min_history_s - 120.0

    def _ask(self, metric: str, state: SeriesState, now: float) -> None:
        assert self.process is not None
        at = state.minute_ats.values().copy()
        values = state.minutes.values()
        judged = np.log(np.maximum(values, 1e-6)) if state.how.is_log else values.copy()
        if state.how.by_config:
            judged = relevelled(at, judged, self._changed_at)
        first = np.ceil(now / STEP_S) * STEP_S - STEP_S
        ahead = first + STEP_S * np.arange(int(HORIZON_S / STEP_S) + 2)
        self._num_asked += 1
        self._asked = (self._num_asked, metric, ahead)
        self.process.submit(
            {
                "id": self._num_asked,
                "at": at.astype("<f8").tobytes(),
                "values": judged.astype("<f8").tobytes(),
                "ahead": ahead.astype("<f8").tobytes(),
                "floor": state.how.floor,
            }
        )

    # -- what came back ------------------------------------------------------------------------------------

    def _take(self, found: Mapping[str, Any], now: float) -> None:
        asked, self._asked = self._asked, None
        if asked is None or found["id"] != asked[0]:
            return  # an answer to nobody: the process was replaced meanwhile
        _, metric, ahead = asked
        plan, state = self._plans[metric], self._states()[metric]
        if "error" in found:
            self._failed(metric, plan, str(found["error"]), now)
            return
        expected = np.frombuffer(found["expected"], dtype="<f8")
        points = band_points(ahead, expected, float(found["scale"]), state)
        ats = state.minute_ats.values()
        plan.fit = ForecastFit(
            metric, "FITTED", now, f"Fitted to {len(ats)} minutes.", now, found["num_points"],
            float(ats[-1] - ats[0]), found["scale"], state.how.is_log, found["fit_s"],
        )  # fmt: skip
        plan.due_at, plan.num_failures = self._next_at(plan, now), 0
        with self.store.metrics() as session:
            save_forecasts(session, [Forecast(metric, p.at, now, p.expected, p.low, p.high) for p in points])
            save_forecast_fits(session, [plan.fit])
        self.statistics.bands[metric] = Band(points)
        self.history = [*self.history[-999:], float(found["fit_s"])]
        logger.info(
            "Forecast of %s fitted to %d points in %.1f s", metric, found["num_points"], found["fit_s"]
        )

    def _failed(self, metric: str, plan: _Plan, reason: str, now: float) -> None:
        logger.warning("The forecast of %s failed: %s", metric, reason)
        before = plan.fit
        plan.due_at = now + min(MAX_RETRY_S, RETRY_S * 2.0**plan.num_failures)
        plan.num_failures += 1
        plan.fit = ForecastFit(
            metric, "FAILED", now, reason,
            before.fitted_at if before else None, before.num_points if before else 0,
            before.history_s if before else 0.0, before.residual_scale if before else None,
            before.is_log if before else False,
        )  # fmt: skip
        with self.store.metrics() as session:
            save_forecast_fits(session, [plan.fit])

    def _next_at(self, plan: _Plan, fitted_at: float) -> float:
        """Its slot of the day that comes at least half an interval after the last fit."""
        every = self.rules.refit_s
        earliest = fitted_at + every / 2
        offset = plan.slot * every
        return float(np.ceil((earliest - offset) / every) * every + offset)

    def _tell_learning(self, now: float) -> None:
        """How far each metric has come that never had a forecast: "12 of 30"."""
        rows = []
        for metric, state in self._states().items():
            plan = self._plans[metric]
            is_new = plan.fit is None or plan.fit.state == "LEARNING"
            if not is_new or now - plan.told_at < TELL_LEARNING_S or self._is_ready(state):
                continue
            plan.told_at = now
            ats = state.minute_ats.values()
            history_s = float(ats[-1] - ats[0]) if len(ats) else 0.0
            reason = learning_words(len(ats), history_s, self.rules)
            plan.fit = ForecastFit(metric, "LEARNING", now, reason, None, len(ats), history_s)
            rows.append(plan.fit)
        if rows:
            with self.store.metrics() as session:
                save_forecast_fits(session, rows)


def learning_words(num_points: int, history_s: float, rules: ForecastRules) -> str:
    """Learning "12 of 30" points; once those are there, of hours."""
    if num_points < rules.min_points:
        return f"{num_points} of {rules.min_points} minutes"
    return f"{history_s / 3600:.0f} of {rules.min_history_s / 3600:.0f} hours"


def band_points(
    ahead: NDArray[np.float64], expected: NDArray[np.float64], scale: float, state: SeriesState
) -> Sequence[BandPoint]:
    """Bands in the metric's unit, from judged units."""
    told, reach = state.how.told, BAND_SD * scale
    return [
        BandPoint(float(at), told(float(value)), told(float(value) - reach), told(float(value) + reach))
        for at, value in zip(ahead, expected, strict=True)
    ]


def relevelled(
    at: NDArray[np.float64], values: NDArray[np.float64], changed_at: Sequence[float]
) -> NDArray[np.float64]:
    """The past of former champions, moved to the level of the one that serves: its day is theirs, its level is not.

    The step is the difference of the medians of the half hours beside the change; unknown where one is empty.
    """
    for change_at in sorted(changed_at):
        before = (at >= change_at - 1800.0) & (at < change_at)
        after = (at >= change_at) & (at < change_at + 1800.0)
        if before.any() and after.any():
            step = np.median(values[after]) - np.median(values[before])
            values = np.where(at < change_at, values + step, values)
    return values
