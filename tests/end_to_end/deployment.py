"""`tuner run` with the demo model and settings under which something is always under way, as real processes.

Only a gain of 60 % is worth a test: so little traffic would find no smaller one, and no study would be opened.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
from sqlalchemy import select

from runtime.client import RuntimeClient, RuntimeFile, read_runtime_file
from runtime.errors import RuntimeFault
from store.database import StoreReader
from store.tables import Champion
from tests.servers import ROOT
from tuner.settings import load_settings

SETTINGS = """
model: {path: demo}
mode: auto
data_dir: DATA_DIR
server: {port: PORT, drain_s: 10}
knobs: {start: {max_num_seqs: 2, batch_wait_ms: 20, max_batched_tokens: 64}}
learn: {champion_s: 3}
search: {max_probes: 40, sampler: gp, rest_s: 0}
experiment: {slice_s: SLICE_S, burn_in_s: 0.5, settle_s: 1, min_requests: 1, max_pairs: 40, look_every: 5}
objective: {min_effect: 0.6}
holdback: {share: 0.1, duration_s: 60}
"""
START_LIMIT_S = 240.0


class Deployment:
    """One data folder with its daemon, runtime and dashboard. `settings` is appended to SETTINGS."""

    def __init__(self, folder: Path, settings: str = "", slice_s: float = 3.0) -> None:
        self.folder, self.data_dir = folder, folder / "data"
        self.log_path, self.config = folder / "daemon.out", folder / "settings.yaml"
        self.run_dir = self.data_dir / "run"
        self.daemon: subprocess.Popen[bytes] | None = None
        self.environment: dict[str, str] = {}  # beside our own
        folder.mkdir(parents=True, exist_ok=True)
        if not self.config.exists():
            text = SETTINGS.replace("DATA_DIR", str(self.data_dir)).replace("PORT", str(free_port()))
            text = text.replace("SLICE_S", str(slice_s))
            self.config.write_text(text + settings)

    # -- life ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts a daemon and returns at once."""
        with open(self.log_path, "ab") as out:
            self.daemon = subprocess.Popen(
                [sys.executable, "-m", "tuner.cli", "run", "-c", str(self.config), "--plain"],
                cwd=ROOT, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True,
                env={**os.environ, **self.environment},
            )  # fmt: skip

    def wait_up(self) -> None:
        self.wait(lambda: self.daemon_answers() and self.serves(), "the daemon ticks and the engine serves")

    def stop(self) -> None:
        """SIGTERM, which drains and ends all that belongs to the daemon."""
        if self.daemon is None:
            return
        self.daemon.send_signal(signal.SIGTERM)
        try:
            self.daemon.wait(90)
        except subprocess.TimeoutExpired:
            self.daemon.kill()
            self.daemon.wait()
        self.daemon = None

    def clear(self) -> None:
        """Whatever a failed test may have left behind, by the pids that this folder names."""
        self.stop()
        for pid in (self.front_end_pid(), self.dashboard_pid()):
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def wait(self, reached: Callable[[], Any], what: str, limit_s: float = START_LIMIT_S) -> Any:
        end_at = time.monotonic() + limit_s
        while time.monotonic() < end_at:
            if found := reached():
                return found
            time.sleep(0.05)
        raise TimeoutError(f"{what}: not within {limit_s:g} s. Log:\n{self.log_tail()}")

    def log_tail(self) -> str:
        paths = (self.log_path, self.data_dir / "daemon.log", self.data_dir / "runtime.log")
        return "\n".join(f"--- {path}\n{path.read_text()[-2500:]}" for path in paths if path.exists())

    # -- processes -----------------------------------------------------------------------------------------

    def daemon_pid(self) -> int | None:
        return self.daemon.pid if self.daemon is not None and self.daemon.poll() is None else None

    def front_end_pid(self) -> int | None:
        file = read_runtime_file(self.run_dir)
        return file.pid if file is not None and is_running(file.pid, "runtime.server") else None

    def engine_pid(self) -> int | None:
        with self.control() as control:
            if control is None:
                return None
            try:
                pid = control.identity()["engine_pid"]
            except RuntimeFault:
                return None
        return pid if is_running(pid, "runtime.engine") else None

    def dashboard_pid(self) -> int | None:
        pid = (read_json(self.data_dir / "dashboard.json") or {}).get("pid")
        return pid if pid is not None and is_running(pid, "streamlit") else None

    def child_pid(self, module: str) -> int | None:
        """A child of the daemon that runs this module, or that was spawned for it."""
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.daemon_pid() or 0).children(recursive=True):
                if module in child.cmdline():
                    return int(child.pid)
        return None

    # -- what it says --------------------------------------------------------------------------------------

    @property
    def file(self) -> RuntimeFile | None:
        return read_runtime_file(self.run_dir)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{load_settings(self.config, environ={}).server.port}"

    @contextlib.contextmanager
    def control(self) -> Iterator[RuntimeClient | None]:
        try:
            client = RuntimeClient.of_run_dir(self.run_dir, limit_s=5.0)
        except RuntimeFault:
            yield None
            return
        with client:
            yield client

    def state(self) -> dict[str, Any] | None:
        with self.control() as control:
            try:
                return control.state() if control is not None else None
            except RuntimeFault:
                return None

    def serves(self) -> bool:
        return answers(f"{self.url}/health")

    def daemon_answers(self) -> bool:
        """A daemon of this life ticks: its API answers, under its own pid."""
        told, pid = read_json(self.data_dir / "daemon.json"), self.daemon_pid()
        if told is None or pid is None or told.get("pid", pid) != pid:
            return False
        try:
            key = (self.data_dir / "viewer.key").read_text().strip()
            url, head = told["url"], {"authorization": f"Bearer {key}"}
            status = httpx.get(f"{url}/status", headers=head, timeout=5.0, trust_env=False).json()
        except (OSError, ValueError, KeyError, httpx.HTTPError):
            return False
        return status.get("pid") == pid and status.get("engine") == "ready"

    def dashboard_answers(self) -> bool:
        told = read_json(self.data_dir / "dashboard.json")
        return (
            told is not None and self.dashboard_pid() is not None and answers(f"{told['url']}/_stcore/health")
        )

    def recorded_champion(self) -> str | None:
        with StoreReader(self.data_dir).journal() as session:
            row = session.scalars(select(Champion).order_by(Champion.champion_id.desc()).limit(1)).first()
            return row.config_id if row is not None else None

    def is_champion_in_force(self) -> bool:
        """What serves outside of slices is what the journal says."""
        state = self.state()
        return state is not None and state["champion_config_id"] == self.recorded_champion()


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=3.0, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


def is_running(pid: int, word: str) -> bool:
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and any(word in part for part in process.cmdline())
    except psutil.Error:
        return False


def read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
