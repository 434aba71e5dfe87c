"""What became of the requests that the load sent: one outcome each, and what they add up to.

Latencies count from the instant at which the request was planned, not from when it was sent: a sender that is
late must not make the server look fast (coordinated omission). The lateness itself is reported beside them.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tuner.load.arrivals import LENGTH_CLASSES

PERCENTILES = (50, 95, 99)
CUT = "cut"  # ended by the load itself, when it was told to stop: neither a success nor an error


@dataclass(frozen=True)
class Outcome:
    """One request, planned and as it went. Instants are UTC epoch seconds; one that never came is absent.

    `error_kind` is None for a success, else `timeout`, `connection`, `http_<status>`, `stream` (an error in
    the middle of the answer), `incomplete` (fewer tokens than asked), `not_sent` (too many open) or `cut`.
    """

    index: int
    length_class: str
    prompt_tokens: int
    asked_tokens: int
    planned_at: float
    sent_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    finished_at: float | None = None
    output_tokens: int = 0
    error_kind: str | None = None
    detail: str | None = None

    @property
    def ok(self) -> bool:
        return self.error_kind is None

    @property
    def late_s(self) -> float | None:
        """How much later than planned it was sent."""
        return None if self.sent_at is None else self.sent_at - self.planned_at

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_at is None else self.first_token_at - self.planned_at

    @property
    def e2e_s(self) -> float | None:
        return None if self.last_token_at is None else self.last_token_at - self.planned_at

    @property
    def tpot_s(self) -> float | None:
        if self.first_token_at is None or self.last_token_at is None or self.output_tokens < 2:
            return None
        return (self.last_token_at - self.first_token_at) / (self.output_tokens - 1)


class LoadReport(NamedTuple):
    """A report file read back."""

    plan: dict[str, Any]
    outcomes: list[Outcome]
    summary: dict[str, Any] | None


def summarise(
    outcomes: Iterable[Outcome], window_s: float, planned_rate_per_s: float | None = None
) -> dict[str, Any]:
    """Counts, rates, latencies overall and by length class; a statistic of nothing is absent.

    Rates are over the `window_s` seconds in which arrivals were sent. Errors are counted over all requests
    but those that the load itself cut. Percentiles are over successes.
    """
    asked = [outcome for outcome in outcomes if outcome.error_kind != CUT]
    succeeded = [outcome for outcome in asked if outcome.ok]
    errors = Counter(outcome.error_kind for outcome in asked if outcome.error_kind is not None)
    summary: dict[str, Any] = {
        "num_requests": len(asked),
        "num_ok": len(succeeded),
        "num_timeouts": errors.get("timeout", 0),
        "num_errors": sum(errors.values()),
        "errors_by_kind": dict(errors),
        "window_s": window_s,
        "prompt_tokens": sum(outcome.prompt_tokens for outcome in succeeded),
        "output_tokens": sum(outcome.output_tokens for outcome in asked),
        "late": percentiles(outcome.late_s for outcome in asked),
        **latencies(succeeded),
        "by_length_class": {
            name: {"num_ok": len(part), **latencies(part)}
            for name in LENGTH_CLASSES
            if (part := [outcome for outcome in succeeded if outcome.length_class == name])
        },
    }
    if planned_rate_per_s is not None:
        summary["planned_rate_per_s"] = planned_rate_per_s
    if window_s > 0.0:
        summary["sent_rate_per_s"] = sum(outcome.sent_at is not None for outcome in asked) / window_s
        summary["ok_rate_per_s"] = len(succeeded) / window_s
        summary["output_tokens_per_s"] = summary["output_tokens"] / window_s
    return summary


def latencies(outcomes: list[Outcome]) -> dict[str, dict[str, float]]:
    """p50, p95, p99, mean and max of each latency, in seconds from the planned instant."""
    return {
        "ttft_s": percentiles(outcome.ttft_s for outcome in outcomes),
        "tpot_s": percentiles(outcome.tpot_s for outcome in outcomes),
        "e2e_s": percentiles(outcome.e2e_s for outcome in outcomes),
    }


def percentiles(values: Iterable[float | None]) -> dict[str, float]:
    """Empty where there is no value."""
    known = np.array([value for value in values if value is not None], dtype=float)
    if known.size == 0:
        return {}
    marks = {
        f"p{mark}": float(value)
        for mark, value in zip(PERCENTILES, np.percentile(known, PERCENTILES), strict=True)
    }
    return {**marks, "mean": float(known.mean()), "max": float(known.max())}


def describe(summary: Mapping[str, Any]) -> str:
    """The summary in a few plain lines, for a person."""
    by_kind = summary["errors_by_kind"] or ""
    lines = [
        f"{summary['num_ok']} of {summary['num_requests']} requests succeeded, "
        f"{summary['num_timeouts']} time-outs, {summary['num_errors']} errors {by_kind}"
    ]
    if "sent_rate_per_s" in summary:
        planned = summary.get("planned_rate_per_s")
        told = "" if planned is None else f" (planned {planned:.2f})"
        late_ms = 1e3 * summary["late"].get("p99", 0.0)
        lines.append(
            f"{summary['sent_rate_per_s']:.2f} requests/s sent{told}, late by {late_ms:.1f} ms at p99"
        )
        lines.append(f"{summary['output_tokens_per_s']:.0f} output tokens/s")
    for name, label in (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("e2e_s", "E2E ")):
        if marks := summary[name]:
            told = "  ".join(f"p{mark} {1e3 * marks[f'p{mark}']:.1f}" for mark in PERCENTILES)
            lines.append(f"{label} ms: {told}")
    return "\n".join(line.rstrip() for line in lines)


def read_report(path: Path) -> LoadReport:
    """The report of a load, also of one that is still running or was killed: then without a summary."""
    plan: dict[str, Any] = {}
    outcomes: list[Outcome] = []
    summary = None
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of a load that was killed
        kind = record.pop("record")
        if kind == "outcome":
            outcomes.append(Outcome(**record))
        elif kind == "summary":
            summary = record
        else:
            plan = record
    return LoadReport(plan, outcomes, summary)


def outcome_line(outcome: Outcome) -> str:
    known = {name: value for name, value in asdict(outcome).items() if value is not None}
    return json.dumps({"record": "outcome", **known})
