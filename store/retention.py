"""How long what was measured is kept, and how much room it may take: old rows go, coarse ones stay longer.

    raw samples 24 h ▶ minutes 14 days ▶ hours 400 days        steps 24 h        request timings 7 days

`Upkeep.step` does a few milliseconds of it at a call, so that it can sit in the tick. Above `max_bytes` the
oldest raw samples go first, then steps, timings and minutes; the journal never.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy import text
from sqlalchemy.orm import Session

from store.rollups import HOUR_S, MINUTE_S, SeriesKey, roll_up, rolled_up_until

DAY_S = 86400.0
ROUND_S = 60.0  # a round visits every series once
BUDGET_S = 0.010  # of a tick
ROWS_A_CALL = 2000  # deleted at once: some milliseconds
RAW_SPAN_A_CALL_S = 3600.0
PAGES_A_CALL = 200  # 0.8 MB given back to the disk
SQUEEZE = 0.8  # what stays of the oldest class when the store is too large
MIN_KEPT_S = 3600.0  # the twin and the detectors need the last hour, whatever the cap


@dataclass(frozen=True)
class Retention:
    """Seconds that each class is kept, and the bytes that both files may take together."""

    raw_s: float = DAY_S
    minutes_s: float = 14 * DAY_S
    hours_s: float = 400 * DAY_S
    steps_s: float = DAY_S
    timings_s: float = 7 * DAY_S
    max_bytes: int = 2_000_000_000


SQUEEZED = ("raw_s", "steps_s", "timings_s", "minutes_s")  # in this order

Chore = Callable[[Session, float], bool]  # True: there is more to do, call again


class Upkeep:
    """Rolls up and forgets, one chore after another, round by round. Holds no rows: a restart begins anew."""

    def __init__(
        self,
        metrics: Callable[[], AbstractContextManager[Session]],
        retention: Retention,
        journal_path: Path | None = None,
        timer: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`metrics` opens a session of the metrics file; the journal's size counts against the cap too."""
        self.asked = retention
        self.kept = retention  # what is kept now; shorter than asked for while the store is too large
        self._metrics, self._journal_path, self._timer = metrics, journal_path, timer
        self._chores: deque[Chore] = deque()
        self._round_at = -math.inf
        self._is_squeezed = False

    def step(self, now: float, budget_s: float = BUDGET_S, spare_bytes: float = math.inf) -> str | None:
        """Works for about `budget_s`, one chore at least. Returns a line for the story when the cap begins or ends.

        spare_bytes: what the disk has left for the store; below 0 the store must become smaller, whatever its cap.
        """
        began = self._timer()
        told = None
        if not self._chores:
            if 0 <= now - self._round_at < ROUND_S:  # a clock that went back starts a round
                return None
            self._round_at = now
            with self._metrics() as session:
                told = self._weigh(session, now, spare_bytes)
                self._chores.extend(self._round(session))
        while self._chores:
            chore = self._chores.popleft()
            with self._metrics() as session:
                if chore(session, now):
                    self._chores.appendleft(chore)
            if self._timer() - began >= budget_s:
                break
        return told

    def finish(self, now: float) -> None:
        """The whole round at once: for tests, and for a command that may take its time."""
        self._round_at = -math.inf
        self.step(now, math.inf)

    def _round(self, session: Session) -> Iterable[Chore]:
        for key in all_series(session):
            yield lambda session, now, key=key: self._age_series(session, key, now)  # type: ignore[misc]
        yield lambda session, now: _forget_steps(session, now - self.kept.steps_s)
        yield lambda session, now: _forget_timings(session, now - self.kept.timings_s)
        yield lambda session, now: _forget_events(session, now - self.kept.minutes_s)
        yield lambda session, now: _forget_forecasts(session, now - self.kept.minutes_s)
        yield lambda session, now: give_back(session)

    def _age_series(self, session: Session, key: SeriesKey, now: float) -> bool:
        """Nothing is forgotten before it stands in the coarser bins, and then by whole bins: none is told twice."""
        if roll_up(session, key, MINUTE_S, now) or roll_up(session, key, HOUR_S, now):
            return True
        raw_until = min(_whole(now - self.kept.raw_s, MINUTE_S), rolled_up_until(session, key, MINUTE_S))
        minutes_until = min(_whole(now - self.kept.minutes_s, HOUR_S), rolled_up_until(session, key, HOUR_S))
        more = _forget_raw(session, key, raw_until)
        _forget_bins(session, key, MINUTE_S, minutes_until)
        _forget_bins(session, key, HOUR_S, now - self.kept.hours_s)
        return more

    # -- the cap -------------------------------------------------------------------------------------------

    def _weigh(self, session: Session, now: float, spare_bytes: float) -> str | None:
        """Shortens what is kept while the store is larger than it may be; lengthens it again when there is room."""
        size = live_bytes(session) + (_size_of(self._journal_path) if self._journal_path is not None else 0)
        cap = min(self.asked.max_bytes, size + spare_bytes)
        if size <= cap:
            if self.kept == self.asked or size > SQUEEZE * cap:
                return None
            self._relax()
            if self.kept != self.asked or not self._is_squeezed:
                return None
            self._is_squeezed = False
            return "The store has room again: metrics are kept as long as the settings say."
        squeezed = self._squeeze(session, now)
        if self._is_squeezed:
            return None
        self._is_squeezed = True
        does = f"The oldest {squeezed} go before their time." if squeezed else "Nothing more may go."
        limit = f"`keep.max_bytes` ({self.asked.max_bytes / 1e6:.0f} MB)"
        than = limit if size > self.asked.max_bytes else "its disk has room for"
        return f"The store takes {size / 1e6:.0f} MB, more than {than}. {does} Decisions are never deleted."

    def _squeeze(self, session: Session, now: float) -> str | None:
        for name in SQUEEZED:
            oldest = session.execute(_OLDEST[name]).scalar()
            if oldest is None:
                continue
            kept_s = max(MIN_KEPT_S, SQUEEZE * min(getattr(self.kept, name), now - oldest))
            if now - oldest > kept_s:
                self.kept = replace(self.kept, **{name: kept_s})
                return _WORDS[name]
        return None

    def _relax(self) -> None:
        longer: dict[str, Any] = {
            name: min(getattr(self.asked, name), getattr(self.kept, name) / SQUEEZE) for name in SQUEEZED
        }
        self.kept = replace(self.kept, **longer)


