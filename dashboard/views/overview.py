"""Overview: is it well, what serves, what did tuning bring, and what is being tried now and why."""

from collections.abc import Sequence
from typing import Any

import streamlit as st

from dashboard import charts, data, page
from dashboard.data import Gain, Overview
from dashboard.page import Situation
from dashboard.words import (
    ABSENT,
    CHANGES,
    escaped,
    told_at,
    told_bytes,
    told_changes,
    told_duration,
    told_effect,
    told_interval,
    told_knob,
    told_number,
    told_percent,
    told_seconds,
    told_share,
    told_utc,
)
from store import noticing
from store.database import StoreReader

REFRESH_S = 2.0
GAIN_TTL_S = 30.0
NUM_STORY, STORY_CHARACTERS = 6, 120


@st.cache_resource(ttl=REFRESH_S / 2, max_entries=4, show_spinner=False)
def fresh_overview(_reader: StoreReader, folder: str, until: int) -> Overview:
    return data.overview(_reader, float(until))


@st.cache_resource(ttl=GAIN_TTL_S, max_entries=4, show_spinner=False)
def fresh_gain(_reader: StoreReader, folder: str, champion_id: str | None, _until: float) -> Gain:
    return data.gain(_reader, _until)


def body(situation: Situation) -> None:
    folder = str(situation.reader.data_dir)
    found = fresh_overview(situation.reader, folder, int(situation.shown_until) + 1)
    gain = fresh_gain(situation.reader, folder, found.champion_id, situation.shown_until)
    if found.champion_id is None:
        page.empty("No configuration serves yet.", "The daemon is starting: the model is being loaded.")
        return
    left, right = st.columns([3, 2])
    with left.container(border=True, height="stretch"):
        doing(situation, found)
    with right.container(border=True, height="stretch"):
        gains(gain, found)
    traffic(found)
    latency_and_load(found)
    left, middle, right = st.columns([5, 4, 5])
    with left.container(border=True, height="stretch"):
        champion(situation, found)
    with middle.container(border=True, height="stretch"):
        hardware(found)
    with right.container(border=True, height="stretch"):
        story(situation, found)


# --- what it does ---------------------------------------------------------------------------------


def doing(situation: Situation, found: Overview) -> None:
    st.markdown("##### What the tuner is doing")
    status, running = situation.status, found.running
    if status.is_running:
        st.markdown(escaped(status.doing))
    elif running is not None:
        st.markdown("Nothing now: it was stopped in the middle of the experiment below.")
    else:
        st.markdown("Nothing now. What it did last stands below and in the history.")
    if found.study is not None:
        state = "searches" if found.study.state == "RUNNING" else "searched"
        st.caption(
            f"Study {found.study.study_id} {state} because of: {escaped(found.study.cause)}."
            + (f" It ended: {escaped(found.study.reason)}" if found.study.reason else "")
        )
    for one in found.anomalies:
        said = "Fault, tuning is frozen" if one.kind == "fault" else "Condition"
        *earlier, (since_at, _) = noticing.episodes(one)
        since = f"{'again ' if earlier else ''}since {told_at(since_at, situation.zone, situation.now)}"
        st.warning(f"{said}, {since}: {escaped(one.reason)}", icon=":material/warning:")
    if found.waiting and status.mode != "auto":
        st.info(
            f"Waiting for a person: {found.waiting} recommendation{'s'[: found.waiting > 1]}; see the page "
            "Recommendations.",
            icon=":material/back_hand:",
        )
    if running is not None:
        experiment_line(running)
    elif found.fits:
        states = ", ".join(f"{num} {state.lower()}" for state, num in sorted(found.fits.items()))
        st.caption(f"Forecasts of metrics: {escaped(states)}.")


def experiment_line(running: data.Running) -> None:
    """How far the experiment is, and when it may decide."""
    num, cap = len(running.differences), running.max_pairs
    changed = escaped(told_changes(running.record.changed_knobs))
    kind = running.experiment.kind
    st.progress(min(1.0, num / cap), text=f"{kind.capitalize()}: {num} of at most {cap} pairs. {changed}")
    words = running.experiment.planning.get("words")
    if words:
        st.caption(escaped(words))
    seconds = running.seconds_a_pair
    if kind == "test" and seconds is not None:
        to_look, to_cap = running.pairs_to_next_look, cap - num
        st.caption(
            f"Next look at the evidence in {to_look} pair{'s'[: to_look > 1]}: needs about "
            f"{told_duration(to_look * seconds)} more. A decision at the latest in {told_duration(to_cap * seconds)}."
        )


# --- gain -----------------------------------------------------------------------------------------


