"""What an experiment can find and how long it takes, told before it opens."""

import math
from dataclasses import replace

import pytest

from tuner.planning import Asked, plan, slicing, told_duration

ASKED = Asked(
    level=0.0025,
    max_pairs=30,
    look_every=5,
    min_effect=0.03,
    pair_sd=0.12,
    slicing=slicing(15.0, 4.0, 5, 6.0),
    max_wall_s=4 * 3600.0,
)


def test_tells_pairs_and_minutes_for_the_predicted_gain():
    planned = plan(replace(ASKED, predicted_gain=0.6))
    assert planned.is_feasible and planned.is_predicted
    assert planned.pairs_needed == 10
    assert planned.minutes_needed == pytest.approx(10 * 31 / 60)
    assert planned.words == "needs about 5 minutes (10 pairs) to find 60%"


def test_tells_the_smallest_gain_that_is_found_where_the_wanted_one_is_not():
    planned = plan(ASKED)
    assert planned.pairs_needed is None and planned.target_ratio == 0.03 and planned.power < 0.2
    assert 0.05 < planned.mde_ratio < 0.15
    assert "3% would be found with a chance of" in planned.words


def test_quieter_pairs_make_the_plan_shorter_while_it_runs():
    asked = replace(ASKED, predicted_gain=0.1, pair_sd=0.3)
    before = plan(asked)
    seen = [-0.11, -0.10, -0.12, -0.10, -0.09, -0.11]
    now = plan(asked, seen)
    assert before.pairs_needed is None and now.pairs_needed == 10
    assert now.words == "needs about 2 more minutes (4 pairs) to find 10%"
    assert plan(asked, seen + seen).words.startswith("enough pairs by now")


def test_slices_grow_until_they_hold_enough_requests_and_no_further():
    assert slicing(15.0, 4.0, 5, 6.0).slice_s == 15.0
    thin = slicing(15.0, 4.0, 5, 0.5)
    assert thin.is_enough and 15.0 < thin.slice_s <= 120.0
    assert thin.requests_per_slice == pytest.approx((1 + math.sqrt(6)) ** 2)
    starved = slicing(15.0, 4.0, 5, 0.02)
    assert not starved.is_enough and starved.slice_s == 120.0


def test_unknown_rate_leaves_slices_as_they_are():
    assert slicing(15.0, 4.0, 5, None).slice_s == 15.0


def test_thin_traffic_is_told_in_the_time_that_it_would_take():
    planned = plan(replace(ASKED, slicing=slicing(15.0, 4.0, 5, 0.01)))
    assert not planned.is_feasible
    assert planned.words == "not enough traffic: about 4 days to see 5%"
    silent = plan(replace(ASKED, slicing=slicing(15.0, 4.0, 5, 0.0)))
    assert "no request came" in silent.words


def test_wall_time_lowers_the_cap_before_the_first_coin():
    planned = plan(replace(ASKED, max_wall_s=17 * 31.0))
    assert planned.is_feasible and planned.max_pairs == 15


def test_an_experiment_that_could_prove_nothing_in_its_time_is_not_opened():
    planned = plan(replace(ASKED, max_wall_s=200.0))
    assert not planned.is_feasible and planned.mde_ratio is None
    assert "no gain is proven by fewer than 10" in planned.words


def test_durations_are_told_in_words():
    told = [told_duration(seconds) for seconds in (1, 90, 600, 7300, 260_000)]
    assert told == ["1 second", "90 seconds", "10 minutes", "2 hours", "3 days"]