_WORDS = {"raw_s": "raw samples", "steps_s": "steps", "timings_s": "request timings", "minutes_s": "minutes"}
_OLDEST = {
    # The oldest of any one series would need a look at each; the first series is sampled as long as any.
    "raw_s": text(
        "SELECT min(at) FROM sample WHERE (metric, label) = (SELECT metric, label FROM sample LIMIT 1)"
    ),
    "steps_s": text("SELECT min(at) FROM step"),
    "timings_s": text("SELECT min(arrived_at) FROM request_timing"),
    "minutes_s": text(
        "SELECT min(at) FROM sample_rollup WHERE bin_s = 60 AND (metric, label) = "
        "(SELECT metric, label FROM sample_rollup LIMIT 1)"
    ),
}


def live_bytes(session: Session) -> int:
    """Bytes of the file that hold rows: pages that are free and not given back yet do not count."""
    connection: Any = session.connection().connection.driver_connection
    pages, free, page_bytes = (
        connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * page_bytes)


def give_back(session: Session) -> bool:
    """Frees some pages to the disk; True while there are more. One step of the statement frees one page."""
    connection: Any = session.connection().connection.driver_connection
    free = connection.execute("PRAGMA freelist_count").fetchone()[0]
    if free:
        connection.execute(f"PRAGMA incremental_vacuum({PAGES_A_CALL})").fetchall()
    return bool(free > PAGES_A_CALL)


def all_series(session: Session) -> list[SeriesKey]:
    """Every series of which anything stands, also of metrics that this version no longer declares."""
    return [SeriesKey(*row) for row in session.execute(_ALL_SERIES)]


