"""Recommendations: what waits for a person, with effect, evidence and risk; what people asked for, and who."""

import getpass
from collections.abc import Mapping
from typing import Any

import pandas as pd
import streamlit as st

from dashboard import daemon, page, records
from dashboard.page import Situation
from dashboard.records import Card, Recommendations
from dashboard.words import (
    ABSENT,
    APPLY,
    escaped,
    told_at,
    told_changes,
    told_interval,
    told_knob,
    told_percent,
    told_utc,
    told_verdict,
)
from store.database import StoreReader

REFRESH_S = 5.0
ANSWER_SHOWN = "answer"  # key of the last answer in this session


@st.cache_resource(ttl=1.0, max_entries=4, show_spinner=False)
def fresh_recommendations(_reader: StoreReader, folder: str) -> Recommendations:
    return records.recommendations(_reader)


def body(situation: Situation) -> None:
    found = fresh_recommendations(situation.reader, str(situation.reader.data_dir))
    answer = st.session_state.get(ANSWER_SHOWN)
    if answer is not None:
        (st.success if answer.is_done else st.error)(
            escaped(answer.text), icon=":material/check_circle:" if answer.is_done else "🚫"
        )
    why_not = situation.status.why_not_act
    if why_not and situation.status.is_running:
        st.info(why_not, icon=":material/visibility:")
    if not found.waiting:
        nothing_waits(situation)
    for card in found.waiting:
        with st.container(border=True):
            waiting_card(situation, found, card)
    left, right = st.columns([3, 2])
    with left.container(border=True, height="stretch"):
        back_and_pause(situation, found)
    with right.container(border=True, height="stretch"):
        downloads(situation)
    decided(situation, found)
    audit(situation, found)


def nothing_waits(situation: Situation) -> None:
    if situation.status.mode == "auto":
        page.empty(
            "Nothing waits: the tuner runs in mode auto and applies what it has proven.",
            "In mode approve, a proven configuration waits here for you.",
        )
    else:
        page.empty(
            "Nothing waits for you.",
            "As soon as a test proves a better configuration, it appears here with its evidence.",
        )


# --- a card ---------------------------------------------------------------------------------------


def waiting_card(situation: Situation, found: Recommendations, card: Card) -> None:
    number, verdict = card.recommendation.recommendation_id, card.verdict
    created = told_at(card.recommendation.created_at, situation.zone, situation.now)
    st.subheader(f"Recommendation {number}", anchor=False)
    st.caption(f"Since {created}.", help=told_utc(card.recommendation.created_at))
    left, middle, right = st.columns([4, 4, 3])
    with left:
        st.markdown("**Current → proposed**")
        knob_table(card.changed, f"knobs-{number}")
        st.markdown("**Risk**")
        for name in card.changed:
            st.markdown(f"**{escaped(name)}** {escaped(risk_words(card.knobs.get(name)))}")
    with middle:
        metric = str(card.record.experiment.rules.get("metric", "latency")) if card.record else "latency"
        if verdict is not None:
            st.metric(f"Effect on {metric}", told_percent(verdict.effect_ratio), help="Negative is better.")
            st.caption(
                f"95 % interval {told_interval(verdict.interval_low_ratio, verdict.interval_high_ratio)}, "
                f"{verdict.num_pairs} pairs"
            )
            st.markdown(escaped(" ".join(told_verdict(verdict, metric)[2:])))
            st.page_link(
                "views/experiments.py",
                label="The evidence, pair by pair",
                icon=":material/science:",
                query_params={"experiment": verdict.experiment_id},
            )
        for check in card.quality[:1]:
            st.markdown(f"Quality {'passed' if check.is_passed else 'failed'}: {escaped(check.reason)}")
    with right:
        st.markdown("**Why**")
        st.markdown(f"The search was started because of: {escaped(card.cause or 'unknown')}.")
        decide(situation, found, number)


def knob_table(changed: Mapping[str, tuple[object, object]], key: str) -> None:
    rows = [
        {"knob": name, "current": told_knob(before), "proposed": told_knob(after)}
        for name, (before, after) in changed.items()
    ]
    st.dataframe(rows, hide_index=True, key=key, alt=f"Knobs that would change: {told_changes(changed)}.")


def risk_words(declared: Mapping[str, Any] | None) -> str:
    """How a knob is applied, and whether answers could differ."""
    if declared is None:
        return "was not recorded with its way of being applied."
    applied = APPLY.get(str(declared.get("apply")), "applied in an unknown way")
    outputs = " It may change what the model answers." if declared.get("changes_outputs") else ""
    return f"{applied}.{outputs}"


def decide(situation: Situation, found: Recommendations, number: int) -> None:
    arguments = {"recommendation_id": number, "expected_champion": found.champion_id}
    applied = "It is applied at the next step of the engine; an experiment under way is ended."
    confirmed(situation, "Approve", f"approve-{number}", "approve", arguments, applied, "Yes, apply it")
    stays = "The champion stays. The search goes on and may find it again."
    confirmed(situation, "Reject", f"reject-{number}", "reject", arguments, stays, "Yes, reject it")


