"""The loop: one tick a second calls the stages in the order in which data flows, and nothing else.

    collect ▶ notice ▶ wishes ▶ experiment (judge, promote) ▶ quality ▶ search (twin, study) ▶ probation ▶ aa

Each stage reads rows and writes rows; what waits is a row, never a sleeping function. A stage that fails is
logged, counted and backed off, and the engine goes on serving. The only place with signals and threads.
"""

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

from runtime.clock import Clock
from runtime.errors import RuntimeFault
from runtime.knobs import EngineConfig
from store import decisions, evidence
from store.database import Store
from store.tables import Experiment, Study
from tuner.against_itself import due_at, false_alarm_words
from tuner.collect import Collected, Collector
from tuner.confirmed import LOST_REASON, confirmed_config
from tuner.experiment import JUDGED, Decided, ExperimentStage
from tuner.guardrail import Watchman
from tuner.judging.error_rate import Lord
from tuner.judging.harm import HarmRule
from tuner.judging.interval import effect_ratio
from tuner.judging.judge import Outcome
from tuner.judging.objective import Metric
from tuner.keep import KeepStage
from tuner.notice.stage import NoticeStage
from tuner.pairs import ExperimentRules, scored_pairs
from tuner.planning import Planning
from tuner.planning_stage import FIRST_PAIR_SD, PlanningStage, window_pair_sd
from tuner.probation import Probation
from tuner.promote import PromoteStage, describe
from tuner.quality.stage import Failed, NotYet, QualityStage
from tuner.rows import tell
from tuner.settings import Settings
from tuner.stage_costs import StageCosts
from tuner.study import StudyStage
from tuner.twin_stage import TwinStage
from tuner.wishes import Wish, WishDesk

logger = logging.getLogger(__name__)

MAX_BACK_OFF_S = 60.0


@dataclass
class BackOff:
    """A stage that failed waits twice as long each time, up to a minute.

    It is forgiven once it went well for as long again: one that fails every other time must not fill the log.
    """

    delay_s: float = 0.0
    until_at: float = 0.0

    def failed(self, now: float) -> None:
        self.delay_s = min(MAX_BACK_OFF_S, max(1.0, 2 * self.delay_s))
        self.until_at = now + self.delay_s

    def succeeded(self, now: float) -> None:
        if now >= self.until_at + self.delay_s:
            self.delay_s = 0.0


