"""Who comes next, and who gives way: the order that the knob `policy` asks for. Pure.

| policy             | admitted first                                        |
| ------------------ | ----------------------------------------------------- |
| `fcfs`             | who has waited longest                                |
| `shortest_prefill` | the fewest tokens to compute                          |
| `longest_prefix`   | the most tokens in the prefix cache, as SGLang's `lpm` |
| `priority`         | the lowest number that a client gave, strictly        |

But under `priority`, which is a promise to clients, nobody starves: a request that was preempted, or that has waited
for MAX_OVERTAKEN_S, is overtaken no longer.
"""

from collections.abc import Callable, Sequence
from itertools import islice

from runtime.request import Request

MAX_OVERTAKEN_S = 10.0
# Under `longest_prefix` only so many of the oldest are compared, so that a long queue does not cost every step.
NUM_COMPARED = 128


def next_waiting(
    waiting: Sequence[Request],
    policy: str,
    now: float,
    cached_tokens: Callable[[Request], int],
    max_tokens: int | None = None,
) -> Request | None:
    """The request to admit next, None if there is none.

    `waiting`: preempted ones in front, then in order of arrival. `max_tokens`: longer requests do not come into
    question now; shorter ones pass them, but under `priority` nobody passes the most urgent.
    """
    chosen = _first(waiting, policy, now, cached_tokens)
    if chosen is None or max_tokens is None or chosen.num_tokens <= max_tokens:
        return chosen
    if policy == "priority":
        return None
    short = [request for request in waiting if request.num_tokens <= max_tokens]
    return _first(short, policy, now, cached_tokens)


def _first(
    waiting: Sequence[Request], policy: str, now: float, cached_tokens: Callable[[Request], int]
) -> Request | None:
    if not waiting:
        return None
    if policy == "priority":
        return min(waiting, key=lambda request: request.priority)
    first = waiting[0]
    if policy == "fcfs" or first.num_preemptions or now - first.arrived_at >= MAX_OVERTAKEN_S:
        return first
    if policy == "longest_prefix":
        return max(islice(waiting, NUM_COMPARED), key=cached_tokens)
    return min(waiting, key=lambda request: request.num_tokens)


def least_urgent(running: Sequence[Request], policy: str) -> Request:
    """Who gives way when the pool is full: the newest, under `priority` the newest of the lowest urgency.

    `running`: in order of admission.
    """
    if policy != "priority":
        return running[-1]
    return max(enumerate(running), key=lambda seated: (seated[1].priority, seated[0]))[1]


def held_until(waiting: Sequence[Request], batch_wait_ms: float) -> float:
    """Until when waiting requests are held so that others join their batch; those preempted never are."""
    if waiting[0].num_preemptions:
        return 0.0
    return min(request.arrived_at for request in waiting) + batch_wait_ms / 1000
