import pytest

from runtime.errors import InvalidKnob, InvalidPlan, NoPlan, StaleVersion
from runtime.knobs import EngineConfig
from runtime.plan import PlannedSlice, PlanRunner, SlicePlan

CHAMPION = EngineConfig.of({"max_num_seqs": 2})
CHALLENGER = EngineConfig.of({"max_num_seqs": 8})


def plan(plan_id="p1", version=0, start=10.0, lease_s=5.0):
    return SlicePlan(
        plan_id,
        "e1",
        version,
        {c.config_id: c.values() for c in (CHAMPION, CHALLENGER)},
        (
            PlannedSlice("s1", "challenger", CHALLENGER.config_id, start, start + 10, 2.0),
            PlannedSlice("s2", "champion", CHAMPION.config_id, start + 10, start + 20, 2.0),
        ),
        lease_s,
    )


def kinds(tick):
    return [event["kind"] for event in tick.events]


def test_engine_swaps_at_the_slice_and_returns_at_the_end():
    runner = PlanRunner(CHAMPION)
    runner.accept(plan(), now=9.0)
    seen = []
    for now in (9.5, 10.0, 15.0, 20.0, 25.0, 30.0):
        runner.plan and runner.renew("p1", 5.0, now)
        tick = runner.tick(now)
        seen.append((tick.config.max_num_seqs, tick.slice_id))
    assert seen == [(2, None), (8, "s1"), (8, "s1"), (2, "s2"), (2, "s2"), (2, None)]
    assert runner.plan is None


def test_lapsed_lease_reverts_to_the_champion_by_itself():
    runner = PlanRunner(CHAMPION)
    runner.accept(plan(), now=9.0)
    assert runner.tick(13.9).config == CHALLENGER
    tick = runner.tick(14.0)
    assert tick.config == CHAMPION and "lease_lapsed" in kinds(tick)
    with pytest.raises(NoPlan):
        runner.renew("p1", 5.0, 14.1)


def test_idle_engine_wakes_at_the_slice_and_at_the_end_of_the_lease():
    runner = PlanRunner(CHAMPION)
    assert runner.next_change_at(0.0) is None
    runner.accept(plan(), now=9.0)
    assert runner.next_change_at(9.0) == 10.0
    assert runner.next_change_at(11.0) == 14.0


def test_plan_of_another_version_is_refused():
    runner = PlanRunner(CHAMPION)
    runner.commit({"max_num_seqs": 3}, 0, now=1.0)
    with pytest.raises(StaleVersion, match="version 1 is in force"):
        runner.accept(plan(version=0), now=9.0)


def test_same_plan_again_changes_nothing():
    runner = PlanRunner(CHAMPION)
    runner.accept(plan(), now=9.0)
    runner.tick(9.1)
    runner.accept(plan(), now=9.2)
    assert runner.tick(9.3).events == []


def test_reconfiguring_the_champion_ends_the_plan():
    runner = PlanRunner(CHAMPION)
    runner.accept(plan(), now=9.0)
    runner.tick(10.0)
    done = runner.commit({"max_num_seqs": 4}, None, now=11.0)
    tick = runner.tick(11.0)
    assert (done.version, tick.config.max_num_seqs, tick.slice_id) == (1, 4, None)
    assert kinds(tick) == ["slice_ended", "plan_aborted", "config_committed"]


def test_bad_knob_leaves_the_champion_and_its_version():
    runner = PlanRunner(CHAMPION)
    with pytest.raises(InvalidKnob, match=r"\[1, 1024\]"):
        runner.commit({"max_num_seqs": 5000}, None, now=1.0)
    assert (runner.champion, runner.version) == (CHAMPION, 0)


def test_configuration_that_does_not_fit_the_machine_is_refused_before_its_slice():
    def fits(config):
        if config.max_num_seqs > 4:
            raise InvalidKnob("too many")

    with pytest.raises(InvalidPlan, match="too many"):
        PlanRunner(CHAMPION, fits=fits).accept(plan(), now=9.0)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"lease_s": 9.0}, "lease_s"),
        ({"slices": []}, "at least one slice"),
        ({"configs": {}}, "which `configs` lacks"),
        ({"experiment_id": None, "slices": None}, "needs plan_id"),
    ],
)
def test_contradictory_plan_is_refused_with_the_rule(change, rule):
    with pytest.raises(InvalidPlan, match=rule):
        SlicePlan.from_dict(plan().to_dict() | change)


def test_overlapping_slices_are_refused():
    data = plan().to_dict()
    data["slices"][1]["start_at"] = 15.0
    with pytest.raises(InvalidPlan, match="follow one another"):
        SlicePlan.from_dict(data)


def test_configuration_under_a_wrong_name_is_refused():
    data = plan().to_dict()
    data["configs"][CHALLENGER.config_id]["max_num_seqs"] = 9
    with pytest.raises(InvalidPlan, match="hashes to"):
        SlicePlan.from_dict(data)


def test_plan_survives_its_own_json():
    assert SlicePlan.from_dict(plan().to_dict()).to_dict() == plan().to_dict()
