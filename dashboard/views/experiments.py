"""Experiments: what was tried against what, how the evidence grew, and what the verdict means."""

import math
from collections.abc import Sequence

import pandas as pd
import streamlit as st

from dashboard import charts, evidence, page, records
from dashboard.page import Situation
from dashboard.records import ListedExperiment, ShownExperiment
from dashboard.words import (
    ABSENT,
    KINDS,
    OUTCOMES,
    escaped,
    told_at,
    told_changes,
    told_duration,
    told_interval,
    told_number,
    told_odds,
    told_percent,
    told_utc,
    told_verdict,
)
from store.database import StoreReader
from store.errors import UnknownRow

REFRESH_S = 5.0
NUM_PATHS = 120
KIND_FILTER = ("all", "test", "probe", "holdback", "aa")


@st.cache_resource(ttl=REFRESH_S / 2, max_entries=4, show_spinner=False)
def fresh_list(_reader: StoreReader, folder: str) -> list[ListedExperiment]:
    return records.experiment_list(_reader)


@st.cache_resource(ttl=REFRESH_S / 2, max_entries=16, show_spinner=False)
def fresh_experiment(_reader: StoreReader, folder: str, experiment_id: str) -> ShownExperiment:
    return records.shown_experiment(_reader, experiment_id)


def body(situation: Situation) -> None:
    reader = situation.reader
    rows = fresh_list(reader, str(reader.data_dir))
    if not rows:
        page.empty(
            "No experiment yet.",
            "First the tuner learns how the champion serves this traffic; then it probes candidates, one pair of "
            "slices each, and tests the best one.",
        )
        return
    shown = filtered(rows)
    if not shown:
        page.empty("No experiment of this kind yet.")
        return
    chosen = choose(situation, shown)
    try:
        found = fresh_experiment(reader, str(reader.data_dir), chosen)
    except UnknownRow as error:
        page.empty(str(error))
        return
    detail(situation, found)


# --- list -----------------------------------------------------------------------------------------


def filtered(rows: Sequence[ListedExperiment]) -> list[ListedExperiment]:
    default = page.choice_from_query("kind", KIND_FILTER, "all")
    kind = (
        st.segmented_control("Kind", KIND_FILTER, default=default, help="; ".join(KINDS.values())) or default
    )
    page.remember("kind", kind)
    return [row for row in rows if kind in ("all", row.experiment.kind)]


def choose(situation: Situation, rows: Sequence[ListedExperiment]) -> str:
    """The list; the chosen line's id. By default the one under way, else the newest test, else the newest."""
    frame = pd.DataFrame(
        {
            "started": [told_at(row.experiment.created_at, situation.zone, situation.now) for row in rows],
            "kind": [row.experiment.kind for row in rows],
            "champion → challenger": [told_changes(row.changed) for row in rows],
            "pairs": [row.num_pairs for row in rows],
            "effect": [effect_words(row) for row in rows],
            "result": [result_words(row) for row in rows],
            "id": [row.experiment.experiment_id for row in rows],
        }
    )
    event = st.dataframe(
        frame,
        hide_index=True,
        height=min(38 + 35 * len(rows), 215),
        on_select="rerun",
        selection_mode="single-row",
        key="experiment-list",
        column_config={"champion → challenger": st.column_config.TextColumn(width="large")},
        alt="Experiments, newest first. Select a line to see it below.",
    )
    selected = event.selection.rows if event else []
    ids = [row.experiment.experiment_id for row in rows]
    if selected and selected[0] < len(ids):
        chosen = ids[selected[0]]
    else:
        chosen = page.choice_from_query("experiment", ids, default_of(rows))
    page.remember("experiment", chosen)
    return chosen


def default_of(rows: Sequence[ListedExperiment]) -> str:
    for is_wanted in (
        lambda row: row.experiment.state == "RUNNING",
        lambda row: row.experiment.kind == "test",
        lambda row: True,
    ):
        for row in rows:
            if is_wanted(row):
                return row.experiment.experiment_id
    raise ValueError("There is no experiment to choose from.")


