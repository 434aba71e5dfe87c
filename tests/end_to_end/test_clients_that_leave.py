"""Ten thousand clients that come and go at every moment of a request: nothing stays behind that was theirs."""

import asyncio
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from runtime.client import read_runtime_file
from tests.servers import DEMO_MODEL, GUARD_S, ROOT, LiveServer, wait_until

NUM_CLIENTS = 10_000
NUM_AT_ONCE = 64
WARM_UP = 1500  # threads, buffers, pools and the pages of the KV pool are there after these
PROMPT = "def read_lines(path):\n"
READ_LIMIT_S = 60.0
COUNTED = ("connections", "descriptors", "threads", "tasks")
MOST_ROWS = 192  # more tokens than a step of these clients has
MAX_SEQS = 16  # the default of `max_num_seqs`
# Less than 420 bytes a client. Of what a client is, nothing may stay; what is bounded is full by the second round:
# buffers, and in the engine half a megabyte for each number of rows that a step can have (runtime/linear.py), since
# `fill_caches` has asked for all of them.
MAX_GROWTH_BYTES = 4 * 2**20


@contextmanager
def counted_server(run_dir: Path) -> Iterator[LiveServer]:
    log_path = run_dir / "server.log"
    words = [sys.executable, "-m", "tests.end_to_end.counted_server", "--model", str(DEMO_MODEL), "--run-dir",
             str(run_dir), "--port", "0", "--device", "cpu", "--kv-tokens", "2048",
             "--config", json.dumps({"prefix_cache": "on"})]  # fmt: skip
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            words, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "COUNTED_IN": str(run_dir)}
        )
    try:
        wait_until(lambda: read_runtime_file(run_dir) is not None, "the server listens")
        file = read_runtime_file(run_dir)
        assert file is not None
        server = LiveServer(process, run_dir, log_path, file)
        server.wait_ready()
        yield server
    finally:
        process.terminate()
        process.wait(60)


class Left(dict[str, int]):
    """What the server holds when nobody is there."""

    @classmethod
    def behind(cls, server: LiveServer) -> "Left":
        server.wait_idle()
        family = [
            psutil.Process(server.process.pid),
            *psutil.Process(server.process.pid).children(recursive=True),
        ]
        with server.http() as http:
            metrics = http.get("/metrics").text
        used = [
            float(line.split()[-1])
            for line in metrics.splitlines()
            if line.startswith("vllm:kv_cache_usage_perc")
        ]
        asked = server.run_dir / "tasks.json"
        asked.unlink(missing_ok=True)
        server.process.send_signal(signal.SIGUSR1)
        wait_until(asked.exists, "the tasks are counted")
        return cls(
            connections=len(family[0].net_connections("tcp")),
            descriptors=sum(process.num_fds() for process in family),
            threads=sum(process.num_threads() for process in family),
            tasks=sum(json.loads(asked.read_text()).values()),
            held_per_mille=round(1000 * max(used)),
            rss_bytes=family[0].memory_info().rss,
            engine_rss_bytes=sum(process.memory_info().rss for process in family[1:]),
        )


Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter, random.Random], Awaitable[None]]


def post(path: str = "/v1/completions", **body: object) -> bytes:
    asked = {
        "model": "demo_model",
        "prompt": PROMPT,
        "max_tokens": 12,
        "temperature": 0,
        "ignore_eos": True,
        **body,
    }
    content = json.dumps(asked).encode()
    return b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (
        path.encode(),
        len(content),
        content,
    )


async def says_nothing(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rng: random.Random
) -> None:
    pass


async def leaves_within_its_request(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rng: random.Random
) -> None:
    whole = post()
    writer.write(whole[: rng.randrange(1, len(whole))])
    await writer.drain()


async def leaves_before_the_answer(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rng: random.Random
) -> None:
    writer.write(post(stream=rng.random() < 0.5, n=rng.choice([1, 1, 3])))
    await writer.drain()
    await asyncio.sleep(rng.random() * 0.05)


async def leaves_within_the_stream(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rng: random.Random
) -> None:
    writer.write(post(stream=True, prompt=[PROMPT, PROMPT + "    return"], logprobs=rng.choice([None, 2])))
    await writer.drain()
    for _ in range(rng.randrange(1, 8)):  # a busy server puts many tokens into one event
        if (await reader.readuntil(b"\n\n")).endswith(b"[DONE]\n\n"):
            return


