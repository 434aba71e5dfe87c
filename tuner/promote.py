"""Makes a configuration the champion, and takes it back. Writes Change and Champion rows.

A change is written INTENDED before the engine is touched and APPLIED after the engine has answered with
the value in force. A daemon that died in between finds the INTENDED row and asks the engine what became
of it: reconfiguring to the same configuration twice is harmless.
"""

import logging
from collections.abc import Mapping
from typing import Any

from runtime.client import Control
from runtime.errors import InvalidKnob, RuntimeFault
from runtime.knobs import EngineConfig
from store import decisions
from store.database import Store
from store.last_good import LastGood, write_last_good
from store.tables import Champion, Change, Recommendation, Verdict
from tuner.rows import ensure_config, tell

logger = logging.getLogger(__name__)


class PromoteStage:
    """The only stage that changes the champion."""

    def __init__(self, store: Store, control: Control, snapshot_id: str) -> None:
        self._store, self._control, self._snapshot_id = store, control, snapshot_id

    def champion(self) -> EngineConfig | None:
        with self._store.journal() as session:
            row = decisions.latest_champion(session, self._snapshot_id)
            return None if row is None else EngineConfig.of(decisions.config_values(session, row.config_id))

    def apply(
        self, kind: str, target: EngineConfig, reason: str, now: float, verdict_id: int | None = None
    ) -> Change:
        """Reconfigures the engine to `target` and records it. kind: start, promote, rollback, restore.

        Raises:
            RuntimeFault: the engine refused or did not answer; the change is FAILED, the champion unchanged.
        """
        before = self.champion()
        with self._store.journal() as session:
            ensure_config(session, target, now)
            change = Change(
                snapshot_id=self._snapshot_id,
                kind=kind,
                from_config_id=None if before is None else before.config_id,
                to_config_id=target.config_id,
                created_at=now,
                reason=reason,
                state="INTENDED",
                verdict_id=verdict_id,
            )
            session.add(change)
        return self._carry_out(change, target, now)

    def note(self, serving: EngineConfig, now: float) -> EngineConfig:
        """Records that the engine serves this configuration, whoever chose it, and leaves the engine as it is."""
        if self.champion() != serving:
            with self._store.journal() as session:
                ensure_config(session, serving, now)
                session.flush()
                session.add(Champion(self._snapshot_id, serving.config_id, now))
                tell(session, now, "promote", f"The engine serves {serving.config_id}; it is observed only.")
        return serving

    def recover(self, now: float) -> None:
        """Finishes changes that a former life of the daemon had announced and not confirmed."""
        with self._store.journal() as session:
            intended = decisions.intended_changes(session, self._snapshot_id)
            for overtaken in intended[:-1]:
                overtaken.state = "FAILED"
            targets = [
                EngineConfig.of(decisions.config_values(session, one.to_config_id)) for one in intended[-1:]
            ]
        for change, target in zip(intended[-1:], targets, strict=True):
            logger.warning(
                "Change %s to %s was announced and not confirmed; carrying it out",
                change.change_id,
                target.config_id,
            )
            self._carry_out(change, target, now)

    def _carry_out(self, change: Change, target: EngineConfig, now: float) -> Change:
        try:
            done = self._control.reconfigure(target.values(), None)
            if done["config_id"] != target.config_id:
                raise InvalidKnob(
                    f"The engine has {done['config_id']} in force after being asked for {target.config_id}."
                )
        except RuntimeFault as error:
            change.state = "FAILED"
            with self._store.journal() as session:
                session.merge(change)
                tell(session, now, "promote", f"Change to {target.config_id} failed: {error}")
            raise
        change.state, change.applied_at, change.version = "APPLIED", now, done["version"]
        change.prepare_s, change.commit_us = done["prepare_s"], done["commit_us"]
        with self._store.journal() as session:
            session.merge(change)
            if change.from_config_id != change.to_config_id:
                for overtaken in decisions.waiting_recommendations(session):
                    # It was proven against a champion that is gone.
                    overtaken.state, overtaken.decided_at, overtaken.decided_by = (
                        "EXPIRED",
                        now,
                        "the champion changed",
                    )
            session.add(Champion(self._snapshot_id, target.config_id, now, change.change_id))
            tell(
                session,
                now,
                "promote",
                f"{change.kind}: champion is now {target.config_id}. {change.reason}",
                {"change_id": change.change_id},
            )
        try:
            write_last_good(
                self._store.data_dir,
                LastGood(
                    values=target.values(),
                    config_id=target.config_id,
                    snapshot_id=self._snapshot_id,
                    version=done["version"],
                    at=now,
                ),
            )
        except OSError as error:  # a full disk: the change is made and recorded, and stays so
            logger.error("last_good.json still names the champion before: %s", error)
        return change

    def recommend(self, verdict: Verdict, config_id: str, now: float) -> Recommendation:
        """Keeps a winning verdict for a person; an older open one is overtaken by it."""
        recommendation = Recommendation(verdict.verdict_id, config_id, now, "OPEN")
        with self._store.journal() as session:
            for older in decisions.waiting_recommendations(session):
                older.state, older.decided_at, older.decided_by = "EXPIRED", now, "a newer verdict"
            session.add(recommendation)
            session.flush()
            tell(
                session,
                now,
                "promote",
                f"Recommendation {recommendation.recommendation_id} waits for approval: {verdict.reason}",
            )
        return recommendation

    def decide(self, recommendation_id: int, approve: bool, actor: str, now: float) -> str:
        """Carries out a person's decision; the answer says what happened.

        Raises:
            ValueError: there is no such recommendation, or it is decided already.
            RuntimeFault: the engine refused or did not answer.
        """
        with self._store.journal() as session:
            recommendation = session.get(Recommendation, recommendation_id)
            if recommendation is None or recommendation.state != "OPEN":
                state = "unknown" if recommendation is None else recommendation.state
                raise ValueError(
                    f"Recommendation {recommendation_id} is not open (it is {state}); "
                    "`tuner status` lists the open ones."
                )
            if not approve:
                recommendation.state, recommendation.decided_at, recommendation.decided_by = (
                    "REJECTED",
                    now,
                    actor,
                )
            values = decisions.config_values(session, recommendation.config_id)
            verdict_id = recommendation.verdict_id
        if not approve:
            return f"Recommendation {recommendation_id} is rejected; the champion stays."
        change = self.apply("promote", EngineConfig.of(values), f"Approved by {actor}.", now, verdict_id)
        with self._store.journal() as session:
            approved = session.get(Recommendation, recommendation_id)
            assert approved is not None, "it was read above"
            approved.state, approved.decided_at, approved.decided_by = "APPROVED", now, actor
        return f"Recommendation {recommendation_id} is applied as change {change.change_id}."

    def can_roll_back(self, to: str) -> bool:
        with self._store.journal() as session:
            history = decisions.champions_of(session, self._snapshot_id)
        return rollback_target([row.config_id for row in history], to) is not None

    def is_open(self, recommendation_id: int) -> bool:
        with self._store.journal() as session:
            return any(
                row.recommendation_id == recommendation_id
                for row in decisions.waiting_recommendations(session)
            )

    def rollback(self, to: str, reason: str, now: float) -> str:
        """Returns to the previous champion, or with `initial` to the first one of this snapshot."""
        with self._store.journal() as session:
            history = decisions.champions_of(session, self._snapshot_id)
            target_id = rollback_target([row.config_id for row in history], to)
            if target_id is None:
                return "There is nothing to roll back to: this champion is the first one here."
            target = EngineConfig.of(decisions.config_values(session, target_id))
        change = self.apply("rollback", target, reason, now)
        return f"Rolled back to {target_id} as change {change.change_id}."


def rollback_target(history: list[str], to: str) -> str | None:
    """The config_id to return to, given champions oldest first; None where there is no other.

    A rollback is itself a change: going back twice walks further back, not to and fro.
    """
    if not history:
        return None
    if to == "initial":
        return history[0] if history[0] != history[-1] else None
    trail: list[str] = []
    for config_id in history:
        if config_id in trail:
            del trail[trail.index(config_id) :]
        trail.append(config_id)
    return trail[-2] if len(trail) > 1 else None


def describe(values: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The knobs in which two configurations differ, as `name before -> after`. What a row of an earlier version does
    not name was at its default."""
    default = EngineConfig().values()
    before, after = {**default, **other}, {**default, **values}
    parts = [
        f"{name} {before.get(name)} -> {after[name]}" for name in after if after[name] != before.get(name)
    ]
    return ", ".join(parts) or "no difference"
