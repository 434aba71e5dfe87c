"""Layers B and C at work: every watched series in 10 s and 60 s bins, fused into one finding a component.

    samples ─▶ 10 s bins ─▶ Detector ─┐
          └──▶ 60 s bins ─▶ Band    ──┴─▶ findings: >= 2 series of a component are a page, one is a ticket

No I/O: the past comes in at the start (`remember`), bands whenever a forecast was refitted.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from store.metrics import METRICS
from tuner.notice.detect import BIN_S, OF_LAST, VOTES, Detector, State, Thresholds
from tuner.notice.ring import Ring
from tuner.notice.watched import FORECAST_LABELS, Component, Key, Watched, watched_as

MINUTE_S = 60.0
MINUTES_KEPT = 7 * 24 * 60
SETTLE_S = 5.0  # after a challenger's slice its last requests still end


class BandPoint(NamedTuple):
    at: float
    expected: float
    low: float
    high: float


@dataclass
class Band:
    """A metric's forecast, and whether its last minutes lay inside. Values in the metric's unit."""

    points: Sequence[BandPoint]
    is_paused: bool = False  # another champion serves than the one that was learnt
    outside: deque[bool] = field(default_factory=lambda: deque(maxlen=OF_LAST))
    num_clean: int = 0
    state: State = State.OK

    def at(self, at: float) -> BandPoint | None:
        """Interpolated; None where the forecast does not reach."""
        points = self.points
        if not points or not points[0].at <= at <= points[-1].at:
            return None
        step_s = (points[-1].at - points[0].at) / max(1, len(points) - 1)
        index = min(len(points) - 1, int((at - points[0].at) / step_s)) if step_s else 0
        one, other = points[index], points[min(index + 1, len(points) - 1)]
        share = (at - one.at) / (other.at - one.at) if other.at > one.at else 0.0
        return BandPoint(at, *(a + share * (b - a) for a, b in zip(one[1:], other[1:], strict=True)))

    def push(self, at: float, value: float, smallest: float) -> tuple[State, BandPoint | None]:
        """Takes a minute's mean; `smallest` is a distance from the expected value that is worth a word."""
        point = None if self.is_paused else self.at(at)
        if point is None:
            self.outside.clear()
            self.state = State.STALE
            return self.state, None
        is_out = not point.low <= value <= point.high and abs(value - point.expected) >= smallest
        self.outside.append(is_out)
        self.num_clean = 0 if is_out else self.num_clean + 1
        if sum(self.outside) >= VOTES:
            self.state = State.ANOMALOUS
        elif self.state in (State.ANOMALOUS, State.RECOVERING) and self.num_clean < OF_LAST:
            self.state = State.RECOVERING
        else:
            self.state = State.SUSPECT if any(self.outside) else State.OK
        return self.state, point


class Outlier(NamedTuple):
    """A series that is anomalous now. Values in the metric's unit; `score` 1 is just beyond its threshold.

    `size` compares it with the same trouble of another day: its distance over what was expected.
    """

    key: Key
    component: Component
    layer: str
    what: str
    observed: float
    expected: float
    score: float
    since_at: float
    is_harmful: bool

    @property
    def size(self) -> float:
        return abs(self.observed - self.expected) / max(abs(self.expected), 1e-9)

    @property
    def mark(self) -> tuple[str, str]:
        """What a cool-down is about: the metric, and whether its level, its spread or its life is the trouble."""
        return self.key[0], self.what if self.what in ("spread", "flat") else "level"


class Finding(NamedTuple):
    """The anomalous series of one component, the worst first. An empty one says that all of them are well."""

    component: Component
    outliers: tuple[Outlier, ...]

    @property
    def is_page(self) -> bool:
        return len({outlier.key[0] for outlier in self.outliers}) >= 2


@dataclass
class _Open:
    """A bin that is not over."""

    index: int
    total: float
    num: int


@dataclass
class SeriesState:
    """Everything that is kept in memory of one series."""

    key: Key
    how: Watched
    detector: Detector
    minutes: Ring = field(default_factory=lambda: Ring(MINUTES_KEPT))
    minute_ats: Ring = field(default_factory=lambda: Ring(MINUTES_KEPT))
    bin: _Open | None = None
    minute: _Open | None = None
    since_at: float | None = None  # of the suspicion that became the anomaly
    band_since_at: float | None = None
    band_seen: tuple[float, BandPoint] | None = None


