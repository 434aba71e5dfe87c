"""Which series are watched by statistics and forecasts, and how: component, scale, floor. Declared once.

A series is a metric with one label. What belongs to one component fails together, so that two anomalous series
of it are one page; load (what clients ask) is told apart from latency (what they get).
"""

import math
from dataclasses import dataclass
from typing import Literal

from store import metrics
from store.metrics import Metric
from tuner.readings import Readings

Component = Literal["load", "latency", "engine", "host", "gpu", "process"]
Key = tuple[str, str]  # metric, label

MIN_LOG_VALUE = 1e-6  # of a latency in s: below what any clock here resolves


@dataclass(frozen=True)
class Watched:
    """How the series of one metric are watched.

    labels: those which are watched, the first one with a forecast; None for every label that occurs.
    is_log: judged in log units, in which a latency is symmetric.
    floor: smallest robust sd that is believed, in judged units (log units, or the metric's own).
    min_shift: smallest change worth a word, in the same units; beside it stands 5 % of the level.
    by_config: its level depends on the configuration that serves, so that it starts anew with a champion.
    has_forecast: Prophet learns its day.
    """

    metric: Metric
    component: Component
    labels: tuple[str, ...] | None = ("",)
    is_log: bool = False
    floor: float = 1e-9
    min_shift: float = 0.0
    by_config: bool = True
    has_forecast: bool = True

    def judged(self, value: float) -> float:
        """The value in the units in which it is judged."""
        return math.log(max(value, MIN_LOG_VALUE)) if self.is_log else value

    def told(self, judged: float) -> float:
        """The other way round: back in the metric's unit."""
        return math.exp(min(judged, 700.0)) if self.is_log else judged

    def smallest_shift(self, level: float) -> float:
        """A change that is smaller is not worth a word, whatever the statistics say; judged units."""
        return max(self.min_shift, 0.05 if self.is_log else 0.05 * abs(level))


def _latency(metric: Metric, *labels: str) -> Watched:
    return Watched(metric, "latency", labels, is_log=True, floor=0.01)


def _load(metric: Metric, *labels: str, floor: float = 0.01, is_log: bool = False) -> Watched:
    return Watched(metric, "load", labels or ("",), is_log=is_log, floor=floor, by_config=False)


_GIB = float(1 << 30)

WATCHED: tuple[Watched, ...] = (
    _load(metrics.REQUESTS_PER_S),
    _load(metrics.PROMPT_TOKENS, "mean", "p95", is_log=True),
    _load(metrics.OUTPUT_TOKENS, "mean", "p95", is_log=True),
    _load(metrics.PROMPT_TOKENS_PER_S, floor=1.0),
    _load(metrics.OUTPUT_TOKENS_PER_S, floor=1.0),
    _latency(metrics.TTFT_S, "p95", "p50", "p99"),
    _latency(metrics.TPOT_S, "p95", "p50", "p99"),
    _latency(metrics.ITL_S, "p99", "p50", "p95"),
    _latency(metrics.E2E_S, "p95", "p50", "p99"),
    Watched(metrics.STEP_S, "engine", ("p50", "p95", "p99"), is_log=True, floor=0.01),
    Watched(metrics.REQUESTS_RUNNING, "engine", floor=0.25, min_shift=1.0),
    Watched(metrics.REQUESTS_WAITING, "engine", floor=0.5, min_shift=2.0),
    Watched(metrics.BATCH_SIZE, "engine", floor=0.1, min_shift=0.5),
    Watched(metrics.KV_USED_RATIO, "engine", floor=0.005, min_shift=0.02),
    Watched(metrics.KV_FRAGMENTATION_RATIO, "engine", floor=0.005, min_shift=0.02, has_forecast=False),
    Watched(metrics.CPU_UTIL_RATIO, "host", ("all",), floor=0.01, min_shift=0.05),
    Watched(metrics.CPU_STEAL_RATIO, "host", floor=0.005, min_shift=0.03, by_config=False, has_forecast=False),
    Watched(metrics.MEMORY_USED_BYTES, "host", floor=0.02 * _GIB, min_shift=0.25 * _GIB),
    Watched(metrics.SWAP_USED_BYTES, "host", floor=0.02 * _GIB, min_shift=0.1 * _GIB, has_forecast=False),
    Watched(metrics.PROCESS_RSS_BYTES, "process", None, floor=0.02 * _GIB, min_shift=0.25 * _GIB, has_forecast=False),
    Watched(metrics.PROCESS_CPU_RATIO, "process", None, floor=0.02, min_shift=0.1, has_forecast=False),
    Watched(metrics.PROCESS_THREADS, "process", None, floor=1.0, min_shift=5.0, has_forecast=False),
    Watched(metrics.GPU_UTIL_RATIO, "gpu", None, floor=0.01, min_shift=0.05),
    Watched(metrics.GPU_MEMORY_USED_BYTES, "gpu", None, floor=0.05 * _GIB, min_shift=0.5 * _GIB, has_forecast=False),
    Watched(metrics.GPU_TEMPERATURE_CELSIUS, "gpu", None, floor=0.5, min_shift=3.0),
    Watched(metrics.GPU_POWER_WATTS, "gpu", None, floor=2.0, min_shift=10.0),
    Watched(metrics.GPU_CLOCK_SM_HZ, "gpu", None, floor=1e7, min_shift=5e7, has_forecast=False),
)  # fmt: skip

_BY_METRIC = {str(one.metric): one for one in WATCHED}
FORECAST_LABELS: dict[str, str] = {
    str(one.metric): (one.labels or ("0",))[0] for one in WATCHED if one.has_forecast
}  # metric -> the label whose day is learnt; of several GPUs the first


def watched_as(key: Key) -> Watched | None:
    """How this series is watched; None where it is not."""
    one = _BY_METRIC.get(key[0])
    if one is None or (one.labels is not None and key[1] not in one.labels):
        return None
    return one


def watched_values(readings: Readings) -> dict[Key, float]:
    """The finite values of one sample that are watched, in the metric's unit."""
    return {
        (str(metric), label): value
        for (metric, label), value in readings.items()
        if watched_as((str(metric), label)) is not None and math.isfinite(value)
    }
