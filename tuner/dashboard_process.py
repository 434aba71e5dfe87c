"""The dashboard as a process of its own: started beside the daemon or by `tuner dashboard`, and never part of either.

Neither brings the other down: a dashboard that fails leaves the tuner alone, and one whose daemon was killed goes
on showing what the store says. `dashboard.json` in the data folder tells the next daemon that one runs already.
"""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from tuner.api import bound_socket, write_private
from tuner.errors import PortInUse, Unavailable

ADDRESS_FILE, LOG_FILE = "dashboard.json", "dashboard.log"
FOLDER_VARIABLE = "TUNER_DATA_DIR"  # as the setting `data_dir` is called in the environment
ROLE_VARIABLE = "TUNER_DASHBOARD_ROLE"
STOP_S = 5.0


def app_path() -> Path:
    """Where the dashboard's script lies. It is found and not imported: Streamlit stays out of this process."""
    found = importlib.util.find_spec("dashboard")
    if found is None or found.origin is None:
        raise Unavailable("The package `dashboard` is not installed. Install the tuner as a whole.")
    return Path(found.origin).with_name("app.py")


def command(port: int) -> list[str]:
    words = [sys.executable, "-m", "streamlit", "run", str(app_path()), "--server.port", str(port)]
    # Streamlit takes an installation outside of site-packages for its own source tree, and then refuses the port.
    return [*words, "--global.developmentMode", "false"]


def environment(data_dir: Path, as_viewer: bool = False) -> dict[str, str]:
    """What the script is told: the folder to read, whose key it may use, and where our packages lie."""
    found_in = (str(app_path().parents[1]), os.environ.get("PYTHONPATH", ""))
    told = {
        FOLDER_VARIABLE: str(data_dir.resolve()),
        ROLE_VARIABLE: "viewer" if as_viewer else "operator",
        "PYTHONPATH": os.pathsep.join(part for part in found_in if part),
        "PYTHONSAFEPATH": "1",  # a file in the working directory must not stand in for a module
    }
    return {**os.environ, **told}


@dataclass
class DashboardProcess:
    """A running dashboard: one that was started here, or one that an earlier daemon left behind."""

    pid: int
    url: str
    child: "subprocess.Popen[bytes] | None" = None

    @property
    def is_running(self) -> bool:
        return self.child.poll() is None if self.child is not None else is_dashboard(self.pid)

    def stop(self, data_dir: Path) -> None:
        (data_dir / ADDRESS_FILE).unlink(missing_ok=True)
        if not self.is_running:
            return
        process = self.child or psutil.Process(self.pid)  # a child is waited for by its own handle
        process.terminate()
        try:
            process.wait(STOP_S)
        except (psutil.TimeoutExpired, subprocess.TimeoutExpired):
            process.kill()
            process.wait(STOP_S)


def start_or_adopt(data_dir: Path, port: int) -> DashboardProcess:
    """The dashboard of this folder that runs already, else a new one with its output in dashboard.log.

    Raises:
        PortInUse: something else listens there.
        Unavailable: the package is not installed.
    """
    running = left_behind(data_dir)
    if running is not None:
        return running
    port = free_port(port)
    with open(data_dir / LOG_FILE, "ab") as log:
        child = subprocess.Popen(
            command(port),
            env=environment(data_dir),
            cwd=app_path().parent,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # a Ctrl-C in the terminal is for the daemon, which then stops this one
        )
    url = f"http://127.0.0.1:{port}"
    write_private(data_dir / ADDRESS_FILE, json.dumps({"url": url, "pid": child.pid}))
    return DashboardProcess(child.pid, url, child)


def left_behind(data_dir: Path) -> DashboardProcess | None:
    try:
        told = json.loads((data_dir / ADDRESS_FILE).read_text())
        found = DashboardProcess(int(told["pid"]), str(told["url"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if found.is_running else None


def is_dashboard(pid: int) -> bool:
    """True where this process runs our script: a pid may long belong to somebody else."""
    try:
        return str(app_path()) in psutil.Process(pid).cmdline()
    except (psutil.Error, Unavailable):
        return False


def free_port(port: int) -> int:
    """`port`, or any free one for 0. Raises PortInUse."""
    try:
        with bound_socket(port) as probe:
            return int(probe.getsockname()[1])
    except PortInUse as error:
        raise PortInUse(
            f"Port {port} of the dashboard is in use. Choose another with `--port` or `dashboard.port`."
        ) from error


def run_here(data_dir: Path, port: int, as_viewer: bool) -> int:
    """Runs the dashboard in this terminal until Ctrl-C; returns its exit code."""
    port = free_port(port)
    url = f"http://127.0.0.1:{port}"
    print(
        f"Dashboard of {data_dir} at {url} ({'viewer' if as_viewer else 'operator'}); Ctrl-C ends it.",
        flush=True,
    )
    child = subprocess.Popen(command(port), env=environment(data_dir, as_viewer), cwd=app_path().parent)
    try:
        return child.wait()
    except KeyboardInterrupt:
        child.terminate()
        child.wait(STOP_S)
        return 0
