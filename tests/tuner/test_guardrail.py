import math

import pytest

from runtime.errors import NoPlan, RuntimeUnreachable
from tuner.guardrail import Limits, Watch, Watchman, breach, latest_reference
from tuner.judging.harm import HarmReference, HarmRule

QUIET = {
    "num_arrived": 40, "num_finished": 40, "num_errors": 0, "sum_log_e2e": 0.0, "sumsq_log_e2e": 1.0,
    "num_pending": 0, "oldest_pending_s": None, "sum_log_pending_age": 0.0,
}  # fmt: skip
STEADY = (0.0, 0.02, -0.02, 0.01, 0.0, -0.01, 0.02, 0.0)


def watch(**changes):
    given = {
        "plan_id": "p", "experiment_id": "e", "lease_s": 5.0, "until_at": 100.0, "challenger_slices": {"x": 10.0},
        "limits": Limits(0.01, 20), "reference": HarmReference(0.0, 0.1, 2.0, 0), "num_engine_restarts": 0,
    }  # fmt: skip
    return Watch(**{**given, **changes})


def state(slice_id="x", restarts=0, **stats):
    return {"slice_id": slice_id, "slice_stats": {"x": {**QUIET, **stats}}, "num_engine_restarts": restarts}


class Control:
    """Answers what the test says; remembers what it was asked."""

    def __init__(self, answer, lease=None):
        self.answer, self.lease_answer, self.calls = answer, lease, []

    def lease(self, plan_id, lease_s):
        self.calls.append("lease")
        if self.lease_answer is not None:
            raise self.lease_answer

    def state(self):
        return self.answer

    def abort(self, plan_id, reason):
        self.calls.append("abort")


def look(answer, lease=None, now=20.0, **changes):
    control = Control(answer, lease)
    watchman = Watchman(control, HarmRule(), lambda: now)
    one = watch(**changes)
    watchman.watch(one)
    watchman.look(one, now)
    stop = watchman.stops.get_nowait() if not watchman.stops.empty() else None
    return control, stop, watchman._watch


def test_quiet_challenger_keeps_its_lease():
    control, stop, watched = look(state())
    assert control.calls == ["lease"] and stop is None and watched is not None


def test_failing_requests_stop_the_challenger_at_once():
    control, stop, watched = look(state(num_errors=3, num_finished=30))
    assert control.calls == ["lease", "abort"]
    assert stop.kind == "harm" and "3 of 33 requests failed" in stop.reason
    assert watched is None


def test_few_requests_are_not_enough_for_a_ratio():
    assert look(state(num_errors=1, num_finished=5))[1] is None


def test_much_slower_challenger_is_stopped():
    slow = state(sum_log_e2e=40 * math.log(3.0), sumsq_log_e2e=40 * math.log(3.0) ** 2)
    assert look(slow)[1].kind == "harm"


def test_slices_of_the_champion_are_not_judged():
    assert breach(state(slice_id="champion's", num_errors=30), watch(), HarmRule(), 20.0) is None


def test_lost_plan_is_no_harm():
    _, stop, _ = look(state(), lease=NoPlan("gone"))
    assert stop.kind == "lost" and not stop.in_challenger


def test_plan_that_ends_while_we_ask_is_not_lost():
    _, stop, watched = look(state(), lease=NoPlan("gone"), now=99.5)
    assert stop is None and watched is None


def test_restarted_engine_ends_the_plan_and_says_who_served():
    _, stop, _ = look(state(restarts=1))
    assert stop.kind == "engine" and stop.in_challenger


def test_unreachable_runtime_leaves_the_decision_to_the_lease():
    control, stop, watched = look(state(), lease=RuntimeUnreachable("down"))
    assert stop is None and watched is not None and "abort" not in control.calls


def test_plan_that_is_over_is_forgotten():
    control, stop, watched = look(state(), now=100.0)
    assert control.calls == [] and stop is None and watched is None


def test_champion_slice_of_the_same_pair_is_the_nearer_reference():
    seen = state()
    seen["slice_stats"]["c"] = {**QUIET, "sum_log_e2e": 40 * 0.5}
    reference = latest_reference(seen, watch(champion_before={"x": "c"}, past_means=STEADY), "x")
    assert reference.mean_log == pytest.approx(0.5)
    assert latest_reference(seen, watch(past_means=STEADY), "x").mean_log == 0.0
