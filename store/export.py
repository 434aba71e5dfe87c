"""The proven configuration as text: what to start the next server with, and why anybody should.

    knobs:
      start: {...}       every knob; `tuner run --config FILE` reads it
    evidence: {...}      what proved it, on which model, hardware and traffic; for people and for audits

The text depends on the rows alone: the same rows give the same bytes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import yaml
from sqlalchemy import select
from sqlalchemy.orm import Session

from store.decisions import experiments_against, latest_champion
from store.errors import BadExport, UnknownRow
from store.explain import ExperimentRecord, experiment_record, explain
from store.latency import LatencySummary, RequestSummary, summarise
from store.queries import last_snapshot, timings_of_slice
from store.tables import Change, Config, Experiment, Snapshot, Verdict

EXPORT_SCHEMA_VERSION = 1
SIGNIFICANT_DIGITS = 4


@dataclass(frozen=True)
class Proof:
    """A configuration and what speaks for it.

    change: made it the champion, by a verdict where one did.
    before, after: requests of the champion's and of the challenger's slices in the experiment that decided.
    holdbacks: slices of the former champion after the change.
    """

    config: Config
    snapshot: Snapshot
    change: Change | None
    record: ExperimentRecord | None
    before: RequestSummary | None
    after: RequestSummary | None
    holdbacks: Sequence[ExperimentRecord]

    @property
    def verdict(self) -> Verdict | None:
        return self.record.verdict if self.record is not None else None

    @property
    def is_proven(self) -> bool:
        return self.verdict is not None and self.verdict.outcome == "PROMOTE"


def proof_of_champion(journal: Session, metrics: Session | None, snapshot_id: str | None = None) -> Proof:
    """Gathers the proof of the champion: of the model that served last, where no snapshot is named.

    metrics: None where the metrics file is gone; the percentiles are then absent.

    Raises:
        UnknownRow: there is no champion yet.
    """
    if snapshot_id is None:
        newest = last_snapshot(journal)
        snapshot_id = newest.snapshot_id if newest is not None else None
    champion = latest_champion(journal, snapshot_id) if snapshot_id is not None else None
    if champion is None:
        raise UnknownRow(
            "There is no champion to export yet. Run `tuner run` until a configuration has served."
        )
    promotion = _promotion_to(journal, champion.snapshot_id, champion.config_id)
    if promotion is None:
        config, snapshot = (
            journal.get(Config, champion.config_id),
            journal.get(Snapshot, champion.snapshot_id),
        )
        assert config is not None and snapshot is not None, "foreign keys hold them"
        change = journal.get(Change, champion.change_id) if champion.change_id is not None else None
        return Proof(config, snapshot, change, None, None, None, ())
    why = explain(journal, change_id=promotion.change_id)
    arms = _requests_by_arm(metrics, why.record) if metrics is not None and why.record is not None else {}
    holdbacks = _holdbacks_of(journal, promotion)
    before, after = arms.get("champion"), arms.get("challenger")
    return Proof(why.to_config, why.snapshot, promotion, why.record, before, after, holdbacks)


def _promotion_to(journal: Session, snapshot_id: str, config_id: str) -> Change | None:
    """The newest change to this configuration that a verdict led to; a rollback to it needed no new one."""
    led = select(Change).where(
        Change.snapshot_id == snapshot_id,
        Change.to_config_id == config_id,
        Change.state == "APPLIED",
        Change.verdict_id.is_not(None),
    )
    return journal.scalars(led.order_by(Change.change_id.desc()).limit(1)).first()


def _requests_by_arm(metrics: Session, record: ExperimentRecord) -> dict[str, RequestSummary]:
    """Requests that arrived after the burn-in of the scored slices, by arm; an arm without any is left out."""
    found = {}
    for arm in ("champion", "challenger"):
        judged_from = {
            row.slice_id: row.planned_start_at + row.burn_in_s
            for row in record.slices
            if row.arm == arm and row.state == "SCORED"
        }
        timings = timings_of_slice(metrics, judged_from)
        summary = summarise(row for row in timings if row.arrived_at >= judged_from[row.arrival_slice or ""])
        if summary.num:
            found[arm] = summary
    return found


def _holdbacks_of(journal: Session, promotion: Change) -> list[ExperimentRecord]:
    if promotion.from_config_id is None or promotion.applied_at is None:
        return []
    experiments: Sequence[Experiment] = experiments_against(
        journal, "holdback", promotion.from_config_id, promotion.applied_at
    )
    ours = [found for found in experiments if found.champion_config_id == promotion.to_config_id]
    return [experiment_record(journal, found.experiment_id) for found in ours]


# --- YAML -----------------------------------------------------------------------------------------


def export_yaml(proof: Proof, tuner_version: str) -> str:
    """The configuration with its evidence. An absent measurement is an absent key."""
    body = {
        "knobs": {"start": dict(sorted(proof.config.values.items()))},
        "evidence": evidence(proof, tuner_version),
    }
    comments = "".join(f"# {line}\n" for line in _summary(proof, tuner_version))
    return comments + yaml.dump(body, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class _Dumper(yaml.SafeDumper):
    """Writes repeated values out: settings are read without aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


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
    lines = [f"Configuration {proof.config.config_id}, exported by Tuner {tuner_version}."]
    lines.append(" on ".join(str(part) for part in (model, device) if part) + ".")
    verdict = proof.verdict
    if not proof.is_proven or verdict is None or proof.record is None:
        return [
            *lines,
            "Not proven: no experiment on live traffic has compared it with another configuration.",
        ]
    metric = proof.record.experiment.rules.get("metric", "latency")
    told = f"Proven on live traffic: {metric} {_percent(verdict.effect_ratio)}"
    if verdict.interval_low_ratio is not None and verdict.interval_high_ratio is not None:
        told += f" ({_percent(verdict.interval_low_ratio)} to {_percent(verdict.interval_high_ratio)})"
    told += f" against the former champion, {verdict.num_pairs} pairs of slices"
    told += f", p = {_rounded(verdict.p_value)}." if verdict.p_value is not None else "."
    return [*lines, told]


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


# --- reading back ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExportedConfig:
    values: dict[str, Any]
    config_id: str
    knob_schema_version: int
    evidence: dict[str, Any]


def read_export(text: str) -> ExportedConfig:
    """Reads what `export_yaml` wrote.

    Raises:
        BadExport: not such a text, or of a newer schema.
    """
    try:
        body = yaml.safe_load(text)
        told = body["evidence"]
        exported = ExportedConfig(
            dict(body["knobs"]["start"]), str(told["config_id"]), int(told["knob_schema_version"]), dict(told)
        )
        schema_version = int(told["schema_version"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise BadExport(
            f"An exported configuration holds `knobs.start` and `evidence`, but got: {error!r}."
        ) from error
    if schema_version > EXPORT_SCHEMA_VERSION:
        raise BadExport(
            f"The export has schema {schema_version}, but this version reads up to {EXPORT_SCHEMA_VERSION}. "
            "Export it again with this version, or upgrade the tuner."
        )
    return exported