def effect_words(row: ListedExperiment) -> str:
    if row.verdict is not None:
        return told_percent(row.verdict.effect_ratio)
    if row.trial is not None and row.trial.value is not None:
        return told_percent(math.expm1(row.trial.value))
    return ABSENT


def result_words(row: ListedExperiment) -> str:
    if row.verdict is not None:
        return OUTCOMES.get(row.verdict.outcome, row.verdict.outcome)
    return {"RUNNING": "under way", "DECIDED": "scored", "STOPPED": "stopped"}.get(
        row.experiment.state, row.experiment.state.lower()
    )


# --- one experiment -------------------------------------------------------------------------------


def detail(situation: Situation, found: ShownExperiment) -> None:
    one = found.record.experiment
    changed = found.record.changed_knobs
    st.subheader(escaped(told_changes(changed)) if changed else "The champion against itself", anchor=False)
    st.caption(
        f"{KINDS.get(one.kind, escaped(one.kind))}. {escaped(one.experiment_id)}, started "
        f"{told_at(one.created_at, situation.zone, situation.now)}, {escaped(one.state.lower())}.",
        help=told_utc(one.created_at),
    )
    left, right = st.columns([3, 2])
    with left.container(border=True, height="stretch"):
        verdict(found)
    with right.container(border=True, height="stretch"):
        plan(found)
    with st.container(border=True):
        slices(situation, found)
    differences = found.differences
    if differences:
        curves(found, differences)
    else:
        page.empty(
            "No pair has been scored yet.",
            "A pair is two slices, one of each arm; it is scored when both have settled.",
        )
    study(found)


def verdict(found: ShownExperiment) -> None:
    """The verdict in words a newcomer understands; the judge's own sentence below them."""
    record, metric = found.record, str(found.record.experiment.rules.get("metric", "latency"))
    st.markdown("##### Verdict")
    if record.verdict is None:
        one = record.experiment
        if one.state == "RUNNING":
            num, cap = len(found.differences), int(one.rules.get("max_pairs", 1))
            st.progress(min(1.0, num / cap), text=f"No verdict yet: {num} of at most {cap} pairs.")
            if found.differences:
                last = evidence.estimates(found.differences)[-1]
                st.markdown(
                    f"So far {metric} is at **{told_percent(last.effect_ratio)}** "
                    f"({told_interval(last.low_ratio, last.high_ratio)}). This is not a decision: only the boundary is."
                )
        else:
            st.markdown(escaped(one.reason or "It ended without a verdict."))
            if one.kind in ("probe", "holdback", "aa") and found.differences:
                last = evidence.estimates(found.differences)[-1]
                st.markdown(
                    f"Measured: {metric} {told_percent(last.effect_ratio)} over {last.num_pairs} pair(s)."
                )
        return
    icons = {
        "PROMOTE": ":material/check_circle:",
        "REJECT": ":material/block:",
        "INCONCLUSIVE": ":material/remove:",
    }
    lines = told_verdict(record.verdict, metric)
    st.markdown(f"{icons.get(record.verdict.outcome, '')} **{escaped(lines[0])}**")
    st.markdown(escaped(" ".join(lines[1:])))
    with st.expander("In the judge's words"):
        st.markdown(escaped(record.verdict.reason))
    guardrails(found)


def guardrails(found: ShownExperiment) -> None:
    verdict = found.record.verdict
    judged = (verdict.evidence.get("judgement") or {}).get("guardrails") or [] if verdict is not None else []
    if not judged:
        return
    rows = [
        {"guardrail": one["name"], "": "✔ passed" if one["passed"] else "✘ failed", "measured": one["detail"]}
        for one in judged
    ]
    st.dataframe(
        rows,
        hide_index=True,
        alt="Guardrails: what a promotion must meet besides the gain.",
        column_config={"measured": st.column_config.TextColumn(width="large")},
    )


