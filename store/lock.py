"""The lock that makes one process the only writer of a data folder."""

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from store.errors import StoreLocked

LOCK_FILE = "daemon.lock"


class DataDirLock:
    """An exclusive flock on `data_dir/daemon.lock`, which holds the pid of its owner.

    The kernel frees it when the process ends, however it ends; the file itself stays and means nothing.
    """

    def __init__(self, data_dir: Path) -> None:
        self.path = data_dir / LOCK_FILE
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Raises StoreLocked, naming the process that holds the lock, instead of waiting for it."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise self._locked() from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._descriptor = descriptor

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _locked(self) -> StoreLocked:
        pid = holder_pid(self.path.parent)
        holder = f"process {pid}" if pid is not None else "another process"
        folder = self.path.parent
        return StoreLocked(
            f"{folder} is written by {holder}; only one may. Stop it, or give another `data_dir`.", pid
        )


def holder_pid(data_dir: Path) -> int | None:
    """The pid in the lock file: who holds the lock, or held it last. None where nobody ever did."""
    try:
        text = (data_dir / LOCK_FILE).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
