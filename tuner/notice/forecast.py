"""Layer C: what a metric does in the course of a day, learnt by Prophet. Runs as a child process of its own.

    python -m tuner.notice.forecast     frames on stdin ─▶ winsorise, thin, fit, predict ─▶ frames on stdout

A frame is four bytes of length (big-endian) and a msgpack map; arrays travel as little-endian float64. Prophet
leaves files behind with every fit and grows: whoever starts this process ends it after some fits, and removes
its temporary folder. Bad series are answered with `error`, never with a trace.
"""

import importlib
import logging
import os
import resource
import struct
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgpack
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MAX_POINTS = 2016
DAILY_ORDER = 8
WEEKLY_ORDER = 3
WEEKLY_AFTER_S = 21 * 86400.0
CHANGEPOINT_PRIOR = 0.01
CLIP_PERCENT = 1.0
SEED = 1
_LENGTH = struct.Struct(">I")


class Fitted(NamedTuple):
    """In judged units. `scale` is the robust sd of what the forecast misses, not Prophet's own interval."""

    expected: Array
    scale: float
    num_points: int


def fit(at: Array, values: Array, ahead: Array, floor: float) -> Fitted:
    """Learns from values at instants (UTC epoch s, rising) and foretells the instants `ahead`.

    Source: Taylor and Letham 2018 for the model. Its intervals covered 66 to 96 % where 80 % were promised
    (own measurement on 24 labelled series), so that the spread of the residuals stands in their place.

    Raises:
        ValueError: fewer than two finite values.
    """
    is_known = np.isfinite(values) & np.isfinite(at)
    at, values = at[is_known], values[is_known]
    if len(values) < 2:
        raise ValueError(f"A forecast needs at least 2 finite values, but got {len(values)}.")
    low, high = np.percentile(values, [CLIP_PERCENT, 100.0 - CLIP_PERCENT])
    clipped = np.clip(values, low, high)
    thin_at, thin = thinned(at, clipped)
    if high - low <= 1e-9 * max(1.0, abs(high)):  # Prophet's band of a constant is 1e-8 wide
        expected = np.full(len(ahead), float(np.median(clipped)))
        return Fitted(
            expected, max(floor, 1e-3 * abs(float(expected[0])) if len(expected) else floor), len(thin)
        )
    foretold = predict(thin_at, thin, np.concatenate([thin_at, ahead]))
    residuals = values - np.interp(at, thin_at, foretold[: len(thin_at)])
    return Fitted(foretold[len(thin_at) :], robust_scale(residuals, clipped, floor), len(thin))


def robust_scale(residuals: Array, values: Array, floor: float) -> float:
    """From the middle 90 %, with floors: a quarter of the whole sd, and a thousandth of the level."""
    low, high = np.percentile(residuals, [5.0, 95.0])
    inside = np.clip(residuals, low, high)
    level = abs(float(np.median(values)))
    return max(float(high - low) / 3.29, 0.25 * float(inside.std()), 1e-3 * level, floor)


def thinned(at: Array, values: Array) -> tuple[Array, Array]:
    """Means over equal spans of time, so that at most MAX_POINTS remain; gaps stay gaps."""
    if len(at) <= MAX_POINTS:
        return at, values
    width = (at[-1] - at[0]) / (MAX_POINTS - 1)
    index = ((at - at[0]) / width).astype(np.int64)
    _, starts = np.unique(index, return_index=True)
    counts = np.diff(np.append(starts, len(at)))
    return np.add.reduceat(at, starts) / counts, np.add.reduceat(values, starts) / counts


def predict(at: Array, values: Array, wanted: Array) -> Array:
    """Fits Prophet, flat with the day as its season, and returns its values at `wanted`."""
    import pandas as pd
    from prophet import Prophet

    model = Prophet(
        growth="flat",  # a trend carried on is a ramp that nobody announced
        daily_seasonality=False,
        weekly_seasonality=False,
        yearly_seasonality=False,
        changepoint_prior_scale=CHANGEPOINT_PRIOR,
        uncertainty_samples=0,
    )
    model.add_seasonality("daily", period=1, fourier_order=DAILY_ORDER)
    if at[-1] - at[0] >= WEEKLY_AFTER_S:
        model.add_seasonality("weekly", period=7, fourier_order=WEEKLY_ORDER)
    # Naive UTC: Prophet refuses a time zone.
    model.fit(pd.DataFrame({"ds": pd.to_datetime(at, unit="s"), "y": values}), seed=SEED)
    answer = model.predict(pd.DataFrame({"ds": pd.to_datetime(wanted, unit="s")}))
    return np.asarray(answer["yhat"], dtype=np.float64)


# --- the process ----------------------------------------------------------------------------------


def answer(request: Mapping[str, Any], fit: Callable[..., Fitted] = fit) -> dict[str, Any]:
    """One request: `at`, `values`, `ahead` as bytes of float64, `floor`. An answer, or `error` with its reason."""
    began = time.monotonic()
    try:
        arrays = [np.frombuffer(request[name], dtype="<f8") for name in ("at", "values", "ahead")]
        fitted = fit(*arrays, float(request["floor"]))
        if not np.isfinite(fitted.expected).all():
            raise ValueError("The forecast is not finite.")
    except Exception as error:  # Prophet, pandas and Stan raise what they like
        return {"id": request["id"], "error": f"{type(error).__name__}: {str(error).strip()[:200]}"}
    return {
        "id": request["id"],
        "expected": fitted.expected.astype("<f8").tobytes(),
        "scale": fitted.scale,
        "num_points": fitted.num_points,
        "fit_s": time.monotonic() - began,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def frame(message: Mapping[str, Any]) -> bytes:
    body = msgpack.packb(message)
    return _LENGTH.pack(len(body)) + bytes(body)


def read_frame(stream: BinaryIO) -> dict[str, Any] | None:
    """The next message; None at the end of the stream."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    size = _LENGTH.unpack(head)[0]
    body = stream.read(size)
    return dict(msgpack.unpackb(body)) if len(body) == size else None


def silence_prophet() -> None:
    """It reports every chain, and a plotting library that is not needed."""
    for name in ("cmdstanpy", "prophet.plot"):
        logging.getLogger(name).disabled = True
    logging.getLogger("prophet").setLevel(logging.WARNING)


def remove_leftovers(folder: Path) -> None:
    """The files that a fit leaves below its temporary folder; cmdstanpy's own folder in it has to stay."""
    for path in sorted(folder.glob("*/**/*"), reverse=True):
        try:
            path.rmdir() if path.is_dir() else path.unlink()
        except OSError:
            continue  # what is in use goes with the process


def main() -> None:
    os.nice(19)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever Stan prints must not get between the frames
    silence_prophet()
    importlib.import_module("prophet")
    temporary = os.environ.get("TMPDIR")
    while (request := read_frame(sys.stdin.buffer)) is not None:
        found = frame(answer(request))
        if temporary:  # before anyone can find them
            remove_leftovers(Path(temporary))
        answers.write(found)
        answers.flush()


if __name__ == "__main__":
    main()
