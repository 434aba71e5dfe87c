"""From scored pairs to a verdict. Pure: the same inputs give the same verdict, bit for bit.

    SliceScore ×2 ──score_pair──▶ PairScore ──┐
                     ...                      ├──judge(pairs, rules, guardrails, faults)──▶ Verdict
                  JudgeRules, GuardrailResult ┘

The response of a slice is the mean ln(latency) of the requests that arrived in its scored part, minus the
champion twin's mean for the same requests where the twin is used. A pair's difference is challenger minus
champion, in log units: negative means the challenger is faster. The pair is the unit; requests are not.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from statistics import fmean, stdev
from typing import Any

from tuner.judging.coin import Order
from tuner.judging.interval import (
    anytime_interval,
    effect_ratio,
    log_harm_e_value,
    min_detectable_gain,
    pairs_needed,
)
from tuner.judging.sign_flip import Look, SignFlipTest, is_look, min_pairs_to_cross, sign_flip_p

PLANNING_GAIN = 0.10  # the gain for which the verdict tells how many pairs would be needed


class Outcome(StrEnum):
    PROMOTE = "PROMOTE"
    REJECT = "REJECT"
    INCONCLUSIVE = "INCONCLUSIVE"
    CONTINUE = "CONTINUE"


@dataclass(frozen=True)
class JudgeRules:
    """What was fixed before the first pair. Shares are ratios: 0.03 is 3 %."""

    alpha: float = 0.05  # level of the sign-flip test: the LORD++ level of this experiment
    max_pairs: int = 60
    look_every: int = 5
    min_effect: float = 0.03  # a gain below this is not worth a change
    interval_alpha: float = 0.05  # the interval shown is of level 1 - interval_alpha
    harm_alpha: float = 0.05  # REJECT as harmful at an e-value of 1 / harm_alpha
    harm_pair_sd: float = 0.2  # sd of champion pairs, log units, known beforehand; tunes speed only


@dataclass(frozen=True)
class SliceScore:
    """One slice's scored part. `mean_log_twin` is the twin's prediction for the same requests, if it is used."""

    num_requests: int
    mean_log_latency: float
    mean_log_twin: float | None = None
    requests_per_s: float | None = None
    mean_prompt_tokens: float | None = None
    mean_output_tokens: float | None = None

    @property
    def response(self) -> float:
        return self.mean_log_latency - (self.mean_log_twin or 0.0)


@dataclass(frozen=True)
class PairScore:
    """One pair. `difference` decides, `raw_difference` (without the twin) is shown beside it; log units."""

    pair_index: int
    difference: float
    raw_difference: float
    order: Order
    twin_used: bool
    champion: SliceScore
    challenger: SliceScore


def score_pair(pair_index: int, order: Order, champion: SliceScore, challenger: SliceScore) -> PairScore:
    """The twin is subtracted from both slices or from neither: from one alone it would be a bias."""
    raw = challenger.mean_log_latency - champion.mean_log_latency
    twin_used = champion.mean_log_twin is not None and challenger.mean_log_twin is not None
    difference = challenger.response - champion.response if twin_used else raw
    return PairScore(pair_index, difference, raw, order, twin_used, champion, challenger)


@dataclass(frozen=True)
class GuardrailResult:
    """One condition that a promotion must meet whatever the gain; `detail` says what was measured, in words."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class SeenRange:
    """The load and lengths under which the evidence arose; outside it a promotion is provisional."""

    requests_per_s: tuple[float, float] | None
    mean_prompt_tokens: tuple[float, float] | None
    mean_output_tokens: tuple[float, float] | None


