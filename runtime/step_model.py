"""How long one step takes: the engine's own arithmetic, with coefficients fitted on its own step log.

    t = max(a * FLOP, b * weight_bytes) + c * KV_bytes + d + e * sequences        seconds

Products compute (prompts) or wait for the weights (decoding); attention is computed by itself and reads every
sequence's cache; beside that a constant and a cost per sequence for scheduling, sampling and sending.
The model ranks and predicts; it never decides.

A GPU keeps the time of each step, and that is what is fitted. The host's clock would charge the launch of a step with
pieces of prompts to the step before it, which lands only afterwards.

The factors that turn tokens into FLOP and bytes come from the model's shape. Errors in them are absorbed by
a, b and c: only the predictions mean anything. For one model `b * weight_bytes` and `d` are both constants;
they can be told apart only where steps of both regimes were seen, and need not be.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from runtime.errors import TooFewSteps

Floats = NDArray[np.float64]
StepRecord = Mapping[str, Any]
Regime = Literal["compute", "memory", "both"]

MIN_STEPS = 50  # five coefficients; below ten steps each the held-out error means nothing
MAX_FITTED_STEPS = 4000  # evenly spaced over the log; more adds time and no precision
HELD_OUT_SHARE = 0.2  # the last ones: the model will predict the future, not a random fifth
SOFT_SCALE = 0.1  # relative residuals beyond this count linearly, not squared: warm-up, stalls
NUM_STRETCHES = 10
FLOP_QUANTILES = (0.0, 0.5, 0.8, 0.95, 1.0)  # where the two regimes might part: starting points
NUM_ROUNDS = 12
# What a FLOP of attention counts where steps are cut, of one of a matrix product. On an H200 it takes 1.35 times as
# long (some 530 against 700 TFLOP/s), and counted so all steps of a long prompt take as long. Counted for less, its
# last steps take longer, but are fewer: 32k tokens beside 64 that decode took 1,561 ms with 1.35 and 1,505 with 1, and
# what lies between two tokens of the others (p99) 56 and 48.
ATTENTION_WEIGHT = 1.0


@dataclass(frozen=True)
class StepModel:
    """Coefficients a (s/FLOP), b and c (s/byte), d (s), e (s/sequence), and the factors of one model's shape."""

    a: float
    b: float
    c: float
    d: float
    e: float
    weight_bytes: float
    flop_per_token: float
    attention_flop_per_pair: float
    kv_bytes_per_token: float

    def step_s(self, num_tokens: int, context_tokens: int, attention_pairs: int, num_seqs: int) -> float:
        """Seconds of a step that computes `num_tokens` for `num_seqs` rows.

        `context_tokens` is the sum over rows of cached tokens attended to, `attention_pairs` that of new tokens
        times them.
        """
        compute_s = self.a * (
            num_tokens * self.flop_per_token + attention_pairs * self.attention_flop_per_pair
        )
        cache_s = self.c * context_tokens * self.kv_bytes_per_token
        return max(compute_s, self.b * self.weight_bytes) + cache_s + self.d + self.e * num_seqs

    @property
    def attention_cost(self) -> float:
        """Of one query-key pair, as a share of what one token's weights take. Of the shape only: the same before and
        after a fit, so that a replay schedules what the engine does."""
        if not self.flop_per_token:
            return 0.0
        return ATTENTION_WEIGHT * self.attention_flop_per_pair / self.flop_per_token

    def to_dict(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, float]) -> "StepModel":
        return cls(**data)

    @classmethod
    def of_shape(cls, identity: Mapping[str, Any]) -> "StepModel":
        """The factors of the model described by the engine's identity; every coefficient is 0 (to be fitted).

        A token multiplies each parameter once (2 FLOP), where the engine tells it only those that do multiply it: no
        embeddings, and of routed experts the chosen ones. A query-key pair costs 4 FLOP per hidden unit and layer.
        Source: Kaplan et al. 2020 (arXiv 2001.08361), table 1, forward pass.
        """
        model = identity["model"]
        layers, hidden = int(model["num_layers"]), int(model["hidden_size"])
        bytes_per_weight = model["weight_bytes"] / max(1, model["num_parameters"])
        return cls(
            *(0.0,) * 5,
            weight_bytes=float(model["weight_bytes"]),
            flop_per_token=2.0 * (identity.get("num_active_parameters") or model["num_parameters"]),
            attention_flop_per_pair=4.0 * layers * hidden,
            kv_bytes_per_token=float(
                model.get("kv_bytes_per_token") or 2 * layers * hidden * bytes_per_weight
            ),
        )


