"""The judge on a recorded trace and on the demo's traffic: how noisy a pair is, raw, with covariates, with the twin.

The measured system is a replay whose steps take the "true" seconds times a noise of their own and times a
slowly drifting host; the champion is compared with itself. The twin is fitted on the step log of the first
part only and judged on the rest.
"""

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np

from runtime.batch import Batch
from runtime.knobs import EngineConfig
from runtime.replay import Arrival, Replay
from runtime.step_model import StepModel, StepModelFit, fit_step_model
from tuner.covariates import REACH_S, CovariateFit, fit_covariates
from tuner.covariates import predict_pair as predict_by_covariates
from tuner.judging.interval import pairs_needed
from tuner.judging.sign_flip import min_pairs_to_cross
from tuner.load.arrivals import arrivals as demo_arrivals
from tuner.settings import TrafficSettings
from tuner.twin import (
    MIN_WINDOW_REQUESTS,
    Calibration,
    ServedRequest,
    TwinParameters,
    TwinPrediction,
    calibrate_twin,
    predict_pair,
    twin_error,
)

CONTEXT_TOKENS = 2048
BLOCK_TOKENS, KV_BLOCKS = 16, 4096
UTILISATION = 0.7
FIT_SHARE = 1 / 3  # of the trace: the twin's past
STEP_NOISE = 0.10  # sd of ln(step seconds), one step to the next
HOST_SD, HOST_TAU_S = 0.05, 300.0  # sd of ln(host factor) and how long it remembers
STALL_CHANCE, STALL_FACTOR = 0.002, 8.0
GAIN = 0.10
SLICES_S = (60.0, 20.0)  # a sixth of each is burn-in
DEMO_REQUESTS = 8000
CALIBRATION_WINDOW_S = 20.0
# A small model on a few cores: about 8 million weights, 60 GFLOP/s, 10 GB/s, 2 ms around each step.
IDENTITY = {"model": {"num_parameters": 8e6, "weight_bytes": 32e6, "num_layers": 6, "hidden_size": 256}}
TRUE_COEFFICIENTS = {"a": 1 / 60e9, "b": 1 / 10e9, "c": 1 / 8e9, "d": 1.5e-3, "e": 1e-4}


class MeasuredSystem(Replay):
    """A replay whose steps are noisy and logged, as a real engine's are."""

    def __init__(self, config: EngineConfig, model: StepModel, rng: np.random.Generator) -> None:
        super().__init__(config, model, KV_BLOCKS, BLOCK_TOKENS, CONTEXT_TOKENS)
        self.steps: list[dict[str, float]] = []
        self._rng = rng
        self._host, self._host_at = float(rng.normal(0.0, HOST_SD)), 0.0

    def step_s(self, batch: Batch) -> float:
        passed_s, self._host_at = max(0.0, self.now - self._host_at), self.now
        keep = math.exp(-passed_s / HOST_TAU_S)
        self._host = keep * self._host + math.sqrt(1.0 - keep * keep) * HOST_SD * self._rng.standard_normal()
        seconds = super().step_s(batch) * math.exp(self._host + STEP_NOISE * self._rng.standard_normal())
        if self._rng.random() < STALL_CHANCE:
            seconds *= STALL_FACTOR
        self.steps.append(
            {
                "at": self.now + seconds,
                "step_s": seconds,
                "num_decode": batch.num_decode,
                "num_prefill_rows": batch.num_prefill_rows,
                "num_prefill_tokens": batch.num_prefill_tokens,
                "context_tokens": batch.context_tokens,
                "attention_pairs": batch.attention_pairs,
            }
        )
        return seconds


@dataclass(frozen=True)
class PairNoise:
    """Champion against itself in pairs of slices; sds in log units, pairs for 80 % power for a 10 % gain at 5 %.

    raw: no twin. drifting: a twin that follows its own backlog. twin: from the real backlog at the pair's start.
    covariates: what stands in for the twin, whether or not its rule would let it.
    """

    slice_s: float
    num_pairs: int
    num_sparse_pairs: int  # left out: a slice with fewer than 10 requests
    requests_per_slice: float
    raw_sd: float
    drifting_sd: float
    covariates_sd: float
    twin_sd: float
    raw_pairs_needed: int
    drifting_pairs_needed: int
    covariates_pairs_needed: int
    twin_pairs_needed: int
    twin_hours_needed: float


Predictions = Mapping[str, float]  # request_id -> ln(e2e)


class PairSample(NamedTuple):
    """One pair of slices: requests in each, and second minus first mean ln latency, as such and minus each twin."""

    counts: tuple[int, int]
    raw: float
    drifting: float
    covariates: float
    twin: float


