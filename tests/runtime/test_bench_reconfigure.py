"""What the benchmark of changes under load measures by, and all of it once with a tiny model."""

import json
from typing import Any

import numpy as np
import pytest

from runtime import warm
from runtime.bench import reconfigure
from runtime.bench.changes import Visit, Window, chance_of, other_value, row_of
from runtime.knobs import knob_reports

REPORTS = {report["name"]: report for report in knob_reports(4, 512, max_kv_tokens=8192)}


def test_every_knob_of_a_machine_has_another_value_within_its_range() -> None:
    for name, report in REPORTS.items():
        if name == "replicas":
            continue
        other = other_value(report, report["default"])
        assert other is not None and other != report["default"], name
        if not report["choices"]:
            assert report["low"] <= other <= report["high"], name
            assert isinstance(other, int) == (report["kind"] == "int"), name


@pytest.mark.parametrize(
    ("name", "current", "other"),
    [
        ("max_num_seqs", 256, 252),
        ("prefill_chunk", 2048, 1024),
        ("prefill_chunk", 16, 32),
        ("overlap_depth", 1, 0),
        ("overlap_depth", 0, 1),
        ("batch_wait_ms", 0.0, 2.0),
        ("policy", "fcfs", "shortest_prefill"),
        ("threads_decode", 1, 2),
    ],
)
def test_the_other_value_is_half_or_next(name: str, current: Any, other: Any) -> None:
    assert other_value(REPORTS[name], current) == other


def test_seats_are_taken_from_requests_that_have_them() -> None:
    values = [other_value(REPORTS["max_num_seqs"], 512, num_requests=num) for num in (300, 512, 600)]
    assert values == [296, 504, 504]


def test_a_pool_that_was_prepared_before_is_not_asked_for_again() -> None:
    sizes = [other_value(REPORTS["kv_tokens"], 8192, turn) for turn in range(3)]
    assert sizes == [4096, 4080, 4064]


def test_a_knob_with_one_value_has_no_other() -> None:
    assert other_value({**REPORTS["policy"], "choices": ("fcfs",)}, "fcfs") is None
    assert other_value({**REPORTS["threads_decode"], "low": 1, "high": 1}, 1) is None


def test_a_row_compares_windows_of_the_same_visits() -> None:
    quiet, changed = Window([0.010] * 20, [0.010] * 40), Window([0.010] * 19 + [0.030], [0.012] * 40)
    preparing = Window([], [0.015] * 40)
    visit = Visit(8, [0.0, 2.0], [10.0, 30.0], [quiet], [changed], [preparing], [quiet], 1)
    row = row_of("kv_tokens", "warm", [visit, visit], quiet)
    assert (row.num_dropped, row.num_commits, row.commit_us, row.most_commit_us) == (2, 4, 20.0, 30.0)
    assert row.prepare_s == 2.0 and row.num_steps == 40 and row.quiet_step_p50_ms == pytest.approx(10.0)
    assert row.step_ratio == pytest.approx(3.0, rel=0.01) and row.itl_ratio == pytest.approx(1.5)
    long = Window([], [0.030] * 40)
    assert row_of("kv_tokens", "warm", [visit], long).run_itl_ratio == pytest.approx(0.5)
    few = visit._replace(preparing=[], before=[])
    assert row_of("policy", "live", [few], quiet).itl_ratio is None


def test_a_row_counts_steps_that_are_longer_than_the_whole_run_allows() -> None:
    steady = Window([0.010] * 20, [0.010] * 40)
    visit = Visit("on", [0.0], [1.0], [steady], [Window([0.010] * 97 + [0.011, 0.013, 0.020], [])], [], [], 0)
    slower = Window([0.010] * 20 + [0.020] * 20, [])
    alone, beside = (row_of("prefix_cache", "warm", [visit], of_run) for of_run in (steady, slower))
    assert alone.num_over == 2 and alone.over_chance == pytest.approx(chance_of(2, 100, 0.001))
    assert alone.run_ratio == alone.step_ratio == pytest.approx(2.0, rel=0.05)
    assert beside.num_over == 0 and beside.over_chance == 1.0 and beside.step_ratio == alone.step_ratio
    assert beside.run_ratio == pytest.approx(1.0, rel=0.05)


def test_the_chance_is_the_binomial_tail() -> None:
    assert chance_of(0, 360, 0.001) == 1.0
    assert chance_of(1, 360, 0.001) == pytest.approx(1 - 0.999**360)
    assert chance_of(3, 4, 0.5) == pytest.approx(5 / 16)
    assert chance_of(5, 4, 0.5) == pytest.approx(0.0)
    rng = np.random.default_rng(0)
    assert chance_of(8, 5529, 0.001) == pytest.approx(
        np.mean(rng.binomial(5529, 0.001, 200_000) >= 8), abs=0.004
    )


def test_knobs_change_under_load_and_nobody_is_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    knobs = ["prefill_chunk", "policy", "max_num_seqs", "kv_tokens", "weight_format", "prefix_cache"]
    words = ["--shape", "tiny", "--device", "cpu", "--requests", "12", "--rounds", "1", "--window", "0.1"]
    assert reconfigure.main([*words, "--warm-up", "0.1", "--kv-tokens", "16384", "--only", *knobs]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {row["knob"]: row for row in found["rows"]}
    live, warm = ["max_num_seqs", "prefill_chunk", "policy"], ["weight_format", "kv_tokens", "prefix_cache"]
    assert list(rows) == [*live, *warm, "all live", "all warm"]
    assert found["dropped_at_end"] == 0 and all(row["num_dropped"] == 0 for row in rows.values())
    assert all(row["num_commits"] == 2 and row["commit_us"] > 0 for row in list(rows.values())[:6])
    assert rows["all live"]["num_steps"] > 20 and rows["all live"]["step_ratio"] > 0
    assert rows["weight_format"]["prepare_s"] > 0 and rows["weight_format"]["itl_ratio"] > 0
    assert found["config"]["weight_format"] == "float32" and found["config"]["policy"] == "fcfs"
    longest = [step["step_s"] for step in found["longest"]]
    assert longest == sorted(longest, reverse=True) and {step["knob"] for step in found["longest"]} <= set(knobs)
    assert 1e3 * longest[0] >= max(row["changed_step_ms"] for row in found["rows"] if row["changed_step_ms"])


def test_each_visit_prepares_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    formats = []
    made = warm.prepared

    def noted(model: Any, weight_format: str, *others: Any) -> Any:
        formats.append(weight_format)
        return made(model, weight_format, *others)

    monkeypatch.setattr(warm, "prepared", noted)
    words = ["--shape", "tiny", "--device", "cpu", "--requests", "4", "--rounds", "3", "--window", "0.05"]
    assert (
        reconfigure.main([*words, "--warm-up", "0.1", "--kv-tokens", "8192", "--only", "weight_format"]) == 0
    )
    assert len(formats) == 3 > len(set(formats)), "the third visit goes where the first went"