def gains(gain: Gain, found: Overview) -> None:
    st.markdown("##### What tuning brought")
    if gain.proof is None and gain.before is None:
        st.markdown("Nothing has been promoted yet: the champion is the configuration that was started with.")
        st.caption("A gain is shown once it is proven on live traffic, never before.")
        return
    columns = st.columns(2)
    proof = gain.proof
    if proof is not None:
        columns[0].metric(
            f"Proven, {gain.metric}",
            told_percent(proof.effect_ratio),
            help="Change of the objective by the last promotion, from randomised pairs of slices on live traffic.",
        )
        columns[0].caption(
            f"95 % interval {told_interval(proof.interval_low_ratio, proof.interval_high_ratio)}, "
            f"{proof.num_pairs} pairs"
        )
    realised = gain.realised
    ratio = None if realised is None or realised.gain_ratio is None else -realised.gain_ratio
    columns[1].metric(
        "Realised since",
        "not measured yet" if ratio is None else told_percent(ratio),
        help="The champion against the one it replaced, from holdback pairs after the promotion. An early stop "
        "flatters the proven figure; this one is not flattered.",
    )
    if realised is not None:
        low, high = (None if bound is None else -bound for bound in (realised.high_ratio, realised.low_ratio))
        columns[1].caption(f"{told_interval(low, high)}, {realised.num_pairs} holdback pairs")
    before, after = data.latency_of(gain.before, gain.metric), data.latency_of(gain.after, gain.metric)
    if before is not None and after is not None:
        st.markdown(
            f"p95 of {gain.metric}: **{told_seconds(before.p95)}** at the start, **{told_seconds(after.p95)}** lately "
            f"({told_percent(after.p95 / before.p95 - 1)})",
            help="Requests outside of experiments: the last 10 minutes of the first configuration, and the last 5 "
            "minutes. A plain before and after: traffic may have differed, so this is not the proof.",
        )
    checked = gain.false_promotions
    if checked is not None and checked.rate.total:
        st.caption(
            f"Champion against itself: {checked.rate.num} of {checked.rate.total} A/A experiments would have been "
            "promoted."
        )


# --- traffic --------------------------------------------------------------------------------------


def traffic(found: Overview) -> None:
    minute = found.minute
    columns = st.columns(6)
    cards: list[tuple[str, str, str, tuple[str, str]]] = [
        (
            "Requests",
            with_unit(found.latest("requests_per_s"), 1, "/s"),
            waiting_words(found),
            ("requests_per_s", ""),
        ),
        (
            "Output tokens",
            with_unit(found.latest("output_tokens_per_s"), 0, "/s"),
            errors_words(found),
            ("output_tokens_per_s", ""),
        ),
    ]
    for name, metric, summary in (
        ("TTFT p95", "ttft_s", minute.ttft),
        ("TPOT p95", "tpot_s", minute.tpot),
        ("End to end p95", "e2e_s", minute.e2e),
    ):
        value = told_seconds(None if summary is None else summary.p95)
        note = f"p50 {told_seconds(None if summary is None else summary.p50)}"
        cards.append((name, value, note, (metric, "p95")))
    cards.append(("KV cache", told_share(found.latest("kv_used_ratio")), "in use", ("kv_used_ratio", "")))
    for column, (name, value, note, key) in zip(columns, cards, strict=True):
        with column:
            values = found.series[key].values[-60:]
            st.metric(
                name,
                value,
                border=True,
                help=f"{data.help_of(key[0])} Of the last minute.",
                chart_data=values if len(values) > 1 else None,
                chart_type="area",
                delta=note,
                delta_color="off",
                delta_arrow="off",
            )


def with_unit(value: float | None, digits: int, unit: str) -> str:
    return ABSENT if value is None else f"{told_number(value, digits)}{unit}"


def waiting_words(found: Overview) -> str:
    running, waiting = found.latest("requests_running"), found.latest("requests_waiting")
    return f"{told_number(running)} running, {told_number(waiting)} waiting"


def errors_words(found: Overview) -> str:
    ratio = found.minute.success_ratio
    if ratio is None:
        return "no request finished lately"
    return f"{told_share(1 - ratio)} of {found.minute.num} failed"


def latency_and_load(found: Overview) -> None:
    rules = [charts.Rule(marker.at, marker.kind, marker.words) for marker in found.markers]
    left, right = st.columns(2)
    panels: Sequence[tuple[Any, str, str, list[tuple[str, tuple[str, str]]]]] = (
        (left, "Latency, last 10 minutes", "s", [
            ("end to end p95", ("e2e_s", "p95")), ("end to end p50", ("e2e_s", "p50")), ("TTFT p95", ("ttft_s", "p95")),
        ]),
        (right, "Queue, last 10 minutes", "requests", [
            ("running", ("requests_running", "")), ("waiting", ("requests_waiting", "")),
        ]),
    )  # fmt: skip
    for column, title, unit, wanted in panels:
        with column.container(border=True):
            lines = [charts.Line(name, found.series[key]) for name, key in wanted]
            if not any(line.points for line in lines):
                page.empty(f"{title}: no samples", "They come every second while the engine serves.")
                continue
            chart = charts.time_chart(
                lines, unit, rules, height=220, axis_title=title.partition(",")[0].lower()
            )
            st.altair_chart(chart, alt=alt_text(title, lines, unit), key=f"overview-{title}")


