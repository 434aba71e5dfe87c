import asyncio
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tuner.fake_completions import FakeServer, serving
from tuner.errors import Unavailable
from tuner.load.capacity import Window, capacity_of
from tuner.load.report import Outcome, read_report, summarise
from tuner.load.send import SAFE_VOCAB_SIZE, Load, ServedModel, served_model
from tuner.load.stream_client import Target
from tuner.load.traffic import command, drive, measure_capacity
from tuner.settings import TrafficSettings

SETTINGS = TrafficSettings(kind="constant", rate_per_s=100, output_tokens={"mean": 20, "max": 40})
MODEL = ServedModel("fake", 512, 100)
NOWHERE = Target.of("http://127.0.0.1:9")


def driven(fake: FakeServer, **changes: Any) -> list[Outcome]:
    """Every outcome of a short load on `fake`, in order of planning."""

    async def scenario() -> list[Outcome]:
        outcomes: list[Outcome] = []
        async with serving(fake):
            load = replace(Load(Target.of(fake.url), SETTINGS, MODEL, duration_s=0.2), **changes)
            await drive(load, outcomes.append, asyncio.Event())
        return sorted(outcomes, key=lambda outcome: outcome.index)

    return asyncio.run(scenario())


@contextmanager
def serving_in_thread(fake: FakeServer) -> Iterator[FakeServer]:
    """The fake on a loop of its own, for a client that blocks or is another process."""
    ready, loop = threading.Event(), asyncio.new_event_loop()
    done = asyncio.Event()

    async def serve() -> None:
        async with serving(fake):
            ready.set()
            await done.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    ready.wait()
    try:
        yield fake
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def test_every_planned_request_is_sent_once_and_succeeds() -> None:
    fake = FakeServer()
    outcomes = driven(fake)
    assert len(outcomes) == len(fake.bodies) == 20
    assert all(outcome.ok for outcome in outcomes)
    assert [outcome.output_tokens for outcome in outcomes] == [outcome.asked_tokens for outcome in outcomes]


def test_request_is_what_the_server_must_understand() -> None:
    fake = FakeServer()
    driven(fake)
    body = fake.bodies[0]
    assert body["stream"] is True and body["ignore_eos"] is True and body["model"] == "fake"
    assert all(0 <= token < 100 for token in body["prompt"])


def test_same_seed_sends_the_same_words_and_another_phase_only_other_words() -> None:
    first, again, other = FakeServer(), FakeServer(), FakeServer()
    driven(first)
    driven(again)
    driven(other, phase=1)

    def prompts(fake: FakeServer) -> list[list[int]]:
        return sorted(body["prompt"] for body in fake.bodies)

    assert prompts(first) == prompts(again)
    assert prompts(first) != prompts(other)
    assert sorted(map(len, prompts(first))) == sorted(map(len, prompts(other)))


def test_server_that_never_answers_does_not_stop_the_arrivals() -> None:
    fake = FakeServer(fault="stall")
    assert len(driven(fake, timeout_s=1.0)) == len(fake.bodies) == 20


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("status", "http_503"),
        ("break", "connection"),
        ("error", "stream"),
        ("short", "incomplete"),
        ("close", "connection"),
    ],
)
def test_each_fault_is_told_from_the_others(fault: str, kind: str) -> None:
    outcomes = driven(FakeServer(fault=fault, fault_from=10))
    assert {outcome.error_kind for outcome in outcomes} == {None, kind}
    assert any(outcome.ok for outcome in outcomes)


def test_request_without_an_answer_is_a_time_out() -> None:
    outcomes = driven(FakeServer(fault="stall"), timeout_s=0.2)
    assert {outcome.error_kind for outcome in outcomes} == {"timeout"}
    assert summarise(outcomes, 0.2)["num_timeouts"] == len(outcomes)


def test_absent_server_is_an_error_of_every_request() -> None:
    outcomes: list[Outcome] = []
    load = Load(NOWHERE, SETTINGS, MODEL, duration_s=0.05)
    asyncio.run(drive(load, outcomes.append, asyncio.Event()))
    assert {outcome.error_kind for outcome in outcomes} == {"connection"}


def test_stop_ends_the_arrivals_and_lets_open_requests_finish() -> None:
    async def scenario() -> list[Outcome]:
        outcomes: list[Outcome] = []
        stop = asyncio.Event()
        async with serving(FakeServer(first_token_s=0.3)) as fake:
            load = Load(Target.of(fake.url), SETTINGS, MODEL)
            asyncio.get_running_loop().call_later(0.1, stop.set)
            await drive(load, outcomes.append, stop)
        return outcomes

    outcomes = asyncio.run(scenario())
    assert outcomes
    assert all(outcome.ok for outcome in outcomes)


def outcome(**changes: Any) -> Outcome:
    known: dict[str, Any] = {
        "index": 0, "length_class": "short", "prompt_tokens": 10, "asked_tokens": 5, "output_tokens": 5,
        "planned_at": 100.0, "sent_at": 100.0, "first_token_at": 101.0, "last_token_at": 103.0,
        "finished_at": 103.0,
    }  # fmt: skip
    return Outcome(**{**known, **changes})


