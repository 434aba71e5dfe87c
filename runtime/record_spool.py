"""Records on disk until they are acknowledged, so that a front end that is killed takes none of them along.

    RUN_DIR/records/<boot id>.<number>.jsonl      one record a line, as the drain would give it

A request's record is written before its client has the end of the answer. There is no fsync: what was written
outlives the process in the page cache, and a host that goes down takes the clients along too. Segments are removed
once all in them is acknowledged; those of earlier boots stay until somebody has read them, up to MAX_LEFT_BYTES.
"""

import contextlib
import json
import logging
import os
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

log = logging.getLogger(__name__)

FOLDER = "records"
SEGMENT_BYTES = 1 << 20
MAX_LEFT_BYTES = 64 << 20
RETRY_RECORDS = 1000  # after a failed write (a full disk, say) so many are not even tried


class LeftSegment(NamedTuple):
    """What a boot that is over left behind in one file, in the order of the numbers."""

    path: Path
    boot_id: str
    records: list[Mapping[str, Any]]


class RecordSpool:
    """The segments of one boot. A write that fails costs a line in the log and nothing else."""

    def __init__(self, run_dir: Path, boot_id: str) -> None:
        self._folder, self._boot_id = run_dir / FOLDER, boot_id
        self._closed: deque[tuple[Path, int]] = deque()  # whole segments and the last number in each
        self._file: int | None = None
        self._path, self._size, self._number, self._last_seq, self._num_skipped = Path(), 0, 0, 0, 0
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _bound_left(self._folder)
        except OSError as error:  # a full disk must not keep the server from starting
            log.warning("What earlier starts left in %s stays as it is: %s", self._folder, error)

    def append(self, seq: int, encoded: bytes) -> None:
        if self._num_skipped:
            self._num_skipped = (self._num_skipped + 1) % RETRY_RECORDS
            return
        try:
            if self._file is None:
                self._open()
            assert self._file is not None
            line = encoded + b"\n"
            if os.write(self._file, line) != len(line):
                raise OSError("the disk took only a part of it")
        except OSError as error:
            log.warning("Records are only in memory for now, and lost if this process is killed: %s", error)
            self._num_skipped = 1
            self._close_segment()
            return
        self._last_seq = seq
        self._size += len(line)
        if self._size >= SEGMENT_BYTES:
            self._close_segment()

    def acknowledge(self, seq: int) -> None:
        """Everything up to this number stands elsewhere, or was dropped."""
        while self._closed and self._closed[0][1] <= seq:
            self._closed.popleft()[0].unlink(missing_ok=True)

    def close(self, acknowledged: int) -> None:
        """The boot is over. What nobody has read stays for whoever comes."""
        self._close_segment()
        self.acknowledge(acknowledged)

    def _open(self) -> None:
        self._number += 1
        self._path = self._folder / f"{self._boot_id}.{self._number:06d}.jsonl"
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._file, self._size = os.open(self._path, flags, 0o600), 0

    def _close_segment(self) -> None:
        if self._file is None:
            return
        os.close(self._file)
        self._file = None
        self._closed.append((self._path, self._last_seq))


def _bound_left(folder: Path) -> None:
    """Where no daemon ever reads, the newest of what earlier boots left is enough."""
    room = MAX_LEFT_BYTES
    for _, size, path in sorted(_found(folder), reverse=True):
        room -= size
        if room < 0:
            path.unlink(missing_ok=True)


def _found(folder: Path) -> Iterator[tuple[float, int, Path]]:
    """Age and size of each segment. A daemon that reads at the same time may have removed one just now."""
    for path in folder.glob("*.jsonl"):
        with contextlib.suppress(FileNotFoundError):
            told = path.stat()
            yield told.st_mtime, told.st_size, path


def left_segments(run_dir: Path, but_boot: str, limit: int) -> list[LeftSegment]:
    """At most `limit` segments of boots other than the one that runs, each boot's in order.

    A line that a full disk or a crash of the host left unfinished is passed over, and so is a segment that the next
    start of the runtime removes meanwhile.
    """
    paths = sorted(path for path in (run_dir / FOLDER).glob("*.jsonl") if path.name.split(".")[0] != but_boot)
    return [LeftSegment(path, path.name.split(".")[0], _records(path)) for path in paths[:limit]]


def _records(path: Path) -> list[Mapping[str, Any]]:
    records: list[Mapping[str, Any]] = []
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return records
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("seq"), int):
            records.append(record)
    return records
