"""The two files of a store: one writer that holds both, and readers that can only read.

`Store` belongs to the daemon: it takes the folder's lock, checks and upgrades the files, and gives sessions
that commit when their block ends and roll back when it raises. `StoreReader` is what everybody else uses.
Rows stay usable after their session; a JSON column must be given a new value to be changed, not edited.
"""

import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sqlalchemy import Engine, text
from sqlalchemy.orm import Session as Session  # readers outside of the store annotate with it

from store import migrations
from store.connection import (
    BUSY_TIMEOUT_S,
    Synchronous,
    back_up,
    make_private_dir,
    reader_engine,
    sqlite_library,
    store_errors,
    warn_of_wal_reset_race,
    writer_engine,
)
from store.drain import Drained, save_drained
from store.errors import DamagedStore, NoStore, OlderStore, StoreBusy, StoreFull
from store.last_good import LastGood, read_last_good, write_last_good
from store.lock import DataDirLock
from store.room import Room
from store.tables import SCHEMA_VERSIONS, Which

log = logging.getLogger(__name__)

WHICH: tuple[Which, Which] = ("journal", "metrics")
FILE_NAMES: dict[Which, str] = {"journal": "journal.db", "metrics": "metrics.db"}
SYNCHRONOUS: dict[Which, Synchronous] = {"journal": "FULL", "metrics": "NORMAL"}


class StoreFile:
    """One of the two files, open for its writer or for a reader. Safe to use from several threads."""

    def __init__(self, path: Path, which: Which, readonly: bool) -> None:
        self.path = path
        self.which = which
        self.readonly = readonly
        self._engine: Engine = reader_engine(path) if readonly else writer_engine(path, SYNCHRONOUS[which])
        self._turn = threading.Lock()
        self._turn_of: int | None = None  # the thread whose session is open

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A session that commits at the end of the block and rolls back where it raises.

        The writer has one at a time: other threads wait their turn, the same thread is refused.

        Raises:
            NoStore, NewerStore, OlderStore: (readers) there is nothing that this version can read.
            StoreBusy: this thread has a session already, or the turn did not come in time.
            RowRefused, StoreFull, DamagedStore, StoreUnavailable: from the reads and writes inside.
        """
        engine = self._open_engine()
        with self._my_turn(), store_errors(self.path), Session(engine, expire_on_commit=False) as session:
            if self.readonly:
                check_version(self.path, self.which, session.scalar(text("PRAGMA user_version")))
            yield session
            if not self.readonly:
                session.commit()

    def check(self) -> None:
        """Raises DamagedStore when SQLite's quick_check finds fault with the file."""
        with store_errors(self.path), self._open_engine().connect() as connection:
            found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
        if found != "ok":
            fix = "`tuner run` sets it aside and restores the last backup."
            what = " ".join(str(found).split())
            raise DamagedStore(f"{self.path} is damaged ({what}). {fix}", str(self.path), what)

    def close(self) -> None:
        self._engine.dispose()

    def _open_engine(self) -> Engine:
        if self.readonly and not self.path.exists():
            told = f"There is no store at {self.path.parent}. Start `tuner run` with this data folder first."
            raise NoStore(told)
        return self._engine

    @contextmanager
    def _my_turn(self) -> Iterator[None]:
        if self.readonly:
            yield
            return
        me = threading.get_ident()
        if self._turn_of == me:
            raise StoreBusy(
                f"A session of {self.path.name} must be closed before the next, but this thread has one open. "
                "Use that one."
            )
        if not self._turn.acquire(timeout=BUSY_TIMEOUT_S):
            raise StoreBusy(
                f"A session of {self.path.name} is still open in another thread after {BUSY_TIMEOUT_S:g} s. "
                "Keep sessions short."
            )
        self._turn_of = me
        try:
            yield
        finally:
            self._turn_of = None
            self._turn.release()


def open_journal(path: Path, readonly: bool = False) -> StoreFile:
    """Opens a journal file (`synchronous=FULL`). Only one process may open it to write: see `Store`."""
    return StoreFile(path, "journal", readonly)


def open_metrics(path: Path, readonly: bool = False) -> StoreFile:
    """Opens a metrics file (`synchronous=NORMAL`). Only one process may open it to write: see `Store`."""
    return StoreFile(path, "metrics", readonly)


