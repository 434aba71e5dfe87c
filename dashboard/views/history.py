"""History: chosen metrics over a time range with changes, anomalies and forecasts; who changed what, when and why."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import streamlit as st

from dashboard import charts, data, page, records
from dashboard.page import Situation
from dashboard.records import History, MetricHistory
from dashboard.words import (
    ABSENT,
    told_at,
    told_changes,
    told_duration,
    told_utc,
    told_value,
)
from store import noticing
from store.database import StoreReader
from store.metrics import METRICS
from store.tables import Anomaly

REFRESH_S = 10.0
MINUTE_S, HOUR_S, DAY_S = 60.0, 3600.0, 86400.0
RANGES = {
    "15m": 15 * MINUTE_S,
    "1h": HOUR_S,
    "6h": 6 * HOUR_S,
    "24h": DAY_S,
    "7d": 7 * DAY_S,
    "30d": 30 * DAY_S,
    "90d": 90 * DAY_S,
    "all": 0.0,
}
DEFAULT_METRICS = ("e2e_s", "ttft_s", "requests_per_s", "requests_waiting")
MAX_METRICS = 8


@st.cache_resource(ttl=REFRESH_S / 2, max_entries=16, show_spinner=False)
def fresh_history(
    _reader: StoreReader, folder: str, metrics: tuple[str, ...], t0: float, t1: float
) -> History:
    return records.history(_reader, metrics, t0, t1)


def body(situation: Situation) -> None:
    reader = situation.reader
    metrics = chosen_metrics()
    t0, t1 = chosen_range(situation)
    if not metrics:
        page.empty("Choose at least one metric.")
        return
    found = fresh_history(reader, str(reader.data_dir), metrics, t0, t1)
    rules = [charts.Rule(marker.at, marker.kind, marker.words) for marker in found.markers]
    spans = anomaly_spans(found)
    columns = st.columns(2) if len(found.metrics) > 1 else [st.container()]
    for index, one in enumerate(found.metrics):
        with columns[index % len(columns)].container(border=True):
            metric_chart(one, rules, spans, found)
    anomalies_table(situation, found)
    changes_table(situation, found)


# --- what is shown --------------------------------------------------------------------------------


def chosen_metrics() -> tuple[str, ...]:
    """From the query string, then from the field: the address of the page is what it shows."""
    asked = [name for name in st.query_params.get("metrics", "").split(",") if name in METRICS]
    chosen = st.multiselect(
        "Metrics",
        list(METRICS),
        default=asked[:MAX_METRICS] or list(DEFAULT_METRICS),
        max_selections=MAX_METRICS,
        help="What each one says stands in its chart's tooltip. The choice is kept in the address of this page.",
    )
    page.remember("metrics", ",".join(chosen))
    return tuple(chosen)


def chosen_range(situation: Situation) -> tuple[float, float]:
    """(t0, t1) in whole steps, so that a refresh asks for the same bins."""
    default = page.choice_from_query("range", list(RANGES), "1h")
    name = st.segmented_control(
        "Range", list(RANGES), default=default, help="Up to the newest sample. `all` is everything recorded."
    )
    name = name or default
    page.remember("range", name)
    end = situation.shown_until
    span_s = RANGES[name]
    if not span_s:
        recorded = records.recorded_range(situation.reader)
        span_s = max(MINUTE_S, end - recorded[0]) if recorded is not None else HOUR_S
    step = max(5.0, span_s / 500)
    return int((end - span_s) / step) * step, (int(end / step) + 1) * step


# --- charts ---------------------------------------------------------------------------------------


def metric_chart(
    one: MetricHistory, rules: Sequence[charts.Rule], spans: Mapping[str, list[charts.Span]], found: History
) -> None:
    declared = METRICS[one.metric]
    st.markdown(f"**{one.metric}**", help=data.help_of(one.metric))
    lines = [
        charts.Line(label or one.metric, points, one.bands[label] if len(one.points) == 1 else ())
        for label, points in one.points.items()
    ]
    if not lines:
        st.caption("No samples in this range.")
        return
    shades = [*spans.get(one.metric, []), *spans.get("", [])]
    chart = charts.time_chart(lines, declared.unit, rules, shades, one.forecast, height=230)
    newest = ", ".join(f"{line.name} {told_value(line.points[-1][1], declared.unit)}" for line in lines)
    st.altair_chart(
        chart, key=f"history-{one.metric}", alt=f"{one.metric} over time. Newest values: {newest}."
    )
    parts = [f"bins of {told_duration(one.width_s)}", f"newest: {newest}"]
    if one.forecast:
        parts.append("grey band: forecast")
    if shades:
        parts.append("shaded: anomalies")
    st.caption("; ".join(parts))


def anomaly_spans(found: History) -> dict[str, list[charts.Span]]:
    """Shades by metric. Faults are shown on every chart: they void what was measured under them."""
    spans: dict[str, list[charts.Span]] = {}
    for one in found.anomalies:
        chart = spans.setdefault("" if one.kind == "fault" else one.metric, [])
        for start_at, end_at in noticing.episodes(one):
            start_at, end_at = max(start_at, found.t0), min(end_at or found.t1, found.t1)
            if start_at <= end_at:
                chart.append(charts.Span(start_at, end_at, f"{one.kind}: {one.rule}", one.reason))
    return spans


# --- tables ---------------------------------------------------------------------------------------


def anomalies_table(situation: Situation, found: History) -> None:
    st.subheader("Anomalies", anchor=False)
    if not found.anomalies:
        page.empty(
            "No anomaly in this range.",
            "Rules watch from the first ten seconds on; statistics need half an hour.",
        )
        return
    rows = [
        {
            "started": told_at(one.started_at, situation.zone, situation.now),
            "lasted": lasted(one, situation),
            "kind": one.kind,
            "severity": one.severity,
            "rule": one.rule,
            "metric": f"{one.metric} {one.label}".strip(),
            "observed": value_of(one, one.observed),
            "limit": value_of(one, one.limit),
            "worst": value_of(one, one.worst),
            "why": one.reason,
            "layer": one.layer,
            "started UTC": told_utc(one.started_at),
        }
        for one in found.anomalies
    ]
    table(rows, "anomalies", "Anomalies of the range, newest first.")


def lasted(one: Anomaly, situation: Situation) -> str:
    """`12 min`; `open, again since 14:32` where it had ended before; `4 min in 3 times`."""
    *earlier, (since_at, end_at) = noticing.episodes(one)
    if end_at is None:
        return f"open, again since {told_at(since_at, situation.zone, situation.now)}" if earlier else "open"
    whole = sum(
        end_at - start_at for start_at, end_at in [*earlier, (since_at, end_at)] if end_at is not None
    )
    return told_duration(whole) + (f" in {len(earlier) + 1} times" if earlier else "")


def value_of(one: Anomaly, value: float | None) -> str:
    """In the unit of its rule, which need not be that of the metric that it is filed under."""
    if value is None:
        return ABSENT
    unit = one.details.get("unit") or (METRICS[one.metric].unit if one.metric in METRICS else "")
    return told_value(value, unit) if unit else f"{value:.4g}"


def changes_table(situation: Situation, found: History) -> None:
    st.subheader("Changes", anchor=False)
    rows = [
        {
            "when": told_at(change.applied_at or change.created_at, situation.zone, situation.now),
            "who": who,
            "what": change.kind,
            "knobs": told_changes(changed) if changed else f"to {change.to_config_id}",
            "state": change.state,
            "why": change.reason,
            "from": change.from_config_id or ABSENT,
            "to": change.to_config_id,
            "applied UTC": told_utc(change.applied_at),
        }
        for change, changed, who in found.changes
    ]
    if not rows:
        page.empty("Nothing was changed in this range.")
        return
    table(rows, "changes", "Changes of the range, newest first.")


def table(rows: list[dict[str, Any]], name: str, alt: str) -> None:
    frame = pd.DataFrame(rows)
    st.dataframe(
        frame, hide_index=True, alt=alt, column_config={"why": st.column_config.TextColumn(width="large")}
    )
    st.download_button(
        "Download CSV",
        frame.map(safe_cell).to_csv(index=False),
        file_name=f"tuner-{name}.csv",
        mime="text/csv",
        key=f"csv-{name}",
        on_click="ignore",
    )


def safe_cell(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in "=+-@\t\r" and value[:1] else value


page.show("History", body, REFRESH_S)
