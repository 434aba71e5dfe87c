"""Who comes next, without a scheduler."""

import pytest

from runtime.knobs import knob_named
from runtime.policy import MAX_OVERTAKEN_S, NUM_COMPARED, held_until, least_urgent, next_waiting
from runtime.request import Request

POLICIES = knob_named("policy").choices or ()


def request(id: str, prompt: int = 8, at: float = 0.0, priority: int = 0) -> Request:
    one = Request.of_lengths(id, prompt, 4, at)
    one.priority = priority
    return one


def chosen(
    waiting: list[Request], policy: str, now: float = 1.0, max_tokens: int | None = None, **cached: int
) -> str | None:
    found = next_waiting(waiting, policy, now, lambda one: cached.get(one.id, 0), max_tokens)
    return None if found is None else found.id


def test_each_policy_has_its_own_first() -> None:
    waiting = [
        request("old", 30),
        request("short", 5),
        request("known", 40),
        request("urgent", 50, priority=-1),
    ]
    first = {policy: chosen(waiting, policy, known=32) for policy in POLICIES}
    assert first == {
        "fcfs": "old", "shortest_prefill": "short", "longest_prefix": "known", "priority": "urgent",
    }  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES)
def test_equals_are_taken_in_order_of_arrival_and_nobody_from_an_empty_queue(policy: str) -> None:
    assert chosen([request("a"), request("b")], policy) == "a"
    assert chosen([], policy) is None


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "priority"])
def test_who_has_waited_long_or_was_preempted_is_overtaken_no_longer(policy: str) -> None:
    waiting = [request("old", 30, at=5.0), request("better", 5, at=6.0)]
    assert chosen(waiting, policy, now=5.0 + MAX_OVERTAKEN_S, better=4) == "old"
    waiting[0].num_preemptions = 1
    assert chosen(waiting, policy, now=6.0, better=4) == "old"


def test_priority_is_strict_however_long_others_have_waited() -> None:
    waiting = [request("old", at=0.0), request("urgent", at=1e6, priority=-1)]
    assert chosen(waiting, "priority", now=1e6) == "urgent"


def test_only_the_oldest_of_a_long_queue_are_looked_up() -> None:
    looked_up: list[str] = []

    def cached_tokens(request: Request) -> int:
        looked_up.append(request.id)
        return int(request.id)

    waiting = [request(str(number)) for number in range(3 * NUM_COMPARED)]
    found = next_waiting(waiting, "longest_prefix", 1.0, cached_tokens)
    assert found is waiting[NUM_COMPARED - 1] and len(looked_up) == NUM_COMPARED
    for policy in ("fcfs", "shortest_prefill", "priority"):
        looked_up.clear()
        next_waiting(waiting, policy, 1.0, cached_tokens)
        assert not looked_up


def test_short_requests_pass_long_ones_that_may_not_come_now_but_never_an_urgent_one() -> None:
    waiting = [request("long", 100, priority=-1), request("short", 10), request("shorter", 5)]
    assert chosen(waiting, "fcfs", max_tokens=50) == "short"
    assert chosen(waiting, "fcfs", now=2 * MAX_OVERTAKEN_S, max_tokens=50) == "short"
    assert chosen(waiting, "shortest_prefill", max_tokens=50) == "shorter"
    assert chosen(waiting, "priority", max_tokens=50) is None
    assert chosen(waiting[:1], "fcfs", max_tokens=50) is None
    assert chosen(waiting, "fcfs", max_tokens=100) == "long"


def test_the_newest_gives_way_under_priority_the_newest_of_the_lowest_urgency() -> None:
    running = [request("a", priority=5), request("b", priority=5), request("c", priority=-1)]
    assert least_urgent(running, "fcfs").id == "c"
    assert least_urgent(running, "priority").id == "b"


def test_the_oldest_says_how_long_a_batch_is_waited_for_and_a_preempted_one_waits_for_none() -> None:
    waiting = [request("a", at=10.0), request("b", at=9.0)]
    assert held_until(waiting, 500.0) == 9.5
    waiting[0].num_preemptions = 1
    assert held_until(waiting, 500.0) == 0.0
