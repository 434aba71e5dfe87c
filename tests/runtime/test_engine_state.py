from typing import Any

from runtime.engine_state import EngineState


def plan_event(kind: str, plan_id: str) -> dict[str, Any]:
    return {"kind": kind, "plan_id": plan_id}


def test_a_plan_that_ended_before_the_last_engine_answered_stays_over() -> None:
    state = EngineState()
    for kind in ("plan_accepted", "lease_lapsed"):  # the leader's, while another engine is still silent
        state.event(plan_event(kind, "p1"))
    state.accepted("p1")
    assert state.plan_id is None


def test_a_plan_is_known_from_the_answer_on_although_its_events_come_later() -> None:
    state = EngineState()
    state.event(plan_event("plan_accepted", "p1"))
    state.event(plan_event("plan_finished", "p1"))
    state.accepted("p2")
    assert state.plan_id == "p2"
