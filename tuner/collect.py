"""From the runtime and the hardware into the store, once a tick.

    state, records = control address      readings = runtime_samples(window) | probes
                       └── request, step, event rows ──┐      └── Sample rows, with the config_id in force
                                                       one transaction

Records are acknowledged only by the drain after the commit, and stored under (boot, number): a daemon that is
killed anywhere in between drains them again and stores them once. What a runtime that was killed had not handed over
lies in its run directory, and is stored once the next one answers.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from runtime.client import Control
from runtime.errors import RuntimeFault, RuntimeUnreachable
from runtime.record_spool import left_segments
from store.database import Store, save_drained
from store.queries import drain_cursor
from store.samples import save_samples
from store.tables import Sample
from tuner.readings import Probe, Readings
from tuner.runtime_metrics import Record, Window, runtime_samples

log = logging.getLogger(__name__)

PAGE_RECORDS = 5000
MAX_PAGES = 8  # a tick: after an outage of the daemon the rest waits for the next
MAX_LEFT_SEGMENTS = 4  # a tick, of 1 MB each
MAX_WINDOW_S = 60.0  # a longer one is a gap: its records are stored, its statistics would be nobody's "now"


class Collected(NamedTuple):
    """One tick. `state` is the runtime's answer, None where it gave none."""

    at: float
    state: Mapping[str, Any] | None
    num_records: int
    readings: Readings
    records: Sequence[Record] = ()


class _Answer(NamedTuple):
    """What the control address said in one tick. `last_page` is not stored yet."""

    state: Mapping[str, Any]
    records: list[Record]
    last_page: Mapping[str, Any]


class _Mark(NamedTuple):
    """Where the window of the next tick begins."""

    state: Mapping[str, Any]
    monotonic_s: float
    step: Record | None


