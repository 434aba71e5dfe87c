"""When a rule fires and when it is over: held long enough, seen often enough, and cleared at another threshold.

    quiet ──beyond trigger for hold_s, min_samples times──▶ open ──not beyond clear for clear_s──▶ quiet

A value that is missing neither confirms nor denies. Pure: time comes with the values.
"""

from dataclasses import dataclass, field
from typing import Literal

STALE_S = 180.0  # two values further apart than this are no unbroken run; a slice of a challenger is shorter

Event = Literal["opened", "closed"]


@dataclass(frozen=True)
class Band:
    """`rises`: beyond means above; otherwise below. At the threshold itself is not beyond. Durations in s."""

    trigger: float
    clear: float
    hold_s: float
    clear_s: float
    min_samples: int = 1
    rises: bool = True

    def is_beyond(self, value: float, threshold: float) -> bool:
        return value > threshold if self.rises else value < threshold

    def worse(self, one: float, other: float) -> float:
        return max(one, other) if self.rises else min(one, other)


@dataclass
class Hold:
    """One rule on one label."""

    is_open: bool = False
    since_at: float | None = None  # the first value of the run that is beyond the trigger
    clear_since_at: float | None = None  # the first value of the run that is not beyond the clear threshold
    last_at: float | None = None
    worst: float | None = None
    num_beyond: int = field(default=0)

    def advance(self, band: Band, value: float, now: float) -> Event | None:
        """Takes the next value, at a time later than the one before."""
        if self.last_at is not None and now - self.last_at > STALE_S:
            self.clear_since_at = None
            if not self.is_open:
                self.since_at, self.num_beyond = None, 0
        self.last_at = now
        return self._while_open(band, value, now) if self.is_open else self._while_quiet(band, value, now)

    def _while_quiet(self, band: Band, value: float, now: float) -> Event | None:
        if not band.is_beyond(value, band.trigger):
            self.since_at, self.worst, self.num_beyond = None, None, 0
            return None
        self.since_at = now if self.since_at is None else self.since_at
        self.worst = value if self.worst is None else band.worse(self.worst, value)
        self.num_beyond += 1
        if now - self.since_at < band.hold_s or self.num_beyond < band.min_samples:
            return None
        self.is_open, self.clear_since_at = True, None
        return "opened"

    def _while_open(self, band: Band, value: float, now: float) -> Event | None:
        self.worst = value if self.worst is None else band.worse(self.worst, value)
        if band.is_beyond(value, band.clear):
            self.clear_since_at = None
            return None
        self.clear_since_at = now if self.clear_since_at is None else self.clear_since_at
        if now - self.clear_since_at < band.clear_s:
            return None
        self.is_open, self.since_at, self.num_beyond = False, None, 0
        return "closed"
