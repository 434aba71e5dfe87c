"""Nothing that changes what the model says moves without proof: the loop in virtual time, with wrong weights."""

from concurrent.futures import Future
from contextlib import contextmanager
from itertools import pairwise

import pytest

from runtime.errors import EngineNotReady, InvalidKnob, RequestFailed
from runtime.knobs import EngineConfig
from store.tables import Anomaly, Change, Experiment, Note, QualityCheck, Slice, Study, Trial, Verdict
from tests.tuner.test_daemon import POOR, promoted, worlds
from tuner.quality.stage import Failed, NotYet, Passed, QualityStage
from tuner.rows import ensure_config

START = {**POOR, "max_num_seqs": 4, "max_batched_tokens": 256}
ONLY_FORMATS = {"start": START, "allow": ["weight_format"], "bounds": {"weight_format": ["float32", "int8"]}}


def at_once(work):
    """A thread that is always done: virtual time does not wait for threads."""
    done = Future()
    try:
        done.set_result(work())
    except Exception as error:
        done.set_exception(error)
    return done


def is_int8(config):
    return config.weight_format == "int8"


class Threads:
    """Jobs that end when the test says so."""

    def __init__(self):
        self.jobs = []

    def __call__(self, work):
        self.jobs.append((work, Future()))
        return self.jobs[-1][1]

    def finish(self):
        work, future = self.jobs[-1]
        future.set_result(work())


@contextmanager
def quality_worlds(data_dir):
    with worlds(data_dir) as build:

        def make(start=at_once, **sections):
            one = build(**{"knobs": ONLY_FORMATS, **sections})
            one.daemon.quality._start = start
            one.runtime.slowdown = lambda config: 0.4 if is_int8(config) else 1.0
            return one

        yield make


@pytest.fixture
def world(tmp_path):
    with quality_worlds(tmp_path) as make:
        yield make


def int8_of(one):
    return one.runtime.runner.champion.patched({"weight_format": "int8"})


def story(one, stage):
    return [note.text for note in one.rows(Note) if note.stage == stage]


def trial_of_int8(one):
    ids = {trial.config_id: trial for trial in one.rows(Trial)}
    return ids.get(EngineConfig.of(START).patched({"weight_format": "int8"}).config_id)


def test_a_wrong_quantisation_with_better_latency_never_serves_a_slice(world):
    one = world()
    one.runtime.loss = lambda config: 0.3 if is_int8(config) else 0.0
    one.run(200, lambda: trial_of_int8(one) is not None and trial_of_int8(one).state == "COMPLETE")
    trial = trial_of_int8(one)
    assert (
        trial.state == "COMPLETE" and trial.constraints["quality"] > 0 and "refused for loss" in trial.reason
    )
    assert not [row for row in one.rows(Experiment) if row.challenger_config_id == trial.config_id]
    assert not [row for row in one.rows(Slice) if row.config_id == trial.config_id]
    assert one.runtime.runner.champion.weight_format == "float32" and not promoted(one)()
    assert any("refused for loss" in text for text in story(one, "trial"))


def test_a_sound_format_with_better_latency_is_checked_first_and_then_promoted(world):
    one = world()
    one.runtime.loss = lambda config: 0.004 if is_int8(config) else 0.0
    one.run(700, promoted(one))
    assert one.runtime.runner.champion.weight_format == "int8"
    check = next(row for row in one.rows(QualityCheck) if row.kind == "challenger")
    first_slice = min(row.planned_start_at for row in one.rows(Slice) if row.config_id == check.config_id)
    assert check.is_passed and check.checked_at <= first_slice
    assert one.runtime.prepared[0] == check.config_id
    assert check.delta_nll == pytest.approx(0.004, abs=0.001) and check.num_positions > 400


