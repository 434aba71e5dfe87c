"""Why a configuration serves: the whole chain of rows behind one change or one experiment.

cause ─▶ study ─▶ proposal ─▶ trial (probe) ─▶ experiment ─▶ slices in pairs ─▶ verdict ─▶ change
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from store.decisions import slices_of, spend_of, trial_of_experiment, verdict_of
from store.errors import UnknownRow
from store.tables import (
    AlphaSpend,
    Change,
    Config,
    Experiment,
    Proposal,
    Recommendation,
    Slice,
    Snapshot,
    Study,
    Trial,
    TwinFit,
    Verdict,
)


@dataclass(frozen=True)
class Pair:
    """Two slices, one of each arm, in the order in which they were served."""

    index: int
    slices: tuple[Slice, ...]

    def of(self, arm: str) -> Slice | None:
        return next((row for row in self.slices if row.arm == arm), None)

    @property
    def difference(self) -> float | None:
        """Response of the challenger less that of the champion, log units; None unless both are scored."""
        champion, challenger = self.of("champion"), self.of("challenger")
        if champion is None or challenger is None or {champion.state, challenger.state} != {"SCORED"}:
            return None
        if champion.response is None or challenger.response is None:
            return None
        return challenger.response - champion.response


@dataclass(frozen=True)
class ExperimentRecord:
    """An experiment with everything that was recorded of it. `verdict` is None until it is decided."""

    experiment: Experiment
    slices: Sequence[Slice]
    verdict: Verdict | None
    spend: AlphaSpend | None
    twin_fit: TwinFit | None
    champion: Config
    challenger: Config

    @property
    def pairs(self) -> list[Pair]:
        """By index; a pair of which only one slice was planned has only that."""
        indices = sorted({row.pair_index for row in self.slices})
        return [
            Pair(index, tuple(row for row in self.slices if row.pair_index == index)) for index in indices
        ]

    @property
    def changed_knobs(self) -> dict[str, tuple[object, object]]:
        """Knob -> (champion's value, challenger's value), where they differ."""
        return changed_knobs(self.champion, self.challenger)


@dataclass(frozen=True)
class Explanation:
    """The chain behind a change or an experiment. What does not belong to it is None: a start has no verdict."""

    snapshot: Snapshot
    change: Change | None
    from_config: Config | None
    to_config: Config
    recommendation: Recommendation | None
    record: ExperimentRecord | None
    trial: Trial | None
    probe: ExperimentRecord | None
    proposal: Proposal | None
    study: Study | None

    @property
    def cause(self) -> str:
        """What set it off, in words: the proposal's cause, else the study's, else the change's own reason."""
        if self.proposal is not None:
            return self.proposal.cause
        if self.study is not None:
            return self.study.cause
        return self.change.reason if self.change is not None else ""

    @property
    def verdict(self) -> Verdict | None:
        return self.record.verdict if self.record is not None else None

    @property
    def changed_knobs(self) -> dict[str, tuple[object, object]]:
        """Knob -> (value before, value after), where they differ; all of them where nothing served before."""
        return changed_knobs(self.from_config, self.to_config)


def changed_knobs(before: Config | None, after: Config) -> dict[str, tuple[object, object]]:
    old = before.values if before is not None else {}
    return {name: (old.get(name), new) for name, new in after.values.items() if old.get(name) != new}


def experiment_record(journal: Session, experiment_id: str) -> ExperimentRecord:
    """Raises UnknownRow where there is no such experiment."""
    experiment = journal.get(Experiment, experiment_id)
    if experiment is None:
        raise UnknownRow(
            f"No experiment has the id {experiment_id!r}. `tuner history` lists those there are."
        )
    fit = journal.get(TwinFit, experiment.twin_fit_id) if experiment.twin_fit_id is not None else None
    return ExperimentRecord(
        experiment,
        slices_of(journal, experiment_id),
        verdict_of(journal, experiment_id),
        spend_of(journal, experiment_id),
        fit,
        _config(journal, experiment.champion_config_id),
        _config(journal, experiment.challenger_config_id),
    )


