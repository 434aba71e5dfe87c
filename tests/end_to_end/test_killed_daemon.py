"""kill -9 of the daemon while a challenger serves: nothing fails, the champion returns, the next daemon goes on."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from runtime.client import RuntimeClient, read_runtime_file
from store.database import StoreReader
from store.queries import timings_between

SETTINGS = """
model: {path: demo}
mode: auto
server: {port: 0}
knobs: {start: {max_num_seqs: 2}}
learn: {champion_s: 6}
search: {max_probes: 2, sampler: random}
experiment: {slice_s: 8, burn_in_s: 1, min_requests: 1}
"""
GUARD_S = 120.0


class Clients:
    """Requests one after the other from a few threads, each remembered with its outcome."""

    def __init__(self, url: str, num_threads: int = 3) -> None:
        self.url, self.stop = url, threading.Event()
        self.num_ok, self.failures = 0, []
        self.threads = [threading.Thread(target=self._run, args=(n,)) for n in range(num_threads)]
        for thread in self.threads:
            thread.start()

    def _run(self, number: int) -> None:
        with httpx.Client(base_url=self.url, timeout=60.0, trust_env=False) as client:
            while not self.stop.is_set():
                body = {"prompt": [5 + number] * 20, "max_tokens": 16, "ignore_eos": True}
                answer = client.post("/v1/completions", json=body)
                if answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 16:
                    self.num_ok += 1
                else:
                    self.failures.append(answer.text)
                time.sleep(0.05)

    def end(self) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()


def start_daemon(config: Path, data_dir: Path, log: Path) -> subprocess.Popen[bytes]:
    with open(log, "ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "tuner.cli", "run", "-c", str(config), "-d", str(data_dir), "--plain"],
            stdout=out,
            stderr=out,
        )


def wait_for(condition, child: subprocess.Popen[bytes], log: Path):
    end_at = time.monotonic() + GUARD_S
    while time.monotonic() < end_at:
        assert child.poll() is None, log.read_text()
        found = condition()
        if found:
            return found
        time.sleep(0.1)
    pytest.fail(f"nothing happened within {GUARD_S} s:\n{log.read_text()}")


def test_killed_daemon_loses_no_request_and_no_row_and_the_next_one_attaches(tmp_path):
    data_dir, log, config = tmp_path / "data", tmp_path / "log", tmp_path / "settings.yaml"
    config.write_text(SETTINGS)
    run_dir = data_dir / "run"
    daemon = start_daemon(config, data_dir, log)
    clients, control = None, None
    try:
        file = wait_for(
            lambda: (data_dir / "daemon.json").exists() and read_runtime_file(run_dir), daemon, log
        )
        clients = Clients(file.api_url)
        control = RuntimeClient.of_run_dir(run_dir)
        wait_for(lambda: (control.state()["slice_id"] or "").endswith("challenger"), daemon, log)
        champion = control.state()["champion_config_id"]

        os.kill(daemon.pid, signal.SIGKILL)
        killed_at = time.monotonic()
        daemon.wait()
        while control.state()["config_id"] != champion:
            assert time.monotonic() - killed_at < 30.0, "the engine never returned to its champion"
            time.sleep(0.05)
        reverted_s = time.monotonic() - killed_at
        print(f"champion back {reverted_s:.2f} s after the kill")
        assert reverted_s <= 6.0  # a lease of 5 s and one step, with some room for a busy machine

        before = clients.num_ok
        daemon = start_daemon(config, data_dir, log)
        wait_for(lambda: (data_dir / "daemon.json").exists() and clients.num_ok > before + 10, daemon, log)
        again = wait_for(lambda: read_runtime_file(run_dir), daemon, log)
        assert (again.pid, again.boot_id) == (file.pid, file.boot_id)
        wait_for(lambda: len(stored(data_dir, file.boot_id)) >= clients.num_ok - 5, daemon, log)

        clients.end()
        assert clients.failures == []
        wait_for(lambda: len(stored(data_dir, file.boot_id)) == clients.num_ok, daemon, log)
        ids = [row.request_id for row in stored(data_dir, file.boot_id)]
        assert len(ids) == len(set(ids)) == clients.num_ok
        status = subprocess.run(
            [sys.executable, "-m", "tuner.cli", "status", "-d", str(data_dir), "--json"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert json.loads(status.stdout)["champion"]["config_id"] == champion
    finally:
        if clients is not None:
            clients.end()
        if control is not None:
            control.close()
        daemon.send_signal(signal.SIGTERM)
        daemon.wait(90)
    assert read_runtime_file(run_dir) is None, "SIGTERM to the daemon drains and stops the runtime"


def stored(data_dir: Path, boot_id: str):
    with StoreReader(data_dir).metrics() as session:
        return [row for row in timings_between(session, 0.0, 1e12) if row.boot_id == boot_id]
