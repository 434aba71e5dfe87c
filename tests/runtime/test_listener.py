import asyncio
import gc
import socket
import struct
import weakref
from typing import Any

import pytest

from runtime import listener
from runtime.errors import AddressInUse
from runtime.listener import Listener, bind, url_of


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"hi"})


async def talk(request: bytes) -> bytes:
    """Returns what the server says until it closes the connection."""
    with bind("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        serving = Listener(hello, sock)
        running = asyncio.create_task(serving.run_until_stopped())
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        answer = await asyncio.wait_for(reader.read(), 30.0)
        writer.close()
        serving.should_exit = True
        await running
        return answer


def test_a_header_that_never_ends_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "HEADER_LIMIT_S", 0.05)
    assert asyncio.run(talk(b"GET / HTTP/1.1\r\nhost: x\r\n")) == b""
    assert asyncio.run(talk(b"")) == b""


def test_the_second_request_of_a_connection_is_limited_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "HEADER_LIMIT_S", 0.2)
    answer = asyncio.run(talk(b"GET / HTTP/1.1\r\nhost: x\r\n\r\nGET / HTTP/1.1\r\nhost:"))
    assert answer.count(b"HTTP/1.1 200") == 1


def test_a_connection_with_both_lengths_is_refused() -> None:
    request = (
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
    )
    assert asyncio.run(talk(request)).startswith(b"HTTP/1.1 400")


async def is_kept_after_a_reset() -> bool:
    """Whether a connection is still in memory once its client broke it off between two requests."""
    with bind("127.0.0.1", 0) as sock:
        serving = Listener(hello, sock)
        running = asyncio.create_task(serving.run_until_stopped())
        reader, writer = await asyncio.open_connection("127.0.0.1", sock.getsockname()[1])
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await asyncio.wait_for(reader.readuntil(b"hi"), 30.0)
        kept = weakref.ref(next(iter(serving.server_state.connections)))
        own = writer.get_extra_info("socket")
        own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()
        async with asyncio.timeout(30.0):
            while serving.server_state.connections:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0)  # the transport lets go of it after it was told
        gc.collect()
        is_kept = kept() is not None
        serving.should_exit = True
        await running
        return is_kept


def test_nothing_is_kept_of_a_connection_that_was_reset() -> None:
    assert not asyncio.run(is_kept_after_a_reset())


def test_an_address_that_is_not_ours_is_one_clear_error() -> None:
    with pytest.raises(AddressInUse, match=r"192\.0\.2\.1:0"):
        bind("192.0.2.1", 0)


def test_the_address_told_is_one_that_works_from_here() -> None:
    with bind("0.0.0.0", 0) as sock:
        assert url_of(sock).startswith("http://127.0.0.1:")
