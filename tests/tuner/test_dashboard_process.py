import json
import os
import socket
import subprocess
import sys

import pytest

from tuner import dashboard_process
from tuner.dashboard_process import (
    DashboardProcess,
    app_path,
    command,
    environment,
    free_port,
    left_behind,
    start_or_adopt,
)
from tuner.errors import PortInUse


@pytest.fixture
def app(tmp_path, monkeypatch):
    """A script in the place of the dashboard's, and Python in the place of Streamlit: a process that only waits."""
    script = tmp_path / "app.py"
    script.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(dashboard_process, "app_path", lambda: script)
    monkeypatch.setattr(dashboard_process, "command", lambda port: [sys.executable, str(script), str(port)])
    return script


def test_command_names_the_script_and_the_port_and_no_key(tmp_path):
    (tmp_path / "daemon.key").write_text("secret")
    told = environment(tmp_path, as_viewer=True)
    assert app_path().name == "app.py" and str(app_path()) in command(8501) and "8501" in command(8501)
    assert told["TUNER_DATA_DIR"] == str(tmp_path) and told["TUNER_DASHBOARD_ROLE"] == "viewer"
    assert "secret" not in " ".join([*command(8501), *told.values()])


def test_one_that_runs_already_is_adopted_and_stopped_by_whoever_adopted_it(app, tmp_path):
    first = start_or_adopt(tmp_path, 0)
    again = start_or_adopt(tmp_path, 0)
    assert again.pid == first.pid and again.child is None and again.is_running
    again.stop(tmp_path)
    assert first.child is not None
    first.child.wait(10)
    assert not first.is_running
    assert left_behind(tmp_path) is None


def test_dashboard_is_no_member_of_the_daemons_process_group(app, tmp_path):
    started = start_or_adopt(tmp_path, 0)
    assert os.getpgid(started.pid) != os.getpgid(0)
    started.stop(tmp_path)


def test_pid_that_belongs_to_somebody_else_by_now_is_not_adopted_and_not_killed(app, tmp_path):
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (tmp_path / "dashboard.json").write_text(json.dumps({"url": "http://127.0.0.1:1", "pid": stranger.pid}))
    assert left_behind(tmp_path) is None
    DashboardProcess(stranger.pid, "http://127.0.0.1:1").stop(tmp_path)
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"pid": "x", "url": 1}'])
def test_unreadable_address_file_means_that_none_runs(tmp_path, text):
    (tmp_path / "dashboard.json").write_text(text)
    assert left_behind(tmp_path) is None


def test_taken_port_is_named_with_what_to_do():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(PortInUse, match=r"dashboard\.port"):
            free_port(taken.getsockname()[1])
