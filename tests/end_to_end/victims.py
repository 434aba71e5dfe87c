"""What is killed, how it is found, what "well again" means for it, and which failures of requests it excuses."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, select

from store.database import StoreReader
from store.tables import ForecastFit, Note, Proposal, RuntimeEvent
from tests.end_to_end.deployment import Deployment, is_running

NOBODY: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Victim:
    """`kills_a_life`: how many before everything is started anew, since restarts are counted and bounded by design."""

    name: str
    find: Callable[[Deployment], int | None]
    is_well: Callable[[Deployment, "Mark"], bool]
    mark: Callable[[Deployment], Any] = lambda site: None  # whatever `is_well` compares with
    after: Callable[[Deployment], None] = lambda site: None  # what an operator or service manager does
    excuses: frozenset[str] = NOBODY
    kills_a_life: int = 1000
    pause_s: tuple[float, float] = (
        1.0,
        5.0,
    )  # a random instant this long after the one before was well again
    told: tuple[str, str] | None = None  # table and text that explain it


@dataclass(frozen=True)
class Mark:
    """As things were at the kill."""

    pid: int
    value: Any


# --- well again -----------------------------------------------------------------------------------


def daemon_is_well(site: Deployment, mark: Mark) -> bool:
    return site.daemon_answers() and site.is_champion_in_force()


def engine_is_well(site: Deployment, mark: Mark) -> bool:
    return site.serves() and site.engine_pid() not in (None, mark.pid) and site.is_champion_in_force()


def front_end_is_well(site: Deployment, mark: Mark) -> bool:
    return site.serves() and site.front_end_pid() not in (None, mark.pid) and site.is_champion_in_force()


def dashboard_is_well(site: Deployment, mark: Mark) -> bool:
    return site.dashboard_pid() not in (None, mark.pid) and site.dashboard_answers()


def search_is_well(site: Deployment, mark: Mark) -> bool:
    """Another child searches, or a point was found meanwhile."""
    return site.child_pid("tuner.propose") not in (None, mark.pid) or newest(site, "proposal") > mark.value


def forecast_is_well(site: Deployment, mark: Mark) -> bool:
    """Another child fits, or the failure is recorded and nothing else waits for its turn."""
    return site.child_pid("tuner.notice.forecast") not in (None, mark.pid) or newest(site, "fit") > mark.value


# --- what the store tells -------------------------------------------------------------------------


def newest(site: Deployment, what: str) -> float:
    reader = StoreReader(site.data_dir)
    if what == "proposal":
        with reader.journal() as session:
            return float(session.scalar(select(func.max(Proposal.proposal_id))) or 0)
    with reader.metrics() as session:
        return float(session.scalar(select(func.max(ForecastFit.tried_at))) or 0.0)


def num_told(site: Deployment, victim: Victim) -> int | None:
    """How often the journal (or the engine's own events) speak of it; None where nothing has to."""
    if victim.told is None:
        return None
    table, text = victim.told
    reader = StoreReader(site.data_dir)
    if table == "event":
        with reader.metrics() as session:
            return session.scalar(select(func.count()).where(RuntimeEvent.kind == text)) or 0
    with reader.journal() as session:
        return session.scalar(select(func.count()).where(Note.text.contains(text))) or 0


def engine_outlives(site: Deployment, engine_pid: int | None, limit_s: float = 5.0) -> bool:
    """Whether an engine is still there this long after its front end was killed. It must not be."""
    end_at = time.monotonic() + limit_s
    while engine_pid is not None and time.monotonic() < end_at:
        if not is_running(engine_pid, "runtime.engine"):
            return False
        time.sleep(0.05)
    return engine_pid is not None


BROKEN = frozenset({"broken", "no connection", "cut", "refused 503 not_ready"})
STARTED = frozenset({"stream error engine_restarted", "refused 500 engine_restarted"})

VICTIMS: Mapping[str, Victim] = {
    victim.name: victim
    for victim in (
        Victim("daemon", Deployment.daemon_pid, daemon_is_well, after=Deployment.start),
        Victim(
            "engine", Deployment.engine_pid, engine_is_well, excuses=STARTED, kills_a_life=5,
            told=("event", "engine_lost"),
        ),
        Victim(
            "front end", Deployment.front_end_pid, front_end_is_well, excuses=BROKEN, kills_a_life=4,
            told=("note", "The runtime died"),
        ),
        Victim(
            "dashboard", Deployment.dashboard_pid, dashboard_is_well, kills_a_life=5, pause_s=(1.0, 5.0),
            told=("note", "The dashboard ended"),
        ),
        Victim(
            "forecast", lambda site: site.child_pid("tuner.notice.forecast"), forecast_is_well,
            mark=lambda site: newest(site, "fit"), kills_a_life=7, pause_s=(0.0, 2.0),
        ),
        Victim(
            "search", lambda site: site.child_pid("tuner.propose"), search_is_well,
            mark=lambda site: newest(site, "proposal"), pause_s=(0.0, 2.0), told=("note", "The search is asked again"),
        ),
    )
}  # fmt: skip
