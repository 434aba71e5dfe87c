import contextlib
import logging
import sqlite3
import stat
from pathlib import Path

import numpy as np
import pytest

from store import connection
from store.connection import SqliteLibrary, back_up, filesystem_of, has_wal_reset_race, sqlite_library
from store.database import Store, StoreReader
from store.errors import DamagedStore, StoreLocked, StoreUnavailable, UnsafeFilesystem
from store.metrics import TTFT_S
from store.tables import Note, Sample, Snapshot


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ((3, 6, 23), False),
        ((3, 7, 0), True),
        ((3, 40, 1), True),
        ((3, 44, 5), True),
        ((3, 44, 6), False),
        ((3, 45, 0), True),
        ((3, 50, 6), True),
        ((3, 50, 7), False),
        ((3, 51, 0), True),
        ((3, 51, 2), True),
        ((3, 51, 3), False),
        ((3, 53, 4), False),
    ],
)
def test_knows_which_versions_have_the_wal_reset_race(version: tuple[int, ...], expected: bool) -> None:
    assert has_wal_reset_race(version) is expected


def test_prefers_the_library_without_the_race() -> None:
    chosen = sqlite_library()
    available = {sqlite3.sqlite_version_info}
    try:
        import pysqlite3

        available.add(pysqlite3.sqlite_version_info)
    except ImportError:
        pass
    assert chosen.version in available
    assert chosen.has_wal_reset_race == all(has_wal_reset_race(version) for version in available)


@pytest.fixture
def affected_library(monkeypatch: pytest.MonkeyPatch) -> SqliteLibrary:
    """A real library whose version says that it has the race."""
    library = SqliteLibrary(sqlite_library().module, (3, 40, 1))
    monkeypatch.setattr(connection, "sqlite_library", lambda: library)
    return library


def test_an_affected_library_is_warned_of_once_and_works_with_its_one_connection(
    affected_library: SqliteLibrary, data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), Store.open(data_dir) as store:
        with store.journal() as session:
            session.add(Note(1.0, "sample", "written"))
        with store.reader().journal() as session:
            assert session.query(Note).one().text == "written"
    assert len(caplog.records) == 1
    assert "SQLite 3.40.1 may damage a file that two connections write" in caplog.text


def test_with_an_affected_library_only_one_connection_can_write_or_checkpoint(
    affected_library: SqliteLibrary, data_dir: Path
) -> None:
    """The race takes two. Readers cannot do either, and the writer never has a second connection."""
    with Store.open(data_dir) as store:
        writer = store._files["journal"]._engine
        assert (writer.pool.size(), writer.pool._max_overflow) == (1, 0)
        with store.journal() as session:
            session.add_all(Note(1.0, "sample", "x" * 3000) for _ in range(20))
        wal = data_dir / "journal.db-wal"
        before = wal.read_bytes()
        assert before
        with store.reader().journal() as session:
            driver = session.connection().connection.driver_connection
            for pragma in ("wal_checkpoint(PASSIVE)", "wal_checkpoint(TRUNCATE)", "journal_mode=DELETE"):
                with contextlib.suppress(affected_library.module.OperationalError):
                    driver.execute(f"PRAGMA {pragma}").fetchall()
        assert wal.read_bytes() == before, "a reader moved the log"
        with pytest.raises(StoreLocked):
            Store.open(data_dir)


def test_the_journal_is_durable_at_every_commit_and_metrics_in_batches(store: Store) -> None:
    pragmas = {}
    for which, session_of in (("journal", store.journal), ("metrics", store.metrics)):
        with session_of() as session:
            driver = session.connection().connection.driver_connection
            names = ("synchronous", "journal_mode", "foreign_keys", "auto_vacuum", "busy_timeout")
            pragmas[which] = tuple(driver.execute(f"PRAGMA {name}").fetchone()[0] for name in names)
    full, normal, incremental = 2, 1, 2
    assert pragmas["journal"] == (full, "wal", 1, incremental, 5000)
    assert pragmas["metrics"] == (normal, "wal", 1, incremental, 5000)


