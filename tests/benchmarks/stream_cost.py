"""What the front end takes for a streamed token, without a model: CPU of each process, and how late tokens arrive.

    python -m tests.benchmarks.stream_cost --streams 300 --every-ms 20 5

The real server with a tokenizer of 128,256 tokens, an engine that makes one token a stream at fixed instants, and a
client that reads all streams from a process of its own. `lag` is from the instant of a token in the engine to that
of its text in the client, of the last token that came with it. CPU seconds are what the kernel charged, so that a busy
machine makes nothing look dearer; lags do grow with what else runs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from runtime.bench.streams import Stream, body, drive
from runtime.bench.vocabulary import SPACE, save_tokenizer
from tests.servers import LiveServer, live_server, wait_until

VOCAB_SIZE = 128_256
NUM_TOKENS = 128
_TEXT = b'"text": "'


class TimedStream(Stream):
    """Notes with each arrival the last word that came."""

    def __init__(self, address: tuple[str, int]) -> None:
        super().__init__(address)
        self.words: list[tuple[str, float]] = []

    def heard(self, events: bytes, at: float) -> None:
        start = events.rfind(_TEXT, 0, events.rfind(_TEXT) if events.endswith(b"[DONE]\n\n") else None)
        start = events.rfind(_TEXT) if start < 0 else start
        words = events[start + len(_TEXT) : events.find(b'"', start + len(_TEXT))].split()
        if words:
            self.words.append((words[-1].decode(), at))


def client() -> None:
    """The child: reads a job, drives it, and tells its CPU and [word, instant] of all arrivals, by stream."""
    job: dict[str, Any] = json.load(sys.stdin)
    began = psutil.Process().cpu_times()
    _, streams = drive(
        ("127.0.0.1", job["port"]), [body(job["prompt"], NUM_TOKENS)] * job["num"], TimedStream
    )
    ended = psutil.Process().cpu_times()
    words = [stream.words for stream in streams if isinstance(stream, TimedStream)]
    cpu_s = ended.user + ended.system - began.user - began.system
    json.dump({"cpu_s": cpu_s, "words": words, "num_tokens": [one.num_tokens for one in streams]}, sys.stdout)


def make_folder(folder: Path) -> list[int]:
    """A folder that the front end takes for a model. Returns NUM_TOKENS token ids, each a word of its own."""
    save_tokenizer(folder, VOCAB_SIZE)
    config = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 4096, "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"")
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    words = [number for token, number in vocabulary.items() if token[0] == SPACE and len(token) > 4]
    return words[:: len(words) // NUM_TOKENS][:NUM_TOKENS]


def measure(server: LiveServer, job: dict[str, Any], ticks: Path, words: Sequence[str]) -> dict[str, Any]:
    """One run. Times of CPU are microseconds a token; lags milliseconds."""
    front = psutil.Process(server.process.pid)
    (engine,) = front.children()
    ticks.unlink(missing_ok=True)
    before = [sum(one.cpu_times()[:2]) for one in (front, engine)]
    done = subprocess.run([sys.executable, "-m", __spec__.name, "--client"], input=json.dumps(job),
                          capture_output=True, text=True, check=True)  # fmt: skip
    after = [sum(one.cpu_times()[:2]) for one in (front, engine)]
    wait_until(ticks.exists, "the engine has noted its instants")
    told, made_at = json.loads(done.stdout), json.loads(ticks.read_text())
    assert told["num_tokens"] == [NUM_TOKENS] * job["num"]
    number = {word: at for at, word in enumerate(words)}
    lags = [at - made_at[number[word]] for stream in told["words"] for word, at in stream]
    num_tokens = job["num"] * NUM_TOKENS
    cpu_us = [1e6 * (late - early) / num_tokens for early, late in zip(before, after, strict=True)]
    return {
        "front_end_us": cpu_us[0], "engine_us": cpu_us[1], "client_us": 1e6 * told["cpu_s"] / num_tokens,
        "lag_p50_ms": 1e3 * float(np.percentile(lags, 50)), "lag_p99_ms": 1e3 * float(np.percentile(lags, 99)),
        "step_ms": 1e3 * (made_at[-1] - made_at[0]) / (len(made_at) - 1), "reads_a_token": len(lags) / num_tokens,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.stream_cost", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("--client", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--streams", type=int, default=300)
    parser.add_argument("--every-ms", type=float, nargs="+", default=[20.0, 5.0], help="between two tokens")
    parser.add_argument("--runs", type=int, default=2, help="after one that is not counted")
    parser.add_argument("--config", default="{}", help="knobs of the server, as JSON")
    options = parser.parse_args()
    if options.client:
        client()
        return
    with tempfile.TemporaryDirectory() as scratch:
        token_ids = make_folder(Path(scratch) / "model")
        vocabulary = json.loads((Path(scratch) / "model" / "tokenizer.json").read_text())["model"]["vocab"]
        by_number = {number: token.lstrip(SPACE) for token, number in vocabulary.items()}
        words = [by_number[number] for number in token_ids]
        assert len(set(words)) == NUM_TOKENS
        for every_ms in options.every_ms:
            ticks = Path(scratch) / "ticks.json"
            env = {
                "FAKE_STEP_S": str(every_ms / 1e3),
                "TICK_REQUESTS": str(options.streams),
                "TICK_FILE": str(ticks),
            }
            with live_server(
                Path(scratch) / f"run-{every_ms:g}", "--config", options.config, "--log-level", "warning", env=env,
                engine_module="tests.benchmarks.ticking_engine", model=Path(scratch) / "model",
            ) as server:  # fmt: skip
                port = int(server.api_url.rsplit(":", 1)[1])
                job = {"port": port, "prompt": token_ids, "num": options.streams}
                for run in range(options.runs + 1):
                    told = measure(server, job, ticks, words)
                    if run:
                        shown = ", ".join(f"{name} {value:.1f}" for name, value in told.items())
                        print(f"every {every_ms:g} ms: {shown}", flush=True)


if __name__ == "__main__":
    main()
