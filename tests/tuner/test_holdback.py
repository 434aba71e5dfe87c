import pytest

from tuner.holdback import MAX_SHARE, MIN_SHARE, holdback_share, judge_holdback, seconds_between_pairs


def test_large_gain_needs_few_reminders_and_a_small_one_many():
    assert holdback_share(0.05, -0.9) == pytest.approx(0.05 / 9)
    assert holdback_share(0.05, -0.03) == MAX_SHARE
    assert holdback_share(0.0001, -0.9) == MIN_SHARE


def test_pairs_are_spaced_by_the_share():
    assert seconds_between_pairs(0.05, 12.0) == pytest.approx(240.0)


def test_promotion_that_turned_slower_is_harmful():
    judgement = judge_holdback([-0.4] * 15, pair_sd=0.2)
    assert judgement.is_harmful and "slower" in judgement.reason


def test_promotion_that_still_wins_is_kept():
    judgement = judge_holdback([0.4] * 15, pair_sd=0.2)
    assert not judgement.is_harmful and judgement.gain_ratio == pytest.approx(0.33, abs=0.01)


def test_no_pair_is_no_judgement():
    assert judge_holdback([], pair_sd=0.2).gain_ratio is None