def check_version(path: Path, which: Which, found: int) -> None:
    """Compares the schema of a file with the one that this version knows.

    Raises:
        NoStore: the file is empty, its writer is about to fill it.
        OlderStore, NewerStore.
    """
    known = SCHEMA_VERSIONS[which]
    if found > known:
        raise migrations.newer_store(path, found, known)
    if found == 0:
        raise NoStore(
            f"{path} is still empty. Start `tuner run` with this data folder, or wait until it has."
        )
    if found < known:
        raise OlderStore(
            f"{path} has schema {found}, but this version reads {known}. Start `tuner run` once: it upgrades the file."
        )


class Store:
    """Both files, open for writing, and the lock that makes this process the only one.

    Made by `Store.open`; a context manager. Open it after forking, never before.
    """

    def __init__(self, data_dir: Path, lock: DataDirLock, files: Mapping[Which, StoreFile]) -> None:
        self.data_dir = data_dir
        self.room: Room | None = None  # told of writes that find none
        self._lock = lock
        self._files = files

    @classmethod
    def open(cls, data_dir: Path) -> Self:
        """Creates what is missing, upgrades what is older (after a backup), and checks both files.

        Raises:
            StoreLocked: another process writes this folder.
            NewerStore, DamagedStore, UnsafeFilesystem, StoreUnavailable.
        """
        make_private_dir(data_dir)
        lock = DataDirLock(data_dir)
        lock.acquire()
        try:
            files = {which: _open_checked(data_dir / FILE_NAMES[which], which) for which in WHICH}
        except BaseException:
            lock.release()
            raise
        warn_of_wal_reset_race(data_dir)
        log.info("store opened: %s (%s)", data_dir, sqlite_library())
        return cls(data_dir, lock, files)

    @contextmanager
    def journal(self) -> Iterator[Session]:
        """A session of the journal; see `StoreFile.session`."""
        with self._told_when_full(), self._files["journal"].session() as session:
            yield session

    @contextmanager
    def metrics(self) -> Iterator[Session]:
        """A session of the metrics; see `StoreFile.session`."""
        with self._told_when_full(), self._files["metrics"].session() as session:
            yield session

    @contextmanager
    def _told_when_full(self) -> Iterator[None]:
        try:
            yield
        except StoreFull as error:
            if self.room is not None:
                self.room.found_full(str(error))
            raise

    def save_drained(
        self, boot_id: str, records: Iterable[Mapping[str, Any]], next_seq: int, dropped: int, now: float
    ) -> Drained:
        """`store.drain.save_drained` in a session of its own: on return the records may be acknowledged."""
        with self.metrics() as session:
            return save_drained(session, boot_id, records, next_seq, dropped, now)

    def write_last_good(self, last_good: LastGood) -> None:
        """`store.last_good.write_last_good` in this folder."""
        write_last_good(self.data_dir, last_good)

    def read_last_good(self) -> LastGood | None:
        """`store.last_good.read_last_good` of this folder."""
        return read_last_good(self.data_dir)

    def reader(self) -> "StoreReader":
        """For threads that read much while this one writes."""
        return StoreReader(self.data_dir)

    def backup(self, which: Which, target: Path) -> None:
        """Writes a consistent copy of a file, while it is in use, through a file beside `target`."""
        back_up(self.data_dir / FILE_NAMES[which], target)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open_checked(path: Path, which: Which) -> StoreFile:
    file = StoreFile(path, which, readonly=False)
    try:
        file.check()
        file.close()
        migrations.upgrade(path, which)
    except BaseException:
        file.close()
        raise
    return file


class StoreReader:
    """Both files, read-only: for the dashboard, the CLI and slow reads. Nothing is opened before the first session."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self._files: dict[Which, StoreFile] = {
            which: StoreFile(data_dir / FILE_NAMES[which], which, readonly=True) for which in WHICH
        }

    @contextmanager
    def journal(self) -> Iterator[Session]:
        """A snapshot of the journal; see `StoreFile.session`."""
        with self._files["journal"].session() as session:
            yield session

    @contextmanager
    def metrics(self) -> Iterator[Session]:
        """A snapshot of the metrics; see `StoreFile.session`."""
        with self._files["metrics"].session() as session:
            yield session


def set_aside(data_dir: Path, which: Which, now: float, why: str = "damaged") -> Path:
    """Moves a file and its WAL out of the way; returns where the file is now. The caller holds the lock."""
    path = data_dir / FILE_NAMES[which]
    when = datetime.fromtimestamp(now, UTC).strftime("%Y%m%dT%H%M%SZ")
    target = path.with_name(f"{path.name}.{why}-{when}")
    for suffix in ("-wal", "-shm", ""):
        if (beside := path.with_name(path.name + suffix)).exists():
            os.replace(beside, target.with_name(target.name + suffix))
    log.warning("%s moved aside to %s", path, target)
    return target
