"""Noticing: rules (A), statistics (B) and forecasts (C) over every tick, written down as anomalies.

    a tick's samples ─┬─▶ Signals ─▶ rules ──────────┐
                      └─▶ StatisticsStage ─▶ findings ┴─▶ Anomaly rows, a line of the story
                               ▲ bands
                          ForecastStage (its own process)

A fault freezes tuning while it is open; a condition may start a study, once. An anomaly that an earlier life of
the daemon left open is taken up, not doubled. Samples come from the tick itself; the store is read at the start.
"""

import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from store import noticing, queries
from store.database import Store
from store.tables import Anomaly, Study
from tuner.collect import Collected
from tuner.notice.detect import BIN_S, Thresholds
from tuner.notice.forecast_stage import ForecastRules, ForecastStage
from tuner.notice.rule_book import RuleBook, RuleEvent
from tuner.notice.rules import limits_for, rules_for
from tuner.notice.signals import Limit, Signals
from tuner.notice.statistics_stage import Finding, Outlier, StatisticsStage
from tuner.notice.watched import FORECAST_LABELS, WATCHED, Key, watched_as, watched_values
from tuner.quality.rows import RULE as QUALITY_RULE
from tuner.rows import tell
from tuner.settings import Settings

logger = logging.getLogger(__name__)

CHANGE_WITHIN_S = 120.0
COOL_DOWN_S = 6 * 3600.0  # of layers B and C, per metric and kind
WORSE = 1.5  # unless it is so much worse
PAST_BINS_S = 6 * 3600.0
PAST_MINUTES_S = 7 * 86400.0
QUALITY_EVERY_S = 60.0
WORST_EVERY_S = 60.0


@dataclass
class Standing:
    """One open anomaly: its row, and what was last written of its worst value."""

    row: Anomaly
    written_at: float = 0.0
    outliers: dict[tuple[str, str], float] = field(default_factory=dict)  # mark -> worst size


