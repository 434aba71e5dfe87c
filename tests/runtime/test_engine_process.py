"""What clients and the daemon see when the engine dies, hangs, or cannot start; and how the server ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from runtime.client import read_runtime_file
from runtime.listener import bind
from runtime.plan import PlannedSlice, SlicePlan
from runtime.run_dir import RunDir
from runtime.server import main
from tests.servers import DEMO_MODEL, GUARD_S, ROOT, LiveServer, command, live_server, wait_until

LONG = {"prompt": "one two three", "max_tokens": 2000, "ignore_eos": True}


def engine_pid(server: LiveServer) -> int:
    with server.control() as control:
        wait_until(lambda: control.identity()["engine_pid"] is not None, "the engine runs")
        return int(control.identity()["engine_pid"])


def records(server: LiveServer, kind: str) -> list[dict[str, Any]]:
    with server.control() as control:
        return [record for record in control.drain(None, 0, 20_000)["records"] if record["kind"] == kind]


def in_background(ask: Any) -> tuple[threading.Thread, list[Any]]:
    """Runs `ask` in a thread; its result or its exception is the list's only entry."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(ask())
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, result


def test_a_killed_engine_ends_what_had_begun_and_serves_the_rest(tmp_path: Path) -> None:
    env = {"FAKE_STEP_S": "0.02", "FAKE_MAX_SEQS": "2"}
    with live_server(tmp_path, env=env) as server, server.openai() as client, server.http() as http:
        with server.control() as control:
            committed = control.reconfigure({"max_num_seqs": 7}, None)
        chunks = client.completions.create(model="demo_model", prompt="a b", max_tokens=2000, stream=True)
        next(iter(chunks))
        begun, begun_result = in_background(lambda: http.post("/v1/completions", json=LONG))
        with server.http() as asking:
            wait_until(
                lambda: asking.get("/load").json() == {"server_load": 2, "num_queued": 0}, "two have begun"
            )
            waiting, waiting_result = in_background(
                lambda: client.completions.create(model="demo_model", prompt="c d", max_tokens=3)
            )
            wait_until(lambda: asking.get("/load").json()["num_queued"] == 1, "one waits")
        before_at = time.time()
        os.kill(engine_pid(server), signal.SIGKILL)

        with pytest.raises(openai.APIError) as error:
            list(chunks)
        assert error.value.code == "engine_restarted"
        begun.join(GUARD_S)
        assert begun_result[0].status_code == 500
        assert begun_result[0].json()["error"]["code"] == "engine_restarted"
        waiting.join(GUARD_S)
        assert waiting_result[0].usage.completion_tokens == 3

        server.wait_ready()
        with server.control() as control:
            state = control.state()
        assert state["num_engine_restarts"] == 1
        assert (state["version"], state["config_id"]) == (committed["version"], committed["config_id"])
        timings = records(server, "request")
        assert sorted(timing["finish_reason"] for timing in timings) == ["error", "error", "length"]
        requeued = next(timing for timing in timings if timing["finish_reason"] == "length")
        assert requeued["arrived_at"] < before_at < requeued["first_token_at"]
        events = [record["event"] for record in records(server, "event")]
        assert events.index("engine_lost") < len(events) - 1 - events[::-1].index("engine_ready")


def test_a_killed_engine_takes_its_plan_with_it_and_says_so(tmp_path: Path) -> None:
    with live_server(tmp_path) as server, server.control() as control:
        state = control.state()
        now = time.time()
        configs = {state["config_id"]: state["config"]}
        slices = (PlannedSlice("s1", "champion", state["config_id"], now, now + 500.0, 1.0),)
        control.plan(SlicePlan("p1", "x1", state["version"], configs, slices, 5.0))
        wait_until(lambda: control.state()["slice_id"] == "s1", "the slice began")
        os.kill(engine_pid(server), signal.SIGKILL)
        wait_until(lambda: control.state()["num_engine_restarts"] == 1, "the engine starts again")
        state = control.state()
        assert (state["plan_id"], state["slice_id"], state["lease_expires_at"]) == (None, None, None)
        told = [(record["event"], record.get("reason")) for record in records(server, "event")]
        assert ("slice_ended", None) in told and ("plan_aborted", "the engine was lost") in told


def test_a_silent_engine_is_restarted(tmp_path: Path) -> None:
    with live_server(tmp_path, "--engine-silence-s", "0.8") as server, server.control() as control:
        os.kill(engine_pid(server), signal.SIGSTOP)
        wait_until(lambda: control.state()["num_engine_restarts"] == 1, "the engine was restarted")
        server.wait_ready()


