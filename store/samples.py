"""Writing samples and forecasts, and letting what was measured age: fewer, coarser, gone."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Integer, case, cast, delete, func, insert, select
from sqlalchemy.orm import Session

from store.metrics import METRICS, Summary
from store.queries import labels_of
from store.tables import Forecast, RequestTiming, RuntimeEvent, Sample, Step, table_of

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
LOOK_BACK_S = 7 * DAY_S  # older samples have been thinned by now, or the daemon was off
MAX_PAGES_FREED = 4096


@dataclass(frozen=True)
class Retention:
    """How long metrics are kept, in seconds; samples older than `raw_samples_s` become one for each `bin_s`."""

    raw_samples_s: float = DAY_S
    bin_s: float = 60.0
    samples_s: float = 90 * DAY_S
    steps_s: float = DAY_S
    timings_s: float = 7 * DAY_S


def save_samples(metrics: Session, samples: Iterable[Sample]) -> int:
    """Adds samples, in place of those of the same metric, label and time. Returns how many.

    A value that is no finite number is a measurement that failed: it is left out.
    """
    rows = [
        {
            "metric": str(s.metric),
            "label": s.label,
            "at": s.at,
            "value": float(s.value),
            "config_id": s.config_id,
        }
        for s in samples
        if math.isfinite(s.value)
    ]
    if rows:
        metrics.execute(insert(table_of(Sample)).prefix_with("OR REPLACE"), rows)
    return len(rows)


def save_forecasts(metrics: Session, forecasts: Iterable[Forecast]) -> None:
    """Adds forecasts, in place of older ones of the same metric and time."""
    names = [column.name for column in table_of(Forecast).columns]
    rows = [{name: getattr(forecast, name) for name in names} for forecast in forecasts]
    if rows:
        metrics.execute(insert(table_of(Forecast)).prefix_with("OR REPLACE"), rows)


def let_age(metrics: Session, now: float, retention: Retention = Retention()) -> None:
    """Thins and deletes what is older than `retention` says. Meant for once an hour; may come as often as you like."""
    metrics.execute(delete(Step).where(Step.at < now - retention.steps_s))
    metrics.execute(delete(RequestTiming).where(RequestTiming.arrived_at < now - retention.timings_s))
    metrics.execute(delete(RuntimeEvent).where(RuntimeEvent.at < now - retention.samples_s))
    metrics.execute(delete(Forecast).where(Forecast.at < now - retention.samples_s))
    for metric in METRICS:
        for label in labels_of(metrics, metric):
            series = (Sample.metric == str(metric), Sample.label == label)
            metrics.execute(delete(Sample).where(*series, Sample.at < now - retention.samples_s))
            _thin(metrics, series, METRICS[metric].summary, now - retention.raw_samples_s, retention.bin_s)
    # Gives pages back to the disk. One step of the statement frees one page, hence the fetch.
    connection: Any = metrics.connection().connection.driver_connection
    connection.execute(f"PRAGMA incremental_vacuum({MAX_PAGES_FREED})").fetchall()


def _thin(metrics: Session, series: tuple[Any, Any], summary: Summary, before: float, bin_s: float) -> None:
    """Puts one sample for each whole bin in place of the raw ones. A thinned one stands at the start of its bin."""
    start = cast(Sample.at / bin_s, Integer) * bin_s
    recent = (*series, Sample.at >= before - LOOK_BACK_S, Sample.at < math.floor(before / bin_s) * bin_s)
    first = metrics.scalar(select(func.min(Sample.at)).where(*recent, Sample.at != start))
    if first is None:
        return
    raw = (*recent, Sample.at >= math.floor(first / bin_s) * bin_s)
    value = func.max(Sample.value) if summary == "max" else func.avg(Sample.value)
    config_id = case((func.count(Sample.config_id.distinct()) == 1, func.max(Sample.config_id)), else_=None)
    bins = select(
        Sample.metric, Sample.label, start.label("at"), value.label("value"), config_id.label("config_id")
    )
    rows = [row._asdict() for row in metrics.execute(bins.where(*raw).group_by(start))]
    metrics.execute(delete(Sample).where(*raw))
    metrics.execute(insert(table_of(Sample)), rows)