@dataclass
class Collector:
    """`client` is replaced when the runtime starts again, and None while there is none."""

    client: Control | None
    store: Store
    probes: Sequence[Probe]
    monotonic: Callable[[], float] = time.monotonic
    has_room: Callable[[], bool] = lambda: True  # False: the disk is full, and nothing measured is written
    run_dir: Path | None = None  # of the runtime, where it is on this machine
    _cursors: dict[str, int] = field(default_factory=dict)  # boot_id -> last number that stands in the store
    _dropped: int = 0
    _mark: _Mark | None = None
    _is_silent: bool = False
    _may_have_left: bool = False  # an earlier boot, records that nobody has read

    def collect(self, now: float) -> Collected:
        """Takes one sample of everything and stores it, with all that the runtime recorded since.

        A runtime that does not answer leaves a gap and one line in the log.

        Raises:
            StoreError: nothing of this tick's last page was stored; the next tick has it again.
        """
        now_s = self.monotonic()
        readings: Readings = {}
        for probe in self.probes:
            readings |= probe.sample(now_s)
        if not self.has_room():  # what the runtime records waits there, as far as its buffer reaches
            self._mark = None
            return Collected(now, self._state_alone(), 0, readings)
        answer = self._ask(now)
        if answer is None:
            self._save(_rows(readings, now, None))
            return Collected(now, None, 0, readings)
        window = self._window(answer, now_s)
        readings |= runtime_samples(window)
        self._save(_rows(readings, now, answer.state["config_id"]), answer.last_page, now)
        if self._may_have_left:
            self._save_left(answer.last_page["boot_id"], now)
        self._mark = _Mark(answer.state, now_s, _last_step(answer.records) or window.step_before)
        return Collected(now, answer.state, len(answer.records), readings, answer.records)

    def _ask(self, now: float) -> _Answer | None:
        """The state and all records that wait, whose pages but the last are stored on the way."""
        try:
            if self.client is None:
                raise RuntimeUnreachable("there is none")
            state = self.client.state()
            page = self._drain(self.client, state["boot_id"])
            records = list(page["records"])
            for _ in range(MAX_PAGES - 1):
                if len(page["records"]) < PAGE_RECORDS:
                    break
                self._save([], page, now)
                page = self._drain(self.client, page["boot_id"])
                records += page["records"]
        except RuntimeFault as error:
            if not self._is_silent:
                log.warning("The runtime is not sampled: %s", error)
            self._is_silent = True
            return None
        if self._is_silent:
            log.info("The runtime answers again; what it recorded meanwhile is stored now.")
        self._is_silent = False
        return _Answer(state, records, page)

    def _state_alone(self) -> Mapping[str, Any] | None:
        try:
            return None if self.client is None else self.client.state()
        except RuntimeFault as error:
            log.debug("The runtime did not answer: %s", error)
            return None

    def _drain(self, client: Control, boot_id: str) -> Mapping[str, Any]:
        if boot_id not in self._cursors:
            with self.store.metrics() as session:
                cursor = drain_cursor(session, boot_id)
            self._cursors = {boot_id: cursor.after_seq if cursor is not None else 0}
            self._may_have_left = True
            self._dropped = cursor.num_dropped if cursor is not None else 0
        return client.drain(boot_id, self._cursors[boot_id], PAGE_RECORDS)

    def _save(
        self, samples: Sequence[Sample], page: Mapping[str, Any] | None = None, now: float = 0.0
    ) -> None:
        """Samples and a page of records in one transaction; only then may the next drain acknowledge the page."""
        with self.store.metrics() as session:
            save_samples(session, samples)
            if page is not None:
                save_drained(
                    session, page["boot_id"], page["records"], page["next_seq"], page["dropped"], now
                )
        if page is None:
            return
        if page["boot_id"] not in self._cursors:
            self._dropped, self._may_have_left = 0, True
        self._cursors = {page["boot_id"]: page["next_seq"]}
        if page["dropped"] > self._dropped:
            lost = page["dropped"] - self._dropped
            log.warning(
                "The runtime dropped %d records that were not read in time; its buffer was full.", lost
            )
        self._dropped = page["dropped"]

    def _save_left(self, boot_id: str, now: float) -> None:
        """Stores what boots before this one left behind, a few segments a tick, and removes it from there."""
        left = left_segments(self.run_dir, boot_id, MAX_LEFT_SEGMENTS) if self.run_dir is not None else []
        for segment in left:
            with self.store.metrics() as session:
                cursor = drain_cursor(session, segment.boot_id)
                after_seq = cursor.after_seq if cursor is not None else 0
                news = [record for record in segment.records if record["seq"] > after_seq]
                if news:
                    num_dropped = cursor.num_dropped if cursor is not None else 0
                    save_drained(session, segment.boot_id, news, news[-1]["seq"], num_dropped, now)
            segment.path.unlink(missing_ok=True)
            if news:
                log.info("Stored %d records that an earlier start of the runtime left behind.", len(news))
        self._may_have_left = len(left) == MAX_LEFT_SEGMENTS

    def _window(self, answer: _Answer, now_s: float) -> Window:
        """The records of this tick beside the mark of the one before. Another boot, or a gap, starts anew."""
        state, dropped, mark = answer.state, answer.last_page["dropped"], self._mark
        boot_id = answer.last_page["boot_id"]
        if mark is None or not mark.state["boot_id"] == state["boot_id"] == boot_id:
            return Window(answer.records, state, dropped)
        seconds = now_s - mark.monotonic_s
        if not 0 < seconds <= MAX_WINDOW_S:
            return Window(answer.records, state, dropped)
        return Window(answer.records, state, dropped, seconds, mark.state, mark.step)


def _last_step(records: Sequence[Record]) -> Record | None:
    return next((record for record in reversed(records) if record["kind"] == "step"), None)


def _rows(readings: Readings, at: float, config_id: str | None) -> list[Sample]:
    return [
        Sample(metric=str(metric), label=label, at=at, value=value, config_id=config_id)
        for (metric, label), value in readings.items()
    ]
