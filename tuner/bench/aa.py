"""The false-promotion rate: thousands of experiments of the champion against itself through the real judge.

Beside it the power for a true gain, on the same simulated services, at the same level.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from store.interval import Rate
from tuner.bench.latency_model import Floats, Slices, simulate_pairs
from tuner.judging.error_rate import Lord
from tuner.judging.judge import JudgeRules, Outcome, SliceScore, Verdict, judge, score_pair

MAX_PAIRS = 60
GAIN = 0.10


@dataclass(frozen=True)
class LevelReport:
    """What the judge did at one level. `pairs_to_promote`: median over the promoted with the true gain."""

    level: float
    false_promotions: Rate
    promotions_at_gain: Rate
    pairs_to_promote: float | None
    pair_sd: float

    @property
    def holds_level(self) -> bool:
        """Whether the interval of the false-promotion rate holds the level itself."""
        return self.false_promotions.low <= self.level <= self.false_promotions.high

    def to_dict(self) -> dict[str, Any]:
        return {
            "level": self.level,
            "false_promotions": {**self.false_promotions._asdict(), "ratio": self.false_promotions.ratio},
            "interval_contains_level": self.holds_level,
            "power_10_percent": {**self.promotions_at_gain._asdict(), "ratio": self.promotions_at_gain.ratio},
            "pairs_to_promote_median": self.pairs_to_promote,
            "pair_sd": self.pair_sd,
        }


def run_aa(
    num_experiments: int, levels: tuple[float, ...], seed: int, tell: Callable[[int], None] = lambda _: None
) -> list[LevelReport]:
    """One report a level; all levels see the same services. `tell` hears how many experiments are done."""
    rng = np.random.default_rng(seed)
    equal: dict[float, list[Verdict]] = {level: [] for level in levels}
    better: dict[float, list[Verdict]] = {level: [] for level in levels}
    squares = 0.0
    for chunk in simulate_pairs(rng, num_experiments, Slices(MAX_PAIRS)):
        effect = math.log1p(-GAIN)
        squares += float(((chunk.challenger - chunk.champion) ** 2).sum())
        faster = (
            chunk.champion + effect * chunk.champion_dose,
            chunk.challenger + effect * chunk.challenger_dose,
        )
        for level in levels:
            equal[level] += [
                run_experiment(*row, level) for row in zip(chunk.champion, chunk.challenger, strict=True)
            ]
            better[level] += [run_experiment(*row, level) for row in zip(*faster, strict=True)]
        tell(len(equal[levels[0]]))
    pair_sd = math.sqrt(squares / (num_experiments * MAX_PAIRS))
    return [_report(level, equal[level], better[level], pair_sd) for level in levels]


def run_experiment(champion: Floats, challenger: Floats, level: float) -> Verdict:
    """One experiment, asked at its looks until it ends. `champion`, `challenger`: [pairs] slice means."""
    rules = JudgeRules(alpha=level, max_pairs=MAX_PAIRS)
    pairs = [
        score_pair(index, "AB", SliceScore(200, ours), SliceScore(200, theirs))
        for index, (ours, theirs) in enumerate(zip(champion.tolist(), challenger.tolist(), strict=True))
    ]
    for num_pairs in range(rules.look_every, MAX_PAIRS + 1, rules.look_every):
        verdict = judge(pairs[:num_pairs], rules)
        if verdict.outcome is not Outcome.CONTINUE:
            break
    return verdict


def lord_level() -> float:
    """The level of the first experiment of a stream."""
    return Lord().level(1)


def _report(level: float, equal: list[Verdict], better: list[Verdict], pair_sd: float) -> LevelReport:
    promoted = [verdict.num_pairs for verdict in better if verdict.outcome is Outcome.PROMOTE]
    false = sum(verdict.outcome is Outcome.PROMOTE for verdict in equal)
    return LevelReport(
        level=level,
        false_promotions=Rate.of(false, len(equal)),
        promotions_at_gain=Rate.of(len(promoted), len(better)),
        pairs_to_promote=median(promoted) if promoted else None,
        pair_sd=pair_sd,
    )
