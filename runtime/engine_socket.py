"""The Unix socket on which the front end waits for its own engine, and for nobody else."""

import asyncio
import logging
import os
import shutil
import socket
import struct
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

log = logging.getLogger(__name__)

MAX_PATH_BYTES = 100  # sun_path holds 108 on Linux, 104 elsewhere


class Connection(NamedTuple):
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


class EngineSocket:
    """Listens on a socket of mode 0600 and takes one connection of the process that is expected."""

    def __init__(self, run_dir: Path, index: int) -> None:
        self.path, self._folder = _socket_path(
            run_dir, "engine.sock" if index == 0 else f"engine-{index}.sock"
        )
        self._server: asyncio.Server | None = None
        self._expected_pid: int | None = None
        self._connected: asyncio.Future[Connection] | None = None

    async def listen(self) -> None:
        self.path.unlink(missing_ok=True)
        previous = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(self._accept, path=str(self.path))
        finally:
            os.umask(previous)

    def expect(self, pid: int) -> "asyncio.Future[Connection]":
        """Returns what is resolved when the process of this id connects."""
        self._expected_pid = pid
        self._connected = asyncio.get_running_loop().create_future()
        return self._connected

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        self.path.unlink(missing_ok=True)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pid, uid = _peer(writer.get_extra_info("socket"))
        waiting = self._connected is not None and not self._connected.done()
        if not waiting or uid != os.getuid() or pid not in (None, self._expected_pid):
            log.warning("a connection of process %s to the engine's socket was refused", pid)
            writer.close()
            return
        assert self._connected is not None
        self._connected.set_result(Connection(reader, writer))


def _peer(sock: Any) -> tuple[int | None, int]:
    """Returns (process id, user id) of the other end; the process id only where the system tells it."""
    if not hasattr(socket, "SO_PEERCRED"):
        return None, os.getuid()  # the socket's mode admits this user only
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", credentials)
    return pid, uid


def _socket_path(run_dir: Path, name: str) -> tuple[Path, Path | None]:
    """Returns the socket's path and, where the run directory's is too long for one, the folder made for it."""
    path = run_dir / name
    if len(os.fsencode(path)) <= MAX_PATH_BYTES:
        return path, None
    folder = Path(tempfile.mkdtemp(prefix="tuner-"))
    return folder / name, folder