class NoticeStage:
    """`step` once a tick, after the collector."""

    def __init__(self, store: Store, settings: Settings, snapshot_id: str) -> None:
        own = settings.notice
        self._store, self._snapshot_id, self._own = store, snapshot_id, own
        slos = [Limit(slo.metric, slo.statistic, slo.limit) for slo in settings.slos]
        self.signals = Signals(limits_for(slos, own.itl_p99_s))
        self.book = RuleBook(rules_for(own.disabled, own.triggers) if own.rules else ())
        self.statistics = StatisticsStage(Thresholds().times(own.caution))
        f = own.forecast
        self.forecasts = ForecastStage(
            store, self.statistics, ForecastRules(f.min_points, f.min_history_s, f.refit_s, f.timeout_s)
        )
        self._standing: dict[
            tuple[str, str], Standing
        ] = {}  # (rule, label), or ("", component) of layers B and C
        self._ended: dict[tuple[str, str], Anomaly] = {}
        self._cooled: dict[tuple[str, str], tuple[float, float]] = {}  # mark of an outlier -> when, how bad
        self._studied: set[int] = set()
        self._to_load: deque[Key] = deque()
        self._is_loaded: set[Key] = set()
        self._champion_id: str | None = None
        self._quality_at = 0.0

    # -- life ----------------------------------------------------------------------------------------------

    def start(self, now: float) -> None:
        """Takes up what an earlier life left open, and finds out whose past is to be read."""
        with self._store.journal() as session:
            left = noticing.open_anomalies(session)
            recent = noticing.recent_anomalies(session, now - COOL_DOWN_S)
            self._studied = noticing.studied_anomalies(session)
        for row in left:
            if row.rule != QUALITY_RULE:  # the quality stage opens and ends it
                self._adopt(row, now)
        for row in recent:
            if row.layer == "A":
                self._ended[row.rule, row.label] = row
            else:
                self._cool(row)
        if self._own.statistics:
            self._find_past()
        if self._own.statistics and self._own.forecast.enabled:
            self.forecasts.start(now)

    def close(self) -> None:
        self.forecasts.close()

    def _adopt(self, row: Anomaly, now: float) -> None:
        is_ours = row.rule in self.book.rules if row.layer == "A" else self._own.statistics
        if not is_ours:
            row.ended_at = now
            with self._store.journal() as session:
                session.merge(row)
                tell(
                    session, now, "notice", f"No longer watched: {row.reason}", {"anomaly_id": row.anomaly_id}
                )
        elif row.layer == "A":
            self._standing[row.rule, row.label] = Standing(row)
            self.book.adopt((row.rule, row.label), row.started_at, row.worst)
        else:
            self._standing["", row.details.get("component", "")] = Standing(row)

    def _find_past(self) -> None:
        with self._store.metrics() as session:
            for how in WATCHED:
                metric = str(how.metric)
                for label in how.labels if how.labels is not None else queries.labels_of(session, metric):
                    self._to_load.append((metric, label))

    # -- the tick ------------------------------------------------------------------------------------------

    def step(self, now: float, collected: Collected) -> None:
        state = collected.state
        champion = state.get("champion_config_id") if state else None
        if champion is not None and champion != self._champion_id:
            if self._champion_id is not None:
                self._champion_changed(now)
            self._champion_id = champion
        self._read_quality(now)
        self.signals.feed(now, collected.readings, collected.records, state)
        self._apply_rules(now)
        if self._own.statistics:
            self._load_one(now)
            values = {
                key: value
                for key, value in watched_values(collected.readings).items()
                if key in self._is_loaded or key not in self._to_load
            }
            if self.statistics.sample(now, values, self.signals.is_champion):
                for finding in self.statistics.findings():
                    self._heed_finding(finding, now)
            if self._own.forecast.enabled:
                self.forecasts.step(now)

    def _champion_changed(self, now: float) -> None:
        self.signals.forget_champion()
        self.statistics.champion_changed()
        self.forecasts.champion_changed(now)

    def _load_one(self, now: float) -> None:
        """One series' past a tick: the whole of it at once would hold the tick up."""
        if not self._to_load:
            return
        metric, label = key = self._to_load.popleft()
        how = watched_as(key)
        assert how is not None, f"{key} is not watched"
        with self._store.journal() as session:
            champions = noticing.champion_ids(session, self._snapshot_id) if how.by_config else None
        only = None if not how.by_config else {self._champion_id} if self._champion_id else set()
        until = now - now % BIN_S
        with self._store.metrics() as session:
            bins = noticing.past_bins(session, metric, label, until - PAST_BINS_S, until, BIN_S, only)
            minutes = []
            if FORECAST_LABELS.get(metric) == label:
                since = now - PAST_MINUTES_S
                minutes = noticing.past_minutes(session, metric, label, since, now, champions)
        self._is_loaded.add(key)
        if bins or minutes:
            self.statistics.remember(key, bins, minutes)

    def _read_quality(self, now: float) -> None:
        if now - self._quality_at < QUALITY_EVERY_S:
            return
        self._quality_at = now
        with self._store.journal() as session:
            checks = noticing.last_quality_checks(session, self._snapshot_id, 2)
        if checks:
            num_failed = 0 if checks[0].is_passed else sum(not check.is_passed for check in checks)
            smaller = min(1.0 - check.top1_agreement for check in checks)
            self.signals.quality = (checks[0].checked_at, smaller, num_failed)

    # -- layer A -------------------------------------------------------------------------------------------

    def _apply_rules(self, now: float) -> None:
        for found in self.book.step(self.signals, now):
            if found.event == "opened":
                self._open_rule(found, now)
            elif found.event == "closed":
                self._end(found.key, now, found.hold.worst)
            elif found.key in self._standing:
                self._worsen(self._standing[found.key], found.hold.worst, now)

    def _open_rule(self, found: RuleEvent, now: float) -> None:
        rule, reading, hold = found.rule, found.reading, found.hold
        last = self._ended.get(found.key)
        if last is not None and last.ended_at is not None and now - last.ended_at < rule.cool_down_s:
            self._reopen(found, last, now)
            return
        row = Anomaly(
            rule=rule.name,
            kind=rule.kind,
            metric=reading.label.split()[0] if rule.name == "slo" else str(rule.metric),
            started_at=hold.since_at if hold.since_at is not None else now,
            observed=reading.value,
            limit=rule.band.trigger,
            reason=rule.reason(reading),
            layer="A",
            severity=rule.severity,
            label=reading.label,
            worst=hold.worst,
            details={
                "noticed_at": now,
                "starts_study": rule.starts_study,
                "voids_pair": rule.voids_pair,
                "unit": rule.unit,
            },
        )
        self._open(found.key, row, now)

    def _reopen(self, found: RuleEvent, row: Anomaly, now: float) -> None:
        """It came back within its cool-down: the same anomaly, and nobody is told twice."""
        since_at = found.hold.since_at if found.hold.since_at is not None else now
        noticing.begin_again(row, since_at, found.rule.reason(found.reading))
        self._standing[found.key] = Standing(row, now)
        with self._store.journal() as session:
            session.merge(row)

    # -- layers B and C ------------------------------------------------------------------------------------

    def _heed_finding(self, finding: Finding, now: float) -> None:
        key = ("", finding.component)
        standing = self._standing.get(key)
        if standing is None:
            fresh = [outlier for outlier in finding.outliers if not self._is_cool(outlier, now)]
            if fresh:
                self._open_finding(finding, fresh[0], now)
            return
        if not finding.outliers:
            if not self.statistics.is_recovering(finding.component):
                self._end(key, now)
            return
        for outlier in finding.outliers:
            standing.outliers[outlier.mark] = max(outlier.size, standing.outliers.get(outlier.mark, 0.0))
        if finding.is_page and standing.row.severity == "ticket":
            self._upgrade(standing, finding, now)
        worst = next(
            (one for one in finding.outliers if one.key == (standing.row.metric, standing.row.label)), None
        )
        if worst is not None:
            further = max(
                standing.row.worst or worst.expected, worst.observed, key=lambda v: abs(v - worst.expected)
            )
            self._worsen(standing, further, now)

    def _is_cool(self, outlier: Outlier, now: float) -> bool:
        at, size = self._cooled.get(outlier.mark, (-math.inf, 0.0))
        return now - at < COOL_DOWN_S and outlier.size < WORSE * size

    def _open_finding(self, finding: Finding, lead: Outlier, now: float) -> None:
        row = Anomaly(
            rule=lead.what,
            kind="condition",
            metric=lead.key[0],
            started_at=lead.since_at,
            observed=lead.observed,
            limit=lead.expected,
            reason=words_of(finding, lead),
            layer=lead.layer,
            severity="page" if finding.is_page else "ticket",
            label=lead.key[1],
            worst=lead.observed,
            details=details_of(finding, lead, now),
        )
        key = ("", finding.component)
        self._open(key, row, now)
        self._standing[key].outliers = {one.mark: one.size for one in finding.outliers}

    def _upgrade(self, standing: Standing, finding: Finding, now: float) -> None:
        """A second metric of the component: a ticket becomes a page."""
        row, lead = standing.row, finding.outliers[0]
        row.severity = "page"
        row.details = {
            **row.details,
            **details_of(finding, lead, now),
            "noticed_at": row.details["noticed_at"],
        }
        with self._store.journal() as session:
            session.merge(row)
            text = f"Now a page: {words_of(finding, lead)}"
            tell(session, now, "notice", text, {"anomaly_id": row.anomaly_id})

    def _cool(self, row: Anomaly) -> None:
        ended_at = row.ended_at if row.ended_at is not None else row.started_at
        for mark, size in row.details.get("sizes", {}).items():
            metric, _, what = mark.partition(" ")
            self._cooled[metric, what] = (ended_at, float(size))

    # -- rows ----------------------------------------------------------------------------------------------

    def _open(self, key: tuple[str, str], row: Anomaly, now: float) -> None:
        with self._store.journal() as session:
            row.change_id = noticing.change_before(session, row.started_at, CHANGE_WITHIN_S)
            session.add(row)
            session.flush()
            after = (
                "" if row.change_id is None else f" It began within two minutes of change {row.change_id}."
            )
            text = f"{row.severity.capitalize()}, {row.kind}: {row.reason}{after}"
            tell(session, now, "notice", text, {"anomaly_id": row.anomaly_id})
        self._standing[key] = Standing(row, now)
        logger.log(logging.WARNING if row.severity == "page" else logging.INFO, "Noticed: %s", row.reason)

    def _worsen(self, standing: Standing, worst: float | None, now: float) -> None:
        if worst is None or worst == standing.row.worst or now - standing.written_at < WORST_EVERY_S:
            return
        standing.row.worst, standing.written_at = worst, now
        with self._store.journal() as session:
            session.merge(standing.row)

    def _end(self, key: tuple[str, str], now: float, worst: float | None = None) -> None:
        standing = self._standing.pop(key, None)
        if standing is None:
            return
        row = standing.row
        row.ended_at = now
        if worst is not None:
            row.worst = worst
        if standing.outliers:
            sizes = {" ".join(mark): size for mark, size in standing.outliers.items()}
            row.details = {**row.details, "sizes": sizes}
        with self._store.journal() as session:
            session.merge(row)
            since_at = noticing.episodes(row)[-1][0]
            text = f"Over after {(now - since_at) / 60:.1f} min: {row.reason}"
            tell(session, now, "notice", text, {"anomaly_id": row.anomaly_id})
        if row.layer == "A":
            self._ended[key] = row
        else:
            self._cool(row)

    # -- what follows --------------------------------------------------------------------------------------

    def open_anomalies(self) -> list[Anomaly]:
        return [standing.row for standing in list(self._standing.values())]

    def open_faults(self) -> list[Anomaly]:
        """While one is open no experiment begins and no study goes on."""
        return [row for row in self.open_anomalies() if row.kind == "fault"]

    def voiding_fault(self) -> Anomaly | None:
        """A fault that no challenger can cause and no slice survives."""
        return next((row for row in self.open_faults() if row.details.get("voids_pair")), None)

    def condition_to_study(self, resting_from: Study | None = None) -> Anomaly | None:
        """An open condition that other knobs may help and that has not started a study yet, the oldest first.

        resting_from: the last study, while its rest is not over: then only news of another kind counts.
        """
        if not self._own.studies:
            return None
        last_rule = self._rule_of(resting_from)
        waiting = [
            row
            for row in self.open_anomalies()
            if row.kind == "condition"
            and row.details.get("starts_study")
            and row.anomaly_id not in self._studied
            and row.rule != last_rule
        ]
        return min(waiting, key=lambda row: row.started_at, default=None)

    def _rule_of(self, study: Study | None) -> str | None:
        if study is None or study.anomaly_id is None:
            return None
        with self._store.journal() as session:
            row = session.get(Anomaly, study.anomaly_id)
        return None if row is None else row.rule

    def study_started(self, study: Study, condition: Anomaly) -> None:
        """A condition starts one study: where that found nothing, the next would find nothing either."""
        study.anomaly_id = condition.anomaly_id
        with self._store.journal() as session:
            session.merge(study)
        self._studied.add(condition.anomaly_id)

    def status(self) -> dict[str, Any]:
        """For the daemon's API: what is open, and how far learning has come."""
        return {
            "open": [
                {
                    "anomaly_id": row.anomaly_id,
                    "kind": row.kind,
                    "severity": row.severity,
                    "reason": row.reason,
                }
                for row in self.open_anomalies()
            ],
            "series": self.statistics.states(),
            "forecasts": len(self.statistics.bands),
        }


