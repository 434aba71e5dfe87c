"""The planned power is that of our own test."""

import numpy as np
import pytest

from tuner.judging.power import crossings, power_curve
from tuner.judging.sign_flip import UNIT, SignFlipTest


@pytest.mark.parametrize(
    ("level", "max_pairs", "look_every", "effect"), [(0.05, 20, 5, 0.6), (0.0025, 30, 4, 0.9)]
)
def test_many_experiments_at_once_cross_where_the_exact_test_does(level, max_pairs, look_every, effect):
    rng = np.random.default_rng(5)
    units = np.rint((rng.standard_normal((60, max_pairs)) - effect) * 8).astype(np.int64)
    found = crossings(units, level, look_every)
    for row, crossed_at in zip(units, found, strict=True):
        test = SignFlipTest(level, max_pairs, look_every)
        for value in row:
            test.add(float(value) * UNIT)
        assert (test.crossed_at or 0) == crossed_at
    assert 0 < np.count_nonzero(found) < 60


def test_power_without_an_effect_is_no_more_than_the_level():
    rng = np.random.default_rng(6)
    units = np.rint(rng.standard_normal((4000, 20)) * 8).astype(np.int64)
    share = np.count_nonzero(crossings(units, 0.05, 5)) / 4000
    assert share <= 0.05 + 3 * (0.05 * 0.95 / 4000) ** 0.5


def test_larger_effects_are_found_more_often_and_sooner():
    curve = power_curve(0.05, 30, 5)
    powers = [curve.power(effect) for effect in (0.0, 0.2, 0.5, 1.0, 3.0)]
    assert powers == sorted(powers) and powers[0] <= 0.1 and powers[-1] == 1.0
    assert curve.pairs_for(3.0) <= curve.pairs_for(1.0) <= curve.pairs_for(0.7) <= 30
    assert curve.pairs_for(0.1) is None


def test_smallest_effect_is_found_with_the_power_asked_for():
    curve = power_curve(0.0025, 30, 5)
    assert curve.power(curve.min_effect()) == pytest.approx(0.8, abs=0.01)
    assert (
        power_curve(0.0025, 60, 5).min_effect() < curve.min_effect() < power_curve(0.0025, 15, 5).min_effect()
    )


def test_a_level_that_the_cap_cannot_reach_finds_nothing():
    assert power_curve(0.0001, 10, 5).min_effect() is None


def test_a_long_experiment_is_scaled_from_a_shorter_one():
    short, long = power_curve(0.05, 80, 5), power_curve(0.05, 320, 20)
    assert long.min_effect() == pytest.approx(short.min_effect() / 2, rel=0.05)


def test_refuses_a_level_that_is_none():
    with pytest.raises(ValueError, match="level"):
        power_curve(0.0, 30, 5)
