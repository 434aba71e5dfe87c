"""Scoring over the control address: what goes in, what comes back, what is refused with which words."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from runtime.client import RuntimeClient, read_control_key
from runtime.errors import (
    EngineNotReady,
    InvalidKnob,
    InvalidRequest,
    RequestFailed,
    RuntimeUnreachable,
)
from runtime.scoring import MAX_SEQUENCES
from tests.servers import LiveServer, live_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("score")) as one:
        yield one


@pytest.fixture
def control(server: LiveServer) -> Iterator[RuntimeClient]:
    with server.control() as client:
        yield client


def test_texts_become_the_tokens_of_the_models_own_tokenizer(
    server: LiveServer, control: RuntimeClient
) -> None:
    texts = ["def add(a, b):\n    return a + b", "早上六点"]
    told = control.tokenize(texts)["token_ids"]
    with server.http() as http:
        for text, ids in zip(texts, told, strict=True):
            body = {"model": "demo_model", "prompt": text, "max_tokens": 1}
            used = http.post("/v1/completions", json=body).json()["usage"]["prompt_tokens"]
            assert len(ids) == used > 1


def test_scores_come_back_one_a_token_but_the_first(control: RuntimeClient) -> None:
    told = control.score({}, [[5, 6, 7], [8, 9]])
    assert [len(one) for one in told["nll"]] == [len(one) for one in told["top1"]] == [2, 1]
    assert told["config_id"] == control.state()["config_id"]


def test_limits_are_told_with_the_rule(control: RuntimeClient) -> None:
    with pytest.raises(InvalidRequest, match=f"1 to {MAX_SEQUENCES} texts"):
        control.tokenize([])
    with pytest.raises(InvalidRequest, match=f"1 to {MAX_SEQUENCES} lists"):
        control.score({}, [])
    with pytest.raises(InvalidRequest, match="2 to"):
        control.score({}, [[1]])
    with pytest.raises(InvalidKnob, match="max_num_seqs"):
        control.score({"max_num_seqs": 0}, [[1, 2]])


@pytest.mark.parametrize(
    ("body", "rule"),
    [
        ({"sequences": [[1, 2]]}, "`values`"),
        ({"values": {}, "sequences": [[1, 2]], "limit_s": 0}, "`limit_s`"),
        ({"values": {}, "sequences": [[1, 2]], "piece_tokens": "64"}, "`piece_tokens`"),
        ({"values": {}, "sequences": "text"}, "`sequences`"),
    ],
)
def test_a_malformed_call_is_answered_400(server: LiveServer, body: dict[str, object], rule: str) -> None:
    url = f"{server.file.control_url}/control/score"
    key = read_control_key(server.run_dir)
    answer = httpx.post(url, json=body, headers={"authorization": f"Bearer {key}"}, trust_env=False)
    assert answer.status_code == 400 and rule in answer.json()["error"]["message"]


def test_no_key_no_score(server: LiveServer) -> None:
    for route in ("score", "tokenize"):
        answer = httpx.post(f"{server.file.control_url}/control/{route}", json={}, trust_env=False)
        assert answer.status_code == 401


def test_a_call_ends_when_the_engine_does(tmp_path: Path) -> None:
    """With the real engine, whose first piece of a long call is still to come when it is stopped."""
    with live_server(tmp_path, engine_module="runtime.engine") as one, one.control() as control:
        engine_pid = control.identity()["engine_pid"]
        threading.Timer(1.0, os.kill, (engine_pid, signal.SIGKILL)).start()
        with pytest.raises((EngineNotReady, RequestFailed, RuntimeUnreachable)):
            control.score({}, [[7] * 1000] * 32, piece_tokens=8)
