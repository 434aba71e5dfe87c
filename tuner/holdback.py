"""After a promotion: is the old champion, asked again now and then, still the slower one? Pure.

Holdback pairs serve the old champion for a small share of the time. The share is what the probation
budget allows given how much worse the old champion is known to be, and never leaves 0.5 to 10 %: a gain
that halved latency needs few reminders, a gain of 3 % needs many. Where the budget allows less, probation
lasts longer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tuner.judging.interval import anytime_interval, log_harm_e_value

MIN_SHARE, MAX_SHARE = 0.005, 0.10
HARM_ALPHA = 0.05
FADE_ALPHA = 0.05
MIN_PAIRS = 10  # pairs of a probation; the e-value cannot reach its limit before eight
MIN_MEASURED_PAIRS = 5  # from which on the holdback's own gain says what the old champion costs


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


def known_effect(promised_ratio: float, differences: Sequence[float]) -> float:
    """The effect that sizes the share: the verdict's at first, then what the holdback pairs measured."""
    if len(differences) < MIN_MEASURED_PAIRS:
        return promised_ratio
    return math.expm1(-sum(differences) / len(differences))


def seconds_between_pairs(share: float, slice_s: float) -> float:
    """A pair holds one slice of the old champion, so pairs start this far apart."""
    return slice_s / share


@dataclass(frozen=True)
class HoldbackJudgement:
    """`must_roll_back`: it does harm, or its gain has faded. Gains are ratios of latency; positive is better."""

    must_roll_back: bool
    reason: str
    gain_ratio: float | None  # mean gain of the promoted configuration over the old one


def judge_holdback(
    differences: Sequence[float], pair_sd: float, min_effect: float = 0.0
) -> HoldbackJudgement:
    """Differences are old champion minus promoted one, log units: positive where the promotion still wins.

    Harmful when the evidence that the promoted one is slower reaches an e-value of 1/0.05. Faded when, over at
    least MIN_PAIRS pairs, even the best case of the anytime-valid 95 % interval is below `min_effect`. Both may
    be asked after every pair: each pair's order was a coin.
    """
    if not differences:
        return HoldbackJudgement(False, "No holdback pair has been scored yet.", None)
    num_pairs = len(differences)
    gain = 1.0 - math.exp(-sum(differences) / num_pairs)
    seen = f"Over {num_pairs} holdback pairs"
    if log_harm_e_value([-difference for difference in differences], pair_sd) >= -math.log(HARM_ALPHA):
        slower = f"{seen} the promoted configuration is {-gain:.1%} slower than the one before it."
        return HoldbackJudgement(True, slower, gain)
    interval = anytime_interval(differences, FADE_ALPHA)
    best = None if interval is None else 1.0 - math.exp(-interval.high)
    if best is not None and num_pairs >= MIN_PAIRS and best < min_effect:
        faded = f"{seen} the gain has faded: {gain:.1%}, and at best {best:.1%}, below the minimum of {min_effect:.0%}."
        return HoldbackJudgement(True, faded, gain)
    return HoldbackJudgement(False, f"{num_pairs} holdback pairs: the gain is {gain:.1%}.", gain)
