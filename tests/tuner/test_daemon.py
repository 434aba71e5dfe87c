"""The whole loop in virtual time: a simulated runtime, a real store, every stage."""

import random
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from runtime.knobs import EngineConfig
from store import decisions, queries
from store.database import Store
from store.tables import Change, Experiment, Slice, Verdict
from tests.simulated_runtime import IDENTITY, SimulatedRuntime
from tuner.collect import Collector
from tuner.daemon import Daemon, Wish
from tuner.report import evidence_text, explain_report, export_text, history_report
from tuner.settings import Settings, load_settings
from tuner.snapshot import initial_config, record_run, record_snapshot
from tuner.verify import read_evidence, verify

POOR = {"max_num_seqs": 2, "batch_wait_ms": 50, "max_batched_tokens": 64}
FAST = {
    "knobs": {"start": POOR, "deny": ["weight_format"]},
    "learn": {"champion_s": 30},
    "search": {"max_probes": 2, "sampler": "random"},
    "experiment": {"slice_s": 6, "burn_in_s": 1, "min_requests": 3, "max_pairs": 15},
    "holdback": {"share": 0.0},
}


@dataclass
class FixedClock:
    at: float = 1000.0

    def now(self) -> float:
        return self.at


@dataclass
class World:
    """A daemon and its simulated runtime, moved forward together."""

    data_dir: Path
    runtime: SimulatedRuntime
    settings: Settings
    clock: FixedClock = field(default_factory=FixedClock)
    daemon: Daemon | None = None
    store: Store | None = None

    def start(self) -> "World":
        self.store = Store.open(self.data_dir)
        snapshot_id = record_snapshot(self.store, IDENTITY, self.clock.now())
        run_id = record_run(self.store, self.settings, self.clock.now())
        self.daemon = Daemon(
            self.settings,
            self.store,
            self.runtime,
            self.runtime,
            Collector(self.runtime, self.store, [], monotonic=self.clock.now),
            IDENTITY,
            snapshot_id,
            run_id,
            self.clock,
        )
        self.daemon.watchman.start = lambda: None  # its looks happen in virtual time, below
        bits = random.Random(7)
        self.daemon.experiments._random_bits = bits.getrandbits
        self.daemon.start(initial_config(self.settings, IDENTITY))
        return self

    def run(self, seconds: float, until=lambda: False) -> None:
        end_at = self.clock.at + seconds
        while self.clock.at < end_at and not until():
            for _ in range(2):
                self.clock.at += 0.5
                self.runtime.advance(self.clock.at)
                if self.daemon.watchman._watch is not None:
                    self.daemon.watchman.look(self.daemon.watchman._watch, self.clock.at)
            self.daemon.tick(self.clock.at)
            self._wait_for_search()

    def _wait_for_search(self) -> None:
        """It is a real process, whose minute is over in a second of this clock's on a busy machine."""
        search = self.daemon.studies._ask
        if search is not None:
            search._child.wait(timeout=120)

    def crash(self) -> None:
        """The daemon is gone without a word; its store is opened again by the next one."""
        self.store.close()
        self.daemon = None

    def rows(self, table):
        with self.store.journal() as session:
            return session.query(table).all()

    def wish(self, action, **arguments):
        wish = Wish(action, arguments, "tester")
        self.daemon.wishes.put(wish)
        self.run(1.0)
        return wish.answer.result(timeout=0)


@contextmanager
def worlds(data_dir):
    made: list[World] = []

    def build(mode="auto", rate_per_s=5.0, **sections):
        settings = Settings(mode=mode, data_dir=data_dir, **{**FAST, **sections})
        made.append(World(data_dir, SimulatedRuntime(rate_per_s), settings))
        return made[-1].start()

    yield build
    for one in made:
        if one.daemon is not None:
            one.daemon.close()
            assert one.daemon.num_failures == {}
        one.store.close()


@pytest.fixture
def world(tmp_path):
    with worlds(tmp_path) as build:
        yield build


def promoted(world):
    return lambda: any(change.kind == "promote" for change in world.rows(Change))


@pytest.fixture(scope="module")
def winner(tmp_path_factory):
    """A world run from the poor start to its first promotion, shared by the tests that only look."""
    with worlds(tmp_path_factory.mktemp("winner")) as build:
        one = build()
        one.run(900, promoted(one))
        yield one


