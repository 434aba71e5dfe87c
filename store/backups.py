"""Copies of the journal in `<data folder>/backups`: made while it is in use, checked, and put back when it is lost.

A migration leaves one too, `journal.db.schema-<number>.backup` beside the journal.
"""

import os
import shutil
from collections.abc import Collection
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from store.connection import back_up, sqlite_library, store_errors
from store.database import FILE_NAMES
from store.errors import DamagedStore, StoreError
from store.tables import SCHEMA_VERSIONS

FOLDER = "backups"
STAMP = "%Y%m%dT%H%M%SZ"


def stamp(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime(STAMP)


def make_backup(data_dir: Path, now: float, num_kept: int) -> Path:
    """Copies the journal, checks the copy, and forgets all but the newest `num_kept` copies. Returns the copy.

    Raises:
        StoreError: the journal cannot be read, or the copy is not what it should be; older copies are kept then.
    """
    folder = data_dir / FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / f"journal-{stamp(now)}.db"
    back_up(data_dir / FILE_NAMES["journal"], target)
    try:
        check_copy(target)
    except StoreError:
        target.unlink(missing_ok=True)
        raise
    for old in [path for path in daily_backups(data_dir) if path != target][num_kept - 1 :]:
        old.unlink(missing_ok=True)
    return target


def daily_backups(data_dir: Path) -> list[Path]:
    """Newest first, by the instant in their names."""
    return sorted((data_dir / FOLDER).glob("journal-*.db"), reverse=True)


def made_at(backup: Path) -> float | None:
    """When a backup was made, as its name says; None for another's file."""
    try:
        return datetime.strptime(backup.stem.removeprefix("journal-"), STAMP).replace(tzinfo=UTC).timestamp()
    except ValueError:
        return None


def newest_good(data_dir: Path, without: Collection[Path] = ()) -> Path | None:
    """The newest copy that is whole and not of a newer version; one that a migration left counts by its age.

    without: copies that were tried and were of no use.
    """
    left = data_dir.glob(f"{FILE_NAMES['journal']}.schema-*.backup")
    found = [*daily_backups(data_dir), *left]
    for backup in sorted(found, key=lambda path: made_at(path) or path.stat().st_mtime, reverse=True):
        try:
            if backup not in without:
                check_copy(backup)
                return backup
        except StoreError:
            continue
    return None


def check_copy(path: Path) -> int:
    """Returns the schema of a journal's copy.

    Raises:
        DamagedStore: it is damaged, empty, or of a newer version.
    """
    # immutable: a copy has no writer, and looking at it must leave no -wal beside it.
    where = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
    try:
        with store_errors(path), closing(sqlite_library().module.connect(where, uri=True)) as copy:
            (found,) = copy.execute("PRAGMA quick_check(1)").fetchone()
            (schema,) = copy.execute("PRAGMA user_version").fetchone()
    except DamagedStore as error:
        found, schema = error.what, 0
    if found != "ok":
        told = f"{path} is no whole copy of a journal ({' '.join(str(found).split())}). Take another."
        raise DamagedStore(told, str(path))
    if not 0 < schema <= SCHEMA_VERSIONS["journal"]:
        known = SCHEMA_VERSIONS["journal"]
        raise DamagedStore(
            f"{path} has schema {schema}, but a journal has 1 to {known}. Take another.", str(path)
        )
    return int(schema)


def put_back(data_dir: Path, backup: Path) -> None:
    """Puts a copy in the place of the journal in one step. The journal was set aside; the caller holds the lock."""
    target = data_dir / FILE_NAMES["journal"]
    beside = target.with_name(target.name + ".tmp")
    shutil.copyfile(backup, beside)
    os.chmod(beside, 0o600)
    sync(beside)
    os.replace(beside, target)
    sync(data_dir)


def sync(path: Path) -> None:
    """To the disk: a file's content, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
