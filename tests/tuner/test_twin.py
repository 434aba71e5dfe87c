"""The champion twin predicts a noisy engine, and says when it does not."""

import math
from dataclasses import replace

import numpy as np
import pytest

from runtime.knobs import EngineConfig
from runtime.replay import Arrival
from runtime.step_model import StepModel, fit_step_model
from tuner.bench.trace import (
    BLOCK_TOKENS,
    CONTEXT_TOKENS,
    IDENTITY,
    KV_BLOCKS,
    TRUE_COEFFICIENTS,
    MeasuredSystem,
)
from tuner.twin import ChampionTwin, ServedRequest, TwinError, TwinParameters, calibrate_twin, predict_pair

TRUE_MODEL = replace(StepModel.of_shape(IDENTITY), **TRUE_COEFFICIENTS)
OVERHEAD_S = 0.02


def bursty_arrivals(num: int, seed: int) -> list[Arrival]:
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(0.18, num) * np.where(np.sin(np.arange(num) / 40) > 0, 0.6, 1.8)
    return [
        Arrival(str(i), float(at), int(rng.integers(20, 600)), int(rng.integers(2, 40)))
        for i, at in enumerate(np.cumsum(gaps))
    ]


@pytest.fixture(scope="module")
def measured():
    """A noisy engine's requests and its step log."""
    system = MeasuredSystem(EngineConfig(), TRUE_MODEL, np.random.default_rng(3))
    arrivals = bursty_arrivals(2500, 4)
    system.advance(arrivals, math.inf)
    lengths = {arrival.id: arrival for arrival in arrivals}
    served = [
        ServedRequest(*lengths[done.id], done.first_token_at + OVERHEAD_S, done.finished_at + OVERHEAD_S)
        for done in system.finished
    ]
    return served, system.steps


def parameters(model: StepModel) -> TwinParameters:
    return TwinParameters(EngineConfig(), model, KV_BLOCKS, BLOCK_TOKENS, CONTEXT_TOKENS)


def test_fitted_twin_predicts_windows_within_its_bound_and_shrinks_their_spread(measured):
    served, steps = measured
    fit = fit_step_model(steps[: len(steps) // 3], IDENTITY)
    calibration = calibrate_twin(parameters(fit.model), served, window_s=10.0)
    assert calibration.error.usable and calibration.error.num_windows >= 10
    assert calibration.error.residual_sd < 0.5 * calibration.error.raw_sd
    assert calibration.parameters.request_overhead_s == pytest.approx(OVERHEAD_S, abs=0.01)


def test_twin_of_another_engine_is_not_used(measured):
    served, _ = measured
    slow = replace(TRUE_MODEL, d=4 * TRUE_MODEL.d, a=2 * TRUE_MODEL.a)
    error = calibrate_twin(parameters(slow), served, window_s=10.0).error
    assert not error.usable and error.relative_error > 0.10 and "is not used" in error.reason


def test_too_short_a_history_leaves_the_error_unknown(measured):
    served, _ = measured
    for few in ([], served[:30]):
        error = calibrate_twin(parameters(TRUE_MODEL), few, window_s=10.0).error
        assert error.relative_error is None and not error.usable and "10 are needed" in error.reason


def test_pair_is_predicted_from_the_real_backlog(measured):
    served, _ = measured
    busiest = max(served, key=lambda request: request.finished_at - request.arrived_at)
    start_at = (busiest.arrived_at + busiest.finished_at) / 2
    near = [
        request for request in served if request.finished_at > start_at and request.arrived_at < start_at + 30
    ]
    seen = predict_pair(parameters(TRUE_MODEL), near, start_at, start_at + 20)
    assert seen and all(start_at <= prediction.arrived_at < start_at + 20 for prediction in seen.values())
    from_empty = ChampionTwin(parameters(TRUE_MODEL))
    from_empty.advance([request.arrival for request in near if request.arrived_at >= start_at], math.inf)
    truth = {request.id: request.log_e2e for request in near}

    def error(predictions):
        return abs(np.mean([predictions[id].log_e2e - truth[id] for id in list(seen)[:20]]))

    assert error(seen) < error(from_empty.predictions)


def test_prediction_uses_nothing_that_an_arm_could_change(measured):
    """Other latencies after the start of the pair, same arrivals: the same prediction, hence an exact test."""
    served, _ = measured
    start_at = served[500].arrived_at
    fresh = [request for request in served if request.arrived_at >= start_at][:200]
    other = [request._replace(finished_at=request.finished_at + 3.0) for request in fresh]
    expected = predict_pair(parameters(TRUE_MODEL), fresh, start_at, start_at + 10)
    assert predict_pair(parameters(TRUE_MODEL), other, start_at, start_at + 10) == expected


def test_twin_continues_from_its_own_backlog_and_forgets_on_request():
    arrivals = bursty_arrivals(100, 5)
    twin, whole = ChampionTwin(parameters(TRUE_MODEL)), ChampionTwin(parameters(TRUE_MODEL))
    whole.advance(arrivals, math.inf)
    twin.advance(arrivals[:50], arrivals[50].arrived_at)
    twin.advance(arrivals[50:], math.inf)
    assert twin.predictions == whole.predictions and len(twin.predictions) == 100
    twin.forget_before(arrivals[90].arrived_at)
    assert len(twin.predictions) == 10


def test_requests_without_a_token_or_too_long_are_left_out():
    twin = ChampionTwin(parameters(TRUE_MODEL))
    twin.advance([Arrival("a", 0.0, 10, 0), Arrival("b", 0.0, 9000, 5), Arrival("c", 0.0, 10, 5)], math.inf)
    assert set(twin.predictions) == {"c"}


def test_parameters_survive_their_journal():
    found = replace(parameters(TRUE_MODEL), request_overhead_s=0.01)
    assert TwinParameters.from_dict(found.to_dict()) == found


def test_twin_that_adds_noise_is_not_used():
    assert not TwinError(20, relative_error=0.01, residual_sd=0.2, raw_sd=0.1).usable
