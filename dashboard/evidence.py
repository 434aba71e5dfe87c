"""What an experiment's pairs say so far, computed again from the store: for experiments that have no verdict yet.

The test is the judge's; `tests/dashboard/test_evidence.py` holds it equal to `tuner/judging/sign_flip.py`, which this
package may not import. Differences are in log units, negative is better.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from store.interval import anytime_interval

INTERVAL_ALPHA = 0.05
UNIT, CLIP = 0.001, 5.0  # as in tuner/judging/sign_flip.py: log units of the exact test


@dataclass(frozen=True)
class Estimate:
    """The effect after so many pairs, as ratios: -0.1 is 10 % lower. No interval while it is unbounded."""

    num_pairs: int
    effect_ratio: float
    low_ratio: float | None
    high_ratio: float | None


@dataclass(frozen=True)
class Look:
    """A look of the test: the sum of the differences, and the sum at or below which a gain is proven."""

    num_pairs: int
    running_sum: float
    boundary: float | None


def estimates(differences: Sequence[float], alpha: float = INTERVAL_ALPHA) -> list[Estimate]:
    """The effect as it was known after each pair, with its anytime-valid interval of level 1 - alpha."""
    found = []
    for n in range(1, len(differences) + 1):
        interval = anytime_interval(differences[:n], alpha)
        low, high = (
            (None, None) if interval is None else (math.expm1(interval.low), math.expm1(interval.high))
        )
        found.append(Estimate(n, math.expm1(fmean(differences[:n])), low, high))
    return found


def looks(differences: Sequence[float], level: float, max_pairs: int, look_every: int) -> list[Look]:
    """The looks of the exact sign-flip test so far, up to the one that crossed.

    The law of the running sum under fair coins is convolved pair by pair; at a look the lowest sums whose chance
    fits into what may be spent by then are cut off, and the largest of them is the boundary.
    Source: Lan and DeMets 1983 for the spending, ln(1 + (e - 1) n / max_pairs).
    """
    alive, total, running, spent = np.ones(1), 0, 0, 0.0
    found: list[Look] = []
    for n, difference in enumerate(differences[:max_pairs], start=1):
        units = round(max(-CLIP, min(CLIP, difference)) / UNIT)
        running, total = running + units, total + abs(units)
        grown = np.zeros(alive.size + abs(units))
        grown[: alive.size] = alive
        grown[abs(units) :] += alive
        alive = 0.5 * grown
        if n % look_every and n != max_pairs:
            continue
        allowed = level * math.log(1.0 + (math.e - 1.0) * min(1.0, n / max_pairs))
        reached = np.cumsum(alive)
        within = int(np.searchsorted(reached, allowed - spent, side="right"))
        atoms = np.flatnonzero(alive[:within])
        boundary_units = None
        if atoms.size:
            boundary_units = 2 * int(atoms[-1]) - total
            spent += float(reached[within - 1])
            alive[:within] = 0.0
        found.append(Look(n, running * UNIT, None if boundary_units is None else boundary_units * UNIT))
        if boundary_units is not None and running <= boundary_units:
            break
    return found


def reflipped(differences: Sequence[float], num_paths: int, seed: int) -> NDArray[np.float64]:
    """Running sums as they could have been had only the coins fallen otherwise. [num_paths, num_pairs] float64."""
    sizes = np.abs(np.asarray(differences, dtype=float))
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(num_paths, sizes.size))
    return np.cumsum(signs * sizes, axis=1)
