"""When the champion is tried against itself: now and then, at all hours, so that its false alarms are known. Pure.

Such an experiment changes nothing for anybody; it only needs time in which nothing else is tried. The gap
between two of them follows from the share of the time that they may take, and is stretched by half more or
less at random, so that over days they fall into every hour and never in step with a job that runs each hour.
"""

import hashlib

from store.evidence import FalsePromotionRate

LEAST, SPREAD = 0.5, 1.0  # of the mean gap


def due_at(last_at: float, duration_s: float, share: float) -> float:
    """When the next one may start, given when the last one (or the present champion's reign) did.

    The stretch is drawn from `last_at` itself: a daemon that is started again comes to the same instant.
    """
    if share <= 0.0:
        return float("inf")
    drawn = int.from_bytes(hashlib.sha256(repr(last_at).encode()).digest()[:6]) / 2**48
    return last_at + duration_s / share * (LEAST + SPREAD * drawn)


def false_alarm_words(seen: FalsePromotionRate) -> str:
    """`A/A so far: 1 of 23 promoted, 4.3 % (95 % interval 0.1 to 21.9 %), allowed 5 %; 14 of 24 hours seen.`"""
    rate = seen.rate
    if not rate.total:
        return "A/A so far: none."
    allowed = "" if seen.level is None else f", allowed {seen.level:.0%}"
    return (
        f"A/A so far: {rate.num} of {rate.total} promoted, {rate.ratio:.1%} (95 % interval {rate.low:.1%} to "
        f"{rate.high:.1%}){allowed}; {seen.num_hours} of 24 hours seen."
    )
