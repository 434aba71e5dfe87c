"""The harm rule: quick on a challenger that is twice as slow, silent on an equal one."""

import math

import numpy as np
from scipy.stats import binomtest

from tuner.bench.harm import stops
from tuner.judging.harm import HarmReference, HarmRule, SliceWatch, harm_reference

RULE = HarmRule()
CHAMPION = HarmReference(mean_log=0.0, sd_slice_mean=0.15, slowest_s=4.0, num_challenger_slices=0)


def watched(ratio: float, num_finished: int = 60, **pending: float) -> SliceWatch:
    mean = math.log(ratio)
    return SliceWatch(15.0, num_finished, num_finished * mean, num_finished * (mean * mean + 0.3), **pending)


def test_stops_a_challenger_twice_as_slow_after_sixty_requests():
    reason = RULE.breach(watched(2.0), CHAMPION)
    assert reason is not None and "2.0 times" in reason


def test_leaves_an_equal_challenger_alone():
    assert RULE.breach(watched(1.1), CHAMPION) is None


def test_believes_no_mean_of_a_handful_of_requests():
    assert RULE.breach(watched(20.0, num_finished=5), CHAMPION) is None


def test_asks_for_more_evidence_once_the_first_slices_were_passed():
    later = HarmReference(0.0, 0.15, num_challenger_slices=7)
    unknown = HarmReference(0.0, 0.15)
    assert RULE.breach(watched(1.6), CHAMPION) is not None
    assert RULE.breach(watched(1.6), later) is None and RULE.breach(watched(1.6), unknown) is None


def test_unfinished_requests_count_with_their_age():
    slow_tail = {"num_pending": 60, "sum_log_pending_age": 60 * math.log(5.0)}
    assert RULE.breach(watched(1.0), CHAMPION) is None
    assert RULE.breach(watched(1.0, **slow_tail), CHAMPION) is not None


def test_stops_a_challenger_that_finishes_nothing():
    stuck = SliceWatch(20.0, 0, 0.0, 0.0, num_pending=30, sum_log_pending_age=60.0, oldest_pending_s=17.0)
    assert "unfinished for 17 s" in RULE.breach(stuck, CHAMPION)


def test_reference_is_unknown_until_the_champion_has_shown_its_spread():
    assert harm_reference([0.0, 0.1, 0.0], 0.0, lag=1) is None
    steady = harm_reference([0.0] * 12, 0.3, lag=1)
    assert steady is not None and steady.mean_log == 0.3 and steady.sd_slice_mean == 0.05


def test_reference_from_further_back_is_less_certain_under_drift():
    walk = np.cumsum(np.random.default_rng(3).standard_normal(40) * 0.1).tolist()
    near, far = harm_reference(walk, 0.0, lag=1), harm_reference(walk, 0.0, lag=2)
    assert far.sd_slice_mean > near.sd_slice_mean


def test_twice_as_slow_is_caught_fast_and_equal_challengers_live():
    """100 simulated experiments of each; bounds are binomial, at one in a million."""
    rng = np.random.default_rng(11)
    slow = stops(rng, 60, 4, 2.0, RULE)
    quick = sum(stop is not None and (stop.scored_s <= 15 or stop.num_requests <= 60) for stop in slow)
    assert binomtest(quick, 60, 0.6, alternative="less").pvalue > 1e-6
    equal = stops(rng, 40, 30, 1.0, RULE)
    assert binomtest(sum(stop is not None for stop in equal), 40, 0.02, alternative="greater").pvalue > 1e-6