def test_poor_start_is_replaced_by_a_proven_configuration(winner):
    change = next(change for change in winner.rows(Change) if change.kind == "promote")
    assert change.state == "APPLIED"
    assert winner.runtime.runner.champion.config_id == change.to_config_id
    assert winner.runtime.runner.champion.max_num_seqs > 2
    story = explain_report(winner.data_dir, str(change.change_id))
    assert story.is_complete, story.to_text()
    assert "promote" in history_report(winner.data_dir, 100).to_text()


def test_replay_ranks_candidates_before_they_are_probed(winner):
    with winner.store.journal() as session:
        study = decisions.last_study(session, winner.daemon.snapshot_id)
        trials = decisions.study_trials(session, study.study_id)
        predicted = decisions.predictions_of(session, [trial.proposal_id for trial in trials])
    probed = [trial for trial in trials if trial.value]
    assert probed and all(
        predicted[trial.proposal_id] < 0 for trial in probed
    )  # the poor start loses to each


def test_every_test_pays_a_level_and_ends_with_a_verdict(winner):
    verdict = winner.rows(Verdict)[0]
    with winner.store.journal() as session:
        spend = decisions.spend_of(session, verdict.experiment_id)
    assert spend.level == verdict.level == pytest.approx(0.0025, rel=0.02)
    assert spend.is_rejection == (verdict.outcome == "PROMOTE")


def test_export_is_read_back_as_settings(winner, tmp_path):
    path = tmp_path / "exported.yaml"
    path.write_text(export_text(winner.data_dir))
    settings = load_settings(path, environ={})
    assert EngineConfig.of(settings.knobs.start) == winner.runtime.runner.champion


def test_every_verdict_can_be_derived_again_from_its_evidence(winner, tmp_path):
    verdicts = winner.rows(Verdict)
    assert verdicts
    for verdict in verdicts:
        path = tmp_path / f"{verdict.experiment_id}.json"
        path.write_text(evidence_text(winner.data_dir, verdict.experiment_id))
        assert [check for check in verify(*read_evidence(path)) if not check.passed] == []


def test_rollback_returns_to_the_start_and_the_engine_follows(winner):
    assert "Rolled back" in winner.wish("rollback", to="initial")
    assert winner.runtime.runner.champion == EngineConfig.of(POOR)
    assert "nothing to roll back" in winner.wish("rollback", to="initial")


def test_coin_stands_in_the_journal_before_the_engine_hears_of_the_pair(world):
    one = world()
    seen = []
    accept = one.runtime.plan

    def plan(posted):
        with one.store.journal() as session:
            rows = decisions.slices_of(session, posted.experiment_id)
        committed = {row.slice_id for row in rows if row.state == "PLANNED" and row.coin_hash}
        seen.append({one.slice_id for one in posted.slices} <= committed)
        return accept(posted)

    one.runtime.plan = plan
    one.run(200)
    assert seen and all(seen)


def test_approve_mode_waits_for_a_person(world):
    one = world(mode="approve")

    def waiting():
        with one.store.journal() as session:
            return bool(decisions.waiting_recommendations(session))

    one.run(900, waiting)
    assert waiting() and not promoted(one)()
    before = one.runtime.runner.champion.config_id
    one.run(30)
    assert one.runtime.runner.champion.config_id == before
    with one.store.journal() as session:
        number = decisions.waiting_recommendations(session)[0].recommendation_id
    assert "is applied" in one.wish("approve", recommendation_id=number)
    assert one.runtime.runner.champion.config_id != before
    assert "is not open" in one.wish("approve", recommendation_id=number)


def test_observe_mode_never_posts_a_plan(world):
    one = world(mode="observe")
    one.run(100)
    assert one.rows(Slice) == [] and one.rows(Change) == []


def test_observe_mode_records_what_serves_and_leaves_it_alone(world):
    one = world()
    one.run(5)
    decided = one.runtime.runner.champion
    one.crash()
    one.settings = one.settings.model_copy(update={"mode": "observe"})
    one.runtime.reconfigure({"max_num_seqs": 7})
    version = one.runtime.runner.version
    one.start()
    assert one.daemon.promotion.champion().max_num_seqs == 7 != decided.max_num_seqs
    one.runtime.reconfigure({"max_num_seqs": 9})
    one.run(5)
    assert one.daemon.promotion.champion().max_num_seqs == 9
    assert one.runtime.runner.version == version + 1
    assert [change.kind for change in one.rows(Change)] == ["start"]


def test_pause_ends_the_experiment_and_survives_a_restart(world):
    one = world()
    one.run(200, lambda: one.runtime.runner.plan is not None)
    assert one.wish("pause") == "Tuning is paused; the champion serves."
    one.run(5)
    assert one.runtime.runner.plan is None and one.daemon.desk.is_paused
    one.crash()
    one.start()
    one.run(5)
    assert one.daemon.desk.is_paused
    assert one.wish("resume") == "Tuning goes on."


