"""The last minutes in memory, as the rules read them: means, counts over limits, steps by batch size. No I/O.

    readings and records of a tick ──feed──▶ Signals ──▶ rules

What a challenger served is left out wherever a rule is about the champion; faults of the host are not.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

from store import metrics
from store.metrics import Metric
from tuner.readings import Readings
from tuner.runtime_metrics import Record, token_gaps

KEPT_S = 330.0  # a rule looks five minutes back at most
RATE_BIN_S = 10.0
RATE_BINS = 360  # an hour
MIN_RATE_BINS = 180  # half an hour before a dispersion is believed
BIN_RATIO = 1.05  # width of a bin of the steps' histogram
MIN_BUCKET_STEPS = 200
GENERATION_S = 1800.0  # two of them are the trailing hour


@dataclass(frozen=True)
class Limit:
    """An SLO as it is counted: `share` is how many of all may be over the limit; None limits the mean or errors."""

    metric: str  # e2e_s, ttft_s, tpot_s, itl_s, errors
    statistic: str  # p50, p95, p99, mean, share
    limit: float  # seconds, or a share of all requests
    min_count: int = 20

    @property
    def label(self) -> str:
        return f"{self.metric} {self.statistic}"

    @property
    def share(self) -> float | None:
        return {"p50": 0.5, "p95": 0.05, "p99": 0.01}.get(self.statistic)


class Burn(NamedTuple):
    """ratio: how many times as fast as allowed the SLO is used up. `span_s`: over how much of the past."""

    ratio: float
    span_s: float


class _Events(NamedTuple):
    """What one tick brought: values with their counts, counted once."""

    at: float
    num: int
    num_over: int
    total: float
    weighted: list[tuple[float, int]]


@dataclass
class SLOWindow:
    """The events of the last minute, or of the last five where a minute has too few of them."""

    limit: Limit
    _ticks: deque[_Events] = field(default_factory=deque)

    def add(self, now: float, weighted: list[tuple[float, int]]) -> None:
        if weighted:
            count = sum(number for _, number in weighted)
            over = sum(number for value, number in weighted if value > self.limit.limit)
            total = sum(value * number for value, number in weighted)
            self._ticks.append(_Events(now, count, over, total, weighted))
        while self._ticks and self._ticks[0].at <= now - 300.0:
            self._ticks.popleft()

    def burn(self, now: float) -> Burn | None:
        """None where too few events are known to speak of the statistic."""
        for span_s in (60.0, 300.0):
            ticks = [tick for tick in self._ticks if tick.at > now - span_s]
            count = sum(tick.num for tick in ticks)
            if count < self.limit.min_count:
                continue
            share = self.limit.share
            if share is None:  # of errors each value is 0 or 1
                return Burn(sum(tick.total for tick in ticks) / count / self.limit.limit, span_s)
            over = sum(tick.num_over for tick in ticks)
            # One slow request is no burn, however few there are.
            return Burn(over / count / share if over >= 3 else 0.0, span_s)
        return None

    def observed(self, now: float, span_s: float) -> float:
        """The statistic itself, in its unit; sorts, so it is asked only for when it is told."""
        values = [pair for tick in self._ticks if tick.at > now - span_s for pair in tick.weighted]
        total, share = sum(count for _, count in values), self.limit.share
        if share is None:
            return sum(value * count for value, count in values) / max(1, total)
        return _percentile(values, (1 - share) * total)


def _percentile(values: list[tuple[float, int]], rank: float) -> float:
    seen = 0
    for value, count in sorted(values):
        seen += count
        if seen >= rank - 1e-9:
            return value
    return math.nan


@dataclass
class StepBucket:
    """Steps of one size: a histogram of their times in two generations of half an hour."""

    now: dict[int, int] = field(default_factory=dict)
    before: dict[int, int] = field(default_factory=dict)
    num_slow: int = 0  # since the last one that was not
    p99_s: float | None = None
    num_new: int = 0

    def ratio(self, step_s: float, limit: float) -> float:
        """How many times its p99 this step took, 0 while that is unknown; then learns from it.

        A slow step does not move the p99; a hundred in a row are the new normal.
        """
        found = 0.0 if self.p99_s is None else step_s / self.p99_s
        if found > limit:
            self.num_slow += 1
            if self.num_slow < 100:
                return found
            self.now, self.before, self.p99_s = {}, {}, None
        self.num_slow = 0
        index = round(math.log(max(step_s, 1e-6)) / math.log(BIN_RATIO))
        self.now[index] = self.now.get(index, 0) + 1
        self.num_new += 1
        if self.num_new >= MIN_BUCKET_STEPS:
            self._update()
        return found

    def _update(self) -> None:
        self.num_new = 0
        counts = {
            index: self.now.get(index, 0) + self.before.get(index, 0) for index in self.now | self.before
        }
        left = 0.01 * sum(counts.values())
        for index in sorted(counts, reverse=True):
            left -= counts[index]
            if left < 0:
                self.p99_s = BIN_RATIO ** (index + 0.5)
                return

    def age(self) -> None:
        self.now, self.before = {}, self.now


class Rate(NamedTuple):
    """Requests a second over the last minute, what the hour before let expect, and the sd of such a minute."""

    now: float
    expected: float
    sd: float


class Signals:
    """Everything that rules read. `feed` once a tick, then read; instants in s."""

    def __init__(self, limits: Sequence[Limit], slow_step_ratio: float = 2.0) -> None:
        self.slos = [SLOWindow(limit) for limit in limits]
        self.slow_step_ratio = slow_step_ratio
        self.is_champion = True  # whether the last tick was served by the champion alone
        self.engine: str | None = None
        self.num_restarts: int | None = None
        self.has_restarted = False
        self.latest: Readings = {}
        self.missing: dict[str, int] = {}  # what should be sampled each tick -> ticks without it
        self.ecc_growth: dict[str, float] = {}
        self.quality: tuple[float, float, int] | None = None  # see `rules.quality_off`
        self._series: dict[tuple[Metric, str], deque[tuple[float, float]]] = {}
        self._buckets: dict[tuple[int, int], StepBucket] = {}
        self._aged_at = -math.inf
        self._slow: deque[tuple[float, float, int]] = deque()  # at, ratio, batch size
        self._rate_bins: deque[float] = deque(maxlen=RATE_BINS)
        self._rate_open: list[float] = []
        self._rate_bin = -1
        self._step_before: Record | None = None
        self._ecc: dict[str, float] = {}

    # -- what a tick brings --------------------------------------------------------------------------------

    def feed(
        self, now: float, readings: Readings, records: Sequence[Record], state: Mapping[str, Any] | None
    ) -> None:
        champion = state.get("champion_config_id") if state else None
        self.is_champion = state is None or champion is None or state.get("config_id") == champion
        self.latest = readings
        self._feed_presence(readings, state)
        self._feed_series(now, readings)
        self._feed_rate(now, readings)
        if records:
            self._feed_records(now, records, champion)
        for window in self.slos:
            window.add(now, [])

    def forget_champion(self) -> None:
        """Another champion serves: what was learnt of steps is of the former one."""
        self._buckets.clear()
        self._slow.clear()

    def _feed_presence(self, readings: Readings, state: Mapping[str, Any] | None) -> None:
        expected = {"runtime": (metrics.REQUESTS_RUNNING, ""), "host": (metrics.CPU_UTIL_RATIO, "all")}
        expected |= {f"GPU {label}": (m, label) for m, label in readings if m is metrics.GPU_UTIL_RATIO}
        expected |= {
            name: (metrics.GPU_UTIL_RATIO, name[4:]) for name in self.missing if name.startswith("GPU ")
        }
        for name, key in expected.items():
            is_here = key in readings or (name == "runtime" and state is not None)
            if is_here or name in self.missing:  # what was never there is not missed
                self.missing[name] = 0 if is_here else self.missing[name] + 1
        if state is None:
            return
        self.engine = str(state["engine"])
        num, before = int(state["num_engine_restarts"]), self.num_restarts
        self.has_restarted, self.num_restarts = before is not None and num > before, num

    def _feed_series(self, now: float, readings: Readings) -> None:
        for key, value in readings.items():
            if key[0] in _KEPT:
                kept = self._series.setdefault(key, deque())
                kept.append((now, value))
                while kept[0][0] <= now - KEPT_S:
                    kept.popleft()
            elif key[0] is metrics.GPU_ECC_UNCORRECTED_TOTAL:
                self.ecc_growth[key[1]] = max(0.0, value - self._ecc.get(key[1], value))
                self._ecc[key[1]] = value

    def _feed_rate(self, now: float, readings: Readings) -> None:
        value = readings.get((metrics.REQUESTS_PER_S, ""))
        if value is None:
            return
        index = int(now // RATE_BIN_S)
        if index != self._rate_bin and self._rate_open:
            self._rate_bins.append(sum(self._rate_open) / len(self._rate_open))
            if index > self._rate_bin + MIN_RATE_BINS:
                self._rate_bins.clear()  # half an hour without a sample: another day
            self._rate_open = []
        self._rate_bin = index
        self._rate_open.append(value)

    def _feed_records(self, now: float, records: Sequence[Record], champion: str | None) -> None:
        ours = [
            record for record in records if champion is None or record.get("config_id", champion) == champion
        ]
        steps = [record for record in ours if record["kind"] == "step"]
        requests = [record for record in ours if record["kind"] == "request"]
        if now - self._aged_at >= GENERATION_S:
            self._aged_at = now
            for bucket in self._buckets.values():
                bucket.age()
        for step in steps:
            size = step["num_decode"]
            key = (size.bit_length(), int(step["num_prefill_tokens"]).bit_length())
            ratio = self._buckets.setdefault(key, StepBucket()).ratio(step["step_s"], self.slow_step_ratio)
            if ratio > 1.0:
                self._slow.append((now, ratio, size))
        gaps = token_gaps(steps, self._step_before)
        self._step_before = steps[-1] if steps else self._step_before
        for window in self.slos:
            window.add(
                now, gaps if window.limit.metric == "itl_s" else list(_values(requests, window.limit.metric))
            )

    # -- what rules ask ------------------------------------------------------------------------------------

    def mean(
        self, metric: Metric, label: str, now: float, span_s: float, back_s: float = 0.0
    ) -> float | None:
        """Over the samples of the `span_s` that ended `back_s` ago; None where less than half of them are there."""
        kept = self._series.get((metric, label))
        if kept is None:
            return None
        values = [value for at, value in kept if now - back_s - span_s < at <= now - back_s]
        if not values or kept[0][0] > now - back_s - span_s / 2:
            return None
        return sum(values) / len(values)

    def labels(self, metric: Metric) -> list[str]:
        return [label for other, label in self._series if other is metric]

    def value(self, metric: Metric, label: str = "") -> float | None:
        return self.latest.get((metric, label))

    def third_slowest_step(self, now: float) -> tuple[float, int]:
        """Of the last minute: its time as a multiple of its bucket's p99, and its batch size; (0, 0) if none."""
        while self._slow and self._slow[0][0] <= now - 60.0:
            self._slow.popleft()
        ranked = sorted(((ratio, size) for _, ratio, size in self._slow), reverse=True)
        return ranked[2] if len(ranked) >= 3 else (0.0, 0)

    def rate(self) -> Rate | None:
        """None until half an hour is known. The hour's own trend is carried on: a morning is no anomaly."""
        bins = list(self._rate_bins)
        if len(bins) < MIN_RATE_BINS:
            return None
        # What is judged, three minutes and their minute, is not what it is judged by.
        minutes = [sum(bins[i : i + 6]) / 6 for i in range(len(bins) % 6, len(bins) - 24 + 1 - 6, 6)]
        half = len(minutes) // 2
        early, late = median(minutes[:half]), median(minutes[half:])
        slope = (late - early) / half  # a minute
        ahead = (len(minutes) - half) / 2 + 3.5
        centre = half + (len(minutes) - half - 1) / 2
        residuals = [minute - late - slope * (index - centre) for index, minute in enumerate(minutes)]
        sd = 1.4826 * median(abs(one) for one in residuals)
        return Rate(sum(bins[-6:]) / 6, max(0.0, late + slope * ahead), max(sd, 1e-9))


_KEPT = frozenset(
    {
        metrics.GPU_UTIL_RATIO,
        metrics.CPU_UTIL_RATIO,
        metrics.CPU_STEAL_RATIO,
        metrics.REQUESTS_RUNNING,
        metrics.REQUESTS_WAITING,
        metrics.TTFT_S,
        metrics.KV_FRAGMENTATION_RATIO,
    }
)


def _values(requests: Iterable[Record], metric: str) -> Iterable[tuple[float, int]]:
    for record in requests:
        is_served = record["finish_reason"] in ("stop", "length")
        if metric == "errors":
            yield float(record["error_kind"] is not None), 1
        elif is_served and metric == "e2e_s":
            yield record["finished_at"] - record["arrived_at"], 1
        elif is_served and record["first_token_at"] is not None:
            first_at = record["first_token_at"]
            if metric == "ttft_s":
                yield first_at - record["arrived_at"], 1
            elif record["output_tokens"] > 1:
                yield (record["finished_at"] - first_at) / (record["output_tokens"] - 1), 1
