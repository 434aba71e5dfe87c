"""One SQLite file behind one SQLAlchemy engine: which library, which pragmas, which errors.

The writer has a single connection; it alone writes and checkpoints. Readers open `mode=ro`, can do neither,
and take a snapshot for the length of a session.
"""

import json
import logging
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool, QueuePool

from store.errors import (
    DamagedStore,
    RowRefused,
    StoreBusy,
    StoreError,
    StoreFull,
    StoreUnavailable,
    UnsafeFilesystem,
)

log = logging.getLogger(__name__)

Synchronous = Literal["FULL", "NORMAL"]
Version = tuple[int, ...]

BUSY_TIMEOUT_S = 5.0
MAX_WAL_BYTES = 64 * 1024 * 1024  # a WAL that grew beyond this under a long read is cut back afterwards

# The WAL-reset race: while one connection checkpoints, another one's commit resets the WAL, and a later checkpoint
# skips frames. It takes two connections that write or checkpoint. Here only the writer's single connection can do
# either (readers open `mode=ro`), so that an affected library is safe too; a rollback journal (DELETE) would be no
# safer, and every reader of the dashboard would hold up the daemon's commits.
# Source: sqlite.org/wal.html#walresetbug; fixed in 3.51.3, back-ported to 3.44.6, 3.50.7.
RACE_FIRST: Version = (3, 7, 0)
RACE_FIXED: Version = (3, 51, 3)
RACE_BACKPORTS: tuple[Version, ...] = ((3, 44, 6), (3, 50, 7))

NETWORK_FILESYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "fuse.sshfs", "glusterfs", "fuse.glusterfs", "afs"}
)


class SqliteLibrary(NamedTuple):
    """The DBAPI module in use, and the SQLite that it links."""

    module: ModuleType
    version: Version

    @property
    def has_wal_reset_race(self) -> bool:
        return has_wal_reset_race(self.version)

    def __str__(self) -> str:
        return f"{self.module.__name__} with SQLite {'.'.join(map(str, self.version))}"


def has_wal_reset_race(version: Version) -> bool:
    if not RACE_FIRST <= version < RACE_FIXED:
        return False
    return not any(version[:2] == fixed[:2] and version >= fixed for fixed in RACE_BACKPORTS)


@cache
def sqlite_library() -> SqliteLibrary:
    """Returns pysqlite3 (it brings its own SQLite) or the standard library's: the first without the WAL-reset race."""
    found = [SqliteLibrary(sqlite3, sqlite3.sqlite_version_info)]
    try:
        bundled = import_module("pysqlite3")
    except ImportError:
        pass
    else:
        found.insert(0, SqliteLibrary(bundled, bundled.sqlite_version_info))
    return next((library for library in found if not library.has_wal_reset_race), found[0])


def warn_of_wal_reset_race(data_dir: Path) -> None:
    """Says once a start what a library with the race asks of people."""
    library = sqlite_library()
    if library.has_wal_reset_race:
        log.warning(
            "%s may damage a file that two connections write: let nothing but the tuner write in %s. "
            "Install pysqlite3 >= 0.6.1 to be rid of this.",
            library,
            data_dir,
        )


def writer_engine(path: Path, synchronous: Synchronous, *, foreign_keys: bool = True) -> Engine:
    """The engine of the only process that writes `path`; creates the file, for its owner alone.

    It has one connection, which alone writes and checkpoints. That also keeps a library with the WAL-reset
    race out of it: the race needs two that do.
    """
    _make_private(path)
    pragmas = (
        "journal_mode=WAL",
        f"synchronous={synchronous}",
        f"foreign_keys={'ON' if foreign_keys else 'OFF'}",
        f"journal_size_limit={MAX_WAL_BYTES}",
        "cache_size=-16384",  # KiB
        "temp_store=MEMORY",
    )

    def connect() -> Any:
        # Incremental vacuum is only possible from before the first table on.
        first = () if path.stat().st_size else ("auto_vacuum=INCREMENTAL",)
        return _connect(path, "rwc", (*first, *pragmas))

    engine = _engine(connect, poolclass=QueuePool, pool_size=1, max_overflow=0, pool_timeout=BUSY_TIMEOUT_S)
    event.listen(engine, "begin", _begin_immediate)
    event.listen(engine, "reset", _roll_back)
    event.listen(engine, "before_cursor_execute", _plain_parameters, retval=True)
    return engine


def reader_engine(path: Path) -> Engine:
    """An engine that cannot write. It opens the file anew for each session.

    A replaced file is therefore noticed, and sessions may be used from any thread and after a fork.
    """
    engine = _engine(lambda: _connect(path, "ro", ("query_only=ON",)), poolclass=NullPool)
    event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    return engine


def _engine(connect: Callable[[], Any], **pool: Any) -> Engine:
    module = sqlite_library().module
    return create_engine("sqlite://", module=module, creator=connect, json_serializer=_to_json, **pool)


def _connect(path: Path, mode: Literal["ro", "rwc"], pragmas: Iterable[str] = ()) -> Any:
    connection = sqlite_library().module.connect(
        f"{path.absolute().as_uri()}?mode={mode}",
        uri=True,
        timeout=BUSY_TIMEOUT_S,
        isolation_level=None,  # we begin transactions ourselves, so that DDL is inside them too
        check_same_thread=False,
    )
    try:
        for pragma in pragmas:
            connection.execute(f"PRAGMA {pragma}")
    except BaseException:
        connection.close()
        raise
    return connection


