"""The harm rule against the made-up service: false stops of equal challengers, speed for slow ones."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from tuner.bench.latency_model import Ints, Slices, WatchedSlices, simulate_pairs, simulate_watched, treated
from tuner.judging.error_rate import Lord
from tuner.judging.harm import HarmReference, HarmRule, SliceWatch, harm_reference
from tuner.judging.judge import JudgeRules, Outcome, SliceScore, judge, score_pair

PAST_PAIRS = 10  # twenty minutes of the champion alone before the experiment
CHUNK = 20
MAX_PAIRS = 60
SLOW_PAIRS = 12  # how long a slow challenger is followed


class Stopped(NamedTuple):
    """When a challenger was stopped: seconds in its scored parts, requests that arrived in them, slices begun."""

    scored_s: int
    num_requests: int
    num_slices: int


@dataclass(frozen=True)
class _Turn:
    """One challenger slice: which it is, the champion's latest slice before it, and how many slices lie between."""

    challenger: int
    latest: int
    lag: int


def _turns(coins: Ints) -> Iterator[_Turn]:
    """The challenger's slices of one experiment. `coins`: [pairs], 1 where the challenger goes first."""
    latest = 2 * PAST_PAIRS - 1
    for pair in range(PAST_PAIRS, len(coins)):
        challenger, champion = (2 * pair, 2 * pair + 1) if coins[pair] else (2 * pair + 1, 2 * pair)
        if champion < challenger:
            latest = champion
        yield _Turn(challenger, latest, challenger - latest)
        latest = champion


def first_stop(
    seen: WatchedSlices, experiment: int, coins: Ints, slices: Slices, rule: HarmRule
) -> Stopped | None:
    """Asks the rule at every second of every challenger slice, as the watch thread does."""
    means = seen.final_mean[experiment]
    past = means[: 2 * PAST_PAIRS].tolist()
    scored_s = num_requests = 0
    for index, turn in enumerate(_turns(coins)):
        reference = harm_reference(past, float(means[turn.latest]), turn.lag, num_challenger_slices=index)
        assert reference is not None, "twenty past windows are enough"
        second = _breach_second(seen, experiment, turn.challenger, slices, rule, reference)
        last = slices.slice_s - 1 if second is None else second
        scored_s += last + 1 - slices.burn_in_s
        where = (experiment, turn.challenger, last)
        num_requests += int(seen.num_finished[where] + seen.num_pending[where])
        if second is not None:
            return Stopped(scored_s, num_requests, index + 1)
    return None


def _breach_second(
    seen: WatchedSlices,
    experiment: int,
    challenger: int,
    slices: Slices,
    rule: HarmRule,
    reference: HarmReference,
) -> int | None:
    at = (experiment, challenger)
    for second in range(slices.burn_in_s, slices.slice_s):
        watch = SliceWatch(
            scored_s=second + 1.0 - slices.burn_in_s,
            num_finished=int(seen.num_finished[at][second]),
            sum_log=float(seen.sum_log[at][second]),
            sumsq_log=float(seen.sumsq_log[at][second]),
            num_pending=int(seen.num_pending[at][second]),
            sum_log_pending_age=float(seen.sum_log_pending_age[at][second]),
        )
        if rule.breach(watch, reference) is not None:
            return second
    return None


def stops(
    rng: np.random.Generator, num_experiments: int, num_pairs: int, slowdown: float, rule: HarmRule
) -> list[Stopped | None]:
    """One entry an experiment with a challenger `slowdown` times as slow."""
    slices = Slices(PAST_PAIRS + num_pairs)
    found: list[Stopped | None] = []
    for start in range(0, num_experiments, CHUNK):
        coins = rng.integers(0, 2, (min(CHUNK, num_experiments - start), slices.num_pairs))
        doses = treated(coins, slices)
        doses[:, : 2 * PAST_PAIRS] = 0.0
        seen = simulate_watched(rng, doses, slices, math.log(slowdown))
        found += [first_stop(seen, index, row, slices, rule) for index, row in enumerate(coins)]
    return found


def pairs_until_rejected(rng: np.random.Generator, num_experiments: int, slowdown: float) -> list[int]:
    """Pairs until the judge itself rejects, asked after every pair at the first LORD++ level."""
    rules = JudgeRules(alpha=Lord().level(1))
    counts = []
    for chunk in simulate_pairs(rng, num_experiments, Slices(MAX_PAIRS)):
        effect = math.log(slowdown)
        champion = chunk.champion + effect * chunk.champion_dose
        challenger = chunk.challenger + effect * chunk.challenger_dose
        for ours, theirs in zip(champion.tolist(), challenger.tolist(), strict=True):
            pairs = []
            for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
                pairs.append(score_pair(index, "AB", SliceScore(200, a), SliceScore(200, b)))
                if judge(pairs, rules).outcome is not Outcome.CONTINUE:
                    break
            counts.append(len(pairs))
    return counts


def _p90_scored_s(found: list[Stopped | None]) -> int | None:
    """None where more than a tenth were never stopped by the rule."""
    seconds = sorted(stop.scored_s for stop in found if stop is not None)
    rank = math.ceil(0.9 * len(found)) - 1
    return seconds[rank] if rank < len(seconds) else None


def run_harm(num_experiments: int, seed: int) -> dict[str, Any]:
    """The whole benchmark; a tenth of the experiments (at least 100) for each slow challenger."""
    rng = np.random.default_rng(seed)
    rule = HarmRule()
    equal = stops(rng, num_experiments, MAX_PAIRS, 1.0, rule)
    num_slow = max(100, num_experiments // 10)
    rows = []
    for slowdown in (2.0, 1.5):
        found = stops(rng, num_slow, SLOW_PAIRS, slowdown, rule)
        hit = [stop for stop in found if stop is not None]
        quick = sum(stop.scored_s <= 15 or stop.num_requests <= 60 for stop in hit)
        rows.append(
            {
                "slowdown": slowdown,
                "experiments": num_slow,
                "stopped_share": len(hit) / num_slow,
                "within_15_s_or_60_requests_share": quick / num_slow,
                "median_scored_s": median(stop.scored_s for stop in hit),
                "p90_scored_s": _p90_scored_s(found),
                "median_requests": median(stop.num_requests for stop in hit),
                "median_slices": median(stop.num_slices for stop in hit),
                "judge_median_pairs": median(pairs_until_rejected(rng, num_slow, slowdown)),
            }
        )
    return {
        "experiments": num_experiments,
        "pairs_each": MAX_PAIRS,
        "false_stops": sum(stop is not None for stop in equal),
        "slow": rows,
    }
