"""The frame around every page: who answers, how old the data is, and what is said where there is nothing to show.

A page is one fragment that draws itself again every few seconds; there is never a second one that could outlive it.
Whatever goes wrong inside is a sentence on the page and a trace in the log.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, tzinfo
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import streamlit as st

from dashboard import daemon, data
from dashboard.daemon import DaemonStatus
from dashboard.words import escaped, told_duration
from store.database import StoreReader
from store.errors import (
    DamagedStore,
    NewerStore,
    NoStore,
    OlderStore,
    StoreBusy,
    StoreError,
)
from store.tables import Anomaly

logger = logging.getLogger(__name__)

FOLDER_VARIABLE = "TUNER_DATA_DIR"
STALE_S = 15.0  # samples come every second; this late something is wrong
STATUS_TTL_S = 1.5
COMPACT = "<style>.stMainBlockContainer {padding-top: 3.6rem; padding-bottom: 2rem;}</style>"  # more of it at a glance

TITLES: dict[type[StoreError], str] = {
    NoStore: "Nothing has been recorded here yet",
    NewerStore: "This store was written by a newer version",
    OlderStore: "This store was written by an older version",
    StoreBusy: "The store is locked by another process",
    DamagedStore: "The store is damaged",
}


@dataclass(frozen=True)
class Situation:
    """What a page is drawn from, besides its own data."""

    reader: StoreReader
    status: DaemonStatus
    now: float
    zone: tzinfo
    sampled_at: float | None
    anomalies: Sequence[Anomaly]

    @property
    def age_s(self) -> float | None:
        return None if self.sampled_at is None else max(0.0, self.now - self.sampled_at)

    @property
    def is_stale(self) -> bool:
        return self.age_s is not None and self.age_s > STALE_S

    @property
    def shown_until(self) -> float:
        """The end of live charts: now, or where the data ends when nobody writes any more."""
        return self.sampled_at if self.sampled_at is not None and self.is_stale else self.now


def data_dir() -> Path:
    return Path(os.environ.get(FOLDER_VARIABLE, "var/tuner"))


def run_command() -> str:
    return f"tuner run --data-dir {data_dir()}"


def zone() -> tzinfo:
    """The viewer's own; UTC where the browser does not say."""
    try:
        return ZoneInfo(st.context.timezone or "UTC")
    except (ZoneInfoNotFoundError, ValueError, AttributeError):
        return UTC


@st.cache_resource(max_entries=4)
def reader_of(folder: str) -> StoreReader:
    return StoreReader(Path(folder))


@st.cache_resource(ttl=STATUS_TTL_S, max_entries=4, show_spinner=False)
def status_of(folder: str) -> DaemonStatus:
    return daemon.status_of(Path(folder))


def show(title: str, body: Callable[[Situation], None], every_s: float) -> None:
    """Draws a page. `body` runs in a fragment, every `every_s` seconds unless the viewer paused it."""
    st.html(COMPACT)
    left, right = st.columns([6, 1], vertical_alignment="center")
    left.title(title, anchor=False)
    is_live = right.toggle(
        "Live", value=True, key="live", help="Off: the page stands still until you turn it on again."
    )
    st.fragment(_framed, run_every=every_s if is_live else None)(body)


def _framed(body: Callable[[Situation], None]) -> None:
    folder = data_dir()
    status = status_of(str(folder))
    try:
        reader = reader_of(str(folder))
        sampled_at, anomalies = data.freshness(reader)
        situation = Situation(reader, status, time.time(), zone(), sampled_at, anomalies)
        strip(situation)
        body(situation)
    except StoreError as error:
        trouble(error, status)
    except Exception as error:
        if type(error).__module__.startswith("streamlit."):  # a rerun or a stop, which must pass
            raise
        logger.exception("A page could not be drawn")
        st.error(
            f"This page could not be drawn ({type(error).__name__}). It is a defect; the trace stands in the "
            "dashboard's log. The other pages and the tuner are not affected.",
            icon=":material/warning:",
        )


def strip(situation: Situation) -> None:
    """One line of badges on top of every page: word and colour say the same."""
    status = situation.status
    with st.container(horizontal=True, gap="small", vertical_alignment="center"):
        if status.is_running:
            st.badge(
                f"daemon running, mode {escaped(status.mode)}", color="green", icon=":material/check_circle:"
            )
            is_ready = status.engine == "ready"
            st.badge(
                f"engine {escaped(status.engine)}",
                color="green" if is_ready else "orange",
                icon=":material/memory:",
            )
            if status.is_paused:
                st.badge("tuning paused", color="orange", icon=":material/pause_circle:")
        else:
            st.badge("daemon stopped", color="red", icon=":material/cancel:")
        faults = sum(one.kind == "fault" for one in situation.anomalies)
        conditions = len(situation.anomalies) - faults
        if faults:
            st.badge(
                f"{faults} fault{'s'[: faults > 1]} open: tuning is frozen",
                color="red",
                icon=":material/warning:",
            )
        if conditions:
            st.badge(
                f"{conditions} condition{'s'[: conditions > 1]} open", color="orange", icon=":material/error:"
            )
        if not situation.anomalies:
            st.badge("no open anomalies", color="gray", icon=":material/check:")
        if situation.age_s is None:
            st.badge("no samples yet", color="gray", icon=":material/hourglass_empty:")
        elif situation.is_stale:
            st.badge(
                f"stale: the newest sample is {told_duration(situation.age_s)} old",
                color="orange",
                icon=":material/schedule:",
            )
        else:
            st.badge(f"live, {situation.age_s:.0f} s old", color="green", icon=":material/sensors:")
        if status.role == "viewer":
            st.badge("viewer: look only", color="gray", icon=":material/visibility:")
    if not status.is_running:
        stopped(status)


def stopped(status: DaemonStatus) -> None:
    with st.container(border=True):
        st.markdown(
            f"**The daemon is not running.** {escaped(status.why_not)} What is shown is what it recorded last; the "
            "engine may still serve. Start the daemon with"
        )
        st.code(run_command(), language="shell")


def trouble(error: StoreError, status: DaemonStatus) -> None:
    """The page where the store cannot be read: what is the case, and what to do."""
    title = next(
        (told for kind, told in TITLES.items() if isinstance(error, kind)), "The store cannot be read"
    )
    with st.container(border=True):
        st.subheader(title, anchor=False)
        st.markdown(escaped(error))
        if isinstance(error, NoStore):
            st.markdown("Start serving, and this page fills by itself within seconds:")
            st.code(run_command(), language="shell")
        elif isinstance(error, OlderStore):
            st.code(run_command(), language="shell")
        else:
            st.markdown("This page tries again by itself.")
        if status.is_running:
            st.markdown(f"The daemon answers: {escaped(status.doing)}")


def empty(text: str, hint: str = "") -> None:
    """What stands where nothing has happened yet."""
    with st.container(border=True):
        st.markdown(f"**{escaped(text)}**")
        if hint:
            st.caption(hint)


def choice_from_query(name: str, known: Sequence[str], default: str) -> str:
    """A value of the query string, as far as it is one of the known ones."""
    asked = st.query_params.get(name, default)
    return asked if asked in known else default


def remember(name: str, value: Any) -> None:
    """Writes the query string where it differs: the address of the page is always what it shows."""
    if st.query_params.get(name) != str(value):
        st.query_params[name] = str(value)
