"""What the experiments taught about the tuner itself: gains that stayed, false alarms, harm done.

Named reads of the journal. Everything is counted from rows that stand there for other reasons too, so each
figure can be counted again. The last two read the metrics.
"""

import math
from collections.abc import Collection
from datetime import UTC, datetime
from statistics import fmean
from typing import NamedTuple

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from store.interval import Rate, anytime_interval
from store.tables import Change, Experiment, RequestTiming, Slice, Verdict

INTERVAL_ALPHA = 0.05


class RealisedGain(NamedTuple):
    """What a promotion is worth by its holdback pairs: the former champion, asked again. Ratios: 0.1 is 10 % lower.

    The interval is anytime-valid (95 %); None while too few pairs are scored.
    """

    change_id: int
    num_pairs: int
    gain_ratio: float | None
    low_ratio: float | None
    high_ratio: float | None
    promised_ratio: float | None  # by the verdict; an early stop flatters it


class FalsePromotionRate(NamedTuple):
    """Experiments of the champion against itself, and how many of them the judge would have promoted."""

    rate: Rate
    level: float | None  # what each was allowed; None where there was none or they differ
    num_stopped: int  # of `rate.total`: stopped for harm, which a champion cannot do itself
    num_hours: int  # hours of the day (UTC) that they have seen, of 24


def realised_gain(journal: Session, change_id: int | None = None) -> RealisedGain | None:
    """Of one promotion, the newest if none is named; None where there is no such promotion."""
    found = select(Change).where(Change.kind == "promote", Change.state == "APPLIED")
    if change_id is not None:
        found = found.where(Change.change_id == change_id)
    change = journal.scalars(found.order_by(Change.change_id.desc()).limit(1)).first()
    if change is None or change.applied_at is None:
        return None
    verdict = journal.get(Verdict, change.verdict_id) if change.verdict_id is not None else None
    promised = None if verdict is None or verdict.effect_ratio is None else -verdict.effect_ratio
    differences = holdback_differences(journal, change)
    interval = anytime_interval(differences, INTERVAL_ALPHA)
    return RealisedGain(
        change_id=change.change_id,
        num_pairs=len(differences),
        gain_ratio=1.0 - math.exp(-fmean(differences)) if differences else None,
        low_ratio=None if interval is None else 1.0 - math.exp(-interval.low),
        high_ratio=None if interval is None else 1.0 - math.exp(-interval.high),
        promised_ratio=promised,
    )


def holdback_differences(journal: Session, change: Change) -> list[float]:
    """Of every holdback pair of a promotion: the former champion's response less the promoted one's, log units."""
    slices = journal.scalars(
        select(Slice)
        .join(Experiment, Experiment.experiment_id == Slice.experiment_id)
        .where(
            Experiment.kind == "holdback",
            Experiment.champion_config_id == change.to_config_id,
            Experiment.challenger_config_id == change.from_config_id,
            Experiment.created_at >= change.applied_at,
            Slice.state == "SCORED",
        )
        .order_by(Slice.planned_start_at)
    ).all()
    pairs: dict[tuple[str, int], dict[str, float]] = {}
    for row in slices:
        if row.response is not None:
            pairs.setdefault((row.experiment_id, row.pair_index), {})[row.arm] = row.response
    return [pair["challenger"] - pair["champion"] for pair in pairs.values() if len(pair) == 2]


def last_holdback_at(journal: Session, change: Change) -> float | None:
    """When the newest holdback pair of a promotion was opened."""
    return journal.scalars(
        select(Experiment.created_at)
        .where(
            Experiment.kind == "holdback",
            Experiment.challenger_config_id == change.from_config_id,
            Experiment.created_at >= change.applied_at,
        )
        .order_by(Experiment.created_at.desc())
        .limit(1)
    ).first()


def false_promotion_rate(
    journal: Session, snapshot_id: str | None = None, since_at: float = 0.0
) -> FalsePromotionRate:
    """Counts `aa` experiments that were judged or stopped for harm; one cut short by other things is no test."""
    found = (
        select(Experiment.created_at, Experiment.state, Verdict.outcome, Verdict.level)
        .join(Verdict, Verdict.experiment_id == Experiment.experiment_id)
        .where(
            Experiment.kind == "aa",
            Experiment.created_at >= since_at,
            (Experiment.state == "DECIDED") | Experiment.reason.startswith("harm: "),
        )
    )
    if snapshot_id is not None:
        found = found.where(Experiment.snapshot_id == snapshot_id)
    rows = journal.execute(found).all()
    levels = {row.level for row in rows}
    return FalsePromotionRate(
        rate=Rate.of(sum(row.outcome == "PROMOTE" for row in rows), len(rows)),
        level=levels.pop() if len(levels) == 1 else None,
        num_stopped=sum(row.state == "STOPPED" for row in rows),
        num_hours=len({datetime.fromtimestamp(row.created_at, UTC).hour for row in rows}),
    )


def harm_spent_s(journal: Session, since_at: float) -> float:
    """Request-seconds that challengers have cost since then, as recorded when their experiments ended."""
    found = select(Experiment.planning).where(Experiment.ended_at >= since_at)
    return math.fsum(planning.get("harm", {}).get("excess_s", 0.0) for planning in journal.scalars(found))


def last_experiment_at(journal: Session, kind: str, snapshot_id: str) -> float | None:
    """When the newest experiment of a kind was opened."""
    return journal.scalars(
        select(Experiment.created_at)
        .where(Experiment.kind == kind, Experiment.snapshot_id == snapshot_id)
        .order_by(Experiment.created_at.desc())
        .limit(1)
    ).first()


class RequestSeconds(NamedTuple):
    """Finished requests and the time they spent in the system, together."""

    num: int
    total_s: float


_SPENT = select(
    func.count(), func.coalesce(func.sum(RequestTiming.finished_at - RequestTiming.arrived_at), 0.0)
)


def request_seconds_of(metrics: Session, slice_ids: Collection[str]) -> RequestSeconds:
    """Of the requests that arrived in these slices, burn-in included."""
    return RequestSeconds(*metrics.execute(_SPENT.where(RequestTiming.arrival_slice.in_(slice_ids))).one())


def request_seconds_between(metrics: Session, t0: float, t1: float) -> RequestSeconds:
    """Of the requests that arrived in the interval."""
    spans = RequestTiming.arrived_at >= t0, RequestTiming.arrived_at < t1
    return RequestSeconds(*metrics.execute(_SPENT.where(*spans)).one())
