"""Coarser bins of the samples: 1 s -> 60 s -> 3600 s. Each bin is written once, when it is over.

    sample ──roll_up(.., MINUTE_S)──▶ sample_rollup of 60 s ──roll_up(.., HOUR_S)──▶ sample_rollup of 3600 s

Nothing else remembers how far this has come: the newest bin of a series says it. A process that is killed in
between goes on where it was, and a clock that jumps leaves a gap, not a stall.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import text
from sqlalchemy.orm import Session

MINUTE_S = 60
HOUR_S = 3600
LATE_S = 5.0  # a tick's samples are written this long after their instant at the latest
MAX_SPAN_S = {
    MINUTE_S: 2 * 3600.0,
    HOUR_S: 14 * 86400.0,
}  # a call reads at most this much: it must stay short


class SeriesKey(NamedTuple):
    metric: str
    label: str


class Span(NamedTuple):
    """From the first sample to the end of the last bin."""

    start_at: float
    end_at: float


def roll_up(metrics: Session, key: SeriesKey, bin_s: int, now: float) -> bool:
    """Writes the bins of one series that are over and not written yet. True: there are more, call again.

    `bin_s` is MINUTE_S (from samples) or HOUR_S (from minutes, which must have been rolled up before).
    """
    end_at = math.floor((now - LATE_S) / bin_s) * bin_s
    done_until = rolled_up_until(metrics, key, bin_s, end_at)
    first = _first_at(metrics, key, bin_s, done_until)
    if first is None or first >= end_at:
        return False
    start_at = math.floor(first / bin_s) * bin_s
    until = min(end_at, start_at + MAX_SPAN_S[bin_s])
    metrics.execute(
        _MINUTES if bin_s == MINUTE_S else _HOURS,
        {**key._asdict(), "bin_s": bin_s, "t0": start_at, "t1": until},
    )
    return until < end_at


def rolled_up_until(metrics: Session, key: SeriesKey, bin_s: int, before: float = math.inf) -> float:
    """The end of the newest bin of a series that starts before `before`; minus infinity where there is none."""
    found = metrics.execute(_NEWEST, {**key._asdict(), "bin_s": bin_s, "before": before}).scalar()
    return -math.inf if found is None else float(found) + bin_s


def span_of(metrics: Session, key: SeriesKey, bin_s: int) -> Span | None:
    """What stands of a series at this resolution; 0 is that of the samples themselves."""
    statement = _SAMPLE_SPAN if bin_s == 0 else _ROLLUP_SPAN
    first, last = metrics.execute(statement, {**key._asdict(), "bin_s": bin_s}).one()
    return None if first is None else Span(float(first), float(last) + bin_s)


def binned(
    metrics: Session, key: SeriesKey, bin_s: int, t0: float, t1: float, width_s: float
) -> Sequence[tuple[float, float, float, float, int]]:
    """(start, mean, low, high, number of samples) for each `width_s` that holds any, from one resolution."""
    statement = _BINNED_SAMPLES if bin_s == 0 else _BINNED_ROLLUPS
    values = {**key._asdict(), "bin_s": bin_s, "t0": t0, "t1": t1, "width_s": width_s}
    return [(row[0], row[1], row[2], row[3], row[4]) for row in metrics.execute(statement, values)]


def _first_at(metrics: Session, key: SeriesKey, bin_s: int, since: float) -> float | None:
    statement = _FIRST_SAMPLE if bin_s == MINUTE_S else _FIRST_MINUTE
    found: Any = metrics.execute(statement, {**key._asdict(), "since": since}).scalar()
    return None if found is None else float(found)


# Every statement seeks along a primary key that starts with the series; none reads another series' rows.
_NEWEST = text(
    "SELECT max(at) FROM sample_rollup WHERE metric = :metric AND label = :label AND bin_s = :bin_s AND at < :before"
)
_FIRST_SAMPLE = text("SELECT min(at) FROM sample WHERE metric = :metric AND label = :label AND at >= :since")
_FIRST_MINUTE = text(
    "SELECT min(at) FROM sample_rollup WHERE metric = :metric AND label = :label AND bin_s = 60 AND at >= :since"
)
_SAMPLE_SPAN = text(
    "SELECT (SELECT min(at) FROM sample WHERE metric = :metric AND label = :label), "
    "(SELECT max(at) FROM sample WHERE metric = :metric AND label = :label)"
)
_ROLLUP_SPAN = text(
    "SELECT (SELECT min(at) FROM sample_rollup WHERE metric = :metric AND label = :label AND bin_s = :bin_s), "
    "(SELECT max(at) FROM sample_rollup WHERE metric = :metric AND label = :label AND bin_s = :bin_s)"
)
_ONE_CONFIG = (
    "CASE WHEN count(DISTINCT config_id) = 1 AND count(config_id) = count(*) THEN max(config_id) END"
)
_MINUTES = text(
    f"""
    INSERT OR REPLACE INTO sample_rollup (metric, label, bin_s, at, num_samples, mean, low, high, config_id)
    SELECT metric, label, :bin_s, CAST(at / :bin_s AS INTEGER) * :bin_s,
           count(*), avg(value), min(value), max(value), {_ONE_CONFIG}
    FROM sample WHERE metric = :metric AND label = :label AND at >= :t0 AND at < :t1
    GROUP BY CAST(at / :bin_s AS INTEGER)
    """
)
_HOURS = text(
    f"""
    INSERT OR REPLACE INTO sample_rollup (metric, label, bin_s, at, num_samples, mean, low, high, config_id)
    SELECT metric, label, :bin_s, CAST(at / :bin_s AS INTEGER) * :bin_s,
           sum(num_samples), sum(mean * num_samples) / sum(num_samples), min(low), max(high), {_ONE_CONFIG}
    FROM sample_rollup WHERE metric = :metric AND label = :label AND bin_s = 60 AND at >= :t0 AND at < :t1
    GROUP BY CAST(at / :bin_s AS INTEGER)
    """
)
_BINNED_SAMPLES = text(
    """
    SELECT CAST(at / :width_s AS INTEGER) * :width_s AS start, avg(value), min(value), max(value), count(*)
    FROM sample WHERE metric = :metric AND label = :label AND at >= :t0 AND at < :t1
    GROUP BY start ORDER BY start
    """
)
_BINNED_ROLLUPS = text(
    """
    SELECT CAST(at / :width_s AS INTEGER) * :width_s AS start,
           sum(mean * num_samples) / sum(num_samples), min(low), max(high), sum(num_samples)
    FROM sample_rollup WHERE metric = :metric AND label = :label AND bin_s = :bin_s AND at >= :t0 AND at < :t1
    GROUP BY start ORDER BY start
    """
)