def test_challengers_that_are_slower_are_never_promoted_and_the_worst_is_stopped_in_its_slice(world):
    one = world(
        rate_per_s=8.0,
        knobs={"start": {}},
        learn={"champion_s": 150},
        experiment={"slice_s": 16, "burn_in_s": 3, "min_requests": 3},
        search={"max_probes": 4, "sampler": "random"},
    )
    one.runtime.slowdown = lambda config: 1.0 if config == one.daemon._champion else 3.0
    one.run(400, lambda: any(row.state == "STOPPED" for row in one.rows(Experiment)))

    stopped = [row for row in one.rows(Experiment) if row.state == "STOPPED"]
    assert stopped and not promoted(one)()
    assert "times the champion's" in stopped[0].reason or "unfinished" in stopped[0].reason
    one.run(1.0)
    assert one.runtime.scheduler.config == one.daemon._champion


def test_crash_in_a_challengers_slice_leaves_the_champion_and_loses_no_row(world):
    one = world()
    one.run(400, lambda: one.runtime.slice_id is not None and one.runtime.slice_id.endswith("challenger"))
    champion = one.runtime.runner.champion
    one.crash()
    one.runtime.advance(one.clock.at + 5.2)  # nobody renews the lease of 5 s; 0.2 s for the step under way
    one.clock.at += 5.2
    assert one.runtime.scheduler.config == champion

    one.start()
    one.run(60)
    with one.store.metrics() as session:
        rows = queries.timings_between(session, 0.0, one.clock.at)
    ids = [row.request_id for row in rows]
    unfinished = len(one.runtime._arrived)
    assert len(ids) == len(set(ids))
    assert (
        one.runtime._num_requests - unfinished - len(ids) <= 5
    )  # those of the last half second wait in the buffer
    interrupted = [
        row for row in one.rows(Slice) if row.void_reason and row.void_reason.startswith("interrupted")
    ]
    assert interrupted and all(row.state == "VOID" for row in interrupted)


def test_engine_that_dies_under_the_challenger_counts_against_it(world):
    one = world()
    one.run(400, lambda: one.runtime.slice_id is not None and one.runtime.slice_id.endswith("challenger"))
    experiment_id = next(row.experiment_id for row in one.rows(Slice) if row.state == "PLANNED")
    one.runtime.kill_engine()
    one.run(5)
    with one.store.journal() as session:
        trial = decisions.trial_of_experiment(session, experiment_id)
    assert trial.constraints == {"harm": 1.0}


def test_unreachable_runtime_is_a_gap_and_no_failure(world):
    one = world()
    one.run(20)
    one.runtime.is_down = True
    one.run(20)
    one.runtime.is_down = False
    one.daemon.num_failures.clear()
    one.run(60)
    assert one.daemon.state is not None and one.daemon.num_failures == {}


def test_change_announced_before_a_crash_is_carried_out_by_the_next_daemon(world):
    one = world()
    one.run(5)
    target = EngineConfig.of({"max_num_seqs": 5})
    reconfigure, one.runtime.reconfigure = (
        one.runtime.reconfigure,
        lambda *a: (_ for _ in ()).throw(KeyboardInterrupt),
    )
    with pytest.raises(KeyboardInterrupt):
        one.daemon.promotion.apply("promote", target, "because", one.clock.at)
    one.runtime.reconfigure = reconfigure
    one.crash()
    one.start()
    assert one.runtime.runner.champion == target
    assert [change.state for change in one.rows(Change)].count("INTENDED") == 0


def test_edit_from_outside_is_undone_and_told(world):
    one = world()
    one.run(10)
    one.runtime.reconfigure({"max_num_seqs": 7})
    one.run(3)
    assert one.runtime.runner.champion == EngineConfig.of(POOR)
    assert [change.kind for change in one.rows(Change)] == ["start", "restore"]


def test_other_model_does_not_inherit_the_champion(world):
    one = world()
    other = {**IDENTITY, "model": {**IDENTITY["model"], "weights_sha256": "1" * 64}}
    assert record_snapshot(one.store, other, 0.0) != one.daemon.snapshot_id
    moved = {**IDENTITY, "model": {**IDENTITY["model"], "path": "/elsewhere"}}
    assert record_snapshot(one.store, moved, 0.0) == one.daemon.snapshot_id
