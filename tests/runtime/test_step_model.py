"""The step model finds the coefficients that made a log, or at least its predictions."""

from dataclasses import asdict, replace
from itertools import pairwise

import numpy as np
import pytest

from runtime.errors import TooFewSteps
from runtime.step_model import StepModel, computed_by, fit_step_model

IDENTITY = {"model": {"num_parameters": 8e6, "weight_bytes": 32e6, "num_layers": 6, "hidden_size": 256}}
TRUE = replace(StepModel.of_shape(IDENTITY), a=1 / 60e9, b=1 / 10e9, c=1 / 4e9, d=1.5e-3, e=2e-4)


def step_log(
    model: StepModel, num_steps: int, seed: int = 0, noise: float = 0.05, prompts: float = 0.4
) -> list[dict]:
    rng = np.random.default_rng(seed)
    log = []
    for index in range(num_steps):
        decode = int(rng.integers(0, 17))
        tokens = int(rng.integers(16, 513)) if rng.random() < prompts or decode == 0 else 0
        rows = int(tokens > 0)
        context = int(decode * rng.integers(50, 2000) + tokens)
        pairs = int(context - tokens + tokens * tokens)
        seconds = model.step_s(decode + tokens, context, pairs, decode + rows)
        seconds *= float(np.exp(noise * rng.standard_normal()))
        log.append(
            {
                "at": float(index), "step_s": seconds, "num_decode": decode, "num_prefill_rows": rows,
                "num_prefill_tokens": tokens, "context_tokens": context, "attention_pairs": pairs,
            }
        )  # fmt: skip
    return log


CASES = [(1, 100, 100, 1), (16, 16 * 900, 16 * 900, 16), (256, 256, 256 * 256, 1), (500, 9000, 300_000, 8)]


def test_recovers_known_coefficients_where_both_regimes_were_seen():
    fit = fit_step_model(step_log(TRUE, 3000), IDENTITY)
    found, true = asdict(fit.model), asdict(TRUE)
    assert fit.regime == "both" and fit.relative_error < 0.06 and abs(fit.bias) < 0.03
    for name in ("a", "c"):
        assert found[name] == pytest.approx(true[name], rel=0.05)
    for name in ("d", "e"):
        assert found[name] == pytest.approx(true[name], rel=0.35)


def test_predicts_even_where_weights_and_constant_cannot_be_told_apart():
    fit = fit_step_model(step_log(TRUE, 2000, prompts=0.0), IDENTITY)
    assert TRUE.step_s(16, 14400, 14400, 16) == pytest.approx(
        fit.model.step_s(16, 14400, 14400, 16), rel=0.03
    )
    assert TRUE.step_s(1, 100, 100, 1) == pytest.approx(fit.model.step_s(1, 100, 100, 1), rel=0.1)


def test_warm_up_and_rare_stalls_do_not_bend_the_fit():
    log = step_log(TRUE, 2000)
    for step in log[:100]:
        step["step_s"] *= 30.0
    for step in log[::500]:
        step["step_s"] *= 8.0
    fit = fit_step_model(log, IDENTITY)
    for case in CASES:
        assert fit.model.step_s(*case) == pytest.approx(TRUE.step_s(*case), rel=0.12)


def test_error_is_that_of_the_last_fifth_which_was_not_fitted():
    log = step_log(TRUE, 1000)
    for step in log[800:]:
        step["step_s"] *= 1.5
    fit = fit_step_model(log, IDENTITY)
    assert fit.bias == pytest.approx(1 / 1.5 - 1, abs=0.03) and fit.relative_error > 0.25


