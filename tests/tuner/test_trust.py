"""What the daemon plans, spends and doubts: the whole loop in virtual time."""

from itertools import pairwise

import pytest

from runtime.knobs import EngineConfig
from store import decisions, evidence, queries
from store.tables import AlphaSpend, Change, Experiment, Note, Slice, Study, Verdict
from tests.tuner.test_daemon import FAST, worlds
from tuner.report import status_report
from tuner.rows import ensure_config


@pytest.fixture
def world(tmp_path):
    with worlds(tmp_path) as build:
        yield build


def experiments(world, kind):
    return [row for row in world.rows(Experiment) if row.kind == kind]


def test_a_test_tells_before_its_first_pair_what_it_can_find_and_keeps_telling(world):
    one = world()
    one.run(400, lambda: experiments(one, "test"))
    (test,) = experiments(one, "test")
    assert not [row for row in one.rows(Slice) if row.experiment_id == test.experiment_id]
    assert test.planning["is_feasible"] and test.planning["max_pairs"] == test.rules["max_pairs"]
    assert test.planning["level"] == test.rules["level"]
    begins = [note.text for note in one.rows(Note) if note.text.startswith("Test of")]
    assert test.planning["words"] in begins[0]
    one.run(20)
    assert one.daemon.planned is not None and one.daemon.planned.words in one.daemon.doing
    one.run(300, lambda: experiments(one, "test")[0].state != "RUNNING")
    one.run(1)
    assert one.daemon.planned is None


def test_a_study_whose_tests_its_wall_time_cannot_hold_is_not_opened_and_the_story_says_so_once(world):
    one = world(experiment={**FAST["experiment"], "max_wall_s": 100.0})
    one.run(80)
    assert not one.rows(Study) and not one.rows(Experiment)
    told = [note.text for note in one.rows(Note) if note.text.startswith("No study is opened")]
    assert len(told) == 1 and "no gain is proven by fewer than 10" in told[0]
    assert one.daemon.doing == told[0]


def test_a_candidate_whose_level_became_too_small_for_the_wall_time_is_not_tested(world):
    one = world()
    one.run(400, lambda: experiments(one, "probe"))
    own = one.daemon._champion.config_id
    with one.store.journal() as session:
        for index in range(1, 121):  # so many tests have spent the wealth
            spent = Experiment(
                f"t{index}", "test", one.daemon.snapshot_id, None, own, own, 1.0, "DECIDED", {}, 1
            )
            session.add(spent)
            session.flush()
            session.add(
                AlphaSpend(spent.snapshot_id, "e2e_s", f"t{index}", index, 1e-5, 1.0, is_rejection=False)
            )
    one.run(200, lambda: any(row.state == "DONE" for row in one.rows(Study)))
    assert not [row for row in experiments(one, "test") if row.created_at > 1.0]
    assert "No test is opened" in one.rows(Study)[0].reason


def test_an_experiment_that_is_out_of_time_ends_without_a_winner_and_says_why(world):
    one = world()
    one.run(400, lambda: experiments(one, "test"))
    with one.store.journal() as session:
        (running,) = decisions.running_experiments(session)
        running.rules = {**running.rules, "max_wall_s": 20.0}
    one.run(60, lambda: bool(one.rows(Verdict)))
    (verdict,) = one.rows(Verdict)
    assert verdict.outcome == "INCONCLUSIVE" and "Out of time" in verdict.reason
    assert "20 seconds" in verdict.reason and verdict.num_pairs >= 1


def test_thin_traffic_opens_no_study_and_tells_how_long_it_would_take(world):
    one = world(rate_per_s=0.03)
    one.run(400)
    assert one.rows(Study) == []
    assert "not enough traffic: about" in one.daemon.doing
    assert sum("not enough traffic" in note.text for note in one.rows(Note)) == 1


def test_slices_are_lengthened_where_they_would_hold_too_few_requests(world):
    one = world(rate_per_s=0.8, learn={"champion_s": 120}, knobs={"start": {}})
    one.run(300, lambda: bool(one.rows(Slice)))
    planned = one.rows(Slice)[0]
    assert 6.0 < planned.planned_end_at - planned.planned_start_at <= 48.0


def test_harm_is_recorded_and_ends_the_day_when_the_budget_is_spent(world):
    one = world(
        rate_per_s=8.0,
        knobs={"start": {}},
        experiment={**FAST["experiment"], "harm_budget": 1e-5, "slice_s": 10},
    )
    one.runtime.slowdown = lambda config: 1.0 if config == one.daemon._champion else 2.0
    one.run(400, lambda: "harm" in one.daemon.doing)
    ended = [row for row in one.rows(Experiment) if row.ended_at is not None]
    assert ended and ended[0].planning["harm"]["excess_s"] > 0.0
    assert "of the day's harm budget is spent" in one.daemon.doing
    one.run(60)
    assert len(one.rows(Experiment)) == len(ended)


QUIET = {
    "knobs": {"start": {}},
    "search": {"max_probes": 1, "sampler": "random", "rest_s": 100_000},
    "aa": {"share": 0.5, "max_pairs": 5},
}


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """A world in which one study came to nothing and the champion was then tried against itself."""
    with worlds(tmp_path_factory.mktemp("quiet")) as build:
        one = build(**QUIET)
        one.run(900, lambda: any(row.state == "DECIDED" for row in experiments(one, "aa")))
        one.run(2)
        yield one


