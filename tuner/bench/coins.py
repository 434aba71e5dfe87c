"""Coins drawn over recorded champion traffic, through the real scoring and judge: false alarms and power. Pure.

    recorded requests ──cut──▶ slices, measured once ──coins──▶ experiments ──judge──▶ shares of outcomes

The same recorded hour serves thousands of experiments, as only the coins differ: who is called challenger in
which slice. Nothing was changed for anybody, so every promotion is a false one; with a shift of the
challenger's slices by ln(1 - gain) every promotion is a right one. What this cannot show is what a real
challenger does to the queue that it leaves behind.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median, stdev
from typing import Any, NamedTuple, cast

from store.interval import Rate
from store.tables import Slice
from tuner.judging.coin import draw_coin
from tuner.judging.interval import gain_as_log, log_harm_e_value
from tuner.judging.judge import JudgeRules, Outcome, PairScore, SliceScore, Verdict, judge, score_pair
from tuner.judging.objective import SliceMeasure, Timing, measure_slice
from tuner.judging.power import power_curve
from tuner.judging.sign_flip import is_look
from tuner.pairs import ExperimentRules, guardrails

GAINS = (0.0, 0.05, 0.10, 0.20)

# (start, end) of a pair -> request_id -> predicted ln(metric)
Predict = Callable[[float, float], Mapping[str, float] | None]


@dataclass(frozen=True)
class CutPair:
    """Two neighbouring slices of the champion, in order of time."""

    first: SliceMeasure
    second: SliceMeasure


class CutSlice(NamedTuple):
    """What the guardrails read of a slice's row."""

    arm: str
    state: str
    num_requests: int
    num_errors: int
    stats: Mapping[str, Any]


@dataclass(frozen=True)
class CoinReport:
    """`num_pairs`: median over the promoted. `planned_power` is what planning foretells for normal differences."""

    adjustment: str
    gain: float
    promoted: Rate
    num_rejected: int
    num_inconclusive: int
    num_pairs: float | None
    pair_sd: float
    planned_power: float

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "promoted": {**self.promoted._asdict(), "ratio": self.promoted.ratio}}


