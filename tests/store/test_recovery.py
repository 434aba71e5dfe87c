"""Damaged files at the start: set aside, restored from the newest good copy or begun afresh, and told."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from store import recovery
from store.backups import daily_backups, make_backup, newest_good
from store.connection import sqlite_library
from store.database import Store
from store.errors import DamagedStore, ForeignStore, StoreLocked
from store.last_good import LastGood, write_last_good
from store.recovery import open_store
from store.tables import Note, Sample

NOW = 1_790_000_000.0
GOOD = LastGood({"policy": "fcfs"}, "c", "s", 3, NOW)


def notes_in(data_dir: Path) -> list[str]:
    store, _ = open_store(data_dir, NOW)
    with store, store.journal() as session:
        return [row.text for row in session.query(Note).order_by(Note.note_id)]


@pytest.fixture
def used(data_dir: Path) -> Path:
    """A store of two pages of notes, with a backup of the first half."""
    with Store.open(data_dir) as store:
        with store.journal() as session:
            session.add_all(Note(NOW, "test", f"early {n} " + "x" * 300) for n in range(40))
        make_backup(data_dir, NOW, 3)
        with store.journal() as session:
            session.add_all(Note(NOW, "test", f"late {n} " + "x" * 300) for n in range(40))
        with store.metrics() as session:
            session.add_all(Sample("load_1m", "", NOW + n, 1.0) for n in range(2000))
        write_last_good(data_dir, GOOD)
    return data_dir


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for at in range(5000, len(content), 997):
        content[at] ^= 0xFF
    path.write_bytes(content)


def overwritten(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[:100] = os.urandom(100)
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2 // 4096 * 4096)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


DAMAGES: list[Callable[[Path], None]] = [flipped, overwritten, cut_short]


@pytest.mark.parametrize("damage", [*DAMAGES, emptied])
def test_a_damaged_journal_is_restored_from_its_newest_copy(
    used: Path, damage: Callable[[Path], None]
) -> None:
    damage(used / "journal.db")
    before = (used / "journal.db").read_bytes()
    store, recovered = open_store(used, NOW + 5)
    with store, store.journal() as session:
        assert [row.text[:7] for row in session.query(Note)] == [f"early {n}"[:7] for n in range(40)]
        session.add(Note(NOW, "test", "and it goes on"))
    (one,) = recovered
    assert (one.which, one.restored_from) == ("journal", used / "backups" / "journal-20260921T141320Z.db")
    assert one.aside.name == "journal.db.damaged-20260921T141325Z"
    assert one.aside.read_bytes() == before
    assert "restored from journal-20260921T141320Z.db. Decisions since then are lost" in one.told


@pytest.mark.parametrize("damage", [*DAMAGES, emptied])
def test_without_a_copy_the_journal_begins_afresh(used: Path, damage: Callable[[Path], None]) -> None:
    for backup in daily_backups(used):
        backup.unlink()
    damage(used / "journal.db")
    store, recovered = open_store(used, NOW + 5)
    with store, store.journal() as session:
        assert session.query(Note).count() == 0
        assert store.read_last_good() == GOOD
    assert recovered[0].restored_from is None
    assert "and started afresh" in recovered[0].told


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_metrics_begin_afresh_and_cost_no_decision(
    used: Path, damage: Callable[[Path], None]
) -> None:
    damage(used / "metrics.db")
    store, recovered = open_store(used, NOW + 5)
    with store, store.journal() as session, store.metrics() as measured:
        assert session.query(Note).count() == 80
        assert measured.query(Sample).count() == 0
    assert [(one.which, one.restored_from) for one in recovered] == [("metrics", None)]
    assert "no decision is" in recovered[0].told


def test_both_files_may_be_damaged(used: Path) -> None:
    flipped(used / "journal.db")
    flipped(used / "metrics.db")
    store, recovered = open_store(used, NOW)
    store.close()
    assert [one.which for one in recovered] == ["journal", "metrics"]


def test_a_damaged_copy_is_passed_over_for_an_older_one(used: Path) -> None:
    newer = used / "backups" / "journal-20260921T143000Z.db"
    newer.write_bytes((used / "journal.db").read_bytes())
    flipped(newer)
    (used / "backups" / "journal-20260921T150000Z.db").write_bytes(b"")
    (used / "backups" / "journal-20260921T160000Z.db").write_text("not a database " * 500)
    flipped(used / "journal.db")
    assert newest_good(used) == used / "backups" / "journal-20260921T141320Z.db"
    assert len(notes_in(used)) == 40


def test_a_copy_of_a_newer_version_is_passed_over(used: Path) -> None:
    newer = used / "backups" / "journal-20260921T150000Z.db"
    newer.write_bytes((used / "journal.db").read_bytes())
    opened = sqlite_library().module.connect(str(newer), isolation_level=None)
    opened.execute("PRAGMA user_version=99")
    opened.close()
    assert newest_good(used) == used / "backups" / "journal-20260921T141320Z.db"


def test_a_copy_that_breaks_once_it_is_upgraded_is_not_tried_twice(used: Path) -> None:
    """References that are gone pass every check of the file itself, and are found by the migration."""
    for path in (used / "journal.db", *daily_backups(used)):
        opened = sqlite_library().module.connect(str(path), isolation_level=None)
        opened.execute("INSERT INTO champion (snapshot_id, config_id, since_at) VALUES ('gone', 'gone', 1)")
        opened.execute("PRAGMA user_version=1")
        opened.close()
    store, recovered = open_store(used, NOW)
    with store, store.journal() as session:
        assert session.query(Note).count() == 0
    assert recovered[-1].restored_from is None
    assert len({one.restored_from for one in recovered}) == len(recovered)


def test_a_whole_store_is_opened_as_it_is(used: Path) -> None:
    before = sorted(path.name for path in used.iterdir())
    store, recovered = open_store(used, NOW)
    store.close()
    assert recovered == []
    assert sorted(path.name for path in used.iterdir()) == before
    assert len(notes_in(used)) == 80


def test_a_new_folder_is_no_loss(data_dir: Path) -> None:
    store, recovered = open_store(data_dir, NOW)
    store.close()
    assert recovered == []


def test_a_file_cut_to_nothing_before_anything_was_decided_is_a_new_one(data_dir: Path) -> None:
    data_dir.mkdir()
    (data_dir / "journal.db").touch()
    store, recovered = open_store(data_dir, NOW)
    store.close()
    assert recovered == []


def test_a_database_of_something_else_is_left_where_it_is(data_dir: Path) -> None:
    data_dir.mkdir()
    path = data_dir / "journal.db"
    other = sqlite_library().module.connect(str(path))
    other.execute("CREATE TABLE songs (title TEXT)")
    other.close()
    with pytest.raises(ForeignStore, match="is a database of something else"):
        open_store(data_dir, NOW)
    assert path.exists() and not list(data_dir.glob("*.damaged-*"))


def test_a_store_in_use_is_not_recovered_from_under_its_owner(used: Path) -> None:
    with Store.open(used), pytest.raises(StoreLocked):
        open_store(used, NOW)
    assert not list(used.glob("*.damaged-*"))


def test_gives_up_where_everything_put_back_is_damaged_again(
    used: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def always_damaged(data_dir: Path) -> Store:
        raise DamagedStore("damaged", str(data_dir / "journal.db"))

    monkeypatch.setattr(recovery.Store, "open", always_damaged)
    with pytest.raises(DamagedStore, match=r"stays damaged.*Is the disk failing"):
        open_store(used, NOW)


@pytest.mark.parametrize("seed", range(12))
def test_random_damage_never_keeps_the_store_from_opening(used: Path, seed: int) -> None:
    """Whatever bytes are wrong, in either file: it opens, works, and every note it shows was written."""
    rng = random.Random(seed)
    for name in ("journal.db", "metrics.db"):
        content = bytearray((used / name).read_bytes())
        for _ in range(rng.choice([1, 5, 200])):
            content[rng.randrange(len(content))] = rng.randrange(256)
        del content[rng.choice([len(content), len(content), rng.randrange(len(content))]) :]
        (used / name).write_bytes(content)
    store, _ = open_store(used, NOW)
    with store:
        with store.journal() as session:
            session.add(Note(NOW, "test", "works"))
        with store.metrics() as session:
            session.merge(Sample("load_1m", "", NOW - 1.0, 0.5))
