"""Keeps what was recorded: old metrics become coarser and go, decisions are copied each day, a full disk is survived.

look (first in a tick): is there room? ▶ store_full, a fault that freezes tuning     step (last): age, back up
"""

import logging
import threading

from store.backups import daily_backups, made_at, make_backup
from store.database import FILE_NAMES, Store
from store.errors import StoreError, StoreFull
from store.retention import Retention, Upkeep
from store.room import Room
from store.tables import Anomaly
from tuner.rows import tell
from tuner.settings import KeepSettings

logger = logging.getLogger(__name__)

RULE = "store_full"
RETRY_BACKUP_S = 3600.0


class KeepStage:
    """Owns the store's room, its ageing and its backups; a tick costs it some milliseconds at most."""

    def __init__(self, store: Store, keep: KeepSettings, room: Room | None = None) -> None:
        self._store, self._keep = store, keep
        self.room = room or Room(store.data_dir, keep.min_free_bytes)
        store.room = self.room
        retention = Retention(
            keep.raw_s, keep.minutes_s, keep.hours_s, keep.steps_s, keep.timings_s, keep.max_bytes
        )
        self._upkeep = Upkeep(store.metrics, retention, store.data_dir / FILE_NAMES["journal"])
        self._fault: Anomaly | None = None
        self._is_told = True  # the last change of `room` stands in the journal
        self._backup: threading.Thread | None = None
        self._backup_error: str | None = None
        self._next_backup_at: float | None = None

    def has_room(self) -> bool:
        """False: nothing that was measured may be written now."""
        return not self.room.is_full

    def open_faults(self) -> list[Anomaly]:
        return [self._fault] if self._fault is not None else []

    # -- room ----------------------------------------------------------------------------------------------

    def look(self, now: float) -> None:
        """Opens the fault when the room ends and closes it when there is room again; both stand in the journal."""
        self.room.look()
        if self.room.is_full and self._fault is None:
            self._fault = Anomaly(
                RULE, "fault", "disk_free_bytes", now, float(self.room.free_bytes),
                float(self.room.min_free_bytes), f"{self.room.why} No metrics are written until there is room.",
                severity="page", details={"noticed_at": now, "voids_pair": False},
            )  # fmt: skip
            self._is_told = False
        elif not self.room.is_full and self._fault is not None:
            self._fault.ended_at = now
            self._is_told = False
        if not self._is_told:
            self._tell(now)

    def _tell(self, now: float) -> None:
        """Where even this finds no room, the next tick tries again: the reserve has been given back by then."""
        fault = self._fault
        assert fault is not None
        is_over = fault.ended_at is not None
        try:
            with self._store.journal() as session:
                self._fault = fault = session.merge(fault)
                session.flush()
                text = (
                    "There is room again: metrics are written." if is_over else f"Page, fault: {fault.reason}"
                )
                tell(session, now, "keep", text, {"anomaly_id": fault.anomaly_id})
        except StoreFull as error:
            logger.error("The full disk could not be recorded yet: %s", error)
            return
        self._is_told = True
        if is_over:
            self._fault = None

    # -- ageing and backups --------------------------------------------------------------------------------

    def step(self, now: float) -> None:
        if self.room.is_full:
            return  # deleting takes room too, until the file is cut
        told = self._upkeep.step(now, spare_bytes=self.room.free_bytes - 2 * self.room.min_free_bytes)
        if told is not None:
            self._story(now, told)
        self._back_up(now)

    def _back_up(self, now: float) -> None:
        """Beside the loop: a copy reads the whole journal, and readers hold nobody up."""
        if self._backup is not None:
            if self._backup.is_alive():
                return
            self._backup = None
            if self._backup_error is not None:
                self._story(now, f"No backup of the decisions was made: {self._backup_error}")
                self._next_backup_at, self._backup_error = now + RETRY_BACKUP_S, None
        if self._next_backup_at is None:
            made = [made_at(path) for path in daily_backups(self._store.data_dir)]
            # A copy from the future is of a clock that was wrong, and keeps no new one away.
            past = [at for at in made if at is not None and at <= now]
            self._next_backup_at = max(now, max(past) + self._keep.backup_every_s) if past else now
        if now < self._next_backup_at:
            return
        self._next_backup_at = now + self._keep.backup_every_s
        self._backup = threading.Thread(target=self._copy, args=(now,), name="backup", daemon=True)
        self._backup.start()

    def _copy(self, now: float) -> None:
        try:
            path = make_backup(self._store.data_dir, now, self._keep.num_backups)
            logger.info("Decisions copied to %s", path)
        except (StoreError, OSError) as error:
            self._backup_error = str(error)

    def close(self) -> None:
        if self._backup is not None:
            self._backup.join()
        self.room.close()

    def _story(self, now: float, text: str) -> None:
        with self._store.journal() as session:
            tell(session, now, "keep", text)
