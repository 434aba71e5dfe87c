import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from store import database
from store.connection import sqlite_library
from store.database import Store, StoreReader, open_journal, open_metrics, set_aside
from store.errors import (
    DamagedStore,
    NewerStore,
    NoStore,
    OlderStore,
    RowRefused,
    StoreBusy,
    StoreFull,
    StoreLocked,
    StoreUnavailable,
)
from store.last_good import LastGood
from store.tables import SCHEMA_VERSIONS, Champion, Config, Note, Sample, Snapshot, Study


def note(text: str, at: float = 1.0) -> Note:
    return Note(at, "sample", text)


def test_commits_at_the_end_of_the_block_and_rolls_back_where_it_raises(store: Store) -> None:
    with store.journal() as session:
        session.add(note("kept"))
    with pytest.raises(ZeroDivisionError), store.journal() as session:
        session.add(note("lost"))
        session.flush()
        raise ZeroDivisionError
    with store.journal() as session:
        assert [row.text for row in session.query(Note)] == ["kept"]


def test_rows_stay_usable_after_their_session(store: Store) -> None:
    with store.journal() as session:
        row = note("kept")
        session.add(row)
    assert (row.note_id, row.text) == (1, "kept")


def test_rows_of_one_session_may_refer_to_each_other_in_any_order(store: Store) -> None:
    with store.journal() as session:
        session.add(Champion("s", "c", 1.0))
        session.add(Snapshot("s", 1.0, {}, {}, {}, 1, []))
        session.add(Config("c", 1.0, 1, {}))
    with store.journal() as session:
        assert session.query(Champion).count() == 1


def test_a_row_that_refers_to_nothing_is_refused_and_the_next_session_works(store: Store) -> None:
    with (
        pytest.raises(RowRefused, match=r"FOREIGN KEY constraint failed. Nothing of this session is stored"),
        store.journal() as session,
    ):
        session.add(note("goes with it"))
        session.add(Champion("absent", "absent", 1.0))
    with store.journal() as session:
        assert session.query(Note).count() == 0
        session.add(note("works"))


def test_a_missing_value_and_a_second_row_of_one_key_are_refused(store: Store) -> None:
    with (
        pytest.raises(RowRefused, match=r"NOT NULL constraint failed: note\.text"),
        store.journal() as session,
    ):
        session.add(Note(1.0, "sample", None))  # type: ignore[arg-type]
    with store.journal() as session:
        session.add(Config("c", 1.0, 1, {}))
    with (
        pytest.raises(RowRefused, match=r"UNIQUE constraint failed: config\.config_id"),
        store.journal() as session,
    ):
        session.add(Config("c", 2.0, 1, {}))


def test_the_same_thread_cannot_open_a_second_session_of_a_file(store: Store) -> None:
    with store.journal() as session, store.metrics():
        with pytest.raises(StoreBusy, match="this thread has one open"), store.journal():
            pass
        session.add(note("the first goes on"))
    with store.journal() as session:
        assert session.query(Note).count() == 1