def read_trace(path: Path) -> tuple[list[Arrival], float]:
    """Arrivals of an Azure LLM inference trace, lengths scaled so that every request fits the context; the factor."""
    with path.open(newline="") as lines:
        rows = [
            (row["TIMESTAMP"], int(row["ContextTokens"]), int(row["GeneratedTokens"]))
            for row in csv.DictReader(lines)
        ]
    factor = min(1.0, CONTEXT_TOKENS / max(prompt + output for _, prompt, output in rows))
    times = [datetime.fromisoformat(stamp[:26]).timestamp() for stamp, _, _ in rows]
    arrivals = [
        Arrival(str(index), at - times[0], max(1, int(prompt * factor)), max(1, int(output * factor)))
        for index, (at, (_, prompt, output)) in enumerate(zip(times, rows, strict=True))
    ]
    return sorted(arrivals, key=lambda arrival: arrival.arrived_at), factor


def stretched(arrivals: Sequence[Arrival], factor: float) -> list[Arrival]:
    return [arrival._replace(arrived_at=arrival.arrived_at * factor) for arrival in arrivals]


def utilisation(config: EngineConfig, model: StepModel, arrivals: Sequence[Arrival]) -> float:
    """Share of the trace's time that the engine spends in steps."""
    replay = Replay(config, model, KV_BLOCKS, BLOCK_TOKENS, CONTEXT_TOKENS)
    replay.advance(arrivals, math.inf)
    return replay.busy_s / (arrivals[-1].arrived_at - arrivals[0].arrived_at)


def stretch_for(config: EngineConfig, model: StepModel, arrivals: Sequence[Arrival], target: float) -> float:
    """By how much the trace's clock is slowed so that utilisation is near `target` (batching makes it nonlinear)."""
    low, high = 0.05, 50.0
    for _ in range(9):
        middle = math.sqrt(low * high)
        busy = utilisation(config, model, stretched(arrivals, middle))
        if abs(busy / target - 1.0) < 0.02:
            return middle
        low, high = (middle, high) if busy > target else (low, middle)
    return math.sqrt(low * high)


class Serving(NamedTuple):
    """One noisy serving of the trace, with a twin fitted on its first part."""

    served: list[ServedRequest]
    fit_until: float
    step_fit: StepModelFit
    calibration: Calibration
    covariates: CovariateFit
    utilisation: float


def serve(config: EngineConfig, model: StepModel, arrivals: Sequence[Arrival], seed: int) -> Serving:
    system = MeasuredSystem(config, model, np.random.default_rng(seed))
    system.advance(arrivals, math.inf)
    recorded = {arrival.id: arrival for arrival in arrivals}
    served = [
        ServedRequest(*recorded[done.id], done.first_token_at, done.finished_at) for done in system.finished
    ]
    fit_until = arrivals[-1].arrived_at * FIT_SHARE
    fit = fit_step_model([step for step in system.steps if step["at"] <= fit_until], IDENTITY)
    unfitted = TwinParameters(config, fit.model, KV_BLOCKS, BLOCK_TOKENS, CONTEXT_TOKENS)
    past = [done for done in served if done.finished_at <= fit_until]
    calibration = calibrate_twin(unfitted, past, CALIBRATION_WINDOW_S)
    standing_in = fit_covariates("e2e_s", past, CALIBRATION_WINDOW_S)
    return Serving(served, fit_until, fit, calibration, standing_in, system.busy_s / arrivals[-1].arrived_at)


def pair_samples(serving: Serving, slice_s: float) -> Iterator[PairSample]:
    """Every pair of slices after the fitted part, a sixth of each slice being burn-in."""
    parameters = serving.calibration.parameters
    everything = sorted(serving.served, key=lambda request: request.arrived_at)
    drifting = logs_of(predict_pair(parameters, everything, 0.0, math.inf))
    start_at = serving.fit_until
    while start_at + 2 * slice_s <= everything[-1].arrived_at:
        near = [r for r in everything if r.finished_at > start_at and r.arrived_at < start_at + 3 * slice_s]
        twin = logs_of(predict_pair(parameters, near, start_at, start_at + 2 * slice_s))
        standing_in = _by_covariates(serving, everything, start_at, start_at + 2 * slice_s)
        slices: tuple[list[ServedRequest], list[ServedRequest]] = ([], [])
        for request in near:
            if request.id in twin and (request.arrived_at - start_at) % slice_s >= slice_s / 6:
                slices[request.arrived_at >= start_at + slice_s].append(request)
        start_at += 2 * slice_s
        yield _sample(*slices, drifting, standing_in, twin)


def logs_of(predictions: Mapping[str, TwinPrediction]) -> Predictions:
    return {id: seen.log_e2e for id, seen in predictions.items()}


def _by_covariates(
    serving: Serving, everything: Sequence[ServedRequest], start_at: float, end_at: float
) -> Predictions | None:
    if serving.covariates.model is None:
        return None
    near = [r for r in everything if r.finished_at > start_at - REACH_S and r.arrived_at < end_at]
    return predict_by_covariates(serving.covariates.model, near, start_at, end_at)