@dataclass(frozen=True)
class Verdict:
    """The decision and all that a newcomer asks next. Ratios: -0.10 is 10 % lower latency. None = not defined yet.

    `boundary` and `running_sum` are in log units at the last look; `p_value` is the exact chance of a sum as
    low as this one by coin flips alone, at this single look; `level` is what the whole test was allowed.
    """

    outcome: Outcome
    reason: str
    num_pairs: int
    level: float
    effect_ratio: float | None
    interval_low_ratio: float | None
    interval_high_ratio: float | None
    raw_effect_ratio: float | None
    p_value: float | None
    boundary: float | None
    running_sum: float | None
    crossed_at_pairs: int | None
    min_pairs_to_cross: int | None
    log_harm_e_value: float | None
    pair_sd: float | None
    raw_pair_sd: float | None
    min_detectable_gain: float | None
    pairs_needed_for_10_percent: int | None
    looks: tuple[Look, ...]
    seen: SeenRange
    guardrails: tuple[GuardrailResult, ...]
    open_faults: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Evidence:
    """What the decision and its words are made of."""

    rules: JudgeRules
    differences: tuple[float, ...]
    looks: tuple[Look, ...]
    crossed_at: int | None
    gain: float  # point estimate, ratio; positive is better
    gain_low: float | None  # worst and best case of the interval
    gain_high: float | None
    log_harm: float | None
    failed_guardrails: tuple[GuardrailResult, ...]
    open_faults: tuple[str, ...]

    @property
    def num_pairs(self) -> int:
        return len(self.differences)

    @property
    def at_cap(self) -> bool:
        return self.num_pairs == self.rules.max_pairs

    @property
    def interval_words(self) -> str:
        if self.gain_low is None or self.gain_high is None:
            return "too few pairs for an interval"
        return f"{1 - self.rules.interval_alpha:.0%} interval {self.gain_low:.1%} to {self.gain_high:.1%}"


def judge(
    pairs: Sequence[PairScore],
    rules: JudgeRules,
    guardrails: Sequence[GuardrailResult] = (),
    open_faults: Sequence[str] = (),
) -> Verdict:
    """The verdict on the valid pairs so far, in their order; call it after every pair.

    PROMOTE needs the boundary crossed at a look, a point gain of at least `min_effect`, every guardrail passed
    and no open fault; a crossing waits for the last three until the cap. REJECT: harm proven, or the interval's
    best case is below `min_effect`, or the cap is reached with a gain too small or a guardrail failed. At the
    cap otherwise INCONCLUSIVE. Rejections only lower the size of the test (the boundary is not relaxed for them).

    Raises:
        ValueError: more pairs than `max_pairs`, or a difference that is not a finite number.
    """
    differences = tuple(pair.difference for pair in pairs)
    test = SignFlipTest(rules.alpha, rules.max_pairs, rules.look_every)
    for difference in differences:
        test.add(difference)
    interval = anytime_interval(differences, rules.interval_alpha)
    evidence = _Evidence(
        rules=rules,
        differences=differences,
        looks=tuple(test.looks),
        crossed_at=test.crossed_at,
        gain=-effect_ratio(fmean(differences)) if differences else 0.0,
        gain_low=-effect_ratio(interval.high) if interval else None,
        gain_high=-effect_ratio(interval.low) if interval else None,
        log_harm=log_harm_e_value(differences, rules.harm_pair_sd) if differences else None,
        failed_guardrails=tuple(result for result in guardrails if not result.passed),
        open_faults=tuple(open_faults),
    )
    outcome, reason = _decide(evidence)
    return _verdict(outcome, reason, evidence, pairs, tuple(guardrails))


def _decide(seen: _Evidence) -> tuple[Outcome, str]:
    rules = seen.rules
    if seen.log_harm is not None and seen.log_harm >= -math.log(rules.harm_alpha):
        return Outcome.REJECT, (
            f"The challenger is worse: its latency is {-seen.gain:.1%} higher over {seen.num_pairs} pairs "
            f"({seen.interval_words}), more than chance explains at {rules.harm_alpha:.0%}."
        )
    at_look = is_look(seen.num_pairs, rules.max_pairs, rules.look_every)
    if at_look and seen.gain_high is not None and seen.gain_high < rules.min_effect:
        return Outcome.REJECT, (
            f"Not worth a change: even the best case is a gain of {seen.gain_high:.1%}, below the minimum of "
            f"{rules.min_effect:.0%} ({seen.num_pairs} pairs, estimate {seen.gain:.1%})."
        )
    if seen.crossed_at is not None:
        return _decide_crossed(seen)
    if seen.at_cap:
        return Outcome.INCONCLUSIVE, (
            f"Not proven after all {seen.num_pairs} pairs: the estimate is a gain of {seen.gain:.1%} "
            f"({seen.interval_words}), which lucky coins alone could give. The champion stays."
        )
    return Outcome.CONTINUE, _waiting_words(seen)