def test_sessions_of_several_threads_take_turns(store: Store) -> None:
    def write(name: int) -> None:
        for number in range(20):
            with store.journal() as session:
                session.add(note(f"{name}/{number}"))

    threads = [threading.Thread(target=write, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with store.journal() as session:
        assert session.query(Note).count() == 80


def test_a_turn_that_does_not_come_is_an_error(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.01)
    errors: list[Exception] = []

    def want() -> None:
        try:
            with store.journal():
                pass
        except StoreBusy as error:
            errors.append(error)

    with store.journal():
        thread = threading.Thread(target=want)
        thread.start()
        thread.join()
    assert "still open in another thread" in str(errors[0])


def test_readers_see_what_is_committed_while_the_writer_writes(store: Store) -> None:
    reader = store.reader()
    with store.journal() as session:
        session.add(note("first"))
    with store.journal() as session:
        session.add(note("second"))
        session.flush()
        with reader.journal() as seen:
            assert seen.query(Note).count() == 1
    with reader.journal() as seen:
        assert seen.query(Note).count() == 2


def test_a_reader_keeps_its_snapshot_while_the_writer_commits(store: Store) -> None:
    with store.reader().journal() as seen:
        assert seen.query(Note).count() == 0
        with store.journal() as session:
            session.add(note("later"))
        assert seen.query(Note).count() == 0


def test_a_reader_in_another_process_sees_committed_rows(store: Store, data_dir: Path) -> None:
    with store.journal() as session:
        session.add(note("from the writer"))
    read = (
        "import sys; from pathlib import Path; from store.database import StoreReader; from store.tables import Note\n"
        "with StoreReader(Path(sys.argv[1])).journal() as session: print(session.query(Note).one().text)"
    )
    done = subprocess.run(
        [sys.executable, "-c", read, str(data_dir)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "from the writer"


def test_a_reader_cannot_write(store: Store) -> None:
    with pytest.raises(StoreUnavailable, match="readonly"), store.reader().journal() as session:
        session.add(note("never"))
        session.flush()


def test_what_a_reader_adds_and_does_not_flush_is_not_stored(store: Store) -> None:
    with store.reader().journal() as session:
        session.add(note("never"))
    with store.journal() as session:
        assert session.query(Note).count() == 0


def test_a_reader_without_a_store_says_what_to_do(data_dir: Path) -> None:
    with (
        pytest.raises(NoStore, match=r"There is no store at .*Start `tuner run`"),
        StoreReader(data_dir).journal(),
    ):
        pass
    assert not data_dir.exists()


def test_a_reader_of_a_file_that_is_just_being_made_is_told_to_wait(data_dir: Path) -> None:
    data_dir.mkdir()
    (data_dir / "journal.db").touch()
    with pytest.raises(NoStore, match="is still empty"), StoreReader(data_dir).journal():
        pass


def test_a_reader_works_after_the_writer_is_gone_and_after_it_is_back(data_dir: Path) -> None:
    reader = StoreReader(data_dir)
    for count in (1, 2):
        with Store.open(data_dir) as store, store.journal() as session:
            session.add(note("another"))
        with reader.journal() as session:
            assert session.query(Note).count() == count


def set_schema(path: Path, version: int) -> None:
    opened = sqlite_library().module.connect(str(path), isolation_level=None)
    opened.execute(f"PRAGMA user_version={version}")
    opened.close()


def test_a_newer_store_is_refused_by_writer_and_reader_and_not_touched(data_dir: Path) -> None:
    Store.open(data_dir).close()
    set_schema(data_dir / "metrics.db", SCHEMA_VERSIONS["metrics"] + 1)
    known = SCHEMA_VERSIONS["metrics"]
    told = (
        rf"metrics\.db has schema {known + 1}, but this version of the tuner knows up to {known}: a newer one"
    )
    with pytest.raises(NewerStore, match=told):
        Store.open(data_dir)
    with pytest.raises(NewerStore, match=told), StoreReader(data_dir).metrics():
        pass
    set_schema(data_dir / "metrics.db", SCHEMA_VERSIONS["metrics"])
    Store.open(data_dir).close()  # the refusal gave the lock back


def test_an_older_store_is_left_to_the_writer(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store.open(data_dir).close()
    old = SCHEMA_VERSIONS["journal"]
    monkeypatch.setitem(database.SCHEMA_VERSIONS, "journal", old + 1)
    told = f"has schema {old}, but this version reads {old + 1}. Start `tuner run` once"
    with (
        pytest.raises(OlderStore, match=told),
        StoreReader(data_dir).journal(),
    ):
        pass


def test_a_second_writer_is_refused_with_the_pid_of_the_first(store: Store, data_dir: Path) -> None:
    with pytest.raises(StoreLocked, match=f"is written by process {os.getpid()}; only one may") as caught:
        Store.open(data_dir)
    assert caught.value.pid == os.getpid()
    other = "import sys; from pathlib import Path; from store.database import Store; Store.open(Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", other, str(data_dir)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"StoreLocked: {data_dir} is written by process {os.getpid()}" in done.stderr


def test_a_closed_store_can_be_opened_again(data_dir: Path) -> None:
    for number in range(3):
        with Store.open(data_dir) as store, store.journal() as session:
            assert session.query(Note).count() == number
            session.add(note("one more"))


@pytest.mark.parametrize(
    "content", [b"not a database at all " * 200, b"SQLite format 3\x00" + b"\xff" * 8000]
)
def test_a_file_that_is_not_a_database_is_damaged(data_dir: Path, content: bytes) -> None:
    data_dir.mkdir()
    (data_dir / "journal.db").write_bytes(content)
    with pytest.raises(DamagedStore, match=r"journal\.db is damaged") as caught:
        Store.open(data_dir)
    assert caught.value.path == str(data_dir / "journal.db")


def test_a_database_with_a_broken_page_is_damaged_and_can_be_set_aside(data_dir: Path) -> None:
    with Store.open(data_dir) as store, store.journal() as session:
        session.add_all(note("x" * 500) for _ in range(200))
    path = data_dir / "journal.db"
    content = bytearray(path.read_bytes())
    content[-8192:] = os.urandom(8192)
    path.write_bytes(content)
    with pytest.raises(DamagedStore, match="sets it aside and restores the last backup"):
        Store.open(data_dir)
    aside = set_aside(data_dir, "journal", now=1234.5)
    assert aside.name == "journal.db.damaged-19700101T002034Z"
    assert aside.read_bytes() == content
    with Store.open(data_dir) as store, store.journal() as session:
        assert session.query(Note).count() == 0


def test_a_database_of_something_else_is_not_taken_over(data_dir: Path) -> None:
    data_dir.mkdir()
    other = sqlite_library().module.connect(str(data_dir / "journal.db"))
    other.execute("CREATE TABLE songs (title TEXT)")
    other.close()
    with pytest.raises(DamagedStore, match="is a database of something else"):
        Store.open(data_dir)


def test_a_full_disk_is_told_apart_and_the_store_works_once_there_is_room(store: Store) -> None:
    def limit_pages(count: int) -> None:
        with store.journal() as session:
            session.connection().connection.driver_connection.execute(
                f"PRAGMA max_page_count={count}"
            ).fetchall()

    limit_pages(1)
    with pytest.raises(StoreFull, match="the disk is full"), store.journal() as session:
        session.add_all(note("x" * 1000) for _ in range(200))
    limit_pages(1_000_000)
    with store.journal() as session:
        session.add(note("room again"))


def test_files_can_be_opened_one_by_one(data_dir: Path) -> None:
    with Store.open(data_dir) as store, store.metrics() as session:
        session.add(Sample("load_1m", "", 1.0, 0.5))
    journal, metrics = (
        open_journal(data_dir / "journal.db"),
        open_metrics(data_dir / "metrics.db", readonly=True),
    )
    with journal.session() as session, metrics.session() as measured:
        session.add(note(str(measured.query(Sample).one().value)))
    journal.close()
    with StoreReader(data_dir).journal() as session:
        assert session.query(Note).one().text == "0.5"


def test_a_json_column_changes_when_it_is_given_a_new_value(store: Store) -> None:
    with store.journal() as session:
        session.add_all(
            [
                Snapshot("s", 1.0, {}, {}, {}, 1, []),
                Config("c", 1.0, 1, {}),
                Study("s", "c", 1.0, "why", {}, {}, 0, 1),
            ]
        )
    with store.journal() as session:
        session.query(Study).one().space = {"policy": ["fcfs"]}
    with store.journal() as session:
        assert session.query(Study).one().space == {"policy": ["fcfs"]}


def test_the_last_good_configuration_goes_through_the_store(store: Store) -> None:
    assert store.read_last_good() is None
    good = LastGood({"policy": "fcfs"}, "c", "s", 3, 1.5)
    store.write_last_good(good)
    assert store.read_last_good() == good


def test_opening_tells_of_the_library_in_use(data_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), Store.open(data_dir):
        pass
    assert f"store opened: {data_dir} ({sqlite_library()})" in caplog.text
    assert "alembic" not in {record.name.split(".")[0] for record in caplog.records}