def details_of(finding: Finding, lead: Outlier, now: float) -> dict[str, Any]:
    return {
        "noticed_at": now,
        "component": finding.component,
        "starts_study": finding.is_page and finding.component in ("load", "latency"),
        "series": [" ".join(one.key).strip() for one in finding.outliers],
        "score": lead.score,
        "sizes": {" ".join(one.mark): one.size for one in finding.outliers},
    }


_WHAT: Mapping[str, str] = {
    "shift": "is at another level than in its last hour",
    "drift": "drifts away from its last hour",
    "spread": "varies more than it did",
    "spike": "is further out than it was in health",
    "flat": "has not moved for ten minutes",
    "forecast": "is outside its forecast",
}


def words_of(finding: Finding, lead: Outlier) -> str:
    """One sentence: the worst series and how far it is out, and who else is."""
    name = f"{lead.key[0]} {lead.key[1]}".strip()
    by = f" ({lead.observed / lead.expected - 1:+.0%})" if lead.expected > 0 else ""
    others = _names(finding.outliers[1:], lead)
    beside = f" So {'is' if len(others) == 1 else 'are'} {', '.join(others)}." if others else ""
    return (
        f"{name} {_WHAT[lead.what]}: {lead.observed:.4g} where {lead.expected:.4g} was expected{by}.{beside}"
    )


def _names(outliers: Sequence[Outlier], lead: Outlier) -> list[str]:
    return sorted({" ".join(one.key).strip() for one in outliers if one.key != lead.key})