def cut_pairs(
    timings: Sequence[Timing],
    spans: Sequence[tuple[float, float]],
    rules: ExperimentRules,
    predict: Predict | None,
) -> list[CutPair]:
    """Slices of `rules.slice_s` from the start of each span on; a pair with too few requests is left out, as live.

    `timings` by arrival.
    """
    cut = []
    for start_at, end_at in spans:
        for index in range(int((end_at - start_at) // (2 * rules.slice_s))):
            pair_at = start_at + index * 2 * rules.slice_s
            predictions = predict(pair_at, pair_at + 2 * rules.slice_s) if predict is not None else None
            first, second = (
                _measured(timings, pair_at + position * rules.slice_s, rules, predictions)
                for position in (0, 1)
            )
            if first is None or second is None:
                continue
            if first.predicted is None or second.predicted is None:
                first, second = replace(first, predicted=None), replace(second, predicted=None)
            cut.append(CutPair(first, second))
    return cut


def _measured(
    timings: Sequence[Timing],
    start_at: float,
    rules: ExperimentRules,
    predictions: Mapping[str, float] | None,
) -> SliceMeasure | None:
    scored_from, end_at = start_at + rules.burn_in_s, start_at + rules.slice_s
    inside = [timing for timing in timings if scored_from <= timing.arrived_at < end_at]
    measure = measure_slice(inside, [], predictions, rules.metric, rules.slo_limits(), end_at - scored_from)
    return None if measure.num_requests < rules.min_requests or measure.measured is None else measure


def run_coins(
    cut: Sequence[CutPair],
    rules: ExperimentRules,
    gain: float,
    num_sequences: int,
    seed: int,
    adjustment: str,
    tell: Callable[[int], None] = lambda _: None,
) -> CoinReport:
    """One report. The same seed gives the same coins and the same stretches whatever the gain and adjustment.

    Raises:
        ValueError: fewer pairs than one experiment needs.
    """
    if len(cut) < rules.max_pairs:
        raise ValueError(f"An experiment has {rules.max_pairs} pairs, but only {len(cut)} were cut.")
    shift = math.log1p(-gain)
    scores = [(_score(pair.first), _score(pair.second)) for pair in cut]
    shifted = [tuple(_shifted(score, shift) for score in pair) for pair in scores]
    outcomes: list[Verdict] = []
    for index in range(num_sequences):
        bits = random.Random(f"{seed}-{index}")
        start = bits.randrange(len(cut) - rules.max_pairs + 1)
        coins = [draw_coin(f"{seed}-{index}", pair, bits.getrandbits) for pair in range(rules.max_pairs)]
        pairs = [
            score_pair(
                pair,
                coin.order,
                scores[start + pair][coin.value],
                shifted[start + pair][1 - coin.value],
            )
            for pair, coin in enumerate(coins)
        ]
        found = judged(pairs, rules.judge_rules())
        if found.outcome is Outcome.PROMOTE:
            seen = [(cut[start + pair], coin.value) for pair, coin in enumerate(coins[: found.num_pairs])]
            guards = guardrails(cast(list[Slice], _rows(seen, gain)), rules, rules.max_error_ratio)
            if not all(guard.passed for guard in guards):
                found = replace(found, outcome=Outcome.INCONCLUSIVE)
        outcomes.append(found)
        tell(index + 1)
    return _report(outcomes, scores, rules, gain, adjustment)


def judged(pairs: Sequence[PairScore], rules: JudgeRules) -> Verdict:
    """The verdict that ends the experiment; asked after every pair, as live, though only looks can promote."""
    harm_limit = -math.log(rules.harm_alpha)
    differences = [pair.difference for pair in pairs]
    for num_pairs in range(1, len(pairs) + 1):
        at_look = is_look(num_pairs, rules.max_pairs, rules.look_every)
        harm = log_harm_e_value(differences[:num_pairs], rules.harm_pair_sd)
        if not at_look and harm < harm_limit:
            continue  # the judge would say CONTINUE
        verdict = judge(pairs[:num_pairs], rules)
        if verdict.outcome is not Outcome.CONTINUE:
            return verdict
    return verdict


def _score(measure: SliceMeasure) -> SliceScore:
    score = measure.to_score()
    assert score is not None, "slices without a value were left out"
    return score


def _shifted(score: SliceScore, shift: float) -> SliceScore:
    return replace(score, mean_log_latency=score.mean_log_latency + shift)


def _rows(seen: Sequence[tuple[CutPair, int]], gain: float) -> list[CutSlice]:
    rows = []
    for pair, coin in seen:
        for position, measure in enumerate((pair.first, pair.second)):
            is_champion = position == coin
            factor = 1.0 if is_champion else 1.0 - gain
            p95_s = None if measure.p95_s is None else factor * measure.p95_s
            stats = {**measure.to_dict(), "p95_s": p95_s}
            arm = "champion" if is_champion else "challenger"
            rows.append(CutSlice(arm, "SCORED", measure.num_requests, measure.num_errors, stats))
    return rows


def _report(
    outcomes: Sequence[Verdict],
    scores: Sequence[tuple[SliceScore, SliceScore]],
    rules: ExperimentRules,
    gain: float,
    adjustment: str,
) -> CoinReport:
    promoted = [found.num_pairs for found in outcomes if found.outcome is Outcome.PROMOTE]
    pair_sd = stdev(second.response - first.response for first, second in scores)
    curve = power_curve(rules.level, rules.max_pairs, rules.look_every)
    return CoinReport(
        adjustment=adjustment,
        gain=gain,
        promoted=Rate.of(len(promoted), len(outcomes)),
        num_rejected=sum(found.outcome is Outcome.REJECT for found in outcomes),
        num_inconclusive=sum(found.outcome is Outcome.INCONCLUSIVE for found in outcomes),
        num_pairs=median(promoted) if promoted else None,
        pair_sd=pair_sd,
        planned_power=curve.power(gain_as_log(gain) / max(pair_sd, 1e-6)) if gain else rules.level,
    )
