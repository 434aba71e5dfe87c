"""Values in, Altair charts out. Pure: no Streamlit, no store, no clock.

Nothing is told by colour alone: lines differ in dashes, arms in shape and lane, states in text. Axes carry units;
instants are shown in the viewer's own time, and as UTC in the tooltip. Ranges come from the data and not from the
specification, so that a refresh only sends new data.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from statistics import median
from typing import Any

import altair as alt
import pandas as pd

from dashboard.words import told_percent, told_utc

CHAMPION, CHALLENGER = "#3f8fd8", "#e0812b"  # readable on white and on near black
MUTED, GOOD, BAD = "#8a94a3", "#2f9e77", "#d1576b"
GAP_S, GAP_STEPS = 60.0, 5.0  # nothing for so long, and for so many usual distances: a gap, not a line
SPAN_ROWS = 4  # names of shades that begin together stand below each other
DASHES = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [4, 2, 1, 2], [10, 4]]
COLOURS = ["#3f8fd8", "#e0812b", "#2f9e77", "#b06fc4", "#c9a227", "#d1576b"]
SCALES = {  # unit -> steps of (smallest largest value, factor, unit on the axis)
    "s": ((1.0, 1.0, "s"), (0.0, 1e3, "ms")),
    "bytes": ((2.0**30, 2.0**-30, "GiB"), (0.0, 2.0**-20, "MiB")),
    "bytes/s": ((2.0**20, 2.0**-20, "MiB/s"), (0.0, 2.0**-10, "KiB/s")),
    "ratio": ((0.0, 100.0, "%"),),
    "hertz": ((0.0, 1e-9, "GHz"),),
}


@dataclass(frozen=True)
class Line:
    """One series. `band`: (instant, low, high), drawn behind it."""

    name: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Span:
    """A stretch of time to be shaded, with what is said of it."""

    start_at: float
    end_at: float
    name: str
    words: str


@dataclass(frozen=True)
class Rule:
    """An instant to be marked."""

    at: float
    name: str
    words: str


def scale_of(unit: str, largest: float) -> tuple[float, str]:
    """Factor and unit for an axis on which `largest` is the largest value."""
    for at_least, factor, shown in SCALES.get(unit, ((0.0, 1.0, unit),)):
        if abs(largest) >= at_least:
            return factor, shown
    return 1.0, unit


def instants(values: Sequence[float]) -> pd.Series:
    return pd.to_datetime(pd.Series(list(values), dtype="float64"), unit="s", utc=True)


def time_x(shown: str = "%H:%M") -> alt.X:
    return alt.X("at:T", title=None, axis=alt.Axis(grid=False, labelOverlap=True, tickCount=6, format=shown))


def clock_format(instants_shown: Sequence[float]) -> str:
    """Hours for up to a day and a half, else days: what the labels of a time axis say."""
    span_s = max(instants_shown) - min(instants_shown) if instants_shown else 0.0
    if span_s < 300:
        return "%H:%M:%S"
    return "%H:%M" if span_s < 1.5 * 86400 else "%d %b" if span_s > 6 * 86400 else "%d %b %H:%M"


# --- metrics over time ----------------------------------------------------------------------------


def time_chart(
    lines: Sequence[Line],
    unit: str,
    rules: Sequence[Rule] = (),
    spans: Sequence[Span] = (),
    forecast: Sequence[tuple[float, float, float, float]] = (),
    height: int = 200,
    axis_title: str = "",
) -> alt.LayerChart:
    """Lines of one unit over time, with changes as rules, anomalies as shades, and the band of the forecast.

    forecast: (instant, expected, low, high).
    """
    largest = max((abs(value) for line in lines for _, value in line.points), default=0.0)
    factor, shown = scale_of(unit, largest)
    names = [line.name for line in lines]
    title = f"{axis_title} ({shown})" if axis_title and shown else axis_title or shown
    y = alt.Y("value:Q", title=title, axis=alt.Axis(tickCount=5), scale=alt.Scale(zero=unit != "celsius"))
    x = time_x(clock_format([at for line in lines for at, _ in line.points]))
    layers: list[Any] = []
    if spans:
        layers += span_layers(spans, x)
    if forecast:
        layers += forecast_layers(forecast, factor, title, x)
    if any(line.band for line in lines):
        layers.append(band_layer(lines, factor, title, names, x))
    layers.append(line_layer(lines, factor, shown, names, x, y))
    if rules:
        layers += rule_layers(rules, x)
    return alt.layer(*layers).properties(height=height)


def line_layer(
    lines: Sequence[Line], factor: float, shown: str, names: list[str], x: alt.X, y: alt.Y
) -> alt.Chart:
    rows = [(at, line.name, value * factor) for line in lines for at, value in line.points]
    frame = pd.DataFrame(
        {
            "at": instants([row[0] for row in rows]),
            "series": [row[1] for row in rows],
            "value": [row[2] for row in rows],
            "utc": [told_utc(row[0]) for row in rows],
            "stretch": [run for line in lines for run in stretches([at for at, _ in line.points])],
        }
    )
    legend = alt.Legend(orient="top", title=None) if len(names) > 1 else None
    return (
        alt.Chart(frame)
        .mark_line(strokeWidth=1.8, interpolate="linear")
        .encode(
            x=x,
            y=y,
            detail="stretch:N",
            color=alt.Color(
                "series:N", scale=alt.Scale(domain=names, range=repeated(COLOURS, len(names))), legend=legend
            ),
            strokeDash=alt.StrokeDash(
                "series:N", scale=alt.Scale(domain=names, range=repeated(DASHES, len(names))), legend=legend
            ),
            tooltip=[
                alt.Tooltip("series:N", title="series"),
                alt.Tooltip("value:Q", title=shown or "value", format=",.4~g"),
                alt.Tooltip("at:T", title="local time", format="%Y-%m-%d %H:%M:%S"),
                alt.Tooltip("utc:N", title="UTC"),
            ],
        )
    )


def stretches(instants_shown: Sequence[float]) -> list[int]:
    """The number of the unbroken stretch that each instant of a series is in: a gap is drawn as a gap."""
    steps = [later - at for at, later in pairwise(instants_shown)]
    longest = max(GAP_S, GAP_STEPS * median(steps)) if steps else GAP_S
    return list(accumulate((int(step > longest) for step in steps), initial=0))[: len(instants_shown)]


def repeated(values: Sequence[Any], num: int) -> list[Any]:
    return [values[index % len(values)] for index in range(num)]


def band_layer(lines: Sequence[Line], factor: float, title: str, names: list[str], x: alt.X) -> alt.Chart:
    """Between the lowest and the highest sample of each bin."""
    rows = [(at, line.name, low * factor, high * factor) for line in lines for at, low, high in line.band]
    frame = pd.DataFrame(rows, columns=["epoch", "series", "low", "high"])
    frame["at"] = instants(frame["epoch"])
    frame["stretch"] = [run for line in lines for run in stretches([at for at, _, _ in line.band])]
    return (
        alt.Chart(frame)
        .mark_area(opacity=0.16)
        .encode(
            x=x,
            detail="stretch:N",
            y=alt.Y("low:Q", title=title),
            y2="high:Q",
            color=alt.Color(
                "series:N", scale=alt.Scale(domain=names, range=repeated(COLOURS, len(names))), legend=None
            ),
        )
    )


def forecast_layers(
    forecast: Sequence[tuple[float, float, float, float]], factor: float, title: str, x: alt.X
) -> list[Any]:
    frame = pd.DataFrame(forecast, columns=["epoch", "expected", "low", "high"])
    frame[["expected", "low", "high"]] *= factor
    frame["at"] = instants(frame["epoch"])
    band = (
        alt.Chart(frame)
        .mark_area(opacity=0.18, color=MUTED)
        .encode(
            x=x,
            y=alt.Y("low:Q", title=title),
            y2="high:Q",
            tooltip=[alt.Tooltip("low:Q"), alt.Tooltip("high:Q")],
        )
    )
    expected = (
        alt.Chart(frame)
        .mark_line(strokeDash=[2, 3], color=MUTED, strokeWidth=1.2)
        .encode(x=x, y=alt.Y("expected:Q", title=title))
    )
    return [band, expected]


def span_layers(spans: Sequence[Span], x: alt.X) -> list[Any]:
    """Shades from top to bottom, each with its name: hatches are not to be had, words are."""
    frame = pd.DataFrame(
        {
            "at": instants([span.start_at for span in spans]),
            "until": instants([span.end_at for span in spans]),
            "name": [span.name for span in spans],
            "words": [span.words for span in spans],
            "utc": [f"{told_utc(span.start_at)} to {told_utc(span.end_at)}" for span in spans],
        }
    )
    tooltip = [alt.Tooltip("name:N"), alt.Tooltip("words:N", title="what"), alt.Tooltip("utc:N", title="UTC")]
    frame["row"] = [index % SPAN_ROWS for index in range(len(spans))]
    base = alt.Chart(frame).encode(x=x, tooltip=tooltip)
    shade = base.mark_rect(opacity=0.16, color=BAD).encode(x2="until:T")
    names = [
        base.transform_filter(f"datum.row == {row}")
        .mark_text(align="left", baseline="top", dx=3, dy=2, fontSize=10, color=BAD)
        .encode(text="name:N", y=alt.value(12 * row))
        for row in range(min(SPAN_ROWS, len(spans)))
    ]
    return [shade, *names]


def rule_layers(rules: Sequence[Rule], x: alt.X) -> list[Any]:
    frame = pd.DataFrame(
        {
            "at": instants([rule.at for rule in rules]),
            "name": [rule.name for rule in rules],
            "words": [rule.words for rule in rules],
            "utc": [told_utc(rule.at) for rule in rules],
        }
    )
    tooltip = [
        alt.Tooltip("name:N", title="change"),
        alt.Tooltip("words:N", title="why"),
        alt.Tooltip("at:T", title="local time", format="%Y-%m-%d %H:%M:%S"),
        alt.Tooltip("utc:N", title="UTC"),
    ]
    base = alt.Chart(frame).encode(x=x, tooltip=tooltip)
    line = base.mark_rule(strokeDash=[4, 3], strokeWidth=1.4, color=MUTED)
    text = base.mark_text(align="left", baseline="top", dx=4, dy=2, fontSize=10, color=MUTED).encode(
        text="name:N", y=alt.value(0)
    )
    return [line, text]


# --- an experiment --------------------------------------------------------------------------------


def slices_chart(slices: Sequence[Mapping[str, Any]], height: int = 120) -> alt.LayerChart:
    """The slices in time, a lane for each arm. A row: start_at, burn_in_until, end_at, arm, state, words."""
    frame = pd.DataFrame(list(slices))
    for name in ("start_at", "burn_in_until", "end_at"):
        frame[name] = instants(frame[name])
    frame["mark"] = frame["state"].map({"SCORED": "scored", "VOID": "void", "PLANNED": "under way"})
    lanes = alt.Y("arm:N", title=None, sort=["champion", "challenger"], axis=alt.Axis(labelLimit=120))
    shown = clock_format([float(row["start_at"]) for row in slices])
    x = alt.X("start_at:T", title=None, axis=alt.Axis(grid=False, tickCount=8, format=shown))
    tooltip = [
        alt.Tooltip("pair:Q"),
        alt.Tooltip("arm:N"),
        alt.Tooltip("order:N", title="coin"),
        alt.Tooltip("mark:N", title="state"),
        alt.Tooltip("words:N", title="scored"),
        alt.Tooltip("utc:N", title="UTC"),
    ]
    colour = alt.Color(
        "arm:N",
        scale=alt.Scale(domain=["champion", "challenger"], range=[CHAMPION, CHALLENGER]),
        legend=None,
    )
    states = alt.Scale(domain=["scored", "void", "under way"], range=[0.9, 0.2, 0.5])
    base = alt.Chart(frame).encode(y=lanes, tooltip=tooltip)
    burn_in = base.mark_bar(opacity=0.3, height=12).encode(x=x, x2="burn_in_until:T", color=colour)
    scored = base.mark_bar(height=24).encode(
        x=alt.X("burn_in_until:T", title=None),
        x2="end_at:T",
        color=colour,
        opacity=alt.Opacity("mark:N", scale=states, legend=None),
    )
    void = (
        base.transform_filter("datum.state == 'VOID'")
        .mark_text(text="✕", fontSize=14, color=BAD, align="left")
        .encode(x=alt.X("burn_in_until:T", title=None))
    )
    return alt.layer(burn_in, scored, void).properties(height=height)


def effect_chart(
    estimates: Sequence[Any], min_effect: float, max_pairs: int, height: int = 260
) -> alt.LayerChart:
    """How the effect closes in: the estimate after each pair with its interval, zero, and the smallest gain wanted."""
    frame = pd.DataFrame(
        {
            "pairs": [one.num_pairs for one in estimates],
            "effect": [100 * one.effect_ratio for one in estimates],
            "low": [None if one.low_ratio is None else 100 * one.low_ratio for one in estimates],
            "high": [None if one.high_ratio is None else 100 * one.high_ratio for one in estimates],
            "told": [told_percent(one.effect_ratio) for one in estimates],
            "interval": [
                "not bounded yet"
                if one.low_ratio is None
                else f"{told_percent(one.low_ratio)} to {told_percent(one.high_ratio)}"
                for one in estimates
            ],
        }
    )
    frame[["low", "high"]] = frame[["low", "high"]].astype("float64")
    x = alt.X(
        "pairs:Q",
        title="pairs compared",
        scale=alt.Scale(domain=[1, max(2, max_pairs)]),
        axis=alt.Axis(tickMinStep=1, format="d"),
    )
    title = "change (%), lower is better"
    # The first intervals are often hundreds of percent wide; what matters lies around zero and the estimate.
    highest = max(30.0, *(120 * one.effect_ratio for one in estimates))
    y = alt.Y("effect:Q", title=title, scale=alt.Scale(domain=[-100, highest]))
    tooltip = [alt.Tooltip("pairs:Q"), alt.Tooltip("told:N", title="estimate"), alt.Tooltip("interval:N")]
    base = alt.Chart(frame).encode(x=x, tooltip=tooltip)
    bounded = base.transform_filter("isValid(datum.low)")
    band = bounded.mark_area(opacity=0.22, color=CHALLENGER, clip=True).encode(
        y=alt.Y("low:Q", title=title), y2="high:Q"
    )
    bars = bounded.mark_rule(color=CHALLENGER, opacity=0.6, clip=True).encode(
        y=alt.Y("low:Q", title=title), y2="high:Q"
    )
    dots = alt.OverlayMarkDef(size=45, filled=True, color=CHALLENGER)
    line = base.mark_line(color=CHALLENGER, point=dots).encode(y=y)
    named = [(0.0, "no change", "bottom"), (-100 * min_effect, "smallest gain worth a change", "top")]
    levels = [layer for level in named for layer in level_layers(title, *level)]
    return alt.layer(band, bars, line, *levels).properties(height=height)


def level_layers(title: str, level: float, name: str, baseline: str = "bottom") -> list[Any]:
    """A horizontal line with its name at the right end, above or (baseline "top") below it; `title` of the axis."""
    frame = pd.DataFrame({"level": [level], "name": [name]})
    base = alt.Chart(frame).encode(y=alt.Y("level:Q", title=title))
    line = base.mark_rule(strokeDash=[4, 4], color=MUTED)
    text = base.mark_text(
        align="right", baseline=baseline, dy=-3 if baseline == "bottom" else 3, fontSize=11, color=MUTED
    ).encode(x=alt.value("width"), text="name:N")
    return [line, text]


def cloud_chart(
    paths: Any, observed: Sequence[float], looks: Sequence[Any], height: int = 260
) -> alt.LayerChart:
    """Running sums with fresh coins, thin; the one that happened, thick; and what it must fall below at a look.

    paths: [num_paths, num_pairs] float64, log units.
    """
    num_paths, num_pairs = paths.shape
    steps = list(range(num_pairs + 1))
    rows = [
        (path, pairs, 0.0 if pairs == 0 else float(paths[path, pairs - 1]))
        for path in range(num_paths)
        for pairs in steps
    ]
    x = alt.X("pairs:Q", title="pairs compared", axis=alt.Axis(tickMinStep=1, format="d"))
    y = alt.Y("sum:Q", title="sum of differences (log units)")
    cloud = (
        alt.Chart(pd.DataFrame(rows, columns=["path", "pairs", "sum"]))
        .mark_line(strokeWidth=0.7, opacity=0.22, color=MUTED)
        .encode(x=x, y=y, detail="path:N")
    )
    running = [0.0, *[sum(observed[: n + 1]) for n in range(len(observed))]]
    path = (
        alt.Chart(pd.DataFrame({"pairs": range(len(running)), "sum": running}))
        .mark_line(
            strokeWidth=3, color=CHALLENGER, point=alt.OverlayMarkDef(size=40, filled=True, color=CHALLENGER)
        )
        .encode(
            x=x,
            y=y,
            tooltip=[alt.Tooltip("pairs:Q"), alt.Tooltip("sum:Q", title="observed sum", format=".3f")],
        )
    )
    layers: list[Any] = [cloud, path]
    bounded = [(look.num_pairs, look.boundary) for look in looks if look.boundary is not None]
    if bounded:
        frame = pd.DataFrame(bounded, columns=["pairs", "sum"])
        base = alt.Chart(frame).encode(x=x, y=y)
        layers.append(
            base.mark_tick(thickness=3, size=26, color=GOOD, orient="horizontal").encode(
                tooltip=[
                    alt.Tooltip("pairs:Q"),
                    alt.Tooltip("sum:Q", title="proven at or below", format=".3f"),
                ]
            )
        )
        layers.append(
            base.mark_text(text="proven below", dy=12, fontSize=11, color=GOOD, align="right", dx=8)
        )
    return alt.layer(*layers).properties(height=height)


def pairs_chart(
    judged: Sequence[float], raw: Sequence[float | None] | None = None, height: int = 230
) -> alt.LayerChart:
    """Each pair as it is judged (circle); with `raw` also as it was measured, without the twin (square)."""
    kinds = ["as measured"] if raw is None else ["judged: less the twin", "as measured"]
    rows = [(n, kinds[0], 100 * math.expm1(d)) for n, d in enumerate(judged, start=1)]
    rows += [
        (n, "as measured", 100 * math.expm1(d)) for n, d in enumerate(raw or (), start=1) if d is not None
    ]
    frame = pd.DataFrame(rows, columns=["pair", "kind", "difference"])
    legend = alt.Legend(orient="top", title=None)
    x = alt.X("pair:Q", title="pair", axis=alt.Axis(tickMinStep=1, format="d"))
    y = alt.Y("difference:Q", title="difference (%)")
    link = (
        alt.Chart(frame).mark_line(strokeWidth=1, color=MUTED, opacity=0.6).encode(x=x, y=y, detail="pair:N")
    )
    points = (
        alt.Chart(frame)
        .mark_point(size=70, filled=False, strokeWidth=2)
        .encode(
            x=x,
            y=y,
            shape=alt.Shape(
                "kind:N", scale=alt.Scale(domain=kinds, range=["circle", "square"]), legend=legend
            ),
            color=alt.Color(
                "kind:N", scale=alt.Scale(domain=kinds, range=[CHALLENGER, MUTED]), legend=legend
            ),
            tooltip=[
                alt.Tooltip("pair:Q"),
                alt.Tooltip("kind:N"),
                alt.Tooltip("difference:Q", title="%", format="+.1f"),
            ],
        )
    )
    return alt.layer(link, points, *level_layers("difference (%)", 0.0, "no change")).properties(
        height=height
    )


def levels_chart(levels: Sequence[tuple[int, float, str]], height: int = 180) -> alt.Chart:
    """The stream of tests: (index, level, outcome). A win refills what later tests may spend."""
    frame = pd.DataFrame(list(levels), columns=["test", "level", "outcome"])
    frame["percent"] = 100 * frame["level"]
    return (
        alt.Chart(frame)
        .mark_point(size=110, filled=True)
        .encode(
            x=alt.X("test:O", title="test, in the order they were started", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("percent:Q", title="level (%)", scale=alt.Scale(zero=True)),
            shape=alt.Shape("outcome:N", legend=alt.Legend(orient="top", title=None)),
            color=alt.Color(
                "outcome:N", scale=alt.Scale(range=COLOURS), legend=alt.Legend(orient="top", title=None)
            ),
            tooltip=[
                alt.Tooltip("test:O"),
                alt.Tooltip("percent:Q", title="level %", format=".4f"),
                "outcome:N",
            ],
        )
        .properties(height=height)
    )


def probes_chart(probes: Sequence[Mapping[str, Any]]) -> alt.LayerChart:
    """What each probe measured (filled) and what the replay had foretold (hollow). Rows: name, measured, foretold."""
    rows = [
        {"name": row["name"], "kind": kind, "change": 100 * row[key]}
        for row in probes
        for key, kind in (("measured", "measured"), ("foretold", "foretold by replay"))
        if row.get(key) is not None
    ]
    kinds = ["measured", "foretold by replay"]
    frame = pd.DataFrame(rows, columns=["name", "kind", "change"])
    order = [row["name"] for row in probes]
    legend = alt.Legend(orient="top", title=None)
    points = (
        alt.Chart(frame)
        .mark_point(size=90, strokeWidth=2)
        .encode(
            y=alt.Y("name:N", sort=order, title=None, axis=alt.Axis(labelLimit=520)),
            x=alt.X("change:Q", title="against the champion (%)"),
            shape=alt.Shape(
                "kind:N", scale=alt.Scale(domain=kinds, range=["circle", "diamond"]), legend=legend
            ),
            color=alt.Color(
                "kind:N", scale=alt.Scale(domain=kinds, range=[CHALLENGER, MUTED]), legend=legend
            ),
            tooltip=["name:N", "kind:N", alt.Tooltip("change:Q", title="%", format="+.1f")],
        )
    )
    zero = (
        alt.Chart(pd.DataFrame({"zero": [0.0]})).mark_rule(strokeDash=[4, 4], color=MUTED).encode(x="zero:Q")
    )
    return alt.layer(points, zero).properties(height=max(120, 34 * len(order) + 60))
