"""What stands in for the champion twin where there is none: a regression on what no treatment can cause.

    served by the champion ──fit_covariates──▶ CovariateFit (coefficients, out-of-sample sd with and without)
    arrivals around a pair ──predict_pair────▶ request_id -> ln(metric), to be subtracted like the twin's

A request's ln(metric) is regressed on its own lengths, on the tokens offered around its arrival (with
memories of 2, 8 and 32 s, before it and, up to the pair's end, after it), and on the backlog at the start
of its pair, which fades. All of these are arrivals, or stood before the pair's coin took effect. The
coefficients are fitted on the champion alone, before the experiment, and journalled. So what is subtracted
depends on no coin of the pair: the sign-flip test stays exact, however poor the regression is.

Two things are taken as given: that clients send on their own account (a closed loop answers a slow arm with
fewer requests), and that the challenger changes no output lengths.

Declared rule: in use only where the twin is not, and only where it made the sd of the champion's own pairs
smaller by more than MIN_CUT on windows it was not fitted on. Source: regression adjustment with a covariate
that the treatment cannot cause, Deng, Xu, Kohavi and Walker, "CUPED" (WSDM 2013).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import stdev
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tuner.judging.objective import Metric
from tuner.twin import MIN_LATENCY_S, MIN_WINDOW_PAIRS, MIN_WINDOW_REQUESTS, ServedRequest

MIN_CUT = 0.10
MEMORIES_S = (2.0, 8.0, 32.0)
REACH_S = 4.0 * MEMORIES_S[-1]  # arrivals further away weigh less than 2 %
WINDOW_PARTS = (1.0, 0.5, 0.25)  # of the window asked for
MIN_FITTED = 100  # requests
RIDGE = 1e-2  # of the number of requests: the memories overlap, and their coefficients must not run away

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class CovariateModel:
    """ln(metric) = intercept + coefficients · (features - means) / scales."""

    metric: Metric
    intercept: float
    coefficients: tuple[float, ...]
    means: tuple[float, ...]
    scales: tuple[float, ...]

    def of(self, features: Floats) -> Floats:
        """[requests, features] -> [requests] predicted ln(metric)."""
        return np.asarray(
            self.intercept + ((features - self.means) / self.scales) @ np.asarray(self.coefficients)
        )


@dataclass(frozen=True)
class CovariateFit:
    """The sds (log units) are of pairs of the champion's windows that the model was not fitted on; None: too few."""

    model: CovariateModel | None
    num_pairs: int
    raw_sd: float | None = None
    adjusted_sd: float | None = None

    @property
    def usable(self) -> bool:
        if self.model is None or self.raw_sd is None or self.adjusted_sd is None:
            return False
        return self.adjusted_sd < (1.0 - MIN_CUT) * self.raw_sd

    @property
    def noise_share(self) -> float:
        """What is left of the sd of a pair; 1 where they are of no use."""
        return self.adjusted_sd / self.raw_sd if self.usable and self.adjusted_sd and self.raw_sd else 1.0

    @property
    def reason(self) -> str:
        if self.raw_sd is None or self.adjusted_sd is None:
            return f"No covariates are used: they could be tested on {self.num_pairs} pairs of windows only."
        return (
            f"Covariates {'stand in' if self.usable else 'are not used'}: the sd of a pair is "
            f"{self.adjusted_sd:.2f} log units with them, {self.raw_sd:.2f} without ({self.num_pairs} pairs, "
            f"{MIN_CUT:.0%} less is asked for)."
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "is_used": self.usable}


def fit_covariates(metric: Metric, served: Sequence[ServedRequest], window_s: float) -> CovariateFit:
    """Fits on each half of the champion's stretch, tests on pairs of windows of the other, then fits on all.

    Where calm stretches leave too few full windows of `window_s`, shorter ones are looked at.
    """
    in_order = sorted(served, key=lambda request: request.arrived_at)
    found = CovariateFit(None, 0)
    for part in WINDOW_PARTS if in_order else ():
        pairs = list(
            _windows(metric, in_order, in_order[0].arrived_at, in_order[-1].arrived_at, part * window_s)
        )
        found = _tested(metric, pairs)
        if found.raw_sd is not None:
            break
    return found


def _tested(metric: Metric, pairs: Sequence["_Pair"]) -> CovariateFit:
    halves = pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]
    raw, adjusted = [], []
    for fitted_on, tested_on in (halves, halves[::-1]):
        model = _fitted(metric, fitted_on)
        for pair in tested_on:
            if model is not None and min(pair.counts) >= MIN_WINDOW_REQUESTS:
                raw.append(_change(pair, pair.logs))
                adjusted.append(_change(pair, pair.logs - model.of(pair.features)))
    whole = _fitted(metric, pairs)
    if whole is None or len(raw) < 2 * MIN_WINDOW_PAIRS:
        return CovariateFit(whole, len(raw))
    return CovariateFit(whole, len(raw), stdev(raw), stdev(adjusted))