def _begin_immediate(connection: Any) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")  # the write lock now, not in the middle of the work
    connection.exec_driver_sql(
        "PRAGMA defer_foreign_keys=ON"
    )  # rows of one session may be flushed in any order


def _roll_back(connection: Any, record: Any, state: Any) -> None:
    """A COMMIT that failed on a reference leaves its transaction open, which SQLAlchemy takes for closed."""
    connection.rollback()


def _plain_parameters(
    connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
) -> tuple[str, Any]:
    """numpy's integers have a buffer, so sqlite3 would quietly store them as blobs."""
    if executemany:
        return statement, [_plain_row(row) for row in parameters]
    return statement, _plain_row(parameters)


_PLAIN_TYPES = frozenset({type(None), bool, int, float, str, bytes})


def _plain_row(row: Any) -> Any:
    if not isinstance(row, tuple) or all(type(value) in _PLAIN_TYPES for value in row):
        return row
    return tuple(value if type(value) in _PLAIN_TYPES else _plain(value) for value in row)


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return str.__str__(value)
    return value.item() if hasattr(value, "item") else value


def _to_json(value: Any) -> str:
    return json.dumps(value, default=_json_plain)


def _json_plain(value: Any) -> Any:
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"A JSON column holds numbers, text, lists and mappings, but got {type(value).__name__}.")


# --- errors ---------------------------------------------------------------------------------------

# Primary result codes of SQLite.
_BUSY, _LOCKED, _IOERR, _CORRUPT, _FULL, _CONSTRAINT, _NOTADB = 5, 6, 10, 11, 13, 19, 26
FULL_BYTES = 1_000_000  # a disk with less than this left has no room for SQLite's shared memory


@contextmanager
def store_errors(path: Path) -> Iterator[None]:
    """Turns what SQLAlchemy raises inside into errors of the store, so that no caller needs SQLAlchemy's."""
    try:
        yield
    except DBAPIError as error:
        raise _as_store_error(error.orig, path) from error
    except SQLAlchemyError as error:
        raise RowRefused(f"{path.name}: {error}") from error
    except sqlite_library().module.Error as error:
        raise _as_store_error(error, path) from error
    except UnicodeDecodeError as error:  # the library's own message quotes bytes of a broken schema
        raise _damaged(path, f"text that is none: {error}") from error


def _as_store_error(error: BaseException | None, path: Path) -> StoreError:
    told = str(error)
    code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
    if code == _CONSTRAINT:
        return RowRefused(f"{path.name}: {told}. Nothing of this session is stored.")
    if code in (_CORRUPT, _NOTADB):
        return _damaged(path, told)
    if code == _FULL or (code == _IOERR and _is_full(path)):  # the -shm file that cannot grow is an I/O error
        return StoreFull(f"{path}: the disk is full ({told}). Free some space; serving goes on meanwhile.")
    if code in (_BUSY, _LOCKED):
        return StoreBusy(
            f"{path}: still locked after {BUSY_TIMEOUT_S:g} s ({told}). Another process holds it."
        )
    return StoreUnavailable(f"{path}: {told}.")


def _is_full(path: Path) -> bool:
    try:
        return shutil.disk_usage(path.parent).free < FULL_BYTES
    except OSError:
        return False


def _damaged(path: Path, what: str) -> DamagedStore:
    fix = "`tuner run` sets it aside and restores the last backup."
    return DamagedStore(f"{path} is damaged ({what}). {fix}", str(path), what)


# --- files ----------------------------------------------------------------------------------------


def back_up(path: Path, target: Path) -> None:
    """Copies a file that may be in use, for its owner alone, and puts the copy in place of `target` in one step.

    Raises:
        StoreError: it could not be copied, or the copy fails its check; an older `target` stays as it is.
    """
    beside = target.with_name(target.name + ".tmp")
    beside.unlink(missing_ok=True)
    descriptor = os.open(beside, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)  # VACUUM INTO would use the umask
    try:
        with store_errors(path), closing(_connect(path, "ro")) as connection:
            connection.execute("VACUUM INTO ?", (str(beside),))
        with store_errors(beside), closing(_connect(beside, "ro")) as copy:
            (found,) = copy.execute("PRAGMA quick_check(1)").fetchone()
            if found != "ok":
                told = f"{beside} is damaged ({found}): the copy of {path} is not used. Is the disk failing?"
                raise DamagedStore(told, str(path), str(found))
        os.fsync(descriptor)
        os.replace(beside, target)
    finally:
        os.close(descriptor)
        beside.unlink(missing_ok=True)  # half a copy only takes room


def make_private_dir(folder: Path) -> None:
    """Creates the folder for its owner alone; one that exists is left as it is.

    Raises:
        UnsafeFilesystem: it lies on a network file system.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        mounts = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return
    kind = filesystem_of(folder.resolve(), mounts)
    if kind in NETWORK_FILESYSTEMS:
        raise UnsafeFilesystem(
            f"The store must lie on a local disk, but {folder} is on {kind}. Give another `data_dir`."
        )


def filesystem_of(folder: Path, mounts: Iterable[str]) -> str | None:
    """Returns the type of the file system that holds `folder`, by the lines of /proc/mounts."""
    best, kind = -1, None
    for line in mounts:
        _, point, found, *_ = line.split()
        point = point.encode().decode("unicode_escape")  # spaces are written \040
        if folder.is_relative_to(point) and len(point) >= best:
            best, kind = len(point), found
    return kind


def _make_private(path: Path) -> None:
    """SQLite gives -wal and -shm the mode of the file itself."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.fchmod(descriptor, 0o600)
    finally:
        os.close(descriptor)
