"""Verdicts on pairs whose truth is known."""

import itertools
import json
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

from tuner.judging.coin import coin_hash, draw_coin
from tuner.judging.interval import (
    anytime_interval,
    gain_as_log,
    log_harm_e_value,
    log_normal_cdf,
    log_t_mixture,
    min_detectable_gain,
    pairs_needed,
)
from tuner.judging.judge import GuardrailResult, JudgeRules, Outcome, PairScore, SliceScore, judge, score_pair

SMALL = JudgeRules(alpha=0.05, max_pairs=20)


def pairs_of(differences, twin: float | None = None) -> list[PairScore]:
    return [
        score_pair(
            index,
            "AB",
            SliceScore(200, -1.0, twin, 4.0 + index, 300.0, 20.0),
            SliceScore(200, -1.0 + float(d), twin, 4.0),
        )
        for index, d in enumerate(differences)
    ]


def around(mean: float, sd: float, num_pairs: int, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal(num_pairs)
    return mean + sd * (noise - noise.mean()) / noise.std()


def test_promotes_a_clear_gain_and_says_why():
    verdict = judge(pairs_of(around(-0.4, 0.1, 10)), SMALL)
    assert verdict.outcome is Outcome.PROMOTE
    assert verdict.effect_ratio == pytest.approx(math.expm1(-0.4))
    assert verdict.crossed_at_pairs == 10 and "33.0% lower" in verdict.reason


def test_never_promotes_before_the_first_look_at_which_luck_is_excluded():
    clear = pairs_of(around(-0.4, 0.01, 9))
    assert judge(clear, SMALL).outcome is Outcome.CONTINUE
    assert "at least 10 are needed" in judge(clear[:4], SMALL).reason


def test_rejects_a_challenger_that_is_worse():
    verdict = judge(pairs_of(around(+0.4, 0.1, 15)), SMALL)
    assert verdict.outcome is Outcome.REJECT and "worse" in verdict.reason


def test_rejects_when_even_the_best_case_is_below_the_minimum_effect():
    verdict = judge(pairs_of(around(0.0, 0.01, 10)), SMALL)
    assert verdict.outcome is Outcome.REJECT and "best case" in verdict.reason


def test_inconclusive_at_the_cap_when_nothing_is_proven():
    verdict = judge(pairs_of(around(-0.03, 0.3, 20)), SMALL)
    assert verdict.outcome is Outcome.INCONCLUSIVE and "champion stays" in verdict.reason


def test_proven_gain_below_the_minimum_is_not_promoted():
    rules = JudgeRules(max_pairs=20, min_effect=0.05)
    verdict = judge(pairs_of(around(-0.045, 0.02, 20)), rules)
    assert verdict.crossed_at_pairs is not None and verdict.outcome is Outcome.REJECT


def test_proven_gain_waits_for_its_guardrails_and_is_rejected_at_the_cap():
    failing = [GuardrailResult("errors", False, "2 % of requests failed")]
    differences = around(-0.4, 0.1, 20)
    assert judge(pairs_of(differences[:10]), SMALL, failing).outcome is Outcome.CONTINUE
    at_cap = judge(pairs_of(differences), SMALL, failing)
    assert at_cap.outcome is Outcome.REJECT and "2 % of requests failed" in at_cap.reason
    passing = [GuardrailResult("errors", True, "")]
    assert judge(pairs_of(differences[:11]), SMALL, passing).outcome is Outcome.PROMOTE


def test_open_fault_delays_a_promotion():
    differences = around(-0.4, 0.1, 20)
    assert judge(pairs_of(differences[:10]), SMALL, (), ["clock step"]).outcome is Outcome.CONTINUE
    assert judge(pairs_of(differences), SMALL, (), ["clock step"]).outcome is Outcome.INCONCLUSIVE


def test_no_pair_and_one_pair_are_no_verdict():
    for differences in ([], [-0.4]):
        assert judge(pairs_of(differences), SMALL).outcome is Outcome.CONTINUE


@settings(max_examples=25, deadline=None)
@given(differences=st.lists(st.floats(-2, 2), min_size=2, max_size=20))
def test_swapping_the_arms_flips_the_sign_of_the_effect(differences):
    ours, theirs = judge(pairs_of(differences), SMALL), judge(pairs_of([-d for d in differences]), SMALL)
    assert math.log1p(ours.effect_ratio) == pytest.approx(-math.log1p(theirs.effect_ratio), abs=1e-9)
    assert {ours.outcome, theirs.outcome} != {Outcome.PROMOTE}


def test_verdict_is_recomputed_bit_for_bit_from_its_inputs():
    differences = around(-0.05, 0.2, 20)
    first, second = judge(pairs_of(differences), SMALL), judge(pairs_of(differences), SMALL)
    assert first == second and json.dumps(first.to_dict()) == json.dumps(second.to_dict())


def test_twin_is_subtracted_from_both_slices_or_from_neither():
    with_twin = score_pair(0, "BA", SliceScore(200, -1.0, -1.1), SliceScore(200, -1.3, -1.2))
    assert with_twin.difference == pytest.approx(-0.2) and with_twin.raw_difference == pytest.approx(-0.3)
    half = score_pair(0, "BA", SliceScore(200, -1.0, -1.1), SliceScore(200, -1.3, None))
    assert half.difference == half.raw_difference and not half.twin_used


def test_verdict_keeps_the_load_and_lengths_it_saw():
    seen = judge(pairs_of([0.1, 0.2, 0.3]), SMALL).seen
    assert seen.requests_per_s == (4.0, 6.0) and seen.mean_prompt_tokens == (300.0, 300.0)


@pytest.mark.parametrize("num_pairs", [7, 12, 30])
def test_closed_form_interval_equals_numeric_inversion(num_pairs):
    differences = around(-0.1, 0.2, num_pairs, seed=num_pairs)
    interval = anytime_interval(differences.tolist(), 0.05)
    se = differences.std(ddof=1) / math.sqrt(num_pairs)

    def log_e(true_mean: float) -> float:
        return log_t_mixture(((differences.mean() - true_mean) / se) ** 2, num_pairs) + math.log(0.05)

    mean = differences.mean()
    assert interval.low == pytest.approx(brentq(log_e, mean - 50 * se, mean, xtol=1e-13), abs=1e-9)
    assert interval.high == pytest.approx(brentq(log_e, mean, mean + 50 * se, xtol=1e-13), abs=1e-9)


def test_interval_is_unbounded_while_pairs_are_few():
    assert anytime_interval([-0.1], 0.05) is None and anytime_interval([-0.1, -0.2], 0.05) is None


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.floats(0, 5), min_size=1, max_size=7), sd=st.floats(0.05, 1.0))
def test_harm_e_value_is_at_most_one_on_average_over_all_coins(sizes, sd):
    signs = np.array(list(itertools.product([-1, 1], repeat=len(sizes))))
    assert np.mean([math.exp(log_harm_e_value((row * sizes).tolist(), sd)) for row in signs]) <= 1.0 + 1e-9


