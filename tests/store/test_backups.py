import stat
import threading
from pathlib import Path

import pytest

from store import backups
from store.backups import check_copy, daily_backups, made_at, make_backup, put_back
from store.connection import sqlite_library
from store.database import Store
from store.errors import DamagedStore, StoreError
from store.tables import SCHEMA_VERSIONS, Note

NOW = 1_790_000_000.0


def test_a_copy_is_checked_private_and_named_after_its_instant(store: Store, data_dir: Path) -> None:
    with store.journal() as session:
        session.add(Note(NOW, "test", "kept"))
    path = make_backup(data_dir, NOW, 3)
    assert path == data_dir / "backups" / "journal-20260921T141320Z.db"
    assert made_at(path) == NOW
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert check_copy(path) == SCHEMA_VERSIONS["journal"]
    assert [found.name for found in path.parent.iterdir()] == [path.name], "looking leaves nothing beside it"


def test_only_the_newest_copies_are_kept(store: Store, data_dir: Path) -> None:
    made = [make_backup(data_dir, NOW + 86400 * day, 3) for day in range(5)]
    assert daily_backups(data_dir) == made[:1:-1]


def test_a_copy_of_a_wrong_clock_does_not_push_out_the_one_just_made(store: Store, data_dir: Path) -> None:
    make_backup(data_dir, NOW + 1e9, 1)
    made = make_backup(data_dir, NOW, 1)
    assert daily_backups(data_dir) == [made]


def test_files_of_others_in_the_folder_are_left_alone(store: Store, data_dir: Path) -> None:
    (data_dir / "backups").mkdir()
    mine = data_dir / "backups" / "before-my-experiment.db"
    mine.touch()
    for day in range(3):
        make_backup(data_dir, NOW + 86400 * day, 1)
    assert mine.exists()
    assert made_at(mine) is None


def test_a_copy_that_fails_its_check_is_thrown_away_and_older_ones_stay(
    store: Store, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_backup(data_dir, NOW, 1)

    def refuses(path: Path) -> int:
        raise DamagedStore("damaged", str(path))

    monkeypatch.setattr(backups, "check_copy", refuses)
    with pytest.raises(DamagedStore):
        make_backup(data_dir, NOW + 86400, 1)
    assert daily_backups(data_dir) == [first]


def test_a_copy_taken_under_writes_holds_whole_commits(store: Store, data_dir: Path) -> None:
    """Two notes a commit, hundreds of commits a second, ten copies: each is whole, and none is of half a commit."""
    stop = threading.Event()
    num_commits = 0

    def write() -> None:
        nonlocal num_commits
        while not stop.is_set():
            with store.journal() as session:
                session.add_all([Note(NOW, "test", "a"), Note(NOW, "test", "b")])
            num_commits += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        copies = [make_backup(data_dir, NOW + n, 10) for n in range(10)]
    finally:
        stop.set()
        writer.join()
    counts = []
    for copy in copies:
        opened = sqlite_library().module.connect(str(copy))
        counts.append(opened.execute("SELECT count(*) FROM note").fetchone()[0])
        opened.close()
    assert counts == sorted(counts)
    assert all(count % 2 == 0 for count in counts)
    assert 0 < counts[-1] <= 2 * num_commits


def test_a_copy_that_was_put_back_is_the_store(store: Store, data_dir: Path) -> None:
    with store.journal() as session:
        session.add(Note(NOW, "test", "kept"))
    copy = make_backup(data_dir, NOW, 3)
    store.close()
    (data_dir / "journal.db").unlink()
    put_back(data_dir, copy)
    with Store.open(data_dir) as again, again.journal() as session:
        assert session.query(Note).one().text == "kept"
    assert stat.S_IMODE((data_dir / "journal.db").stat().st_mode) == 0o600


@pytest.mark.parametrize("content", [b"", b"SQLite format 3\x00", b"text " * 2000])
def test_what_is_no_journal_is_no_copy(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "some.db").write_bytes(content)
    with pytest.raises(StoreError):
        check_copy(tmp_path / "some.db")
    with pytest.raises(StoreError):
        check_copy(tmp_path / "absent.db")
