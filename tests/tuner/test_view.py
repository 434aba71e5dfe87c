import io
import threading
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from tuner.view import (
    ExperimentView,
    GainView,
    LatencyView,
    ProbeView,
    StoryLine,
    ViewState,
    plain_line,
    render,
    show,
    sparkline,
    told_seconds,
)

BARE = ViewState(
    now=1_700_000_000.0, api_url="http://127.0.0.1:8000/v1", model="demo", device="cpu", mode="auto", uptime_s=754.0,
    doing="Starting.",
)  # fmt: skip
HISTORY = [None if index % 17 == 0 else 1.0 + index % 5 for index in range(90)]
FULL = replace(
    BARE,
    doing="Testing max_num_seqs 2 → 8 because its probe cut the latency by 31 % and no other came near it.",
    dashboard_url="http://127.0.0.1:8501",
    requests_per_s=5.21, tokens_per_s=1432.1, error_ratio=0.015, num_running=4, num_waiting=2,
    ttft=LatencyView(0.0523, 0.21, HISTORY), tpot=LatencyView(0.0123, 0.0344, HISTORY),
    e2e=LatencyView(1.22, 3.97, HISTORY),
    champion_id="a1b2c3d4e5f6", champion_changes=("max_num_seqs 16 → 2", "batch_wait_ms 0 → 50"),
    experiment=ExperimentView("test", "max_num_seqs 2 → 8", 12, 30, "challenger", -0.253, -0.41, -0.08, 0.0025, 15),
    probes=[ProbeView("max_num_seqs 2 → 8", "COMPLETE", -0.31), ProbeView("policy fcfs → shortest_prefill", "RUNNING")],
    gains=[GainView("E2E", 8.0, 2.0)],
    waiting_for_person="recommendation 3, `tuner approve 3`",
    story=[StoryLine(1_700_000_000.0 + index, f"Line {index} of the story.") for index in range(30)],
)  # fmt: skip


def text_of(state: ViewState, columns: int = 80, rows: int = 24) -> str:
    console = Console(width=columns, height=rows, record=True, file=io.StringIO())
    console.print(render(state, columns, rows))
    return console.export_text()


def test_shows_all_that_an_operator_asks_for() -> None:
    text = text_of(FULL)
    for told in (
        "http://127.0.0.1:8000/v1", "demo on cpu", "mode auto", "up 0:12:34", "5.2 requests/s", "1,432 tokens/s",
        "4 running", "2 waiting", "1.5 % errors", "52.3 ms", "210 ms", "34.4 ms", "1.22 s", "3.97 s", "8.00 s",
        "-75.0 %",
        "a1b2c3d4e5f6", "max_num_seqs 16 → 2", "because its probe", "pair 12 of 30", "the challenger serves",
        "effect -25.3 %", "[-41.0 %, -8.0 %]", "level 0.25%", "next look at pair 15", "tuner approve 3", "policy fcfs",
        "running", "Line 29",
    ):  # fmt: skip
        assert told in text, told


def test_what_is_not_known_is_absent_and_not_zero() -> None:
    text = text_of(BARE)
    assert "– requests/s" in text
    assert " 0 " not in text and "0.0" not in text.replace("127.0.0.1", "")


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (100, 30), (130, 40), (200, 60)])
@pytest.mark.parametrize("state", [BARE, FULL], ids=["bare", "full"])
def test_fits_the_terminal(state: ViewState, columns: int, rows: int) -> None:
    lines = text_of(state, columns, rows).splitlines()
    assert len(lines) < rows
    assert max(map(len, lines)) <= columns
    assert "story" in text_of(state, columns, rows)


@given(columns=st.integers(30, 250), rows=st.integers(16, 80), num_probes=st.integers(0, 12))
def test_any_size_is_drawn_without_an_error(columns: int, rows: int, num_probes: int) -> None:
    text_of(replace(FULL, probes=list(FULL.probes) * num_probes), columns, rows)


def test_newest_lines_of_the_story_and_newest_probes_survive_a_small_terminal() -> None:
    text = text_of(replace(FULL, probes=[ProbeView(f"candidate {index}", "COMPLETE") for index in range(9)]))
    assert "candidate 8" in text and "candidate 0" not in text
    assert "Line 29" in text and "Line 0 " not in text


def test_text_of_others_is_not_read_as_markup() -> None:
    told = "[bold]not bold[/bold]"
    text = text_of(
        replace(
            FULL, doing=told, model="[red]", probes=[ProbeView(told, "[x]")], story=[StoryLine(0.0, told)]
        )
    )
    assert text.count(told) == 3 and "[red]" in text and "[x]" in text


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (None, "–"),
        (0.0, "0.0 ms"),
        (0.0123, "12.3 ms"),
        (0.0999, "100 ms"),
        (0.9996, "1.00 s"),
        (12.0, "12.00 s"),
        (250.0, "250 s"),
    ],
)
def test_seconds_are_told_in_three_digits(seconds: float | None, told: str) -> None:
    assert told_seconds(seconds) == told


def test_sparkline_shows_the_newest_from_zero_and_leaves_gaps() -> None:
    assert sparkline([9.0, 0.0, None, 4.0, 8.0], 4) == "▁ ▅█"
    assert sparkline([], 10) == sparkline([None, None], 10) == sparkline([1.0], 0) == ""


class Stopping:
    """A `read` that sets the stop after a number of looks."""

    def __init__(self, state: ViewState, looks: int) -> None:
        self.state, self.looks, self.stop = state, looks, threading.Event()

    def __call__(self) -> ViewState:
        self.looks -= 1
        if self.looks <= 0:
            self.stop.set()
        return self.state


def shown(state: ViewState, **options: Any) -> str:
    reading, file = Stopping(state, 1), io.StringIO()
    plain = bool(options.pop("plain", False))
    show(reading, reading.stop, plain=plain, console=Console(file=file, width=80, height=24, **options))
    return file.getvalue()


def test_without_a_terminal_plain_lines_tell_the_same() -> None:
    lines = shown(FULL).splitlines()
    assert plain_line(FULL) in lines
    assert sum("of the story" in line for line in lines) == 30
    assert "E2E p95 since the start: 8.00 s → 2.00 s (-75.0 %)" in lines
    assert "\x1b" not in "".join(lines)


def test_a_log_begins_with_where_the_model_is_served() -> None:
    first = shown(FULL).splitlines()[0]
    assert "demo is served at http://127.0.0.1:8000/v1 (cpu). Dashboard: http://127.0.0.1:8501." in first


def test_a_log_tells_again_where_the_model_is_served_when_that_changes() -> None:
    states = [FULL, FULL, replace(FULL, dashboard_url="http://127.0.0.1:8502"), FULL]
    reading, file = Stopping(FULL, len(states)), io.StringIO()

    def read() -> ViewState:
        reading.state = states[-max(1, reading.looks)]
        return reading()

    show(read, reading.stop, console=Console(file=file, width=80, height=24))
    told = [
        line.partition("Dashboard: ")[2] for line in file.getvalue().splitlines() if "is served at" in line
    ]
    assert told == [f"http://127.0.0.1:{port}." for port in (8501, 8502, 8501)]


def test_plain_can_be_asked_for_on_a_terminal() -> None:
    assert "\x1b[?1049h" not in shown(FULL, force_terminal=True, plain=True)


def test_terminal_is_given_back_with_the_last_numbers_on_it() -> None:
    written = shown(FULL, force_terminal=True)
    assert "\x1b[?1049h" in written
    assert plain_line(FULL) in written.split("\x1b[?1049l")[-1]
