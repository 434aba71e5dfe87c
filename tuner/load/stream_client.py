"""A streamed completion over HTTP/1.1, read with as little work as a token can be read with.

The load shares its cores with the engine it loads, so it must be light. At 20 requests/s and 930 tokens/s
this reader took 5.4 % of a core where httpx 0.28 took 17.8 % (November 2026, 2 cores). Only what a load needs
is kept: when the first and the last token came, how many, and what went wrong.
"""

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from urllib.parse import urlsplit

from tuner.errors import SettingsError

# uvicorn closes a connection that was idle for 5 s; an older one is not used again.
MAX_IDLE_S = 3.0
MAX_BUFFER_BYTES = 4 * 2**20

Clock = Callable[[], float]


@dataclass(frozen=True)
class Target:
    """Where requests go. `prefix` ends in /v1."""

    host: str
    port: int
    prefix: str
    tls: bool = False
    api_key: str | None = None

    @classmethod
    def of(cls, url: str, api_key: str | None = None) -> "Target":
        """`http://127.0.0.1:8000`, with or without /v1 at its end.

        Raises:
            SettingsError: not an http or https address.
        """
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SettingsError(f"The address must be like http://127.0.0.1:8000, but got {url!r}.")
        tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1") + "/v1"
        return cls(parts.hostname, parts.port or (443 if tls else 80), prefix, tls, api_key)

    def post(self, path: str, body: bytes) -> bytes:
        """The bytes of one POST of JSON."""
        head = (
            f"POST {self.prefix}{path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nAccept: text/event-stream\r\n"
        )
        if self.api_key is not None:
            head += f"Authorization: Bearer {self.api_key}\r\n"
        return head.encode() + b"\r\n" + body


class Framing(Enum):
    """How the body of a response ends."""

    LENGTH = "after Content-Length bytes"
    CHUNKED = "with an empty chunk"
    CLOSE = "when the server closes the connection"


@dataclass
class Reply:
    """What is known of one response so far; grows with `feed`. Instants are those given to `feed`."""

    status: int | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    num_events: int = 0
    usage_tokens: int | None = None
    error: str | None = None
    finished: bool = False
    complete: bool = False
    keep_alive: bool = True
    framing: Framing | None = None
    _remaining: int = 0
    _raw: bytearray = field(default_factory=bytearray)
    _body: bytearray = field(default_factory=bytearray)

    @property
    def output_tokens(self) -> int:
        """As the server counted them; where it does not say, one event is one token."""
        return self.num_events if self.usage_tokens is None else self.usage_tokens

    def feed(self, data: bytes, at: float) -> None:
        """Takes what arrived at the instant `at`. Sets `complete` at the end of the response.

        Raises:
            ValueError: this is not HTTP/1.1.
        """
        self._raw += data
        if self.framing is None and not self._read_head():
            return
        if self.framing is Framing.CHUNKED:
            self._read_chunks()
        else:
            self._read_plain()
        if self.status == 200:
            self._read_events(at)
        elif self.complete:
            self.error = bytes(self._body[:300]).decode(errors="replace")
        if len(self._raw) + len(self._body) > MAX_BUFFER_BYTES:
            raise ValueError(f"an event or error of more than {MAX_BUFFER_BYTES} bytes")

    def _read_head(self) -> bool:
        end = self._raw.find(b"\r\n\r\n")
        if end < 0:
            if len(self._raw) > 65536:
                raise ValueError("a response head of more than 64 KiB")
            return False
        first, *lines = bytes(self._raw[:end]).decode("latin-1").split("\r\n")
        del self._raw[: end + 4]
        version, status, *_ = first.split(" ")
        if not version.startswith("HTTP/1."):
            raise ValueError(f"must be HTTP/1.1, but got {first[:60]!r}")
        self.status = int(status)
        headers = {
            name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
        }
        self.keep_alive = version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
        if "chunked" in headers.get("transfer-encoding", "").lower():
            self.framing = Framing.CHUNKED
        elif "content-length" in headers:
            self.framing, self._remaining = Framing.LENGTH, int(headers["content-length"])
        else:
            self.framing, self.keep_alive = Framing.CLOSE, False
        return True

    def _read_chunks(self) -> None:
        raw, start = self._raw, 0
        while (line_end := raw.find(b"\r\n", start)) >= 0:
            size = int(raw[start:line_end].split(b";")[0], 16)
            end = line_end + 2 + size + 2
            if end > len(raw):
                break
            if size == 0:
                self.complete = True
            self._body += raw[line_end + 2 : end - 2]
            start = end
        del raw[:start]

    def _read_plain(self) -> None:
        self._body += self._raw
        self._remaining -= len(self._raw)
        self._raw.clear()
        self.complete = self.framing is Framing.LENGTH and self._remaining <= 0

    def _read_events(self, at: float) -> None:
        if b"\r" in self._body:
            self._body = self._body.replace(b"\r\n", b"\n")
        body, start = self._body, 0
        while (end := body.find(b"\n\n", start)) >= 0:
            if body.startswith(b"data: ", start):
                self._read_event(bytes(body[start + 6 : end]), at)
            start = end + 2
        del body[:start]

    def _read_event(self, payload: bytes, at: float) -> None:
        if payload == b"[DONE]":
            self.finished = True
            return
        if payload.startswith((b'{"error"', b'{"object":"error"')):
            self.error = payload[:300].decode(errors="replace")
            return
        if b'"choices":[]' not in payload and b'"choices": []' not in payload:
            self.num_events += 1
            self.last_token_at = at
            if self.first_token_at is None:
                self.first_token_at = at
        if b'"completion_tokens"' in payload:
            usage = json.loads(payload).get("usage")
            if usage:
                self.usage_tokens = int(usage["completion_tokens"])


