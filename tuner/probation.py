"""Watches a promotion after the fact: holdback pairs now and then, rollback when the gain has turned or faded.

Reads Change, Verdict and holdback Slice rows; the daemon opens the pair or rolls back as it is told.
"""

from dataclasses import dataclass

from runtime.knobs import EngineConfig
from store import decisions, evidence
from store.database import Store
from store.tables import Verdict
from tuner.holdback import MIN_PAIRS, holdback_share, judge_holdback, known_effect, seconds_between_pairs
from tuner.settings import Settings


@dataclass(frozen=True)
class Due:
    """What probation asks for now: a pair against the former champion, or a rollback with its reason."""

    former: EngineConfig | None = None
    rollback_reason: str | None = None


class Probation:
    """The last promotion by verdict, for as long as the settings say and until MIN_PAIRS pairs are scored."""

    def __init__(self, store: Store, settings: Settings, snapshot_id: str) -> None:
        self._store, self._settings, self._snapshot_id = store, settings, snapshot_id

    def step(self, now: float, slice_s: float) -> Due:
        """What is due now, where a slice takes `slice_s`."""
        if self._settings.holdback.share == 0.0:
            return Due()
        with self._store.journal() as session:
            change = decisions.last_applied_change(session, self._snapshot_id)
            if change is None or change.kind != "promote" or change.applied_at is None:
                return Due()
            if change.verdict_id is None or change.from_config_id is None:
                return Due()
            applied_at = change.applied_at
            verdict = session.get(Verdict, change.verdict_id)
            last_at = evidence.last_holdback_at(session, change) or applied_at
            differences = evidence.holdback_differences(session, change)
            former = EngineConfig.of(decisions.config_values(session, change.from_config_id))
        if verdict is None:
            return Due()
        # The scale was fixed by the test, before the first holdback pair: the e-value needs that.
        min_effect = self._settings.objective.min_effect
        judgement = judge_holdback(differences, verdict.evidence["rules"]["pair_sd"], min_effect)
        if judgement.must_roll_back:
            return Due(rollback_reason=judgement.reason)
        if now > applied_at + self._settings.holdback.duration_s and len(differences) >= MIN_PAIRS:
            return Due()
        effect_ratio = known_effect(verdict.effect_ratio or 0.0, differences)
        share = holdback_share(self._settings.holdback.share, effect_ratio)
        return Due(former=former) if now - last_at >= seconds_between_pairs(share, slice_s) else Due()
