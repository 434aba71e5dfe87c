"""The comparison of two configurations: what passes, what is refused, and that the bounds keep their promise."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest, t

from tuner.quality.canary import canary_set
from tuner.quality.comparison import (
    MIN_POSITIONS,
    QualityLimits,
    Scores,
    compare,
    mean_with_high,
    share_with_low,
)

LIMITS = QualityLimits(max_delta_nll=0.02, min_top1_agreement=0.95)
NUM_PASSAGES, LENGTH = 40, 25
DRAWS = 10_000


def scores(nll: np.ndarray, top1: np.ndarray) -> Scores:
    return Scores(nll.tolist(), top1.tolist())


def reference() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.exponential(3.0, (NUM_PASSAGES, LENGTH)), rng.integers(0, 500, (NUM_PASSAGES, LENGTH))


def test_a_configuration_equals_itself() -> None:
    nll, top1 = reference()
    found = compare(scores(nll, top1), scores(nll, top1), LIMITS)
    assert (found.delta_nll, found.delta_nll_high, found.top1_agreement) == (0.0, 0.0, 1.0)
    assert found.is_passed and found.top1_low == pytest.approx(0.05 ** (1 / 1000), abs=1e-12)
    assert found.num_positions == 1000 and found.num_passages == 40


def test_refuses_a_loss_over_the_limit_and_one_that_is_only_not_proven_to_be_under_it() -> None:
    nll, top1 = reference()
    worse = compare(scores(nll, top1), scores(nll + 0.021, top1), LIMITS)
    assert not worse.is_passed and worse.slack == pytest.approx(0.05) and "refused for loss" in worse.reason
    noise = np.random.default_rng(1).normal(0.0, 1.0, nll.shape)
    unsure = compare(scores(nll, top1), scores(nll + noise - noise.mean(), top1), LIMITS)
    assert abs(unsure.delta_nll) < 1e-9 and unsure.delta_nll_high > 0.02 and not unsure.is_passed


def test_refuses_another_top_token_too_often() -> None:
    nll, top1 = reference()
    other = top1.copy()
    other[::2, 0] += 1  # one position in 25 of every other passage: 2 % differ
    assert compare(scores(nll, top1), scores(nll, other), LIMITS).is_passed
    other[:, 1:3] += 1
    found = compare(scores(nll, top1), scores(nll, other), LIMITS)
    assert found.top1_agreement == pytest.approx(0.90) and not found.is_passed
    assert "refused for agreement" in found.reason


def test_a_gain_passes() -> None:
    nll, top1 = reference()
    assert compare(scores(nll, top1), scores(nll - 0.5, top1), LIMITS).is_passed


def test_refuses_output_that_is_no_number_at_a_single_position() -> None:
    nll, top1 = reference()
    spoilt = Scores(nll.tolist(), top1.tolist())
    spoilt.nll[3][7] = spoilt.top1[3][7] = None
    generous = QualityLimits(max_delta_nll=1.0, min_top1_agreement=0.5)
    found = compare(scores(nll, top1), spoilt, generous)
    assert not found.is_passed and math.isfinite(found.slack) and "no number at 1 position" in found.reason
    assert not compare(spoilt, spoilt, generous).is_passed, "nor does a broken reference vouch for anything"


def test_refuses_to_compare_other_texts_or_too_few() -> None:
    nll, top1 = reference()
    with pytest.raises(ValueError, match="same passages"):
        compare(scores(nll, top1), scores(nll[1:], top1[1:]), LIMITS)
    with pytest.raises(ValueError, match=str(MIN_POSITIONS)):
        compare(scores(nll[:15], top1[:15]), scores(nll[:15], top1[:15]), LIMITS)


# -- the bounds keep their promise ---------------------------------------------------------------------------------


def passages(rng: np.random.Generator, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Sums and lengths of [draws, passages] whose mean difference is 0, with a share common to each passage."""
    lengths = rng.integers(15, 60, (DRAWS, NUM_PASSAGES)).astype(float)
    common = {
        "normal": lambda: rng.normal(0.0, 1.0, lengths.shape),
        "skewed": lambda: rng.exponential(1.0, lengths.shape) - 1.0,
    }[kind]()
    own = 3.0 * rng.standard_normal(lengths.shape) / np.sqrt(lengths)
    return lengths * (common + own), lengths