def test_log_normal_cdf_agrees_with_scipy_far_into_the_tail():
    for x in (-60.0, -31.0, -29.0, -3.0, 0.0, 3.0):
        assert log_normal_cdf(x) == pytest.approx(float(norm.logcdf(x)), rel=2e-3)


def test_planning_finds_a_ten_percent_gain_with_23_pairs_at_the_reference_noise():
    assert pairs_needed(0.151, 0.10) == 23
    assert min_detectable_gain(0.151, 23) == pytest.approx(0.10, abs=0.003)
    assert pairs_needed(0.151, 0.10, alpha=0.0025) > 2 * pairs_needed(0.151, 0.10)
    assert gain_as_log(0.10) == pytest.approx(0.10536, abs=1e-5)


def test_coin_is_committed_by_a_hash_that_an_audit_recomputes():
    bits = random.Random(5).getrandbits
    coins = [draw_coin("e1", index, bits) for index in range(200)]
    assert all(
        coin.coin_hash == coin_hash("e1", index, coin.value, coin.salt) for index, coin in enumerate(coins)
    )
    assert coin_hash("e1", 0, 1 - coins[0].value, coins[0].salt) != coins[0].coin_hash
    assert {coin.order for coin in coins} == {"AB", "BA"} and 60 < sum(coin.value for coin in coins) < 140