def plan(found: ShownExperiment) -> None:
    """Level, cap, what it can find, twin, and for how long."""
    record = found.record
    rules, spend = record.experiment.rules, record.spend
    st.markdown("##### Rules, fixed before the first pair")
    rows: list[tuple[str, str]] = []
    if spend is not None:
        rows.append(
            (
                "level",
                f"{100 * spend.level:.3g} %: a change without effect wins {told_odds(spend.level)} such tests",
            )
        )
    slice_s, burn_in_s = rules.get("slice_s"), rules.get("burn_in_s")
    if slice_s is not None and burn_in_s is not None:
        rows.append(("slices", f"{slice_s:g} s each, the first {burn_in_s:g} s are not judged"))
    if record.experiment.kind == "test":
        rows.append(("pairs", f"at most {rules.get('max_pairs')}, a look every {rules.get('look_every')}"))
        rows.append(("smallest gain", f"{100 * float(rules.get('min_effect', 0)):.3g} % is worth a change"))
    planning = record.experiment.planning
    if planning.get("mde_ratio") is not None:
        rows.append(
            (
                "can find",
                f"gains from about {100 * abs(float(planning['mde_ratio'])):.0f} % on, in 4 of 5 cases",
            )
        )
    if planning.get("minutes_needed") is not None:
        needed = told_number(planning.get("pairs_needed"))
        rows.append(
            ("needs", f"about {told_duration(60 * float(planning['minutes_needed']))}, {needed} pairs")
        )
    fit = record.twin_fit
    twin = "not used: responses are as measured" if fit is None else fit.reason
    rows.append(("twin", twin))
    for check in found.quality[:1]:
        passed = "passed" if check.is_passed else "failed"
        rows.append(("quality", f"{passed}: {check.reason}"))
    for name, told in rows:
        st.markdown(f"**{name}** {escaped(told)}")
    if planning.get("words"):
        st.caption(escaped(planning["words"]))


def slices(situation: Situation, found: ShownExperiment) -> None:
    st.markdown(
        "##### Slices in time",
        help="Thin: burn-in, served and not judged. ✕: void, its reason is in the tooltip.",
    )
    rows = []
    for pair in found.record.pairs:
        order = "champion first" if pair.slices[0].arm == "champion" else "challenger first"
        for row in pair.slices:
            scored = (
                f"{row.num_requests} requests, mean ln {row.measured:.3f}"
                if row.state == "SCORED" and row.measured is not None
                else row.void_reason or "not scored yet"
            )
            rows.append(
                {
                    "pair": pair.index + 1,
                    "arm": row.arm,
                    "order": order,
                    "start_at": row.planned_start_at,
                    "burn_in_until": row.planned_start_at + row.burn_in_s,
                    "end_at": row.planned_end_at,
                    "state": row.state,
                    "words": scored,
                    "utc": f"{told_utc(row.planned_start_at)} to {told_utc(row.planned_end_at)}",
                }
            )
    if not rows:
        st.caption("No slice has been planned yet.")
        return
    num_void = sum(row["state"] == "VOID" for row in rows)
    st.altair_chart(
        charts.slices_chart(rows),
        key="slices",
        alt=f"{len(rows)} slices in {len(found.record.pairs)} pairs, {num_void} void; a lane for each arm.",
    )


