"""A comparison as rows: the check that it was, and the anomaly that a failed one of the champion is."""

from typing import Any, Literal

from runtime.knobs import EngineConfig
from store.tables import Anomaly, QualityCheck
from tuner.quality.comparison import Comparison, QualityLimits

RULE = "quality_drop"

Kind = Literal["reference", "periodic", "challenger"]


def check_row(
    snapshot_id: str, kind: Kind, config: EngineConfig, reference_id: str, found: Comparison,
    details: dict[str, Any], now: float,
) -> QualityCheck:  # fmt: skip
    return QualityCheck(
        snapshot_id=snapshot_id,
        kind=kind,
        config_id=config.config_id,
        reference_config_id=reference_id,
        checked_at=now,
        num_positions=found.num_positions,
        delta_nll=found.delta_nll,
        delta_nll_high=found.delta_nll_high,
        top1_agreement=found.top1_agreement,
        top1_low=found.top1_low,
        is_passed=found.is_passed,
        reason="The reference itself." if kind == "reference" else found.reason,
        details={**details, "num_passages": found.num_passages},
    )


def drop_of(found: Comparison, limits: QualityLimits, change_id: int | None, now: float) -> Anomaly:
    """The anomaly that a failed check of the champion is: a page, since people read the answers."""
    return Anomaly(
        rule=RULE,
        kind="condition",
        metric="quality_delta_nll",
        started_at=now,
        observed=found.delta_nll_high,
        limit=limits.max_delta_nll,
        reason=f"The champion's answers are worse than the reference's. {found.reason}",
        layer="A",
        severity="page",
        worst=found.delta_nll_high,
        change_id=change_id,
        details={"top1_low": found.top1_low, "slack": found.slack},
    )