def _sample(
    one: list[ServedRequest],
    two: list[ServedRequest],
    drifting: Predictions,
    standing_in: Predictions | None,
    twin: Predictions,
) -> PairSample:
    counts = (len(one), len(two))
    if 0 in counts:
        return PairSample(counts, 0.0, 0.0, 0.0, 0.0)

    def change(predictions: Predictions | None) -> float:
        means = [
            fmean(r.log_e2e - (predictions[r.id] if predictions is not None else 0.0) for r in requests)
            for requests in (one, two)
        ]
        return means[1] - means[0]

    return PairSample(counts, change(None), change(drifting), change(standing_in), change(twin))


def planned_pairs(sd: float) -> int:
    """For 80 % power for a 10 % gain at 5 %; at least the first look at which a boundary exists at all."""
    return max(pairs_needed(sd, GAIN), min_pairs_to_cross(0.05, 60, 5) or 0)


def pair_noise(servings: Sequence[Serving], slice_s: float) -> PairNoise:
    samples = [sample for serving in servings for sample in pair_samples(serving, slice_s)]
    full = [sample for sample in samples if min(sample.counts) >= MIN_WINDOW_REQUESTS]
    raw_sd, drifting_sd, covariates_sd, twin_sd = (
        stdev(values)
        for values in (
            [s.raw for s in full],
            [s.drifting for s in full],
            [s.covariates for s in full],
            [s.twin for s in full],
        )
    )
    return PairNoise(
        slice_s=slice_s,
        num_pairs=len(full),
        num_sparse_pairs=len(samples) - len(full),
        requests_per_slice=fmean(count for sample in full for count in sample.counts),
        raw_sd=raw_sd,
        drifting_sd=drifting_sd,
        covariates_sd=covariates_sd,
        twin_sd=twin_sd,
        raw_pairs_needed=planned_pairs(raw_sd),
        drifting_pairs_needed=planned_pairs(drifting_sd),
        covariates_pairs_needed=planned_pairs(covariates_sd),
        twin_pairs_needed=planned_pairs(twin_sd),
        twin_hours_needed=planned_pairs(twin_sd) * 2 * slice_s / 3600,
    )


def run_trace(path: Path, seed: int, num_runs: int = 5) -> dict[str, Any]:
    """The whole benchmark: the trace served `num_runs` times, with other noise each time."""
    recorded, length_factor = read_trace(path)
    found = run_arrivals(EngineConfig.of({}), recorded, UTILISATION, seed, num_runs)
    return {"trace": path.name, "length_factor": length_factor, **found}


def run_demo(seed: int, config: EngineConfig, utilisation: float, num_runs: int) -> dict[str, Any]:
    """The same on an hour of the demo's traffic: Poisson arrivals, its mix of lengths."""
    settings = TrafficSettings(kind="poisson", rate_per_s=1.0)
    drawn = islice(demo_arrivals(settings, np.random.default_rng(seed), CONTEXT_TOKENS), DEMO_REQUESTS)
    recorded = [
        Arrival(str(i), one.at_s, one.prompt_tokens, one.output_tokens) for i, one in enumerate(drawn)
    ]
    return run_arrivals(config, recorded, utilisation, seed, num_runs)


def run_arrivals(
    config: EngineConfig, recorded: Sequence[Arrival], target: float, seed: int, num_runs: int
) -> dict[str, Any]:
    """Arrivals on a clock stretched to the utilisation wanted, served `num_runs` times."""
    true_model = replace(StepModel.of_shape(IDENTITY), **TRUE_COEFFICIENTS)
    stretch = stretch_for(config, true_model, recorded, target)
    arrivals = stretched(recorded, stretch)
    servings = [serve(config, true_model, arrivals, seed + run) for run in range(num_runs)]
    return {
        "num_requests": len(arrivals),
        "clock_stretch": stretch,
        "requests_per_s": len(arrivals) / arrivals[-1].arrived_at,
        "runs": [_run_row(serving) for serving in servings],
        "pairs": [asdict(pair_noise(servings, slice_s)) for slice_s in SLICES_S],
    }


def _run_row(serving: Serving) -> dict[str, Any]:
    """How well one run's step model and twin did; "later" is the part that was neither fitted nor tested on."""
    error = serving.calibration.error
    later = twin_error(
        serving.calibration.parameters, serving.served, serving.fit_until, CALIBRATION_WINDOW_S
    )
    return {
        "utilisation": serving.utilisation,
        "num_steps": serving.step_fit.num_steps,
        "step_error": serving.step_fit.relative_error,
        "step_bias": serving.step_fit.bias,
        "twin_error": error.relative_error,
        "twin_usable": error.usable,
        "covariates_usable": serving.covariates.usable,
        "later_twin_error": later.relative_error,
        "later_num_windows": later.num_windows,
    }
