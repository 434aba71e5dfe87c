"""Intervals that are shown beside a figure: of a mean difference, and of a share. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import NamedTuple

DEFAULT_G = 0.44  # makes the interval narrowest near 20 pairs
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An interval for the mean difference, log units."""

    low: float
    high: float


def anytime_interval(differences: Sequence[float], alpha: float, g: float = DEFAULT_G) -> Interval | None:
    """The anytime-valid t interval of level 1 - alpha; None while it is still unbounded (few pairs).

    With nu = n - 1, a = 1 + n g and K = (a / alpha^2)^(1 / (nu + 1)), the half-width is
    s / sqrt(n) * sqrt(nu a (K - 1) / (a - K)), finite once K < a.
    Source: Lindon, Ham, Tingley and Bojinov (arXiv 2210.08589), the t mixture inverted in closed form.
    """
    n = len(differences)
    if n < 2:
        return None
    nu, a = n - 1, 1.0 + n * g
    k = (a / alpha**2) ** (1.0 / (nu + 1))
    if k >= a:
        return None
    half_width = stdev(differences) / math.sqrt(n) * math.sqrt(nu * a * (k - 1.0) / (a - k))
    mean = fmean(differences)
    return Interval(mean - half_width, mean + half_width)


class Rate(NamedTuple):
    """`num` of `total`, with its Clopper-Pearson interval: exact, so it may be read as a claim."""

    num: int
    total: int
    low: float
    high: float

    @classmethod
    def of(cls, num: int, total: int) -> "Rate":
        """Of nothing at all, everything is possible: 0 to 1.

        Source: Clopper and Pearson 1934 (Biometrika 26).
        """
        if total == 0:
            return cls(0, 0, 0.0, 1.0)
        from scipy.stats import binomtest

        interval = binomtest(num, total).proportion_ci(CONFIDENCE, "exact")
        return cls(num, total, float(interval.low), float(interval.high))

    @property
    def ratio(self) -> float:
        return self.num / self.total if self.total else 0.0
