"""Running sums a slice, for the guardrail that reads them every second: latency of the requests that ARRIVED in it.

Requests are counted from the end of the slice's burn-in. Requests outside slices are kept by the second of their
arrival, so that the last minute can be summed at any instant.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

OUTSIDE = ""  # the key of requests that arrived in no slice
OUTSIDE_WINDOW_S = 60
KEPT_SLICES = 4  # the one in force and the three before it
SHORTEST_S = 1e-6  # a logarithm needs a positive duration


@dataclass
class SliceStats:
    """Sums over the requests that arrived in one slice after its burn-in (or in one second outside slices)."""

    num_arrived: int = 0
    num_finished: int = 0
    num_errors: int = 0
    num_aborted: int = 0
    num_first_tokens: int = 0
    sum_log_e2e: float = 0.0
    sumsq_log_e2e: float = 0.0
    pending: dict[str, float] = field(default_factory=dict)  # request id -> arrived_at

    def arrived(self, request_id: str, at: float) -> None:
        self.num_arrived += 1
        self.pending[request_id] = at

    def first_token(self) -> None:
        self.num_first_tokens += 1

    def finished(self, request_id: str, e2e_s: float) -> None:
        if self.pending.pop(request_id, None) is None:
            return
        log_e2e = math.log(max(e2e_s, SHORTEST_S))
        self.num_finished += 1
        self.sum_log_e2e += log_e2e
        self.sumsq_log_e2e += log_e2e * log_e2e

    def failed(self, request_id: str) -> None:
        if self.pending.pop(request_id, None) is not None:
            self.num_errors += 1

    def aborted(self, request_id: str) -> None:
        """The client left: neither a latency nor an error."""
        if self.pending.pop(request_id, None) is not None:
            self.num_aborted += 1


def summed(parts: list[SliceStats], now: float) -> dict[str, Any]:
    """Returns the sums over all parts; ages are those of requests without an end, at `now`."""
    ages = [max(now - at, SHORTEST_S) for part in parts for at in part.pending.values()]
    return {
        "num_arrived": sum(part.num_arrived for part in parts),
        "num_finished": sum(part.num_finished for part in parts),
        "num_errors": sum(part.num_errors for part in parts),
        "num_aborted": sum(part.num_aborted for part in parts),
        "num_first_tokens": sum(part.num_first_tokens for part in parts),
        "sum_log_e2e": sum(part.sum_log_e2e for part in parts),
        "sumsq_log_e2e": sum(part.sumsq_log_e2e for part in parts),
        "num_pending": len(ages),
        "oldest_pending_s": max(ages, default=None),
        "sum_log_pending_age": sum(math.log(age) for age in ages),
    }


class Arrival(NamedTuple):
    slice_id: str | None  # the slice in force, its burn-in included
    stats: SliceStats | None  # None in a burn-in, which nobody judges


@dataclass
class SliceLedger:
    """Knows the slice in force and the sums of the last few."""

    _slices: OrderedDict[str, SliceStats] = field(default_factory=OrderedDict)
    _outside: dict[int, SliceStats] = field(default_factory=dict)  # second of arrival -> sums
    _current_id: str | None = None
    _scored_from_at: float = 0.0
    _end_at: float = math.inf

    def start(self, slice_id: str, start_at: float, end_at: float, burn_in_s: float) -> None:
        self._current_id, self._scored_from_at, self._end_at = slice_id, start_at + burn_in_s, end_at
        self._slices.setdefault(slice_id, SliceStats())
        while len(self._slices) > KEPT_SLICES:
            self._slices.popitem(last=False)

    def end(self, slice_id: str | None = None) -> None:
        """Ends the slice named, or whichever is in force."""
        if slice_id is None or slice_id == self._current_id:
            self._current_id = None

    def arrival(self, at: float) -> Arrival:
        """Returns where a request that arrives at `at` is counted. Past the planned end it belongs to no slice,
        although the engine may still be busy with the slice's last step."""
        if self._current_id is None or at >= self._end_at:
            return Arrival(None, self._outside_at(at))
        scored = at >= self._scored_from_at
        return Arrival(self._current_id, self._slices[self._current_id] if scored else None)

    def snapshot(self, now: float) -> dict[str, dict[str, Any]]:
        recent = [stats for second, stats in self._outside.items() if second > now - OUTSIDE_WINDOW_S]
        sums = {slice_id: summed([stats], now) for slice_id, stats in self._slices.items()}
        return {OUTSIDE: summed(recent, now), **sums}

    def _outside_at(self, at: float) -> SliceStats:
        second = int(at)
        if second not in self._outside:
            self._outside[second] = SliceStats()
            for old in [key for key in self._outside if key < second - OUTSIDE_WINDOW_S]:
                del self._outside[old]
        return self._outside[second]
