"""A proof as plain data in a fixed order, and in the few lines that stand on top of every export.

The text depends on the rows alone: the same rows give the same bytes.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from store.explain import ExperimentRecord
from store.latency import LatencySummary, RequestSummary
from store.proof import Proof

EXPORT_SCHEMA_VERSION = 1
SIGNIFICANT_DIGITS = 4


def body(proof: Proof, tuner_version: str) -> dict[str, Any]:
    """What YAML and JSON hold."""
    return {
        "knobs": {"start": dict(sorted(proof.config.values.items()))},
        "evidence": evidence(proof, tuner_version),
    }


def comments(proof: Proof, tuner_version: str) -> str:
    """The lines on top, each behind a `#`."""
    return commented(_summary(proof, tuner_version))


def commented(lines: Iterable[str]) -> str:
    """Each line behind a `#`; a name with a line break in it must not become a command."""
    return "".join(f"# {' '.join(line.splitlines())}\n" for line in lines)


def evidence(proof: Proof, tuner_version: str) -> dict[str, Any]:
    """The evidence as plain data, in a fixed order. Where the model lay on this machine proves nothing: left out."""
    return _present(
        {
            "schema_version": EXPORT_SCHEMA_VERSION,
            "config_id": proof.config.config_id,
            "knob_schema_version": proof.config.knob_schema_version,
            "tuner_version": tuner_version,
            "snapshot_id": proof.snapshot.snapshot_id,
            "proven": proof.is_proven,
            "provisional": proof.why_provisional is not None,
            "why_provisional": proof.why_provisional,
            "serving_since": _utc(proof.change.applied_at) if proof.change is not None else None,
            "change": _change(proof),
            "verdict": _verdict(proof.record) if proof.record is not None else None,
            "requests": _requests(proof),
            "holdback": _holdback(proof.holdbacks),
            "model": {name: told for name, told in sorted(proof.snapshot.model.items()) if name != "path"},
            "hardware": dict(sorted(proof.snapshot.hardware.items())),
            "versions": dict(sorted(proof.snapshot.versions.items())),
        }
    )


def _change(proof: Proof) -> dict[str, Any] | None:
    if proof.change is None:
        return None
    knobs = (
        {name: list(values) for name, values in sorted(proof.record.changed_knobs.items())}
        if proof.record
        else None
    )
    return _present(
        {
            "kind": proof.change.kind,
            "from_config_id": proof.change.from_config_id,
            "reason": proof.change.reason,
            "knobs_before_and_after": knobs,
        }
    )


def _verdict(record: ExperimentRecord) -> dict[str, Any] | None:
    verdict = record.verdict
    if verdict is None:
        return None
    interval = (verdict.interval_low_ratio, verdict.interval_high_ratio)
    judgement = verdict.evidence.get("judgement", {})
    return _present(
        {
            "outcome": verdict.outcome,
            "metric": record.experiment.rules.get("metric"),
            "effect_ratio": verdict.effect_ratio,
            "interval_ratio": list(interval) if None not in interval else None,
            "num_pairs": verdict.num_pairs,
            "p_value": verdict.p_value,
            "level": verdict.level,
            "decided_at": _utc(verdict.decided_at),
            "experiment_id": verdict.experiment_id,
            "reason": verdict.reason,
            "traffic": _present(judgement.get("seen") or {}) or None,
            "guardrails": judgement.get("guardrails") or None,
        }
    )


def _requests(proof: Proof) -> dict[str, Any] | None:
    """Percentiles of both arms over the same randomised slices: before is the former champion."""
    arms = {"before": proof.before, "after": proof.after}
    return {name: _arm(summary) for name, summary in arms.items() if summary is not None} or None


def _arm(summary: RequestSummary) -> dict[str, Any]:
    latencies = {"ttft_s": summary.ttft, "tpot_s": summary.tpot, "e2e_s": summary.e2e}
    return _present(
        {
            "num_requests": summary.num,
            "success_ratio": summary.success_ratio,
            **{name: _latency(found) for name, found in latencies.items() if found is not None},
        }
    )


def _latency(summary: LatencySummary) -> dict[str, Any]:
    return _present({"p50": summary.p50, "p95": summary.p95, "p99": summary.p99, "mean": summary.mean})


def _holdback(records: Sequence[ExperimentRecord]) -> dict[str, Any] | None:
    """How the champion did against the one it replaced, in the pairs served after the promotion."""
    differences = [
        pair.difference for record in records for pair in record.pairs if pair.difference is not None
    ]
    if not differences:
        return None
    effect = math.exp(-math.fsum(differences) / len(differences)) - 1
    return _present({"num_pairs": len(differences), "effect_ratio": effect})


def _summary(proof: Proof, tuner_version: str) -> list[str]:
    """The comment on top: what a reader wants to know before anything else."""
    model, device = proof.snapshot.model.get("name"), proof.snapshot.hardware.get("device_name")
    lines = [
        f"Configuration {proof.config.config_id}, exported by Tuner {tuner_version}.",
        " on ".join(str(part) for part in (model, device) if part) + ".",
        _told_proof(proof),
    ]
    if proof.why_provisional is not None:
        lines.append(f"Provisional: {proof.why_provisional}")
    lines.append(f"Snapshot {proof.snapshot.snapshot_id}: {_versions(proof)}.")
    return lines


def _told_proof(proof: Proof) -> str:
    verdict = proof.verdict
    if not proof.is_proven or verdict is None or proof.record is None:
        return "Not proven."
    metric = proof.record.experiment.rules.get("metric", "latency")
    told = f"Proven on live traffic: {metric} {_percent(verdict.effect_ratio)}"
    if verdict.interval_low_ratio is not None and verdict.interval_high_ratio is not None:
        told += f" ({_percent(verdict.interval_low_ratio)} to {_percent(verdict.interval_high_ratio)})"
    told += f" against the former champion, {verdict.num_pairs} pairs of slices"
    return told + (f", p = {_rounded(verdict.p_value)}." if verdict.p_value is not None else ".")


def _versions(proof: Proof) -> str:
    known = ", ".join(f"{name} {version}" for name, version in sorted(proof.snapshot.versions.items()))
    return known or "no versions recorded"


def _percent(ratio: float | None) -> str:
    return "by an unknown amount" if ratio is None else f"{100 * ratio:+.1f} %"


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is None, and with numbers to a few digits."""
    return {name: _rounded(value) for name, value in values.items() if value is not None}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    return value


def _utc(at: float | None) -> str | None:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC") if at is not None else None
