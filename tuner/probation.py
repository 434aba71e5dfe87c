"""Watches a promotion after the fact: holdback pairs now and then, rollback when the gain has turned.

Reads Change, Verdict and holdback Slice rows; the daemon opens the pair or rolls back as it is told.
"""

from dataclasses import dataclass

from runtime.knobs import EngineConfig
from store import decisions
from store.database import Store
from store.tables import Verdict
from tuner.holdback import holdback_share, judge_holdback, seconds_between_pairs
from tuner.pairs import scored_pairs
from tuner.settings import Settings

MIN_PAIRS = 10  # the e-value cannot reach its limit before eight


@dataclass(frozen=True)
class Due:
    """What probation asks for now: a pair against the former champion, or a rollback with its reason."""

    former: EngineConfig | None = None
    rollback_reason: str | None = None


class Probation:
    """The last promotion by verdict, for as long as the settings say and until MIN_PAIRS pairs are scored."""

    def __init__(self, store: Store, settings: Settings, snapshot_id: str) -> None:
        self._store, self._settings, self._snapshot_id = store, settings, snapshot_id

    def step(self, now: float) -> Due:
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
            earlier = decisions.experiments_against(session, "holdback", change.from_config_id, applied_at)
            slices = [decisions.slices_of(session, experiment.experiment_id) for experiment in earlier]
            former = EngineConfig.of(decisions.config_values(session, change.from_config_id))
        differences = [pair.difference for one in slices for pair in scored_pairs(one)]
        is_over = now > applied_at + self._settings.holdback.duration_s and len(differences) >= MIN_PAIRS
        if is_over or verdict is None:
            return Due()
        # The scale was fixed by the test, before the first holdback pair: the e-value needs that.
        judgement = judge_holdback(differences, verdict.evidence["rules"]["pair_sd"])
        if judgement.is_harmful:
            return Due(rollback_reason=judgement.reason)
        effect_ratio = (
            verdict.effect_ratio if verdict is not None and verdict.effect_ratio is not None else 0.0
        )
        share = holdback_share(self._settings.holdback.share, effect_ratio)
        last_at = max([experiment.created_at for experiment in earlier], default=applied_at)
        if now - last_at < seconds_between_pairs(share, self._settings.experiment.slice_s):
            return Due()
        return Due(former=former)
