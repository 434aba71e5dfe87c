"""Collecting: nothing is lost or counted twice, and what is not known is absent."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.record_spool import RecordSpool
from store import metrics
from store.database import Store
from store.errors import StoreUnavailable
from store.metrics import METRICS, metric_named
from store.queries import drain_cursor, events_between, latest_samples, steps_between, timings_between
from store.tables import Sample
from tests.fakes_tuner import FakeClient, FakeNvml, FakePs, event, request, runtime_state, step
from tuner import collect
from tuner.collect import Collector
from tuner.hardware import HostProbe, NvmlProbe, ProcessProbe
from tuner.runtime_metrics import Window, runtime_samples, token_gaps


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "data") as opened:
        yield opened


class Ticking:
    """Monotonic time that goes on by a second a tick."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        self.now_s += 1.0
        return self.now_s


def stored(store: Store) -> tuple[int, int, int]:
    """Numbers of request, step and event rows."""
    with store.metrics() as session:
        return tuple(
            len(read(session, 0.0, 1e12)) for read in (timings_between, steps_between, events_between)
        )  # type: ignore[return-value]


# --- the pure part --------------------------------------------------------------------------------


def test_rates_are_of_the_window_and_latencies_of_requests_that_ended_well() -> None:
    before = runtime_state(counters={"requests_total": 10, "tokens_total": 100, "errors_by_kind": {}})
    state = runtime_state(
        counters={"requests_total": 14, "tokens_total": 150, "errors_by_kind": {"timeout": 2}}
    )
    records = [
        request(1, 0.0, ttft_s=0.1, tpot_s=0.02),
        request(2, 0.0, ttft_s=0.3, tpot_s=0.04),
        request(3, 0.0, ttft_s=9.0, finish_reason="abort"),
        request(4, 0.0, finish_reason="timeout", first_token_at=None, error_kind="timeout"),
        step(5, 1.0, num_prefill_tokens=60, step_s=0.01),
        step(6, 1.1, num_prefill_tokens=0, step_s=0.03),
    ]
    readings = runtime_samples(Window(records, state, dropped=7, seconds=2.0, before=before))
    assert readings[metrics.REQUESTS_PER_S, ""] == 2.0
    assert readings[metrics.OUTPUT_TOKENS_PER_S, ""] == 25.0
    assert readings[metrics.PROMPT_TOKENS_PER_S, ""] == 30.0
    assert readings[metrics.TTFT_S, "mean"] == pytest.approx(0.2)
    assert readings[metrics.TTFT_S, "p50"] == pytest.approx(0.1)
    assert readings[metrics.TTFT_S, "p99"] == pytest.approx(0.3)
    assert readings[metrics.TPOT_S, "p95"] == pytest.approx(0.04)
    assert readings[metrics.E2E_S, "mean"] == pytest.approx((0.3 + 0.7) / 2)
    assert readings[metrics.STEP_S, "p50"] == 0.01
    assert readings[metrics.BATCH_SIZE, ""] == 4.0
    assert readings[metrics.ERRORS_TOTAL, "timeout"] == 2.0
    assert readings[metrics.RECORDS_DROPPED_TOTAL, ""] == 7.0
    assert readings[metrics.KV_USED_RATIO, ""] == pytest.approx(0.1)


def gauges_after(hit: int, looked_up: int) -> dict[str, Any]:
    return runtime_state()["gauges"] | {
        "prefix_hit_tokens_total": hit,
        "prefix_looked_up_tokens_total": looked_up,
    }


def test_prefix_hits_are_of_the_window_and_absent_after_an_engine_began_anew() -> None:
    state = runtime_state(gauges=gauges_after(hit=50, looked_up=140))
    readings = runtime_samples(Window([], state, seconds=2.0, before=runtime_state()))
    assert readings[metrics.PREFIX_HIT_TOKENS_PER_S, ""] == 15.0
    assert readings[metrics.PREFIX_HIT_RATIO, ""] == pytest.approx(0.75)
    anew = runtime_state(gauges=gauges_after(hit=5, looked_up=9))
    assert (metrics.PREFIX_HIT_RATIO, "") not in runtime_samples(Window([], anew, seconds=2.0, before=state))
    off = runtime_samples(Window([], state, seconds=2.0, before=state))
    assert off[metrics.PREFIX_HIT_TOKENS_PER_S, ""] == 0.0 and (metrics.PREFIX_HIT_RATIO, "") not in off


