"""The supervisor: finds or starts the runtime, starts it again with patience, and never takes it along."""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from runtime.client import read_runtime_file
from runtime.clock import Clock
from runtime.errors import RuntimeUnreachable
from runtime.knobs import EngineConfig
from store.last_good import LastGood, write_last_good
from tests.servers import ROOT, wait_until
from tuner import runtime_process
from tuner.errors import (
    Busy,
    ModelMissing,
    OtherRuntime,
    PortInUse,
    RuntimeGaveUp,
    RuntimeStartFailed,
    SettingsError,
)
from tuner.settings import Settings, load_settings
from tuner.supervisor import Phase, RuntimeSupervisor

FAKE_ENGINE = ("--engine-module", "tests.fakes")


def settings_of(tmp_path: Path, **flags: Any) -> Settings:
    chosen = {"data_dir": str(tmp_path / "data"), "server.port": 0, "server.drain_s": 1, **flags}
    return load_settings(flags=chosen, environ={})


# --- with a runtime of paper ----------------------------------------------------------------------


class FakeProcess:
    """A process that lives until it is told to end; `stubborn` outlives SIGTERM."""

    def __init__(self, pid: int, exit_code: int | None = None, stubborn: bool = False) -> None:
        self.pid, self.exit_code, self.stubborn = pid, exit_code, stubborn
        self.is_found = False
        self.ended_by: list[str] = []

    def is_alive(self) -> bool:
        return self.exit_code is None

    def terminate(self) -> None:
        self.ended_by.append("terminate")
        if not self.stubborn:
            self.exit_code = 0

    def kill(self) -> None:
        self.ended_by.append("kill")
        self.exit_code = -9


class Paper:
    """Time, processes and a control address without any of them being real."""

    def __init__(self, tmp_path: Path, **flags: Any) -> None:
        self.now_s = 1000.0
        self.settings = settings_of(tmp_path, **flags)
        self.settings.data_dir.mkdir(parents=True)
        self.commands: list[list[str]] = []
        self.processes: list[FakeProcess] = []
        self.ends_with: tuple[int, str] | None = (
            None  # exit code and last words of those launched from now on
        )
        self.engine = "ready"
        self.model = str(self.settings.model.location)
        self.heeds_shutdown = True
        self.drains: list[float] = []
        self.supervisor = RuntimeSupervisor(
            self.settings,
            clock=lambda: self.now_s,
            sleep=self.sleep,
            launch=self.launch,
            connect=lambda run_dir: self,
        )

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def launch(self, command: Sequence[str], run_dir: Path, log_path: Path) -> Any:
        self.commands.append(list(command))
        process = FakeProcess(pid=5000 + len(self.processes))
        self.processes.append(process)
        run_dir.mkdir(exist_ok=True)
        if self.ends_with is not None:
            process.exit_code, words = self.ends_with
            with log_path.open("a") as log:
                log.write(words)
            return process
        told = {
            "pid": process.pid,
            "boot_id": "b",
            "api_url": "http://127.0.0.1:8123",
            "control_url": "",
            "started_at": 0,
        }
        (run_dir / "runtime.json").write_text(json.dumps(told))
        return process

    def start(self, values: dict[str, Any] | None = None) -> FakeProcess:
        self.supervisor.attach_or_start(values or {})
        return self.processes[-1]

    # what is asked of a connection

    def identity(self) -> dict[str, Any]:
        return {"pid": self.processes[-1].pid, "engine_pid": os.getpid(), "model": {"path": self.model}}

    def state(self) -> dict[str, Any]:
        return {"engine": self.engine}

    def shutdown(self, drain_s: float) -> dict[str, Any]:
        self.drains.append(drain_s)
        if self.heeds_shutdown:
            self.processes[-1].exit_code = 0
        return {}

    def close(self) -> None:
        pass


def config_of(command: Sequence[str]) -> dict[str, Any]:
    return dict(json.loads(command[command.index("--config") + 1]))


def test_runtime_starts_on_the_champion_and_the_settings(tmp_path: Path) -> None:
    paper = Paper(tmp_path, **{"model.kv_tokens": 4096, "model.name": "mine", "server.port": 8123})
    paper.start({"max_num_seqs": 2, "batch_wait_ms": 50.0})
    assert paper.supervisor.phase is Phase.SERVING
    command = paper.commands[0]
    assert config_of(command) == {"max_num_seqs": 2, "batch_wait_ms": 50.0}
    for flag, value in (
        ("--model", str(ROOT / "runtime" / "demo_model")),
        ("--port", "8123"),
        ("--kv-tokens", "4096"),
        ("--served-model-name", "mine"),
        ("--drain-s", "1.0"),
        ("--request-timeout-s", "600.0"),
        ("--run-dir", str(tmp_path / "data" / "run")),
    ):
        assert command[command.index(flag) + 1] == value
    assert "--max-model-len" not in command
    assert paper.supervisor.pids() == {"daemon": os.getpid(), "front_end": 5000, "engine": os.getpid()}