class StatisticsStage:
    """`sample` once a tick; `findings` are what stands at its end."""

    def __init__(self, thresholds: Thresholds | None = None) -> None:
        self.thresholds = thresholds or Thresholds()
        self.series: dict[Key, SeriesState] = {}
        self.bands: dict[str, Band] = {}
        self._challenger_until = -math.inf
        self._has_ended = False

    # -- data in -------------------------------------------------------------------------------------------

    def state_of(self, key: Key) -> SeriesState:
        found = self.series.get(key)
        if found is None:
            how = watched_as(key)
            assert how is not None, f"{key} is not watched"
            detector = Detector(how.floor, how.smallest_shift, self.thresholds)
            found = self.series[key] = SeriesState(key, how, detector)
        return found

    def sample(self, now: float, values: Mapping[Key, float], is_champion: bool) -> bool:
        """Takes the values of one tick; those under a challenger only where no configuration bends them.

        Returns whether a bin of 10 s ended, that is whether `findings` may have changed.
        """
        if not is_champion:
            self._challenger_until = now + SETTLE_S
        is_settled = is_champion and now >= self._challenger_until
        self._end_bins(now)
        for key, value in values.items():
            state = self.state_of(key)
            if is_settled or not state.how.by_config:
                self._add(state, now, value)
        has_ended, self._has_ended = self._has_ended, False
        return has_ended

    def _add(self, state: SeriesState, now: float, value: float) -> None:
        if state.bin is None:
            state.bin = _Open(int(now // BIN_S), 0.0, 0)
        state.bin.total += value
        state.bin.num += 1

    def _end_bins(self, now: float) -> None:
        """Bins end by the clock: a series that fell silent must not keep its last one open."""
        index = int(now // BIN_S)
        for state in self.series.values():
            if state.bin is not None and state.bin.index < index:
                self._end_bin(state)
                self._has_ended = True
            elif state.bin is None:
                state.detector.silent(now)

    def _end_bin(self, state: SeriesState) -> None:
        done, state.bin = state.bin, None
        if done is None or not done.num:
            return
        mean, at = done.total / done.num, done.index * BIN_S
        self.push_bin(state, at, mean)
        minute = int(at // MINUTE_S)
        if state.minute is not None and state.minute.index != minute:
            self.push_minute(state, state.minute.index * MINUTE_S, state.minute.total / state.minute.num)
            state.minute = None
        if state.minute is None:
            state.minute = _Open(minute, 0.0, 0)
        state.minute.total += mean
        state.minute.num += 1

    def push_bin(self, state: SeriesState, at: float, value: float) -> None:
        before = state.detector.state
        after = state.detector.push(at, state.how.judged(value))
        if after is State.SUSPECT and before is State.OK:
            state.since_at = at

    def push_minute(self, state: SeriesState, at: float, value: float) -> None:
        if FORECAST_LABELS.get(state.key[0]) != state.key[1]:
            return
        state.minute_ats.push(at)
        state.minutes.push(value)
        band = self.bands.get(state.key[0])
        if band is None:
            return
        before = band.state
        expected = band.at(at + MINUTE_S / 2)
        smallest = 0.0
        if expected is not None:
            how = state.how
            judged = how.judged(expected.expected)
            smallest = abs(how.told(judged + how.smallest_shift(judged)) - expected.expected)
        after, point = band.push(at + MINUTE_S / 2, value, smallest)
        if after is State.SUSPECT and before is State.OK:
            state.band_since_at = at
        state.band_seen = None if point is None else (value, point)

    def remember(
        self, key: Key, bins: Iterable[tuple[float, float]], minutes: Iterable[tuple[float, float]]
    ) -> None:
        """The past of a series, as the store has it: oldest first, before its first sample in this life."""
        state = self.state_of(key)
        for at, value in minutes:
            state.minute_ats.push(at)
            state.minutes.push(value)
        for at, value in bins:
            self.push_bin(state, at, value)

    def champion_changed(self) -> None:
        """Levels that a configuration makes start anew; what clients ask stays as it was."""
        for state in self.series.values():
            if state.how.by_config:
                state.detector.restart_level()
                band = self.bands.get(state.key[0])
                if band is not None:
                    band.is_paused, band.state = True, State.STALE

    # -- what stands ---------------------------------------------------------------------------------------

    def findings(self) -> list[Finding]:
        """One for each component that has series at all, the well ones empty."""
        found: dict[Component, list[Outlier]] = {}
        for state in self.series.values():
            outliers = found.setdefault(state.how.component, [])
            for outlier in (self._outlier_of_bins(state), self._outlier_of_band(state)):
                if outlier is not None and outlier.is_harmful:
                    outliers.append(outlier)
                    break
        ranked = {name: sorted(some, key=lambda one: -one.score) for name, some in found.items()}
        return [Finding(name, tuple(some)) for name, some in ranked.items()]

    def is_recovering(self, component: Component) -> bool:
        """Whether some series of it was anomalous within its last five minutes."""
        return any(
            State.RECOVERING in (state.detector.state, self._band_state(state))
            for state in self.series.values()
            if state.how.component == component
        )

    def _band_state(self, state: SeriesState) -> State | None:
        band = self.bands.get(state.key[0])
        return None if band is None else band.state

    def _outlier_of_bins(self, state: SeriesState) -> Outlier | None:
        detector = state.detector
        if detector.state is not State.ANOMALOUS or detector.seen is None or detector.what is None:
            return None
        seen, how = detector.seen, state.how
        expected = seen.value if seen.expected is None else seen.expected
        since_at = seen.at if state.since_at is None else state.since_at
        observed = how.told(seen.value)
        return Outlier(
            state.key, how.component, "B", detector.what, observed, how.told(expected), max(1.0, seen.score),
            since_at, detector.what in ("flat", "spread") or is_harmful(state.key, seen.value - expected),
        )  # fmt: skip

    def _outlier_of_band(self, state: SeriesState) -> Outlier | None:
        band = self.bands.get(state.key[0])
        if band is None or band.state is not State.ANOMALOUS or state.band_seen is None:
            return None
        if FORECAST_LABELS.get(state.key[0]) != state.key[1]:
            return None
        value, point = state.band_seen
        reach = max(
            point.high - point.expected if value > point.expected else point.expected - point.low, 1e-12
        )
        since_at = point.at if state.band_since_at is None else state.band_since_at
        return Outlier(
            state.key, state.how.component, "C", "forecast", value, point.expected,
            max(1.0, abs(value - point.expected) / reach), since_at, is_harmful(state.key, value - point.expected),
        )  # fmt: skip

    def states(self) -> dict[str, int]:
        """How many series are in each state of layer B."""
        counts: dict[str, int] = {}
        for state in list(self.series.values()):  # asked by the API while a tick runs
            name = state.detector.state.value
            counts[name] = counts.get(name, 0) + 1
        return counts


def is_harmful(key: Key, distance: float) -> bool:
    """A latency that fell is no trouble; of a metric that has no better direction, both ways may be."""
    better = METRICS[key[0]].better
    return better is None or (distance > 0) == (better == "lower")