def explain(
    journal: Session, *, change_id: int | None = None, experiment_id: str | None = None
) -> Explanation:
    """Follows the chain from a change, or from an experiment that may not have led to one.

    Raises:
        UnknownRow: no such change or experiment.
        ValueError: not exactly one of the two is given.
    """
    if (change_id is None) == (experiment_id is None):
        raise ValueError(
            f"Give `change_id` or `experiment_id`, one of the two, but got {change_id!r} and {experiment_id!r}."
        )
    if experiment_id is not None:
        record: ExperimentRecord | None = experiment_record(journal, experiment_id)
        change = _change_of(journal, record.verdict) if record is not None else None
    else:
        change = journal.get(Change, change_id)
        if change is None:
            raise UnknownRow(f"No change has the id {change_id}. `tuner history` lists those there are.")
        verdict = journal.get(Verdict, change.verdict_id) if change.verdict_id is not None else None
        record = experiment_record(journal, verdict.experiment_id) if verdict is not None else None
    return _explanation(journal, change, record)


def _explanation(journal: Session, change: Change | None, record: ExperimentRecord | None) -> Explanation:
    if change is not None:
        snapshot_id, from_id, to_id = change.snapshot_id, change.from_config_id, change.to_config_id
    else:
        assert record is not None
        found = record.experiment
        snapshot_id, from_id, to_id = found.snapshot_id, found.champion_config_id, found.challenger_config_id
    snapshot = journal.get(Snapshot, snapshot_id)
    assert snapshot is not None, "a foreign key holds it"
    trial = _trial_of(journal, record.experiment) if record is not None else None
    study_id = record.experiment.study_id if record is not None else None
    return Explanation(
        snapshot=snapshot,
        change=change,
        from_config=_config(journal, from_id) if from_id is not None else None,
        to_config=_config(journal, to_id),
        recommendation=_recommendation_of(journal, record.verdict) if record is not None else None,
        record=record,
        trial=trial,
        probe=_probe_of(journal, trial, record),
        proposal=journal.get(Proposal, trial.proposal_id) if trial is not None else None,
        study=journal.get(Study, study_id) if study_id is not None else None,
    )


def _config(journal: Session, config_id: str) -> Config:
    config = journal.get(Config, config_id)
    if config is None:
        raise UnknownRow(f"No configuration has the id {config_id!r}.")
    return config


def _change_of(journal: Session, verdict: Verdict | None) -> Change | None:
    """The change that the verdict led to."""
    if verdict is None:
        return None
    led_to = select(Change).where(Change.verdict_id == verdict.verdict_id).order_by(Change.change_id).limit(1)
    return journal.scalars(led_to).first()


def _recommendation_of(journal: Session, verdict: Verdict | None) -> Recommendation | None:
    if verdict is None:
        return None
    return journal.scalars(
        select(Recommendation).where(Recommendation.verdict_id == verdict.verdict_id)
    ).first()


def _trial_of(journal: Session, experiment: Experiment) -> Trial | None:
    """A probe's own trial; of a test, the trial of its study that probed the same configuration."""
    own = trial_of_experiment(journal, experiment.experiment_id)
    if own is not None or experiment.study_id is None:
        return own
    probed = select(Trial).where(
        Trial.study_id == experiment.study_id, Trial.config_id == experiment.challenger_config_id
    )
    return journal.scalars(probed.order_by(Trial.trial_id.desc()).limit(1)).first()


def _probe_of(
    journal: Session, trial: Trial | None, record: ExperimentRecord | None
) -> ExperimentRecord | None:
    if trial is None or trial.experiment_id is None or record is None:
        return None
    if trial.experiment_id == record.experiment.experiment_id:
        return None  # the record itself is the probe
    return experiment_record(journal, trial.experiment_id)