def test_health_is_503_while_the_engine_starts_and_requests_wait(tmp_path: Path) -> None:
    with live_server(tmp_path, env={"FAKE_READY_S": "2"}, ready=False) as server, server.http() as http:
        assert http.get("/health").status_code == 503
        assert http.get("/ready").status_code == 503
        assert http.post("/v1/completions", json={"prompt": "hi", "max_tokens": 1}).status_code == 200
        assert http.get("/health").status_code == 200


@pytest.mark.parametrize("code", [2, 66])
def test_an_engine_that_can_never_start_ends_the_server_with_its_exit_code(tmp_path: Path, code: int) -> None:
    env = {**os.environ, "FAKE_EXIT_CODE": str(code)}
    done = subprocess.run(command(tmp_path), cwd=ROOT, env=env, capture_output=True, timeout=GUARD_S)
    assert done.returncode == code
    assert not (tmp_path / "runtime.json").exists()


def test_an_engine_that_keeps_failing_is_given_up_after_five_restarts(tmp_path: Path) -> None:
    launcher = (
        "import runtime.engine_process as e, runtime.server as s; e.BACKOFF_S = (0.0,) * 5; exit(s.main())"
    )
    arguments = command(tmp_path)[3:]
    env = {**os.environ, "FAKE_EXIT_CODE": "1"}
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", launcher, *arguments], cwd=ROOT, env=env, stdout=log, stderr=log
        )
    try:
        wait_until(lambda: read_runtime_file(tmp_path) is not None, "the server listens")
        file = read_runtime_file(tmp_path)
        assert file is not None
        server = LiveServer(process, tmp_path, tmp_path / "server.log", file)
        with server.control() as control, server.http() as http:
            wait_until(lambda: control.state()["engine"] == "failed", "the engine is given up")
            assert control.state()["num_engine_restarts"] == 5
            assert http.get("/health").status_code == 503
            answer = http.post("/v1/completions", json={"prompt": "hi"})
            assert answer.status_code == 503 and answer.json()["error"]["code"] == "not_ready"
    finally:
        process.terminate()
        assert process.wait(GUARD_S) == 0


def test_sigterm_refuses_new_requests_and_finishes_those_in_flight(tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    hold.touch()
    with live_server(tmp_path / "run", env={"FAKE_HOLD_FILE": str(hold)}) as server, server.http() as http:
        thread, result = in_background(
            lambda: http.post("/v1/completions", json={"prompt": "hi", "max_tokens": 4})
        )
        with server.http() as other:
            wait_until(lambda: other.get("/load").json()["server_load"] == 1, "the request is live")
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: other.get("/health").status_code == 503, "the server drains")
            answer = other.post("/v1/completions", json={"prompt": "hi"})
            assert answer.status_code == 503 and answer.headers["retry-after"]
        hold.unlink()
        thread.join(GUARD_S)
        assert result[0].status_code == 200 and result[0].json()["usage"]["completion_tokens"] == 4
        assert server.process.wait(GUARD_S) == 0
        assert not (server.run_dir / "runtime.json").exists()
        assert not (server.run_dir / "engine.sock").exists()


def test_a_drain_that_takes_too_long_ends_the_requests_with_an_error(tmp_path: Path) -> None:
    env = {"FAKE_STEP_S": "0.05"}
    with live_server(tmp_path, env=env) as server, server.http() as http, server.control() as control:
        with http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            assert control.shutdown(0.1) == {"draining": True, "drain_s": 0.1}
            events = [line for line in lines if line.startswith("data: {")]
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "not_ready"
        assert server.process.wait(GUARD_S) == 0


def test_a_second_signal_ends_the_server_at_once_and_its_engine_with_it(tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    hold.touch()
    with live_server(tmp_path / "run", env={"FAKE_HOLD_FILE": str(hold)}) as server, server.http() as http:
        engine = psutil.Process(engine_pid(server))
        thread, _ = in_background(lambda: http.post("/v1/completions", json=LONG))
        with server.http() as other:
            wait_until(lambda: other.get("/load").json()["server_load"] == 1, "the request is live")
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: other.get("/health").status_code == 503, "the server drains")
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(GUARD_S) == 128 + signal.SIGINT
        wait_until(lambda: not engine.is_running(), "the engine is gone")
        thread.join(GUARD_S)