def confirmed(
    situation: Situation,
    label: str,
    key: str,
    action: str,
    arguments: Mapping[str, Any],
    consequence: str,
    yes: str,
    why_not: str = "",
) -> None:
    """A button that asks once more. Where nobody may act it is disabled, and says why."""
    reason = situation.status.why_not_act or why_not
    with st.popover(label, disabled=bool(reason), help=reason or None, width="stretch"):
        st.markdown(consequence)
        st.text_input("Your name, for the audit trail", key=f"actor-{key}", value=person(), max_chars=80)
        if st.button(yes, key=key, type="primary", disabled=bool(reason)):
            carry_out(situation, action, arguments, str(st.session_state[f"actor-{key}"]))


def person() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # an account without a name, as in some containers
        return "operator"


def carry_out(situation: Situation, action: str, arguments: Mapping[str, Any], actor: str) -> None:
    sent = {name: value for name, value in arguments.items() if value is not None}
    with st.spinner("Waiting for the daemon's next tick"):
        answer = daemon.act(situation.reader.data_dir, action, sent, actor.strip() or person())
    st.session_state[ANSWER_SHOWN] = answer
    fresh_recommendations.clear()
    page.status_of.clear()
    st.toast(answer.text)
    st.rerun()


# --- roll back, pause, downloads ------------------------------------------------------------------


def back_and_pause(situation: Situation, found: Recommendations) -> None:
    st.markdown("##### Take back, or stand still")
    expected = {"expected_champion": found.champion_id}
    columns = st.columns(3)
    for column, name, target in (
        (columns[0], "previous", found.previous_id),
        (columns[1], "initial", found.initial_id),
    ):
        changed = found.changes_back.get(name, {})
        with column:
            confirmed(
                situation,
                f"Roll back to the {name}",
                f"rollback-{name}",
                "rollback",
                {"to": name, **expected},
                f"Back to {escaped(target or ABSENT)}: {escaped(told_changes(changed))}. No request is dropped.",
                "Yes, roll back",
                "" if target else "There is nothing to roll back to: this champion is the first one here.",
            )
            if changed:
                st.caption(escaped(told_changes(changed)))
    with columns[2]:
        if situation.status.is_paused:
            confirmed(situation, "Resume tuning", "resume", "resume", {}, "Experiments go on.", "Yes, resume")
        else:
            ends = " The experiment under way is ended." if found.running is not None else ""
            stands = f"The champion goes on serving; nothing is tried.{ends}"
            confirmed(situation, "Pause tuning", "pause", "pause", {}, stands, "Yes, pause")


@st.cache_resource(ttl=30.0, max_entries=4, show_spinner=False)
def exported(_reader: StoreReader, folder: str) -> records.Exported:
    return records.exported(_reader)


def downloads(situation: Situation) -> None:
    st.markdown("##### Download the champion")
    found = exported(situation.reader, str(situation.reader.data_dir))
    if not found.files:
        st.caption(escaped(found.why_not))
        return
    with st.container(horizontal=True):
        for file in found.files:
            st.download_button(
                file.label,
                file.text,
                file_name=file.name,
                mime="text/plain",
                key=f"export-{file.label}",
                help=file.help,
                on_click="ignore",
            )
    st.caption("The same on the command line: `tuner export --format FORMAT --output FILE`.")


# --- what was decided -----------------------------------------------------------------------------


def decided(situation: Situation, found: Recommendations) -> None:
    if not found.decided:
        return
    st.subheader("Decided", anchor=False)
    rows = [
        {
            "no": card.recommendation.recommendation_id,
            "state": card.recommendation.state.lower(),
            "by": card.recommendation.decided_by or ABSENT,
            "when": told_at(card.recommendation.decided_at, situation.zone, situation.now),
            "knobs": told_changes(card.changed),
            "effect": told_percent(card.verdict.effect_ratio) if card.verdict is not None else ABSENT,
            "UTC": told_utc(card.recommendation.decided_at),
        }
        for card in found.decided
    ]
    st.dataframe(rows, hide_index=True, alt="Recommendations that were decided, newest first.")


def audit(situation: Situation, found: Recommendations) -> None:
    st.subheader("Audit trail", anchor=False)
    if not found.actions:
        page.empty(
            "Nobody has asked for anything yet.",
            "Every approval, rejection, rollback and pause is kept here.",
        )
        return
    frame = pd.DataFrame(
        {
            "when": [told_at(row.requested_at, situation.zone, situation.now) for row in found.actions],
            "who": [row.actor for row in found.actions],
            "role": [row.role for row in found.actions],
            "asked for": [row.action for row in found.actions],
            "with": [
                ", ".join(f"{name} {value}" for name, value in row.arguments.items()) for row in found.actions
            ],
            "state": [row.state.lower() for row in found.actions],
            "answer": [row.answer for row in found.actions],
            "UTC": [told_utc(row.requested_at) for row in found.actions],
        }
    )
    st.dataframe(
        frame,
        hide_index=True,
        alt="What people asked of the daemon, newest first.",
        column_config={"answer": st.column_config.TextColumn(width="large")},
    )


page.show("Recommendations", body, REFRESH_S)