@pytest.mark.parametrize(("kind", "least", "most"), [("normal", 0.940, 0.960), ("skewed", 0.920, 0.960)])
def test_the_bound_on_the_loss_covers_95_percent(kind: str, least: float, most: float) -> None:
    sums, lengths = passages(np.random.default_rng(20261123), kind)
    covered = sum(mean_with_high(s, n)[1] >= 0.0 for s, n in zip(sums, lengths, strict=True))
    interval = binomtest(covered, DRAWS).proportion_ci()
    print(f"{kind}: {covered / DRAWS:.2%} of {DRAWS} ({interval.low:.2%} to {interval.high:.2%})")
    assert least < interval.low and interval.high < most


def test_positions_as_units_would_break_the_promise() -> None:
    """Why the passage is the unit: the interval that takes positions for independent covers far too rarely."""
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(2000):
        values = rng.normal(0.0, 1.0, (NUM_PASSAGES, 1)) + 3.0 * rng.standard_normal((NUM_PASSAGES, LENGTH))
        error = values.std(ddof=1) / math.sqrt(values.size)
        covered += values.mean() + t.ppf(0.95, values.size - 1) * error >= 0.0
    assert covered / 2000 < 0.87


@pytest.mark.parametrize(("agreement", "least"), [(0.90, 0.94), (0.95, 0.94), (0.97, 0.94), (0.99, 0.93)])
def test_the_bound_on_agreement_covers_about_95_percent(agreement: float, least: float) -> None:
    rng = np.random.default_rng(20261123)
    lengths = rng.integers(15, 60, (DRAWS, NUM_PASSAGES))
    shares = rng.beta(agreement * 30, (1 - agreement) * 30, lengths.shape)  # passages differ in it
    hits = rng.binomial(lengths, shares)
    covered = sum(
        share_with_low(h.astype(float), n.astype(float))[1] <= agreement
        for h, n in zip(hits, lengths, strict=True)
    )
    interval = binomtest(covered, DRAWS).proportion_ci()
    print(f"{agreement:.0%}: {covered / DRAWS:.2%} of {DRAWS} ({interval.low:.2%} to {interval.high:.2%})")
    assert interval.low > least


def test_a_loss_at_the_limit_is_promoted_at_most_once_in_twenty() -> None:
    rng = np.random.default_rng(4)
    nll, top1 = reference()
    before = scores(nll, top1)
    passed = 0
    for _ in range(2000):
        loss = 0.02 + rng.normal(0.0, 0.02, (NUM_PASSAGES, 1)) + rng.normal(0.0, 0.1, nll.shape)
        passed += compare(before, scores(nll + loss, top1), LIMITS).is_passed
    assert binomtest(passed, 2000, 0.05, alternative="greater").pvalue > 0.01
    assert passed > 0, "the limit can be met by luck, or the test shows nothing"


# -- the canary set ------------------------------------------------------------------------------------------------


def test_the_canary_set_is_large_and_diverse_enough_for_any_tokenizer() -> None:
    shipped = canary_set()
    # A word begins a token in every tokenizer; the first token of a passage is not scored.
    assert (
        sum(len(passage.split()) for passage in shipped.passages) - len(shipped.passages) >= 2 * MIN_POSITIONS
    )
    assert len(shipped.passages) >= 48 and len(set(shipped.passages)) == len(shipped.passages)
    assert {"prose", "code", "numbers", "list", "german", "chinese"} <= set(shipped.kinds)
    assert max(map(len, shipped.passages)) < 400, "short passages: many units, short stalls"
