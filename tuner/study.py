"""The search: which configuration is probed next, which candidate is put to the test. One step a tick.

Reads Trial rows and the engine's knob reports; writes Study, Proposal and Trial rows and opens
experiments. A study runs from one champion:

    champion (value 0), default, presets ──probe──▶ asked points ──probe──▶ candidates by value ──test──▶ done
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.knobs import EngineConfig, presets
from store import decisions
from store.database import Store
from store.tables import Experiment, Proposal, Study, Trial
from tuner.errors import ProposalFailed
from tuner.experiment import Decided
from tuner.promote import describe
from tuner.propose import AskProcess, AskRequest, past_trials
from tuner.rows import ensure_config, tell
from tuner.settings import Settings
from tuner.space import (
    SearchSpace,
    clipped,
    is_allowed,
    keeping_promises,
    meeting_needs,
    projected,
    search_space,
    trust_after,
    trust_region,
)

logger = logging.getLogger(__name__)

HARM_VALUE = math.log(2.0)  # what a probe that was stopped for harm teaches the sampler: twice as slow
MIN_TIE_LOG = 0.1  # log units; however quiet the traffic, one pair does not tell ten percent apart
MAX_TESTS = 3  # candidates of one study that may spend a level
MAX_REPEATS = 3  # asks in a row that only named known points: the region is searched


@dataclass(frozen=True)
class Wanted:
    """What the study wants to do next. kind: probe, test, wait or nothing (the study is over)."""

    kind: str
    trial: Trial | None = None
    config: EngineConfig | None = None


class StudyStage:
    """Drives the one study that may be under way."""

    def __init__(
        self, store: Store, settings: Settings, snapshot_id: str, identity: Mapping[str, Any]
    ) -> None:
        self._store, self._settings, self._snapshot_id = store, settings, snapshot_id
        hardware = identity["hardware"]
        self._presets = presets(hardware["device"], hardware["num_cores"], identity.get("fitted_knobs"))
        self._ask: AskProcess | None = None
        self._num_repeats = 0

    def close(self) -> None:
        if self._ask is not None:
            self._ask.stop()
            self._ask = None

    # -- the life of a study -------------------------------------------------------------------------------

    def current(self) -> Study | None:
        with self._store.journal() as session:
            return decisions.running_study(session, self._snapshot_id)

    def start(
        self,
        champion: EngineConfig,
        state: Mapping[str, Any],
        cause: str,
        now: float,
        no_quality: str | None = None,
    ) -> Study:
        """Opens a study and enqueues champion, default and presets, which the trust region does not bind.

        `no_quality`: why the quality of a challenger cannot be checked; then no knob that changes outputs may move.
        """
        knobs = self._settings.knobs
        space = search_space(state["knobs"], knobs.allow, knobs.deny, knobs.bounds, no_quality is None)
        movable = search_space(state["knobs"], knobs.allow, knobs.deny, knobs.bounds, True).names
        held = [name for name in movable if name not in space.names]
        space = meeting_needs(keeping_promises(space, champion), champion)
        with self._store.journal() as session:
            last = decisions.last_study(session, self._snapshot_id)
            outcomes = decisions.outcomes_of_study(session, last.study_id) if last is not None else []
            steps = self._settings.search.trust_steps if last is None else last.trust_steps
            steps = trust_after(outcomes[-1], steps) if outcomes else steps
            study = Study(
                snapshot_id=self._snapshot_id,
                champion_config_id=champion.config_id,
                created_at=now,
                cause=cause,
                objective=self._settings.objective.model_dump(),
                space=space.to_dict(),
                seed=self._settings.search.seed,
                trust_steps=steps,
            )
            session.add(study)
            session.flush()
            champion_trial = self._propose(session, study.study_id, champion, "champion", cause, now)
            champion_trial.state, champion_trial.value, champion_trial.ended_at = "COMPLETE", 0.0, now
            champion_trial.reason = "The champion against itself is 0 by definition."
            seen = {champion.config_id}
            for name, preset in self._presets.items():
                config = clipped(preset, champion, space)
                if config.config_id not in seen:
                    seen.add(config.config_id)
                    self._propose(session, study.study_id, config, f"preset: {name}", cause, now)
            tell(
                session,
                now,
                "propose",
                f"Study {study.study_id} starts ({cause}): {len(space.dimensions)} knobs may move, "
                f"{len(seen) - 1} known points are probed first.",
            )
            if held:
                tell(session, now, "quality", f"{', '.join(held)} may not move: {no_quality}.")
        self._num_repeats = 0
        return study

    def finish(self, study: Study, state: str, reason: str, now: float) -> None:
        self.close()
        study.state, study.ended_at, study.reason = state, now, reason
        with self._store.journal() as session:
            session.merge(study)
            tell(session, now, "propose", f"Study {study.study_id} is over: {reason}")

    # -- what comes next -----------------------------------------------------------------------------------

    def next(self, study: Study, champion: EngineConfig, pair_sd: float | None, now: float) -> Wanted:
        """The next probe or test; `wait` while a child searches; `nothing` when the study has said its all."""
        with self._store.journal() as session:
            trials = decisions.study_trials(session, study.study_id)
            tested = decisions.tested_configs(session, study.study_id)
        waiting = next((trial for trial in trials if trial.state == "WAITING"), None)
        if waiting is not None:
            return Wanted("probe", waiting, self._config(waiting.config_id))
        num_probed = sum(trial.config_id != champion.config_id for trial in trials)
        if num_probed < self._settings.search.max_probes and self._num_repeats < MAX_REPEATS:
            return self._search(study, champion, trials, now)
        for trial in self._queue(trials, pair_sd):
            if trial.config_id not in tested and len(tested) < MAX_TESTS:
                return Wanted("test", trial, self._config(trial.config_id))
        return Wanted("nothing")

    def _queue(self, trials: Sequence[Trial], pair_sd: float | None) -> list[Trial]:
        with self._store.journal() as session:
            predicted = decisions.predictions_of(session, [trial.proposal_id for trial in trials])
            values = {trial.config_id: decisions.config_values(session, trial.config_id) for trial in trials}
        default = self._presets["default"]
        surprise = {id: len(EngineConfig.of(known).changes_from(default)) for id, known in values.items()}
        tie_log = max(
            MIN_TIE_LOG, (pair_sd or 0.0) / 2
        )  # half: the replay, which is steadier, is averaged in
        return candidates(trials, self._settings.objective.min_effect, predicted, surprise, tie_log)

    def _search(self, study: Study, champion: EngineConfig, trials: Sequence[Trial], now: float) -> Wanted:
        """Starts or polls the ask in the child; a new point becomes a WAITING trial at the next call."""
        space = SearchSpace.from_dict(study.space)
        region = trust_region(space, champion, study.trust_steps)
        region = SearchSpace(tuple(d for d in region.dimensions if d.choices is not None or d.low < d.high))
        if not region.dimensions:
            self._num_repeats = MAX_REPEATS
            return Wanted("wait")
        try:
            if self._ask is None:
                rows = [self._as_row(trial) for trial in trials if trial.state == "COMPLETE"]
                request = AskRequest(
                    region,
                    past_trials(region, rows),
                    self._settings.search.sampler,
                    study.seed + len(trials) + self._num_repeats,
                )
                self._ask = AskProcess(request, now)
                return Wanted("wait")
            asked = self._ask.poll(now)
        except ProposalFailed as error:
            logger.warning("Ask failed: %s", error)
            with self._store.journal() as session:
                tell(session, now, "propose", f"The search is asked again: {error}")
            self._ask, self._num_repeats = None, self._num_repeats + 1
            return Wanted("wait")
        if asked is None:
            return Wanted("wait")
        self._ask = None
        config = projected(asked, champion, space)
        if config.config_id in {trial.config_id for trial in trials} or is_allowed(config, champion, space):
            self._num_repeats += 1
            return Wanted("wait")
        self._num_repeats = 0
        with self._store.journal() as session:
            self._propose(
                session, study.study_id, config, f"search: {self._settings.search.sampler}", study.cause, now
            )
            tell(
                session,
                now,
                "propose",
                f"Next to probe: {describe(config.values(), champion.values())} ({self._settings.search.sampler}).",
            )
        return Wanted("wait")

    # -- what came back ------------------------------------------------------------------------------------

    def begin(self, trial: Trial, experiment: Experiment, predicted_log_ratio: float | None) -> None:
        trial.state, trial.experiment_id = "RUNNING", experiment.experiment_id
        with self._store.journal() as session:
            session.merge(trial)
            proposal = session.get(Proposal, trial.proposal_id)
            assert proposal is not None, "a trial has its proposal"
            proposal.predicted_log_ratio = predicted_log_ratio

    def end(self, decided: Decided, now: float) -> None:
        """Turns a finished probe into its trial's value. A probe without a pair is tried once more, then given up."""
        with self._store.journal() as session:
            trial = decisions.trial_of_experiment(session, decided.experiment.experiment_id)
            if trial is None:
                return
            trial.ended_at, trial.reason = now, decided.experiment.reason
            if decided.pairs:
                trial.state, trial.value = "COMPLETE", decided.pairs[0].difference
                trial.constraints = {"harm": -1.0}
            elif decided.is_harm:
                # Optuna's samplers never read failed trials: harm is told as a complete, infeasible one.
                trial.state, trial.value, trial.constraints = "COMPLETE", HARM_VALUE, {"harm": 1.0}
            elif decided.is_unprepared:  # the same holds for what this machine has no room for
                trial.state, trial.value, trial.constraints = "COMPLETE", 0.0, {"memory": 1.0}
            else:
                trial.state = "FAIL"
            champion = EngineConfig.of(
                decisions.config_values(session, decided.experiment.champion_config_id)
            )
            probed = EngineConfig.of(decisions.config_values(session, trial.config_id))
            change = describe(probed.values(), champion.values())
            result = (
                f"{math.exp(trial.value) - 1:+.0%}"
                if trial.value is not None and not decided.is_unprepared
                else f"no value ({trial.reason})"
            )
            prior = decisions.predictions_of(session, [trial.proposal_id])[trial.proposal_id]
            foretold = "" if prior is None else f" (the replay foretold {math.exp(prior) - 1:+.0%})"
            tell(
                session, now, "trial", f"Probe of {change}: {result}{foretold}", {"trial_id": trial.trial_id}
            )

    def refuse(self, trial: Trial, constraints: Mapping[str, float], reason: str, now: float) -> None:
        """A candidate that may not serve: complete and infeasible, since the samplers never read failed trials.

        Without a slice its latency is unknown, which the champion's own stands in for.
        """
        with self._store.journal() as session:
            stored = session.get(Trial, trial.trial_id)
            assert stored is not None, "a trial is recorded before it is wanted"
            stored.state, stored.ended_at, stored.reason = "COMPLETE", now, reason
            stored.value = 0.0 if stored.value is None else stored.value
            stored.constraints = {**stored.constraints, **constraints}
            tell(session, now, "trial", f"Refused: {reason}", {"trial_id": trial.trial_id})

    def forget_interrupted(self, now: float) -> None:
        """A trial whose probe died with the daemon waits again."""
        with self._store.journal() as session:
            for trial in decisions.running_trials(session):
                trial.state, trial.experiment_id = "WAITING", None

    # -- rows ----------------------------------------------------------------------------------------------

    def _propose(
        self, session: Any, study_id: int, config: EngineConfig, origin: str, cause: str, now: float
    ) -> Trial:
        ensure_config(session, config, now)
        session.flush()
        proposal = Proposal(study_id, config.config_id, now, origin, cause)
        session.add(proposal)
        session.flush()
        trial = Trial(study_id, proposal.proposal_id, config.config_id, "WAITING", now)
        session.add(trial)
        return trial

    def _config(self, config_id: str) -> EngineConfig:
        with self._store.journal() as session:
            return EngineConfig.of(decisions.config_values(session, config_id))

    def _as_row(self, trial: Trial) -> dict[str, Any]:
        return {
            "values": self._config(trial.config_id).values(),
            "value": trial.value,
            "constraints": trial.constraints,
        }