def test_drafts_are_of_the_window_and_are_no_tokens_of_prompts() -> None:
    grown = {"drafted_tokens_total": 60, "draft_right_tokens_total": 25}
    state = runtime_state(gauges=runtime_state()["gauges"] | grown)
    steps = [step(1, 1.0, num_prefill_tokens=30, num_drafted=20, num_right=15)]
    readings = runtime_samples(Window(steps, state, seconds=2.0, before=runtime_state()))
    assert readings[metrics.DRAFTED_TOKENS_PER_S, ""] == 10.0
    assert readings[metrics.DRAFT_RIGHT_RATIO, ""] == pytest.approx(0.75)
    assert readings[metrics.PROMPT_TOKENS_PER_S, ""] == 5.0
    off = runtime_samples(Window([], state, seconds=2.0, before=state))
    assert off[metrics.DRAFTED_TOKENS_PER_S, ""] == 0.0 and (metrics.DRAFT_RIGHT_RATIO, "") not in off


def test_tokens_of_a_right_draft_follow_at_once() -> None:
    steps = [step(1, 10.0, num_decode=2), step(2, 10.1, num_decode=2, num_drafted=8, num_right=3)]
    assert token_gaps(steps, None) == [(pytest.approx(0.1), 2), (0.0, 3)]


def test_what_is_not_known_is_absent_never_zero() -> None:
    nothing = runtime_samples(Window([], runtime_state(gauges={"num_live": 3, "num_queued": 2}), seconds=1.0))
    assert {metric for metric, _ in nothing} == {
        metrics.ENGINE_RESTARTS_TOTAL,
        metrics.RECORDS_DROPPED_TOTAL,
        metrics.PROMPT_TOKENS_PER_S,
        metrics.REQUESTS_WAITING,
    }
    assert nothing[metrics.REQUESTS_WAITING, ""] == 2.0  # without an engine all that is queued waits
    one_token = runtime_samples(Window([request(1, 0.0, output_tokens=1)], runtime_state(), seconds=1.0))
    assert (metrics.TTFT_S, "p50") in one_token and (metrics.TPOT_S, "p50") not in one_token
    first = runtime_samples(Window([request(1, 0.0), step(2, 1.0)], runtime_state()))
    assert (metrics.TTFT_S, "p50") not in first and (metrics.REQUESTS_RUNNING, "") in first


def test_gap_between_tokens_spans_steps_that_only_compute_prompts() -> None:
    prompt = {"num_decode": 0, "num_prefill_rows": 1}
    steps = [
        step(1, 10.0, **prompt, num_running=1),  # the first of a busy time: no gap
        step(2, 10.1, num_decode=1, num_running=1),
        step(3, 10.4, **prompt, num_running=2),  # another's prompt holds the first one up
        step(4, 10.5, num_decode=2, num_running=2),
        step(5, 99.0, **prompt, num_running=1),  # after idle time
        step(6, 99.2, num_decode=1, num_running=1),
    ]
    gaps = token_gaps(steps, None)
    assert [(pytest.approx(gap), count) for gap, count in gaps] == [(0.1, 1), (0.4, 2), (0.2, 1)]
    assert token_gaps(steps[1:2], step(0, 9.8)) == [(pytest.approx(0.3), 1)]
    two = [{**one, "replica": index} for one in steps for index in (0, 1)]
    assert sorted(token_gaps(two, None)) == sorted(2 * gaps)  # each engine's steps follow its own
    weighted = runtime_samples(Window(steps, runtime_state(), seconds=1.0))
    assert weighted[metrics.ITL_S, "mean"] == pytest.approx((0.1 + 2 * 0.4 + 0.2) / 4)
    assert weighted[metrics.ITL_S, "p50"] == pytest.approx(0.2)


