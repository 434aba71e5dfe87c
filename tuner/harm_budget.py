"""What experiments may cost in a day, and what they did cost. Pure.

The unit is the request-second: one request that took one second longer. The budget of a day is a share of
all the time that requests spend in the system, so that it grows with traffic and with latency alike.

    excess of an experiment = sum over requests of the challenger's slices - as many times the champion's mean

Both from the same experiment, where the coin gave both arms the same hours; burn-in, void slices and
slices that were stopped count. What a challenger's backlog costs the champion's next slice makes both means
longer and is seen only in part. Noise alone is never negative harm: an experiment costs at least nothing.
"""

from dataclasses import dataclass

from store.evidence import RequestSeconds

DAY_S = 86_400.0


@dataclass(frozen=True)
class HarmDone:
    """Request-seconds that challengers' slices took beyond the champion's; `num_requests` is how many they served."""

    excess_s: float
    num_requests: int
    champion_mean_s: float | None


def harm_done(
    champion: RequestSeconds, challenger: RequestSeconds, past_mean_s: float | None = None
) -> HarmDone:
    """What both arms' slices took. `past_mean_s` stands in where the champion had no slice yet."""
    reference_s = champion.total_s / champion.num if champion.num else past_mean_s
    if reference_s is None or not challenger.num:
        return HarmDone(0.0, challenger.num, reference_s)
    return HarmDone(max(0.0, challenger.total_s - challenger.num * reference_s), challenger.num, reference_s)


@dataclass(frozen=True)
class HarmLedger:
    """Of the last day, in request-seconds."""

    budget_s: float
    spent_s: float

    @property
    def is_spent(self) -> bool:
        return self.spent_s >= self.budget_s > 0.0

    @property
    def words(self) -> str:
        share = self.spent_s / self.budget_s if self.budget_s > 0.0 else 0.0
        spent = f"{self.spent_s:.0f} of {self.budget_s:.0f} request-seconds"
        return f"{share:.0%} of the day's harm budget is spent ({spent})"


def day_budget_s(share: float, request_seconds: float, span_s: float) -> float:
    """`request_seconds` spent in the system during `span_s`, carried over to a day."""
    return share * request_seconds / max(span_s, 1.0) * DAY_S
