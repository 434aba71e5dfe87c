"""What a slice measured, from the timings of its requests. Pure: values in, values out.

The response of a slice is the mean of ln(metric) over the requests that arrived in its scored part,
minus what the champion twin predicts for the same requests (where the twin is in use). A request that
has no value yet when the slice is scored counts with its age: a lower bound, so that a slow arm is not
flattered by the requests it left unfinished.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from store.latency import percentile
from tuner.judging.judge import SliceScore

Metric = Literal["e2e_s", "ttft_s", "tpot_s"]
FAILED = frozenset({"error", "rejected", "timeout"})
MIN_LATENCY_S = 1e-4


@dataclass(frozen=True)
class Timing:
    """The instants and counts of one request that scoring needs. `finished_at` None: still under way."""

    request_id: str
    arrived_at: float
    prompt_tokens: int
    output_tokens: int
    first_token_at: float | None
    finished_at: float | None
    finish_reason: str | None

    @property
    def is_failed(self) -> bool:
        return self.finish_reason in FAILED

    def value(self, metric: Metric) -> float | None:
        """Seconds, or None where the request never got that far (or has one token only, for TPOT)."""
        if metric == "ttft_s":
            return None if self.first_token_at is None else self.first_token_at - self.arrived_at
        if self.finished_at is None or self.first_token_at is None:
            return None
        if metric == "e2e_s":
            return self.finished_at - self.arrived_at
        if self.output_tokens < 2:
            return None
        return (self.finished_at - self.first_token_at) / (self.output_tokens - 1)


@dataclass(frozen=True)
class SliceMeasure:
    """One slice in numbers. Logs are natural; `measured` and `predicted` are means of ln(seconds)."""

    num_requests: int
    num_errors: int
    num_pending: int
    measured: float | None
    predicted: float | None
    p95_s: float | None
    max_s: float | None
    slos: dict[
        str, float
    ]  # SLO by name -> what it limits here: a share of requests over it, a mean, an error share
    prompt_tokens_mean: float | None
    output_tokens_mean: float | None
    rate_per_s: float

    def to_score(self) -> SliceScore | None:
        """What the judge sees; None where no request of the slice has a value."""
        if self.measured is None:
            return None
        return SliceScore(
            num_requests=self.num_requests,
            mean_log_latency=self.measured,
            mean_log_twin=self.predicted,
            requests_per_s=self.rate_per_s,
            mean_prompt_tokens=self.prompt_tokens_mean,
            mean_output_tokens=self.output_tokens_mean,
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


# Share of requests that may be over the limit of a quantile.
ALLOWED_OVER = {"p50": 0.50, "p95": 0.05, "p99": 0.01}


@dataclass(frozen=True)
class SLOLimit:
    """A limit on p50, p95, p99 or mean of a latency (s), or on the share of errors."""

    metric: str
    statistic: str
    limit: float

    @property
    def name(self) -> str:
        return f"{self.metric} {self.statistic} <= {self.limit:g}"

    @property
    def allowed(self) -> float:
        """What `seen` may be at most: a quantile is kept as the share of requests over its limit."""
        return ALLOWED_OVER.get(self.statistic, self.limit)

    def seen(self, timings: Sequence[Timing]) -> float | None:
        if self.metric == "errors":
            return sum(timing.is_failed for timing in timings) / len(timings) if timings else None
        metric: Metric = self.metric  # type: ignore[assignment]  # settings admit nothing else
        values = [value for timing in timings if (value := timing.value(metric)) is not None]
        if self.statistic == "mean":
            return mean(values)
        return sum(value > self.limit for value in values) / len(values) if values else None


def measure_slice(
    timings: Sequence[Timing],
    pending_ages_s: Sequence[float],
    predictions: Mapping[str, float] | None,
    metric: Metric,
    slos: Sequence[SLOLimit],
    scored_s: float,
) -> SliceMeasure:
    """Measures the requests of a slice's scored part.

    Args:
        timings: requests that arrived in the scored part and ended.
        pending_ages_s: seconds since arrival of those that did not; they count with their age.
        predictions: request_id -> the twin's ln(metric); None where no twin is in use.
        slos: limits that users were promised.
        scored_s: length of the scored part.
    """
    ended = [
        (timing, timing.value(metric))
        for timing in timings
        if not timing.is_failed and timing.finish_reason != "abort"
    ]
    known = [(timing, max(value, MIN_LATENCY_S)) for timing, value in ended if value is not None]
    ages = [max(age, MIN_LATENCY_S) for age in pending_ages_s] if metric != "tpot_s" else []
    values = [value for _, value in known] + ages
    if predictions is not None:
        known = [(timing, value) for timing, value in known if timing.request_id in predictions]
    logs = [math.log(value) for _, value in known] + [math.log(age) for age in ages]
    predicted = None
    if predictions is not None and known:
        predicted = mean([predictions[timing.request_id] for timing, _ in known])
    return SliceMeasure(
        num_requests=len(timings) + len(pending_ages_s),
        num_errors=sum(timing.is_failed for timing in timings),
        num_pending=len(pending_ages_s),
        measured=mean(logs),
        predicted=predicted,
        p95_s=quantile(values, 0.95),
        max_s=max(values, default=None),
        slos={slo.name: seen for slo in slos if (seen := slo.seen(timings)) is not None},
        prompt_tokens_mean=mean([timing.prompt_tokens for timing in timings]),
        output_tokens_mean=mean(
            [timing.output_tokens for timing in timings if timing.finish_reason in ("stop", "length")]
        ),
        rate_per_s=(len(timings) + len(pending_ages_s)) / scored_s,
    )


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def quantile(values: Sequence[float], share: float) -> float | None:
    return percentile(sorted(values), share) if values else None
