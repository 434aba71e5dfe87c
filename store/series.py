"""A metric over any time range, at the resolution that the range deserves.

A chart of an hour reads samples, one of a fortnight minutes, one of a year hours. Where the wanted resolution
does not reach (too old, or not rolled up yet) the next one that does fills in.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from sqlalchemy.orm import Session

from store.rollups import HOUR_S, MINUTE_S, SeriesKey, binned, span_of

TIERS = (0, MINUTE_S, HOUR_S)  # from fine to coarse; 0 are the samples
# Multiples of each other where it matters: a bin of a tier lies in one bin of the chart, whatever the range.
WIDTHS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400)


class Bin(NamedTuple):
    """The samples of one interval, which starts at `at`."""

    at: float
    mean: float
    low: float
    high: float
    num: int


@dataclass(frozen=True)
class Series:
    """`bins` are `width_s` long (older ones may be longer), oldest first; one without samples is absent."""

    width_s: float
    bins: tuple[Bin, ...]


def series(metrics: Session, metric: str, label: str, t0: float, t1: float, max_points: int = 300) -> Series:
    """At most `max_points` bins over [t0, t1), aligned to the clock so that a chart does not flicker.

    The first bin may begin before t0, since what was rolled up cannot be cut.

    Raises:
        ValueError: t1 is not after t0, one is no finite number, or fewer than two points are asked for.
    """
    if not (math.isfinite(t0) and math.isfinite(t1) and t0 < t1):
        raise ValueError(f"A range must be finite and end after its start, but got {t0} to {t1}.")
    if max_points < 2:
        raise ValueError(f"`max_points` must be at least 2, but got {max_points}.")
    key = SeriesKey(str(metric), label)
    width_s = width_for(t1 - t0, max_points)
    found: dict[float, Bin] = {}
    for tier, start, end in _segments(metrics, key, t0, t1, width_s):
        for row in binned(metrics, key, tier, start, end, width_s):
            one = Bin(*row)
            found[one.at] = _merged(found[one.at], one) if one.at in found else one
    return Series(width_s, tuple(found[at] for at in sorted(found)))


def width_for(span_s: float, max_points: int) -> float:
    """The narrowest bin of which `max_points` cover the span wherever it begins."""
    wanted = span_s / (max_points - 1)
    return float(
        next(
            (width for width in WIDTHS_S if width >= wanted), math.ceil(wanted / WIDTHS_S[-1]) * WIDTHS_S[-1]
        )
    )


class _Segment(NamedTuple):
    tier: int
    start: float
    end: float


def _segments(metrics: Session, key: SeriesKey, t0: float, t1: float, width_s: float) -> list[_Segment]:
    """Which tier answers for which part: the coarsest that is fine enough; then finer up to now, coarser before."""
    spans = {tier: span_of(metrics, key, tier) for tier in TIERS}
    fine_enough = [tier for tier in TIERS if tier <= width_s]
    coarser = [tier for tier in TIERS if tier > width_s]
    segments: list[_Segment] = []
    left = right = None
    for tier in (*reversed(fine_enough), *coarser):
        span = spans[tier]
        if span is None:
            continue
        start = t0 if tier == 0 else math.floor(t0 / tier) * tier  # a bin that holds t0 belongs to the range
        end = span.end_at if tier else math.nextafter(span.end_at, math.inf)  # the last sample too
        reach = (max(start, span.start_at), min(t1, end))
        if left is None or right is None:
            if reach[0] < reach[1]:
                segments.append(_Segment(tier, *reach))
                left, right = reach
            continue
        whole_until = math.nextafter(
            left - tier, math.inf
        )  # a bin that reaches further is told by finer ones
        if t0 < left and reach[0] < whole_until:
            segments.append(_Segment(tier, reach[0], min(whole_until, reach[1])))
            left = reach[0]
        if reach[1] > right:
            segments.append(_Segment(tier, max(right, reach[0]), reach[1]))
            right = reach[1]
    return segments


def _merged(one: Bin, other: Bin) -> Bin:
    """One bin of the chart that two tiers share."""
    num = one.num + other.num
    mean = (one.mean * one.num + other.mean * other.num) / num
    return Bin(one.at, mean, min(one.low, other.low), max(one.high, other.high), num)
