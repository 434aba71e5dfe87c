"""How long requests took, in a few numbers. Pure."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LatencySummary:
    """Of `num` succeeded requests, in seconds."""

    num: int
    p50: float
    p95: float
    p99: float
    mean: float


@dataclass(frozen=True)
class RequestSummary:
    """`num`: finished requests without those that their client gave up. A latency nobody had is None."""

    num: int
    num_succeeded: int
    num_aborted: int
    ttft: LatencySummary | None
    tpot: LatencySummary | None
    e2e: LatencySummary | None

    @property
    def success_ratio(self) -> float | None:
        return self.num_succeeded / self.num if self.num else None


def summarise(timings: Iterable[Any]) -> RequestSummary:
    """Sums up timings (rows, or anything with their fields)."""
    ttft: list[float] = []
    tpot: list[float] = []
    e2e: list[float] = []
    num = num_aborted = 0
    for timing in timings:
        num += 1
        num_aborted += timing.finish_reason == "abort"
        if timing.finish_reason not in ("stop", "length"):
            continue
        e2e.append(timing.finished_at - timing.arrived_at)
        if timing.first_token_at is not None:
            ttft.append(timing.first_token_at - timing.arrived_at)
            if timing.output_tokens > 1:
                tpot.append((timing.finished_at - timing.first_token_at) / (timing.output_tokens - 1))
    return RequestSummary(
        num - num_aborted, len(e2e), num_aborted, _latencies(ttft), _latencies(tpot), _latencies(e2e)
    )


def _latencies(values: list[float]) -> LatencySummary | None:
    if not values:
        return None
    values.sort()
    p50, p95, p99 = (percentile(values, share) for share in (0.50, 0.95, 0.99))
    return LatencySummary(len(values), p50, p95, p99, math.fsum(values) / len(values))


def percentile(ordered: Sequence[float], share: float) -> float:
    """Between the two nearest values, linearly. Source: definition 7 of Hyndman and Fan (numpy's default)."""
    rank = share * (len(ordered) - 1)
    below = math.floor(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (rank - below) * (ordered[above] - ordered[below])