def test_lateness_of_the_sender_counts_as_latency() -> None:
    late = outcome(sent_at=100.9)
    assert (late.ttft_s, late.e2e_s, late.tpot_s) == (1.0, 3.0, 0.5)
    assert late.late_s == pytest.approx(0.9)


def test_summary_counts_by_kind_and_leaves_out_what_the_load_cut() -> None:
    rows = [
        outcome(),
        outcome(
            planned_at=102.0, length_class="long", first_token_at=105.0, last_token_at=105.0, output_tokens=1
        ),
        outcome(
            planned_at=104.0, error_kind="timeout", first_token_at=None, last_token_at=None, output_tokens=0
        ),
        outcome(planned_at=109.0, error_kind="cut"),
    ]
    summary = summarise(rows, 6.0, planned_rate_per_s=1.0)
    assert (summary["num_requests"], summary["num_ok"], summary["num_errors"]) == (3, 2, 1)
    assert summary["errors_by_kind"] == {"timeout": 1}
    assert summary["sent_rate_per_s"] == pytest.approx(0.5)
    assert summary["ttft_s"]["p50"] == 2.0
    assert set(summary["by_length_class"]) == {"short", "long"}
    assert summary["by_length_class"]["long"]["tpot_s"] == {}


def test_summary_of_nothing_is_empty_not_zero_latency() -> None:
    summary = summarise([], 0.0)
    assert summary["num_requests"] == 0
    assert summary["ttft_s"] == {}
    assert "sent_rate_per_s" not in summary


def test_capacity_counts_what_finished_inside_the_window() -> None:
    rows = [outcome(finished_at=at) for at in (9.0, 10.0, 15.0, 20.0)]
    rows.append(outcome(finished_at=12.0, error_kind="http_500"))
    capacity = capacity_of(rows, 4, Window(10.0, 20.0))
    assert (capacity.requests_per_s, capacity.tokens_per_s, capacity.output_tokens_per_s) == (0.2, 3.0, 1.0)
    assert capacity.num_errors == 1


def test_capacity_of_a_server_that_fails_is_an_error_not_zero() -> None:
    with pytest.raises(Unavailable, match="http_500"):
        capacity_of([outcome(error_kind="http_500")], 4, Window(0.0, 1000.0))


def test_closed_loop_keeps_the_asked_number_open() -> None:
    with serving_in_thread(FakeServer(first_token_s=0.05)) as fake:
        capacity = measure_capacity(fake.url, SETTINGS, MODEL, concurrency=4, warm_up_s=0.1, measure_s=0.5)
    assert fake.num_connections == 4
    assert 0 < capacity.requests_per_s <= 4 / 0.05
    assert capacity.num_errors == 0


def test_model_is_asked_of_the_server() -> None:
    with serving_in_thread(FakeServer()) as fake:
        assert served_model(Target.of(fake.url), None, None, None) == MODEL
        assert served_model(Target.of(fake.url), "fake", 128, None) == ServedModel("fake", 128, 100)
        with pytest.raises(Unavailable, match="fake"):
            served_model(Target.of(fake.url), "another", None, None)
    with serving_in_thread(FakeServer(model={"id": "other", "max_model_len": 64})) as fake:
        assert served_model(Target.of(fake.url), None, None, None) == ServedModel(
            "other", 64, SAFE_VOCAB_SIZE
        )
    with (
        serving_in_thread(FakeServer(model={"id": "other"})) as fake,
        pytest.raises(Unavailable, match="--context-tokens"),
    ):
        served_model(Target.of(fake.url), None, None, None)
    with pytest.raises(Unavailable, match="Start it"):
        served_model(NOWHERE, None, None, None)


def test_process_ends_cleanly_on_sigterm_and_leaves_a_whole_report(tmp_path: Path) -> None:
    report = tmp_path / "load.jsonl"
    with serving_in_thread(FakeServer()) as fake:
        words = command(fake.url, SETTINGS, report=report)
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            while len(fake.bodies) < 5:
                assert process.poll() is None, process.communicate()
                threading.Event().wait(0.02)
            process.send_signal(signal.SIGTERM)
            output, log = process.communicate(timeout=30)
    assert process.returncode == 0, log
    plan, outcomes, summary = read_report(report)
    assert summary == json.loads(output)
    assert summary is not None
    assert summary["num_ok"] == len([o for o in outcomes if o.ok]) >= 5
    assert plan["length_scale"] == pytest.approx(512 / (4096 + 40))
    assert "lengths times" in log
    assert stat.S_IMODE(os.stat(report).st_mode) == 0o600


def test_process_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    report = tmp_path / "load.jsonl"
    with serving_in_thread(FakeServer()) as fake:
        words = command(fake.url, SETTINGS, report=report)
        parent = f"import subprocess; subprocess.run({words!r})"
        with subprocess.Popen([sys.executable, "-c", parent], stderr=subprocess.DEVNULL) as process:
            while len(fake.bodies) < 5:
                assert process.poll() is None
                threading.Event().wait(0.02)
            process.kill()
        while read_report(report).summary is None:
            threading.Event().wait(0.05)


def test_process_says_what_is_wrong_with_its_settings() -> None:
    words = [
        sys.executable,
        "-m",
        "tuner.load.traffic",
        "--url",
        "http://127.0.0.1:9",
        "--settings",
        '{"rate": 5}',
    ]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert "rate" in ended.stderr and "Traceback" not in ended.stderr
