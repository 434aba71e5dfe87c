"""Records on disk: nothing that is not acknowledged is lost with its process, and nothing is kept for ever."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import record_spool
from runtime.record_spool import RecordSpool, left_segments
from runtime.timings import RecordBuffer


def numbers_left(run_dir: Path, but_boot: str = "next", limit: int = 100) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for segment in left_segments(run_dir, but_boot, limit):
        found.setdefault(segment.boot_id, []).extend(record["seq"] for record in segment.records)
    return found


def files(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "records").iterdir())


def spooled(run_dir: Path, num: int, boot_id: str = "b1", max_records: int = 10_000) -> RecordBuffer:
    buffer = RecordBuffer(max_records, spool=RecordSpool(run_dir, boot_id))
    for number in range(num):
        buffer.append("event", {"at": float(number), "event": "engine_ready"})
    return buffer


def test_a_process_that_is_killed_leaves_every_record_behind(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from tests.runtime.test_record_spool import spooled\n"
        "spooled(Path(sys.argv[1]), 50); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False, timeout=60)
    assert done.returncode == -9
    assert numbers_left(tmp_path) == {"b1": list(range(1, 51))}


def test_what_is_left_reads_as_the_drain_would_have_given_it(tmp_path: Path) -> None:
    buffer = spooled(tmp_path, 3)
    (segment,) = left_segments(tmp_path, "next", 10)
    assert segment.records == json.loads(buffer.drain(0, 10).records_json)


def test_whole_segments_go_once_they_are_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_spool, "SEGMENT_BYTES", 500)
    buffer = spooled(tmp_path, 100)
    many = len(files(tmp_path))
    assert many > 5
    buffer.drain(50, 1)
    assert 2 < len(files(tmp_path)) < many
    assert set(range(51, 101)) <= set(numbers_left(tmp_path)["b1"])
    buffer.drain(100, 1)
    assert len(files(tmp_path)) <= 1  # the one that is written to
    buffer.close()
    assert files(tmp_path) == []


def test_a_drained_boot_leaves_nothing_and_an_unread_one_everything(tmp_path: Path) -> None:
    buffer = spooled(tmp_path, 5, "b1")
    buffer.drain(5, 1)
    buffer.close()
    spooled(tmp_path, 5, "b2").close()
    assert numbers_left(tmp_path) == {"b2": [1, 2, 3, 4, 5]}


def test_the_disk_holds_no_more_than_the_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_spool, "SEGMENT_BYTES", 500)
    spooled(tmp_path, 1000, max_records=20)
    left = numbers_left(tmp_path)["b1"]
    assert left[-20:] == list(range(981, 1001)) and len(left) < 40


def test_the_boot_that_runs_is_not_left_behind(tmp_path: Path) -> None:
    spooled(tmp_path, 2, "b1")
    spooled(tmp_path, 2, "b2")
    assert numbers_left(tmp_path, but_boot="b2") == {"b1": [1, 2]}


def test_an_unfinished_line_costs_that_record_alone(tmp_path: Path) -> None:
    spooled(tmp_path, 3)
    with open(files(tmp_path)[0], "ab") as file:
        file.write(b'{"at":1.0,"ev')
    assert numbers_left(tmp_path) == {"b1": [1, 2, 3]}


def test_a_full_disk_stops_nothing_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(record_spool, "RETRY_RECORDS", 10)
    buffer = spooled(tmp_path, 2)
    with monkeypatch.context() as patch:

        def full(file: int, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(os, "write", full)
        for _ in range(5):
            buffer.append("event", {"at": 0.0, "event": "x"})
    assert caplog.text.count("only in memory") == 1
    for _ in range(10):
        buffer.append("event", {"at": 0.0, "event": "x"})
    left = numbers_left(tmp_path)["b1"]
    assert left[:2] == [1, 2] and left[-1] == 17 and 3 not in left
    assert buffer.drain(0, 100).next_seq == 17  # the drain has them all


def test_earlier_boots_are_kept_up_to_a_bound_the_newest_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        spooled(tmp_path, 10, f"b{number}").close()
        os.utime(files(tmp_path)[-1], (number, number))
    size = files(tmp_path)[0].stat().st_size
    monkeypatch.setattr(record_spool, "MAX_LEFT_BYTES", 2 * size)
    RecordSpool(tmp_path, "b9")
    assert sorted(numbers_left(tmp_path)) == ["b2", "b3"]


def test_a_folder_that_cannot_be_made_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "records").write_text("a file stands in its place")
    buffer = spooled(tmp_path, 3)
    assert buffer.drain(0, 10).next_seq == 3 and "only in memory" in caplog.text


def test_a_segment_that_goes_while_it_is_looked_at_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon removes what it has stored, the next start what is too much: either may come second."""
    spooled(tmp_path, 3, "b1").close()
    gone = tmp_path / "records" / "b0.000001.jsonl"
    found = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [*found(self, pattern), gone])
    assert numbers_left(tmp_path) == {"b0": [], "b1": [1, 2, 3]}
    RecordSpool(tmp_path, "b2")
