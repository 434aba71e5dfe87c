"""Many streamed completions at once from one thread, with as little work as a token can be read with.

    python -m runtime.bench.streams < job.json > told.json

A process of its own, so that neither the server nor whoever measures shares a core or an interpreter with it. It knows
what our own server sends and nothing else: HTTP/1.1 200, chunks, one event a chunk of text, usage at the end.
"""

import json
import re
import select
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

READ_BYTES = 256 * 1024
GIVE_UP_S = 300.0  # without a byte on any stream
_USAGE = re.compile(rb'"completion_tokens": (\d+)')


class Heard(NamedTuple):
    """One answer. Seconds since all requests were sent; `num_tokens` as the server counted them."""

    ttft_s: float
    last_s: float
    num_events: int
    num_tokens: int

    @property
    def tpot_s(self) -> float:
        return (self.last_s - self.ttft_s) / max(1, self.num_tokens - 1)


class Stream:
    """One connection and what came over it."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.sock = socket.create_connection(address)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.first_at: float | None = None
        self.last_at = 0.0
        self.num_events = 0
        self.num_tokens: int | None = None
        self.is_done = False
        self._begun = False
        self._rest = b""

    def feed(self, data: bytes, at: float) -> None:
        """Takes what arrived at the instant `at`.

        Raises:
            ConnectionError: not an answer with status 200, or broken off.
        """
        if not data:
            raise ConnectionError(f"The server closed a stream after {self.num_events} events.")
        data = self._rest + data
        if not self._begun:
            if not data.startswith(b"HTTP/1.1 200"):
                raise ConnectionError(f"The server answered {data[:600].decode(errors='replace')!r}.")
            self._begun = True
        end = data.rfind(b"\n\n") + 2
        events, self._rest = (b"", data) if end < 2 else (data[:end], data[end:])
        if events:
            self._hear(events, at)

    def _hear(self, events: bytes, at: float) -> None:
        num = events.count(b"data: {")
        if events.endswith(b"data: [DONE]\n\n"):
            self.is_done = True
            told = _USAGE.search(events)
            if told is None:
                raise ConnectionError(f"A stream ended with {events[-300:].decode(errors='replace')!r}.")
            self.num_tokens = int(told[1])
            num -= 1
        if num:
            self.num_events += num
            self.last_at = at
            if self.first_at is None:
                self.first_at = at
            self.heard(events, at)

    def heard(self, events: bytes, at: float) -> None:
        """For who wants to know more of the events than how many they are."""

    def told(self, began: float) -> Heard:
        assert self.first_at is not None and self.num_tokens is not None
        return Heard(self.first_at - began, self.last_at - began, self.num_events, self.num_tokens)


def post(address: tuple[str, int], body: bytes) -> bytes:
    """The bytes of one request for a completion."""
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address[0]}:{address[1]}\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def body(prompt: Sequence[int], num_tokens: int) -> bytes:
    """Greedy, to the length asked for, streamed."""
    asked = {
        "prompt": list(prompt), "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    return json.dumps(asked, separators=(",", ":")).encode()


def drive(
    address: tuple[str, int], bodies: Sequence[bytes], make: Callable[[tuple[str, int]], Stream] = Stream
) -> tuple[float, list[Stream]]:
    """Sends all requests at once, each on a connection of its own, and reads until all are answered. Returns the
    instant of sending, by the monotonic clock, and the streams in the order of the requests.

    Raises:
        ConnectionError: an answer is no stream, broke off, or nothing came for GIVE_UP_S.
    """
    streams = [make(address) for _ in bodies]
    by_file = {stream.sock.fileno(): stream for stream in streams}
    poller = select.epoll()
    for file in by_file:
        poller.register(file, select.EPOLLIN)
    began = time.monotonic()
    for stream, one in zip(streams, bodies, strict=True):
        stream.sock.sendall(post(address, one))
    num_left = len(streams)
    while num_left:
        ready = poller.poll(GIVE_UP_S)
        if not ready:
            raise ConnectionError(f"Nothing came for {GIVE_UP_S:g} s; {num_left} streams have not ended.")
        for file, _ in ready:
            stream = by_file[file]
            stream.feed(stream.sock.recv(READ_BYTES), time.monotonic())
            if stream.is_done:
                poller.unregister(file)
                num_left -= 1
    poller.close()
    for stream in streams:
        stream.sock.close()
    return began, streams


def main() -> None:
    """Reads a job (`port`, `prompts`, `output_tokens`), and tells the seconds of wall time, the seconds of CPU from
    the first byte sent to the last one read, and each answer."""
    job: dict[str, Any] = json.load(sys.stdin)
    address = ("127.0.0.1", int(job["port"]))
    bodies = [body(*one) for one in zip(job["prompts"], job["output_tokens"], strict=True)]
    cpu_s = time.process_time()
    began, streams = drive(address, bodies)
    cpu_s = time.process_time() - cpu_s
    heard = [stream.told(began) for stream in streams]
    json.dump({"seconds": max(one.last_s for one in heard), "cpu_s": cpu_s, "heard": heard}, sys.stdout)


if __name__ == "__main__":
    main()
