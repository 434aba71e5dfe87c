"""A serving process of its own for tests, over the demo model, with the fake engine or the real one."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai

from runtime.client import RuntimeClient, RuntimeFile, read_runtime_file

ROOT = Path(__file__).resolve().parent.parent
DEMO_MODEL = ROOT / "runtime" / "demo_model"
GUARD_S = 60.0  # only against hanging: nothing here measures time


@dataclass
class LiveServer:
    process: "subprocess.Popen[bytes]"
    run_dir: Path
    log_path: Path
    file: RuntimeFile

    @property
    def api_url(self) -> str:
        return self.file.api_url

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def control(self) -> RuntimeClient:
        return RuntimeClient.of_run_dir(self.run_dir, GUARD_S)

    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.api_url}/v1", api_key="none", max_retries=0, timeout=GUARD_S)

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.api_url, timeout=GUARD_S, trust_env=False)

    def wait_ready(self) -> None:
        with self.http() as http:
            wait_until(lambda: http.get("/health").status_code == 200, "the server is ready")

    def wait_idle(self) -> None:
        with self.http() as http:
            wait_until(lambda: http.get("/load").json()["server_load"] == 0, "no request is live")


def wait_until(reached: Callable[[], bool], what: str) -> None:
    end_at = time.monotonic() + GUARD_S
    while not reached():
        assert time.monotonic() < end_at, f"{what}: not reached within {GUARD_S:g} s"
        time.sleep(0.01)


@contextmanager
def live_server(
    run_dir: Path,
    *arguments: str,
    env: dict[str, str] | None = None,
    engine_module: str = "tests.fakes",
    model: Path = DEMO_MODEL,
    ready: bool = True,
) -> Iterator[LiveServer]:
    """Starts a server on free ports and ends it afterwards; with `ready`, it answers requests."""
    run_dir.mkdir(parents=True, exist_ok=True)
    log_path = run_dir / "server.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(command(run_dir, *arguments, engine_module=engine_module, model=model),
                                   cwd=ROOT, env={**os.environ, **(env or {})}, stdout=log, stderr=log)  # fmt: skip
    try:
        wait_until(lambda: _announced(process, run_dir, log_path), "the server listens")
        file = read_runtime_file(run_dir)
        assert file is not None
        server = LiveServer(process, run_dir, log_path, file)
        if ready:
            server.wait_ready()
        yield server
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(GUARD_S)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()


def command(
    run_dir: Path, *arguments: str, engine_module: str = "tests.fakes", model: Path = DEMO_MODEL
) -> Sequence[str]:
    return [
        sys.executable, "-m", "runtime.server", "--model", str(model), "--run-dir", str(run_dir), "--port", "0",
        "--engine-module", engine_module, *arguments,
    ]  # fmt: skip


def _announced(process: "subprocess.Popen[bytes]", run_dir: Path, log_path: Path) -> bool:
    file = read_runtime_file(run_dir)
    if file is not None and file.pid == process.pid:
        return True
    assert process.poll() is None, f"the server ended with {process.returncode}:\n{log_path.read_text()}"
    return False
