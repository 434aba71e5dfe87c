"""Everything that a verdict was made of, as one document that `tuner verify` can judge again.

    rules, coins with their salts, slice scores, twin parameters, the stream of levels, seeds ▶ the verdict

Raw timings are not in it: they age out, and the slice scores are what the judge saw.
"""

from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from store.errors import UnknownRow
from store.explain import ExperimentRecord, experiment_record
from store.seal import Document, canonical, sealed
from store.tables import AlphaSpend, Anomaly, Change, JournalBase, Run, Snapshot, Study, Verdict, table_of

EVIDENCE_FORMAT = "tuner-evidence"
EVIDENCE_SCHEMA_VERSION = 1


def export_evidence(journal: Session, experiment_id: str | None, tuner_version: str) -> str:
    """The sealed document of one experiment; of the last one that was promoted or else decided, if None.

    Raises:
        UnknownRow: no such experiment, or it has no verdict.
    """
    record = experiment_record(journal, experiment_id or _newest(journal))
    if record.verdict is None:
        raise UnknownRow(
            f"Experiment {record.experiment.experiment_id} ({record.experiment.kind}, {record.experiment.state}) "
            "has no verdict, so there is nothing to prove. `tuner history` names those that have one."
        )
    return canonical(sealed(_document(journal, record, record.verdict, tuner_version)))


def _newest(journal: Session) -> str:
    led = select(Change.verdict_id).where(Change.state == "APPLIED", Change.verdict_id.is_not(None))
    verdicts = select(Verdict.experiment_id).order_by(Verdict.verdict_id.desc()).limit(1)
    found = (
        journal.scalars(verdicts.where(Verdict.verdict_id.in_(led))).first()
        or journal.scalars(verdicts).first()
    )
    if found is None:
        raise UnknownRow("No experiment has come to a verdict yet, so there is no evidence to export.")
    return found


def _document(journal: Session, record: ExperimentRecord, verdict: Verdict, tuner_version: str) -> Document:
    experiment = record.experiment
    snapshot = journal.get(Snapshot, experiment.snapshot_id)
    study = journal.get(Study, experiment.study_id) if experiment.study_id is not None else None
    assert snapshot is not None, "a foreign key holds it"
    model = {
        name: told for name, told in snapshot.model.items() if name != "path"
    }  # proves nothing, tells a name
    return {
        "format": EVIDENCE_FORMAT,
        "evidence_schema_version": EVIDENCE_SCHEMA_VERSION,
        "tuner_version": tuner_version,
        "snapshot": {**columns(snapshot), "model": model},
        "champion": columns(record.champion),
        "challenger": columns(record.challenger),
        "experiment": columns(experiment),
        "study": columns(study) if study is not None else None,
        "twin_fit": columns(record.twin_fit) if record.twin_fit is not None else None,
        "slices": [columns(row) for row in record.slices],
        "stream": _stream(journal, record.spend),
        "faults": [columns(row) for row in _faults_at(journal, verdict.decided_at)],
        "verdict": columns(verdict),
    }


def columns(row: JournalBase) -> dict[str, Any]:
    return {column.name: getattr(row, column.name) for column in table_of(type(row)).columns}


def _stream(journal: Session, spend: AlphaSpend | None) -> list[dict[str, Any]]:
    """Every level paid in the stream up to this test's, each with the false discovery rate in force when it was."""
    if spend is None:
        return []
    earlier = (
        select(AlphaSpend)
        .where(
            AlphaSpend.snapshot_id == spend.snapshot_id,
            AlphaSpend.context_key == spend.context_key,
            AlphaSpend.test_index <= spend.test_index,
        )
        .order_by(AlphaSpend.test_index)
    )
    return [{**columns(row), "fdr": _fdr_at(journal, row.created_at)} for row in journal.scalars(earlier)]


def _fdr_at(journal: Session, at: float) -> float | None:
    """As the settings of the daemon's life said that opened the test; None where that life was not recorded."""
    lives = select(Run).where(Run.started_at <= at).order_by(Run.started_at.desc()).limit(1)
    run = journal.scalars(lives).first()
    return None if run is None else run.settings.get("experiment", {}).get("fdr")


def _faults_at(journal: Session, at: float) -> list[Anomaly]:
    """Faults that the verdict must have known of."""
    open_then = select(Anomaly).where(
        Anomaly.kind == "fault",
        Anomaly.started_at <= at,
        Anomaly.ended_at.is_(None) | (Anomaly.ended_at > at),
    )
    rows = journal.scalars(open_then.order_by(Anomaly.anomaly_id))
    # One that was noticed later, or that came and went under one row, may not have been known at that moment.
    return [
        row
        for row in rows
        if row.details.get("noticed_at", row.started_at) <= at and "num_returns" not in row.details
    ]
