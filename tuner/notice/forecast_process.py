"""The forecasting child, held by a thread of its own: asked one thing at a time, ended when it overruns, recycled.

    stage (tick) ──submit──▶ thread ──frames──▶ `python -m tuner.notice.forecast` (nice 19)
                 ◀──poll────

Whatever happens to the child, killed or hanging, is an answer with an `error`; the next request has a new child.
"""

import contextlib
import logging
import os
import queue
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack

from tuner.notice.forecast import frame

logger = logging.getLogger(__name__)

FITS_A_LIFE = 50
IDLE_S = 60.0  # then the child ends and gives its 150 MB back
COMMAND = (sys.executable, "-m", "runtime.child", "{pid}", "tuner.notice.forecast")


class ChildFailed(Exception):
    """The child ended, or did not answer in time. The text says which."""


class ForecastChild:
    """One life of the child. Its temporary folder ends with it."""

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tuner-forecast-"))
        self.num_fits = 0
        environment = {
            **os.environ,
            "TMPDIR": str(self.folder),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        self._child = subprocess.Popen(
            [word.format(pid=os.getpid()) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Stan runs as a child of the child: both are ended together
        )
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)

    @property
    def pid(self) -> int:
        return self._child.pid

    def ask(self, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Sends a request and waits for its answer.

        Raises:
            ChildFailed: it ended, or the time is over. The child is of no use any more.
        """
        self.num_fits += 1
        until = time.monotonic() + timeout_s
        self._send(frame(request), until)
        size = int.from_bytes(self._receive(4, until), "big")
        return dict(msgpack.unpackb(self._receive(size, until)))

    def close(self) -> None:
        """Ends the child and what it started, and removes its temporary folder."""
        if self._child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _send(self, data: bytes, until: float) -> None:
        assert self._child.stdin is not None
        descriptor, left = self._child.stdin.fileno(), memoryview(data)
        while left:
            self._wait_for(descriptor, until, for_write=True)
            try:
                left = left[os.write(descriptor, left) :]
            except BrokenPipeError:
                raise ChildFailed("The forecasting process ended.") from None

    def _receive(self, size: int, until: float) -> bytes:
        assert self._child.stdout is not None
        descriptor, parts = self._child.stdout.fileno(), bytearray()
        while len(parts) < size:
            self._wait_for(descriptor, until, for_write=False)
            part = os.read(descriptor, size - len(parts))
            if not part:
                raise ChildFailed(f"The forecasting process ended with code {self._child.wait()}.")
            parts += part
        return bytes(parts)

    def _wait_for(self, descriptor: int, until: float, for_write: bool) -> None:
        left_s = until - time.monotonic()
        ready = left_s > 0 and any(
            select.select([] if for_write else [descriptor], [descriptor] if for_write else [], [], left_s)
        )
        if not ready:
            raise ChildFailed("The forecast was not ready in time; its process was ended.")


class ForecastProcess:
    """`submit` and `poll` never block. The thread starts with the first request."""

    def __init__(self, timeout_s: float, command: Sequence[str] = COMMAND, idle_s: float = IDLE_S) -> None:
        self.timeout_s, self.command, self.idle_s = timeout_s, command, idle_s
        self.is_busy = False
        self.pid: int | None = None  # of the child, while there is one
        self.child_folder: Path | None = None  # where it leaves its temporary files
        self.num_started = 0
        self._requests: queue.SimpleQueue[Mapping[str, Any] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, request: Mapping[str, Any]) -> None:
        """One at a time: call it only while `is_busy` is False."""
        self.is_busy = True
        if self._thread is None:
            # The child dies with the thread that started it (PR_SET_PDEATHSIG), so it has to be one that stays.
            self._thread = threading.Thread(target=self._run, name="forecast", daemon=True)
            self._thread.start()
        self._requests.put(request)

    def poll(self) -> dict[str, Any] | None:
        """The answer, once; None while there is none."""
        try:
            found = self._answers.get_nowait()
        except queue.Empty:
            return None
        self.is_busy = False
        return found

    def close(self) -> None:
        if self._thread is None:
            return
        self._requests.put(None)
        pid = self.pid
        if self.is_busy and pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # the thread waits for an answer that nobody wants
        self._thread.join(timeout=5.0)
        self._thread = None

    def _run(self) -> None:
        child: ForecastChild | None = None
        while True:
            try:
                request = self._requests.get(timeout=self.idle_s if child else None)
            except queue.Empty:
                self._end(child)
                child = None
                continue
            if request is None:
                self._end(child)
                return
            try:
                if child is None:
                    child = ForecastChild(self.command)
                    self.pid, self.child_folder = child.pid, child.folder
                    self.num_started += 1
                found = child.ask(request, self.timeout_s)
            except (ChildFailed, OSError, ValueError) as error:
                logger.warning("No forecast: %s", error)
                self._end(child)
                child, found = None, {"id": request["id"], "error": str(error)}
            if child is not None and child.num_fits >= FITS_A_LIFE:
                self._end(child)
                child = None
            self._answers.put(found)

    def _end(self, child: ForecastChild | None) -> None:
        self.pid = self.child_folder = None
        if child is not None:
            child.close()
