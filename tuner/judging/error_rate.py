"""The level of each test in a stream of experiments, so that the whole stream keeps its false discovery rate.

At 5 % each, sixty candidates give a 94 % chance of at least one false promotion. LORD++ pays each test out
of a wealth that decays while nothing is found and is refilled by discoveries (promotions):

    alpha_t = gamma_t W0 + (alpha - W0) gamma_(t - tau_1) + alpha * sum over j >= 2 of gamma_(t - tau_j)
    gamma_j = 0.0722 ln(max(j, 2)) / (j exp(sqrt(ln j))),   tau_j = index of the j-th promotion

What it controls. The levels paid so far never sum to more than alpha * max(1, promotions). Therefore, when
each test is valid given the past (ours are: every pair has a fresh coin), the expected number of false
promotions is at most alpha times the expected number of promotions, or of one (mFDR); and the expected
share of false ones among the promotions (FDR) is at most alpha when the null tests are also independent of
the others. It says nothing about a single promotion. Every experiment that was started counts as a test:
harm stops and voids too, as tests that did not reject. One stream per (model, hardware, context).

The default spends all of alpha = 5 % as initial wealth (W0 = alpha): first levels 0.0025, 0.0005, 0.0005, and
the first promotion refills nothing (alpha - W0 = 0), later ones alpha each. alpha = 10 % with W0 = 5 % has the
same first levels and refills from the first promotion on, but promises 10 %.

Source: Ramdas, Yang, Wainwright and Jordan, "Online control of the false discovery rate with decaying
memory" (NeurIPS 2017), LORD++; the gamma sequence is that of Javanmard and Montanari (Annals of Statistics
2018), whose constant makes it sum to at most one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


def gamma(j: int) -> float:
    """The share of a wealth that is spent on the j-th test after it was earned; j counts from 1."""
    return 0.0722 * math.log(max(j, 2)) / (j * math.exp(math.sqrt(math.log(j))))


@dataclass(frozen=True)
class Lord:
    """LORD++ levels. `alpha` is the false discovery rate of the stream, `w0` the wealth it starts with."""

    alpha: float = 0.05
    w0: float = 0.05

    def __post_init__(self) -> None:
        if not 0.0 < self.w0 <= self.alpha < 1.0:
            raise ValueError(
                f"LORD++ needs 0 < w0 <= alpha < 1, but got w0 {self.w0} and alpha {self.alpha}."
            )

    def level(self, test_index: int, rejections: Sequence[int] = ()) -> float:
        """The level of test `test_index` (1, 2, ...) given the indices of the earlier tests that promoted.

        Raises:
            ValueError: an index below 1, or a rejection that is not earlier than the test.
        """
        if test_index < 1 or any(not 1 <= index < test_index for index in rejections):
            raise ValueError(
                f"Test {test_index} needs earlier rejections counted from 1, but got {list(rejections)}."
            )
        level = gamma(test_index) * self.w0
        for rank, index in enumerate(sorted(set(rejections))):
            level += (self.alpha - self.w0 if rank == 0 else self.alpha) * gamma(test_index - index)
        return level
