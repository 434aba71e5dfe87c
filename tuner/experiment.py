"""Champion against challenger on live traffic, in randomised paired slices. One step a tick.

Reads request timings and the runtime's state; writes Experiment, Slice, AlphaSpend and Verdict rows and
posts slice plans. A pair's coin is committed before the engine hears of the pair. What waits is a row:

    PLANNED ──first pair──▶ RUNNING ──look──▶ DECIDED (verdict)
                              ├──harm stop──▶ STOPPED (verdict REJECT)
                              └──interrupted─▶ STOPPED (verdict INCONCLUSIVE)

kinds: `probe` is one pair whose log ratio becomes a trial's value; `test` decides a promotion and pays
for its level; `holdback` keeps asking, after a promotion, whether the old champion was better; `aa` is the
champion against itself, judged like a test: it promotes nothing and shows how often a test is wrong.
"""

import logging
import math
import secrets
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from runtime.client import Control
from runtime.errors import InvalidPlan, RuntimeFault, StaleVersion
from runtime.knobs import EngineConfig
from runtime.plan import PlannedSlice, SlicePlan
from store import decisions, evidence, queries
from store.database import Store
from store.tables import AlphaSpend, Experiment, Slice, Verdict
from tuner.guardrail import Limits, Stop, Watch, Watchman
from tuner.harm_budget import harm_done
from tuner.judging.coin import draw_coin
from tuner.judging.error_rate import Lord
from tuner.judging.harm import HarmReference, harm_reference
from tuner.judging.judge import Outcome, PairScore, judge
from tuner.judging.judge import Verdict as Judgement
from tuner.judging.objective import SliceMeasure, measure_slice
from tuner.pairs import (
    ExperimentRules,
    ages_of,
    guardrails,
    pairs_of,
    plan_id_of,
    planned_pair,
    scored_pairs,
    settle_s,
    timing_of,
    verdict_row,
)
from tuner.planning import told_duration
from tuner.preparation import Preparation
from tuner.rows import tell

logger = logging.getLogger(__name__)

HARM_PREFIX = "harm: "
UNPREPARED_PREFIX = "could not be prepared: "
JUDGED = ("test", "aa")  # kinds that end with a verdict
MAX_STRAY_RATIO = 0.05  # requests of a slice that the engine did not count to it
PLAN_LEAD_S = 0.5  # between posting a plan and its first slice: a journal write, a loopback call

# (start, end) of a pair -> request_id -> the twin's ln(metric), or None where no twin is in use
Predictor = Callable[[float, float], Mapping[str, float] | None]


@dataclass(frozen=True)
class Decided:
    """An experiment that came to its end in this tick."""

    experiment: Experiment
    verdict: Verdict | None
    pairs: tuple[PairScore, ...]

    @property
    def is_harm(self) -> bool:
        """Stopped because of what the challenger did."""
        return (self.experiment.reason or "").startswith(HARM_PREFIX)

    @property
    def is_unprepared(self) -> bool:
        """Ended before its first slice: the engine could not make the challenger ready, for want of memory mostly."""
        return (self.experiment.reason or "").startswith(UNPREPARED_PREFIX)


