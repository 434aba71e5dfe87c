"""One engine as the front end sees it: its phase, its last gauges, and what it was given and still owes.

starting ──▶ ready ──▶ restarting ──▶ ready          ready ──(not needed any more)──▶ stopping
    └──────────┴──────────┴──▶ failed
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from runtime.link import Frame

Phase = Literal["starting", "ready", "restarting", "failed", "stopping"]

_NEARNESS: dict[Phase, int] = {"failed": 0, "stopping": 1, "starting": 2, "restarting": 3, "ready": 4}


@dataclass(eq=False, slots=True)
class Replica:
    """`send` hands a frame to the engine; frames sent while there is no engine are dropped.

    `outstanding_tokens`: over the requests that it was given and that are not over, the tokens that may still
    be made, and the prompt of those without a first token.
    """

    index: int
    phase: Phase = "starting"
    pid: int | None = None
    num_restarts: int = 0
    num_live: int = 0
    outstanding_tokens: int = 0
    gauges: dict[str, Any] = field(default_factory=dict)
    send: Callable[[Frame], None] = lambda frame: None

    def told(self) -> dict[str, Any]:
        """What the control routes say of it."""
        gauges = ("num_running", "num_waiting", "kv_used_tokens", "kv_total_tokens", "rss_bytes")
        return {
            "index": self.index, "pid": self.pid, "phase": self.phase, "num_restarts": self.num_restarts,
            "num_live": self.num_live, "outstanding_tokens": self.outstanding_tokens,
            **{name: self.gauges.get(name) for name in gauges},
        }  # fmt: skip


def least_loaded(replicas: Iterable[Replica], num_in_force: int) -> Replica | None:
    """Of the first `num_in_force` ready engines, the one that owes the fewest tokens; the first of equals.

    An engine in force that is down is stood in for by the next one that happens to be alive, so that as many
    serve as the configuration says wherever that is possible.
    """
    best: Replica | None = None
    for replica in replicas:
        if replica.phase != "ready":
            continue
        if best is None or replica.outstanding_tokens < best.outstanding_tokens:
            best = replica
        num_in_force -= 1
        if num_in_force <= 0:
            break
    return best


def group_phase(replicas: Iterable[Replica]) -> Phase:
    """What clients see: ready while any engine is, failed once all are."""
    best: Phase = "failed"
    for replica in replicas:  # asked for each request: the first engine mostly answers
        if replica.phase == "ready":
            return "ready"
        if _NEARNESS[replica.phase] > _NEARNESS[best]:
            best = replica.phase
    return best


def summed_gauges(replicas: Sequence[Replica]) -> dict[str, Any]:
    """Gauges of the group: numbers are added, ratios averaged, instants the latest, what is free the least; words
    are the first engine's."""
    told = [replica.gauges for replica in replicas if replica.gauges]
    if len(told) < 2:
        return dict(told[0]) if told else {}
    sums = dict(told[0])
    for name in {name for gauges in told for name in gauges} - {"version"}:
        values = [gauges[name] for gauges in told if _is_number(gauges.get(name))]
        if not values:
            continue
        if name == "at" or name.endswith("_at"):
            sums[name] = max(values)
        elif name.endswith("_free_bytes"):  # engines may share what is free
            sums[name] = min(values)
        else:
            sums[name] = sum(values) / (len(values) if name.endswith("_ratio") else 1)
    return sums


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