def _whole(at: float, bin_s: int) -> float:
    return math.floor(at / bin_s) * bin_s


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _forget_raw(session: Session, key: SeriesKey, until: float) -> bool:
    values = {**key._asdict(), "until": until, "span_s": RAW_SPAN_A_CALL_S}
    first = session.execute(_FIRST_RAW, values).scalar()
    if first is None or first >= until:
        return False
    session.execute(_FORGET_RAW, {**values, "upto": min(until, first + RAW_SPAN_A_CALL_S)})
    return bool(first + RAW_SPAN_A_CALL_S < until)


def _forget_bins(session: Session, key: SeriesKey, bin_s: int, until: float) -> None:
    session.execute(_FORGET_BINS, {**key._asdict(), "bin_s": bin_s, "until": until})


def _forget_steps(session: Session, until: float) -> bool:
    return _deleted(session, _FORGET_STEPS, until) == ROWS_A_CALL


def _forget_timings(session: Session, until: float) -> bool:
    return _deleted(session, _FORGET_TIMINGS, until) == ROWS_A_CALL


def _forget_events(session: Session, until: float) -> bool:
    return _deleted(session, _FORGET_EVENTS, until) == ROWS_A_CALL


def _forget_forecasts(session: Session, until: float) -> bool:
    session.execute(_FORGET_FORECASTS, {"until": until})
    return False


def _deleted(session: Session, statement: Any, until: float) -> int:
    done: Any = session.execute(statement, {"until": until, "num": ROWS_A_CALL})
    return int(done.rowcount)


_FIRST_RAW = text("SELECT min(at) FROM sample WHERE metric = :metric AND label = :label")
_FORGET_RAW = text("DELETE FROM sample WHERE metric = :metric AND label = :label AND at < :upto")
_FORGET_BINS = text(
    "DELETE FROM sample_rollup WHERE metric = :metric AND label = :label AND bin_s = :bin_s AND at < :until"
)
_FORGET_STEPS = text(
    "DELETE FROM step WHERE rowid IN (SELECT rowid FROM step WHERE at < :until ORDER BY at LIMIT :num)"
)
_FORGET_TIMINGS = text(
    "DELETE FROM request_timing WHERE rowid IN "
    "(SELECT rowid FROM request_timing WHERE arrived_at < :until ORDER BY arrived_at LIMIT :num)"
)
_FORGET_EVENTS = text(
    "DELETE FROM runtime_event WHERE rowid IN (SELECT rowid FROM runtime_event WHERE at < :until LIMIT :num)"
)
_FORGET_FORECASTS = text("DELETE FROM forecast WHERE at < :until")

# Source: sqlite.org/optoverview.html: DISTINCT reads every row, and a comparison of (metric, label) seeks by the
# metric alone. Here each step is one seek: to the next label, or where there is none, to the next metric.
_HOPS = """
    {name}(metric, label) AS (
        SELECT min(metric), NULL FROM {table}
        UNION ALL
        SELECT CASE WHEN {next} IS NULL THEN (SELECT min(metric) FROM {table} WHERE metric > {name}.metric)
                    ELSE metric END, {next}
        FROM {name} WHERE metric IS NOT NULL
    )
"""
_NEXT = """CASE WHEN {name}.label IS NULL THEN (SELECT min(label) FROM {table} WHERE metric = {name}.metric)
    ELSE (SELECT min(label) FROM {table} WHERE metric = {name}.metric AND label > {name}.label) END"""


def _hops(name: str, table: str) -> str:
    return _HOPS.format(name=name, table=table, next=_NEXT.format(name=name, table=table))


_ALL_SERIES = text(
    f"""
    WITH RECURSIVE {_hops("found", "sample")}, {_hops("rolled", "sample_rollup")}
    SELECT metric, label FROM found WHERE label IS NOT NULL
    UNION SELECT metric, label FROM rolled WHERE label IS NOT NULL
    ORDER BY metric, label
    """
)
