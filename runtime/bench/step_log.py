"""What the engine's own step log says of traffic: how well the step model knows it, and where the time between two
tokens went.

A token of a request that decodes waits for one step. On the device that step multiplies and attends for those who
decode, and computes pieces of prompts beside them; the host is late or not; and sometimes a request has no place in a
step and waits for the next one.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from runtime.bench.ceilings import Ceilings
from runtime.errors import TooFewSteps
from runtime.step_model import StepModelFit, computed_by, fit_step_model
from runtime.step_weights import Weights

StepLog = Sequence[Mapping[str, Any]]

NUM_LONGEST = 4


class ItlParts(NamedTuple):
    """Milliseconds between two tokens of one request, on average over tokens; `decode` to `queue` add up to `itl_ms`.

    `decode_ms`: on the device, for a step of as many who decode and no prompt, in the median. `weights_floor_ms` and
    `kv_floor_ms` of it: what must be read, at the measured copy rate. `prompts_ms`: what steps with pieces of prompts
    take longer. `host_ms`: the device has ended and the next step is not there. `queue_ms`: no place in a step.
    """

    itl_ms: float
    decode_ms: float
    weights_floor_ms: float
    kv_floor_ms: float
    prompts_ms: float
    host_ms: float
    queue_ms: float


def itl_parts(
    steps: StepLog, gaps_s: Sequence[float], weights: Weights, kv_bytes: int, ceilings: Ceilings
) -> ItlParts | None:
    """`gaps_s`: between two tokens of one request, of all requests whose steps these are. `kv_bytes`: of one cached
    token. None where no step only decoded."""
    decoding = [step for step in steps if step["num_decode"]]
    alone = [step for step in decoding if not step["num_prefill_rows"]]
    if not alone or not len(gaps_s):
        return None
    rows = np.array([step["num_decode"] for step in decoding], dtype=float)
    device_s = np.array([device_s_of(step) for step in decoding])
    step_s = np.array([step["step_s"] for step in decoding])
    has_prompts = np.array([step["num_prefill_rows"] > 0 for step in decoding])
    known = _median_by_rows(alone)
    decode_s = np.where(has_prompts, np.minimum(device_s, np.interp(rows, *known)), device_s)
    alone_rows = np.array([step["num_decode"] for step in alone], dtype=float)
    read = [weights.read_bytes(step["num_decode"]) for step in alone]
    cached = [kv_bytes * step["context_tokens"] for step in alone]
    parts = [
        np.average(seconds, weights=rows) for seconds in (decode_s, device_s - decode_s, step_s - device_s)
    ]
    floors = [np.average(one, weights=alone_rows) / ceilings.copy_bytes_per_s for one in (read, cached)]
    itl_s = float(np.mean(gaps_s))
    decode, prompts, host = (1e3 * float(part) for part in parts)
    return ItlParts(
        1e3 * itl_s, decode, 1e3 * float(floors[0]), 1e3 * float(floors[1]), prompts, host,
        1e3 * itl_s - decode - prompts - host,
    )  # fmt: skip


def device_s_of(step: Mapping[str, Any]) -> float:
    """On a CPU, which keeps no time of its own, that of the model."""
    device_s = step.get("device_s")
    return float(step["forward_s"] if device_s is None else device_s)


def _median_by_rows(alone: StepLog) -> tuple[list[float], list[float]]:
    """Rows that decode, ascending, and the seconds that the device takes for so many."""
    by_rows: dict[int, list[float]] = {}
    for step in alone:
        by_rows.setdefault(step["num_decode"], []).append(device_s_of(step))
    ordered = sorted(by_rows)
    return [float(rows) for rows in ordered], [float(np.median(by_rows[rows])) for rows in ordered]


def fitted_on(steps: StepLog, identity: Mapping[str, Any]) -> StepModelFit | None:
    """None where there are too few steps to fit a model on."""
    try:
        return fit_step_model(steps, identity)
    except TooFewSteps:
        return None


def print_itl(row: str, parts: ItlParts) -> None:
    columns = ("ITL", "decode", "(weights", "KV floor)", "prompts", "host", "queue")
    print(f"{'where ITL goes':<16}" + "".join(f"{name:>11}" for name in columns) + "  ms a token, on average")
    print(f"{row:<16}" + "".join(f"{value:>11.2f}" for value in parts))


def print_step_model(row: str, steps: StepLog, fit: StepModelFit) -> None:
    """A line for each kind of step that was held out."""
    print(
        f"{'step model':<16}{'held out':>10}{'error':>9}{'bias':>9}{'step ms':>10}{'device ms':>11}"
        f"   fitted on the first four fifths of {fit.num_steps} steps of {row}"
    )
    for kind, error in fit.errors.items():
        of_kind = [step for step in steps if computed_by(step) == kind]
        step_ms = 1e3 * np.median([step["step_s"] for step in of_kind])
        device_ms = 1e3 * np.median([device_s_of(step) for step in of_kind])
        print(
            f"{kind:<16}{error.num_steps:>10}{error.relative_error:>9.1%}{error.bias:>+9.1%}{step_ms:>10.2f}"
            f"{device_ms:>11.2f}"
        )
    held_out = sum(error.num_steps for error in fit.errors.values())
    print(f"{'all':<16}{held_out:>10}{fit.relative_error:>9.1%}{fit.bias:>+9.1%}")


def longest_of(steps: StepLog) -> StepLog:
    return sorted(steps, key=lambda step: -float(step["step_s"]))[:NUM_LONGEST]


def print_longest(row: str, longest: StepLog) -> None:
    """Each behind the `knob` that was changed before it, where there is one."""
    print(
        f"{'longest steps':<22}{'step ms':>10}{'device ms':>11}{'rows':>7}{'prompts':>9}{'tokens':>8}   what computed "
        f"them, of {row}"
    )
    for step in longest:
        print(
            f"{step.get('knob', ''):<22}{1e3 * step['step_s']:>10.1f}{1e3 * device_s_of(step):>11.1f}"
            f"{step['num_decode']:>7}{step['num_prefill_rows']:>9}{step['num_prefill_tokens']:>8}   {computed_by(step)}"
        )
