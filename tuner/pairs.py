"""An experiment's rules, and its pairs between the rows of the store and the judge. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from store.tables import Experiment, Slice, Verdict
from tuner.judging.coin import Coin, Order
from tuner.judging.judge import GuardrailResult, JudgeRules, Outcome, PairScore, SliceScore, score_pair
from tuner.judging.judge import Verdict as Judgement
from tuner.judging.objective import Metric, SLOLimit, Timing


@dataclass(frozen=True)
class ExperimentRules:
    """Fixed before the first pair and stored with the experiment. Durations in s, shares as ratios."""

    metric: Metric
    level: float
    max_pairs: int
    look_every: int
    min_effect: float
    slice_s: float
    burn_in_s: float
    settle_s: float
    lease_s: float
    min_requests: int
    slos: Sequence[Mapping[str, Any]]  # metric, statistic, limit
    max_error_ratio: float
    error_min_requests: int
    pair_sd: float
    champion_means: Sequence[
        float
    ] = ()  # mean ln(e2e) of the champion's neighbouring windows before the experiment
    champion_slowest_s: float = 0.0
    is_holdback: bool = False  # the challenger is the former champion, known to be slower: no harm rule
    max_wall_s: float = 14400.0  # from its opening; then it ends without a winner
    adjustment: str = "none"  # what is subtracted from a slice: "twin", "covariates" or "none"

    def slo_limits(self) -> list[SLOLimit]:
        return [SLOLimit(**slo) for slo in self.slos]

    def judge_rules(self) -> JudgeRules:
        return JudgeRules(
            alpha=self.level,
            max_pairs=self.max_pairs,
            look_every=self.look_every,
            min_effect=self.min_effect,
            harm_pair_sd=self.pair_sd,
        )


def planned_pair(
    experiment: Experiment, rules: ExperimentRules, pair_index: int, coin: Coin, start_at: float, boot_id: str
) -> list[Slice]:
    arms = ("champion", "challenger") if coin.order == "AB" else ("challenger", "champion")
    config_ids = {"champion": experiment.champion_config_id, "challenger": experiment.challenger_config_id}
    return [
        Slice(
            slice_id=f"{experiment.experiment_id}-{pair_index}-{arm}",
            experiment_id=experiment.experiment_id,
            pair_index=pair_index,
            position=position,
            arm=arm,
            config_id=config_ids[arm],
            coin=coin.value,
            coin_hash=coin.coin_hash,
            planned_start_at=start_at + position * rules.slice_s,
            planned_end_at=start_at + (position + 1) * rules.slice_s,
            burn_in_s=rules.burn_in_s,
            state="PLANNED",
            boot_id=boot_id,
            stats={"coin_salt": coin.salt},
        )
        for position, arm in enumerate(arms)
    ]


MAX_SETTLE_S = 60.0
MANY_PENDING = 0.1  # share of a slice's requests that may be judged by their age alone


def plan_id_of(row: Slice) -> str:
    return f"{row.experiment_id}-{row.pair_index}"


def settle_s(rules: ExperimentRules, stats: Sequence[Mapping[str, Any]]) -> float:
    """How long after its end a pair may wait for its last requests.

    Not at all once every request ended. While many are under way their ages would measure which slice came
    first, not which was faster: then up to twice the champion's slowest request.
    """
    pending = sum(one.get("num_pending") or 0 for one in stats)
    if not pending:
        return 0.0
    if pending > MANY_PENDING * max(1, sum(one.get("num_arrived") or 0 for one in stats)):
        return max(rules.settle_s, min(MAX_SETTLE_S, 2.0 * rules.champion_slowest_s))
    return rules.settle_s


def pairs_of(slices: Sequence[Slice]) -> list[list[Slice]]:
    by_index: dict[int, list[Slice]] = {}
    for row in sorted(slices, key=lambda row: (row.pair_index, row.position)):
        by_index.setdefault(row.pair_index, []).append(row)
    return list(by_index.values())


def scored_pairs(slices: Sequence[Slice]) -> list[PairScore]:
    """The valid pairs in their order, as the judge wants them."""
    scored = []
    for pair in pairs_of(slices):
        if any(row.state != "SCORED" for row in pair):
            continue
        arms = {row.arm: row for row in pair}
        order: Order = "BA" if pair[0].coin else "AB"
        scored.append(
            score_pair(pair[0].pair_index, order, score_of(arms["champion"]), score_of(arms["challenger"]))
        )
    return scored


def score_of(row: Slice) -> SliceScore:
    """Raises ValueError for a slice that was not scored."""
    stats = row.stats
    if row.num_requests is None or row.measured is None:
        raise ValueError(f"Slice {row.slice_id} is {row.state}: it has no score.")
    return SliceScore(
        num_requests=row.num_requests,
        mean_log_latency=row.measured,
        mean_log_twin=row.predicted,
        requests_per_s=stats["rate_per_s"],
        mean_prompt_tokens=stats["prompt_tokens_mean"],
        mean_output_tokens=stats["output_tokens_mean"],
    )


def timing_of(row: Any) -> Timing:
    return Timing(
        row.request_id,
        row.arrived_at,
        row.prompt_tokens,
        row.output_tokens,
        row.first_token_at,
        row.finished_at,
        row.finish_reason,
    )


def ages_of(stats: Mapping[str, Any]) -> list[float]:
    """Ages whose mean logarithm is that of the requests still under way: all that the score needs of them."""
    num_pending = stats.get("num_pending", 0)
    if not num_pending:
        return []
    return [math.exp(stats["sum_log_pending_age"] / num_pending)] * num_pending


def guardrails(
    slices: Sequence[Slice], rules: ExperimentRules, max_error_ratio: float
) -> list[GuardrailResult]:
    """What a promotion must meet besides the gain, over all scored slices of the challenger."""
    by_arm = {
        arm: [row for row in slices if row.arm == arm and row.state == "SCORED"]
        for arm in ("champion", "challenger")
    }
    results = [errors_guardrail(by_arm, max_error_ratio)]
    p95 = {arm: mean_of(rows, "p95_s") for arm, rows in by_arm.items()}
    if p95["champion"] and p95["challenger"]:
        ratio = p95["challenger"] / p95["champion"]
        results.append(
            GuardrailResult(
                "p95 not worse", ratio <= 1.05, f"p95 is {ratio - 1:+.1%} against the champion (limit +5 %)"
            )
        )
    for slo in rules.slo_limits():
        results += slo_guardrail(slo, by_arm)
    return results


def slo_guardrail(slo: SLOLimit, by_arm: Mapping[str, Sequence[Slice]]) -> list[GuardrailResult]:
    """Within the SLO, or where the champion breaches it already, no worse than the champion. Empty: not seen."""
    seen = {}
    for arm, rows in by_arm.items():
        values = [row.stats["slos"][slo.name] for row in rows if slo.name in row.stats.get("slos", {})]
        if not values:
            return []
        seen[arm] = fmean(values)
    passed = seen["challenger"] <= max(slo.allowed, seen["champion"])
    detail = f"{seen['challenger']:.3g} seen, {slo.allowed:.3g} allowed, champion {seen['champion']:.3g}"
    return [GuardrailResult(f"SLO {slo.name}", passed, detail)]


def errors_guardrail(by_arm: Mapping[str, Sequence[Slice]], max_error_ratio: float) -> GuardrailResult:
    share = {}
    for arm, rows in by_arm.items():
        num_requests = sum(row.num_requests or 0 for row in rows)
        share[arm] = sum(row.num_errors or 0 for row in rows) / num_requests if num_requests else 0.0
    limit = share["champion"] + max_error_ratio
    detail = f"{share['challenger']:.2%} of requests failed, champion {share['champion']:.2%}"
    return GuardrailResult("errors", share["challenger"] <= limit, detail)


def mean_of(rows: Sequence[Slice], key: str) -> float | None:
    values = [row.stats[key] for row in rows if row.stats.get(key) is not None]
    return fmean(values) if values else None


def verdict_row(
    experiment: Experiment,
    outcome: Outcome,
    reason: str,
    judgement: Judgement,
    pairs: Sequence[PairScore],
    rules: ExperimentRules,
    now: float,
) -> Verdict:
    return Verdict(
        experiment_id=experiment.experiment_id,
        decided_at=now,
        outcome=str(outcome),
        reason=reason,
        effect_ratio=judgement.effect_ratio,
        interval_low_ratio=judgement.interval_low_ratio,
        interval_high_ratio=judgement.interval_high_ratio,
        num_pairs=judgement.num_pairs,
        p_value=judgement.p_value,
        level=rules.level,
        evidence={
            "pairs": [asdict(pair) for pair in pairs],
            "judgement": judgement.to_dict(),
            "rules": asdict(rules),
        },
    )
