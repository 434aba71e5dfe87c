"""Fills the live view from the store and the daemon's memory. Reads only, on a connection of its own."""

import threading
from collections.abc import Sequence
from typing import Any

from runtime.knobs import default_config
from store import decisions, queries
from store.database import Store, StoreReader
from store.errors import StoreError
from store.tables import Trial
from tuner.daemon import Daemon
from tuner.judging.interval import anytime_interval, effect_ratio
from tuner.pairs import scored_pairs
from tuner.promote import describe
from tuner.view import ExperimentView, GainView, LatencyView, ProbeView, StoryLine, ViewState, show

MINUTE_S = 60.0
BARS = 48  # points of the p95 history
STORY_LINES = 40
REFRESH_LATENCY_S = 2.0


def watch(daemon: Daemon, stop: threading.Event, plain: bool) -> None:
    """Shows the view until `stop` is set."""
    live = Live(daemon)
    show(live.read, stop, plain=plain)


class Live:
    """One reader of the store, with the figures that are dear to compute kept for a moment."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._reader: StoreReader = Store.reader(daemon.store)
        self._last: ViewState | None = None
        self._read_at = 0.0

    def read(self) -> ViewState:
        now = self._daemon.clock.now()
        if self._last is None or now - self._read_at > REFRESH_LATENCY_S:
            try:
                self._last, self._read_at = self._fresh(now), now
            except StoreError:
                self._last = self._last or self._bare(now)
        return self._last

    def _bare(self, now: float) -> ViewState:
        daemon = self._daemon
        return ViewState(
            now=now,
            api_url=daemon.identity["api_url"],
            model=daemon.identity["model"]["name"],
            device=daemon.identity["hardware"]["device"],
            mode=daemon.settings.mode,
            uptime_s=now - daemon.started_at,
            doing=daemon.doing,
            engine=(daemon.state or {}).get("engine", "unknown"),
            dashboard_url=daemon.dashboard_url,
        )

    def _fresh(self, now: float) -> ViewState:
        daemon, bare = self._daemon, self._bare(now)
        state = daemon.state or {}
        gauges = state.get("gauges", {})
        hardware = daemon.identity["hardware"]
        fitted = daemon.identity.get("fitted_knobs")
        default = default_config(hardware["device"], hardware["num_cores"], fitted).values()
        with self._reader.journal() as session:
            champion = decisions.latest_champion(session, daemon.snapshot_id)
            values = decisions.config_values(session, champion.config_id) if champion is not None else default
            running = decisions.running_experiments(session)
            experiment = self._experiment(session, running[0], state) if running else None
            study = queries.studies(session, limit=1)
            trials = decisions.study_trials(session, study[0].study_id) if study else []
            probes = tuple(
                self._probe(session, trial, study[0].champion_config_id)
                for trial in trials
                if trial.config_id != study[0].champion_config_id
            )
            notes = queries.notes(session, STORY_LINES)
            waiting = decisions.waiting_recommendations(session)
            champions = decisions.champions_of(session, daemon.snapshot_id)
        with self._reader.metrics() as session:
            minute = queries.request_percentiles(session, now - MINUTE_S, now)
            history = {name: self._history(session, name, now) for name in ("ttft_s", "tpot_s", "e2e_s")}
            rates = {
                name: self._last_value(session, name, now)
                for name in ("requests_per_s", "output_tokens_per_s")
            }
            gains = self._gains(session, champions, now)
        return ViewState(
            **{
                name: getattr(bare, name)
                for name in (
                    "now",
                    "api_url",
                    "model",
                    "device",
                    "mode",
                    "uptime_s",
                    "doing",
                    "engine",
                    "dashboard_url",
                )
            },
            requests_per_s=rates["requests_per_s"],
            tokens_per_s=rates["output_tokens_per_s"],
            error_ratio=None if minute.success_ratio is None else 1.0 - minute.success_ratio,
            num_running=gauges.get("num_running"),
            num_waiting=gauges.get("num_waiting"),
            ttft=latency(minute.ttft, history["ttft_s"]),
            tpot=latency(minute.tpot, history["tpot_s"]),
            e2e=latency(minute.e2e, history["e2e_s"]),
            champion_id=champion.config_id if champion is not None else "–",
            champion_changes=tuple(
                f"{name} {default[name]} → {values[name]}" for name in values if values[name] != default[name]
            ),
            experiment=experiment,
            probes=probes,
            gains=gains,
            waiting_for_person=f"tuner approve {waiting[-1].recommendation_id}" if waiting else None,
            story=tuple(StoryLine(note.at, note.text) for note in notes),
        )

    def _experiment(self, session: Any, row: Any, state: Any) -> ExperimentView:
        pairs = scored_pairs(decisions.slices_of(session, row.experiment_id))
        differences = [pair.difference for pair in pairs]
        interval = anytime_interval(differences, 0.05)
        change = describe(
            decisions.config_values(session, row.challenger_config_id),
            decisions.config_values(session, row.champion_config_id),
        )
        slice_id = state.get("slice_id") or ""
        look_every = row.rules["look_every"]
        return ExperimentView(
            kind=row.kind,
            change=change,
            num_pairs=len(pairs),
            max_pairs=row.rules["max_pairs"],
            arm=slice_id.rpartition("-")[2] or None,
            effect_ratio=effect_ratio(sum(differences) / len(differences)) if differences else None,
            low_ratio=effect_ratio(interval.low) if interval else None,
            high_ratio=effect_ratio(interval.high) if interval else None,
            level=row.rules["level"] if row.kind == "test" else None,
            next_look_pairs=(len(pairs) // look_every + 1) * look_every if row.kind == "test" else None,
        )

    def _probe(self, session: Any, trial: Trial, champion_id: str) -> ProbeView:
        change = describe(
            decisions.config_values(session, trial.config_id), decisions.config_values(session, champion_id)
        )
        ratio = None if trial.value is None else effect_ratio(trial.value)
        return ProbeView(change, trial.state, ratio, trial.reason or "" if trial.state == "FAIL" else "")

    def _history(self, session: Any, metric: str, now: float) -> tuple[float | None, ...]:
        points = queries.binned_samples(session, metric, "p95", now - 4 * MINUTE_S, now, 4 * MINUTE_S / BARS)
        return tuple(point.mean for point in points)

    def _last_value(self, session: Any, metric: str, now: float) -> float | None:
        points = queries.samples(session, metric, "", now - 10.0, now)
        return points[-1].value if points else None

    def _gains(self, session: Any, champions: Sequence[Any], now: float) -> tuple[GainView, ...]:
        """p95 of the first champion's last minutes against that of the present one, slices left out."""
        if len(champions) < 2 or champions[0].config_id == champions[-1].config_id:
            return ()
        first_until = next(row.since_at for row in champions if row.config_id != champions[0].config_id)
        before = self._quiet(session, first_until - 10 * MINUTE_S, first_until, champions[0].config_id)
        after = self._quiet(
            session, max(champions[-1].since_at + 5.0, now - 5 * MINUTE_S), now, champions[-1].config_id
        )
        return tuple(
            GainView(name.upper(), getattr(before, name).p95, getattr(after, name).p95)
            for name in ("ttft", "e2e")
            if getattr(before, name) and getattr(after, name)
        )

    def _quiet(self, session: Any, t0: float, t1: float, config_id: str) -> queries.RequestSummary:
        rows = queries.timings_between(session, t0, t1, config_id)
        return queries.summarise(row for row in rows if row.arrival_slice is None)


def latency(found: Any, history: tuple[float | None, ...]) -> LatencyView:
    return LatencyView(None, None, history) if found is None else LatencyView(found.p50, found.p95, history)
