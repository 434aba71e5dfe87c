"""A listening socket and the HTTP server on it; several run in one event loop."""

import asyncio
import contextlib
import errno
import socket
from collections.abc import Generator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from runtime.body_pipe import BODY_PIPE, BodyPipe
from runtime.errors import AddressInUse

HEADER_LIMIT_S = 20.0  # from connecting, or from the first byte of a request, to the end of its header
MAX_HEADER_BYTES = 64 * 1024
KEEP_ALIVE_S = 120


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket bound and listening; port 0 takes a free one.

    Raises:
        AddressInUse: the address is taken, not ours, or not allowed.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(2048)
    except OSError as error:
        sock.close()
        reason = "it is in use" if error.errno == errno.EADDRINUSE else str(error.strerror or error)
        raise AddressInUse(
            f"Cannot listen on {host}:{port}: {reason}. Choose another port or stop what uses it."
        ) from None
    sock.setblocking(False)
    return sock


def url_of(sock: socket.socket) -> str:
    """An address that works from this machine, also where the socket listens on all of them."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Listener(uvicorn.Server):
    """uvicorn without its signal handlers: the process has its own."""

    def __init__(self, app: ASGIApp, sock: socket.socket) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=HeaderLimited,
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=3,
            )
        )
        self._socket = sock

    async def run_until_stopped(self) -> None:
        await self.serve(sockets=[self._socket])

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class HeaderLimited(HttpToolsProtocol):
    """uvicorn's protocol, but a header must be whole in time and of a sensible size."""

    _header_limit: asyncio.TimerHandle | None = None
    _header_bytes = 0
    _in_header = True

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._header_limit = self.loop.call_later(HEADER_LIMIT_S, self._close_late)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_header:
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES:
                self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_header = True
        if self._header_limit is None:
            self._header_limit = self.loop.call_later(HEADER_LIMIT_S, self._close_late)

    def on_headers_complete(self) -> None:
        self._in_header, self._header_bytes = False, 0
        self._forget_limit()
        super().on_headers_complete()
        self.scope[BODY_PIPE] = BodyPipe(self.cycle)

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_limit()
        super().connection_lost(exc)
        # uvicorn leaves this timer to a connection that was reset, and with it all that the connection held: 12 kB
        # a client for KEEP_ALIVE_S.
        self._unset_keepalive_if_required()

    def _forget_limit(self) -> None:
        if self._header_limit is not None:
            self._header_limit.cancel()
            self._header_limit = None

    def _close_late(self) -> None:
        self._header_limit = None
        if not self.transport.is_closing():
            self.transport.close()
