"""Prometheus text at /metrics: our names, and beside some of them the name that vLLM dashboards ask for."""

import bisect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import CollectorRegistry

from runtime.replica import Replica

# The bounds of vLLM's histograms, so that its dashboards show ours. Source: vllm/v1/metrics/loggers.py.
TTFT_BOUNDS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
GAP_BOUNDS_S = (
    0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5,
    1.0, 2.5, 10.0,
)  # fmt: skip
E2E_BOUNDS_S = (
    0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
)  # fmt: skip

MAX_LABELS = 64  # distinct label values that a client can cause; the rest count as one
OTHER_LABEL = "(other)"


@dataclass
class Histogram:
    bounds: Sequence[float]
    counts: list[int] = field(init=False)
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        total, cumulative = 0, []
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
            total += count
            cumulative.append((bound, float(total)))
        return cumulative


@dataclass
class Meter:
    """Everything the front end counts. Written by one thread, the event loop."""

    ttft_s: Histogram = field(default_factory=lambda: Histogram(TTFT_BOUNDS_S))
    gap_s: Histogram = field(default_factory=lambda: Histogram(GAP_BOUNDS_S))
    e2e_s: Histogram = field(default_factory=lambda: Histogram(E2E_BOUNDS_S))
    requests_total: int = 0
    prompt_tokens_total: int = 0
    tokens_total: int = 0
    finished_by_reason: Counter[str] = field(default_factory=Counter)
    errors_by_kind: Counter[str] = field(default_factory=Counter)
    unknown_fields: Counter[str] = field(default_factory=Counter)

    def unknown_field(self, name: str) -> bool:
        """Counts a request field that is not known; returns whether it is the first of its name."""
        name = name if len(name) <= 64 and name.replace(".", "_").isidentifier() else OTHER_LABEL
        if name not in self.unknown_fields and len(self.unknown_fields) >= MAX_LABELS:
            name = OTHER_LABEL
        self.unknown_fields[name] += 1
        return self.unknown_fields[name] == 1

    def counters(self) -> dict[str, Any]:
        return {
            "requests_total": self.requests_total,
            "finished_total": sum(self.finished_by_reason.values()),
            "errors_by_kind": dict(self.errors_by_kind),
            "unknown_fields": dict(self.unknown_fields),
            "tokens_total": self.tokens_total,
            "prompt_tokens_total": self.prompt_tokens_total,
        }


@dataclass(frozen=True)
class Scrape:
    """One moment's values, as `render` wants them. None: not known, and left out."""

    model_name: str
    meter: Meter
    num_running: int
    num_waiting: int
    kv_used_ratio: float | None
    engine_ready: bool
    replicas: Sequence[Replica]
    num_restarts: int
    version: int
    config_id: str | None
    num_preemptions: int | None
    num_looked_up_tokens: int | None
    num_hit_tokens: int | None
    num_drafted_tokens: int | None
    num_right_tokens: int | None
    records_dropped: int
    replaced_kernels: Sequence[str] = ()  # those that failed their check at load


