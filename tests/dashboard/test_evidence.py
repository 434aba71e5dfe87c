"""The dashboard computes again what the judge computed: both must say the same, on any pairs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dashboard.evidence import estimates, looks, reflipped
from tuner.judging.interval import anytime_interval, effect_ratio
from tuner.judging.sign_flip import SignFlipTest, reflipped_histories

differences = st.lists(st.floats(-6, 6, allow_nan=False), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(differences, st.sampled_from([0.0005, 0.0025, 0.05]), st.sampled_from([1, 5]))
def test_looks_are_those_of_the_judge_with_the_same_boundaries(found, level, look_every):
    test = SignFlipTest(level, 30, look_every)
    for difference in found:
        test.add(difference)
    ours = looks(found, level, 30, look_every)
    assert [(one.num_pairs, one.running_sum, one.boundary) for one in ours] == [
        (one.num_pairs, one.running_sum, one.boundary) for one in test.looks
    ]


@settings(max_examples=60, deadline=None)
@given(differences)
def test_estimate_and_interval_are_those_of_the_verdict(found):
    for n, one in enumerate(estimates(found), start=1):
        interval = anytime_interval(found[:n], 0.05)
        assert one.num_pairs == n
        assert one.effect_ratio == pytest.approx(effect_ratio(sum(found[:n]) / n), abs=1e-12)
        expected = (
            (None, None) if interval is None else tuple(map(effect_ratio, (interval.low, interval.high)))
        )
        assert (one.low_ratio, one.high_ratio) == expected


def test_cloud_is_seeded_and_flips_signs_alone():
    found = [0.3, -0.2, 0.5]
    paths = reflipped(found, 50, seed=7)
    assert np.array_equal(paths, reflipped(found, 50, seed=7))
    assert np.allclose(np.abs(np.diff(paths, prepend=0.0, axis=1)), np.abs(found))
    means = reflipped_histories(found, 50, seed=7)
    assert np.allclose(paths / np.arange(1, 4), means)


def test_interval_closes_and_boundary_comes_with_pairs():
    found = [-0.3 + 0.05 * (-1) ** n for n in range(20)]
    widths = [one.high_ratio - one.low_ratio for one in estimates(found) if one.low_ratio is not None]
    assert widths[-1] < widths[0] / 3
    crossed = looks(found, 0.0025, 30, 5)
    assert crossed[0].boundary is None and crossed[-1].running_sum <= crossed[-1].boundary