async def stays_to_the_end(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rng: random.Random
) -> None:
    writer.write(post(stream=True))
    await writer.drain()
    await reader.readuntil(b"data: [DONE]")


async def asks_for_what_is_not_served(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rng: random.Random
) -> None:
    writer.write(rng.choice([post(n=1000), post("/nowhere"), b"\0\1\2\r\n\r\n", post(model="other")]))
    await writer.drain()
    await reader.read(100)


TALKS: list[Talk] = [
    says_nothing, leaves_within_its_request, leaves_before_the_answer, leaves_within_the_stream, stays_to_the_end,
    asks_for_what_is_not_served,
]  # fmt: skip


async def one_client(url: str, talk: Talk, rng: random.Random) -> None:
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        await asyncio.wait_for(talk(reader, writer, rng), READ_LIMIT_S)
        if rng.random() < 0.5:  # a reset instead of an orderly end
            writer.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
    finally:
        writer.close()


async def come_and_go(url: str, num: int, seed: int) -> Counter[str]:
    rng, seats, talks = random.Random(seed), asyncio.Semaphore(NUM_AT_ONCE), Counter[str]()

    async def next_one(talk: Talk, own: random.Random) -> None:
        async with seats:
            await one_client(url, talk, own)

    async with asyncio.TaskGroup() as group:
        for _ in range(num):
            talk = rng.choice(TALKS)
            talks[talk.__name__] += 1
            group.create_task(next_one(talk, random.Random(rng.random())))
    return talks


def fill_caches(server: LiveServer) -> None:
    """Steps of all numbers of rows, and of all numbers of rows that are sampled."""
    with server.http() as http:
        for num in range(1, MOST_ROWS + 1):
            body = {"prompt": [7] * num, "max_tokens": 1, "cache_salt": str(num)}  # nothing of it is cached
            assert http.post("/v1/completions", json=body).status_code == 200
        for num in range(1, MAX_SEQS + 1):
            body = {"prompt": PROMPT, "n": num, "max_tokens": 4, "ignore_eos": True}
            assert http.post("/v1/completions", json=body).status_code == 200


@contextmanager
def a_daemon_that_reads(server: LiveServer) -> Iterator[None]:
    """Takes the records as a daemon does; nobody's reading would keep each request's and step's in memory."""
    stop = threading.Event()

    def read() -> None:
        boot_id, seq = None, 0
        with server.control() as control:
            while not stop.wait(0.2):
                told = control.drain(boot_id, seq)
                boot_id, seq = told["boot_id"], told["next_seq"]

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield
    finally:
        stop.set()
        reader.join()


def settled(server: LiveServer, before: Left) -> Left:
    """What is there once nothing goes any more; the engine's word on its blocks is a moment old."""
    end_at = time.monotonic() + GUARD_S
    while True:
        left = Left.behind(server)
        is_settled = left["held_per_mille"] == 0 and all(left[kind] <= before[kind] for kind in COUNTED)
        if is_settled or time.monotonic() > end_at:
            return left


@pytest.mark.slow
def test_clients_that_leave_at_any_moment_leave_nothing_behind(tmp_path: Path) -> None:
    with counted_server(tmp_path) as server, a_daemon_that_reads(server):
        fill_caches(server)
        asyncio.run(come_and_go(server.api_url, WARM_UP, 1))
        left = [Left.behind(server)]
        for seed in (2, 3):
            talks = asyncio.run(come_and_go(server.api_url, NUM_CLIENTS, seed))
            left.append(settled(server, left[0]))
            print(f"{dict(talks)}\nbefore {left[-2]}\nafter  {left[-1]}")
        assert server.process.poll() is None and "Traceback" not in server.log()
    for after in left[1:]:
        assert after["held_per_mille"] == 0, "blocks"
        for kind in COUNTED:
            assert after[kind] <= left[0][kind], kind
    for kind in ("rss_bytes", "engine_rss_bytes"):
        assert left[2][kind] - left[1][kind] < MAX_GROWTH_BYTES, kind
