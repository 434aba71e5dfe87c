"""Whether the disk has room: before it has none, metrics stop; what decisions need is held in reserve.

free >= min_free_bytes ──▶ all is written
below, or a write failed ──▶ no metrics, no experiments; the reserve is given to the journal
enough free again ──▶ the reserve is taken back, all is written
"""

import contextlib
import logging
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

RESERVE_FILE = "journal.reserve"
MAX_RESERVE_BYTES = 16_000_000  # a decision takes kilobytes; this is weeks of them
AGAIN = 1.2  # room is back at this many times the limit, so that it does not come and go


def free_bytes_of(folder: Path) -> int:
    """Bytes that this user may still write."""
    return shutil.disk_usage(folder).free


class Room:
    """The state of one data folder's disk. `why` is in words while there is too little room, else None."""

    def __init__(
        self,
        data_dir: Path,
        min_free_bytes: int,
        free_bytes: Callable[[Path], int] = free_bytes_of,
    ) -> None:
        self.min_free_bytes = min_free_bytes
        self.free_bytes = 0
        self.why: str | None = None
        self._data_dir, self._measure = data_dir, free_bytes
        self._reserve = data_dir / RESERVE_FILE
        self._reserve_bytes = min(MAX_RESERVE_BYTES, min_free_bytes // 4)
        self._lock = threading.Lock()  # a write may fail in any thread

    @property
    def is_full(self) -> bool:
        return self.why is not None

    def look(self) -> bool:
        """Measures the disk. Returns whether `is_full` changed since the last look or failed write."""
        with self._lock:
            was_full = self.is_full
            self.free_bytes = self._measure(self._data_dir)
            if not was_full and self.free_bytes < self.min_free_bytes:
                self.why = (
                    f"The disk of {self._data_dir} has {self.free_bytes / 1e6:.0f} MB left, less than "
                    f"`keep.min_free_bytes` ({self.min_free_bytes / 1e6:.0f} MB)."
                )
            elif was_full and self.free_bytes >= AGAIN * self.min_free_bytes + self._missing_bytes():
                self.why = None if self._take_reserve() else self.why
            elif not was_full:
                self._take_reserve()
            return was_full != self.is_full

    def found_full(self, why: str) -> None:
        """A write found no room: the reserve is given back to the disk, so that the next decision can be written."""
        with self._lock:
            if not self.is_full:
                log.error("No room: %s", why)
            self.why = self.why or why
            self._reserve.unlink(missing_ok=True)

    def close(self) -> None:
        """Leaves nothing behind that only takes room; the next start takes its reserve anew."""
        with self._lock:
            self._reserve.unlink(missing_ok=True)

    def _missing_bytes(self) -> int:
        return 0 if self._reserve.exists() else self._reserve_bytes

    def _take_reserve(self) -> bool:
        """Allocates the reserve where it is not there; that it can be is the proof that there is room again."""
        if self._reserve.exists():
            return True
        descriptor = None
        try:
            descriptor = os.open(self._reserve, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            os.posix_fallocate(descriptor, 0, self._reserve_bytes)
        except OSError as error:
            log.warning("No reserve of %d bytes for decisions: %s", self._reserve_bytes, error)
            with contextlib.suppress(OSError):
                self._reserve.unlink(missing_ok=True)
            return False
        finally:
            if descriptor is not None:
                os.close(descriptor)
        return True
