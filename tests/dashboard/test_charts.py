"""Charts are values: their specification is looked at, not their picture."""

import json

import pytest

from dashboard import charts, evidence
from dashboard.charts import Line, Rule, Span

T0 = 1_790_000_000.0
POINTS = [(T0 + 10.0 * n, 0.1 + 0.01 * n) for n in range(30)]


def spec(chart):
    found = chart.to_dict()
    json.dumps(found)
    return found


def encodings(found):
    for layer in found.get("layer", [found]):
        yield layer.get("mark"), layer.get("encoding", {})


def values_of(found, name):
    return [row[name] for rows in found["datasets"].values() for row in rows if name in row]


@pytest.mark.parametrize(
    ("unit", "largest", "expected"),
    [
        ("s", 0.3, (1e3, "ms")),
        ("s", 3.0, (1.0, "s")),
        ("ratio", 0.3, (100.0, "%")),
        ("bytes", 5e9, (2.0**-30, "GiB")),
        ("bytes", 0.0, (2.0**-20, "MiB")),
        ("requests", 7.0, (1.0, "requests")),
    ],
)
def test_axis_has_the_unit_in_which_its_largest_value_reads_well(unit, largest, expected):
    assert charts.scale_of(unit, largest) == expected


def test_time_chart_names_its_unit_and_scales_its_values():
    found = spec(charts.time_chart([Line("p95", POINTS)], "s", axis_title="latency"))
    (_, encoding), *_ = encodings(found)
    assert encoding["y"]["title"] == "latency (ms)"
    assert max(values_of(found, "value")) == pytest.approx(390.0)


def test_lines_differ_in_dashes_as_well_as_in_colour():
    found = spec(charts.time_chart([Line("p50", POINTS), Line("p95", POINTS)], "s"))
    encoding = next(encoding for _, encoding in encodings(found) if "strokeDash" in encoding)
    dashes = encoding["strokeDash"]["scale"]["range"]
    assert len({str(dash) for dash in dashes}) == 2 and encoding["color"]["scale"]["domain"] == ["p50", "p95"]


def test_changes_anomalies_and_forecasts_are_drawn_with_their_words():
    rule, span = Rule(T0 + 50, "promote", "faster"), Span(T0, T0 + 60, "condition: slo_burn", "p95 too high")
    forecast = [(T0, 0.2, 0.1, 0.3), (T0 + 10, 0.2, 0.1, 0.3)]
    found = spec(charts.time_chart([Line("p95", POINTS)], "s", [rule], [span], forecast))
    assert "faster" in values_of(found, "words") and "p95 too high" in values_of(found, "words")
    assert "promote" in values_of(found, "name") and "condition: slo_burn" in values_of(found, "name")
    assert max(values_of(found, "high")) == pytest.approx(300.0)  # in ms, as the line is


def test_tooltips_give_utc_beside_local_time():
    found = spec(charts.time_chart([Line("p95", POINTS)], "s"))
    (_, encoding), *_ = encodings(found)
    assert {one.get("title") for one in encoding["tooltip"]} >= {"local time", "UTC"}
    assert values_of(found, "utc")[0] == "2026-09-21 14:13:20 UTC"


@pytest.mark.parametrize(
    ("span_s", "shown"),
    [(60, "%H:%M:%S"), (3600, "%H:%M"), (3 * 86400, "%d %b %H:%M"), (30 * 86400, "%d %b")],
)
def test_long_ranges_show_days(span_s, shown):
    assert charts.clock_format([T0, T0 + span_s]) == shown


def test_refresh_sends_data_and_not_another_specification():
    def bare(points):
        found = spec(charts.time_chart([Line("p95", points)], "s", height=200))
        found.pop("datasets")
        return json.dumps(found, sort_keys=True).split('"data"')[0]

    assert bare(POINTS) == bare([(at + 2.0, value) for at, value in POINTS])


def rows(state="SCORED"):
    return [
        {"pair": 1, "arm": arm, "order": "champion first", "start_at": T0 + 12 * n, "burn_in_until": T0 + 12 * n + 3,
         "end_at": T0 + 12 * (n + 1), "state": state, "words": "9 requests", "utc": "x"}
        for n, arm in enumerate(("champion", "challenger"))
    ]  # fmt: skip


def test_slices_lie_in_a_lane_for_each_arm_and_void_ones_are_crossed_out():
    found = spec(charts.slices_chart(rows("VOID")))
    marks = [mark for mark, _ in encodings(found)]
    assert any(isinstance(mark, dict) and mark.get("text") == "✕" for mark in marks)
    assert all(encoding["y"]["field"] == "arm" for _, encoding in encodings(found))


DIFFERENCES = [-0.3, -0.1, -0.4, 0.05, -0.2, -0.3]


def test_effect_closes_in_on_a_bounded_axis_with_zero_and_the_smallest_gain():
    found = spec(charts.effect_chart(evidence.estimates(DIFFERENCES), 0.03, 30))
    assert {0.0, -3.0} <= set(values_of(found, "level"))
    domains = [e["y"]["scale"]["domain"] for _, e in encodings(found) if "scale" in e.get("y", {})]
    assert domains == [[-100, 30.0]]


def test_cloud_holds_the_observed_path_and_the_boundaries():
    looks = [evidence.Look(5, -0.9, None), evidence.Look(6, -1.2, -1.25)]
    found = spec(charts.cloud_chart(evidence.reflipped(DIFFERENCES, 20, 1), DIFFERENCES, looks))
    assert len(set(values_of(found, "path"))) == 20
    assert -1.25 in values_of(found, "sum") and pytest.approx(sum(DIFFERENCES)) in values_of(found, "sum")


def test_raw_and_judged_differences_have_shapes_of_their_own():
    found = spec(charts.pairs_chart(DIFFERENCES, [-0.2, None, -0.1, 0.0, 0.1, 0.2]))
    shapes = next(encoding["shape"]["scale"] for _, encoding in encodings(found) if "shape" in encoding)
    assert shapes["range"] == ["circle", "square"]
    assert len(values_of(found, "difference")) == 11


def test_levels_and_probes_are_drawn():
    levels = spec(charts.levels_chart([(1, 0.0025, "Proven better"), (2, 0.0005, "Not proven")]))
    assert levels["encoding"]["y"]["title"] == "level (%)"
    probes = spec(charts.probes_chart([{"name": "a 1 → 2", "measured": -0.5, "foretold": None}]))
    assert values_of(probes, "change") == [-50.0]


def test_time_without_samples_is_a_gap_and_not_a_line():
    before, after = [10.0 * i for i in range(5)], [1000.0 + 10.0 * i for i in range(5)]
    assert charts.stretches(before + after) == [0] * 5 + [1] * 5
    assert charts.stretches(before) == [0] * 5
    assert charts.stretches([0.0, 3600.0, 7200.0]) == [0, 0, 0]  # an hour is this series' usual distance
    assert charts.stretches([]) == []
    points = [(at, 1.0) for at in before + after]
    band = [(at, 0.5, 2.0) for at, _ in points]
    drawn = spec(charts.time_chart([Line("p95", points, band)], "s"))
    cut = [layer for layer in drawn["layer"] if layer["encoding"].get("detail", {}).get("field") == "stretch"]
    assert len(cut) == 2
