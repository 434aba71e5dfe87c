"""Named reads of quality checks and of the anomaly that a failed one is. Each takes an open session."""

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from store.tables import Anomaly, QualityCheck


def quality_reference(session: Session, snapshot_id: str, canary: str) -> QualityCheck | None:
    """What the snapshot's first champion made of the canary set of this name; its scores are in `details`."""
    rows = session.scalars(
        select(QualityCheck)
        .where(QualityCheck.snapshot_id == snapshot_id, QualityCheck.kind == "reference")
        .order_by(QualityCheck.quality_check_id.desc())
    )
    return next((row for row in rows if row.details.get("canary") == canary), None)


def latest_quality_check(session: Session, snapshot_id: str, kind: str) -> QualityCheck | None:
    return session.scalars(
        select(QualityCheck)
        .where(QualityCheck.snapshot_id == snapshot_id, QualityCheck.kind == kind)
        .order_by(QualityCheck.quality_check_id.desc())
        .limit(1)
    ).first()


def quality_checks_since(
    session: Session, snapshot_id: str, kind: str, since_at: float
) -> Sequence[QualityCheck]:
    """Newest first."""
    return session.scalars(
        select(QualityCheck)
        .where(
            QualityCheck.snapshot_id == snapshot_id,
            QualityCheck.kind == kind,
            QualityCheck.checked_at >= since_at,
        )
        .order_by(QualityCheck.quality_check_id.desc())
    ).all()


def open_anomaly_of(session: Session, rule: str) -> Anomaly | None:
    return session.scalars(
        select(Anomaly)
        .where(Anomaly.rule == rule, Anomaly.ended_at.is_(None))
        .order_by(Anomaly.anomaly_id.desc())
        .limit(1)
    ).first()
