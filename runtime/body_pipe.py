"""The body of one streamed response on its way to the socket, past the layers that would only pass it on."""

import weakref
from typing import Any

BODY_PIPE = "runtime.body_pipe"  # its key in an ASGI scope


class BodyPipe:
    """Writes pieces of a body as ASGI's `send` would, at once and for a quarter of its time: of a streamed token that
    is most of what our own code takes. uvicorn's cycle stays the one that begins and ends the response."""

    def __init__(self, cycle: Any) -> None:
        # Weak, as the cycle holds the scope that holds this: in a circle, all of it would stay until a collection.
        self._cycle = weakref.ref(cycle)
        self._flow, self._transport = cycle.flow, cycle.transport

    @property
    def is_open(self) -> bool:
        """Whether a piece may be written now. If not, it has to wait or is framed otherwise: `send` is to do it."""
        cycle = self._cycle()
        if cycle is None:
            return False
        is_under_way = cycle.chunked_encoding and not cycle.response_complete and not cycle.disconnected
        return bool(is_under_way and not self._flow.write_paused)

    def write(self, body: bytes) -> None:
        """Sends a piece, which is not empty and not the last. Only while `is_open`."""
        self._transport.write(b"%x\r\n%b\r\n" % (len(body), body))