@dataclass(frozen=True)
class StepError:
    """How far held-out steps lie from their predictions, as ratios. `relative_error`: the median distance of a step.
    `bias`: that of all of them together, which is what requests feel: +0.05 predicts five percent too much."""

    num_steps: int
    relative_error: float
    bias: float

    @classmethod
    def of(cls, predicted: Floats, actual: Floats) -> "StepError":
        distance = float(np.median(np.abs(predicted / actual - 1.0)))
        return cls(actual.size, distance, float(predicted.sum() / actual.sum() - 1.0))


@dataclass(frozen=True)
class StepModelFit:
    """The fitted model and how far it may be trusted: `relative_error` and `bias` of the held-out steps, and the same
    by what computed them, from the most frequent on (`computed_by`). Errors are by the clock that was fitted; `bias` is
    against the time that all of them took together, between steps too. `regime` tells what the log contained.
    """

    model: StepModel
    relative_error: float
    bias: float
    num_steps: int
    regime: Regime
    errors: Mapping[str, StepError]


def fit_step_model(steps: Sequence[StepRecord], identity: Mapping[str, Any]) -> StepModelFit:
    """Fits on the first four fifths of `steps` (in order of time, one configuration), tests on the last fifth.

    Raises:
        TooFewSteps: fewer than 50 usable steps.
    """
    shape = StepModel.of_shape(identity)
    columns, seconds, taken, usable = _columns(steps, shape)
    if len(seconds) < MIN_STEPS:
        raise TooFewSteps(
            f"A step model needs at least {MIN_STEPS} steps, but got {len(seconds)}. Serve some requests first."
        )
    num_fitted = int(len(seconds) * (1.0 - HELD_OUT_SHARE))
    kept = np.unique(np.linspace(0, num_fitted - 1, min(num_fitted, MAX_FITTED_STEPS)).astype(int))
    shaped, level = _fit(columns[kept], seconds[kept], taken[kept])
    fitted = shaped * level
    by_clock = _predict(columns[num_fitted:], shaped)  # as that of `seconds` tells it
    actual = seconds[num_fitted:]
    held_out = np.array([computed_by(steps[at]) for at in usable[num_fitted:]])
    kinds = sorted(set(held_out.tolist()), key=lambda kind: -int((held_out == kind).sum()))
    computing = _computes(columns[kept], fitted)
    regime: Regime = (
        "both" if 0.01 < computing.mean() < 0.99 else "compute" if computing.mean() >= 0.99 else "memory"
    )
    a, b, c, d, e = (float(value) for value in fitted)
    return StepModelFit(
        model=replace(shape, a=a, b=b, c=c, d=d, e=e),
        relative_error=StepError.of(by_clock, actual).relative_error,
        bias=float(level * by_clock.sum() / taken[num_fitted:].sum() - 1.0),
        num_steps=len(seconds),
        regime=regime,
        errors={kind: StepError.of(by_clock[held_out == kind], actual[held_out == kind]) for kind in kinds},
    )


def computed_by(step: StepRecord) -> str:
    """What computed it: a graph of rows that decode, by their number, or else `decode`, `mixed` (with pieces of
    prompts) or `prompt` (with nothing else), in a graph or kernel by kernel."""
    graph_rows = step.get("graph_rows")
    if not step["num_prefill_rows"]:
        return "decode" if graph_rows is None else f"graph of {graph_rows}"
    kind = "mixed" if step["num_decode"] else "prompt"
    return kind if graph_rows is None else f"{kind}, graph"


