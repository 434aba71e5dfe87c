"""From any older schema to the newest: one transaction a file, after a backup.

Each file has its own Alembic revisions, numbered 0001, 0002, ..., and its own version table; the number is
also kept in the file's `user_version`, where a reader finds it without Alembic. To draft the next revision
after a change of `store/tables.py`: `python -m store.migrations journal "what changed"`.
"""

import logging
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import Connection, inspect

from store.connection import back_up, store_errors, writer_engine
from store.errors import DamagedStore, ForeignStore, NewerStore, StoreFull
from store.tables import Which

if TYPE_CHECKING:
    from alembic.config import Config

log = logging.getLogger(__name__)

SCRIPTS = Path(__file__).parent / "alembic"
BACKUPS_KEPT = 2  # of each file, by the schema that they have


class Upgrade(NamedTuple):
    """Schema numbers before (0: the file was empty) and after; the backup, where one was made."""

    before: int
    after: int
    backup: Path | None


def upgrade(path: Path, which: Which, scripts: Path = SCRIPTS) -> Upgrade:
    """Brings the file to the newest schema; a file that is there already is not touched.

    A process killed on the way leaves the old schema. An existing file is first copied to
    `<name>.schema-<number>.backup` beside it. The caller holds the lock of the folder.

    Raises:
        NewerStore: the schema is newer than the newest revision.
        ForeignStore: the file holds tables of something else.
        DamagedStore: its references are broken.
    """
    head = newest(which, scripts)
    with store_errors(path), _unbegun(path) as connection:
        before = _schema_of(path, connection)
    if before > head:
        raise newer_store(path, before, head)
    if before == head:
        return Upgrade(before, head, None)
    backup = path.with_name(f"{path.name}.schema-{before}.backup") if before else None
    if backup is not None and not _backed_up(path, backup, which):
        backup = None
    with store_errors(path), _unbegun(path) as connection, connection.begin():
        _run_revisions(connection, which, scripts)
        broken = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
        if broken is not None:
            told = f"{path}: table {broken[0]} refers to rows of {broken[2]} that are gone. Restore {backup}."
            raise DamagedStore(told, str(path))
        connection.exec_driver_sql(f"PRAGMA user_version={head}")
    kept = f"; the old one is {backup}" if backup is not None else ""
    log.info("%s upgraded from schema %d to %d%s", path, before, head, kept)
    return Upgrade(before, head, backup)


def _backed_up(path: Path, backup: Path, which: Which) -> bool:
    """Copies the file before it is changed and forgets older copies. Metrics may go without where there is no room."""
    try:
        back_up(path, backup)
    except StoreFull as error:
        if which == "journal":
            raise
        log.warning("%s is upgraded without a backup: %s", path, error)
        return False
    made = sorted(path.parent.glob(f"{path.name}.schema-*.backup"), key=lambda old: old.stat().st_mtime)
    for old in made[:-BACKUPS_KEPT]:
        old.unlink()
    return True


def newest(which: Which, scripts: Path = SCRIPTS) -> int:
    """The number of the last revision, by the names of the files; 0 where there is none."""
    revisions = (scripts / which / "versions").glob("[0-9]*.py")
    return max((int(revision.name.split("_")[0]) for revision in revisions), default=0)


def newer_store(path: Path, found: int, known: int) -> NewerStore:
    return NewerStore(
        f"{path} has schema {found}, but this version of the tuner knows up to {known}: "
        "a newer one wrote it. Install that version again, or give another `data_dir`."
    )


@contextmanager
def _unbegun(path: Path) -> Iterator[Connection]:
    """A connection for schema work. References are off: a table that is copied is dropped on the way."""
    engine = writer_engine(path, "FULL", foreign_keys=False)
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


def _schema_of(path: Path, connection: Connection) -> int:
    (found,) = connection.exec_driver_sql("PRAGMA user_version").one()
    if found == 0 and inspect(connection).get_table_names():
        told = f"{path} is a database of something else. Move it away, or give another `data_dir`."
        raise ForeignStore(told, str(path))
    connection.rollback()
    return int(found)


def _run_revisions(connection: Connection, which: Which, scripts: Path) -> None:
    logging.getLogger("alembic").setLevel(logging.WARNING)
    from alembic import command  # slow, and not needed where a file is up to date, which is nearly always

    command.upgrade(_config(which, scripts, connection), "head")


def _config(which: Which, scripts: Path, connection: Connection) -> "Config":
    from alembic.config import Config

    config = Config(stdout=StringIO(), output_buffer=StringIO())
    config.set_main_option("script_location", str(scripts / which).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def draft(which: Which, message: str, scripts: Path = SCRIPTS) -> Path:
    """Writes the next revision: the difference between the revisions so far and `store.tables`. Read it before use."""
    from alembic import command

    number = newest(which, scripts) + 1
    with (
        tempfile.TemporaryDirectory() as folder,
        _unbegun(Path(folder) / "draft.db") as connection,
        connection.begin(),
    ):
        if number > 1:
            _run_revisions(connection, which, scripts)
        config = _config(which, scripts, connection)
        command.revision(config, message, autogenerate=True, rev_id=f"{number:04d}")
    return next((scripts / which / "versions").glob(f"{number:04d}_*.py"))


if __name__ == "__main__":
    print(draft(sys.argv[1], " ".join(sys.argv[2:])))  # type: ignore[arg-type]
