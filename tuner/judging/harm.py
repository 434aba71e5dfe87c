"""Stops a challenger that is much worse, within seconds, on what the engine counts. Pure; asked every second.

The running slice of the challenger is compared with the champion's latest slice. Two rules:

    slower   the mean ln(latency) so far exceeds the champion's by more than `z` standard deviations. Unfinished
             requests count with their age where that makes the mean larger: a lower bound of what they will
             take, so an arm cannot look fast by not finishing.
    stalled  the oldest unfinished request is older than `stall_factor` times the champion's slowest.

The price of being fast is false stops, so the strictness is spent where it buys most: a challenger that is
twice as slow shows it in its first slices. There a small z suffices to stop; a challenger that passed them
needs a large one, or the judge's e-value, which gathers evidence over pairs. The benchmark `harm` prints
both sides: false stops of equal challengers per experiment, and seconds until a slow one is stopped.

The sd is measured on the champion, not assumed: how much its mean changes from one slice to the next, or
to the one after that, which is `harm_reference`'s `lag`. Latency drifts, so a far reference is a poor one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

MIN_CHANGES = 5  # changes between champion windows below which their spread is not known
FLOOR_SD = 0.05  # log units; no latency is steadier than this for long


@dataclass(frozen=True)
class SliceWatch:
    """The challenger's slice so far, over requests that arrived after its burn-in. Latencies e2e, in seconds."""

    scored_s: float
    num_finished: int
    sum_log: float
    sumsq_log: float
    num_pending: int = 0
    sum_log_pending_age: float = 0.0
    oldest_pending_s: float | None = None


@dataclass(frozen=True)
class HarmReference:
    """The champion's mean ln(latency) now, and the sd of a whole slice's mean around it.

    `num_challenger_slices`: slices of this challenger that ended without a stop; None (not known) counts as many.
    """

    mean_log: float
    sd_slice_mean: float
    slowest_s: float | None = None  # the champion's slowest request known
    num_challenger_slices: int | None = None


def harm_reference(
    past_means: Sequence[float],
    latest_mean: float,
    lag: int,
    num_challenger_slices: int | None = None,
    slowest_s: float | None = None,
) -> HarmReference | None:
    """`past_means`: mean ln(latency) of neighbouring champion windows as long as a slice, before the experiment.

    `lag` counts slices from that of `latest_mean` to the challenger's: 1 when they are neighbours. None where fewer
    than five changes over that lag are known.
    """
    changes = [later - earlier for earlier, later in zip(past_means, past_means[lag:], strict=False)]
    if len(changes) < MIN_CHANGES:
        return None
    # Few changes may be small by luck; the more they overlap, the fewer they are.
    variance = fmean(change * change for change in changes) * (1.0 + 2.0 * lag / len(changes))
    return HarmReference(latest_mean, max(FLOOR_SD, math.sqrt(variance)), slowest_s, num_challenger_slices)


@dataclass(frozen=True)
class HarmRule:
    """Limits of the two rules; z in standard deviations. A mean is believed from `min_requests` finished on."""

    first_z: float = 2.4
    second_z: float = 2.8
    later_z: float = 4.6
    min_requests: int = 20
    stall_factor: float = 4.0
    min_stall_s: float = 10.0

    def breach(self, seen: SliceWatch, reference: HarmReference) -> str | None:
        """Why the challenger must stop now, in words, or None."""
        if reference.slowest_s is not None and seen.oldest_pending_s is not None:
            limit_s = max(self.min_stall_s, self.stall_factor * reference.slowest_s)
            if seen.oldest_pending_s > limit_s:
                return (
                    f"A request has been unfinished for {seen.oldest_pending_s:.0f} s under the challenger; the "
                    f"champion's slowest took {reference.slowest_s:.1f} s (limit {limit_s:.0f} s)."
                )
        if seen.num_finished < self.min_requests:
            return None
        excess, sd = self.excess(seen, reference)
        limit = self.z_limit(reference.num_challenger_slices)
        if excess <= limit * sd:
            return None
        return (
            f"Latency under the challenger is {math.exp(excess):.1f} times the champion's over {seen.num_finished} "
            f"requests in {seen.scored_s:.0f} s: {excess / sd:.1f} standard deviations (limit {limit:.1f})."
        )

    def z_limit(self, num_challenger_slices: int | None) -> float:
        if num_challenger_slices == 0:
            return self.first_z
        return self.second_z if num_challenger_slices == 1 else self.later_z

    def excess(self, seen: SliceWatch, reference: HarmReference) -> tuple[float, float]:
        """By how much the slice exceeds the champion so far, and the sd of that; log units."""
        mean = seen.sum_log / seen.num_finished
        variance = max(0.0, seen.sumsq_log / seen.num_finished - mean * mean)
        num_all = seen.num_finished + seen.num_pending
        mean_of_all = (seen.sum_log + seen.sum_log_pending_age) / num_all
        sd = math.sqrt(reference.sd_slice_mean**2 + variance / seen.num_finished)
        return max(mean, mean_of_all) - reference.mean_log, sd
