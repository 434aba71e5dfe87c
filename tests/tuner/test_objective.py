import math

import pytest

from tuner.judging.objective import SLOLimit, Timing, measure_slice, quantile


def timing(id, latency_s, reason="stop", output_tokens=10):
    return Timing(id, 100.0, 50, output_tokens, 100.0 + latency_s / 2, 100.0 + latency_s, reason)


def test_measured_is_the_mean_logarithm():
    measure = measure_slice([timing("a", 1.0), timing("b", math.e)], [], None, "e2e_s", [], 9.0)
    assert measure.measured == pytest.approx(0.5)
    assert measure.rate_per_s == pytest.approx(2 / 9)


def test_unfinished_requests_count_with_their_age():
    fast = measure_slice([timing("a", 1.0)], [], None, "e2e_s", [], 9.0)
    slow = measure_slice([timing("a", 1.0)], [math.e**2], None, "e2e_s", [], 9.0)
    assert (fast.measured, slow.measured) == (pytest.approx(0.0), pytest.approx(1.0))
    assert slow.num_pending == 1


def test_prediction_is_subtracted_for_the_same_requests_only():
    measure = measure_slice([timing("a", 1.0), timing("b", 100.0)], [], {"a": 0.25}, "e2e_s", [], 9.0)
    score = measure.to_score()
    assert (score.mean_log_latency, score.mean_log_twin) == (pytest.approx(0.0), 0.25)


def test_failed_requests_are_counted_and_not_timed():
    measure = measure_slice([timing("a", 1.0), timing("b", 0.001, "rejected")], [], None, "e2e_s", [], 9.0)
    assert (measure.num_errors, measure.num_requests, measure.measured) == (1, 2, pytest.approx(0.0))


def test_slice_without_values_has_no_score():
    assert measure_slice([], [], None, "e2e_s", [], 9.0).to_score() is None


def test_tpot_is_time_after_the_first_token_over_further_tokens():
    assert timing("a", 2.0, output_tokens=11).value("tpot_s") == pytest.approx(0.1)
    assert timing("a", 2.0, output_tokens=1).value("tpot_s") is None


def test_quantile_slo_is_kept_as_the_share_over_its_limit():
    slos = [SLOLimit("e2e_s", "p95", 2.0), SLOLimit("ttft_s", "mean", 9.0), SLOLimit("errors", "share", 0.01)]
    timings = [timing("a", 1.0), timing("b", 3.0), timing("c", 0.1, "error")]
    seen = measure_slice(timings, [], None, "e2e_s", slos, 9.0).slos
    assert seen["e2e_s p95 <= 2"] == pytest.approx(1 / 3)
    assert seen["ttft_s mean <= 9"] == pytest.approx((0.5 + 1.5 + 0.05) / 3)
    assert seen["errors share <= 0.01"] == pytest.approx(1 / 3)
    assert [slo.allowed for slo in slos] == [0.05, 9.0, 0.01]


def test_quantile_interpolates():
    assert quantile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert quantile([], 0.5) is None
