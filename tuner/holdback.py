"""After a promotion: is the old champion, asked again now and then, still the slower one? Pure.

Holdback pairs serve the old champion for a small share of the time. The share is what the probation
budget allows given how much worse the old champion is known to be, and never leaves 0.5 to 10 %: a gain
that halved latency needs few reminders, a gain of 3 % needs many.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tuner.interval import log_harm_e_value

MIN_SHARE, MAX_SHARE = 0.005, 0.10
HARM_ALPHA = 0.05


def holdback_share(budget: float, effect_ratio: float) -> float:
    """Share of the time for the old champion.

    Args:
        budget: mean slowdown that probation may cost, as a share (0.05 is 5 %).
        effect_ratio: the promotion's effect; -0.5 halved latency, so that the old champion doubles it.
    """
    slowdown = 1.0 / max(1e-3, 1.0 + effect_ratio) - 1.0
    if slowdown <= 0.0:
        return MAX_SHARE
    return min(MAX_SHARE, max(MIN_SHARE, budget / slowdown))


def seconds_between_pairs(share: float, slice_s: float) -> float:
    """A pair holds one slice of the old champion, so pairs start this far apart."""
    return slice_s / share


@dataclass(frozen=True)
class HoldbackJudgement:
    is_harmful: bool
    reason: str
    gain_ratio: float | None  # mean gain of the promoted configuration over the old one; positive is better


def judge_holdback(differences: Sequence[float], pair_sd: float) -> HoldbackJudgement:
    """Differences are old champion minus promoted one, log units: positive where the promotion still wins.

    Harmful when the evidence that the promoted one is slower reaches an e-value of 1/0.05: valid at any
    number of pairs, because each pair's order was a coin.
    """
    if not differences:
        return HoldbackJudgement(False, "No holdback pair has been scored yet.", None)
    mean = sum(differences) / len(differences)
    gain = 1.0 - math.exp(-mean)
    if log_harm_e_value([-difference for difference in differences], pair_sd) >= -math.log(HARM_ALPHA):
        return HoldbackJudgement(
            True,
            f"Over {len(differences)} holdback pairs the promoted configuration is {-gain:.1%} slower than "
            "the one before it.",
            gain,
        )
    return HoldbackJudgement(False, f"{len(differences)} holdback pairs: the gain is {gain:.1%}.", gain)
