"""The runtime's process: how it is started, whether it lives, why it ended.

It is started in a session of its own and is never the daemon's child in fate: no signal of the daemon's
terminal reaches it, and the death of the daemon is nothing to it.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

import runtime
from tuner.errors import ModelMissing, PortInUse, RuntimeStartFailed, SettingsError, TunerError
from tuner.settings import Settings

MODULE = "runtime.server"
STARTED_FILE = "started.json"
MAX_LOG_BYTES = 20_000_000
MAX_TAIL_BYTES = 65_536
# Spinning OpenMP threads would take the cores from the front end and from the daemon.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "GOMP_SPINCOUNT": "0"}


@dataclass
class RuntimeProcess:
    """A runtime that we started (`child`) or found. psutil guards against a pid that was given to another."""

    process: psutil.Process
    child: "subprocess.Popen[bytes] | None" = None

    @property
    def pid(self) -> int:
        return int(self.process.pid)

    @property
    def is_found(self) -> bool:
        """Another daemon started it."""
        return self.child is None

    def is_alive(self) -> bool:
        if self.child is not None:
            return self.child.poll() is None
        try:
            return bool(self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False

    @property
    def exit_code(self) -> int | None:
        """Negative: the signal that ended it. None while it lives, and of a process that we did not start."""
        return self.child.poll() if self.child is not None else None

    def terminate(self) -> None:
        with suppress(psutil.NoSuchProcess):
            self.process.terminate()

    def kill(self) -> None:
        with suppress(psutil.NoSuchProcess):
            self.process.kill()


def server_command(
    settings: Settings, run_dir: Path, values: Mapping[str, Any], port: int, extra: Sequence[str] = ()
) -> list[str]:
    """The command line of a runtime that starts on the configuration `values`."""
    model, server = settings.model, settings.server
    command = [
        *(sys.executable, "-m", MODULE, "--model", str(model.location), "--run-dir", str(run_dir)),
        *("--host", server.host, "--port", str(port), "--control-port", str(server.control_port)),
        *("--device", model.device, "--dtype", model.dtype, "--log-level", settings.log_level),
        *("--drain-s", str(server.drain_s), "--request-timeout-s", str(server.request_timeout_s)),
        *("--config", json.dumps(dict(values))),
    ]
    for flag, value in (
        ("--served-model-name", model.name),
        ("--max-model-len", model.max_model_len),
        ("--kv-tokens", model.kv_tokens),
        ("--api-key-file", server.api_key_file and server.api_key_file.expanduser().resolve()),
    ):
        if value is not None:
            command += [flag, str(value)]
    if server.insecure:
        command.append("--insecure")
    return [*command, *extra]


def start_process(command: Sequence[str], run_dir: Path, log_path: Path) -> RuntimeProcess:
    """Starts the runtime with its output appended to the log, and notes its pid for a daemon to come."""
    run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    _rotate(log_path)
    log = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=_environment(),
        )
    finally:
        os.close(log)
    started = RuntimeProcess(psutil.Process(child.pid), child)
    note = {"pid": child.pid, "created_at": started.process.create_time()}
    beside = run_dir / f"{STARTED_FILE}.tmp"
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(note, file)
    beside.replace(run_dir / STARTED_FILE)
    return started


def process_noted(run_dir: Path) -> RuntimeProcess | None:
    """The runtime that a daemon started last, if it lives: it may not have announced itself yet."""
    try:
        note = json.loads((run_dir / STARTED_FILE).read_text())
        process = psutil.Process(int(note["pid"]))
        if process.create_time() != note["created_at"]:
            return None
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return None
    found = RuntimeProcess(process)
    return found if found.is_alive() else None


def process_of_runtime(pid: int) -> RuntimeProcess | None:
    """The living process of that pid, if it is a runtime and not one that was given its number."""
    try:
        process = psutil.Process(pid)
        if MODULE not in process.cmdline():
            return None
    except psutil.Error:
        return None
    found = RuntimeProcess(process)
    return found if found.is_alive() else None


def _environment() -> dict[str, str]:
    environment = {**os.environ, **ENVIRONMENT}
    root = Path(runtime.__file__).parents[1]
    if "site-packages" not in root.parts:  # a checkout that is not installed, with another working folder
        known = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{root}{os.pathsep}{known}" if known else str(root)
    return environment


# --- why it ended ---------------------------------------------------------------------------------


def _rotate(log_path: Path) -> None:
    with suppress(FileNotFoundError):
        if log_path.stat().st_size > MAX_LOG_BYTES:
            log_path.replace(log_path.with_name(f"{log_path.name}.1"))


def log_size(log_path: Path) -> int:
    """Bytes; 0 where there is no log, or the next start will put it aside."""
    try:
        size = log_path.stat().st_size
    except FileNotFoundError:
        return 0
    return size if size <= MAX_LOG_BYTES else 0


def last_complaint(log_path: Path, since: int) -> str:
    """The last line of the log, from byte `since` on, that tells of an error; else its last line."""
    try:
        with log_path.open("rb") as log:
            log.seek(max(since, log_path.stat().st_size - MAX_TAIL_BYTES))
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines()]
    except OSError as error:
        return f"its log cannot be read ({error.strerror})"
    lines = [line for line in lines if line]
    marks = (" ERROR ", " CRITICAL ", "error: ", "Error: ", "Exception: ")
    told = next(
        (line for line in reversed(lines) if any(mark in line for mark in marks)), lines[-1] if lines else ""
    )
    return told.removeprefix("error: ")[:1000] or "it said nothing"


def start_error(exit_code: int | None, log_path: Path, since: int) -> TunerError:
    """The error for a runtime that ended before it was ready, by its exit code."""
    told = f"{last_complaint(log_path, since)} (log: {log_path})"
    if exit_code == SettingsError.exit_code:
        return SettingsError(f"The runtime refuses its settings: {told}")
    if exit_code == ModelMissing.exit_code:
        return ModelMissing(told)
    if exit_code == PortInUse.exit_code:
        return PortInUse(told)
    return RuntimeStartFailed(f"The runtime ended before it was ready, {how_ended(exit_code)}: {told}")


def how_ended(exit_code: int | None) -> str:
    if exit_code is None:
        return "for an unknown reason"
    if exit_code == -signal.SIGKILL:
        return "killed by SIGKILL (as the kernel does when memory runs out)"
    if exit_code < 0:
        return f"ended by signal {-exit_code}"
    return f"exit code {exit_code}"