def test_files_and_folder_are_for_their_owner_alone(store: Store, data_dir: Path) -> None:
    with store.journal() as session:
        session.add(Note(1.0, "sample", "so that there is a WAL"))
    assert stat.S_IMODE(data_dir.stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in data_dir.iterdir()}
    assert {"journal.db", "journal.db-wal", "metrics.db", "daemon.lock"} <= set(modes)
    assert set(modes.values()) == {0o600}


def test_a_file_that_others_could_read_is_closed_to_them(data_dir: Path) -> None:
    Store.open(data_dir).close()
    (data_dir / "journal.db").chmod(0o644)
    with Store.open(data_dir):
        assert stat.S_IMODE((data_dir / "journal.db").stat().st_mode) == 0o600


def test_a_folder_of_any_name_works(tmp_path: Path) -> None:
    data_dir = tmp_path / "100% sure? #1 ü"
    with Store.open(data_dir) as store, store.journal() as session:
        session.add(Note(1.0, "sample", "here"))
    with StoreReader(data_dir).journal() as session:
        assert session.query(Note).count() == 1


def test_numbers_of_numpy_are_stored_as_numbers(store: Store) -> None:
    with store.journal() as session:
        session.add(Snapshot("s", np.float64(1.5), {"n": np.int64(3)}, {}, {}, np.int64(7), []))
    with store.metrics() as session:
        session.add(Sample(TTFT_S, "p50", np.float64(2.0), np.float32(0.5)))
    with store.journal() as session:
        found = session.get(Snapshot, "s")
        assert (found.created_at, found.model, found.knob_schema_version) == (1.5, {"n": 3}, 7)
        driver = session.connection().connection.driver_connection
        assert driver.execute("SELECT typeof(knob_schema_version) FROM snapshot").fetchone() == ("integer",)
    with store.metrics() as session:
        assert session.query(Sample.metric, Sample.value).all() == [("ttft_s", 0.5)]


def test_the_file_system_is_that_of_the_longest_mount_point() -> None:
    mounts = ["/dev/a / ext4 rw 0 0", "srv:/x /data nfs4 rw 0 0", r"/dev/b /data/my\040disk xfs rw 0 0"]
    assert filesystem_of(Path("/home"), mounts) == "ext4"
    assert filesystem_of(Path("/data/tuner"), mounts) == "nfs4"
    assert filesystem_of(Path("/data/my disk/tuner"), mounts) == "xfs"
    assert filesystem_of(Path("/database"), mounts) == "ext4"


def test_refuses_a_network_file_system(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "filesystem_of", lambda folder, mounts: "nfs4")
    with pytest.raises(
        UnsafeFilesystem, match=r"must lie on a local disk, but .* is on nfs4. Give another `data_dir`"
    ):
        Store.open(data_dir)


def test_a_backup_is_whole_and_private_while_a_session_is_open(store: Store, tmp_path: Path) -> None:
    with store.journal() as session:
        session.add(Note(1.0, "sample", "committed"))
    target = tmp_path / "copy.db"
    target.write_text("what stood here before")
    with store.journal() as session:
        session.add(Note(2.0, "sample", "not committed"))
        session.flush()
        store.backup("journal", target)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert not (tmp_path / "copy.db.tmp").exists()
    copy = sqlite_library().module.connect(str(target))
    assert copy.execute("SELECT text FROM note").fetchall() == [("committed",)]
    copy.close()


def test_errors_of_the_library_become_errors_of_the_store(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="unable to open"):
        back_up(tmp_path / "absent.db", tmp_path / "copy.db")
    (tmp_path / "text.db").write_text("not a database " * 100)
    with pytest.raises(DamagedStore, match="not a database"):
        back_up(tmp_path / "text.db", tmp_path / "copy.db")