def test_champion_is_tried_against_itself_when_nothing_else_is(quiet):
    decided = next(row for row in experiments(quiet, "aa") if row.state == "DECIDED")
    own = quiet.daemon._champion.config_id
    assert decided.champion_config_id == decided.challenger_config_id == own
    assert decided.rules["level"] == 0.05 and decided.study_id is None
    first_study = quiet.rows(Study)[0]
    assert first_study.ended_at is not None and decided.created_at > first_study.ended_at
    spans = sorted((row.created_at, row.ended_at or quiet.clock.at) for row in quiet.rows(Experiment))
    assert all(later[0] >= earlier[1] for earlier, later in pairwise(spans))


def test_champion_against_itself_is_judged_and_counted_and_pays_no_level(quiet):
    decided = next(row for row in experiments(quiet, "aa") if row.state == "DECIDED")
    with quiet.store.journal() as session:
        assert evidence.false_promotion_rate(session).rate.total >= 1
        assert decisions.verdict_of(session, decided.experiment_id) is not None
        assert decisions.spend_of(session, decided.experiment_id) is None
    assert any("A/A so far:" in note.text for note in quiet.rows(Note))
    assert "A/A so far: " in status_report(quiet.data_dir).to_text()


def test_champion_that_wins_against_itself_is_not_promoted(world):
    one = world()
    one.run(5)
    own = one.daemon._champion.config_id
    with one.store.journal() as session:
        session.add(
            Experiment(
                "a1", "aa", one.daemon.snapshot_id, None, own, own, 1001.0, "DECIDED", {}, 1, reason="won"
            )
        )
        session.flush()
        session.add(Verdict("a1", 1002.0, "PROMOTE", "won", -0.1, -0.2, -0.05, 10, 0.01, 0.05, {}))
    one.run(5)
    assert [change.kind for change in one.rows(Change)] == ["start"]
    with one.store.journal() as session:
        assert queries.false_promotion_rate(session).rate.num == 1


def promote_without_a_test(one, target):
    """As if a test had proven `target`: its verdict and its change."""
    own, snapshot = one.daemon._champion.config_id, one.daemon.snapshot_id
    with one.store.journal() as session:
        ensure_config(session, target, 1001.0)
        session.flush()
        session.add(Experiment("t1", "test", snapshot, None, own, target.config_id, 1001.0, "DECIDED", {}, 1))
        session.flush()
        told = {"rules": {"pair_sd": 0.2}}
        verdict = Verdict("t1", 1002.0, "PROMOTE", "won", -0.3, -0.4, -0.2, 15, 0.001, 0.0025, told)
        session.add(verdict)
        session.flush()
        verdict_id = verdict.verdict_id
    change = one.daemon.promotion.apply("promote", target, "won", one.clock.at, verdict_id)
    one.daemon._follow_champion(one.clock.at, "promotion")
    return change


def add_holdback_pair(one, change, number, difference):
    name, at = f"h{number}", one.clock.at + number
    with one.store.journal() as session:
        arms = {"champion": change.to_config_id, "challenger": change.from_config_id}
        row = Experiment(
            name, "holdback", change.snapshot_id, None, *arms.values(), at, "DECIDED", {}, number
        )
        session.add(row)
        session.flush()
        for position, (arm, config_id) in enumerate(arms.items()):
            scored = Slice(
                f"{name}-{arm}", name, 0, position, arm, config_id, 0, "", at, at + 1, 0.0, "SCORED"
            )
            scored.response = difference if arm == "challenger" else 0.0
            session.add(scored)


def test_promotion_whose_gain_has_faded_is_rolled_back_once_enough_pairs_say_so(world):
    one = world(holdback={"share": 0.1})
    one.run(3)
    before = one.runtime.runner.champion
    change = promote_without_a_test(one, EngineConfig.of({"max_num_seqs": 9}))
    one.run(2)
    for number in range(9):
        add_holdback_pair(one, change, number, 0.004 * (-1) ** number)
    one.run(2)
    assert one.runtime.runner.champion.max_num_seqs == 9
    for number in range(9, 14):
        add_holdback_pair(one, change, number, 0.004 * (-1) ** number)
    one.run(2)
    rollback = one.rows(Change)[-1]
    assert rollback.kind == "rollback" and "the gain has faded" in rollback.reason
    assert one.runtime.runner.champion == before


def test_promotion_whose_gain_stays_is_kept(world):
    one = world(holdback={"share": 0.1})
    one.run(3)
    change = promote_without_a_test(one, EngineConfig.of({"max_num_seqs": 9}))
    for number in range(14):
        add_holdback_pair(one, change, number, 0.3 + 0.004 * (-1) ** number)
    one.run(3)
    assert one.rows(Change)[-1].kind == "promote"
    with one.store.journal() as session:
        gain = queries.realised_gain(session)
    assert gain.num_pairs == 14 and gain.low_ratio < gain.gain_ratio == pytest.approx(0.259, abs=0.001)
