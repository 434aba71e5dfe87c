"""Asks the store what planning needs: the request rate, the champion's pair sd, the harm done today.

Reads timings and ended experiments, writes nothing. The length of slices is fixed once a stretch of the
champion, before its windows are measured: both must be cut alike.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import fmean
from typing import Any

from store import evidence
from store.database import Store
from store.tables import Experiment
from tuner.harm_budget import DAY_S, HarmLedger, day_budget_s
from tuner.planning import Asked, Planning, Slicing, plan, slicing, starved_words
from tuner.settings import Settings

RATE_SPAN_S = 900.0
MIN_SPAN_S = 20.0  # a shorter look at the traffic says nothing
FINISHING_S = 10.0  # requests that arrived later may not be in the store yet
REFRESH_S = 10.0
FIRST_PAIR_SD = 0.2  # log units, until the champion's own windows have shown the real one
MIN_CHANGES = 5


class PlanningStage:
    """Plans tests before they open and again while they run."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store, self._settings = store, settings
        self._since_at: float | None = None
        self._seen: evidence.RequestSeconds | None = None
        self._seen_at, self._span_s = float("-inf"), 0.0
        own = settings.experiment
        self.cut = slicing(own.slice_s, own.burn_in_s, own.min_requests, None)

    # -- traffic -------------------------------------------------------------------------------------------

    def begin(self, now: float) -> None:
        """Traffic counts from the first call on: what came before was preparation, the measured capacity say."""
        if self._since_at is None:
            self._since_at = now

    def rate_per_s(self, now: float) -> float | None:
        """Requests a second over the last quarter of an hour of this life; None while too little was seen."""
        self._look(now)
        return None if self._seen is None else self._seen.num / self._span_s

    def fix_slices(self, now: float) -> Slicing:
        """How long slices are from now on, for the rate seen."""
        own = self._settings.experiment
        self.cut = slicing(own.slice_s, own.burn_in_s, own.min_requests, self.rate_per_s(now))
        return self.cut

    def starved(self, pair_sd: float) -> str | None:
        """Why no experiment is possible at this rate, or None."""
        if self.cut.is_enough:
            return None
        return starved_words(self._asked(self._settings.experiment.fdr, pair_sd, None))

    def _look(self, now: float) -> None:
        since_at = now if self._since_at is None else self._since_at
        start_at, end_at = max(since_at, now - RATE_SPAN_S), now - FINISHING_S
        if now - self._seen_at < REFRESH_S or end_at - start_at < MIN_SPAN_S:
            return
        with self._store.metrics() as session:
            self._seen = evidence.request_seconds_between(session, start_at, end_at)
        self._seen_at, self._span_s = now, end_at - start_at

    # -- tests ---------------------------------------------------------------------------------------------

    def test(self, level: float, pair_sd: float, predicted_gain: float | None) -> Planning:
        """The plan of a test that would open now."""
        return plan(self._asked(level, pair_sd, predicted_gain))

    def running(self, experiment: Experiment, differences: Sequence[float]) -> Planning | None:
        """The plan of a test under way, with what its own pairs have shown; None where it opened without one."""
        planned: dict[str, Any] = experiment.planning
        if "pair_sd" not in planned:
            return None
        rules = experiment.rules
        predicted = planned["target_ratio"] if planned["is_predicted"] else None
        asked = self._asked(rules["level"], planned["pair_sd"], predicted)
        cut = replace(asked.slicing, slice_s=rules["slice_s"], is_enough=True)
        return plan(replace(asked, max_pairs=rules["max_pairs"], slicing=cut), differences)

    def _asked(self, level: float, pair_sd: float, predicted_gain: float | None) -> Asked:
        own = self._settings.experiment
        return Asked(
            level=level,
            max_pairs=own.max_pairs,
            look_every=own.look_every,
            min_effect=self._settings.objective.min_effect,
            pair_sd=pair_sd,
            slicing=self.cut,
            max_wall_s=own.max_wall_s,
            predicted_gain=predicted_gain,
        )

    # -- harm ----------------------------------------------------------------------------------------------

    def ledger(self, now: float) -> HarmLedger:
        """The day's budget at the traffic of the last quarter of an hour, and what of it is spent."""
        self._look(now)
        with self._store.journal() as session:
            spent_s = evidence.harm_spent_s(session, now - DAY_S)
        if self._seen is None or not self._seen.num:
            return HarmLedger(0.0, spent_s)
        share = self._settings.experiment.harm_budget
        return HarmLedger(day_budget_s(share, self._seen.total_s, self._span_s), spent_s)


def window_pair_sd(means: Sequence[float], noise_share: float = 1.0) -> float:
    """The sd of a pair from the champion's neighbouring windows, each as long as a slice; log units.

    `noise_share`: what the twin or the covariates leave of it.
    """
    changes = [later - earlier for earlier, later in pairwise(means)]
    if len(changes) < MIN_CHANGES:
        return FIRST_PAIR_SD
    return noise_share * fmean(change * change for change in changes) ** 0.5