def test_dead_runtime_starts_again_after_a_growing_wait_on_the_last_confirmed_configuration(
    tmp_path: Path,
) -> None:
    paper = Paper(tmp_path)
    process = paper.start({"max_num_seqs": 2})
    confirmed = EngineConfig.of({"max_num_seqs": 8})
    write_last_good(paper.settings.data_dir, LastGood(confirmed.values(), confirmed.config_id, "s", 3, 0.0))
    waits = []
    for num_starts in (2, 3, 4):
        process.exit_code = -11
        assert paper.supervisor.check() is Phase.WAITING
        assert "signal 11" in str(paper.supervisor.error)
        since_s = paper.now_s
        while paper.supervisor.check() is Phase.WAITING:
            paper.now_s += 0.5
        waits.append(paper.now_s - since_s)
        assert len(paper.processes) == num_starts
        process = paper.processes[-1]
        assert paper.supervisor.check() is Phase.SERVING
    assert waits == [1.0, 2.0, 4.0]
    assert config_of(paper.commands[-1]) == confirmed.values()
    assert paper.commands[-1][paper.commands[-1].index("--port") + 1] == "8123"  # where clients know it
    assert paper.supervisor.num_restarts == 3


def test_five_deaths_in_ten_minutes_lead_to_safe_mode_and_a_sixth_is_the_last(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paper = Paper(tmp_path)
    paper.start({"max_num_seqs": 2}).exit_code = -9
    paper.ends_with = (70, "ValueError: no\n")
    phases = []
    for _ in range(200):
        phases.append(paper.supervisor.check())
        paper.now_s += 1.0
    assert phases[-1] is Phase.GAVE_UP
    assert [config_of(command) for command in paper.commands] == [{"max_num_seqs": 2}] * 5 + [{}]
    assert isinstance(paper.supervisor.error, RuntimeGaveUp)
    assert str(paper.supervisor.error).startswith(
        "The runtime died 6 times in 10 minutes; it is not started any more."
    )
    assert "ValueError: no" in str(paper.supervisor.error)
    assert sum("not started any more" in message for message in caplog.messages) == 1
    assert "gave up" in paper.supervisor.trouble and "ValueError: no" in paper.supervisor.trouble


def test_safe_mode_serves_on_default_knobs_and_ends_after_ten_quiet_minutes(tmp_path: Path) -> None:
    paper = Paper(tmp_path)
    paper.start({"max_num_seqs": 2})
    assert paper.supervisor.trouble is None
    for _ in range(5):
        paper.processes[-1].exit_code = -9
        while paper.supervisor.check() is not Phase.SERVING:
            paper.now_s += 1.0
    assert paper.supervisor.is_safe_mode and config_of(paper.commands[-1]) == {}
    assert "Safe mode" in paper.supervisor.trouble
    paper.now_s += 601.0
    paper.supervisor.check()
    assert not paper.supervisor.is_safe_mode and paper.supervisor.trouble is None


def test_runtime_that_starts_again_keeps_the_clock_of_the_first(tmp_path: Path) -> None:
    paper = Paper(tmp_path)
    paper.start().exit_code = -9
    assert "--clock-anchor" not in paper.commands[0]
    paper.supervisor.clock = Clock(1_700_000_000.25, 12.5)
    while paper.supervisor.check() is not Phase.SERVING:
        paper.now_s += 1.0
    told = paper.commands[-1][paper.commands[-1].index("--clock-anchor") + 1]
    assert Clock.of_text(told) == paper.supervisor.clock


def test_runtime_that_gave_its_engine_up_is_started_again(tmp_path: Path) -> None:
    paper = Paper(tmp_path)
    process = paper.start()
    assert paper.supervisor.check("restarting") is Phase.SERVING
    assert paper.supervisor.check("failed") is Phase.WAITING
    assert process.ended_by == ["kill"] and "engine" in paper.supervisor.trouble
    paper.now_s += 2.0
    paper.supervisor.check()
    assert paper.supervisor.check() is Phase.SERVING and len(paper.processes) == 2


def test_person_who_insists_is_told_what_is_left_running(tmp_path: Path) -> None:
    paper = Paper(tmp_path)
    assert paper.supervisor.left_running() == "No runtime is left running."
    process = paper.start()
    words = paper.supervisor.left_running()
    assert f"kill {process.pid}" in words and "http://127.0.0.1:8123" in words and "attaches" in words


def test_deaths_far_apart_are_forgiven(tmp_path: Path) -> None:
    paper = Paper(tmp_path)
    process = paper.start()
    for _ in range(12):
        process.exit_code = -9
        assert paper.supervisor.check() is Phase.WAITING
        paper.now_s += 300.0
        paper.supervisor.check()
        assert paper.supervisor.check() is Phase.SERVING
        process = paper.processes[-1]


def test_restart_that_cannot_help_is_not_tried_again(tmp_path: Path) -> None:
    paper = Paper(tmp_path)
    paper.start().exit_code = -9
    paper.supervisor.check()
    paper.ends_with = (66, "error: /models/x/model.safetensors is damaged.\n")
    paper.now_s += 1.0
    paper.supervisor.check()
    assert paper.supervisor.check() is Phase.GAVE_UP
    assert "model.safetensors is damaged" in str(paper.supervisor.error)


@pytest.mark.parametrize(
    ("exit_code", "words", "error", "said"),
    [
        (
            66,
            "INFO x\nerror: The model must be a folder.\n",
            ModelMissing,
            "The model must be a folder. (log: ",
        ),
        (75, "error: Port 8000 is taken.\n", PortInUse, "Port 8000 is taken."),
        (
            2,
            "usage: x\nserver: error: argument --dtype: bad\n",
            SettingsError,
            "refuses its settings: server: error: arg",
        ),
        (
            70,
            "Traceback\nZeroDivisionError: by zero\n",
            RuntimeStartFailed,
            "exit code 70: ZeroDivisionError: by zero",
        ),
        (70, "1 ERROR engine: it broke\n2 INFO stopped\n", RuntimeStartFailed, "engine: it broke"),
        (
            -9,
            "",
            RuntimeStartFailed,
            "killed by SIGKILL (as the kernel does when memory runs out): it said nothing",
        ),
    ],
)
def test_failed_start_is_told_by_its_exit_code_and_last_words(
    tmp_path: Path, exit_code: int, words: str, error: type[Exception], said: str
) -> None:
    paper = Paper(tmp_path)
    paper.supervisor.log_path.write_text("error: of an earlier life\n")
    paper.ends_with = (exit_code, words)
    with pytest.raises(error) as caught:
        paper.start()
    assert said in str(caught.value)
    assert str(paper.supervisor.log_path) in str(caught.value)
    assert paper.supervisor.phase is Phase.STOPPED


def test_engine_that_fails_for_good_or_never_comes_up_ends_the_start(tmp_path: Path) -> None:
    paper = Paper(tmp_path)
    paper.engine = "failed"
    with pytest.raises(RuntimeStartFailed, match="its engine failed"):
        paper.start()
    assert paper.processes[0].ended_by == ["kill"]
    paper.engine = "starting"
    with pytest.raises(RuntimeStartFailed, match="was not ready within 1800 s"):
        paper.start()


def test_start_can_be_cancelled(tmp_path: Path) -> None:
    paper = Paper(tmp_path)
    paper.engine = "starting"
    paper.supervisor.attach_or_start({}, is_cancelled=lambda: paper.now_s > 1010.0)
    assert paper.supervisor.phase is Phase.STARTING
    paper.supervisor.stop()
    assert not paper.processes[0].is_alive()


def test_stop_drains_then_insists(tmp_path: Path) -> None:
    paper = Paper(tmp_path)
    process = paper.start()
    paper.supervisor.stop()
    assert paper.drains == [1.0] and process.ended_by == []
    paper.heeds_shutdown = False
    process = paper.start()
    process.stubborn = True
    paper.supervisor.stop(drain_s=5.0)
    assert process.ended_by == ["terminate", "kill"]
    assert paper.supervisor.check() is Phase.STOPPED  # and nobody starts it again
    assert len(paper.processes) == 2


def test_damaged_last_confirmed_configuration_falls_back_to_the_first(tmp_path: Path) -> None:
    paper = Paper(tmp_path)
    process = paper.start({"max_num_seqs": 2})
    for text in (
        "{",
        json.dumps(
            {"values": {"no_such_knob": 1}, "config_id": "c", "snapshot_id": "s", "version": 1, "at": 0}
        ),
    ):
        (paper.settings.data_dir / "last_good.json").write_text(text)
        process.exit_code = 1
        paper.supervisor.check()
        paper.now_s += 60.0
        paper.supervisor.check()
        assert config_of(paper.commands[-1]) == {"max_num_seqs": 2}
        assert paper.supervisor.check() is Phase.SERVING
        process = paper.processes[-1]


# --- with real processes --------------------------------------------------------------------------


@pytest.fixture
def supervised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RuntimeSupervisor]]:
    """Makes supervisors of one data folder over the fake engine; ends whatever runtime is left."""
    monkeypatch.chdir(ROOT)
    made: list[RuntimeSupervisor] = []

    def make(**flags: Any) -> RuntimeSupervisor:
        made.append(RuntimeSupervisor(settings_of(tmp_path, **flags), extra=FAKE_ENGINE))
        return made[-1]

    yield make
    left = runtime_process.process_noted(tmp_path / "data" / "run")
    if left is not None:  # killed, not drained: a server that has just started takes seconds to end
        left.kill()
    for supervisor in made:
        supervisor.stop(drain_s=0.0)
        supervisor.close()