def test_all_that_is_emitted_is_declared_and_all_that_is_declared_is_emitted(
    tmp_path: Path, store: Store
) -> None:
    client = FakeClient()
    ps = FakePs()
    (tmp_path / "net").mkdir()
    (tmp_path / "net" / "snmp").write_text("Tcp: RetransSegs\nTcp: 1\n")
    (tmp_path / "stat").write_text("procs_running 1\n")
    nvml = NvmlProbe(FakeNvml())
    processes = ProcessProbe(lambda: {"daemon": 1, "engine": 1, "front_end": 1})
    probes = [nvml, HostProbe(tmp_path, ps=ps, proc=tmp_path), processes]
    collector = Collector(client, store, probes, Ticking())
    collector.collect(1.0)
    ps.cores = [core._replace(idle=core.idle + 1) for core in ps.cores]
    client.records = [request(1, 0.0), step(2, 1.0), step(3, 1.1)]
    client.changed["counters"] = {"requests_total": 1, "tokens_total": 11, "errors_by_kind": {"timeout": 1}}
    client.changed["gauges"] = gauges_after(hit=50, looked_up=140) | {"drafted_tokens_total": 41}
    emitted = collector.collect(2.0).readings
    for metric, label in emitted:
        assert metric_named(metric).check_label(label) == label
    assert {metric for metric, _ in emitted} == set(METRICS.values())
    for metric in METRICS.values():
        assert set(metric.label.values or ()) <= {label for other, label in emitted if other == metric}, (
            metric
        )
    with store.metrics() as session:
        assert set(latest_samples(session)) == set(METRICS)


# --- the part that reads and writes ---------------------------------------------------------------


def test_records_are_stored_once_and_acknowledged_after_the_commit(store: Store) -> None:
    client = FakeClient()
    collector = Collector(client, store, [], Ticking())
    client.records = [request(1, 0.0), step(2, 1.0), event(3, 1.0, "slice_started", slice_id="s1")]
    collector.collect(1.0)
    assert stored(store) == (1, 1, 1)
    assert len(client.records) == 3  # not acknowledged yet
    client.records.append(step(4, 2.0))
    assert collector.collect(2.0).num_records == 1
    assert client.drains == [("b1", 0), ("b1", 3)]
    assert [record["seq"] for record in client.records] == [4]
    assert stored(store) == (1, 2, 1)


def test_daemon_killed_between_drain_and_commit_loses_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = FakeClient()
    client.records = [request(1, 0.0), step(2, 1.0)]
    collector = Collector(client, store, [], Ticking())

    def die(*args: object) -> None:
        raise StoreUnavailable("killed here")

    with monkeypatch.context() as patch:
        patch.setattr(collect, "save_drained", die)
        with pytest.raises(StoreUnavailable):
            collector.collect(1.0)
    assert stored(store) == (0, 0, 0)
    assert len(client.records) == 2
    again = Collector(client, store, [], Ticking())  # the next daemon
    again.collect(2.0)
    again.collect(3.0)
    assert stored(store) == (1, 1, 0)


def test_restarted_daemon_goes_on_where_the_store_ends(store: Store) -> None:
    client = FakeClient()
    client.records = [step(1, 1.0), step(2, 2.0)]
    Collector(client, store, [], Ticking()).collect(1.0)
    client.records.append(step(3, 3.0))
    Collector(client, store, [], Ticking()).collect(2.0)
    assert client.drains == [("b1", 0), ("b1", 2)]
    assert stored(store) == (0, 3, 0)


