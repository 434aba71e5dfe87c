"""Named reads of the journal by which the daemon finds out where it stands. Each takes an open session.

Everything that the daemon decides is a row, so that these reads are also what a restarted daemon needs.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from store.tables import (
    AlphaSpend,
    Anomaly,
    Champion,
    Change,
    Config,
    Experiment,
    OperatorAction,
    Proposal,
    Recommendation,
    Slice,
    Study,
    Trial,
    Verdict,
)


def config_values(session: Session, config_id: str) -> dict[str, Any]:
    """Every knob of a recorded configuration. Raises KeyError where it was never recorded."""
    row = session.get(Config, config_id)
    if row is None:
        raise KeyError(f"Configuration {config_id} is not in the journal.")
    return dict(row.values)


# --- champions and changes ------------------------------------------------------------------------


def latest_champion(session: Session, snapshot_id: str) -> Champion | None:
    return session.scalars(
        select(Champion)
        .where(Champion.snapshot_id == snapshot_id)
        .order_by(Champion.champion_id.desc())
        .limit(1)
    ).first()


def champions_of(session: Session, snapshot_id: str) -> Sequence[Champion]:
    """Oldest first."""
    return session.scalars(
        select(Champion).where(Champion.snapshot_id == snapshot_id).order_by(Champion.champion_id)
    ).all()


def intended_changes(session: Session, snapshot_id: str) -> Sequence[Change]:
    """Announced and never confirmed: the daemon died in between."""
    return session.scalars(
        select(Change)
        .where(Change.snapshot_id == snapshot_id, Change.state == "INTENDED")
        .order_by(Change.change_id)
    ).all()


def last_applied_change(session: Session, snapshot_id: str) -> Change | None:
    """The newest change that moved the champion; putting it back in force after a restart is none."""
    return session.scalars(
        select(Change)
        .where(
            Change.snapshot_id == snapshot_id,
            Change.state == "APPLIED",
            Change.from_config_id.is_distinct_from(Change.to_config_id),
        )
        .order_by(Change.change_id.desc())
        .limit(1)
    ).first()


def waiting_recommendations(session: Session) -> Sequence[Recommendation]:
    return session.scalars(
        select(Recommendation)
        .where(Recommendation.state == "OPEN")
        .order_by(Recommendation.recommendation_id)
    ).all()


# --- studies and trials ---------------------------------------------------------------------------


def running_study(session: Session, snapshot_id: str) -> Study | None:
    return session.scalars(
        select(Study)
        .where(Study.snapshot_id == snapshot_id, Study.state == "RUNNING")
        .order_by(Study.study_id.desc())
        .limit(1)
    ).first()


def last_study(session: Session, snapshot_id: str) -> Study | None:
    return session.scalars(
        select(Study).where(Study.snapshot_id == snapshot_id).order_by(Study.study_id.desc()).limit(1)
    ).first()


def outcomes_of_study(session: Session, study_id: int) -> Sequence[str]:
    """Verdicts of the study's tests, oldest first."""
    return session.scalars(
        select(Verdict.outcome)
        .join(Experiment, Experiment.experiment_id == Verdict.experiment_id)
        .where(Experiment.study_id == study_id)
        .order_by(Verdict.verdict_id)
    ).all()


def study_trials(session: Session, study_id: int) -> Sequence[Trial]:
    return session.scalars(select(Trial).where(Trial.study_id == study_id).order_by(Trial.trial_id)).all()


def predictions_of(session: Session, proposal_ids: Sequence[int]) -> dict[int, float | None]:
    """proposal_id -> log ratio to the champion that the replay predicted, None where there was no replay."""
    rows = session.execute(
        select(Proposal.proposal_id, Proposal.predicted_log_ratio).where(
            Proposal.proposal_id.in_(proposal_ids)
        )
    )
    return {row.proposal_id: row.predicted_log_ratio for row in rows}


def running_trials(session: Session) -> Sequence[Trial]:
    return session.scalars(select(Trial).where(Trial.state == "RUNNING")).all()


def trial_of_experiment(session: Session, experiment_id: str) -> Trial | None:
    return session.scalars(select(Trial).where(Trial.experiment_id == experiment_id)).first()


def tested_configs(session: Session, study_id: int) -> set[str]:
    """Challengers of the study whose test came to a verdict; one that was interrupted may be tested again."""
    return set(
        session.scalars(
            select(Experiment.challenger_config_id).where(
                Experiment.study_id == study_id,
                Experiment.kind == "test",
                ~Experiment.reason.startswith("interrupted"),
            )
        ).all()
    )


