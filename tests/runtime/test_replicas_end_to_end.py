"""Two engines of the demo model behind one front end, as shipped: prepared beside, fed, killed, taken back."""

import os
import signal
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from runtime.client import RuntimeClient
from runtime.errors import InvalidKnob
from tests.servers import GUARD_S, LiveServer, live_server, wait_until

PROMPTS = [f"import os\n\ndef read_lines_{index}(path):\n" for index in range(6)]
NUM_TOKENS = 24


def ask(server: LiveServer, prompt: str) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    with server.http() as http:
        return http.post("/v1/completions", json=body)


def text_of(answer: httpx.Response) -> str:
    return str(answer.json()["choices"][0]["text"])


class Load:
    """One client a prompt, asking greedily without a pause until the block ends."""

    def __init__(self, server: LiveServer) -> None:
        self.answers: list[tuple[str, httpx.Response]] = []
        self._server, self._over = server, threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(prompt,)) for prompt in PROMPTS]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(GUARD_S)

    def wait_for(self, num_more: int) -> None:
        num = len(self.answers) + num_more
        wait_until(lambda: len(self.answers) >= num, f"{num_more} more answers")

    def _run(self, prompt: str) -> None:
        while not self._over.is_set():
            self.answers.append((prompt, ask(self._server, prompt)))


def phases(control: RuntimeClient) -> list[str]:
    return [one["phase"] for one in control.state()["replicas"]]


def drained(control: RuntimeClient, kind: str) -> list[dict[str, Any]]:
    return [record for record in control.drain(None, 0, 20_000)["records"] if record["kind"] == kind]


def test_two_replicas_of_the_demo_model_come_and_go_under_load_and_lose_nothing(tmp_path: Path) -> None:
    arguments = (
        "--device",
        "cpu",
        "--kv-tokens",
        "8192",
        "--config",
        '{"max_num_seqs": 2, "threads_decode": 1}',
    )
    with (
        live_server(tmp_path, *arguments, engine_module="runtime.engine") as server,
        server.control() as control,
    ):
        expected = {prompt: text_of(ask(server, prompt)) for prompt in PROMPTS}
        assert len(set(expected.values())) > 1
        with Load(server) as load:
            load.wait_for(6)
            prepared = control.prepare({**control.state()["champion"], "replicas": 2})
            assert phases(control) == ["ready", "ready"] and prepared["extra_bytes"] > 50e6
            load.wait_for(6)
            assert {one["replica"] for one in drained(control, "step")} == {0}

            control.reconfigure({"replicas": 2}, control.state()["version"])
            seen = drained(control, "step")[-1]["seq"]
            load.wait_for(24)
            per_replica = Counter(one["replica"] for one in drained(control, "step") if one["seq"] > seen)
            assert set(per_replica) == {0, 1} and min(per_replica.values()) > 0.2 * max(per_replica.values())

            os.kill(control.state()["replicas"][1]["pid"], signal.SIGKILL)
            wait_until(lambda: control.state()["num_engine_restarts"] == 1, "the engine is started again")
            load.wait_for(6)  # on the one that is left
            wait_until(lambda: phases(control) == ["ready", "ready"], "the engine is back")
            load.wait_for(12)

            control.reconfigure({"replicas": 1}, control.state()["version"])
            load.wait_for(12)
        state, timings = control.state(), drained(control, "request")
    broken = [answer for _, answer in load.answers if answer.status_code != 200]
    assert len(broken) <= 2  # max_num_seqs: no more had begun on the engine that was killed
    assert all(answer.json()["error"]["code"] == "engine_restarted" for answer in broken)
    lost = [one for one in timings if one["finish_reason"] != "length"]
    assert len(lost) == len(broken) and all(one["first_token_at"] is not None for one in lost)
    assert len(timings) == len({one["request_id"] for one in timings}) == len(load.answers) + len(PROMPTS)
    texts = {(prompt, text_of(answer)) for prompt, answer in load.answers if answer.status_code == 200}
    assert texts == set(expected.items())
    assert (state["champion"]["replicas"], state["num_engine_restarts"], state["gauges"]["num_live"]) == (
        1,
        1,
        0,
    )


def test_more_replicas_than_cores_are_refused_by_name(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    if cores >= 8:
        pytest.skip("as many cores as `replicas` can be")
    with (
        live_server(
            tmp_path, "--device", "cpu", "--kv-tokens", "4096", engine_module="runtime.engine"
        ) as server,
        server.control() as control,
    ):
        with pytest.raises(InvalidKnob, match=f"got {cores + 1}"):
            control.prepare({**control.state()["champion"], "replicas": cores + 1})
        assert phases(control) == ["ready"]