class ExperimentStage:
    """Drives the one experiment that may be under way."""

    def __init__(
        self,
        store: Store,
        control: Control,
        watchman: Watchman,
        max_error_ratio: float,
        clock: Callable[[], float],
        random_bits: Callable[[int], int] = secrets.randbits,
        preparation: Preparation | None = None,
    ) -> None:
        self._preparation = preparation or Preparation(control)
        self._store, self._control, self._watchman, self._clock = store, control, watchman, clock
        self._max_error_ratio = max_error_ratio
        self._random_bits = random_bits
        self.frozen_by: str | None = None  # a fault: only stops are heeded until it is over

    # -- opening and closing -------------------------------------------------------------------------------

    def open(
        self,
        kind: str,
        snapshot_id: str,
        champion: EngineConfig,
        challenger: EngineConfig,
        rules: ExperimentRules,
        now: float,
        study_id: int | None = None,
        twin_fit_id: int | None = None,
        lord: Lord | None = None,
        planning: Mapping[str, Any] | None = None,
    ) -> Experiment:
        """Records an experiment. With `lord` it is a test and takes the next level of its stream, in one commit.

        `planning`: what it can find and how long that takes, as known now.
        """
        experiment = Experiment(
            experiment_id=f"{kind[0]}{int(now):x}-{uuid.uuid4().hex[:8]}",
            kind=kind,
            snapshot_id=snapshot_id,
            study_id=study_id,
            champion_config_id=champion.config_id,
            challenger_config_id=challenger.config_id,
            created_at=now,
            state="RUNNING",
            rules=asdict(rules),
            seed=secrets.randbits(31),
            twin_fit_id=twin_fit_id,
            planning=dict(planning or {}),
        )
        with self._store.journal() as session:
            if lord is not None:
                index, level = next_level(session, snapshot_id, rules.metric, lord)
                experiment.rules = {**experiment.rules, "level": level}
                spend = AlphaSpend(snapshot_id, rules.metric, experiment.experiment_id, index, level, now)
                session.add_all([experiment, spend])
            else:
                session.add(experiment)
        return experiment

    def next_level(self, snapshot_id: str, metric: str, lord: Lord) -> float:
        """What the next test of the stream will be paid, if it is opened."""
        with self._store.journal() as session:
            return next_level(session, snapshot_id, metric, lord)[1]

    def interrupt(self, now: float, reason: str) -> list[Decided]:
        """Closes whatever a former life of the daemon left running. The engine went back by itself."""
        with self._store.journal() as session:
            running = decisions.running_experiments(session)
        return [self._close(experiment, "STOPPED", reason, now) for experiment in running]

    # -- one tick ------------------------------------------------------------------------------------------

    def step(self, now: float, state: Mapping[str, Any], predict: Predictor | None) -> Decided | None:
        """Scores what has settled, decides what can be decided, starts the next pair. None: nothing ended."""
        with self._store.journal() as session:
            running = decisions.running_experiments(session)
            if not running:
                return None
            experiment = running[0]
            slices = decisions.slices_of(session, experiment.experiment_id)
        rules = ExperimentRules(**experiment.rules)
        stop = self._stop_of(slices)
        if stop is not None:
            decided = self._stopped(experiment, slices, stop, now)
            if decided is not None:
                return decided
            return None
        if self.frozen_by is not None:
            return None
        for pair in pairs_of(slices):
            if pair[0].state == "PLANNED" and pair[-1].planned_end_at <= now:
                self._score(experiment, rules, pair, now, state, predict)
        return self._advance(experiment, rules, slices, now, state)

    def _advance(
        self,
        experiment: Experiment,
        rules: ExperimentRules,
        slices: list[Slice],
        now: float,
        state: Mapping[str, Any],
    ) -> Decided | None:
        last_end_at = max((planned.planned_end_at for planned in slices), default=0.0)
        if now < last_end_at:
            return None
        pairs = scored_pairs(slices)
        num_open = sum(pair[0].state == "PLANNED" for pair in pairs_of(slices))
        num_planned = len(pairs) + num_open
        num_void = sum(pair[0].state == "VOID" for pair in pairs_of(slices))
        is_due = num_planned >= rules.max_pairs or (num_planned > 0 and num_planned % rules.look_every == 0)
        if is_due and num_open:
            return None  # a look is due: the last pair must settle first
        if experiment.kind == "probe" and pairs:
            return self._close(experiment, "DECIDED", "The probe's pair is scored.", now)
        if pairs:  # proven harm counts at any pair; a gain is looked at on schedule, by the judge itself
            decided = self._look(experiment, rules, slices, pairs, now)
            if decided is not None:
                return decided
        if num_void > max(3, rules.max_pairs // 3):
            return self._close(
                experiment, "STOPPED", f"{num_void} pairs were void; the evidence would be too thin.", now
            )
        if now + 2 * rules.slice_s > experiment.created_at + rules.max_wall_s:
            return self._close(experiment, "STOPPED", out_of_time(rules, pairs), now)
        if experiment.kind != "holdback" or not num_planned:
            return self._start_when_prepared(experiment, rules, slices, now, state)
        return None

    def _start_when_prepared(
        self,
        experiment: Experiment,
        rules: ExperimentRules,
        slices: list[Slice],
        now: float,
        state: Mapping[str, Any],
    ) -> Decided | None:
        """Starts the next pair, or waits until the challenger's warm knobs are prepared beside serving."""
        if state["engine"] != "ready":
            return None
        with self._store.journal() as session:
            champion, challenger = (
                EngineConfig.of(decisions.config_values(session, id))
                for id in (experiment.champion_config_id, experiment.challenger_config_id)
            )
        found = self._preparation.look(challenger, champion, state, now)
        if found.state == "failed":
            return self._close(experiment, "STOPPED", UNPREPARED_PREFIX + found.words, now)
        if found.words:
            with self._store.journal() as session:
                details = {"experiment_id": experiment.experiment_id, "config_id": challenger.config_id}
                tell(session, now, "experiment", found.words, details)
        if found.state == "ready":
            self._start_pair(experiment, rules, slices, now, state)
        return None

    # -- pairs ---------------------------------------------------------------------------------------------

    def _start_pair(
        self,
        experiment: Experiment,
        rules: ExperimentRules,
        slices: list[Slice],
        now: float,
        state: Mapping[str, Any],
    ) -> None:
        pair_index = max((planned.pair_index for planned in slices), default=-1) + 1
        coin = draw_coin(experiment.experiment_id, pair_index, self._random_bits)
        rows = planned_pair(
            experiment, rules, pair_index, coin, self._clock() + PLAN_LEAD_S, state["boot_id"]
        )
        with self._store.journal() as session:  # the coin stands before the engine hears of the pair
            session.add_all(rows)
        try:
            self._post(experiment, rules, slices, rows, state)
        except (InvalidPlan, StaleVersion) as error:
            self._preparation.forget()  # it may have been dropped for want of memory
            self._void(rows, f"The engine refused the plan: {error}")
        except RuntimeFault as error:
            self._void(rows, f"The plan was not posted: {error}")

    def _post(
        self,
        experiment: Experiment,
        rules: ExperimentRules,
        slices: list[Slice],
        rows: list[Slice],
        state: Mapping[str, Any],
    ) -> None:
        with self._store.journal() as session:
            configs = {row.config_id: decisions.config_values(session, row.config_id) for row in rows}
        plan = SlicePlan(
            plan_id=plan_id_of(rows[0]),
            experiment_id=experiment.experiment_id,
            expected_version=state["version"],
            configs=configs,
            lease_s=rules.lease_s,
            slices=tuple(
                PlannedSlice(
                    row.slice_id,
                    "challenger" if row.arm == "challenger" else "champion",
                    row.config_id,
                    row.planned_start_at,
                    row.planned_end_at,
                    row.burn_in_s,
                )
                for row in rows
            ),
        )
        self._control.plan(plan)
        self._watchman.watch(
            Watch(
                plan_id=plan.plan_id,
                experiment_id=experiment.experiment_id,
                lease_s=rules.lease_s,
                until_at=plan.end_at,
                challenger_slices={
                    row.slice_id: row.planned_start_at + row.burn_in_s
                    for row in rows
                    if row.arm == "challenger"
                },
                limits=Limits(rules.max_error_ratio, rules.error_min_requests),
                reference=self._reference(rules, slices, rows),
                num_engine_restarts=state["num_engine_restarts"],
                champion_before={rows[1].slice_id: rows[0].slice_id} if rows[0].arm == "champion" else {},
                past_means=rules.champion_means,
            )
        )

    def _reference(
        self, rules: ExperimentRules, slices: list[Slice], rows: list[Slice]
    ) -> HarmReference | None:
        """The champion's latest scored slice (or its last window before the experiment) as the scale of harm."""
        if rules.metric != "e2e_s" or not rules.champion_means or rules.is_holdback:
            return None
        challenger = next(row for row in rows if row.arm == "challenger")
        scored = [row for row in slices if row.state == "SCORED"]
        champion = [row for row in scored if row.arm == "champion" and row.measured is not None]
        latest, started_at = rules.champion_means[-1], rows[0].planned_start_at - rules.slice_s
        if champion:
            latest, started_at = champion[-1].measured or latest, champion[-1].planned_start_at
        lag = max(1, round((challenger.planned_start_at - started_at) / rules.slice_s))
        slowest = max([rules.champion_slowest_s, *(row.stats.get("max_s") or 0.0 for row in champion)])
        return harm_reference(rules.champion_means, latest, lag, len(scored) - len(champion), slowest or None)

    def _score(
        self,
        experiment: Experiment,
        rules: ExperimentRules,
        pair: list[Slice],
        now: float,
        state: Mapping[str, Any],
        predict: Predictor | None,
    ) -> None:
        """Writes both slices' scores once every request that arrived in them ended, or `settle_s` has passed."""
        if pair[0].boot_id != state["boot_id"]:
            self._void(pair, "The runtime was restarted during the pair.")
            return
        pending = [state["slice_stats"].get(row.slice_id, {}) for row in pair]
        if now < pair[-1].planned_end_at + settle_s(rules, pending):
            return
        span = (pair[0].planned_start_at, pair[-1].planned_end_at)
        predictions = predict(*span) if predict is not None else None
        measured = [
            self._measure(row, rules, ages_of(stats), predictions)
            for row, stats in zip(pair, pending, strict=True)
        ]
        measures = [measure for measure in measured if measure is not None]
        if len(measures) < len(measured):
            self._void(pair, "A slice did not run as planned: the engine served something else in it.")
            return
        if any(measure.predicted is None for measure in measures):
            measures = [replace(measure, predicted=None) for measure in measures]  # both slices, or neither
        if any(measure.num_requests < rules.min_requests or measure.measured is None for measure in measures):
            self._void(
                pair, f"A slice saw fewer than {rules.min_requests} requests: too little traffic to score."
            )
            return
        with self._store.journal() as session:
            for row, measure in zip(pair, measures, strict=True):
                row.state, row.num_requests, row.num_errors = (
                    "SCORED",
                    measure.num_requests,
                    measure.num_errors,
                )
                row.measured, row.predicted = measure.measured, measure.predicted
                row.response = (
                    None if measure.measured is None else measure.measured - (measure.predicted or 0.0)
                )
                row.stats = {**row.stats, **measure.to_dict()}
                session.merge(row)

    def _measure(
        self,
        row: Slice,
        rules: ExperimentRules,
        pending_ages_s: list[float],
        predictions: Mapping[str, float] | None,
    ) -> SliceMeasure | None:
        """None where the slice did not run as planned: the engine counted its requests to another."""
        scored_from = row.planned_start_at + row.burn_in_s
        with self._store.metrics() as session:
            rows = queries.timings_between(session, scored_from, row.planned_end_at)
        num_stray = sum(timing.arrival_slice != row.slice_id for timing in rows)
        if num_stray > max(1, MAX_STRAY_RATIO * len(rows)):
            return None
        scored_s = row.planned_end_at - scored_from
        return measure_slice(
            [timing_of(timing) for timing in rows],
            pending_ages_s,
            predictions,
            rules.metric,
            rules.slo_limits(),
            scored_s,
        )

    def void_pair_under_way(self, reason: str, since_at: float) -> None:
        """What spoiled the host since `since_at` spoiled the pair that was served then; the engine's plan ends."""
        with self._store.journal() as session:
            running = decisions.running_experiments(session)
            slices = decisions.slices_of(session, running[0].experiment_id) if running else []
        pair = [row for row in slices if row.state == "PLANNED"]
        if not pair or max(row.planned_end_at for row in pair) <= since_at:
            return
        self._watchman.release()
        try:
            self._control.abort(plan_id_of(pair[0]), reason)
        except RuntimeFault as error:  # nobody renews the lease any more: it ends the plan
            logger.warning("Plan %s not aborted: %s", plan_id_of(pair[0]), error)
        self._void(pair, reason)

    def _void(self, pair: list[Slice], reason: str) -> None:
        logger.info("Pair %d of %s is void: %s", pair[0].pair_index, pair[0].experiment_id, reason)
        with self._store.journal() as session:
            for row in pair:
                row.state, row.void_reason = "VOID", reason
                session.merge(row)

    # -- decisions -----------------------------------------------------------------------------------------

    def _look(
        self,
        experiment: Experiment,
        rules: ExperimentRules,
        slices: list[Slice],
        pairs: list[PairScore],
        now: float,
    ) -> Decided | None:
        """Asks the judge. A holdback is judged by its caller, which sees all pairs since the promotion."""
        if experiment.kind == "holdback":
            return self._close(experiment, "DECIDED", "The holdback pair is scored.", now)
        with self._store.journal() as session:
            faults = decisions.open_faults(session)
        judgement = judge(
            pairs, rules.judge_rules(), guardrails(slices, rules, self._max_error_ratio), faults
        )
        if judgement.outcome is Outcome.CONTINUE:
            return None
        return self._close(experiment, "DECIDED", judgement.reason, now, judgement, tuple(pairs))

    def _stop_of(self, slices: list[Slice]) -> Stop | None:
        """The stop of a pair that is not scored yet; one that comes late for an earlier pair is no news."""
        open_plans = {plan_id_of(row) for row in slices if row.state == "PLANNED"}
        while not self._watchman.stops.empty():
            stop = self._watchman.stops.get_nowait()
            if stop.plan_id in open_plans:
                return stop
        return None

    def _stopped(self, experiment: Experiment, slices: list[Slice], stop: Stop, now: float) -> Decided | None:
        """Harm ends the experiment; a plan lost through no doing of the challenger voids its pair only.

        An engine that died while the challenger served is the challenger's harm: whatever a treatment can
        cause must count against it.
        """
        current = [row for row in slices if row.state == "PLANNED"]
        serving = next((row for row in current if row.planned_start_at <= stop.at < row.planned_end_at), None)
        by_challenger = serving is not None and serving.arm == "challenger"
        if stop.kind == "harm" or (stop.kind == "engine" and by_challenger):
            self._void(current, stop.reason)
            return self._close(experiment, "STOPPED", HARM_PREFIX + stop.reason, now, outcome=Outcome.REJECT)
        self._void(current, stop.reason)
        return None

    def _close(
        self,
        experiment: Experiment,
        state: str,
        reason: str,
        now: float,
        judgement: Judgement | None = None,
        pairs: tuple[PairScore, ...] = (),
        outcome: Outcome = Outcome.INCONCLUSIVE,
    ) -> Decided:
        self._watchman.release()
        rules = ExperimentRules(**experiment.rules)
        with self._store.journal() as session:
            slices = decisions.slices_of(session, experiment.experiment_id)
            pairs = pairs or tuple(scored_pairs(slices))
            for row in slices:
                if row.state == "PLANNED":
                    row.state, row.void_reason = "VOID", reason
                    session.merge(row)
            verdict = None
            if experiment.kind in JUDGED:
                if judgement is None:  # stopped or interrupted: the numbers so far stand beside the reason
                    judgement = judge(pairs, rules.judge_rules())
                else:
                    outcome = judgement.outcome
                verdict = verdict_row(experiment, outcome, reason, judgement, pairs, rules, now)
                session.add(verdict)
                spend = decisions.spend_of(session, experiment.experiment_id)
                if spend is not None:
                    spend.is_rejection = outcome is Outcome.PROMOTE
                    session.merge(spend)
            stored = session.get(Experiment, experiment.experiment_id)
            assert stored is not None, "the experiment was recorded when it was opened"
            stored.state, stored.ended_at, stored.reason = state, now, reason
            if experiment.kind != "aa":  # the champion does itself no harm
                stored.planning = {**stored.planning, "harm": self._harm(slices, rules)}
        experiment.state, experiment.ended_at, experiment.reason = state, now, reason
        return Decided(experiment, verdict, pairs)

    def _harm(self, slices: list[Slice], rules: ExperimentRules) -> dict[str, Any]:
        """What the challenger's slices have cost; burn-in and void slices count."""
        ids = {arm: [row.slice_id for row in slices if row.arm == arm] for arm in ("champion", "challenger")}
        with self._store.metrics() as session:
            champion, challenger = (evidence.request_seconds_of(session, ids[arm]) for arm in ids)
        past_mean_s = math.exp(rules.champion_means[-1]) if rules.champion_means else None
        return asdict(harm_done(champion, challenger, past_mean_s))


def next_level(session: Any, snapshot_id: str, metric: str, lord: Lord) -> tuple[int, float]:
    """Index and level of the next test of a stream."""
    history = decisions.spends_of(session, snapshot_id, metric)
    index = len(history) + 1
    return index, lord.level(index, [spend.test_index for spend in history if spend.is_rejection])


def out_of_time(rules: ExperimentRules, pairs: Sequence[PairScore]) -> str:
    return (
        f"Out of time: {len(pairs)} of at most {rules.max_pairs} pairs were scored within "
        f"{told_duration(rules.max_wall_s)} (`experiment.max_wall_s`), and nothing is proven. The champion stays."
    )