def test_the_clock_of_the_device_is_fitted_where_it_was_told():
    """One step ahead, the host charges the launch of a prompt to the step before it."""
    log = step_log(TRUE, 2000, noise=0.02, prompts=0.2)
    for step in log:
        step["device_s"] = step["step_s"]
    for step, following in pairwise(log):
        if following["num_prefill_rows"] and not step["num_prefill_rows"]:
            launch_s = 0.8 * following["device_s"]
            step["step_s"] += launch_s
            following["step_s"] -= launch_s
    fit = fit_step_model(log, IDENTITY)
    assert fit.relative_error < 0.03 and abs(fit.bias) < 0.03
    for case in CASES:
        assert fit.model.step_s(*case) == pytest.approx(TRUE.step_s(*case), rel=0.12)
    by_host = fit_step_model([{**step, "device_s": None} for step in log], IDENTITY)
    assert by_host.relative_error > 4 * fit.relative_error


def test_the_model_is_brought_to_all_the_time_that_steps_took():
    log = step_log(TRUE, 1000, noise=0.01)
    for step in log:
        step["device_s"], step["step_s"] = step["step_s"], 1.25 * step["step_s"]
    fit = fit_step_model(log, IDENTITY)
    assert abs(fit.bias) < 0.01, "which lies between steps too"
    assert fit.relative_error < 0.03 and all(abs(one.bias) < 0.03 for one in fit.errors.values()), (
        "by its clock"
    )
    assert fit.model.step_s(*CASES[1]) == pytest.approx(1.25 * TRUE.step_s(*CASES[1]), rel=0.1)
    older = [{**step, "device_s": None, "step_s": 9.0} for step in log[::7]]
    assert fit_step_model(older + log, IDENTITY).relative_error < 0.03, "left out: another clock"


def test_the_error_is_told_by_what_computed_the_steps():
    log = step_log(TRUE, 2000, noise=0.01)
    for step in log:
        if step["num_decode"] and not step["num_prefill_rows"]:
            step["graph_rows"] = 8 if step["num_decode"] <= 8 else 16
        if step["num_decode"] > 8:
            step["step_s"] *= 1.2 if step.get("graph_rows") else 1.0
    fit = fit_step_model(log, IDENTITY)
    assert set(fit.errors) == {"graph of 8", "graph of 16", "mixed", "prompt"}
    assert sum(one.num_steps for one in fit.errors.values()) == 400, "the held-out fifth"
    assert [one.num_steps for one in fit.errors.values()] == sorted(
        (one.num_steps for one in fit.errors.values()), reverse=True
    )
    assert fit.errors["graph of 16"].bias < fit.errors["graph of 8"].bias - 0.05, (
        "what they take and it cannot know"
    )
    weighed = sum(one.num_steps * one.relative_error for one in fit.errors.values()) / 400
    assert weighed == pytest.approx(fit.relative_error, abs=0.05)
    assert [
        computed_by({"num_decode": num, "num_prefill_rows": 0, "graph_rows": None}) for num in (1, 3)
    ] == ["decode"] * 2


def test_too_few_steps_are_refused_and_empty_ones_not_counted():
    log = step_log(TRUE, 60)
    for step in log[:20]:
        step["num_decode"] = step["num_prefill_tokens"] = 0
    with pytest.raises(TooFewSteps, match="but got 40"):
        fit_step_model(log, IDENTITY)


def test_one_regime_is_reported_as_such():
    compute_bound = replace(TRUE, a=1 / 1e9, b=0.0, c=0.0)
    assert fit_step_model(step_log(compute_bound, 500), IDENTITY).regime == "compute"


def test_model_survives_its_journal():
    assert StepModel.from_dict(TRUE.to_dict()) == TRUE


def test_tokens_are_multiplied_by_active_parameters_only_where_the_engine_tells_them():
    active = StepModel.of_shape({**IDENTITY, "num_active_parameters": 2e6})
    assert (TRUE.flop_per_token, active.flop_per_token) == (16e6, 4e6)
    assert active.attention_cost == 4 * TRUE.attention_cost == 4 * 6 * 256 / 4e6
    assert replace(TRUE, flop_per_token=0.0).attention_cost == 0.0