def candidates(
    trials: Sequence[Trial],
    min_effect: float,
    predicted: Mapping[int, float | None],
    surprise: Mapping[str, int],
    tie_log: float = MIN_TIE_LOG,
) -> list[Trial]:
    """Trials worth a test, the most promising first: feasible, and probed better than the minimum effect.

    One pair is a noisy probe, so its log ratio is averaged with the replay's prediction where there is one.
    What then lies within `tie_log` of the best is a tie, and a tie goes to the configuration nearest to the
    shipped default: luck among many candidates favours the odd ones.

    Args:
        predicted: proposal_id -> the replay's log ratio to the champion.
        surprise: config_id -> number of knobs that differ from the shipped default.
        tie_log: log units by which one pair misses the truth.
    """
    limit = math.log(1.0 - min_effect)
    promise = {}
    for trial in trials:
        feasible = all(slack <= 0 for slack in trial.constraints.values())
        if trial.state == "COMPLETE" and trial.value is not None and trial.value <= limit and feasible:
            prior = predicted.get(trial.proposal_id)
            promise[trial.trial_id] = trial.value if prior is None else (trial.value + prior) / 2
    if not promise:
        return []
    best = min(promise.values())
    good = [trial for trial in trials if trial.trial_id in promise]

    def place(trial: Trial) -> tuple[bool, int, float]:
        is_tie = promise[trial.trial_id] <= best + tie_log
        return (not is_tie, surprise[trial.config_id] if is_tie else 0, promise[trial.trial_id])

    return sorted(good, key=place)
