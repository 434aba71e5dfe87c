"""The run directory of one runtime: who runs here, where it listens, and the key to its control routes.

runtime.json   pid, boot_id, addresses; there while the server listens
control.key    64 hex digits, made once
server.lock    held by the one server that may use this directory
records/       what the server recorded and nobody has acknowledged yet
engine.sock    the link to the engine (engine-1.sock and so on where there are several)
"""

import fcntl
import json
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

from runtime.errors import AddressInUse, Unauthorized

KEY_CHARS = 64


@dataclass(frozen=True)
class RuntimeFile:
    """What runtime.json says. It outlives a server that was killed: ask `process_alive`, then the address."""

    pid: int
    boot_id: str
    api_url: str
    control_url: str
    started_at: float

    def process_alive(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True


def read_runtime_file(run_dir: Path) -> RuntimeFile | None:
    """Returns None where there is none, or it is not (yet) whole."""
    try:
        value = json.loads((Path(run_dir) / "runtime.json").read_text())
        return RuntimeFile(
            int(value["pid"]), str(value["boot_id"]), str(value["api_url"]), str(value["control_url"]),
            float(value["started_at"]),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_control_key(run_dir: Path) -> str:
    """Raises Unauthorized where there is no key that this user may read."""
    try:
        key = (Path(run_dir) / "control.key").read_text().strip()
    except OSError as error:
        raise Unauthorized(f"There is no control key to read in {run_dir}: {error.strerror}.") from None
    if len(key) < KEY_CHARS:
        rule = f"must have {KEY_CHARS} characters, but has {len(key)}"
        raise Unauthorized(f"The control key in {run_dir} {rule}. Delete it.")
    return key


class RunDir:
    """The server's own hold on the directory; `release` gives it back."""

    def __init__(self, path: Path) -> None:
        """Raises AddressInUse while another server holds the directory."""
        self.path = path
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(path / "server.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise AddressInUse(
                f"Another server uses the run directory {path}. Stop it or give another one."
            ) from None

    def control_key(self) -> str:
        """Returns the key, made at the first call ever."""
        path = self.path / "control.key"
        if not path.exists():
            self._write(path, secrets.token_hex(KEY_CHARS // 2))
        return read_control_key(self.path)

    def announce(self, runtime: RuntimeFile) -> None:
        self._write(self.path / "runtime.json", json.dumps(asdict(runtime)))

    def release(self) -> None:
        (self.path / "runtime.json").unlink(missing_ok=True)
        os.close(self._lock)

    def _write(self, path: Path, text: str) -> None:
        """Whole or not at all, readable by this user only."""
        temporary = path.with_name(path.name + ".tmp")
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