def test_what_a_killed_runtime_left_behind_is_stored_once_the_next_one_answers(
    store: Store, tmp_path: Path
) -> None:
    client = FakeClient()
    collector = Collector(client, store, [], Ticking(), run_dir=tmp_path)
    spool = RecordSpool(tmp_path, "b1")
    client.records = [step(1, 1.0), step(2, 2.0)]
    collector.collect(1.0)
    for record in (step(1, 1.0), step(2, 2.0), request(3, 2.0), step(4, 2.5)):
        spool.append(record["seq"], json.dumps(record).encode())
    assert stored(store) == (0, 2, 0)
    client.boot_id, client.records = "b2", [step(1, 3.0)]  # numbers 3 and 4 died with their process
    for at in (3.0, 4.0):
        collector.collect(at)
    assert stored(store) == (1, 4, 0)
    assert not list((tmp_path / "records").iterdir())
    with store.metrics() as session:
        cursor = drain_cursor(session, "b1")
        assert cursor is not None and cursor.after_seq == 4


def test_restarted_runtime_is_another_boot_with_numbers_of_its_own(store: Store) -> None:
    client = FakeClient()
    collector = Collector(client, store, [], Ticking())
    client.records = [step(1, 1.0), step(2, 2.0)]
    collector.collect(1.0)
    collector.client = FakeClient("b2")
    collector.client.records = [step(1, 5.0)]
    readings = collector.collect(2.0).readings
    assert stored(store) == (0, 3, 0)
    assert (metrics.REQUESTS_PER_S, "") not in readings  # counters of two boots make no rate
    with store.metrics() as session:
        first, second = drain_cursor(session, "b1"), drain_cursor(session, "b2")
    assert first is not None and first.after_seq == 2
    assert second is not None and second.after_seq == 1


def test_silent_runtime_leaves_a_gap_and_one_line(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="tuner.collect")
    client = FakeClient()
    nvml = NvmlProbe(FakeNvml())
    collector = Collector(client, store, [nvml], Ticking())
    collector.collect(1.0)
    client.is_reachable = False
    for now in (2.0, 3.0, 4.0):
        silent = collector.collect(now)
        assert silent.state is None
        assert (metrics.GPU_UTIL_RATIO, "0") in silent.readings
        assert (metrics.REQUESTS_RUNNING, "") not in silent.readings
    client.is_reachable = True
    client.changed["counters"] = {"requests_total": 8, "tokens_total": 0, "errors_by_kind": {}}
    assert collector.collect(5.0).readings[metrics.REQUESTS_PER_S, ""] == 2.0  # over all four seconds
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    with store.metrics() as session:
        assert latest_samples(session, since=5.0)["requests_running"][""].value == 4.0


def test_window_after_a_long_silence_starts_anew(store: Store) -> None:
    client = FakeClient()
    times = iter((0.0, 500.0))
    collector = Collector(client, store, [], lambda: next(times))
    collector.collect(1.0)
    client.records = [request(1, 0.0)]
    readings = collector.collect(501.0).readings
    assert (metrics.E2E_S, "p50") not in readings
    assert stored(store) == (1, 0, 0)


def test_backlog_is_read_in_pages(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "PAGE_RECORDS", 10)
    monkeypatch.setattr(collect, "MAX_PAGES", 3)
    client = FakeClient()
    client.records = [step(seq, float(seq)) for seq in range(1, 46)]
    collector = Collector(client, store, [], Ticking())
    assert [collector.collect(now).num_records for now in (1.0, 2.0, 3.0)] == [30, 15, 0]
    assert stored(store) == (0, 45, 0)


def test_records_that_the_runtime_dropped_are_told_once(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    client = FakeClient()
    collector = Collector(client, store, [], Ticking())
    client.dropped = 12
    collector.collect(1.0)
    collector.collect(2.0)
    Collector(client, store, [], Ticking()).collect(3.0)
    assert [record.getMessage() for record in caplog.records if record.name == "tuner.collect"] == [
        "The runtime dropped 12 records that were not read in time; its buffer was full."
    ]


def test_samples_carry_the_configuration_that_served(store: Store) -> None:
    client = FakeClient()
    client.changed["config_id"] = "challenger"
    Collector(client, store, [], Ticking()).collect(7.0)
    with store.metrics() as session:
        row = session.get(Sample, (str(metrics.REQUESTS_RUNNING), "", 7.0))
    assert row is not None and row.config_id == "challenger"
