"""Layer B: statistics of one series at 10 s, against its own last hours. Pure: bins in, votes and states out.

    bin ─▶ less its baseline = residual ─▶ robust z · CUSUM · shift of level · spread · flat line ─▶ 3 of 5 ─▶ state

The baseline is the line through the medians of an hour that ended eight minutes ago. Every statistic
is judged by the spread that the same statistic had before in this series, so that bursty traffic, whose minutes
differ more than independent ones would, does not count as news.

Source: Page 1954 (CUSUM; k and h in robust sd); the medians and MAD of Rousseeuw and Croux 1993.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tuner.notice.ring import Ring

BIN_S = 10.0
MIN_BINS = 180  # half an hour
LEVEL_BINS = 12  # two minutes, whose mean is compared with the baseline
LAG = 48  # the newest bins are no part of the baseline: what is judged must not draw it along
TREND_SHARE = 0.6  # of the hour's slope that is carried on: all of it follows noise and drifts too far
HALF = 174  # bins of each half of the baseline's hour
YOUNG_BLOCKS = (
    25.0  # thresholds are twice as wide when so many spans of two minutes are known, three times at 12
)
SPREAD_BINS = 120
FLAT_BINS = 60
KEPT_BINS = 25_920  # three days
EVERY = 6  # of the slow statistics each sixth value is kept
RESCALE_EVERY = 60  # bins between two looks at the spread of the past
RESTART_GAP_S = 1800.0
VOTES, OF_LAST = 3, 5
RECOVER_BINS = 30  # five clean minutes

What = Literal["spike", "shift", "drift", "spread", "flat"]


class State(Enum):
    LEARNING = "learning"
    OK = "ok"
    SUSPECT = "suspect"
    ANOMALOUS = "anomalous"
    RECOVERING = "recovering"
    STALE = "stale"


@dataclass(frozen=True)
class Thresholds:
    """In robust sd of the statistic's own past. `cusum_h` and `cusum_k` are Page's."""

    z: float = 6.0
    cusum_k: float = 0.5
    cusum_h: float = 12.0
    level: float = 5.0
    spread: float = 4.0
    spread_ratio: float = 1.4  # and the sd itself must have grown by so much

    def times(self, factor: float) -> "Thresholds":
        return replace(
            self,
            z=self.z * factor,
            cusum_h=self.cusum_h * factor,
            level=self.level * factor,
            spread=self.spread * factor,
        )


@dataclass
class Scales:
    """How far residual, runs, levels and spreads went in the past; judged units. None: not known yet."""

    point: float
    run: float
    level: float
    spread: float
    largest: float  # residual in health
    num: int


@dataclass
class Seen:
    """What one bin showed. `score` is its worst statistic over its threshold: 1 is just beyond."""

    at: float
    value: float
    expected: float | None = None
    what: What | None = None
    score: float = 0.0


@dataclass
class Detector:
    """One series, in judged units. floor: smallest sd believed. smallest_shift: of a level, what is worth a word."""

    floor: float
    smallest_shift: Callable[[float], float] = lambda level: 0.05 * abs(level)
    thresholds: Thresholds = field(default_factory=Thresholds)
    state: State = State.LEARNING
    num_bins: int = 0
    scales: Scales | None = None
    seen: Seen | None = None
    _recent: Ring = field(default_factory=lambda: Ring(2 * HALF + LAG))
    _residuals: Ring = field(default_factory=lambda: Ring(KEPT_BINS))
    _levels: Ring = field(default_factory=lambda: Ring(KEPT_BINS // EVERY))
    _spreads: Ring = field(default_factory=lambda: Ring(KEPT_BINS // EVERY))
    _repeats: Ring = field(default_factory=lambda: Ring(1000))
    _bad: deque[What | None] = field(default_factory=lambda: deque(maxlen=OF_LAST))
    _up: float = 0.0
    _down: float = 0.0
    _clean: int = 0
    _last_at: float | None = None

    # -- a bin ---------------------------------------------------------------------------------------------

    def push(self, at: float, value: float) -> State:
        """Takes the next bin (its start and its value in judged units), and returns the state after it."""
        if self._last_at is not None and at - self._last_at > RESTART_GAP_S:
            self.restart_level()
        self._last_at, seen = at, Seen(at, value)
        expected = self._expected()
        if expected is not None:
            seen.expected = expected
            self._judge(seen, value - expected)
        if len(self._recent):
            self._repeats.push(float(value == self._recent.newest))
        self._recent.push(value)
        self.num_bins += 1
        self.seen = seen
        return self._move(seen.what)

    def silent(self, now: float) -> State:
        """Called where a bin did not come: after three of them the series is stale, and no longer anything else."""
        if self._last_at is not None and now - self._last_at > 3 * BIN_S and self.state is not State.LEARNING:
            self.state = State.STALE
        return self.state

    def restart_level(self) -> None:
        """What comes is another level by right: another champion, or another day. Its spread is kept."""
        self._recent.clear()
        self._up = self._down = 0.0
        self._bad.clear()
        self.state, self.num_bins = State.LEARNING, max(0, MIN_BINS - 30) if self.scales else 0

    # -- statistics ----------------------------------------------------------------------------------------

    def _expected(self) -> float | None:
        """The last hour's line, carried on to now; the median where the hour is young."""
        recent = self._recent.values()
        lag = min(LAG, len(recent) // 3)
        if lag < LEVEL_BINS:
            return None
        past = recent[: len(recent) - lag]
        late = float(np.median(past[-HALF:]))
        early = past[:-HALF]
        if len(early) < HALF // 2 or self.scales is None:
            return late
        between = (HALF + len(early)) / 2
        ahead = TREND_SHARE * (late - float(np.median(early))) * (HALF / 2 + LAG) / between
        # A step of the level, too, moves one half before the other: no more than a sd is believed.
        return late + min(self.scales.point, max(-self.scales.point, ahead))

    def _judge(self, seen: Seen, residual: float) -> None:
        recent = np.append(self._recent.tail(LEVEL_BINS - 1), seen.value)
        level = float(recent.mean()) - (seen.expected or 0.0)
        newest = np.append(self._residuals.tail(SPREAD_BINS - 1), residual)
        scales = self.scales
        spread = 0.0
        if scales is not None:
            clipped = np.clip(newest - np.median(newest), -5 * scales.point, 5 * scales.point)
            spread = math.log(max(float(clipped.std()), 1e-12) / scales.point)
        if scales is not None and self.num_bins >= MIN_BINS:
            self._vote(seen, residual, level, spread if len(newest) >= SPREAD_BINS else 0.0, scales)
        if self.state in (State.LEARNING, State.OK, State.SUSPECT) or scales is None:
            self._residuals.push(residual)  # an anomaly is not the measure of the next one
            if self.num_bins % EVERY == 0:
                self._levels.push(level)
                if scales is not None and len(newest) >= SPREAD_BINS:
                    self._spreads.push(spread)
        if scales is None or self.num_bins % RESCALE_EVERY == 0:
            self._rescale()

    def _vote(self, seen: Seen, residual: float, level: float, spread: float, scales: Scales) -> None:
        limits, young = self.thresholds, 1.0 + YOUNG_BLOCKS * LEVEL_BINS / max(1, scales.num)
        z = residual / scales.run
        cap = 2.0 * limits.cusum_h * young
        self._up = min(cap, max(0.0, self._up + z - limits.cusum_k))
        self._down = min(cap, max(0.0, self._down - z - limits.cusum_k))
        smallest = self.smallest_shift(seen.expected or 0.0)
        is_news = abs(level) >= smallest
        scores: list[tuple[What, float]] = [
            ("shift", abs(level) / (limits.level * young * scales.level) if is_news else 0.0),
            ("drift", max(self._up, self._down) / (limits.cusum_h * young) if is_news else 0.0),
            ("spread", spread / max(math.log(limits.spread_ratio), limits.spread * young * scales.spread)),
        ]
        reach = max(limits.z * scales.point, scales.largest)
        scores.append(("spike", abs(residual) / reach if abs(residual) >= smallest else 0.0))
        if self._is_flat(seen.value):
            scores.append(("flat", 2.0))
        what, seen.score = max(scores, key=lambda one: one[1])
        seen.what = what if seen.score > 1.0 else None

    def _is_flat(self, value: float) -> bool:
        """The same number for ten minutes, in a series in which two neighbours were hardly ever equal."""
        newest = self._recent.tail(FLAT_BINS - 1)
        if len(newest) < FLAT_BINS - 1 or bool((newest != value).any()):
            return False
        past = self._repeats.values()[:-FLAT_BINS]
        return len(past) >= FLAT_BINS and float(past.mean()) < 0.05

    def _rescale(self) -> None:
        residuals = self._residuals.values()
        if len(residuals) < MIN_BINS // 2:
            return
        point = max(self.floor, robust_sd(residuals))
        blocks = residuals[len(residuals) % LEVEL_BINS :].reshape(-1, LEVEL_BINS).mean(axis=1)
        run = max(point, math.sqrt(LEVEL_BINS) * robust_sd(blocks))
        level = max(point / math.sqrt(LEVEL_BINS), robust_sd(self._levels.values()))
        spreads = self._spreads.values()
        spread = max(0.05, robust_sd(spreads)) if len(spreads) >= 60 else 0.2
        tail = np.abs(residuals)
        largest = float(np.partition(tail, -3)[-3]) if len(tail) >= 2160 else 1.3 * float(tail.max())
        self.scales = Scales(point, run, level, spread, largest, len(residuals))

    # -- state ---------------------------------------------------------------------------------------------

    def _move(self, what: What | None) -> State:
        self._bad.append(what)
        num_bad = sum(one is not None for one in self._bad)
        self._clean = 0 if what is not None else self._clean + 1
        if self.scales is None or self.num_bins < MIN_BINS:
            self.state = State.LEARNING
        elif num_bad >= VOTES:
            self.state = State.ANOMALOUS
        elif self.state in (State.ANOMALOUS, State.RECOVERING) and self._clean < RECOVER_BINS:
            self.state = State.RECOVERING
        else:
            self.state = State.SUSPECT if num_bad else State.OK
        return self.state

    @property
    def what(self) -> What | None:
        """What most of the last bins showed; a shift where a tie is."""
        shown: list[What] = [one for one in self._bad if one is not None]
        return max(shown, key=lambda what: (shown.count(what), what == "shift"), default=None)


def robust_sd(values: NDArray[np.float64]) -> float:
    """1.4826 times the median distance from the median: the sd, where values are normal. 0 for less than 2 values."""
    if len(values) < 2:
        return 0.0
    return 1.4826 * float(np.median(np.abs(values - np.median(values))))