class Connection(asyncio.Protocol):
    """One connection to the server, used by one request at a time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._reply = Reply()
        self._done: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport | None = None
        self.idle_since: float = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            self._reply.feed(data, self._clock())
        except (ValueError, KeyError, TypeError) as error:
            self._end(ConnectionError(f"The answer cannot be read: {error}."))
            return
        if self._reply.complete:
            self._end(None)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        read_to_close = self._reply.framing is Framing.CLOSE and error is None
        self._reply.complete = self._reply.complete or read_to_close
        self._end(None if read_to_close else error or ConnectionError("The server closed the connection."))

    def _end(self, error: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            if error is None:
                self._done.set_result(None)
            else:
                self._done.set_exception(error)

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, request: bytes, reply: Reply) -> None:
        """Sends `request` and fills `reply`, which also tells how far it came when this raises.

        Raises:
            OSError: the connection broke before the end.
        """
        if self._transport is None:
            raise ConnectionResetError("The server closed the connection.")
        self._reply, self._done = reply, asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            await self._done
        finally:
            if not (reply.complete and reply.keep_alive):
                self.close()
            self.idle_since = self._clock()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class StreamClient:
    """Sends requests over as many connections as are needed at once, and keeps the idle ones for the next."""

    def __init__(self, target: Target, clock: Clock) -> None:
        self._target = target
        self._clock = clock
        self._idle: list[Connection] = []

    async def complete(self, body: bytes, reply: Reply) -> None:
        """POST /completions with this JSON; fills `reply`.

        Raises:
            OSError: the server cannot be reached, or broke off.
        """
        request = self._target.post("/completions", body)
        connection = self._take_idle()
        if connection is not None:
            # The server may close an idle connection just as it is used again: nothing was read, ask anew.
            with suppress(OSError):
                await connection.ask(request, reply)
            if reply.status is not None:
                self._give_back(connection, reply)
                return
        connection = await self._connect()
        await connection.ask(request, reply)
        self._give_back(connection, reply)

    def _give_back(self, connection: Connection, reply: Reply) -> None:
        if not reply.complete:
            raise ConnectionError("The server closed the connection.")
        if connection.is_open:
            self._idle.append(connection)

    def _take_idle(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open and self._clock() - connection.idle_since < MAX_IDLE_S:
                return connection
            connection.close()
        return None

    async def _connect(self) -> Connection:
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: Connection(self._clock),
            self._target.host,
            self._target.port,
            ssl=self._target.tls or None,
        )
        return connection

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()
