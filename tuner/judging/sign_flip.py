"""The exact sign-flip group-sequential test: does the challenger do better than our own coins can explain?

Inside every pair of slices a coin decided which arm went first. If the challenger changes nothing, a
pair's difference d would merely have had the other sign had the coin fallen the other way. So, given
the sizes |d|, every assignment of signs is equally likely, whatever the tails, the autocorrelation or
the drift of the latency: the null law of the running sum is known exactly, and the test's size with it.

    d_1 d_2 d_3 ...  ──▶  running sum  S_n = d_1 + ... + d_n        (negative: the challenger is better)
    look at n = 5, 10, ...:  reject "no gain" when S_n <= c_n, where c_n is the largest value with
                             P(some boundary crossed by look n) <= alpha * ln(1 + (e - 1) n / max_pairs)

Differences are rounded to whole thousandths of a log unit and clipped at 5 log units (a factor of 148);
the statistic is *defined* on the rounded values, so the law below is exact and not an approximation.
The masses are multiples of 2**-n, which a double holds exactly up to 52 pairs and to 1e-16 beyond.

What the size does not cover: a cost of switching that outlasts the burn-in. It makes a slice depend on
the coin of the pair before it, and is what the burn-in and the carry-over check are for.

Source: randomisation inference for switchbacks, Bojinov, Simchi-Levi and Zhao (arXiv 2009.00148);
alpha spending of Pocock type, Lan and DeMets 1983 (Biometrika 70).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

UNIT = 0.001  # log units; a tenth of a percent of latency, far below any effect that is worth a change
CLIP = 5.0  # log units; one frozen slice must not decide alone, nor make the integer grid huge


def in_units(difference: float) -> int:
    """The difference in whole thousandths of a log unit, clipped; odd, so that a flipped sign stays exact.

    Raises:
        ValueError: not a finite number.
    """
    if not math.isfinite(difference):
        raise ValueError(f"A pair's difference must be a finite number of log units, but got {difference!r}.")
    return round(max(-CLIP, min(CLIP, difference)) / UNIT)


def allowed_spend(alpha: float, num_pairs: int, max_pairs: int) -> float:
    """The share of null experiments that may have crossed by `num_pairs`. Source: Lan and DeMets 1983."""
    return alpha * math.log(1.0 + (math.e - 1.0) * min(1.0, num_pairs / max_pairs))


def is_look(num_pairs: int, max_pairs: int, look_every: int) -> bool:
    return num_pairs > 0 and (num_pairs % look_every == 0 or num_pairs == max_pairs)


def min_pairs_to_cross(alpha: float, max_pairs: int, look_every: int) -> int | None:
    """The first look at which any boundary exists: the rarest outcome, all signs negative, has chance 2**-n.

    None where not even the cap suffices: "this level needs more pairs than the experiment may have".
    """
    for num_pairs in range(1, max_pairs + 1):
        has_boundary = 0.5**num_pairs <= allowed_spend(alpha, num_pairs, max_pairs)
        if has_boundary and is_look(num_pairs, max_pairs, look_every):
            return num_pairs
    return None


@dataclass(frozen=True)
class Look:
    """One look at the running sum. Sums are in log units; `boundary` is None while nothing can cross."""

    num_pairs: int
    running_sum: float
    boundary: float | None
    allowed: float  # share of null experiments that may have crossed by now
    spent: float  # share that has, counting this look
    crossed: bool


class SignFlipTest:
    """One-sided test for gain, fed a pair at a time: `add` returns a Look when one is due.

    State: the law of the running sum over paths that crossed no boundary. With `positive` the sum of the
    sizes whose sign came up +, S = 2 * positive - total, so an array over 0..total holds it. A pair costs
    one shifted addition (tens of microseconds at ordinary sizes). After a crossing the test is over:
    `crossed_at` keeps the number of pairs and later pairs change nothing.
    """

    def __init__(self, alpha: float, max_pairs: int, look_every: int = 5, margin: float = 0.0) -> None:
        """With `margin` m > 0 the test is of non-inferiority: it rejects "worse by m log units or more"."""
        if not 0.0 < alpha < 1.0:
            raise ValueError(f"`alpha` must be in (0, 1), but got {alpha}.")
        if max_pairs < 1 or look_every < 1:
            raise ValueError(
                f"`max_pairs` and `look_every` must be at least 1, but got {max_pairs} and {look_every}."
            )
        self.alpha, self.max_pairs, self.look_every = alpha, max_pairs, look_every
        self.margin_units = in_units(margin)
        self.num_pairs = 0
        self.crossed_at: int | None = None
        self.looks: list[Look] = []
        self._alive: NDArray[np.float64] = np.ones(1)  # mass by `positive`
        self._total = 0  # sum of |d|, units
        self._sum = 0  # S, units
        self._spent = 0.0

    def add(self, difference: float) -> Look | None:
        """Raises ValueError beyond the cap: pairs past it have no alpha left to spend."""
        if self.num_pairs == self.max_pairs:
            raise ValueError(
                f"The experiment is capped at {self.max_pairs} pairs; pair {self.num_pairs + 1} has no level left."
            )
        units = in_units(difference) - self.margin_units
        self.num_pairs += 1
        self._sum += units
        self._total += abs(units)
        if self.crossed_at is not None:
            return None
        self._alive = flip_once(self._alive, abs(units))
        return self._look() if is_look(self.num_pairs, self.max_pairs, self.look_every) else None

    def _look(self) -> Look:
        allowed = allowed_spend(self.alpha, self.num_pairs, self.max_pairs)
        reached = np.cumsum(self._alive)
        # "right" leaves out a value whose whole atom does not fit: ties step down, the level is never overspent.
        within = int(np.searchsorted(reached, allowed - self._spent, side="right"))
        atoms = np.flatnonzero(self._alive[:within])
        boundary_units = None
        if atoms.size:
            boundary_units = 2 * int(atoms[-1]) - self._total
            self._spent += float(reached[within - 1])
            self._alive[:within] = 0.0
        crossed = boundary_units is not None and self._sum <= boundary_units
        if crossed:
            self.crossed_at = self.num_pairs
        boundary = None if boundary_units is None else boundary_units * UNIT
        look = Look(self.num_pairs, self._sum * UNIT, boundary, allowed, self._spent, crossed)
        self.looks.append(look)
        return look


def flip_once(mass: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """The law of a sum of coins after one more, worth 0 or `size` with equal chance."""
    grown = np.zeros(mass.size + size)
    grown[: mass.size] = mass
    grown[size:] += mass
    grown *= 0.5
    return grown


def sign_flip_p(differences: Sequence[float]) -> float | None:
    """Exact chance, over fresh coins, of a running sum as low as the one seen; one look, no stopping.

    A description of the data, not the decision: the boundary accounts for the looks. None without pairs.
    """
    units = [in_units(difference) for difference in differences]
    if not units:
        return None
    mass = np.ones(1)
    for value in units:
        mass = flip_once(mass, abs(value))
    positive = sum(value for value in units if value > 0)
    return min(1.0, float(np.cumsum(mass[: positive + 1])[-1]))


def reflipped_histories(differences: Sequence[float], num_paths: int, seed: int) -> NDArray[np.float64]:
    """What the experiment could have looked like had only the coins differed: running means, log units.

    Shape [num_paths, num_pairs] float64; the observed history is `np.cumsum(d) / (1..n)` beside it.
    """
    sizes = np.abs(np.asarray(differences, dtype=float))
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(num_paths, sizes.size))
    return np.cumsum(signs * sizes, axis=1) / np.arange(1, sizes.size + 1)