def _columns(
    steps: Sequence[StepRecord], shape: StepModel
) -> tuple[Floats, Floats, Floats, NDArray[np.int_]]:
    """[steps, 5] what a, b, c, d, e are multiplied with, [steps] seconds by the clock of what computed them, [steps]
    seconds since the step before, and [steps] their places. Steps without work are left out."""
    has_clock = any(step.get("device_s") is not None for step in steps)
    rows = np.array(
        [
            (
                step["num_decode"] + step["num_prefill_tokens"],
                step["context_tokens"],
                step["attention_pairs"],
                step["num_decode"] + step["num_prefill_rows"],
                step["step_s"],
                step.get("device_s")
                if has_clock
                else step["step_s"],  # None beside others: of an older runtime
            )
            for step in steps
        ],
        dtype=float,
    ).reshape(-1, 6)
    usable = np.flatnonzero(np.isfinite(rows).all(axis=1) & (rows[:, 0] > 0) & (rows[:, 4:] > 0).all(axis=1))
    rows = rows[usable]
    tokens, context, pairs, sequences, taken, seconds = rows.T
    flop = tokens * shape.flop_per_token + pairs * shape.attention_flop_per_pair
    constant = np.ones_like(flop)
    columns = (flop, constant * shape.weight_bytes, context * shape.kv_bytes_per_token, constant, sequences)
    return np.stack(columns, axis=1), seconds, taken, usable


def _computes(columns: Floats, coefficients: Floats) -> NDArray[np.bool_]:
    """[steps] whether the step's products are bound by computing rather than by reading weights."""
    parts = columns * coefficients
    return np.asarray(parts[:, 0] > parts[:, 1])


def _predict(columns: Floats, coefficients: Floats) -> Floats:
    parts = columns * coefficients
    return np.asarray(np.maximum(parts[:, 0], parts[:, 1]) + parts[:, 2:].sum(axis=1))


def _fit(columns: Floats, seconds: Floats, taken: Floats) -> tuple[Floats, float]:
    """The best of several starts, polished; and by how much that is to be raised to the level of the time taken."""
    from scipy.optimize import least_squares

    scale = np.median(seconds) / np.maximum(
        columns.max(axis=0), 1e-300
    )  # coefficients near 1, whatever the units
    scaled = columns * scale

    def residuals(coefficients: Floats) -> Floats:
        return (_predict(scaled, coefficients) - seconds) / seconds / SOFT_SCALE

    def loss(coefficients: Floats) -> float:
        return float(np.sum(np.sqrt(1.0 + residuals(coefficients) ** 2) - 1.0))

    starts = [_alternate(scaled, seconds, np.quantile(scaled[:, 0], share)) for share in FLOP_QUANTILES]
    start = np.maximum(min(starts, key=loss), 1e-9)
    polished = least_squares(residuals, start, bounds=(0.0, np.inf), loss="soft_l1", max_nfev=100).x
    best = min(polished, start, key=loss)
    return np.asarray(best * scale), _level(taken, _predict(scaled, best))


def _level(taken: Floats, predicted: Floats) -> float:
    """Time taken over time predicted, in the median stretch of the log.

    The robust fit aims at the median step, but requests wait for the stalls too. Stalls spread over the whole
    log count in every stretch; a warm-up fills one or two stretches and does not move the median.
    """
    stretches = np.array_split(np.arange(taken.size), NUM_STRETCHES)
    return float(np.median([taken[part].sum() / predicted[part].sum() for part in stretches]))


def _alternate(columns: Floats, seconds: Floats, flop_split: float) -> Floats:
    """Given the regime of each step the model is linear: solve, see which regime that implies, repeat."""
    computing = columns[:, 0] > flop_split
    weight = np.ones_like(seconds)
    coefficients = np.zeros(columns.shape[1])
    for _ in range(NUM_ROUNDS):
        coefficients = _solve(columns, seconds, computing, weight)
        residual = np.abs(_predict(columns, coefficients) / seconds - 1.0) / SOFT_SCALE
        weight = 1.0 / np.sqrt(1.0 + residual**2)  # the soft_l1 loss as weights
        implied = _computes(columns, coefficients)
        if (implied == computing).all() and (residual < 1.0).all():
            break
        computing = implied
    return coefficients


def _solve(columns: Floats, seconds: Floats, computing: NDArray[np.bool_], weight: Floats) -> Floats:
    """Weighted non-negative least squares of relative errors."""
    from scipy.optimize import nnls

    active = columns.copy()
    active[computing, 1] = 0.0
    active[~computing, 0] = 0.0
    rows = active * (np.sqrt(weight) / seconds)[:, None]
    gram = rows.T @ rows + 1e-9 * np.eye(rows.shape[1])  # the constants b W and d may coincide
    root = np.linalg.cholesky(gram)
    return np.asarray(nnls(root.T, np.linalg.solve(root, rows.T @ np.sqrt(weight)))[0])