def test_runtime_outlives_its_daemon_and_the_next_one_attaches(
    tmp_path: Path, supervised: Callable[..., RuntimeSupervisor]
) -> None:
    daemon = f"""
import time
from pathlib import Path
from tuner.settings import load_settings
from tuner.supervisor import RuntimeSupervisor
settings = load_settings(flags={{"data_dir": {str(tmp_path / "data")!r}, "server.port": 0}}, environ={{}})
RuntimeSupervisor(settings, extra={FAKE_ENGINE!r}).attach_or_start({{"max_num_seqs": 3}})
print("serving", flush=True)
time.sleep(600)
"""
    with subprocess.Popen(
        [sys.executable, "-c", daemon], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as first:
        assert first.stdout is not None and first.stdout.readline() == "serving\n"
        first.kill()
    file = read_runtime_file(tmp_path / "data" / "run")
    assert file is not None and psutil.pid_exists(file.pid)
    assert os.getsid(file.pid) == file.pid  # no signal of the daemon's terminal reaches it

    supervisor = supervised()
    supervisor.attach_or_start({"max_num_seqs": 9})
    control = supervisor.client()
    assert control.state()["champion"]["max_num_seqs"] == 3
    assert control.identity()["boot_id"] == file.boot_id
    assert supervisor.pids()["front_end"] == file.pid

    os.kill(file.pid, signal.SIGKILL)
    wait_until(lambda: supervisor.check() is Phase.WAITING, "the death is noticed")
    with pytest.raises(RuntimeUnreachable):
        control.state()
    wait_until(lambda: supervisor.check() is Phase.SERVING, "the runtime serves again")
    assert control.identity()["boot_id"] != file.boot_id  # the same connection, to the new one
    assert control.identity()["api_url"] == file.api_url

    with pytest.raises(OtherRuntime, match="demo_model, but the settings ask for /nowhere"):
        supervised(**{"model.path": "/nowhere"}).attach_or_start({})

    pid = supervisor.pids()["front_end"]
    supervisor.stop()
    assert not psutil.pid_exists(pid)
    assert read_runtime_file(tmp_path / "data" / "run") is None


def test_missing_model_is_told_by_the_runtime_itself(
    supervised: Callable[..., RuntimeSupervisor], tmp_path: Path
) -> None:
    with pytest.raises(ModelMissing, match=f"must be a folder on this machine, but {tmp_path}/none is none"):
        supervised(**{"model.path": str(tmp_path / "none")}).attach_or_start({})
    log = tmp_path / "data" / "runtime.log"
    assert log.stat().st_mode & 0o777 == 0o600


def test_runtime_that_is_starting_is_waited_for_and_not_started_twice(
    supervised: Callable[..., RuntimeSupervisor], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first, second = supervised(), supervised()
    first.attach_or_start({}, is_cancelled=lambda: True)
    second.attach_or_start({})
    assert second.phase is Phase.SERVING
    assert sum(message.startswith("The runtime starts") for message in caplog.messages) == 1
    assert second.client().identity()["pid"] == second.pids()["front_end"]


def test_runtime_that_lives_and_does_not_answer_is_left_to_a_person(
    supervised: Callable[..., RuntimeSupervisor], tmp_path: Path
) -> None:
    run_dir = tmp_path / "data" / "run"
    run_dir.mkdir(parents=True)
    (run_dir / "control.key").write_text("0" * 64)
    with subprocess.Popen(
        [sys.executable, "-c", "input()", "runtime.server"], stdin=subprocess.PIPE
    ) as other:
        told = {
            "pid": other.pid,
            "boot_id": "b",
            "api_url": "",
            "control_url": "http://127.0.0.1:9",
            "started_at": 0,
        }
        (run_dir / "runtime.json").write_text(json.dumps(told))
        with pytest.raises(Busy, match=f"lives and does not answer: .* End it with `kill {other.pid}`"):
            supervised().attach_or_start({})
        other.communicate(b"\n")


def test_announcement_of_a_runtime_that_is_gone_is_stale(tmp_path: Path) -> None:
    paper = Paper(tmp_path)
    paper.start()
    # This very process has the pid that the file names, and is no runtime.
    file = tmp_path / "data" / "run" / "runtime.json"
    file.write_text(file.read_text().replace("5000", str(os.getpid())))
    again = RuntimeSupervisor(paper.settings, launch=paper.launch, connect=lambda run_dir: paper)
    assert not again.attach()
