"""Writing samples and forecasts."""

import math
from collections.abc import Iterable

from sqlalchemy import insert
from sqlalchemy.orm import Session

from store.tables import Forecast, Sample, table_of


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