def render(scrape: Scrape) -> bytes:
    """Returns the page in Prometheus text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Page(scrape))
    return generate_latest(registry)


class _Page:
    def __init__(self, scrape: Scrape) -> None:
        self._scrape = scrape
        self._model = [scrape.model_name]

    def collect(self) -> Iterator[Metric]:
        yield from self._engine_metrics()
        yield from self._replica_metrics()
        yield from self._traffic_metrics()
        meter = self._scrape.meter
        latency = (
            ("time_to_first_token_seconds", "First token minus arrival.", meter.ttft_s),
            ("inter_token_latency_seconds", "Gap between two tokens.", meter.gap_s),
            ("e2e_request_latency_seconds", "End minus arrival.", meter.e2e_s),
        )
        for name, help, histogram in latency:
            yield self._histogram(f"tuner_{name}", help, histogram)
            yield self._histogram(f"vllm:{name}", help, histogram)

    def _engine_metrics(self) -> Iterator[Metric]:
        scrape = self._scrape
        occupancy = (
            (
                "tuner_requests_running",
                "vllm:num_requests_running",
                "Requests in prefill or decode.",
                scrape.num_running,
            ),
            (
                "tuner_requests_waiting",
                "vllm:num_requests_waiting",
                "Requests not yet scheduled.",
                scrape.num_waiting,
            ),
            (
                "tuner_kv_cache_usage_ratio",
                "vllm:kv_cache_usage_perc",
                "Used share of the KV cache.",
                scrape.kv_used_ratio,
            ),
        )
        for name, alias, help, value in occupancy:
            yield from self._gauge(name, help, value)
            yield from self._gauge(alias, help, value)
        yield from self._gauge("tuner_engine_ready", "1 while the engine answers.", int(scrape.engine_ready))
        yield from self._gauge(
            "tuner_config_version", "Version of the champion configuration.", scrape.version
        )
        if scrape.config_id is not None:
            info = GaugeMetricFamily(
                "tuner_config_in_force", "Configuration in force.", labels=["model_name", "config_id"]
            )
            info.add_metric([*self._model, scrape.config_id], 1)
            yield info
        if scrape.replaced_kernels:
            replaced = GaugeMetricFamily(
                "tuner_kernel_replaced",
                "1 for a kernel that failed its check: its slower twin is used.",
                labels=["model_name", "kernel"],
            )
            for name in scrape.replaced_kernels:
                replaced.add_metric([*self._model, name], 1)
            yield replaced
        yield from self._counter(
            "tuner_engine_restarts", "Times the engine was started again.", scrape.num_restarts
        )
        yield from self._counter(
            "tuner_preemptions", "Requests pushed out of the KV cache.", scrape.num_preemptions
        )
        for name, help, value in (
            ("prefix_cache_queries", "Tokens looked up in the prefix cache.", scrape.num_looked_up_tokens),
            ("prefix_cache_hits", "Tokens found in the prefix cache.", scrape.num_hit_tokens),
        ):
            yield from self._counter(f"tuner_{name}", help, value)
            yield from self._counter(f"vllm:{name}", help, value)
        for name, alias, help, value in (
            ("drafted_tokens", "draft_tokens", "Tokens guessed and computed.", scrape.num_drafted_tokens),
            (
                "draft_right_tokens",
                "accepted_tokens",
                "Guessed tokens that the model drew itself.",
                scrape.num_right_tokens,
            ),
        ):
            yield from self._counter(f"tuner_{name}", help, value)
            yield from self._counter(f"vllm:spec_decode_num_{alias}", help, value)
        yield from self._counter(
            "tuner_records_dropped", "Records lost as nobody drained them.", scrape.records_dropped
        )

    def _replica_metrics(self) -> Iterator[Metric]:
        """What differs between the engines; everything else is their sum."""
        ready = self._by_replica(GaugeMetricFamily, "ready", "1 while this engine answers.")
        live = self._by_replica(GaugeMetricFamily, "requests", "Requests that this engine has.")
        owed = self._by_replica(
            GaugeMetricFamily,
            "outstanding_tokens",
            "Most tokens that this engine may still compute for them.",
        )
        restarts = self._by_replica(CounterMetricFamily, "restarts", "Times this engine was started again.")
        for replica in self._scrape.replicas:
            labels = [*self._model, str(replica.index)]
            ready.add_metric(labels, int(replica.phase == "ready"))
            live.add_metric(labels, replica.num_live)
            owed.add_metric(labels, replica.outstanding_tokens)
            restarts.add_metric(labels, replica.num_restarts)
        yield from (ready, live, owed, restarts)

    def _by_replica(
        self, family: type[GaugeMetricFamily] | type[CounterMetricFamily], name: str, help: str
    ) -> GaugeMetricFamily | CounterMetricFamily:
        return family(f"tuner_replica_{name}", help, labels=["model_name", "replica"])

    def _traffic_metrics(self) -> Iterator[Metric]:
        meter = self._scrape.meter
        yield from self._counter("tuner_requests", "Requests that were received whole.", meter.requests_total)
        for prefix in ("tuner_", "vllm:"):
            prompt_tokens = meter.prompt_tokens_total
            yield from self._counter(
                f"{prefix}prompt_tokens", "Prompt tokens of admitted requests.", prompt_tokens
            )
            yield from self._counter(f"{prefix}generation_tokens", "Tokens generated.", meter.tokens_total)
        finished = meter.finished_by_reason
        served = {reason: finished[reason] for reason in ("stop", "length", "abort")}
        yield self._labelled(
            "tuner_requests_finished", "Requests by how they ended.", "finished_reason", finished
        )
        yield self._labelled("vllm:request_success", "Requests without an error.", "finished_reason", served)
        yield self._labelled("tuner_request_errors", "Requests with an error.", "kind", meter.errors_by_kind)
        yield self._labelled("tuner_unknown_fields", "Ignored request fields.", "field", meter.unknown_fields)

    def _gauge(self, name: str, help: str, value: float | None) -> Iterator[Metric]:
        if value is not None:
            family = GaugeMetricFamily(name, help, labels=["model_name"])
            family.add_metric(self._model, value)
            yield family

    def _counter(self, name: str, help: str, value: float | None) -> Iterator[Metric]:
        if value is not None:
            family = CounterMetricFamily(name, help, labels=["model_name"])
            family.add_metric(self._model, value)
            yield family

    def _labelled(self, name: str, help: str, label: str, values: Mapping[str, int]) -> Metric:
        family = CounterMetricFamily(name, help, labels=["model_name", label])
        for key, value in sorted(values.items()):
            family.add_metric([*self._model, key], value)
        return family

    def _histogram(self, name: str, help: str, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(name, help, labels=["model_name"])
        family.add_metric(self._model, buckets=histogram.buckets(), sum_value=histogram.sum)
        return family