def predict_pair(
    model: CovariateModel, served: Sequence[ServedRequest], start_at: float, end_at: float
) -> dict[str, float]:
    """request_id -> ln(metric) for the requests that arrived in [start_at, end_at).

    `served`: every request that was in the system at `start_at`, or arrived up to REACH_S before it or since.
    """
    in_order = sorted((one for one in served if one.arrived_at < end_at), key=lambda one: one.arrived_at)
    inside = [index for index, one in enumerate(in_order) if one.arrived_at >= start_at]
    if not inside:
        return {}
    found = model.of(features_of(in_order, start_at)[inside])
    return {in_order[index].id: float(log) for index, log in zip(inside, found, strict=True)}


def features_of(in_order: Sequence[ServedRequest], start_at: float) -> Floats:
    """[requests, features] for a pair that starts at `start_at`; `in_order` of arrival."""
    at = np.array([one.arrived_at for one in in_order])
    prompt = np.array([one.prompt_tokens for one in in_order], dtype=float)
    output = np.array([one.output_tokens for one in in_order], dtype=float)
    backlog = sum(one.arrived_at < start_at < one.finished_at for one in in_order)
    columns = [np.log(np.maximum(prompt, 1.0)), np.log(np.maximum(output, 1.0))]
    for memory_s in MEMORIES_S:
        for tokens in (prompt, output):
            columns.append(np.log1p(faded_sum(at, tokens, memory_s)))
            columns.append(np.log1p(faded_sum(-at[::-1], tokens[::-1], memory_s)[::-1]))
        columns.append(math.log1p(backlog) * np.exp(-np.maximum(at - start_at, 0.0) / memory_s))
    return np.stack(columns, axis=1)


def faded_sum(at: Floats, weights: Floats, memory_s: float) -> Floats:
    """For each instant (ascending) the weights of those before it, each faded by exp(-age / memory)."""
    sums, held, last_at = np.zeros(at.size), 0.0, float(at[0]) if at.size else 0.0
    for index, (instant, weight) in enumerate(zip(at.tolist(), weights.tolist(), strict=True)):
        held *= math.exp((last_at - instant) / memory_s)
        sums[index] = held
        held, last_at = held + weight, instant
    return sums


class _Pair(NamedTuple):
    """Two neighbouring windows of the champion: `first` marks the requests of the earlier one."""

    features: Floats
    logs: Floats
    first: NDArray[np.bool_]

    @property
    def counts(self) -> tuple[int, int]:
        return int(self.first.sum()), int((~self.first).sum())


def _windows(
    metric: Metric, in_order: Sequence[ServedRequest], start_at: float, end_at: float, window_s: float
) -> Iterator[_Pair]:
    """Pairs of windows as an experiment would cut them, each with the backlog at its own start."""
    for index in range(int((end_at - start_at) // (2 * window_s))):
        first_at = start_at + index * 2 * window_s
        near = [
            one
            for one in in_order
            if (one.arrived_at >= first_at - REACH_S or one.finished_at > first_at)
            and one.arrived_at < first_at + 2 * window_s
        ]
        logs = [log_of(one, metric) for one in near]
        inside = [row for row, one in enumerate(near) if one.arrived_at >= first_at and logs[row] is not None]
        if inside:
            arrived_at = np.array([near[row].arrived_at for row in inside])
            known = np.array([logs[row] for row in inside], dtype=float)
            yield _Pair(features_of(near, first_at)[inside], known, arrived_at < first_at + window_s)


def log_of(request: ServedRequest, metric: Metric) -> float | None:
    """ln of the metric; None for the TPOT of a single token."""
    if metric == "ttft_s":
        return math.log(max(request.first_token_at - request.arrived_at, MIN_LATENCY_S))
    if metric == "e2e_s":
        return request.log_e2e
    if request.output_tokens < 2:
        return None
    seconds = (request.finished_at - request.first_token_at) / (request.output_tokens - 1)
    return math.log(max(seconds, MIN_LATENCY_S))


def _fitted(metric: Metric, pairs: Sequence[_Pair]) -> CovariateModel | None:
    """Ridge regression on standardised features; None where there are too few requests."""
    if sum(pair.logs.size for pair in pairs) < MIN_FITTED:
        return None
    features = np.concatenate([pair.features for pair in pairs])
    logs = np.concatenate([pair.logs for pair in pairs])
    means, scales = features.mean(axis=0), np.maximum(features.std(axis=0), 1e-9)
    standard, centred = (features - means) / scales, logs - logs.mean()
    gram = standard.T @ standard + RIDGE * logs.size * np.eye(features.shape[1])
    coefficients = np.linalg.solve(gram, standard.T @ centred)
    return CovariateModel(
        metric,
        float(logs.mean()),
        *(tuple(values.tolist()) for values in (coefficients, means, scales)),
    )


def _change(pair: _Pair, values: Floats) -> float:
    return float(values[~pair.first].mean() - values[pair.first].mean())


def model_from(data: Mapping[str, Any]) -> CovariateModel:
    """As journalled by `CovariateFit.to_dict`."""
    found = data["model"]
    tuples = {name: tuple(found[name]) for name in ("coefficients", "means", "scales")}
    return CovariateModel(metric=found["metric"], intercept=found["intercept"], **tuples)


def window_of(start_at: float, end_at: float, slice_s: float) -> float:
    """Windows as long as a slice where the stretch holds enough of them for the test, else shorter ones."""
    return min(slice_s, (end_at - start_at) / (4 * (MIN_WINDOW_PAIRS + 1)))
