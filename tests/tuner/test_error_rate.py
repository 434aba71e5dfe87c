"""LORD++ levels, and the false discovery rate of a stream that uses them."""

import numpy as np
import pytest
from scipy.stats import binomtest

from tuner.judging.error_rate import Lord, gamma


def test_first_levels_are_a_quarter_and_a_twentieth_of_a_percent():
    assert Lord().level(1) == pytest.approx(0.0025, abs=5e-5)
    assert Lord().level(2) == pytest.approx(0.0005, abs=5e-5)


def test_ten_percent_with_half_as_wealth_starts_the_same_and_refills_at_once():
    default, generous = Lord(), Lord(alpha=0.10, w0=0.05)
    assert generous.level(1) == default.level(1)
    assert generous.level(3, [2]) > 4 * default.level(3, [2])


def test_spending_sequence_never_sums_above_one():
    assert sum(gamma(j) for j in range(1, 200_000)) < 1.0


def test_levels_paid_never_exceed_alpha_per_promotion():
    lord, rng = Lord(), np.random.default_rng(0)
    rejections: list[int] = []
    paid = 0.0
    for index in range(1, 400):
        paid += lord.level(index, rejections)
        if rng.random() < 0.1:
            rejections.append(index)
        assert paid <= 0.05 * max(1, len(rejections)) + 1e-12


def test_second_promotion_refills_the_wealth():
    lord = Lord()
    assert lord.level(11, [5, 10]) > 4 * lord.level(11, [5])


def test_stream_with_mostly_null_candidates_keeps_its_false_discovery_rate():
    """600 streams of 30 tests, a fifth truly better; the bound is on streams with any false promotion."""
    rng, lord = np.random.default_rng(1), Lord()
    proportions = []
    for _ in range(600):
        rejections: list[int] = []
        false = 0
        for index in range(1, 31):
            is_better = rng.random() < 0.2
            p = rng.random() if not is_better else 10 ** -rng.uniform(0, 8)
            if p <= lord.level(index, rejections):
                rejections.append(index)
                false += not is_better
        proportions.append(false / max(1, len(rejections)))
    assert np.mean(proportions) <= 0.05
    assert binomtest(sum(share > 0 for share in proportions), 600, 0.05, alternative="greater").pvalue > 1e-6


def test_impossible_indices_are_refused():
    with pytest.raises(ValueError, match="earlier rejections"):
        Lord().level(3, [3])
    with pytest.raises(ValueError, match="w0 <= alpha"):
        Lord(alpha=0.05, w0=0.06)
