"""A server that streams tokens on a timetable and fails on request: the other end of the load, in one file."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class FakeServer:
    """`fault` is what goes wrong with every request from number `fault_from` on.

    Faults: `status` (503 at once), `break` (closes after half the tokens), `error` (an error event after half),
    `short` (half of the tokens, then a proper end), `stall` (no answer), `close` (closes without an answer).
    """

    first_token_s: float = 0.0
    token_s: float = 0.0
    fault: str | None = None
    fault_from: int = 0
    model: dict[str, Any] = field(
        default_factory=lambda: {"id": "fake", "max_model_len": 512, "vocab_size": 100}
    )
    bodies: list[dict[str, Any]] = field(default_factory=list)
    num_connections: int = 0
    url: str = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while await self._answer(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; False when the connection is to be closed."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        if head.startswith("GET"):
            self._write_json(writer, 200, {"object": "list", "data": [self.model]})
            return True
        length = next(
            int(line.split(":")[1])
            for line in head.split("\r\n")
            if line.lower().startswith("content-length")
        )
        body = json.loads(await reader.readexactly(length))
        self.bodies.append(body)
        fault = self.fault if len(self.bodies) > self.fault_from else None
        if fault == "status":
            self._write_json(writer, 503, {"error": {"message": "not ready"}})
            return True
        if fault == "stall":
            await asyncio.sleep(3600)
        if fault == "close":
            return False
        return await self._stream(writer, body, fault)

    def _write_json(self, writer: asyncio.StreamWriter, status: int, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(text), text))

    async def _stream(self, writer: asyncio.StreamWriter, body: dict[str, Any], fault: str | None) -> bool:
        writer.write(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/event-stream\r\n\r\n"
        )
        asked = body["max_tokens"]
        sent = asked if fault is None else asked // 2
        for index in range(sent):
            wait_s = self.first_token_s if index == 0 else self.token_s
            if wait_s:
                await asyncio.sleep(wait_s)
            self._write_event(
                writer, json.dumps({"choices": [{"index": 0, "text": "a "}]}, separators=(",", ":"))
            )
            await writer.drain()
        if fault == "break":
            return False
        if fault == "error":
            self._write_event(writer, '{"error":{"message":"the engine restarted"}}')
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": sent}
        self._write_event(writer, json.dumps({"choices": [], "usage": usage}))
        self._write_event(writer, "[DONE]")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    def _write_event(self, writer: asyncio.StreamWriter, payload: str) -> None:
        event = f"data: {payload}\n\n".encode()
        writer.write(b"%x\r\n%s\r\n" % (len(event), event))


@asynccontextmanager
async def serving(fake: FakeServer) -> AsyncIterator[FakeServer]:
    """The server on a free port of loopback, its `url` filled in."""
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    connections = asyncio.all_tasks()
    try:
        yield fake
    finally:
        server.close()
        # One that was accepted just now becomes a task of its own; the loop ends behind the last of them.
        while left := asyncio.all_tasks() - connections - {asyncio.current_task()}:
            for task in left:
                task.cancel()
            await asyncio.wait(left, timeout=5.0)
        await asyncio.sleep(0.01)  # in which connections that were closed are lost