@pytest.mark.parametrize(("loss", "is_applied"), [(0.3, False), (0.004, True)])
def test_a_winner_without_a_check_is_checked_before_it_is_applied(world, loss, is_applied):
    """As after an upgrade, or when the check of before the first slice is older than an hour."""
    one = world(rate_per_s=0.1)
    one.runtime.loss = lambda config: loss if is_int8(config) else 0.0
    one.run(5)
    own, winner = one.daemon._champion, int8_of(one)
    with one.store.journal() as session:
        ensure_config(session, winner, 1001.0)
        session.flush()
        ids = (None, own.config_id, winner.config_id)
        session.add(Experiment("t1", "test", one.daemon.snapshot_id, *ids, 1001.0, "DECIDED", {}, 1))
        session.flush()
        session.add(
            Verdict("t1", 1002.0, "PROMOTE", "won", -0.1, -0.2, -0.05, 10, 0.001, 0.05, {"rules": {}})
        )
    one.run(10)
    assert promoted(one)() == is_applied
    assert any("won and is not applied" in text for text in story(one, "quality")) != is_applied
    assert [row.is_passed for row in one.rows(QualityCheck) if row.kind == "challenger"] == [is_applied]


@pytest.mark.parametrize(
    ("sections", "error", "reason"),
    [
        ({"quality": {"enabled": False}}, None, "quality checks are off"),
        ({}, RequestFailed("HTTP 404.", "no_such_route"), "could not be scored"),
    ],
)
def test_without_checks_no_knob_that_changes_outputs_moves_and_the_story_says_why(
    world, sections, error, reason
):
    one = world(
        **sections, rate_per_s=2.0, knobs={**ONLY_FORMATS, "allow": ["weight_format", "max_num_seqs"]}
    )
    one.runtime.score_error = error
    one.run(90, lambda: bool(one.rows(Study)))
    names = [dimension["name"] for dimension in one.rows(Study)[0].space["dimensions"]]
    assert names == ["max_num_seqs"]
    assert any("weight_format may not move" in text and reason in text for text in story(one, "quality"))
    verdict = one.daemon.quality.verdict_for(int8_of(one), one.runtime.runner.champion, one.clock.at)
    assert isinstance(verdict, Failed)


def test_knobs_that_change_no_output_need_no_check(world):
    one = world(quality={"enabled": False})
    champion = one.runtime.runner.champion
    verdict = one.daemon.quality.verdict_for(champion.patched({"max_num_seqs": 8}), champion, 0.0)
    assert isinstance(verdict, Passed)


def test_the_champion_is_checked_at_its_interval_against_the_first_one(world):
    one = world(mode="observe", rate_per_s=0.1, quality={"every_s": 60})
    one.run(250)
    reference, *periodic = one.rows(QualityCheck)
    assert reference.kind == "reference" and reference.reason == "The reference itself."
    gaps = [b.checked_at - a.checked_at for a, b in pairwise(periodic)]
    assert [row.kind for row in periodic] == ["periodic"] * 5 and all(60 <= gap <= 63 for gap in gaps)
    assert {(row.delta_nll, row.top1_agreement, row.is_passed) for row in periodic} == {(0.0, 1.0, True)}


def test_a_restart_keeps_the_reference_and_does_not_check_early(world):
    one = world(mode="observe", rate_per_s=0.1, quality={"every_s": 200})
    one.run(60)
    before = [row.quality_check_id for row in one.rows(QualityCheck)]
    assert len(before) == 2
    one.crash()
    one.start()
    one.daemon.quality._start = at_once
    one.runtime.loss = lambda config: 0.3  # broken since, which only the old reference can show
    one.run(120)
    assert [row.quality_check_id for row in one.rows(QualityCheck)] == before
    one.run(60)
    last = one.rows(QualityCheck)[-1]
    assert last.kind == "periodic" and last.delta_nll > 0.2 and not last.is_passed
    assert [row.kind for row in one.rows(QualityCheck)].count("reference") == 1


def test_a_tick_never_waits_for_a_check(world):
    threads = Threads()
    one = world(start=threads, mode="observe", rate_per_s=0.1)
    one.run(30)
    assert len(threads.jobs) == 1 and not one.rows(QualityCheck), "one job, and ticks went on beside it"
    threads.finish()
    one.run(3)
    assert [row.kind for row in one.rows(QualityCheck)] == ["reference"]


# -- a loss after the fact -----------------------------------------------------------------------------------------


def promote(one):
    """As a verdict would; how it comes to one is shown above."""
    one.run(5)
    change = one.daemon.promotion.apply("promote", int8_of(one), "It was faster.", one.clock.at)
    one.daemon._follow_champion(one.clock.at, "promotion")
    return change


