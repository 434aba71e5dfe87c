"""What the daemon reads and writes to notice: open anomalies, the past of a series, forecasts. In open sessions."""

from collections.abc import Collection, Iterable, Sequence

from sqlalchemy import Integer, cast, func, select
from sqlalchemy.orm import Session

from store.tables import (
    Anomaly,
    Champion,
    Change,
    Forecast,
    ForecastFit,
    QualityCheck,
    Sample,
    SampleRollup,
    Study,
)

MAX_EPISODES = 20  # that one anomaly remembers

# --- one anomaly ----------------------------------------------------------------------------------


def begin_again(anomaly: Anomaly, at: float, reason: str) -> None:
    """It had ended and came back: the same anomaly with another episode, the worst of all its values, today's words."""
    done = [*anomaly.details.get("episodes", ()), [*episodes(anomaly)[-1]]]
    anomaly.details = {
        **anomaly.details,
        "episodes": done[-MAX_EPISODES:],
        "num_returns": anomaly.details.get("num_returns", 0) + 1,
        "returned_at": at,
    }
    anomaly.ended_at, anomaly.reason = None, reason


def episodes(anomaly: Anomaly) -> list[tuple[float, float | None]]:
    """Start and end of each time it was there, oldest first; the last one may still be open."""
    earlier = [(start_at, end_at) for start_at, end_at in anomaly.details.get("episodes", ())]
    return [*earlier, (anomaly.details.get("returned_at", anomaly.started_at), anomaly.ended_at)]


# --- journal --------------------------------------------------------------------------------------


def open_anomalies(journal: Session) -> Sequence[Anomaly]:
    """Oldest first."""
    return journal.scalars(
        select(Anomaly).where(Anomaly.ended_at.is_(None)).order_by(Anomaly.anomaly_id)
    ).all()


def recent_anomalies(journal: Session, since_at: float) -> Sequence[Anomaly]:
    """Those that ended since then, oldest first: what a cool-down has to know."""
    return journal.scalars(
        select(Anomaly).where(Anomaly.ended_at >= since_at).order_by(Anomaly.anomaly_id)
    ).all()


def studied_anomalies(journal: Session) -> set[int]:
    """Numbers of the conditions for which a study was started."""
    found = journal.scalars(select(Study.anomaly_id).where(Study.anomaly_id.is_not(None))).all()
    return {number for number in found if number is not None}


def change_before(journal: Session, at: float, within_s: float) -> int | None:
    """The newest change of configuration that was applied at most so long before; None where there was none."""
    return journal.scalars(
        select(Change.change_id)
        .where(
            Change.state == "APPLIED",
            Change.applied_at.between(at - within_s, at),
            Change.from_config_id.is_distinct_from(Change.to_config_id),
        )
        .order_by(Change.change_id.desc())
        .limit(1)
    ).first()


def champion_ids(journal: Session, snapshot_id: str) -> set[str]:
    """Every configuration that was champion of this snapshot."""
    return set(
        journal.scalars(
            select(Champion.config_id).where(Champion.snapshot_id == snapshot_id).distinct()
        ).all()
    )


def last_quality_checks(journal: Session, snapshot_id: str, limit: int) -> Sequence[QualityCheck]:
    """The newest periodic ones, newest first."""
    return journal.scalars(
        select(QualityCheck)
        .where(QualityCheck.snapshot_id == snapshot_id, QualityCheck.kind == "periodic")
        .order_by(QualityCheck.quality_check_id.desc())
        .limit(limit)
    ).all()


# --- metrics --------------------------------------------------------------------------------------


def past_bins(
    metrics: Session,
    metric: str,
    label: str,
    t0: float,
    t1: float,
    bin_s: float,
    config_ids: Collection[str] | None,
) -> list[tuple[float, float]]:
    """(start, mean) of the bins of [t0, t1) that hold a sample, oldest first; only of these configurations if given."""
    start = cast(Sample.at / bin_s, Integer) * bin_s
    found = select(start.label("start"), func.avg(Sample.value)).where(
        Sample.metric == metric, Sample.label == label, Sample.at >= t0, Sample.at < t1
    )
    if config_ids is not None:
        found = found.where(Sample.config_id.in_(config_ids))
    return [
        (float(at), float(value)) for at, value in metrics.execute(found.group_by("start").order_by("start"))
    ]


def past_minutes(
    metrics: Session, metric: str, label: str, t0: float, t1: float, config_ids: Collection[str] | None
) -> list[tuple[float, float]]:
    """(start, mean) of the minutes of [t0, t1) that were rolled up, oldest first; of these configurations if given."""
    found = select(SampleRollup.at, SampleRollup.mean).where(
        SampleRollup.metric == metric,
        SampleRollup.label == label,
        SampleRollup.bin_s == 60,
        SampleRollup.at >= t0,
        SampleRollup.at < t1,
    )
    if config_ids is not None:
        found = found.where(SampleRollup.config_id.in_(config_ids))
    return [(float(at), float(value)) for at, value in metrics.execute(found.order_by(SampleRollup.at))]


def latest_bands(
    metrics: Session, metric: str, since_at: float, fitted_at: float
) -> list[tuple[float, float, float, float]]:
    """(at, expected, low, high) from then on, oldest first; of this fit alone."""
    found = select(Forecast.at, Forecast.expected, Forecast.low, Forecast.high).where(
        Forecast.metric == metric, Forecast.at >= since_at, Forecast.fitted_at == fitted_at
    )
    return [(row.at, row.expected, row.low, row.high) for row in metrics.execute(found.order_by(Forecast.at))]


def forecast_fits(metrics: Session) -> Sequence[ForecastFit]:
    """The last fit of every metric that was tried, by name."""
    return metrics.scalars(select(ForecastFit).order_by(ForecastFit.metric)).all()


def save_forecast_fits(metrics: Session, fits: Iterable[ForecastFit]) -> None:
    """Adds them, each in place of the last one of its metric."""
    for fit in fits:
        metrics.merge(fit)
