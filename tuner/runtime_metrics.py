"""The runtime's metrics over one window, from its state and its records. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from store import metrics
from store.metrics import Metric
from tuner.readings import Readings

Record = Mapping[str, Any]

SHARES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}


@dataclass(frozen=True)
class Window:
    """What the runtime told since the tick before. `seconds` is None where there is no tick before to count from.

    `before` is the state at the start of the window, `step_before` the last step before it; both of this boot.
    """

    records: Sequence[Record]
    state: Mapping[str, Any]
    dropped: int = 0
    seconds: float | None = None
    before: Mapping[str, Any] | None = None
    step_before: Record | None = None


def runtime_samples(window: Window) -> Readings:
    """Every runtime metric that the window allows to know; what it does not is absent."""
    readings = _now(window.state, window.dropped)
    if window.seconds is not None:
        requests = [record for record in window.records if record["kind"] == "request"]
        steps = [record for record in window.records if record["kind"] == "step"]
        readings |= _rates(window, steps, window.seconds)
        readings |= _prefix_hits(window, window.seconds)
        readings |= _drafts(window, window.seconds)
        readings |= _latencies(requests)
        readings |= _steps(steps, window.step_before)
        readings |= _fragmentation(steps, window.state["gauges"].get("kv_total_tokens"))
    return readings


def _now(state: Mapping[str, Any], dropped: int) -> Readings:
    """Gauges, and counters since boot."""
    gauges, counters = state["gauges"], state["counters"]
    readings: Readings = {
        (metrics.ENGINE_RESTARTS_TOTAL, ""): float(state["num_engine_restarts"]),
        (metrics.RECORDS_DROPPED_TOTAL, ""): float(dropped),
    }
    # Without an engine there are no gauges of it, and all that the front end has queued is waiting.
    waiting = gauges.get("num_waiting", gauges.get("num_queued"))
    for metric, value in (
        (metrics.REQUESTS_RUNNING, gauges.get("num_running")),
        (metrics.REQUESTS_WAITING, waiting),
        (metrics.PREEMPTIONS_TOTAL, gauges.get("num_preemptions_total")),
    ):
        if value is not None:
            readings[metric, ""] = float(value)
    if gauges.get("kv_total_tokens"):
        readings[metrics.KV_USED_RATIO, ""] = gauges["kv_used_tokens"] / gauges["kv_total_tokens"]
    for kind, num in counters["errors_by_kind"].items():
        readings[metrics.ERRORS_TOTAL, kind] = float(num)
    return readings


def _rates(window: Window, steps: Sequence[Record], seconds: float) -> Readings:
    # Beside prompts a step counts the drafts that it computed among them.
    prompt_tokens = sum(step["num_prefill_tokens"] - step.get("num_drafted", 0) for step in steps)
    readings: Readings = {(metrics.PROMPT_TOKENS_PER_S, ""): prompt_tokens / seconds}
    if window.before is not None:
        now, before = window.state["counters"], window.before["counters"]
        readings[metrics.REQUESTS_PER_S, ""] = (now["requests_total"] - before["requests_total"]) / seconds
        readings[metrics.OUTPUT_TOKENS_PER_S, ""] = (now["tokens_total"] - before["tokens_total"]) / seconds
    return readings


def _prefix_hits(window: Window, seconds: float) -> Readings:
    grown = _grown(window, "prefix_hit_tokens_total", "prefix_looked_up_tokens_total")
    if grown is None:
        return {}
    num_hit, num_looked_up = grown
    readings: Readings = {(metrics.PREFIX_HIT_TOKENS_PER_S, ""): num_hit / seconds}
    if num_looked_up:
        readings[metrics.PREFIX_HIT_RATIO, ""] = num_hit / num_looked_up
    return readings


def _drafts(window: Window, seconds: float) -> Readings:
    grown = _grown(window, "draft_right_tokens_total", "drafted_tokens_total")
    if grown is None:
        return {}
    num_right, num_drafted = grown
    readings: Readings = {(metrics.DRAFTED_TOKENS_PER_S, ""): num_drafted / seconds}
    if num_drafted:
        readings[metrics.DRAFT_RIGHT_RATIO, ""] = num_right / num_drafted
    return readings


def _grown(window: Window, part: str, whole: str) -> tuple[float, float] | None:
    """By how much two of the engine's running totals grew; an engine that was replaced begins them anew, which is no
    reading."""
    if window.before is None:
        return None
    now, before = window.state["gauges"], window.before["gauges"]
    if any(gauges.get(name) is None for gauges in (now, before) for name in (part, whole)):
        return None
    num_part, num_whole = (now[name] - before[name] for name in (part, whole))
    return None if num_part < 0 or num_whole < num_part else (num_part, num_whole)


def _latencies(requests: Sequence[Record]) -> Readings:
    """Of the requests that ended as they should in the window; one that its client left has no latency."""
    served = [record for record in requests if record["finish_reason"] in ("stop", "length")]
    first = [record for record in served if record["first_token_at"] is not None]
    values: dict[Metric, list[float]] = {
        metrics.TTFT_S: [record["first_token_at"] - record["arrived_at"] for record in first],
        metrics.TPOT_S: [
            (record["finished_at"] - record["first_token_at"]) / (record["output_tokens"] - 1)
            for record in first
            if record["output_tokens"] > 1
        ],
        metrics.E2E_S: [record["finished_at"] - record["arrived_at"] for record in served],
        metrics.PROMPT_TOKENS: [record["prompt_tokens"] for record in served],
        metrics.OUTPUT_TOKENS: [record["output_tokens"] for record in served],
    }
    readings: Readings = {}
    for metric, some in values.items():
        readings |= statistics(metric, [(value, 1) for value in some])
    return readings


def _steps(steps: Sequence[Record], step_before: Record | None) -> Readings:
    readings = statistics(metrics.STEP_S, [(step["step_s"], 1) for step in steps])
    readings |= statistics(metrics.ITL_S, token_gaps(steps, step_before))
    if steps:
        readings[metrics.BATCH_SIZE, ""] = sum(step["num_decode"] for step in steps) / len(steps)
    return readings


def _fragmentation(steps: Sequence[Record], kv_total_tokens: float | None) -> Readings:
    """From steps in which every running request had a row: only there the filled part of the cache is known.

    Blocks that several requests share count once as held and several times as filled; less than nothing is nothing.
    """
    whole = [
        step for step in steps if step["num_decode"] + step["num_prefill_rows"] == step["num_running"] > 0
    ]
    if not whole or not kv_total_tokens:
        return {}
    unfilled = sum(max(0, step["kv_used_tokens"] - step["context_tokens"]) for step in whole) / len(whole)
    return {(metrics.KV_FRAGMENTATION_RATIO, ""): unfilled / kv_total_tokens}


def token_gaps(steps: Iterable[Record], step_before: Record | None) -> list[tuple[float, int]]:
    """Gaps between two tokens of one request, seconds, each with the number of requests that had it.

    A step gives each request that decodes one token, so the gap is the time since the step before of the same
    engine. A step that only computes prompts while others wait to decode lengthens their gap. Idle time is no
    gap: the step after it computes a prompt and decodes nothing. Tokens of a draft that was right follow at once.
    """
    gaps = []
    since_at = {} if step_before is None else {step_before.get("replica", 0): step_before["at"]}
    for step in steps:
        replica = step.get("replica", 0)
        if step["num_decode"] and replica in since_at:
            gaps.append((max(0.0, step["at"] - since_at[replica]), step["num_decode"]))
            if step.get("num_right"):
                gaps.append((0.0, step["num_right"]))
        if step["num_decode"] or step["num_running"] <= step["num_prefill_rows"]:
            since_at[replica] = step["at"]
    return gaps


def statistics(metric: Metric, weighted: Sequence[tuple[float, int]]) -> Readings:
    """Those statistics that the metric declares, over values with their counts; nothing over no values.

    A percentile is the smallest value that at least that share of all does not exceed (nearest rank).
    """
    labels = metric.label.values or ()
    total = sum(count for _, count in weighted)
    if not total:
        return {}
    ordered = sorted(weighted)
    readings: Readings = {
        (metric, label): _percentile(ordered, SHARES[label] * total) for label in labels if label in SHARES
    }
    if "mean" in labels:
        readings[metric, "mean"] = sum(value * count for value, count in ordered) / total
    return readings


def _percentile(ordered: Sequence[tuple[float, int]], rank: float) -> float:
    seen = 0
    for value, count in ordered:
        seen += count
        if seen >= rank - 1e-9:
            return float(value)
    return float(ordered[-1][0])
