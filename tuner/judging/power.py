"""How often, and how soon, our own sign-flip test finds an effect of a given size. Simulated, not approximated.

A pair's difference is drawn as normal with the sd 1 and a mean of minus `effect`; the test is the exact one
of `tuner.judging.sign_flip`, on a coarser grid and for many experiments at once, so that a curve takes a fraction
of a second instead of minutes. A test holds the two to the same crossings.

    power_curve(level, max_pairs, look_every) ──▶ PowerCurve ── power(effect) ─▶ chance to cross by the cap
                                                            ├── pairs_for(effect) ─▶ first look with 80 %
                                                            └── min_effect() ─▶ smallest effect with 80 %

Effects are in units of the pair sd: a gain of 10 % (0.105 log units) at a pair sd of 0.2 is 0.53.
The smallest gain that a promotion must show besides is not part of it.

Source: the test is that of `tuner.judging.sign_flip`; planning by simulated power, Jennison and Turnbull, "Group
Sequential Methods" (2000), chapter 19; beyond MAX_SIMULATED_PAIRS the scaling of a Brownian motion.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tuner.judging.sign_flip import allowed_spend, is_look

POWER = 0.8
NUM_RUNS = 200  # an error of 3 points in a power of 0.8: planning needs no more
UNITS_PER_SD = 8  # the grid of the simulated differences; its rounding adds 0.1 % to the variance
MAX_SIMULATED_PAIRS = 80
# Effects are simulated between these; in units of sd / sqrt(max_pairs) below, of the sd above.
LOWEST, HIGHEST, NUM_EFFECTS = 0.5, 4.0, 12
SEED = 20261123


@dataclass(frozen=True)
class PowerCurve:
    """`crossed[e, l]`: share of experiments with `effects[e]` that crossed by look `looks[l]`."""

    looks: tuple[int, ...]
    effects: tuple[float, ...]
    crossed: tuple[tuple[float, ...], ...]

    def power(self, effect: float) -> float:
        """Chance to prove an effect of this size (in pair sds) by the cap."""
        return self._by(effect, len(self.looks) - 1)

    def pairs_for(self, effect: float, power: float = POWER) -> int | None:
        """The first look by which the chance is at least `power`; None where not even the cap suffices."""
        for index, num_pairs in enumerate(self.looks):
            if self._by(effect, index) >= power:
                return num_pairs
        return None

    def min_effect(self, power: float = POWER) -> float | None:
        """The smallest effect, in pair sds, that is found with this chance by the cap. None: none is, at this level."""
        by_cap = np.maximum.accumulate([row[-1] for row in self.crossed])
        if by_cap[-1] < power:
            return None
        at = int(np.searchsorted(by_cap, power))
        if at == 0:
            return self.effects[0]
        low, high = float(by_cap[at - 1]), float(by_cap[at])
        share = (power - low) / (high - low)
        return self.effects[at - 1] + share * (self.effects[at] - self.effects[at - 1])

    def _by(self, effect: float, look: int) -> float:
        column = [row[look] for row in self.crossed]
        return float(np.interp(effect, self.effects, column))


@lru_cache(maxsize=32)
def power_curve(level: float, max_pairs: int, look_every: int) -> PowerCurve:
    """The same for the same three numbers, always: the simulation has a seed of its own.

    Raises:
        ValueError: a level outside (0, 1), or fewer than one pair.
    """
    if not 0.0 < level < 1.0 or max_pairs < 1 or look_every < 1:
        raise ValueError(
            f"A power curve needs a level in (0, 1) and at least one pair, but got {level}, {max_pairs}, {look_every}."
        )
    steps = min(max_pairs, MAX_SIMULATED_PAIRS)
    stretch = max_pairs / steps
    every = max(1, round(look_every / stretch))
    effects = [0.0, *np.geomspace(LOWEST / math.sqrt(max_pairs), HIGHEST, NUM_EFFECTS).tolist()]
    noise = np.random.default_rng(SEED).standard_normal((NUM_RUNS, steps))
    looks = [num for num in range(1, steps + 1) if is_look(num, steps, every)]
    shares = []
    for effect in effects:
        units = np.rint((noise - effect * math.sqrt(stretch)) * UNITS_PER_SD).astype(np.int64)
        crossed_at = crossings(units, level, every)
        shares.append([float(np.mean((crossed_at > 0) & (crossed_at <= num))) for num in looks])
    return PowerCurve(
        looks=tuple(math.ceil(num * stretch) for num in looks),
        effects=tuple(effects),
        crossed=tuple(tuple(row) for row in shares),
    )


def crossings(units: NDArray[np.int64], level: float, look_every: int) -> NDArray[np.int64]:
    """[experiments, pairs] whole differences -> [experiments] pairs at which each crossed, 0 where it never did.

    The law of the sum of the positive sizes is kept for every experiment that has not crossed. Only its lower
    half is: a boundary lies below the middle, and mass only ever moves up.
    """
    num_rows, max_pairs = units.shape
    sizes = np.abs(units)
    pad, width = int(sizes.max(initial=1)), int(sizes.sum(axis=1).max(initial=1)) // 2 + 2
    law = np.zeros((num_rows, pad + width))  # `pad` columns of nothing before the sum 0
    law[:, pad] = 1.0
    spent, positive = np.zeros(num_rows), np.zeros(num_rows, dtype=np.int64)
    rows, found = np.arange(num_rows), np.zeros(num_rows, dtype=np.int64)
    columns = np.arange(pad, pad + width)
    for step in range(max_pairs):
        size = sizes[rows, step]
        law[:, pad:] += np.take_along_axis(law, columns - size[:, None], axis=1)
        law[:, pad:] *= 0.5
        positive += np.where(units[rows, step] > 0, size, 0)
        if not is_look(step + 1, max_pairs, look_every):
            continue
        reached = np.cumsum(law[:, pad:], axis=1)
        allowed = allowed_spend(level, step + 1, max_pairs) - spent
        within = (reached <= allowed[:, None]).sum(axis=1)
        last = np.take_along_axis(reached, np.maximum(within - 1, 0)[:, None], axis=1)[:, 0]
        spent += np.where(within > 0, last, 0.0)
        law[:, pad:][np.arange(width) < within[:, None]] = 0.0
        crossed = positive < within
        found[rows[crossed]] = step + 1
        keep = ~crossed
        law, spent, positive, rows = law[keep], spent[keep], positive[keep], rows[keep]
        if not rows.size:
            break
    return found
