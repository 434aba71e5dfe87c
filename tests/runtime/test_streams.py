"""The client that benchmarks read many streams with, the tokenizer of random weights, and the benchmark over both."""

import json
import random
import socket
from pathlib import Path

import pytest
import torch

from runtime.bench import over_http
from runtime.bench.cells import Bench, Step
from runtime.bench.loads import Load
from runtime.bench.streams import Stream, body, drive
from runtime.bench.vocabulary import save_tokenizer
from runtime.detokenize import BytewiseDecode
from runtime.executor import Executor
from runtime.knobs import EngineConfig
from runtime.model_folder import ModelFolder
from runtime.prompts import Prompts
from tests.servers import live_server

EVENT = b'data: {"id": "x", "choices": [{"index": 0, "text": "a"}]}\n\n'
USAGE = b'data: {"id": "x", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 7}}\n\n'


def chunk(piece: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(piece), piece)


@pytest.fixture
def stream() -> Stream:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        made = Stream(listening.getsockname())
        made.sock.close()
    return made


def test_a_stream_is_read_however_it_is_cut(stream: Stream) -> None:
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    whole = head + chunk(EVENT) + chunk(EVENT + EVENT) + chunk(USAGE + b"data: [DONE]\n\n") + b"0\r\n\r\n"
    rng, at, now = random.Random(0), 0, 0.0
    while at < len(whole):
        size, now = rng.randrange(12, 60), now + 1.0
        stream.feed(whole[at : at + size], now)
        at += size
    told = stream.told(0.0)
    assert stream.is_done and (told.num_events, told.num_tokens) == (3, 7)
    assert 0.0 < told.ttft_s < told.last_s < now and told.tpot_s == (told.last_s - told.ttft_s) / 6


def test_an_error_is_not_taken_for_a_stream(stream: Stream) -> None:
    with pytest.raises(ConnectionError, match="429"):
        stream.feed(b"HTTP/1.1 429 Too Many Requests\r\n\r\n", 0.0)
    with pytest.raises(ConnectionError, match="closed"):
        stream.feed(b"", 0.0)


def test_many_streams_of_a_server_are_read_at_once(tmp_path: Path) -> None:
    with live_server(tmp_path) as server:
        address = ("127.0.0.1", int(server.api_url.rsplit(":", 1)[1]))
        began, streams = drive(address, [body([5, 6, 7, 8 + number], 9) for number in range(20)])
        heard = [one.told(began) for one in streams]
    assert {one.num_tokens for one in heard} == {9} and all(0 < one.num_events <= 9 for one in heard)
    assert all(0.0 < one.ttft_s <= one.last_s for one in heard)


def test_random_weights_get_a_token_for_each_row(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, 3000)
    config = {"vocab_size": 3000, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    prompts = Prompts.load(ModelFolder.read(tmp_path))
    assert isinstance(prompts.decode, BytewiseDecode)
    texts = {prompts.decode([token]) for token in range(3000)}
    assert len(texts) > 2800 and prompts.decode(prompts.encode("ab é", 64)) == "ab é"


@pytest.mark.slow
def test_the_server_is_measured_against_its_engine(capfd: pytest.CaptureFixture[str]) -> None:
    asked = "--shape tiny --workload tiny --device cpu --runs 1 --knob stream_interval=2"
    assert over_http.main(asked.split()) == 0
    told = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert told["ratio"] == pytest.approx(told["http"]["tokens_per_s"] / told["alone"]["tokens_per_s"])
    assert told["http"]["num_steps"] >= 8 and told["config"]["stream_interval"] == 2


def test_the_engine_alone_has_the_knobs_of_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are fitted to the device, and weights in the format asked for."""
    served: list[tuple[EngineConfig, str]] = []
    run = Bench.run

    def noting(self: Bench, load: Load) -> tuple[float, list[Step], list[float]]:
        found = run(self, load)
        served.append((self.config, self.executor.warm.weight_format))
        return found

    monkeypatch.setattr(Bench, "run", noting)
    monkeypatch.setattr(Executor, "_measured_step_tokens", lambda self: 128)
    with over_http.served_folder(Path(), "tiny", None, torch.device("cpu"), torch.float32) as folder:
        job = {"folder": str(folder), "device": "cpu", "dtype": "float32", "max_model_len": 64,
               "patch": {"max_num_seqs": 2, "weight_format": "int8"},
               "loads": [Load("two", 2, [list(range(8))] * 2, [3, 3])]}  # fmt: skip
        (alone,) = over_http.serve_alone(job)
    ((config, weight_format),) = served
    assert (config.mixed_step_tokens, config.max_num_seqs) == (128, 2) and weight_format == "int8"
    assert alone.tokens_per_s == pytest.approx(6 / alone.seconds)
