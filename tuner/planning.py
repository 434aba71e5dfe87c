"""What an experiment can find and how long it takes: known before it opens, sharper while it runs. Pure.

    request rate ──slicing──▶ Slicing (how long a slice must be, or "not enough traffic")
    Slicing, level, pair sd ──plan──▶ Planning (smallest gain, pairs, minutes, words)

The chance to find a gain is that of our own test (`tuner.judging.power`), at the level that this experiment is paid
and within the pairs that its wall time leaves. A pair sd is what the champion's own windows showed; from
MIN_PAIRS_FOR_SD scored pairs on, what the experiment's pairs show themselves.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import stdev
from typing import Any

from tuner.judging.interval import gain_as_log, pairs_needed
from tuner.judging.power import PowerCurve, power_curve
from tuner.judging.sign_flip import min_pairs_to_cross

MIN_PAIRS_FOR_SD = 5
MIN_PAIR_SD = 0.02  # log units; below it no traffic is steady for long, and a plan would promise too much
BETWEEN_PAIRS_S = 1.0  # a tick, a coin in the journal, a plan posted
MAX_LENGTHENING = 8.0  # a slice may grow by this factor where traffic is thin,
MAX_SLICE_S = 900.0  # and to this length; beyond it the hour changes faster than a pair ends
SHOWN_GAIN = 0.05  # what "not enough traffic" is told for, unless the minimum effect is larger


@dataclass(frozen=True)
class Slicing:
    """How long slices are at the rate seen. `requests_per_slice`: expected in the scored part; None: not known."""

    slice_s: float
    requests_per_slice: float | None
    is_enough: bool
    needed_s: float  # the slice that this rate would need, however long

    @property
    def pair_s(self) -> float:
        return 2.0 * self.slice_s + BETWEEN_PAIRS_S


def slicing(slice_s: float, burn_in_s: float, min_requests: int, rate_per_s: float | None) -> Slicing:
    """Lengthens a slice until its scored part expects enough requests, within bounds.

    Enough is a mean m with m - 2 sqrt(m) >= `min_requests`: then 1 slice in 40 of Poisson arrivals falls short.
    """
    if rate_per_s is None:
        return Slicing(slice_s, None, True, slice_s)
    wanted = (1.0 + math.sqrt(1.0 + min_requests)) ** 2
    needed_s = burn_in_s + wanted / rate_per_s if rate_per_s > 0.0 else math.inf
    longest_s = min(MAX_LENGTHENING * slice_s, max(slice_s, MAX_SLICE_S))
    length_s = min(max(slice_s, needed_s), longest_s)
    expected = rate_per_s * (length_s - burn_in_s)
    return Slicing(length_s, expected, needed_s <= longest_s, max(slice_s, needed_s))


@dataclass(frozen=True)
class Asked:
    """What a plan is made of. Gains are ratios (0.1 is 10 % lower latency), `pair_sd` is in log units."""

    level: float
    max_pairs: int
    look_every: int
    min_effect: float
    pair_sd: float
    slicing: Slicing
    max_wall_s: float
    predicted_gain: float | None = None  # by the probe and the replay; None or below the minimum: not told

    @property
    def fitting_pairs(self) -> int:
        """The cap, or as many looks as the wall time leaves where that is fewer."""
        fitting = int(self.max_wall_s // self.slicing.pair_s)
        if fitting >= self.max_pairs:
            return self.max_pairs
        return fitting - fitting % self.look_every

    @property
    def target_gain(self) -> float:
        """The gain that is looked for: the predicted one where there is one, else the smallest that counts."""
        smallest = max(self.min_effect, 0.01)
        return smallest if self.predicted_gain is None else min(0.99, max(smallest, self.predicted_gain))


@dataclass(frozen=True)
class Planning:
    """What the experiment can do. Ratios of gain; pairs in all, minutes from now on; None: not within its cap.

    `power` is the chance to prove `target_ratio` by the cap. `is_feasible` False: it is not opened, `words` say why.
    """

    mde_ratio: float | None
    target_ratio: float
    is_predicted: bool
    power: float
    pairs_needed: int | None
    minutes_needed: float | None
    pairs_for_min_effect: int | None
    minutes_for_min_effect: float | None
    level: float
    pair_sd: float
    max_pairs: int
    max_minutes: float
    slice_s: float
    requests_per_slice: float | None
    is_feasible: bool
    words: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan(asked: Asked, differences: Sequence[float] = ()) -> Planning:
    """The plan before the first pair, or, given the differences of the pairs so far, as it stands now."""
    known, num_done = sharpened(asked, differences), len(differences)
    cut, max_pairs = known.slicing, known.fitting_pairs
    if not cut.is_enough:
        return _refused(known, starved_words(known))
    if max_pairs < 1 or min_pairs_to_cross(known.level, max_pairs, known.look_every) is None:
        return _refused(known, _hopeless_words(known))
    curve = power_curve(_rounded(known.level), max_pairs, known.look_every)
    effect = curve.min_effect()
    target = known.target_gain
    needed, for_min = (_pairs_for(curve, known, gain) for gain in (target, max(known.min_effect, 0.01)))

    def minutes(pairs: int | None) -> float | None:
        return None if pairs is None else max(0, pairs - num_done) * cut.pair_s / 60.0

    planned = Planning(
        mde_ratio=None if effect is None else -math.expm1(-effect * known.pair_sd),
        target_ratio=target,
        is_predicted=known.predicted_gain is not None and target == known.predicted_gain,
        power=curve.power(gain_as_log(target) / known.pair_sd),
        pairs_needed=needed,
        minutes_needed=minutes(needed),
        pairs_for_min_effect=for_min,
        minutes_for_min_effect=minutes(for_min),
        level=known.level,
        pair_sd=known.pair_sd,
        max_pairs=max_pairs,
        max_minutes=max_pairs * cut.pair_s / 60.0,
        slice_s=cut.slice_s,
        requests_per_slice=cut.requests_per_slice,
        is_feasible=True,
        words="",
    )
    return replace(planned, words=_words(planned, num_done))


def sharpened(asked: Asked, differences: Sequence[float]) -> Asked:
    """The pair sd of the experiment's own pairs, from MIN_PAIRS_FOR_SD on."""
    sd = stdev(differences) if len(differences) >= MIN_PAIRS_FOR_SD else asked.pair_sd
    return replace(asked, pair_sd=max(MIN_PAIR_SD, sd))


