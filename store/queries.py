"""Named reads of both files, for whoever shows or reuses what was recorded. Each takes an open session.

The first half reads the journal (`store.journal()`), the second the metrics (`store.metrics()`). Intervals
are half-open, [t0, t1), in UTC epoch seconds. Champions, trials, slices and verdicts of one thing are read by
`store.decisions`, which the daemon shares; the whole story of one change is told by `store.explain`.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Integer, cast, func, select, text
from sqlalchemy.orm import Session

from store.evidence import FalsePromotionRate as FalsePromotionRate
from store.evidence import RealisedGain as RealisedGain
from store.evidence import false_promotion_rate as false_promotion_rate
from store.evidence import realised_gain as realised_gain
from store.latency import RequestSummary, summarise
from store.metrics import METRICS
from store.series import Bin as Bin
from store.series import Series as Series
from store.series import series as series
from store.tables import (
    Anomaly,
    Champion,
    Change,
    DrainCursor,
    Experiment,
    Forecast,
    Note,
    OperatorAction,
    Proposal,
    RequestTiming,
    Run,
    RuntimeEvent,
    Sample,
    Slice,
    Snapshot,
    Step,
    Study,
    TwinFit,
    Verdict,
)

# --- journal --------------------------------------------------------------------------------------


def last_run(journal: Session) -> Run | None:
    """The life of the daemon that started last."""
    return journal.scalars(select(Run).order_by(Run.started_at.desc()).limit(1)).first()


def last_snapshot(journal: Session) -> Snapshot | None:
    """The model and hardware that had a champion last; before the first champion, the newest one recorded."""
    latest = select(Snapshot).join(Champion, Champion.snapshot_id == Snapshot.snapshot_id)
    found = journal.scalars(latest.order_by(Champion.champion_id.desc()).limit(1)).first()
    return found or journal.scalars(select(Snapshot).order_by(Snapshot.created_at.desc()).limit(1)).first()


def champion_history(journal: Session, snapshot_id: str, limit: int = 100) -> Sequence[Champion]:
    """Newest first."""
    champions = select(Champion).where(Champion.snapshot_id == snapshot_id)
    return journal.scalars(champions.order_by(Champion.champion_id.desc()).limit(limit)).all()


def changes(journal: Session, snapshot_id: str | None = None, limit: int = 100) -> Sequence[Change]:
    """Newest first; of all snapshots where none is named."""
    found = select(Change).order_by(Change.change_id.desc()).limit(limit)
    return journal.scalars(
        found if snapshot_id is None else found.where(Change.snapshot_id == snapshot_id)
    ).all()


def studies(journal: Session, limit: int = 100) -> Sequence[Study]:
    """Newest first."""
    return journal.scalars(select(Study).order_by(Study.study_id.desc()).limit(limit)).all()


def proposals_of_study(journal: Session, study_id: int) -> Sequence[Proposal]:
    """Oldest first."""
    return journal.scalars(
        select(Proposal).where(Proposal.study_id == study_id).order_by(Proposal.proposal_id)
    ).all()


def experiments_of_study(journal: Session, study_id: int) -> Sequence[Experiment]:
    """Oldest first: probes and tests."""
    return journal.scalars(
        select(Experiment).where(Experiment.study_id == study_id).order_by(Experiment.created_at)
    ).all()


def experiments(journal: Session, limit: int = 100) -> Sequence[Experiment]:
    """Newest first, of every kind."""
    return journal.scalars(select(Experiment).order_by(Experiment.created_at.desc()).limit(limit)).all()


def slices_to_score(journal: Session, ended_before: float) -> Sequence[Slice]:
    """Slices that are over and neither scored nor void, in the order in which they were served."""
    return journal.scalars(
        select(Slice)
        .where(Slice.state == "PLANNED", Slice.planned_end_at <= ended_before)
        .order_by(Slice.planned_start_at)
    ).all()


def slices_between(journal: Session, t0: float, t1: float) -> Sequence[Slice]:
    """Slices that overlap the interval, in the order in which they were served."""
    return journal.scalars(
        select(Slice)
        .where(Slice.planned_end_at > t0, Slice.planned_start_at < t1)
        .order_by(Slice.planned_start_at)
    ).all()


def verdicts(journal: Session, limit: int = 100) -> Sequence[Verdict]:
    """Newest first."""
    return journal.scalars(select(Verdict).order_by(Verdict.verdict_id.desc()).limit(limit)).all()


def latest_twin_fit(journal: Session, snapshot_id: str, config_id: str | None = None) -> TwinFit | None:
    """The newest fit; of one configuration where it is named. `is_used` says whether it was good enough."""
    fits = (
        select(TwinFit)
        .where(TwinFit.snapshot_id == snapshot_id)
        .order_by(TwinFit.twin_fit_id.desc())
        .limit(1)
    )
    return journal.scalars(fits if config_id is None else fits.where(TwinFit.config_id == config_id)).first()


def anomalies(journal: Session, limit: int = 100, only_open: bool = False) -> Sequence[Anomaly]:
    """Newest first."""
    found = select(Anomaly).order_by(Anomaly.anomaly_id.desc()).limit(limit)
    return journal.scalars(found.where(Anomaly.ended_at.is_(None)) if only_open else found).all()


def operator_actions(journal: Session, limit: int = 100) -> Sequence[OperatorAction]:
    """Newest first."""
    return journal.scalars(
        select(OperatorAction).order_by(OperatorAction.operator_action_id.desc()).limit(limit)
    ).all()


def notes(journal: Session, limit: int = 50, after_id: int = 0) -> Sequence[Note]:
    """The newest `limit` lines of the story that are newer than `after_id`, oldest first."""
    newest = journal.scalars(
        select(Note).where(Note.note_id > after_id).order_by(Note.note_id.desc()).limit(limit)
    ).all()
    return newest[::-1]


LONGEST_REQUEST_S = 3600.0  # bounds the search for what was under way

# --- metrics: requests and steps ------------------------------------------------------------------


def timings_between(
    metrics: Session, t0: float, t1: float, config_id: str | None = None, slice_id: str | None = None
) -> Sequence[RequestTiming]:
    """Finished requests that arrived in the interval, by arrival. `slice_id` is the slice they arrived in."""
    found = select(RequestTiming).where(RequestTiming.arrived_at >= t0, RequestTiming.arrived_at < t1)
    if config_id is not None:
        found = found.where(RequestTiming.config_id == config_id)
    if slice_id is not None:
        found = found.where(RequestTiming.arrival_slice == slice_id)
    return metrics.scalars(found.order_by(RequestTiming.arrived_at)).all()


def timings_in_system(metrics: Session, t0: float, t1: float) -> Sequence[RequestTiming]:
    """Finished requests that were in the system at some time of the interval, by arrival: the backlog at t0 too."""
    found = select(RequestTiming).where(
        RequestTiming.arrived_at >= t0 - LONGEST_REQUEST_S,
        RequestTiming.arrived_at < t1,
        RequestTiming.finished_at >= t0,
    )
    return metrics.scalars(found.order_by(RequestTiming.arrived_at)).all()


def timings_of_slice(metrics: Session, slice_ids: str | Collection[str]) -> Sequence[RequestTiming]:
    """Finished requests that arrived in these slices, burn-in included, by arrival."""
    wanted = [slice_ids] if isinstance(slice_ids, str) else list(slice_ids)
    return metrics.scalars(
        select(RequestTiming)
        .where(RequestTiming.arrival_slice.in_(wanted))
        .order_by(RequestTiming.arrived_at)
    ).all()


def steps_between(
    metrics: Session, t0: float, t1: float, config_id: str | None = None, limit: int | None = None
) -> Sequence[Step]:
    """Steps that ended in the interval, oldest first; with `limit` the newest so many of them."""
    found = select(Step).where(Step.at >= t0, Step.at < t1)
    if config_id is not None:
        found = found.where(Step.config_id == config_id)
    if limit is None:
        return metrics.scalars(found.order_by(Step.at)).all()
    return metrics.scalars(found.order_by(Step.at.desc()).limit(limit)).all()[::-1]


def events_between(metrics: Session, t0: float, t1: float) -> Sequence[RuntimeEvent]:
    """What the runtime said of itself, oldest first."""
    return metrics.scalars(
        select(RuntimeEvent).where(RuntimeEvent.at >= t0, RuntimeEvent.at < t1).order_by(RuntimeEvent.at)
    ).all()


def drain_cursor(metrics: Session, boot_id: str) -> DrainCursor | None:
    """Where to go on draining this boot; None where nothing of it was ever stored: from 0."""
    return metrics.get(DrainCursor, boot_id)


def request_percentiles(
    metrics: Session,
    t0: float,
    t1: float,
    config_id: str | None = None,
    slice_ids: Collection[str] | None = None,
    exclude_slices: Collection[str] = (),
) -> RequestSummary:
    """Latencies of the requests that arrived in the interval, so that slow ones are not counted late.

    slice_ids: only requests that arrived in one of these slices (the slices of one arm, say).
    exclude_slices: leaves those out that arrived in one of these.
    """
    found = _TIMES.where(RequestTiming.arrived_at >= t0, RequestTiming.arrived_at < t1)
    if config_id is not None:
        found = found.where(RequestTiming.config_id == config_id)
    rows = metrics.execute(found).all()
    return summarise(
        row
        for row in rows
        if row.arrival_slice not in exclude_slices and (slice_ids is None or row.arrival_slice in slice_ids)
    )


_TIMES = select(
    RequestTiming.arrived_at,
    RequestTiming.first_token_at,
    RequestTiming.finished_at,
    RequestTiming.output_tokens,
    RequestTiming.finish_reason,
    RequestTiming.arrival_slice,
)


# --- metrics: samples -----------------------------------------------------------------------------


class Point(NamedTuple):
    at: float
    value: float
    config_id: str | None


def samples(metrics: Session, metric: str, label: str, t0: float, t1: float) -> list[Point]:
    """Oldest first."""
    found = select(Sample.at, Sample.value, Sample.config_id).where(*_series(metric, label, t0, t1))
    return [Point(*row) for row in metrics.execute(found.order_by(Sample.at))]


def binned_samples(
    metrics: Session, metric: str, label: str, t0: float, t1: float, bin_s: float
) -> list[Bin]:
    """One row for each `bin_s` seconds that hold a sample, oldest first: what a chart of a day needs."""
    start = t0 + cast((Sample.at - t0) / bin_s, Integer) * bin_s
    aggregates = (func.avg(Sample.value), func.min(Sample.value), func.max(Sample.value), func.count())
    found = select(start.label("start"), *aggregates).where(*_series(metric, label, t0, t1))
    return [Bin(*row) for row in metrics.execute(found.group_by("start").order_by("start"))]


def labels_of(metrics: Session, metric: str) -> list[str]:
    """Labels that a metric was ever sampled with, in order. Hops along the key, however many samples there are."""
    return list(metrics.scalars(text(_LABELS), {"metric": str(metric)}))


def latest_samples(metrics: Session, since: float = 0.0) -> dict[str, dict[str, Point]]:
    """The newest sample of every series, as metric -> label -> point; series silent since then are left out."""
    found: dict[str, dict[str, Point]] = {}
    for metric in METRICS:
        for label in labels_of(metrics, metric):
            newest = select(Sample.at, Sample.value, Sample.config_id).where(
                *_series(metric, label, since, math.inf)
            )
            row = metrics.execute(newest.order_by(Sample.at.desc()).limit(1)).first()
            if row is not None:
                found.setdefault(metric, {})[label] = Point(*row)
    return found


def forecasts(metrics: Session, metric: str, t0: float, t1: float) -> Sequence[Forecast]:
    """Oldest first."""
    return metrics.scalars(
        select(Forecast)
        .where(Forecast.metric == metric, Forecast.at >= t0, Forecast.at < t1)
        .order_by(Forecast.at)
    ).all()


def _series(metric: str, label: str, t0: float, t1: float) -> tuple[Any, ...]:
    return Sample.metric == str(metric), Sample.label == label, Sample.at >= t0, Sample.at < t1


# Source: sqlite.org/optoverview.html: DISTINCT reads every row; one seek a label is what is wanted.
_LABELS = """
WITH RECURSIVE
found(label) AS (
    SELECT min(label) FROM sample WHERE metric = :metric
    UNION ALL
    SELECT (SELECT min(label) FROM sample WHERE metric = :metric AND label > found.label)
    FROM found WHERE found.label IS NOT NULL
),
rolled(label) AS (
    SELECT min(label) FROM sample_rollup WHERE metric = :metric
    UNION ALL
    SELECT (SELECT min(label) FROM sample_rollup WHERE metric = :metric AND label > rolled.label)
    FROM rolled WHERE rolled.label IS NOT NULL
)
SELECT label FROM found WHERE label IS NOT NULL UNION SELECT label FROM rolled WHERE label IS NOT NULL
ORDER BY label
"""
