"""Does a configuration still say what the reference says? A paired comparison of known tokens. Pure.

Both configurations read the same passages, teacher-forced: at every position the model has seen the true text
so far, and what counts is the probability that it gave the true next token. So every position is a pair, and
what the passages have in common (hard words, easy ones) cancels.

Positions of one passage are not independent: a layer that was quantised badly is wrong all along a passage of
numbers and right all along a passage of prose. The unit of every interval is therefore the passage, and the
number of positions only weighs it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, stdtrit

CONFIDENCE = 0.95  # of each of the two one-sided bounds
MIN_POSITIONS = 400
MIN_PASSAGES = 8  # with fewer the spread between passages is a guess
NO_NUMBER_NLL = 20.0  # nats that a position counts where the output was no number: a probability of 2e-9

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """What one configuration made of the passages.

    `nll[passage][position]`: nats; `top1`: the likeliest token there. Both None where the output was no number.
    """

    nll: Sequence[Sequence[float | None]]
    top1: Sequence[Sequence[int | None]]

    @property
    def num_positions(self) -> int:
        return sum(len(passage) for passage in self.nll)


@dataclass(frozen=True)
class QualityLimits:
    """How much worse than the reference still counts as equal: nats a token, share of positions."""

    max_delta_nll: float
    min_top1_agreement: float


@dataclass(frozen=True)
class Comparison:
    """A configuration against the reference. `*_high` and `*_low` are one-sided 95 % bounds towards harm.

    `delta_nll`: mean over positions of the negative log-likelihood less the reference's, nats a token; positive is
    worse. `top1_agreement`: share of positions where both find the same token likeliest. `slack`: by how much the
    limits are missed, as a share of the limit; at most 0 where both are met.
    """

    num_positions: int
    num_passages: int
    delta_nll: float
    delta_nll_high: float
    top1_agreement: float
    top1_low: float
    slack: float
    reason: str

    @property
    def is_passed(self) -> bool:
        return self.slack <= 0.0


def compare(reference: Scores, candidate: Scores, limits: QualityLimits) -> Comparison:
    """Non-inferiority: passed where the whole of both intervals lies on the right side of its limit.

    That way round, too little evidence refuses: "not shown to be worse" is no proof of "as good".

    Raises:
        ValueError: the two were not made from the same passages, or from too few.
    """
    lengths = [len(passage) for passage in reference.nll]
    if lengths != [len(passage) for passage in candidate.nll]:
        raise ValueError(
            "Reference and candidate must have scored the same passages, but their lengths differ."
        )
    if sum(lengths) < MIN_POSITIONS or len(lengths) < MIN_PASSAGES:
        raise ValueError(
            f"A comparison needs at least {MIN_POSITIONS} positions in {MIN_PASSAGES} passages, "
            f"but got {sum(lengths)} in {len(lengths)}."
        )
    weights = np.array(lengths, float)
    pairs = list(zip(reference.top1, candidate.top1, strict=True))
    hits = [
        sum(one == other is not None for one, other in zip(before, after, strict=True))
        for before, after in pairs
    ]
    agreement, agreement_low = share_with_low(np.array(hits, float), weights)
    sums = [_loss(after) - _loss(before) for before, after in zip(reference.nll, candidate.nll, strict=True)]
    delta, high = mean_with_high(np.array(sums), weights)
    num_bad = sum(value is None for passage in (*candidate.nll, *reference.nll) for value in passage)
    slack = max(_over(high, limits.max_delta_nll), _under(agreement_low, limits.min_top1_agreement))
    slack = max(slack, 1.0) if num_bad else slack
    reason = _words(delta, high, agreement, agreement_low, limits, num_bad)
    return Comparison(sum(lengths), len(lengths), delta, high, agreement, agreement_low, slack, reason)


def _loss(passage: Sequence[float | None]) -> float:
    return math.fsum(NO_NUMBER_NLL if value is None else value for value in passage)


def mean_with_high(sums: Floats, lengths: Floats) -> tuple[float, float]:
    """The mean over all positions, and the upper end of its one-sided 95 % interval.

    sums, lengths: [passages] of the differences in a passage, and its positions. The mean is a ratio of two sums
    over passages; its spread is that of the residuals `sums - mean * lengths` (the passage is drawn, not the
    position), with Student's t on passages - 1 degrees of freedom.

    A few passages that suffer much more than the others skew the mean, and then t promises too much (91 instead
    of 95 % at 36 passages with exponential means). Hall's cubic transformation takes the skewness out; the larger
    of the two ends counts.

    Source: the ratio estimator and its variance, Cochran, Sampling Techniques (1977), 6.3 and 9A.7; the
    transformation, Hall, On the removal of skewness by transformation, JRSS B 54 (1992) 221-228, inverted at -t.
    """
    num = len(sums)
    mean = float(sums.sum() / lengths.sum())
    residuals = sums - mean * lengths
    square = float((residuals**2).sum())
    if square == 0.0:
        return mean, mean
    error = math.sqrt(num / (num - 1) * square) / float(lengths.sum())
    t = float(stdtrit(num - 1, CONFIDENCE))
    skewness = float((residuals**3).sum() / num / (square / num) ** 1.5)
    return mean, mean + error * max(t, _unskewed(t, skewness / math.sqrt(num)))


def _unskewed(t: float, scaled_skewness: float) -> float:
    """How many standard errors above the mean the upper end lies, in Hall's transformation."""
    a = scaled_skewness
    if abs(a) < 1e-9:
        return t
    inner = 1.0 + a * (-t - a / 6.0)
    return float(3.0 / a * (1.0 - np.cbrt(inner)))