def _pairs_for(curve: PowerCurve, asked: Asked, gain: float) -> int | None:
    return curve.pairs_for(gain_as_log(gain) / asked.pair_sd)


def _rounded(level: float) -> float:
    """Two digits: levels that differ less share one simulated curve."""
    digits = 1 - math.floor(math.log10(level))
    return round(level, digits)


def _refused(asked: Asked, words: str) -> Planning:
    return Planning(
        mde_ratio=None,
        target_ratio=asked.target_gain,
        is_predicted=asked.predicted_gain is not None,
        power=0.0,
        pairs_needed=None,
        minutes_needed=None,
        pairs_for_min_effect=None,
        minutes_for_min_effect=None,
        level=asked.level,
        pair_sd=asked.pair_sd,
        max_pairs=asked.fitting_pairs,
        max_minutes=asked.fitting_pairs * asked.slicing.pair_s / 60.0,
        slice_s=asked.slicing.slice_s,
        requests_per_slice=asked.slicing.requests_per_slice,
        is_feasible=False,
        words=words,
    )


# --- words ----------------------------------------------------------------------------------------


def starved_words(asked: Asked) -> str:
    """For traffic too thin for any slice: how long the evidence would take to come by."""
    gain = max(SHOWN_GAIN, asked.min_effect)
    if not math.isfinite(asked.slicing.needed_s):
        return "not enough traffic: no request came, so there is nothing to compare"
    pairs = pairs_needed(max(MIN_PAIR_SD, asked.pair_sd), gain, asked.level)
    return (
        f"not enough traffic: about {told_duration(2.0 * pairs * asked.slicing.needed_s)} to see {gain:.0%}"
    )


def _hopeless_words(asked: Asked) -> str:
    looks = math.ceil(-math.log2(asked.level) / asked.look_every)  # the rarest outcome has chance 2**-pairs
    return (
        f"not opened: {asked.fitting_pairs} pairs fit into {told_duration(asked.max_wall_s)} and the cap of "
        f"{asked.max_pairs}; at a level of {asked.level:.3%} no gain is proven by fewer than "
        f"{looks * asked.look_every}"
    )


def _words(planned: Planning, num_done: int) -> str:
    more = "more " if num_done else ""
    if planned.pairs_needed is not None and planned.minutes_needed is not None:
        left = planned.pairs_needed - num_done
        if left <= 0:
            return f"enough pairs by now to find {planned.target_ratio:.0%} four times in five"
        duration = told_duration(60.0 * planned.minutes_needed, more)
        return f"needs about {duration} ({left} pairs) to find {planned.target_ratio:.0%}"
    smallest = "no gain" if planned.mde_ratio is None else f"gains from {planned.mde_ratio:.0%} on"
    left_s = 60.0 * planned.max_minutes * (1.0 - num_done / planned.max_pairs)
    return (
        f"{planned.target_ratio:.0%} would be found with a chance of {planned.power:.0%} only, in "
        f"{told_duration(left_s, more)} ({planned.max_pairs - num_done} pairs); {smallest} reliably"
    )


def told_duration(seconds: float, more: str = "") -> str:
    """`40 seconds`, `12 minutes`, `5 hours`, `3 days`; with "more " before the unit if asked."""
    for unit, length_s in (("day", 86400.0), ("hour", 3600.0), ("minute", 60.0), ("second", 1.0)):
        if seconds >= 2 * length_s or unit == "second":
            number = round(seconds / length_s)
            return f"{number} {more}{unit}{'s' if number != 1 else ''}"
    raise AssertionError("seconds always fit")
