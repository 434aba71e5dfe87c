import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.slice_stats import OUTSIDE, SliceLedger
from runtime.timings import GapSummary, RecordBuffer, RequestTiming, StepRecord, summarise_gaps


def drained(buffer: RecordBuffer, after_seq: int, limit: int = 100) -> list[dict[str, Any]]:
    return list(json.loads(buffer.drain(after_seq, limit).records_json))


def filled(num: int, max_records: int = 100) -> RecordBuffer:
    buffer = RecordBuffer(max_records)
    for index in range(num):
        buffer.append("event", {"index": index})
    return buffer


def test_the_same_cursor_twice_returns_the_same_records() -> None:
    buffer = filled(5)
    assert drained(buffer, 2) == drained(buffer, 2)
    assert [record["seq"] for record in drained(buffer, 2)] == [3, 4, 5]


def test_acknowledged_records_are_freed_and_unacknowledged_are_not() -> None:
    buffer = filled(5)
    buffer.drain(3, 100)
    assert len(buffer) == 2
    assert [record["seq"] for record in drained(buffer, 0)] == [4, 5]


def test_numbers_go_on_after_everything_was_acknowledged() -> None:
    buffer = filled(3)
    assert buffer.drain(3, 100).next_seq == 3
    assert buffer.append("step", {}) == 4
    assert buffer.drain(3, 100).next_seq == 4


def test_a_full_buffer_drops_the_oldest_and_counts_them() -> None:
    buffer = filled(12, max_records=10)
    result = buffer.drain(0, 3)
    assert result.dropped == 2
    assert [record["seq"] for record in json.loads(result.records_json)] == [3, 4, 5]
    assert result.next_seq == 5


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 12), st.integers(1, 5)), max_size=20))
def test_a_reader_that_acknowledges_what_it_read_sees_every_record_once(
    turns: list[tuple[int, int, int]],
) -> None:
    buffer, cursor, seen = RecordBuffer(10_000), 0, []
    for num_new, _, limit in [*turns, (0, 0, 10_000)]:
        for _ in range(num_new):
            buffer.append("step", {})
        result = buffer.drain(cursor, limit)
        seen += [record["seq"] for record in json.loads(result.records_json)]
        cursor = result.next_seq
    assert seen == list(range(1, sum(turn[0] for turn in turns) + 1))


def test_gaps_are_summed_and_absent_when_there_are_none() -> None:
    assert summarise_gaps([]) == GapSummary(0, 0.0, None, None)
    gaps = [0.01] * 99 + [1.0]
    summary = summarise_gaps(gaps)
    assert (summary.num, summary.max_s, summary.p99_s) == (100, 1.0, 0.01)
    assert summary.sum_s == pytest.approx(1.99)


def timing(**changed: Any) -> RequestTiming:
    values: dict[str, Any] = {
        "request_id": "r", "arrived_at": 10.0, "prompt_tokens": 3, "output_tokens": 5, "max_tokens": 5,
        "admitted_at": 10.1, "first_token_at": 10.5, "finished_at": 12.5, "finish_reason": "length",
        "error_kind": None, "config_id": "c",
        "arrival_slice": None, "first_token_slice": "s", "slices": {"s": [5, 4, 2.0, 0.6]},
        "gaps": GapSummary(4, 2.0, 0.6, 0.6), "num_preemptions": 0, "streamed": True,
    }  # fmt: skip
    return RequestTiming(**{**values, **changed})


def test_a_request_timing_survives_the_drain() -> None:
    buffer = RecordBuffer()
    buffer.append("request", timing().to_record())
    (record,) = drained(buffer, 0)
    assert (record["kind"], record["seq"]) == ("request", 1)
    assert RequestTiming.of({**record, "new_in_a_later_version": 1}) == timing()


def test_ttft_tpot_and_latency_follow_their_definitions() -> None:
    told = timing()
    assert (told.ttft_s, told.e2e_s, told.tpot_s) == (0.5, 2.5, 0.5)
    assert timing(output_tokens=1).tpot_s is None
    assert timing(first_token_at=None).ttft_s is None


def test_a_step_record_leaves_out_what_it_does_not_know() -> None:
    values = dict.fromkeys(StepRecord.__slots__, 1)
    assert StepRecord.of({**values, "seq": 9, "later": 1}) == StepRecord(**values)  # type: ignore[arg-type]


def test_a_step_record_of_an_older_version_lacks_what_only_a_gpu_tells() -> None:
    values = dict.fromkeys(StepRecord.__slots__, 1)
    del values["device_s"], values["graph_rows"]
    told = StepRecord.of(values)
    assert told.device_s is told.graph_rows is None and told.threads == 1
    del values["threads"]
    with pytest.raises(KeyError, match="threads"):
        StepRecord.of(values)


def test_only_arrivals_after_the_burn_in_are_counted_in_a_slice() -> None:
    ledger = SliceLedger()
    ledger.start("s1", start_at=100.0, end_at=160.0, burn_in_s=10.0)
    early, late = ledger.arrival(105.0), ledger.arrival(110.0)
    assert (early.slice_id, early.stats) == ("s1", None)
    assert late.stats is not None
    late.stats.arrived("a", 110.0)
    late.stats.first_token()
    late.stats.finished("a", 2.0)
    late.stats.arrived("b", 111.0)
    told = ledger.snapshot(121.0)["s1"]
    assert (told["num_arrived"], told["num_finished"], told["num_first_tokens"], told["num_pending"]) == (
        2,
        1,
        1,
        1,
    )
    assert told["sum_log_e2e"] == pytest.approx(math.log(2.0))
    assert told["sumsq_log_e2e"] == pytest.approx(math.log(2.0) ** 2)
    assert told["oldest_pending_s"] == pytest.approx(10.0)
    assert told["sum_log_pending_age"] == pytest.approx(math.log(10.0))


def test_an_arrival_past_the_planned_end_belongs_to_no_slice() -> None:
    ledger = SliceLedger()
    ledger.start("s1", 100.0, 160.0, 10.0)
    assert ledger.arrival(160.0).slice_id is None


def test_the_slice_in_force_and_the_three_before_it_are_kept() -> None:
    ledger = SliceLedger()
    for index in range(6):
        ledger.start(f"s{index}", 100.0 + index, 101.0 + index, 0.0)
        ledger.end(f"s{index}")
    assert set(ledger.snapshot(200.0)) == {OUTSIDE, "s2", "s3", "s4", "s5"}


def test_requests_outside_slices_are_forgotten_after_a_minute() -> None:
    ledger = SliceLedger()
    for at in (1000.0, 1030.0, 1070.0):
        stats = ledger.arrival(at).stats
        assert stats is not None
        stats.arrived(str(at), at)
        stats.failed(str(at))
    told = ledger.snapshot(1075.0)[OUTSIDE]
    assert (told["num_arrived"], told["num_errors"], told["num_pending"], told["oldest_pending_s"]) == (
        2,
        2,
        0,
        None,
    )


def test_a_client_that_left_is_neither_a_latency_nor_an_error() -> None:
    ledger = SliceLedger()
    stats = ledger.arrival(1.0).stats
    assert stats is not None
    stats.arrived("a", 1.0)
    stats.aborted("a")
    stats.finished("a", 5.0)
    told = ledger.snapshot(2.0)[OUTSIDE]
    assert (told["num_finished"], told["num_errors"], told["num_aborted"], told["num_pending"]) == (
        0,
        0,
        1,
        0,
    )
