import time

import pytest

from runtime.knobs import EngineConfig, knob_reports
from tuner.errors import ProposalFailed
from tuner.propose import AskProcess, AskRequest, ask, past_trials
from tuner.space import search_space, trust_region

CHAMPION = EngineConfig.of({"max_num_seqs": 4})
SPACE = search_space(knob_reports(4, 64), None, (), {})
REGION = trust_region(SPACE, CHAMPION, 1)


def rows(*values):
    return [
        {
            "values": CHAMPION.patched({"max_num_seqs": n}).values(),
            "value": value,
            "constraints": {"harm": -1.0},
        }
        for n, value in values
    ]


def test_past_trials_outside_the_region_are_not_told():
    past = past_trials(REGION, rows((4, 0.0), (8, -0.3), (64, -0.9)))
    assert [trial.params["max_num_seqs"] for trial in past] == [4, 8]


def test_every_past_trial_carries_the_same_constraint_names():
    mixed = rows((4, 0.0), (8, -0.3))
    mixed[0]["constraints"] = {}
    assert [trial.constraints for trial in past_trials(REGION, mixed)] == [{"harm": 0.0}, {"harm": -1.0}]


@pytest.mark.parametrize("sampler", ["gp", "tpe", "random"])
@pytest.mark.filterwarnings("ignore::Warning")  # Optuna's experimental notices
def test_asked_point_lies_in_the_region(sampler):
    asked = ask(AskRequest(REGION, past_trials(REGION, rows((4, 0.0), (8, -0.3), (2, 0.4))), sampler, seed=1))
    assert set(asked) == set(REGION.names)
    for dimension in REGION.dimensions:
        if dimension.choices is None:
            assert dimension.low <= asked[dimension.name] <= dimension.high
        else:
            assert asked[dimension.name] in dimension.choices


def test_ask_runs_in_a_child_and_answers_by_polling():
    process = AskProcess(AskRequest(REGION, [], "random", seed=1), now=0.0)
    answer = None
    for _ in range(600):
        answer = process.poll(now=1.0)
        if answer is not None:
            break
        time.sleep(0.1)
    process.stop()
    assert answer is not None and set(answer) == set(REGION.names)


def test_child_that_overruns_is_stopped():
    process = AskProcess(AskRequest(REGION, [], "gp", seed=1), now=0.0)
    with pytest.raises(ProposalFailed, match="did not answer"):
        process.poll(now=1000.0)


def test_child_that_dies_says_why():
    process = AskProcess(AskRequest(REGION, [], "gp", seed=1), now=0.0)
    process._child.kill()
    process._child.wait()
    with pytest.raises(ProposalFailed, match="ended with code"):
        process.poll(now=1.0)