# --- experiments ----------------------------------------------------------------------------------


def running_experiments(session: Session) -> Sequence[Experiment]:
    return session.scalars(
        select(Experiment).where(Experiment.state == "RUNNING").order_by(Experiment.created_at)
    ).all()


def all_experiments(session: Session) -> Sequence[Experiment]:
    return session.scalars(select(Experiment).order_by(Experiment.created_at)).all()


def slices_of(session: Session, experiment_id: str) -> list[Slice]:
    return list(
        session.scalars(
            select(Slice)
            .where(Slice.experiment_id == experiment_id)
            .order_by(Slice.pair_index, Slice.position)
        ).all()
    )


def experiments_against(
    session: Session, kind: str, challenger_config_id: str, since_at: float
) -> Sequence[Experiment]:
    return session.scalars(
        select(Experiment)
        .where(
            Experiment.kind == kind,
            Experiment.challenger_config_id == challenger_config_id,
            Experiment.created_at >= since_at,
        )
        .order_by(Experiment.created_at)
    ).all()


def recent_champion_slices(session: Session, config_id: str, limit: int) -> Sequence[Slice]:
    """The newest scored slices in which this configuration was the champion, over all experiments."""
    return session.scalars(
        select(Slice)
        .where(Slice.arm == "champion", Slice.config_id == config_id, Slice.state == "SCORED")
        .order_by(Slice.planned_start_at.desc())
        .limit(limit)
    ).all()


def spends_of(session: Session, snapshot_id: str, context_key: str) -> Sequence[AlphaSpend]:
    """The stream of tests whose levels LORD++ pays, oldest first."""
    return session.scalars(
        select(AlphaSpend)
        .where(AlphaSpend.snapshot_id == snapshot_id, AlphaSpend.context_key == context_key)
        .order_by(AlphaSpend.test_index)
    ).all()


def spend_of(session: Session, experiment_id: str) -> AlphaSpend | None:
    return session.scalars(select(AlphaSpend).where(AlphaSpend.experiment_id == experiment_id)).first()


def unheeded_promotion(session: Session, snapshot_id: str, champion_config_id: str) -> Verdict | None:
    """The newest PROMOTE against this champion that led to nothing yet: a death, or an engine that did not answer."""
    verdict = session.scalars(
        select(Verdict)
        .join(Experiment, Experiment.experiment_id == Verdict.experiment_id)
        .where(
            Verdict.outcome == "PROMOTE",
            Experiment.kind == "test",  # the champion against itself is never promoted
            Experiment.snapshot_id == snapshot_id,
            Experiment.champion_config_id == champion_config_id,
        )
        .order_by(Verdict.verdict_id.desc())
        .limit(1)
    ).first()
    if verdict is None:
        return None
    changed = select(Change.change_id).where(
        Change.verdict_id == verdict.verdict_id, Change.state == "APPLIED"
    )
    recommended = select(Recommendation.recommendation_id).where(
        Recommendation.verdict_id == verdict.verdict_id
    )
    heeded = session.scalars(changed).first() is not None or session.scalars(recommended).first() is not None
    return None if heeded else verdict


def ended_probes(session: Session) -> Sequence[Experiment]:
    """Experiments that are over although their trial still counts as running."""
    return session.scalars(
        select(Experiment)
        .join(Trial, Trial.experiment_id == Experiment.experiment_id)
        .where(Trial.state == "RUNNING", Experiment.state != "RUNNING")
    ).all()


def verdict_of(session: Session, experiment_id: str) -> Verdict | None:
    return session.scalars(select(Verdict).where(Verdict.experiment_id == experiment_id)).first()


# --- what freezes or pauses -----------------------------------------------------------------------


def open_faults(session: Session) -> list[str]:
    """Reasons of the faults that are not over; no promotion happens under one."""
    return list(
        session.scalars(
            select(Anomaly.reason).where(Anomaly.kind == "fault", Anomaly.ended_at.is_(None))
        ).all()
    )


def is_paused(session: Session) -> bool:
    """Whether the last pause or resume that was carried out was a pause."""
    last = session.scalars(
        select(OperatorAction.action)
        .where(OperatorAction.action.in_(("pause", "resume")), OperatorAction.state == "DONE")
        .order_by(OperatorAction.operator_action_id.desc())
        .limit(1)
    ).first()
    return last == "pause"