def share_with_low(hits: Floats, lengths: Floats) -> tuple[float, float]:
    """The share of positions that agree, and the lower end of its one-sided 95 % interval.

    hits, lengths: [passages]. Shares near 1 have no normal interval, so this is Clopper and Pearson's with as many
    positions as the passages are worth: positions that err together are worth fewer. Where nothing differs the
    spread between passages says nothing, and all positions count. Passages that differ much from the others make
    that end too high (92.9 instead of 95 % at 40 passages), so the one of `mean_with_high` counts where it is lower.

    Source: Korn and Graubard, Confidence intervals for proportions with small expected number of positive counts
    estimated from survey data, Survey Methodology 24 (1998) 193-201.
    """
    num, total = len(hits), float(lengths.sum())
    share = float(hits.sum() / total)
    residuals = hits - share * lengths
    variance = num / (num - 1) * float((residuals**2).sum()) / total**2
    effective = total
    if variance > 0.0:
        by_passage = share * (1.0 - share) / variance
        degrees = float(stdtrit(total - 1, CONFIDENCE) / stdtrit(num - 1, CONFIDENCE)) ** 2
        effective = min(total, by_passage * degrees)
    agreeing = share * effective
    if agreeing <= 0.0:
        return share, 0.0
    low = float(betaincinv(agreeing, effective - agreeing + 1.0, 1.0 - CONFIDENCE))
    return share, min(low, 1.0 - mean_with_high(lengths - hits, lengths)[1])


def _over(value: float, limit: float) -> float:
    """By how much a value exceeds its limit, as a share of the limit (of a millinat where the limit is 0)."""
    return (value - limit) / max(limit, 1e-3)


def _under(value: float, limit: float) -> float:
    return (limit - value) / max(1.0 - limit, 1e-3)


def _words(
    delta: float, high: float, agreement: float, low: float, limits: QualityLimits, num_bad: int
) -> str:
    loss = f"Loss {delta:+.4f} nats a token (at most {high:+.4f} with 95 % confidence, limit {limits.max_delta_nll:g})"
    same = f"same token {agreement:.1%} (at least {low:.1%}, limit {limits.min_top1_agreement:.1%})"
    failed = ["loss"] if high > limits.max_delta_nll else []
    failed += ["agreement"] if low < limits.min_top1_agreement else []
    failed += [f"output that is no number at {num_bad} positions"] if num_bad else []
    return f"{loss}, {same}: {'refused for ' + ' and '.join(failed) if failed else 'holds'}."
