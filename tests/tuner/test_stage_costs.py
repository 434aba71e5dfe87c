import time

import pytest

from tuner.stage_costs import StageCosts


def test_cost_of_a_stage_adds_up_also_where_it_fails():
    costs = StageCosts()
    for _ in range(2):
        with costs.measured("collect"):
            until = time.thread_time() + 0.01
            while time.thread_time() < until:
                pass
    with pytest.raises(ValueError), costs.measured("collect"):
        raise ValueError
    told = costs.to_dict()["stages"]["collect"]
    assert told["num_calls"] == 3 and told["cpu_s"] >= 0.02 and told["wall_s"] >= told["max_wall_s"] >= 0.01


def test_waiting_costs_no_cpu():
    costs = StageCosts()
    with costs.measured("collect"):
        time.sleep(0.05)
    cost = costs.costs["collect"]
    assert cost.wall_s >= 0.05 > cost.cpu_s


def test_percentiles_are_of_ticks_and_absent_before_the_first():
    costs = StageCosts()
    with costs.measured("collect"):
        pass
    assert costs.tick_percentile_s(0.5) is None
    for _ in range(3):
        with costs.measured(costs.TICK):
            pass
    assert 0.0 <= costs.to_dict()["tick_p50_s"] <= costs.to_dict()["tick_p99_s"]
