"""Covariates stand in for the twin where they help, and only there."""

import math

import numpy as np
import pytest

from tuner.covariates import (
    CovariateFit,
    faded_sum,
    features_of,
    fit_covariates,
    model_from,
    predict_pair,
    window_of,
)
from tuner.twin import ServedRequest


def served(num: int, seed: int, load_effect: float, noise: float = 0.2) -> list[ServedRequest]:
    """Bursty arrivals; latency follows the lengths and, by `load_effect`, the tokens offered just before."""
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(0.2, num) * np.where(np.sin(np.arange(num) / 30) > 0, 0.4, 2.0)
    at = np.cumsum(gaps)
    prompt, output = rng.integers(20, 600, num), rng.integers(2, 60, num)
    load = np.log1p(faded_sum(at, output.astype(float), 8.0))
    log = 0.3 * np.log(output) + load_effect * load + noise * rng.standard_normal(num) - 2.0
    rows = zip(at.tolist(), prompt.tolist(), output.tolist(), np.exp(log).tolist(), strict=True)
    return [
        ServedRequest(str(index), start_at, *lengths, start_at + 0.01, start_at + seconds)
        for index, (start_at, *lengths, seconds) in enumerate(rows)
    ]


def test_are_used_where_load_moves_latency():
    fit = fit_covariates("e2e_s", served(3000, 1, load_effect=0.6), window_s=10.0)
    assert fit.usable and fit.adjusted_sd < 0.5 * fit.raw_sd
    assert "stand in" in fit.reason


def test_are_left_off_where_they_do_not_help():
    fit = fit_covariates("e2e_s", [
        one._replace(finished_at=one.arrived_at + math.exp(noise))
        for one, noise in zip(
            served(3000, 2, load_effect=0.0), np.random.default_rng(3).standard_normal(3000), strict=True
        )
    ], window_s=10.0)  # fmt: skip
    assert not fit.usable and "not used" in fit.reason


def test_too_few_windows_are_no_evidence():
    fit = fit_covariates("e2e_s", served(150, 1, load_effect=0.6), window_s=10.0)
    assert fit.raw_sd is None and not fit.usable and "pairs of windows only" in fit.reason
    assert not CovariateFit(None, 0).usable


def test_prediction_does_not_look_at_what_a_treatment_can_cause():
    """Latencies inside the pair change nothing: arrivals, lengths and the backlog at its start are all there is."""
    requests = served(2000, 4, load_effect=0.6)
    model = fit_covariates("e2e_s", requests, window_s=10.0).model
    start_at, end_at = requests[1000].arrived_at, requests[1000].arrived_at + 20.0
    slowed = [
        one._replace(finished_at=one.finished_at + 5.0, first_token_at=one.first_token_at + 5.0)
        if one.arrived_at >= start_at
        else one
        for one in requests
    ]
    before, after = (predict_pair(model, seen, start_at, end_at) for seen in (requests, slowed))
    assert before == after and len(before) > 20


def test_prediction_follows_the_backlog_at_the_start_of_the_pair():
    requests = served(200, 5, load_effect=0.6)
    start_at = requests[100].arrived_at
    stuck = [
        one._replace(finished_at=start_at + 1.0) if one.arrived_at < start_at else one for one in requests
    ]
    assert (features_of(requests, start_at) != features_of(stuck, start_at)).any()


def test_journalled_model_predicts_the_same():
    requests = served(2000, 6, load_effect=0.6)
    fit = fit_covariates("e2e_s", requests, window_s=10.0)
    again = model_from(fit.to_dict())
    assert predict_pair(again, requests, 50.0, 70.0) == predict_pair(fit.model, requests, 50.0, 70.0)


def test_faded_sum_forgets_by_the_memory():
    assert faded_sum(np.array([0.0, 2.0]), np.array([3.0, 1.0]), 2.0)[1] == pytest.approx(3.0 * math.exp(-1))


def test_windows_are_as_long_as_slices_where_the_stretch_allows():
    assert window_of(0.0, 3600.0, 15.0) == 15.0
    assert window_of(0.0, 180.0, 15.0) == pytest.approx(7.5)
