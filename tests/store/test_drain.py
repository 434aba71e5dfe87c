import logging
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime.timings import GapSummary, StepRecord
from runtime.timings import RequestTiming as ServedTiming
from store.database import Store
from store.drain import Drained
from store.queries import drain_cursor
from store.tables import RequestTiming, RuntimeEvent, Step, table_of

REQUEST: dict[str, Any] = {
    "seq": 1,
    "kind": "request",
    "request_id": "r1",
    "arrived_at": 10.0,
    "prompt_tokens": 5,
    "output_tokens": 3,
    "max_tokens": 16,
    "admitted_at": 10.1,
    "first_token_at": 10.2,
    "finished_at": 10.5,
    "finish_reason": "stop",
    "error_kind": None,
    "config_id": "c",
    "arrival_slice": "s1",
    "first_token_slice": "s1",
    "slices": {"s1": [3, 2, 0.3, 0.2]},
    "gaps": {"num": 2, "sum_s": 0.3, "max_s": 0.2, "p99_s": 0.2},
    "num_preemptions": 1,
    "streamed": True,
}
STEP: dict[str, Any] = {
    "seq": 2,
    "kind": "step",
    "at": 10.2,
    "step_s": 0.02,
    "forward_s": 0.015,
    "num_decode": 4,
    "num_prefill_rows": 1,
    "num_prefill_tokens": 64,
    "context_tokens": 400,
    "attention_pairs": 4000,
    "num_running": 5,
    "num_waiting": 0,
    "kv_used_tokens": 512,
    "config_id": "c",
    "slice_id": None,
    "threads": 2,
    "device_s": 0.014,
    "graph_rows": 8,
}
EVENT: dict[str, Any] = {
    "seq": 3,
    "kind": "event",
    "event": "slice_started",
    "at": 10.0,
    "slice_id": "s1",
    "arm": "champion",
}


def columns_of(noun: type[RequestTiming] | type[Step]) -> set[str]:
    return {column.name for column in table_of(noun).columns}


def test_each_kind_of_record_becomes_its_row(store: Store) -> None:
    assert store.save_drained("boot", [REQUEST, STEP, EVENT], 3, 7, now=11.0) == Drained(1, 1, 1, 0)
    with store.metrics() as session:
        request, step, event = (session.query(noun).one() for noun in (RequestTiming, Step, RuntimeEvent))
        cursor = drain_cursor(session, "boot")
        assert drain_cursor(session, "another") is None
    names = columns_of(RequestTiming) - {"boot_id"}
    assert {name: getattr(request, name) for name in names} == {name: REQUEST[name] for name in names}
    names = columns_of(Step) - {"boot_id"}
    assert {name: getattr(step, name) for name in names} == {name: STEP[name] for name in names}
    assert (event.kind, event.at, event.details) == (
        "slice_started",
        10.0,
        {"slice_id": "s1", "arm": "champion"},
    )
    assert cursor is not None
    assert (cursor.after_seq, cursor.num_dropped, cursor.updated_at) == (3, 7, 11.0)


def test_the_records_that_the_runtime_makes_fit_the_tables(store: Store) -> None:
    """Every field of the runtime's own records is a column, or is known to be left out."""
    served = ServedTiming(
        "r", 1.0, 2, 3, 4, None, None, 5.0, "abort", None, "c", None, None, {}, GapSummary(), 0, False
    )
    assert set(served.to_record()) - columns_of(RequestTiming) == {"max_tokens", "streamed"}
    assert set(StepRecord.__dataclass_fields__) == columns_of(Step) - {"boot_id", "seq"}
    assert (
        store.save_drained("b", [{**served.to_record(), "seq": 1, "kind": "request"}], 1, 0, 1.0).num_bad == 0
    )


def test_the_same_answer_twice_is_stored_once(store: Store) -> None:
    for _ in range(2):
        store.save_drained("boot", [REQUEST, STEP, EVENT], 3, 0, now=11.0)
    store.save_drained("boot", [{**REQUEST, "output_tokens": 99}], 3, 0, now=12.0)
    with store.metrics() as session:
        assert session.query(RequestTiming).one().output_tokens == 3
        assert session.query(Step).count() == session.query(RuntimeEvent).count() == 1


def test_another_boot_has_its_own_records_and_cursor(store: Store) -> None:
    store.save_drained("one", [REQUEST], 1, 0, now=11.0)
    store.save_drained("two", [REQUEST], 5, 0, now=11.0)
    with store.metrics() as session:
        assert session.query(RequestTiming).count() == 2
        cursors = [drain_cursor(session, boot) for boot in ("one", "two")]
    assert [cursor.after_seq for cursor in cursors if cursor is not None] == [1, 5]


def test_a_late_answer_does_not_move_the_cursor_back(store: Store) -> None:
    store.save_drained("boot", [], 10, 2, now=11.0)
    store.save_drained("boot", [], 4, 1, now=12.0)
    with store.metrics() as session:
        cursor = drain_cursor(session, "boot")
    assert cursor is not None and (cursor.after_seq, cursor.num_dropped) == (10, 2)


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "song", "seq": 9},
        {"seq": 9},
        {**STEP, "step_s": None},
        {**STEP, "step_s": float("nan")},
        {"kind": "event", "seq": 9, "at": 1.0},
    ],
)
def test_a_record_that_lacks_a_part_is_counted_and_holds_nothing_up(
    store: Store, bad: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert store.save_drained("boot", [bad, REQUEST], 9, 0, now=11.0) == Drained(1, 0, 0, 1)
    assert "passed over" in caplog.text
    with store.metrics() as session:
        cursor = drain_cursor(session, "boot")
        assert session.query(Step).count() == session.query(RuntimeEvent).count() == 0
    assert cursor is not None and cursor.after_seq == 9


def test_records_and_cursor_are_stored_together_or_not_at_all(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("store.drain._move_cursor", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.save_drained("boot", [REQUEST], 1, 0, now=11.0)
    with store.metrics() as session:
        assert session.query(RequestTiming).count() == 0
        assert drain_cursor(session, "boot") is None


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 12), max_size=12), st.integers(0, 2**32))
def test_however_answers_overlap_each_record_stands_once(store: Store, starts: list[int], boot: int) -> None:
    records = [{**EVENT, "seq": seq} for seq in range(20)]
    for start in starts:
        store.save_drained(f"{boot}", records[start : start + 8], start + 7, 0, now=1.0)
    expected = {seq for start in starts for seq in range(start, start + 8)}
    with store.metrics() as session:
        found = [seq for (seq,) in session.query(RuntimeEvent.seq).filter_by(boot_id=f"{boot}")]
        session.query(RuntimeEvent).delete()
    assert sorted(found) == sorted(expected)


def test_a_step_on_a_cpu_has_no_time_of_a_device(store: Store) -> None:
    """Nor has one of an older runtime, whose records lie on the disk."""
    older = {name: value for name, value in STEP.items() if name not in ("device_s", "graph_rows")}
    told = [{**STEP, "device_s": None, "graph_rows": None}, {**older, "seq": 3}]
    assert store.save_drained("boot", told, 3, 0, now=11.0) == Drained(0, 2, 0, 0)
    with store.metrics() as session:
        assert [(row.device_s, row.graph_rows) for row in session.query(Step)] == [(None, None)] * 2
