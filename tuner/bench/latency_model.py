"""A made-up service whose latency is as unkind as a real one's; benchmarks run the judge against it.

    ln latency = length + load(t) + drift(t) + episode(t) + noise + effect * treated(t)

    length    0.35 * standard normal: prompts differ
    load      Ornstein-Uhlenbeck, memory 120 s, sd 0.2: consecutive requests are anything but independent
    drift     a ramp of up to a quarter over two hours, and a swing of 0.15 every 90 minutes
    episode   in every second experiment ten minutes at +0.3: a noisy neighbour
    noise     Student t with 4 degrees of freedom, scale 0.35 / sqrt(2), and 2 % stalls of +1 to +3
    treated   the arm's state with a memory of 5 s: a switch takes effect gradually

Requests come as a Poisson process of 4 per second, modulated by exp(0.8 load). Those of one second share its
load; everything else is drawn per request, or in the exact law of its sum.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RATE_PER_S = 4.0
LENGTH_SD = 0.35
LOAD_TAU_S, LOAD_SD, LOAD_TO_RATE = 120.0, 0.2, 0.8
RAMP, SWING, SWING_S = 0.25, 0.15, 5400.0
EPISODE_CHANCE, EPISODE_S, EPISODE_RISE = 0.5, 600, 0.3
NOISE_SCALE = 0.35 / math.sqrt(2.0)  # times t(4), whose variance is 2
STALL_CHANCE, STALL_LOW, STALL_HIGH = 0.02, 1.0, 3.0
CARRY_OVER_S = 5.0


@dataclass(frozen=True)
class Slices:
    """How an experiment is cut: `num_pairs` pairs of slices of `slice_s`, the first `burn_in_s` not scored."""

    num_pairs: int = 60
    slice_s: int = 60
    burn_in_s: int = 10

    @property
    def num_seconds(self) -> int:
        return 2 * self.num_pairs * self.slice_s


def conditions(rng: np.random.Generator, num_experiments: int, num_seconds: int) -> tuple[Floats, Ints]:
    """[experiments, seconds] level of ln latency common to the requests of a second, and how many there are."""
    from scipy.signal import lfilter

    keep = math.exp(-1.0 / LOAD_TAU_S)
    shocks = rng.standard_normal((num_experiments, num_seconds)) * LOAD_SD * math.sqrt(1.0 - keep * keep)
    start = keep * LOAD_SD * rng.standard_normal((num_experiments, 1))
    load = lfilter([1.0], [1.0, -keep], shocks, axis=1, zi=start)[0]
    count = rng.poisson(RATE_PER_S * np.exp(LOAD_TO_RATE * load))
    second = np.arange(num_seconds)
    level = load + rng.uniform(-RAMP, RAMP, (num_experiments, 1)) * second / max(num_seconds, 7200)
    level += SWING * np.sin(2 * np.pi * second / SWING_S + rng.uniform(0, 2 * np.pi, (num_experiments, 1)))
    starts = rng.integers(0, max(1, num_seconds - EPISODE_S), (num_experiments, 1))
    hit = rng.random((num_experiments, 1)) < EPISODE_CHANCE
    level += EPISODE_RISE * (hit & (second >= starts) & (second < starts + EPISODE_S))
    return level, count


def request_noise(rng: np.random.Generator, num_requests: int) -> Floats:
    """[requests] what differs from one request to the next: length, noise, stalls."""
    scale = np.sqrt(LENGTH_SD**2 + NOISE_SCALE**2 * 2.0 / rng.standard_gamma(2.0, num_requests))
    noise = rng.standard_normal(num_requests) * scale
    stalled = np.flatnonzero(rng.random(num_requests) < STALL_CHANCE)
    noise[stalled] += rng.uniform(STALL_LOW, STALL_HIGH, stalled.size)
    return noise


def summed_noise(rng: np.random.Generator, counts: Ints) -> Floats:
    """The sums of `request_noise` over groups of these sizes (each at least 1), in their exact law.

    A t(4) variable is a normal one with a random scale; given the scales, a sum of normals is normal.
    """
    ends = np.cumsum(counts)
    inverse_gammas = np.add.reduceat(1.0 / rng.standard_gamma(2.0, int(ends[-1])), ends - counts)
    noise = rng.standard_normal(counts.size) * np.sqrt(
        LENGTH_SD**2 * counts + NOISE_SCALE**2 * 2.0 * inverse_gammas
    )
    stalls = rng.binomial(counts, STALL_CHANCE)
    lengths = rng.uniform(STALL_LOW, STALL_HIGH, int(stalls.sum()))
    owner = np.repeat(np.arange(counts.size), stalls)
    return np.asarray(noise + np.bincount(owner, weights=lengths, minlength=counts.size))


def treated(coins: Ints, slices: Slices) -> Floats:
    """[experiments, slices, seconds of a slice] how far the challenger is in force, 0 to 1.

    `coins`: [experiments, pairs], 1 where the challenger goes first.
    """
    arms = np.stack((coins, 1 - coins), axis=2).reshape(len(coins), -1).astype(float)
    before = np.concatenate((np.zeros((len(coins), 1)), arms[:, :-1]), axis=1)
    fading = np.exp(-np.arange(1, slices.slice_s + 1) / CARRY_OVER_S)
    return np.asarray(arms[:, :, None] + (before - arms)[:, :, None] * fading)


@dataclass(frozen=True)
class PairSums:
    """[experiments, pairs] slice means of ln latency when both arms are equal, and the challenger's dose in each.

    A challenger of effect x (log units) has `challenger + x * challenger_dose`; so for the champion.
    """

    champion: Floats
    challenger: Floats
    champion_dose: Floats
    challenger_dose: Floats
    num_requests: Floats  # per slice, mean of the two


def simulate_pairs(rng: np.random.Generator, num_experiments: int, slices: Slices) -> Iterator[PairSums]:
    """Experiments in chunks of up to 100, as slice means in the exact law of the request-level model."""
    for start in range(0, num_experiments, 100):
        yield _pair_chunk(rng, min(100, num_experiments - start), slices)


def _pair_chunk(rng: np.random.Generator, num_experiments: int, slices: Slices) -> PairSums:
    coins = rng.integers(0, 2, (num_experiments, slices.num_pairs))
    level, count = conditions(rng, num_experiments, slices.num_seconds)
    shape = (num_experiments, 2 * slices.num_pairs, slices.slice_s)
    level, count = (
        level.reshape(shape)[..., slices.burn_in_s :],
        count.reshape(shape)[..., slices.burn_in_s :],
    )
    number = np.maximum(count.sum(axis=2), 1)
    dose = (count * treated(coins, slices)[..., slices.burn_in_s :]).sum(axis=2) / number
    mean = ((count * level).sum(axis=2) + summed_noise(rng, number.ravel()).reshape(number.shape)) / number

    def arm(values: Floats, challenger: int) -> Floats:
        first, second = values[:, 0::2], values[:, 1::2]
        return np.where(coins == challenger, first, second)

    pair_number = 0.5 * (number[:, 0::2] + number[:, 1::2])
    return PairSums(arm(mean, 0), arm(mean, 1), arm(dose, 0), arm(dose, 1), pair_number)


BASE_LATENCY_S = 1.5  # seconds at ln latency 0


@dataclass(frozen=True)
class WatchedSlices:
    """[experiments, slices, seconds] what an engine's counters show at the end of each second of every slice.

    Over requests that arrived after the burn-in: how many finished, sum and sum of squares of their ln(e2e), how
    many are pending, sum of ln(age) of those. `final_mean`: [experiments, slices] when all have finished.
    """

    num_finished: Floats
    sum_log: Floats
    sumsq_log: Floats
    num_pending: Floats
    sum_log_pending_age: Floats
    final_mean: Floats


def simulate_watched(rng: np.random.Generator, doses: Floats, slices: Slices, effect: float) -> WatchedSlices:
    """Request by request. `doses`: as `treated` returns; `effect`: log units by which the challenger is slower."""
    num_experiments = len(doses)
    level, count = conditions(rng, num_experiments, slices.num_seconds)
    level = level + effect * doses.reshape(level.shape)
    cell = np.repeat(np.arange(count.size), count.ravel())
    second = cell % slices.slice_s
    kept = second >= slices.burn_in_s
    cell, second = cell[kept], second[kept]
    log_latency = level.ravel()[cell] + request_noise(rng, cell.size) + math.log(BASE_LATENCY_S)
    arrived = second + rng.random(cell.size)
    finished = np.minimum(np.ceil(arrived + np.exp(log_latency)), slices.slice_s + 1).astype(np.int64)
    group = cell // slices.slice_s
    shape = (num_experiments, 2 * slices.num_pairs, slices.slice_s)
    num_groups, width = shape[0] * shape[1], slices.slice_s + 2

    def by_finish(weights: Floats | None) -> Floats:
        sums = np.bincount(group * width + finished, weights=weights, minlength=num_groups * width)
        return np.cumsum(sums.reshape(-1, width)[:, 1 : slices.slice_s + 1], axis=1, dtype=float).reshape(
            shape
        )

    first_look = np.floor(arrived).astype(np.int64) + 1
    looks = np.maximum(finished - first_look, 0)  # ends of seconds at which the request is pending
    of = np.repeat(np.arange(cell.size), looks)
    look = first_look[of] + np.arange(of.size) - np.repeat(np.cumsum(looks) - looks, looks)
    where = group[of] * slices.slice_s + look - 1
    ages = np.log(np.maximum(look - arrived[of], 1e-3))
    num_cells = num_groups * slices.slice_s
    total = np.maximum(np.bincount(group, minlength=num_groups), 1)
    mean = np.bincount(group, weights=log_latency, minlength=num_groups) / total
    return WatchedSlices(
        num_finished=by_finish(None),
        sum_log=by_finish(log_latency),
        sumsq_log=by_finish(log_latency**2),
        num_pending=np.bincount(where, minlength=num_cells).reshape(shape).astype(float),
        sum_log_pending_age=np.bincount(where, weights=ages, minlength=num_cells)
        .astype(float)
        .reshape(shape),
        final_mean=mean.reshape(shape[:2]),
    )
