"""The size of the sign-flip test is exact: claims by enumeration of every coin, and by honest bounds."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from tuner.judging.sign_flip import (
    CLIP,
    UNIT,
    SignFlipTest,
    allowed_spend,
    in_units,
    min_pairs_to_cross,
    reflipped_histories,
    sign_flip_p,
)

heavy_tailed = st.one_of(st.floats(0, 0.5), st.floats(0, 20), st.sampled_from([0.0, 0.0004, 0.1, 0.1, 7.0]))


def boundaries(sizes: list[float], alpha: float, max_pairs: int, look_every: int) -> dict[int, float]:
    """Number of pairs -> boundary. They depend on the sizes only; a path of plus signs never crosses."""
    test = SignFlipTest(alpha, max_pairs, look_every)
    for size in sizes:
        test.add(size)
    return {look.num_pairs: look.boundary for look in test.looks if look.boundary is not None}


def share_crossing(
    signs: np.ndarray, sizes: list[float], alpha: float, max_pairs: int, look_every: int
) -> float:
    sums = np.cumsum(signs * np.array([in_units(size) for size in sizes]), axis=1)
    crossed = np.zeros(len(signs), bool)
    for num_pairs, boundary in boundaries(sizes, alpha, max_pairs, look_every).items():
        crossed |= sums[:, num_pairs - 1] <= round(boundary / UNIT)
    return float(crossed.mean())


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(heavy_tailed, min_size=1, max_size=10),
    alpha=st.floats(0.01, 0.5),
    look_every=st.integers(1, 5),
)
def test_share_of_all_coins_that_reject_is_the_spend_and_never_above_alpha(sizes, alpha, look_every):
    signs = np.array(list(itertools.product([-1, 1], repeat=len(sizes))))
    share = share_crossing(signs, sizes, alpha, len(sizes), look_every)
    test = SignFlipTest(alpha, len(sizes), look_every)
    for size in sizes:
        test.add(size)
    spent = test.looks[-1].spent if test.looks else 0.0
    assert share == pytest.approx(spent, abs=1e-12)
    assert share <= alpha


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_autocorrelated_heavy_tailed_null_is_rejected_at_most_at_the_level(seed):
    rng = np.random.default_rng(seed)
    level = np.cumsum(rng.standard_normal(60)) * 0.1
    sizes = np.abs(np.exp(level) * rng.standard_t(2, 60) * 0.2).tolist()
    signs = np.random.default_rng(7).choice([-1, 1], (4000, 60))
    share = share_crossing(signs, sizes, 0.05, 60, 5)
    assert binomtest(round(share * 4000), 4000, 0.05, alternative="greater").pvalue > 1e-6


def test_spend_comes_close_to_alpha_when_sizes_vary():
    test = SignFlipTest(0.05, 60, 5)
    for size in np.abs(np.random.default_rng(1).standard_normal(60)):
        test.add(float(size))
    assert 0.0495 < test.looks[-1].spent <= 0.05


def test_same_history_decides_the_same_bit_for_bit():
    differences = np.random.default_rng(2).standard_t(3, 40).tolist()
    runs = []
    for _ in range(2):
        test = SignFlipTest(0.05, 40, 5)
        runs.append([test.add(difference) for difference in differences])
    assert runs[0] == runs[1]


def test_ties_step_down_instead_of_overspending():
    test = SignFlipTest(0.05, 5, 5)  # 2**-5 = 3.1 % for the lowest sum, 5/32 more for the next
    for _ in range(5):
        test.add(-0.1)
    assert test.looks[-1].boundary == pytest.approx(-0.5)
    assert test.looks[-1].spent == 2.0**-5 and test.crossed_at == 5


def test_ten_pairs_can_decide_at_the_first_lord_level_with_a_cap_of_thirty():
    assert min_pairs_to_cross(0.0025, 30, 5) == 10
    test = SignFlipTest(0.0025, 30, 5)
    for step in range(10):
        test.add(-0.2 - 0.01 * step)
    assert test.crossed_at == 10


def test_five_of_five_wins_are_too_few_at_five_percent_of_sixty_pairs():
    assert min_pairs_to_cross(0.05, 60, 5) == 10
    assert allowed_spend(0.05, 5, 60) < 2.0**-5


def test_level_that_no_number_of_pairs_reaches_is_told():
    assert min_pairs_to_cross(1e-6, 10, 5) is None


def test_non_inferiority_accepts_what_is_no_worse_than_the_margin_and_only_that():
    differences = 0.02 + 0.01 * np.random.default_rng(3).standard_normal(30)
    wide, narrow = SignFlipTest(0.05, 30, 5, margin=0.1), SignFlipTest(0.05, 30, 5, margin=0.02)
    for difference in differences:
        wide.add(float(difference))
        narrow.add(float(difference))
    assert wide.crossed_at is not None and narrow.crossed_at is None


def test_one_frozen_slice_counts_as_the_clip_and_not_more():
    assert in_units(1e9) == -in_units(-1e9) == round(CLIP / UNIT)
    with pytest.raises(ValueError, match="finite"):
        in_units(float("nan"))


def test_pair_beyond_the_cap_is_refused():
    test = SignFlipTest(0.05, 2, 1)
    test.add(0.1)
    test.add(0.1)
    with pytest.raises(ValueError, match="capped at 2 pairs"):
        test.add(0.1)


@settings(max_examples=20, deadline=None)
@given(differences=st.lists(st.floats(-3, 3), min_size=1, max_size=10))
def test_exact_p_equals_the_share_of_coins_that_do_as_well(differences):
    units = np.array([in_units(difference) for difference in differences])
    signs = np.array(list(itertools.product([-1, 1], repeat=len(units))))
    assert sign_flip_p(differences) == pytest.approx(
        float((signs @ np.abs(units) <= units.sum()).mean()), abs=1e-12
    )


def test_reflipped_histories_differ_from_the_observed_only_in_signs():
    paths = reflipped_histories([-0.1, 0.3, -0.2], num_paths=50, seed=4)
    sums = paths * np.arange(1, 4)
    assert np.allclose(np.abs(np.diff(sums, axis=1, prepend=0.0)), [0.1, 0.3, 0.2])
    assert np.array_equal(paths, reflipped_histories([-0.1, 0.3, -0.2], num_paths=50, seed=4))
