"""Rows as people look through them: recommendations, levels, checks, anomalies of a time range. Newest first."""

from collections.abc import Sequence

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from store.tables import (
    AlphaSpend,
    Anomaly,
    Change,
    Experiment,
    ForecastFit,
    QualityCheck,
    Recommendation,
    Sample,
    Slice,
    Trial,
    Verdict,
)


def recommendations(journal: Session, limit: int = 100) -> Sequence[Recommendation]:
    """Open, decided and expired ones."""
    newest = select(Recommendation).order_by(Recommendation.recommendation_id.desc()).limit(limit)
    return journal.scalars(newest).all()


def verdicts_by_experiment(journal: Session, experiment_ids: Sequence[str]) -> dict[str, Verdict]:
    """experiment_id -> verdict, of those that have one."""
    found = journal.scalars(select(Verdict).where(Verdict.experiment_id.in_(experiment_ids)))
    return {verdict.experiment_id: verdict for verdict in found}


def trials_by_experiment(journal: Session, experiment_ids: Sequence[str]) -> dict[str, Trial]:
    """experiment_id of a probe -> its trial."""
    found = journal.scalars(select(Trial).where(Trial.experiment_id.in_(experiment_ids)))
    return {trial.experiment_id: trial for trial in found if trial.experiment_id is not None}


def alpha_spends(journal: Session, snapshot_id: str) -> Sequence[tuple[AlphaSpend, Experiment]]:
    """Every test of the snapshot with the level that it was given, oldest first."""
    rows = (
        select(AlphaSpend, Experiment)
        .join(Experiment, Experiment.experiment_id == AlphaSpend.experiment_id)
        .where(AlphaSpend.snapshot_id == snapshot_id)
        .order_by(AlphaSpend.alpha_spend_id)
    )
    return [(spend, experiment) for spend, experiment in journal.execute(rows)]


def anomalies_between(journal: Session, t0: float, t1: float, limit: int = 1000) -> Sequence[Anomaly]:
    """Anomalies that were open at some time of the interval."""
    found = select(Anomaly).where(
        Anomaly.started_at < t1, or_(Anomaly.ended_at.is_(None), Anomaly.ended_at >= t0)
    )
    return journal.scalars(found.order_by(Anomaly.started_at.desc()).limit(limit)).all()


def changes_between(journal: Session, t0: float, t1: float, limit: int = 1000) -> Sequence[Change]:
    """Changes of every kind and state that were written in the interval."""
    found = select(Change).where(Change.created_at >= t0, Change.created_at < t1)
    return journal.scalars(found.order_by(Change.change_id.desc()).limit(limit)).all()


def quality_checks(journal: Session, limit: int = 20) -> Sequence[QualityCheck]:
    newest = select(QualityCheck).order_by(QualityCheck.quality_check_id.desc()).limit(limit)
    return journal.scalars(newest).all()


def forecast_fits(metrics: Session) -> Sequence[ForecastFit]:
    """The state of each metric's forecast, by metric."""
    return metrics.scalars(select(ForecastFit).order_by(ForecastFit.metric)).all()


def newest_sample_at(metrics: Session, metric: str, label: str) -> float | None:
    """When a series was sampled last; None where never."""
    newest = select(Sample.at).where(Sample.metric == str(metric), Sample.label == label)
    return metrics.scalars(newest.order_by(Sample.at.desc()).limit(1)).first()


def scored_pairs_by_experiment(journal: Session, experiment_ids: Sequence[str]) -> dict[str, int]:
    """experiment_id -> pairs of which both slices were scored; experiments without any are left out."""
    pairs = (
        select(Slice.experiment_id, Slice.pair_index)
        .where(Slice.experiment_id.in_(experiment_ids), Slice.state == "SCORED")
        .group_by(Slice.experiment_id, Slice.pair_index)
        .having(func.count() == 2)
        .subquery()
    )
    counted = select(pairs.c.experiment_id, func.count()).group_by(pairs.c.experiment_id)
    return {row[0]: row[1] for row in journal.execute(counted)}
