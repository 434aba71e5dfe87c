"""The champion and what speaks for it: the rows that every export is written from."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from store.decisions import experiments_against, latest_champion
from store.errors import UnknownRow
from store.explain import ExperimentRecord, experiment_record, explain
from store.latency import RequestSummary, summarise
from store.queries import last_snapshot, timings_of_slice
from store.tables import Change, Config, Experiment, Snapshot, Verdict

PROBATION_PAIRS = 10  # from which on a probation may conclude


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

    @property
    def why_provisional(self) -> str | None:
        """None once the gain was seen again after the promotion, against the former champion."""
        if not self.is_proven:
            return "no experiment on live traffic has compared it with another configuration."
        num = sum(pair.difference is not None for record in self.holdbacks for pair in record.pairs)
        if num < PROBATION_PAIRS:
            return f"on probation, {num} of {PROBATION_PAIRS} pairs against the former champion are scored."
        return None


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