def curves(found: ShownExperiment, differences: Sequence[float]) -> None:
    rules, record = found.record.experiment.rules, found.record
    known = evidence.estimates(differences)
    max_pairs, look_every = int(rules.get("max_pairs", 1)), int(rules.get("look_every", 1))
    last = known[-1]
    left, right = st.columns(2)
    with left.container(border=True):
        st.markdown(
            "##### The effect closes in",
            help="The estimate after each pair and its 95 % interval, which may be looked at after any pair.",
        )
        shown_pairs = max_pairs if record.verdict is None else len(differences)
        st.altair_chart(
            charts.effect_chart(known, float(rules.get("min_effect", 0.0)), shown_pairs),
            key="effect",
            alt=f"Estimate after {last.num_pairs} pairs: {told_percent(last.effect_ratio)}, interval "
            f"{told_interval(last.low_ratio, last.high_ratio)}.",
        )
    with right.container(border=True):
        st.markdown(
            "##### Could it have been luck?",
            help="Thin lines: the same pairs with the coins thrown again; without an effect the thick line is one "
            "of them. The mark is the boundary of the exact test: at or below it a gain counts as proven.",
        )
        level = record.spend.level if record.spend is not None else float(rules.get("level", 0.05))
        looks = (
            evidence.looks(differences, level, max(max_pairs, 1), look_every)
            if record.experiment.kind == "test"
            else []
        )
        paths = evidence.reflipped(differences, NUM_PATHS, seed=record.experiment.seed)
        total = sum(differences)
        below = sum(path[-1] <= total for path in paths)
        st.altair_chart(
            charts.cloud_chart(paths, differences, looks),
            key="cloud",
            alt=f"Sum of differences {total:.2f} log units; {below} of {NUM_PATHS} re-flipped histories end as low.",
        )
        st.caption(f"{below} of {NUM_PATHS} histories with other coins end as low as the one that happened.")
    with st.container(border=True):
        words = (
            "with the twin subtracted, and as measured"
            if found.uses_twin
            else "as measured; no twin was used"
        )
        st.markdown(
            f"##### Each pair, {words}",
            help="The twin replays the champion over the same arrivals; subtracting it takes out what they did.",
        )
        st.altair_chart(
            charts.pairs_chart(differences, found.raw_differences if found.uses_twin else None),
            key="pairs",
            alt="Difference of each pair in percent: "
            + ", ".join(told_percent(math.expm1(d), 0) for d in differences),
        )


def study(found: ShownExperiment) -> None:
    """Where it belongs: the probes of its study, and the stream of tests whose levels it shares."""
    left, right = st.columns([3, 2])
    with left.container(border=True, height="stretch"):
        st.markdown(
            "##### Probes of its study", help="One pair each: enough to rank candidates, never to decide."
        )
        if found.study is not None:
            st.caption(f"Study {found.study.study_id}, because of: {escaped(found.study.cause)}.")
        probes = [
            {
                "name": told_changes(row.changed),
                "measured": math.expm1(row.trial.value),
                "foretold": foretold_ratio(found, row.experiment.experiment_id),
            }
            for row in found.siblings
            if row.trial is not None and row.trial.value is not None
        ]
        if probes:
            st.altair_chart(
                charts.probes_chart(probes),
                key="probes",
                alt=f"{len(probes)} probes: " + "; ".join(str(row["name"]) for row in probes),
            )
        else:
            st.caption("None was probed, or it does not belong to a study.")
        others = [row for row in found.siblings if row.experiment.kind == "aa"]
        for row in others:
            st.markdown(
                f"A/A {escaped(row.experiment.experiment_id)}: {escaped(result_words(row))}, {effect_words(row)}"
            )
    with right.container(border=True, height="stretch"):
        st.markdown(
            "##### Levels of all tests",
            help="LORD++ gives each test a level so that at most 5 % of all promotions are false, however many "
            "are tried.",
        )
        levels = [
            (
                spend.test_index,
                spend.level,
                OUTCOMES.get(verdict.outcome, verdict.outcome) if verdict else "under way",
            )
            for spend, _, verdict in found.spends
        ]
        if levels:
            told = ", ".join(
                f"test {index} at {100 * level:.3g} % {outcome}" for index, level, outcome in levels
            )
            st.altair_chart(charts.levels_chart(levels), key="levels", alt=told)
        else:
            st.caption("No test has been given a level yet.")


def foretold_ratio(found: ShownExperiment, experiment_id: str) -> float | None:
    predicted = found.foretold.get(experiment_id)
    return None if predicted is None else math.expm1(predicted)


page.show("Experiments", body, REFRESH_S)