class Daemon:
    """Everything is handed in: the store (its only writer), two clients of the runtime, the clock."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        control: Any,
        watch_control: Any,
        collector: Collector,
        identity: Mapping[str, Any],
        snapshot_id: str,
        run_id: str,
        clock: Clock,
    ) -> None:
        self.settings, self.store, self.control, self.clock = settings, store, control, clock
        self.identity, self.snapshot_id, self.run_id = identity, snapshot_id, run_id
        self.collector = collector
        self.watchman = Watchman(watch_control, HarmRule(), clock.now)
        self.experiments = ExperimentStage(
            store, control, self.watchman, settings.guardrail.max_error_ratio, clock.now
        )
        self.promotion = PromoteStage(store, control, snapshot_id)
        self.studies = StudyStage(store, settings, snapshot_id, identity)
        self.twins = TwinStage(store, snapshot_id, identity)
        self.probation = Probation(store, settings, snapshot_id)
        self.planning = PlanningStage(store, settings)
        self.planned: Planning | None = None  # what the test under way can still find, and when
        self._told: str | None = None  # the last reason for not opening anything, as told in the story
        self.notice = NoticeStage(store, settings, snapshot_id)
        self.quality = QualityStage(store, control, settings.quality, snapshot_id)
        self.collected: Collected | None = None
        self.desk = WishDesk(store, self.promotion, self._end_experiment)
        self.wishes: queue.SimpleQueue[Wish] = queue.SimpleQueue()
        self.stop_event = threading.Event()
        self.doing = "Starting."
        self.state: Mapping[str, Any] | None = None
        self.dashboard_url: str | None = None  # told by whoever started one
        self.trouble: str | None = (
            None  # why the runtime cannot be tuned now; told by whoever watches its process
        )
        self.started_at = clock.now()
        self.num_failures: dict[str, int] = {}
        self.costs = StageCosts()
        self._back_off: dict[str, BackOff] = {}
        self._champion = EngineConfig()  # known from `start` on
        self._withheld: set[str] = set()  # winners that were not applied for their quality, as told
        self._stretch_since = self.started_at  # since when the champion has served alone
        self.keeping = KeepStage(store, settings.keep)
        collector.has_room = self.keeping.has_room
        self._cause = "start"

    # -- life ----------------------------------------------------------------------------------------------

    def start(self, initial: EngineConfig) -> None:
        """Puts the recorded champion in force, or `initial` where this snapshot has none; closes what was cut off.

        In mode `observe` the engine is not touched: what serves is what is recorded.
        """
        now = self.clock.now()
        for decided in self.experiments.interrupt(now, "interrupted: the daemon was restarted"):
            logger.warning("Experiment %s was interrupted", decided.experiment.experiment_id)
        self.studies.forget_interrupted(now)
        if self.settings.mode != "observe":
            self.promotion.recover(now)
        champion = self.promotion.champion()
        confirmed = confirmed_config(self.store, self.snapshot_id)
        state = self.control.state()
        if self.settings.mode == "observe":
            champion = self.promotion.note(EngineConfig.of(state["champion"]), now)
        elif confirmed is not None:
            champion = confirmed
            self.promotion.apply("restore", champion, LOST_REASON, now)
        elif champion is None:
            self.promotion.apply("start", initial, "The first configuration served here.", now)
            champion = initial
        elif state["champion_config_id"] != champion.config_id or state["plan_id"] is not None:
            self.promotion.apply("start", champion, "The recorded champion is put back in force.", now)
        with self.store.journal() as session:
            self.desk.is_paused = decisions.is_paused(session)
        self._champion = champion
        self.notice.start(now)
        self.watchman.start()

    def run(self, on_tick: Callable[[], object] = lambda: None) -> None:
        """Ticks until asked to stop. The interval counts from start to start; a late tick is not made up for."""
        interval_s = self.settings.collect.interval_s
        self._stretch_since = self.clock.now()  # what came before was preparation: the measured capacity, say
        while not self.stop_event.is_set():
            began = self.clock.now()
            with self.costs.measured(StageCosts.TICK):
                self.tick(began)
            self._stage("supervise", began, lambda now: on_tick())
            self.stop_event.wait(max(0.05, interval_s - (self.clock.now() - began)))

    def close(self) -> None:
        """Leaves the engine on the champion. Experiments under way are closed; the store is the caller's."""
        now = self.clock.now()
        self.watchman.close()
        self.studies.close()
        self.notice.close()
        self._end_experiment("interrupted: the daemon was stopped", now)
        self.keeping.close()
        while not self.wishes.empty():
            self.wishes.get_nowait().answer.set_result("The daemon is stopping.")

    # -- the tick ------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        self.state = self.collected = None
        self._stage("keep", now, self.keeping.look)
        self._stage("collect", now, self._collect)
        self._stage("notice", now, self._notice)
        state = self._ready_state()
        if state is not None and self.trouble is None:  # before the wishes: what they change is not in it yet
            self._stage("restore", now, lambda now: self._restore_champion(now, state))
        self._stage("wishes", now, self._grant_wishes)
        if state is None or self.trouble is not None:
            self.doing = self.trouble or "Waiting for the engine."
            self._stretch_since = now
            self._stage("trouble", now, self._rest)
            self._stage("age", now, self.keeping.step)
            return
        self._stage("experiment", now, lambda now: self._experiment(now, state))
        self._stage("heed", now, self._heed)
        if self.experiments.frozen_by is not None:
            self.doing = f"Frozen until this is over: {self.experiments.frozen_by}"
            self._stage("age", now, self.keeping.step)
            return
        self._stage("quality", now, self._watch_quality)
        if self.settings.mode != "observe" and self.settings.search.enabled and not self.desk.is_paused:
            self._stage("search", now, lambda now: self._search(now, state))
            self._stage("probation", now, self._probation)
            self._stage("aa", now, self._against_itself)
        else:
            self.doing = (
                "Paused by a person." if self.desk.is_paused else "Observing: no experiments in this mode."
            )
        self._stage("age", now, self.keeping.step)

    def _rest(self, now: float) -> None:
        """What was under way when the runtime came into trouble is over; a short absence of the engine is not that."""
        if self.trouble is not None and self._running() is not None:
            self._end_experiment(f"interrupted: {self.trouble}", now)

    def _restore_champion(self, now: float, state: Mapping[str, Any]) -> None:
        """An edit behind our back: what serves must be what the journal says, or no slice means anything."""
        found = state["champion_config_id"]
        if found == self._champion.config_id or self.desk.is_paused:
            return
        if self.settings.mode == "observe":
            self.promotion.note(EngineConfig.of(state["champion"]), now)
            self._follow_champion(now, "edited")
            return
        self._end_experiment("interrupted: the engine's champion was changed from outside", now)
        self.promotion.apply(
            "restore", self._champion, f"The engine served {found}, which nobody here decided.", now
        )
        self._stretch_since = now

    def _ready_state(self) -> Mapping[str, Any] | None:
        return self.state if self.state is not None and self.state["engine"] == "ready" else None

    def _stage(self, name: str, now: float, stage: Callable[[float], object]) -> None:
        """The one broad `except`: logged with its trace, counted, backed off."""
        back_off = self._back_off.setdefault(name, BackOff())
        if now < back_off.until_at:
            return
        try:
            with self.costs.measured(name):
                stage(now)
            back_off.succeeded(now)
        except Exception:
            self.num_failures[name] = self.num_failures.get(name, 0) + 1
            back_off.failed(now)
            logger.exception("Stage %s failed; next try in %.0f s", name, back_off.delay_s)

    def _collect(self, now: float) -> None:
        # The collector reads the state before it drains: what the state calls ended stands in the store.
        self.collected = self.collector.collect(now)
        self.state = self.collected.state

    def _notice(self, now: float) -> None:
        """A fault freezes what is under way; one that no challenger can cause voids its pair."""
        if self.collected is not None:
            self.notice.step(now, self.collected)
        faults = [*self.notice.open_faults(), *self.keeping.open_faults()]
        spoiler = self.notice.voiding_fault()
        self.experiments.frozen_by = faults[0].reason if faults else None
        if faults:
            self._stretch_since = now  # what is served now says nothing of the champion
        if spoiler is not None:
            self.experiments.void_pair_under_way(f"fault: {spoiler.reason}", spoiler.started_at)

    # -- experiments ---------------------------------------------------------------------------------------

    def _running(self) -> Experiment | None:
        with self.store.journal() as session:
            running = decisions.running_experiments(session)
        return running[0] if running else None

    def _experiment(self, now: float, state: Mapping[str, Any]) -> None:
        decided = self.experiments.step(
            now, state, lambda start_at, end_at: self.twins.predict(self._metric, start_at, end_at)
        )
        running = self._running()
        if running is None or running.kind != "test":
            self.planned = None
        if running is not None:
            self._stretch_since = now
            self.doing = self._experiment_words(running)
        if decided is None:
            return
        logger.info(
            "Experiment %s (%s) ended: %s",
            decided.experiment.experiment_id,
            decided.experiment.kind,
            decided.experiment.reason,
        )
        if decided.experiment.kind == "test":
            self._decided(decided, now)
        elif decided.experiment.kind == "aa":
            self._tell_false_alarms(decided, now)

    def _decided(self, decided: Decided, now: float) -> None:
        verdict = decided.verdict
        assert verdict is not None, "every test ends with a verdict"
        with self.store.journal() as session:
            tell(
                session,
                now,
                "judge",
                f"{verdict.outcome}: {verdict.reason}",
                {"experiment_id": verdict.experiment_id, "verdict_id": verdict.verdict_id},
            )
        study = self.studies.current()
        if verdict.outcome == Outcome.PROMOTE and study is not None:
            self.studies.finish(study, "DONE", "A challenger won.", now)

    def _heed(self, now: float) -> None:
        """Acts on what was decided and not acted on yet, in this life of the daemon or in an earlier one."""
        with self.store.journal() as session:
            probes = [
                Decided(
                    experiment,
                    None,
                    tuple(scored_pairs(decisions.slices_of(session, experiment.experiment_id))),
                )
                for experiment in decisions.ended_probes(session)
            ]
            verdict = decisions.unheeded_promotion(session, self.snapshot_id, self._champion.config_id)
            experiment = None if verdict is None else session.get(Experiment, verdict.experiment_id)
            values = (
                None
                if experiment is None
                else decisions.config_values(session, experiment.challenger_config_id)
            )
        for probe in probes:
            self.studies.end(probe, now)
        if verdict is None or values is None or self.experiments.frozen_by is not None:
            return
        target = EngineConfig.of(values)
        if not self._says_the_same(target, now):
            return
        if self.settings.mode == "approve":
            self.promotion.recommend(verdict, target.config_id, now)
        elif self.settings.mode == "auto":
            self.promotion.apply("promote", target, verdict.reason, now, verdict.verdict_id)
            self._follow_champion(now, "promotion")

    def _says_the_same(self, target: EngineConfig, now: float) -> bool:
        """The last gate before a promotion: without proof of quality, a winner that may answer worse is not applied."""
        verdict = self.quality.verdict_for(target, self._champion, now)
        if isinstance(verdict, Failed) and target.config_id not in self._withheld:
            self._withheld.add(target.config_id)
            with self.store.journal() as session:
                tell(session, now, "quality", f"{target.config_id} won and is not applied. {verdict.reason}")
        return not isinstance(verdict, Failed | NotYet)

    def _watch_quality(self, now: float) -> None:
        """A check of the champion that fails after a promotion takes the promotion back."""
        reason = self.quality.step(now, self._champion)
        if reason is None or self.settings.mode == "observe" or self.desk.is_paused:
            return
        if self.promotion.can_roll_back("previous"):
            self._end_experiment("interrupted: the champion's answers got worse", now)
            logger.warning(self.promotion.rollback("previous", reason, now))
            self._follow_champion(now, "rollback")

    def _follow_champion(self, now: float, cause: str) -> None:
        """After anything that may have moved the champion: learn the new one from the beginning."""
        champion = self.promotion.champion()
        if champion is not None and champion != self._champion:
            self._champion, self._stretch_since, self._cause = champion, now, cause
            self.twins.forget()

    # -- search --------------------------------------------------------------------------------------------

    def _search(self, now: float, state: Mapping[str, Any]) -> None:
        self.planning.begin(now)
        if self._running() is not None:
            return
        study = self.studies.current()
        if study is not None and study.champion_config_id != self._champion.config_id:
            self.studies.finish(study, "STOPPED", "The champion changed under it.", now)
            study = None
        if self.twins.fit is None and not self._learn(now):
            return
        if study is None:
            study = self._new_study(now, state)
        if study is not None:
            self._advance_study(study, now)

    def _learn(self, now: float) -> bool:
        """True once the champion has served alone for long enough; then the twin is fitted."""
        left_s = self._stretch_since + self.settings.learn.champion_s - now
        if left_s > 0:
            self.doing = f"Learning how the champion serves this traffic, {left_s:.0f} s more."
            return False
        slice_s = self.planning.fix_slices(now).slice_s
        starved = self.planning.starved(self._window_sd())
        if starved is not None:
            self._stay_put(f"No study is opened: {starved}.", now)
            return False
        if self.twins.prepare(self._champion, self._stretch_since, now, slice_s, self._metric) is None:
            self.doing = "Learning: too few requests so far to know the champion."
            return False
        return True

    def _stay_put(self, why: str, now: float) -> None:
        """Nothing is opened, and why: shown as long as it holds, told in the story once."""
        self.doing = why
        told, self._told = self._told, why.partition(":")[0]
        if told != self._told:
            with self.store.journal() as session:
                tell(session, now, "experiment", why)

    def _is_harm_spent(self, now: float) -> bool:
        ledger = self.planning.ledger(now)
        if ledger.is_spent:
            self._stay_put(f"No experiment until harm done a day ago no longer counts: {ledger.words}.", now)
        return ledger.is_spent

    def _new_study(self, now: float, state: Mapping[str, Any]) -> Study | None:
        with self.store.journal() as session:
            last = decisions.last_study(session, self.snapshot_id)
            is_waiting = bool(decisions.waiting_recommendations(session))
        if is_waiting:
            self.doing = "A recommendation waits for approval; `tuner status` shows it."
            return None
        rest_left_s = (
            0.0
            if last is None or last.ended_at is None
            else min(self.settings.search.rest_s, last.ended_at + self.settings.search.rest_s - now)
        )
        condition = self.notice.condition_to_study(last if rest_left_s > 0 else None)
        if rest_left_s > 0 and self._cause != "asked" and condition is None:
            self.doing = f"Nothing better was found last time; the next search starts in {rest_left_s:.0f} s."
            return None
        planned = self._plan(None)
        if not planned.is_feasible:  # what it finds could never be proven
            self._stay_put(f"No study is opened: {planned.words}.", now)
            return None
        cause, self._cause = self._cause if condition is None else condition.reason, "schedule"
        study = self.studies.start(self._champion, state, cause, now, self.quality.why_unavailable)
        if condition is not None:
            self.notice.study_started(study, condition)
        return study

    def _advance_study(self, study: Study, now: float) -> None:
        wanted = self.studies.next(study, self._champion, self.twins.raw_pair_sd, now)
        if wanted.kind == "wait":
            self.doing = "Searching for the next configuration to probe."
        elif wanted.kind == "nothing":
            self.studies.finish(study, "DONE", "Every candidate was probed; none is left to test.", now)
            self.twins.forget()  # the next study starts from fresh windows of the champion
        elif wanted.config is not None:
            verdict = self.quality.verdict_for(wanted.config, self._champion, now)
            if isinstance(verdict, NotYet):
                self.doing = verdict.reason
                return
            if isinstance(verdict, Failed) and wanted.trial is not None:
                self.studies.refuse(wanted.trial, {"quality": verdict.slack}, verdict.reason, now)
                return
            if self._is_harm_spent(now):
                return
            predicted = self.twins.predicted_log_ratio(self._metric, wanted.config)
            probed = None if wanted.trial is None else wanted.trial.value
            planned = self._plan(probed, predicted) if wanted.kind == "test" else None
            if planned is not None and not planned.is_feasible:
                self._stay_put(f"No test is opened: {planned.words}.", now)
                self.studies.finish(study, "DONE", f"No test is opened: {planned.words}.", now)
                self.twins.forget()
                return
            self._told = None
            experiment = self._open(wanted.kind, wanted.config, study.study_id, now, planned)
            if wanted.kind == "probe" and wanted.trial is not None:
                self.studies.begin(wanted.trial, experiment, predicted)

    def _plan(self, *foretold: float | None) -> Planning:
        """What the next test can find; its candidate's log ratio is foretold by its probe and the replay."""
        level = self.experiments.next_level(self.snapshot_id, self._metric, self._lord)
        known = [log for log in foretold if log is not None]
        return self.planning.test(level, self._window_sd(), -effect_ratio(fmean(known)) if known else None)

    def _window_sd(self) -> float:
        return window_pair_sd(self.twins.windows.means, self.twins.noise_share)

    @property
    def _lord(self) -> Lord:
        return Lord(alpha=self.settings.experiment.fdr, w0=self.settings.experiment.fdr)

    def _open(
        self,
        kind: str,
        challenger: EngineConfig,
        study_id: int | None,
        now: float,
        planned: Planning | None = None,
    ) -> Experiment:
        rules = self._rules(kind)
        if planned is not None:
            rules = replace(rules, max_pairs=planned.max_pairs)
        experiment = self.experiments.open(
            kind,
            self.snapshot_id,
            self._champion,
            challenger,
            rules,
            now,
            study_id,
            self.twins.fit_id_in_use,
            self._lord if kind == "test" else None,
            planned.to_dict() if planned is not None else None,
        )
        if kind == "test":
            change = describe(challenger.values(), self._champion.values())
            level, foreseen = experiment.rules["level"], "" if planned is None else f"; {planned.words}"
            with self.store.journal() as session:
                text = (
                    f"Test of {change} begins: level {level:.2%}, at most {rules.max_pairs} pairs{foreseen}."
                )
                tell(session, now, "experiment", text, {"experiment_id": experiment.experiment_id})
        return experiment

    @property
    def _metric(self) -> Metric:
        return self.settings.objective.metric

    def _rules(self, kind: str) -> ExperimentRules:
        own, guard, itself = self.settings.experiment, self.settings.guardrail, self.settings.aa
        return ExperimentRules(
            metric=self._metric,
            level=itself.level if kind == "aa" else own.fdr,
            max_pairs={"test": own.max_pairs, "aa": itself.max_pairs}.get(kind, 1),
            look_every=own.look_every if kind in JUDGED else 1,
            min_effect=self.settings.objective.min_effect,
            slice_s=self.planning.cut.slice_s,
            burn_in_s=own.burn_in_s,
            settle_s=own.settle_s,
            lease_s=own.lease_s,
            min_requests=own.min_requests,
            slos=[slo.model_dump() for slo in self.settings.slos],
            is_holdback=kind == "holdback",
            max_error_ratio=guard.max_error_ratio,
            error_min_requests=guard.min_requests,
            pair_sd=self._pair_sd(),
            champion_means=self.twins.windows.means,
            champion_slowest_s=self.twins.windows.slowest_s,
            max_wall_s=own.max_wall_s,
            adjustment=self.twins.adjustment,
        )

    def _pair_sd(self) -> float:
        """The spread of the champion's own slices as probes have shown it, scaled to a pair."""
        with self.store.journal() as session:
            recent = decisions.recent_champion_slices(session, self._champion.config_id, limit=12)
        responses = [row.response for row in recent if row.response is not None]
        return max(0.05, stdev(responses) * 2**0.5) if len(responses) >= 4 else FIRST_PAIR_SD

    def _experiment_words(self, experiment: Experiment) -> str:
        with self.store.journal() as session:
            pairs = scored_pairs(decisions.slices_of(session, experiment.experiment_id))
            values = {
                id: decisions.config_values(session, id)
                for id in (experiment.champion_config_id, experiment.challenger_config_id)
            }
        change = describe(values[experiment.challenger_config_id], values[experiment.champion_config_id])
        if experiment.kind == "probe":
            return f"Probing {change}: one pair of slices against the champion."
        if experiment.kind == "holdback":
            return "Holdback: the former champion serves one slice, to see whether the gain stays."
        progress = f"{len(pairs)} of at most {experiment.rules['max_pairs']} pairs scored"
        if experiment.kind == "aa":
            return f"A/A: the champion against itself, to see how often chance wins; {progress}."
        self.planned = self.planning.running(experiment, [pair.difference for pair in pairs])
        foreseen = "" if self.planned is None else f"; {self.planned.words}"
        return f"Testing {change}: {progress}{foreseen}."

    # -- probation -----------------------------------------------------------------------------------------

    def _probation(self, now: float) -> None:
        """While the last promotion is on probation: a holdback pair when one is due, rollback when it turned bad."""
        if self._running() is not None or self.studies.current() is not None:
            return
        due = self.probation.step(now, self.planning.cut.slice_s)
        if due.rollback_reason is not None:
            logger.warning(self.promotion.rollback("previous", due.rollback_reason, now))
            self._follow_champion(now, "rollback")
        elif due.former is not None and not self._is_harm_spent(now):
            self._open("holdback", due.former, None, now)

    def _against_itself(self, now: float) -> None:
        """Now and then, when nothing else is tried: the champion against itself, to know the rate of false alarms."""
        if self._running() is not None or self.studies.current() is not None or self.twins.fit is None:
            return
        with self.store.journal() as session:
            study = decisions.last_study(session, self.snapshot_id)
            reign = decisions.latest_champion(session, self.snapshot_id)
            last_at = evidence.last_experiment_at(session, "aa", self.snapshot_id)
        if study is None or reign is None:  # what the tuner is for comes first
            return
        duration_s = self.settings.aa.max_pairs * self.planning.cut.pair_s
        due = due_at(max(last_at or 0.0, reign.since_at), duration_s, self.settings.aa.share)
        if now >= due and duration_s <= self.settings.experiment.max_wall_s:
            self._open("aa", self._champion, None, now)

    def _tell_false_alarms(self, decided: Decided, now: float) -> None:
        with self.store.journal() as session:
            seen = evidence.false_promotion_rate(session, self.snapshot_id)
            tell(
                session,
                now,
                "judge",
                f"The champion against itself: {decided.verdict.outcome if decided.verdict else 'no verdict'}. "
                f"{false_alarm_words(seen)}",
                {"experiment_id": decided.experiment.experiment_id},
            )

    # -- people --------------------------------------------------------------------------------------------

    def _grant_wishes(self, now: float) -> None:
        while not self.wishes.empty():
            self.desk.grant(self.wishes.get_nowait(), now)
            self._follow_champion(now, "promotion")

    def _end_experiment(self, reason: str, now: float) -> None:
        self.watchman.release()
        plan_id = self.state.get("plan_id") if self.state else None
        if plan_id:
            try:
                self.control.abort(plan_id, reason)
            except RuntimeFault as error:  # nobody renews the lease any more: it ends the plan
                logger.warning("Plan %s not aborted: %s", plan_id, error)
        self.experiments.interrupt(now, reason)
        self.studies.forget_interrupted(now)
