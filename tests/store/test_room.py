"""A disk that fills up: metrics stop first, decisions go on from their reserve, and all returns with the room."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from store.database import Store
from store.errors import StoreError, StoreFull
from store.room import RESERVE_FILE, Room
from store.tables import Note, Sample

MB = 1_000_000


class Disk:
    """A disk whose free room is what a test says."""

    def __init__(self, free_bytes: int) -> None:
        self.free_bytes = free_bytes

    def __call__(self, folder: Path) -> int:
        return self.free_bytes


@pytest.fixture
def disk() -> Disk:
    return Disk(100 * MB)


@pytest.fixture
def room(tmp_path: Path, disk: Disk) -> Room:
    return Room(tmp_path, 4 * MB, disk)


def test_with_room_the_reserve_is_taken_and_nothing_is_said(room: Room, tmp_path: Path) -> None:
    assert room.look() is False
    assert not room.is_full
    assert (tmp_path / RESERVE_FILE).stat().st_size == MB
    room.close()
    assert not (tmp_path / RESERVE_FILE).exists()


def test_below_its_limit_it_is_full_until_there_is_clearly_room_again(room: Room, disk: Disk) -> None:
    disk.free_bytes = 4 * MB - 1
    assert room.look() is True and room.look() is False
    assert room.is_full and "has 4 MB left, less than `keep.min_free_bytes` (4 MB)" in str(room.why)
    disk.free_bytes = 5 * MB
    assert room.look() is False and room.is_full, "a limit that is just met comes and goes"
    disk.free_bytes = 6 * MB
    assert room.look() is True and not room.is_full


def test_a_failed_write_gives_the_reserve_to_the_next_decision(
    room: Room, disk: Disk, tmp_path: Path
) -> None:
    room.look()
    room.found_full("the disk is full")
    assert room.is_full and room.why == "the disk is full"
    assert not (tmp_path / RESERVE_FILE).exists()
    disk.free_bytes = 5 * MB
    assert room.look() is False and room.is_full
    disk.free_bytes = 100 * MB
    assert room.look() is True
    assert (tmp_path / RESERVE_FILE).exists()


def test_a_reserve_that_cannot_be_had_means_that_there_is_no_room_yet(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quota, which the free bytes of the disk do not show."""
    room.found_full("quota")

    def refuses(descriptor: int, offset: int, length: int) -> None:
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(os, "posix_fallocate", refuses)
    assert room.look() is False and room.is_full
    monkeypatch.undo()
    assert room.look() is True and not room.is_full


# --- a real file system -----------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def fill(folder: Path) -> Path:
    """Takes whatever is left, as another program would."""
    path = folder / "others.bin"
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY)
    for size in (65536, 4096, 512):
        try:
            while True:
                os.write(descriptor, b"x" * size)
        except OSError:
            continue
    os.close(descriptor)
    return path


def test_on_a_full_disk_a_decision_is_written_from_the_reserve(small_disk: Path) -> None:
    with Store.open(small_disk / "store") as store:
        store.room = Room(small_disk / "store", 2 * MB)
        store.room.look()
        others = fill(small_disk)
        with pytest.raises(StoreFull, match="the disk is full"), store.metrics() as session:
            session.add_all(Sample("load_1m", "", float(n), 1.0) for n in range(20_000))
        assert store.room.is_full
        with store.journal() as session:
            session.add(Note(1.0, "test", "the fault"))
        others.unlink()
        assert store.room.look() is True
        with store.metrics() as session:
            session.add(Sample("load_1m", "", 1.0, 1.0))
        with store.journal() as session:
            assert [row.text for row in session.query(Note)] == ["the fault"]
            session.add(Note(1.0, "test", "after"))


def test_a_store_that_met_a_full_disk_is_whole(small_disk: Path) -> None:
    """Writes until nothing goes any more, in both files, again and again; then room returns."""
    promised = 0
    with Store.open(small_disk / "store") as store:
        others = fill(small_disk)
        for _ in range(30):
            try:
                with store.journal() as session:
                    session.add_all(Note(1.0, "test", "x" * 2000) for _ in range(20))
                promised += 20
            except StoreError:
                pass
            try:
                with store.metrics() as session:
                    session.add_all(Sample(f"m{os.urandom(4).hex()}", "", 1.0, 1.0) for _ in range(500))
            except StoreError:
                pass
        others.unlink()
        with store.journal() as session:
            session.add(Note(1.0, "test", "room again"))
    with Store.open(small_disk / "store") as store, store.journal() as session:
        assert session.query(Note).count() == promised + 1


def test_a_copy_that_finds_no_room_leaves_the_older_ones(small_disk: Path) -> None:
    from store.backups import daily_backups, make_backup

    with Store.open(small_disk / "store") as store:
        with store.journal() as session:
            session.add_all(Note(1.0, "test", "x" * 1000) for _ in range(1000))
        first = make_backup(small_disk / "store", 1e9, 3)
        others = fill(small_disk)
        with pytest.raises((StoreError, OSError)):
            make_backup(small_disk / "store", 1.1e9, 3)
        assert daily_backups(small_disk / "store") == [first]
        assert not list((small_disk / "store" / "backups").glob("*.tmp"))
        others.unlink()
        assert len([make_backup(small_disk / "store", 1.2e9, 3)]) == 1
