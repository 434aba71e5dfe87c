"""Coins over recorded traffic: false alarms at the level, power for a shift, and the same again for the same seed."""

import numpy as np
import pytest

from tuner.bench.coins import cut_pairs, judged, run_coins
from tuner.judging.judge import JudgeRules, Outcome, SliceScore, judge, score_pair
from tuner.judging.objective import Timing
from tuner.pairs import ExperimentRules

RULES = ExperimentRules(
    metric="e2e_s",
    level=0.05,
    max_pairs=15,
    look_every=5,
    min_effect=0.03,
    slice_s=10.0,
    burn_in_s=2.0,
    settle_s=4.0,
    lease_s=5.0,
    min_requests=5,
    slos=[],
    max_error_ratio=0.01,
    error_min_requests=20,
    pair_sd=0.1,
)


@pytest.fixture(scope="module")
def timings():
    """Ten minutes at 5 requests/s whose level drifts from one ten seconds to the next."""
    rng = np.random.default_rng(8)
    at = np.sort(rng.uniform(0.0, 600.0, 3000))
    level = np.cumsum(rng.normal(0.0, 0.05, 60))[(at // 10).astype(int)]
    seconds = np.exp(level + rng.normal(0.0, 0.3, 3000))
    return [
        Timing(str(index), start_at, 100, 20, start_at + 0.1, start_at + latency_s, "stop")
        for index, (start_at, latency_s) in enumerate(zip(at.tolist(), seconds.tolist(), strict=True))
    ]


@pytest.fixture(scope="module")
def cut(timings):
    return cut_pairs(timings, [(0.0, 600.0)], RULES, None)


def test_slices_are_cut_in_pairs_without_their_burn_in(timings, cut):
    assert len(cut) == 30
    expected = sum(2.0 <= timing.arrived_at < 10.0 for timing in timings)
    assert cut[0].first.num_requests == expected
    assert cut[0].first.measured != cut[0].second.measured


def test_a_pair_with_too_few_requests_is_left_out_as_live(timings):
    thin = [timing for timing in timings if not 20.0 <= timing.arrived_at < 30.0]
    assert len(cut_pairs(thin, [(0.0, 600.0)], RULES, None)) == 29


def test_predictions_are_subtracted_from_both_slices_or_the_pair_is_left_out_as_live(timings):
    whole = {timing.request_id: 0.5 for timing in timings}
    predicted = cut_pairs(timings, [(0.0, 600.0)], RULES, lambda start, end: whole)
    assert len(predicted) == 30 and predicted[0].first.predicted == predicted[0].second.predicted == 0.5
    half = {timing.request_id: 0.5 for timing in timings if timing.arrived_at >= 10.0}
    assert len(cut_pairs(timings, [(0.0, 600.0)], RULES, lambda start, end: half)) == 29


def test_coins_alone_promote_no_more_often_than_the_level(cut):
    found = run_coins(cut, RULES, 0.0, 600, seed=1, adjustment="none")
    assert found.promoted.total == 600 and found.promoted.low <= 0.05
    assert found.num_rejected + found.num_inconclusive + found.promoted.num == 600


def test_a_shift_is_found_and_a_larger_one_more_often(cut):
    shares = [
        run_coins(cut, RULES, gain, 120, seed=1, adjustment="none").promoted.ratio
        for gain in (0.0, 0.04, 0.3)
    ]
    assert shares[0] < shares[1] < shares[2] and shares[2] > 0.9


def test_the_same_seed_gives_the_same_report(cut):
    first, again = (run_coins(cut, RULES, 0.1, 40, seed=2, adjustment="none") for _ in range(2))
    assert first == again


def test_too_few_pairs_are_refused(cut):
    with pytest.raises(ValueError, match="pairs"):
        run_coins(cut[:10], RULES, 0.0, 10, seed=1, adjustment="none")


def test_skipping_the_pairs_between_looks_changes_no_verdict():
    rng = np.random.default_rng(4)
    rules = JudgeRules(alpha=0.05, max_pairs=15, look_every=5, harm_pair_sd=0.1)
    for effect in (-0.2, 0.0, 0.3):
        pairs = [
            score_pair(index, "AB", SliceScore(50, 0.0), SliceScore(50, float(rng.normal(effect, 0.1))))
            for index in range(15)
        ]
        for num_pairs in range(1, 16):
            slow = judge(pairs[:num_pairs], rules)
            if slow.outcome is not Outcome.CONTINUE:
                break
        assert judged(pairs, rules) == slow