def alt_text(title: str, lines: Sequence[charts.Line], unit: str) -> str:
    last = ", ".join(f"{line.name} {line.points[-1][1]:.3g} {unit}" for line in lines if line.points)
    return f"{title}. Newest values: {last}."


# --- champion, hardware, story --------------------------------------------------------------------


def champion(situation: Situation, found: Overview) -> None:
    st.markdown(f"##### Champion `{escaped(found.champion_id)}`")
    since = told_at(found.since_at, situation.zone, situation.now)
    st.caption(f"Serves since {since}.", help=told_utc(found.since_at))
    rows = [
        {
            "knob": name,
            "now": told_knob(value),
            "at the start": told_knob(found.start_values.get(name, ABSENT))
            if is_changed(found, name)
            else "same",
        }
        for name, value in found.values.items()
    ]
    rows.sort(key=lambda row: row["at the start"] == "same")
    st.dataframe(rows, hide_index=True, height=248, alt="Every knob of the champion, now and at the start.")
    if found.steps:
        with st.expander("How it got there"):
            for step in found.steps:
                told_step(situation, step)


def is_changed(found: Overview, name: str) -> bool:
    return found.start_values.get(name) != found.values[name]


def told_step(situation: Situation, step: data.Step) -> None:
    change = step.change
    at = told_at(change.applied_at, situation.zone, situation.now)
    effect = f" {told_effect('Latency', step.verdict.effect_ratio)}" if step.verdict is not None else ""
    knobs = f" {escaped(told_changes(step.changed))}." if step.changed else ""
    st.markdown(
        f"{at}: {CHANGES.get(change.kind, escaped(change.kind))}.{knobs}{effect}",
        help=f"{told_utc(change.applied_at)}. {escaped(change.reason)}",
    )


def hardware(found: Overview) -> None:
    st.markdown("##### Machine")
    told = found.snapshot.hardware if found.snapshot is not None else {}
    st.caption(escaped(told.get("cpu_model") or told.get("device_name") or "unknown machine"))
    columns = st.columns(2)
    columns[0].metric(
        "CPU", told_share(found.latest("cpu_util_ratio", "all")), help=data.help_of("cpu_util_ratio")
    )
    columns[1].metric(
        "Memory",
        told_bytes(found.latest("memory_used_bytes")),
        delta=f"of {told_bytes(found.latest('memory_total_bytes'))}",
        delta_color="off",
        delta_arrow="off",
        help=data.help_of("memory_used_bytes"),
    )
    if found.latest("gpu_util_ratio", "0") is None:
        st.badge("no GPU", color="gray", icon=":material/block:")
        st.caption("GPU use, memory, temperature and power appear here on a machine with an NVIDIA driver.")
        return
    columns[0].metric(
        "GPU", told_share(found.latest("gpu_util_ratio", "0")), help=data.help_of("gpu_util_ratio")
    )
    columns[1].metric(
        "GPU memory",
        told_bytes(found.latest("gpu_memory_used_bytes", "0")),
        delta=f"of {told_bytes(found.latest('gpu_memory_total_bytes', '0'))}",
        delta_color="off",
        delta_arrow="off",
        help=data.help_of("gpu_memory_used_bytes"),
    )
    columns[0].metric(
        "Temperature",
        with_unit(found.latest("gpu_temperature_celsius", "0"), 0, " °C"),
        help=data.help_of("gpu_temperature_celsius"),
    )
    columns[1].metric(
        "Power",
        with_unit(found.latest("gpu_power_watts", "0"), 0, " W"),
        help=data.help_of("gpu_power_watts"),
    )


def story(situation: Situation, found: Overview) -> None:
    st.markdown("##### What happened last")
    if not found.notes:
        st.caption("Nothing yet.")
    for note in reversed(found.notes[-NUM_STORY:]):
        at = told_at(note.at, situation.zone, situation.now)
        text = note.text if len(note.text) <= STORY_CHARACTERS else note.text[:STORY_CHARACTERS] + "…"
        st.markdown(f"**{at}** {escaped(text)}", help=f"{told_utc(note.at)}. {escaped(note.text)}")


page.show("Overview", body, REFRESH_S)