def _decide_crossed(seen: _Evidence) -> tuple[Outcome, str]:
    """A gain is proven; it is promoted as soon as it is large enough, harmless and nothing is broken."""
    rules = seen.rules
    proof = (
        f"The challenger is faster: latency {seen.gain:.1%} lower ({seen.interval_words}, {seen.num_pairs} pairs). "
        f"A change without effect crosses this line in at most {rules.alpha:.2%} of experiments"
    )
    if seen.gain < rules.min_effect:
        outcome, why = Outcome.REJECT, f"the gain is below the minimum of {rules.min_effect:.0%}"
    elif seen.failed_guardrails:
        words = "; ".join(f"{result.name}: {result.detail}" for result in seen.failed_guardrails)
        outcome, why = Outcome.REJECT, f"a guardrail does not pass ({words})"
    elif seen.open_faults:
        outcome, why = Outcome.INCONCLUSIVE, f"a fault is open ({', '.join(seen.open_faults)})"
    else:
        return Outcome.PROMOTE, f"{proof}; it did at pair {seen.crossed_at}. Every guardrail passes."
    if seen.at_cap:
        return outcome, f"{proof}, but {why}, and the experiment is at its cap. The champion stays."
    return Outcome.CONTINUE, f"{proof}, but {why}; waiting."


def _waiting_words(seen: _Evidence) -> str:
    rules = seen.rules
    if not seen.num_pairs:
        return "No pair has been scored yet."
    first = min_pairs_to_cross(rules.alpha, rules.max_pairs, rules.look_every)
    if first is None:
        return (
            f"A level of {rules.alpha:.3%} cannot be reached within {rules.max_pairs} pairs; raise the cap."
        )
    if seen.num_pairs < first:
        return f"{seen.num_pairs} pairs scored; at this level at least {first} are needed to prove any gain."
    so_far = f"gain so far {seen.gain:.1%} ({seen.interval_words})"
    return f"{seen.num_pairs} of at most {rules.max_pairs} pairs scored, {so_far}."


def _verdict(
    outcome: Outcome,
    reason: str,
    seen: _Evidence,
    pairs: Sequence[PairScore],
    guardrails: tuple[GuardrailResult, ...],
) -> Verdict:
    rules, raw = seen.rules, [pair.raw_difference for pair in pairs]
    last = seen.looks[-1] if seen.looks else None
    pair_sd = stdev(seen.differences) if seen.num_pairs > 1 else None
    return Verdict(
        outcome=outcome,
        reason=reason,
        num_pairs=seen.num_pairs,
        level=rules.alpha,
        effect_ratio=-seen.gain if pairs else None,
        interval_low_ratio=None if seen.gain_high is None else -seen.gain_high,
        interval_high_ratio=None if seen.gain_low is None else -seen.gain_low,
        raw_effect_ratio=effect_ratio(fmean(raw)) if raw else None,
        p_value=sign_flip_p(seen.differences),
        boundary=last.boundary if last else None,
        running_sum=last.running_sum if last else None,
        crossed_at_pairs=seen.crossed_at,
        min_pairs_to_cross=min_pairs_to_cross(rules.alpha, rules.max_pairs, rules.look_every),
        log_harm_e_value=seen.log_harm,
        pair_sd=pair_sd,
        raw_pair_sd=stdev(raw) if len(raw) > 1 else None,
        min_detectable_gain=min_detectable_gain(pair_sd, rules.max_pairs, rules.alpha) if pair_sd else None,
        pairs_needed_for_10_percent=pairs_needed(pair_sd, PLANNING_GAIN, rules.alpha) if pair_sd else None,
        looks=seen.looks,
        seen=_seen_range(pairs),
        guardrails=guardrails,
        open_faults=seen.open_faults,
    )


def _seen_range(pairs: Sequence[PairScore]) -> SeenRange:
    slices = [score for pair in pairs for score in (pair.champion, pair.challenger)]

    def extent(values: list[float | None]) -> tuple[float, float] | None:
        known = [value for value in values if value is not None]
        return (min(known), max(known)) if known else None

    return SeenRange(
        requests_per_s=extent([score.requests_per_s for score in slices]),
        mean_prompt_tokens=extent([score.mean_prompt_tokens for score in slices]),
        mean_output_tokens=extent([score.mean_output_tokens for score in slices]),
    )
