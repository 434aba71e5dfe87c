import pytest

from tuner.holdback import (
    MAX_SHARE,
    MIN_SHARE,
    holdback_share,
    judge_holdback,
    known_effect,
    seconds_between_pairs,
)


def test_large_gain_needs_few_reminders_and_a_small_one_many():
    assert holdback_share(0.05, -0.9) == pytest.approx(0.05 / 9)
    assert holdback_share(0.05, -0.03) == MAX_SHARE
    assert holdback_share(0.0001, -0.9) == MIN_SHARE


def test_pairs_are_spaced_by_the_share():
    assert seconds_between_pairs(0.05, 12.0) == pytest.approx(240.0)


def test_promotion_that_turned_slower_must_roll_back():
    judgement = judge_holdback([-0.4] * 15, pair_sd=0.2)
    assert judgement.must_roll_back and "slower" in judgement.reason


def test_promotion_that_still_wins_is_kept():
    judgement = judge_holdback([0.4] * 15, pair_sd=0.2)
    assert not judgement.must_roll_back and judgement.gain_ratio == pytest.approx(0.33, abs=0.01)


def test_no_pair_is_no_judgement():
    assert judge_holdback([], pair_sd=0.2).gain_ratio is None


def test_gain_that_has_faded_is_taken_back_once_enough_pairs_say_so():
    faded = [0.01, -0.01, 0.012, -0.008, 0.0, 0.01, -0.012, 0.008, 0.0, 0.005, -0.004, 0.002]
    judgement = judge_holdback(faded, pair_sd=0.2, min_effect=0.03)
    assert judgement.must_roll_back and "faded" in judgement.reason
    assert not judge_holdback(faded[:9], pair_sd=0.2, min_effect=0.03).must_roll_back


def test_gain_that_may_still_be_there_is_not_called_faded():
    noisy = [0.3, -0.3, 0.25, -0.2, 0.1, -0.1, 0.3, -0.25, 0.2, -0.1, 0.05, 0.0]
    assert not judge_holdback(noisy, pair_sd=0.2, min_effect=0.03).must_roll_back


def test_share_follows_what_the_holdback_itself_measured():
    assert known_effect(-0.5, [0.1] * 4) == -0.5
    assert known_effect(-0.5, [0.1] * 5) == pytest.approx(-0.095, abs=0.001)
