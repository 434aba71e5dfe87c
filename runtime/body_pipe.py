"""The body of one streamed response on its way to the socket, past the layers that would only pass it on."""

from typing import Any

BODY_PIPE = "runtime.body_pipe"  # its key in an ASGI scope


class BodyPipe:
    """Writes pieces of a body as ASGI's `send` would, at once and for a quarter of its time: of a streamed token that
    is most of what our own code takes. uvicorn's cycle stays the one that begins and ends the response."""

    def __init__(self, cycle: Any) -> None:
        self._cycle, self._flow, self._transport = cycle, cycle.flow, cycle.transport

    def write(self, body: bytes) -> bool:
        """Sends a piece that is neither the first nor the last. False, and nothing sent, where that has to wait or the
        body has another framing: then `send` does it."""
        cycle = self._cycle
        if self._flow.write_paused or cycle.disconnected or cycle.response_complete or not cycle.chunked_encoding:
            return False
        self._transport.write(b"%x\r\n%b\r\n" % (len(body), body))
        return True