def test_an_engine_dies_with_a_front_end_that_was_killed(tmp_path: Path) -> None:
    with live_server(tmp_path) as server:
        engine = psutil.Process(engine_pid(server))
        server.process.kill()
        wait_until(lambda: not engine.is_running(), "the engine is gone")
    with live_server(tmp_path) as again:  # the lock went with the process, the key stayed
        assert again.file.boot_id != server.file.boot_id
        again.control().close()


@pytest.fixture
def exit_code() -> Iterator[Callable[..., int]]:
    """Runs the server's entry in this process, for starts that end before anything listens."""

    def run(run_dir: Path, *arguments: str, model: Path = DEMO_MODEL) -> int:
        try:
            return main([*command(run_dir, *arguments, model=model)[3:]])
        except SystemExit as ended:  # argparse
            assert isinstance(ended.code, int)
            return ended.code

    umask = os.umask(0o022)
    yield run
    os.umask(umask)


def test_an_address_in_use_is_one_clear_line_and_exit_code_75(
    tmp_path: Path, exit_code: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    with closing(bind("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert exit_code(tmp_path, "--port", port) == 75
        text = capfd.readouterr().err
        assert text.count("\n") == 1 and f":{port}: it is in use" in text
        assert exit_code(tmp_path, "--control-port", port) == 75
    holder = RunDir(tmp_path)
    assert exit_code(tmp_path) == 75
    assert "Another server uses the run directory" in capfd.readouterr().err
    holder.release()


def test_a_missing_or_damaged_model_is_exit_code_66(
    tmp_path: Path, exit_code: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "model"

    def complaint() -> str:
        assert exit_code(tmp_path, model=damaged) == 66
        return capfd.readouterr().err

    assert "is none" in complaint()
    damaged.mkdir()
    assert "config.json cannot be read" in complaint()
    (damaged / "config.json").write_text('{"vocab_size": 4096')
    assert "config.json is damaged" in complaint()
    (damaged / "config.json").write_text('{"vocab_size": 4096}')
    assert "no tokenizer" in complaint()
    (damaged / "tokenizer.json").write_text("{}")
    (damaged / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert "no weights" in complaint()
    (damaged / "model.safetensors.index.json").write_text('{"weight_map": {"a": "x-1", "b": "x-2"}}')
    assert "lacks 2 of 2" in complaint()


def test_a_damaged_tokenizer_is_exit_code_66(tmp_path: Path) -> None:
    damaged = tmp_path / "model"
    shutil.copytree(DEMO_MODEL, damaged)
    (damaged / "tokenizer.json").write_text("{}")
    done = subprocess.run(
        command(tmp_path / "run", model=damaged), cwd=ROOT, capture_output=True, timeout=GUARD_S
    )
    assert done.returncode == 66 and b"tokenizer" in done.stderr


BAD_USAGE = [
    ("--config", "{"), ("--config", '{"max_num_seq": 3}'), ("--max-model-len", "5000"), ("--port", "70000"),
    ("--drain-s", "nan"), ("--nonsense",),
]  # fmt: skip


@pytest.mark.parametrize("arguments", BAD_USAGE)
def test_bad_usage_is_exit_code_2(
    tmp_path: Path, exit_code: Callable[..., int], arguments: tuple[str, ...]
) -> None:
    assert exit_code(tmp_path, *arguments) == 2


def test_files_are_private_the_key_is_kept_and_torch_is_never_loaded(tmp_path: Path) -> None:
    run_dir = tmp_path / ("deep" * 30)  # too long for a socket's path
    with live_server(run_dir) as server, server.openai() as client:
        client.completions.create(model="demo_model", prompt="hi", max_tokens=1)
        mapped = {Path(region.path).name for region in psutil.Process(server.process.pid).memory_maps()}
        modes = {path.name: path.stat().st_mode & 0o777 for path in run_dir.iterdir()}
        del modes["server.log"]  # the test's own
        assert modes.pop("records") == 0o700
        assert all(path.stat().st_mode & 0o777 == 0o600 for path in (run_dir / "records").iterdir())
        assert modes == dict.fromkeys(("runtime.json", "control.key", "server.lock"), 0o600)
        key = (run_dir / "control.key").read_text()
    assert not [name for name in mapped if "torch" in name]
    holder = RunDir(run_dir)
    assert holder.control_key() == key
    holder.release()