def test_a_drop_after_a_promotion_pages_and_takes_the_promotion_back(world):
    one = world(rate_per_s=0.1)
    promotion = promote(one)
    one.runtime.loss = lambda config: (
        0.3 if is_int8(config) else 0.0
    )  # the weights in force are not those checked
    one.run(10)
    change = one.rows(Change)[-1]
    assert change.kind == "rollback" and "answers got worse" in change.reason
    assert one.runtime.runner.champion.weight_format == "float32"
    drop = next(row for row in one.rows(Anomaly) if row.rule == "quality_drop")
    assert (drop.kind, drop.severity) == ("condition", "page")
    assert drop.change_id == promotion.change_id
    assert drop.ended_at is not None, "the former champion's answers are as before"


def test_a_drop_long_after_a_promotion_pages_and_blames_nobody(world):
    one = world(rate_per_s=0.1, quality={"every_s": 30})
    promote(one)
    one.run(5)
    assert one.rows(QualityCheck)[-1].is_passed and one.rows(QualityCheck)[-1].kind == "periodic"
    one.runtime.loss = lambda config: 0.3
    one.run(35)
    drop = next(row for row in one.rows(Anomaly) if row.rule == "quality_drop")
    assert drop.ended_at is None and drop.change_id is None
    assert one.rows(Change)[-1].kind == "promote"
    one.runtime.loss = lambda config: 0.0
    one.run(35)
    assert next(row for row in one.rows(Anomaly) if row.rule == "quality_drop").ended_at is not None


def test_a_restart_leaves_the_drop_open_until_a_check_passes(world):
    one = world(rate_per_s=0.1, mode="observe", quality={"every_s": 30})
    one.run(10)
    one.runtime.loss = lambda config: 0.3
    one.run(35)
    one.crash()
    one.start()
    one.daemon.quality._start = at_once
    one.run(40)
    drops = [row for row in one.rows(Anomaly) if row.rule == "quality_drop"]
    assert [row.ended_at for row in drops] == [None]
    one.runtime.loss = lambda config: 0.0
    one.run(35)
    drops = [row for row in one.rows(Anomaly) if row.rule == "quality_drop"]
    assert len(drops) == 1 and drops[0].ended_at is not None


# -- trouble on the way --------------------------------------------------------------------------------------------


class Stage:
    """A quality stage alone, with the reference scored."""

    def __init__(self, one):
        self.one, self.champion = one, one.runtime.runner.champion
        self.stage: QualityStage = one.daemon.quality
        self.now = one.clock.at
        self.steps(4)  # the reference and the first periodic check

    def steps(self, count, seconds=1.0):
        for _ in range(count):
            self.now += seconds
            self.stage.step(self.now, self.champion)

    def verdict(self):
        return self.stage.verdict_for(int8_of(self.one), self.champion, self.now)


def test_a_format_that_cannot_be_prepared_is_refused_at_once(world):
    one = Stage(world(rate_per_s=0.1))
    one.one.runtime.prepare_error = InvalidKnob("`weight_format` int8 is not for this machine.")
    assert isinstance(one.verdict(), NotYet)
    one.steps(2)
    verdict = one.verdict()
    assert isinstance(verdict, Failed) and "not for this machine" in verdict.reason


def test_a_check_that_fails_three_times_refuses_and_an_engine_that_is_away_only_waits(world):
    one = Stage(world(rate_per_s=0.1))
    one.one.runtime.score_error = EngineNotReady("The engine is restarting.")
    one.verdict()
    one.steps(60, seconds=60.0)
    assert isinstance(one.verdict(), NotYet)
    one.one.runtime.score_error = RequestFailed("Out of memory.", "score_failed")
    num_before = len(one.one.runtime.prepared)
    one.steps(60, seconds=60.0)
    verdict = one.verdict()
    assert isinstance(verdict, Failed) and "Out of memory" in verdict.reason
    assert len(one.one.runtime.prepared) == num_before + 3


def test_a_verdict_holds_for_every_configuration_that_says_the_same_and_for_an_hour(world):
    one = Stage(world(rate_per_s=0.1))
    one.verdict()
    one.steps(2)
    num_scored = len(one.one.runtime.scored)
    sibling = int8_of(one.one).patched({"max_num_seqs": 32})
    assert isinstance(one.stage.verdict_for(sibling, one.champion, one.now), Passed)
    assert len(one.one.runtime.scored) == num_scored
    assert isinstance(one.stage.verdict_for(sibling, one.champion, one.now + 3601.0), NotYet)
