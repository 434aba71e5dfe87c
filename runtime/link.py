"""The link between the front end and the engine: frames on a Unix socket, a length and a msgpack map.

A frame is 4 bytes of big-endian length, then one msgpack map whose key `op` names it. Never pickle: what
arrives is data, checked for size and shape before anything looks at it.

front end -> engine: hello, submit, cancel, control, stop.
engine -> front end: ready, prompt_logprobs, tokens, step, failed, event, gauge, reply.

The front end listens and the engine connects. The first frame is `hello`; its `config` holds the knobs the
front end insists on (the operator's at first start, the whole champion after a restart) and the engine fills
the others with its own default. `ready` answers once the model is loaded and warm. Submissions are sent after
`ready` only, so an engine may forget everything when it restarts.
"""

import asyncio
import select
import socket
import struct
from collections.abc import Mapping
from typing import Any

import msgpack

from runtime.errors import LinkBroken

MAX_FRAME_BYTES = 64 * 2**20
_LENGTH = struct.Struct(">I")
MAX_HELD_BYTES = 64 * 2**20
_READ_BYTES = 256 * 1024

Frame = dict[str, Any]


def encode(frame: Mapping[str, Any]) -> bytes:
    """Returns the frame as it goes over the socket.

    Raises:
        LinkBroken: it is larger than MAX_FRAME_BYTES.
    """
    payload = msgpack.packb(frame, use_bin_type=True)
    if len(payload) > MAX_FRAME_BYTES:
        raise LinkBroken(
            f"A frame must be at most {MAX_FRAME_BYTES} bytes, but {frame.get('op')} has {len(payload)}."
        )
    return _LENGTH.pack(len(payload)) + payload


def decode(payload: bytes) -> Frame:
    """Returns the map inside one frame (without its length).

    Raises:
        LinkBroken: not msgpack, not a map, or without a text `op`.
    """
    try:
        frame = msgpack.unpackb(payload, raw=False, strict_map_key=True, ext_hook=_refuse_extension)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise LinkBroken(
            f"A frame must be one msgpack map, but {len(payload)} bytes are not: {error}."
        ) from None
    if not isinstance(frame, dict) or not isinstance(frame.get("op"), str):
        raise LinkBroken(f"A frame must be a map with a text `op`, but got a {type(frame).__name__}.")
    return frame


def _refuse_extension(code: int, data: bytes) -> Any:
    raise ValueError(f"extension type {code} is not part of the link")


def _checked_length(header: bytes) -> int:
    (length,) = _LENGTH.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise LinkBroken(f"A frame must be at most {MAX_FRAME_BYTES} bytes, but {length} were announced.")
    return int(length)


async def read_frame(reader: asyncio.StreamReader) -> Frame | None:
    """Returns the next frame, or None when the other side closed between two frames.

    Raises:
        LinkBroken: malformed, too large, or closed in the middle of a frame.
    """
    try:
        header = await reader.readexactly(_LENGTH.size)
        return decode(await reader.readexactly(_checked_length(header)))
    except asyncio.IncompleteReadError as error:
        if not error.partial:
            return None
        raise LinkBroken("The link closed in the middle of a frame.") from None
    except ConnectionError:
        return None


class FrameReader:
    """Takes frames from a connected socket without blocking longer than asked (the engine's side).

    The socket may be blocking; `poll` waits with poll(2) and reads only what is there.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()
        self._poller = select.poll()
        self._poller.register(sock, select.POLLIN)

    def poll(self, timeout_s: float | None = 0.0) -> list[Frame]:
        """Returns the whole frames that have arrived; waits for bytes at most `timeout_s` (None: for ever).

        Returns an empty list when the time passed or only a part of a frame is here.

        Raises:
            LinkBroken: malformed or too large, or the other side closed and nothing is left to hand out.
        """
        closed = False
        wait_ms = None if timeout_s is None else max(0, int(timeout_s * 1000 + 0.999))
        while self._poller.poll(wait_ms):
            try:
                chunk = self._sock.recv(_READ_BYTES)
            except BlockingIOError:
                break
            except ConnectionError:
                chunk = b""
            if not chunk:
                closed = True
                break
            self._buffer += chunk
            wait_ms = 0
            if len(self._buffer) > 2 * _READ_BYTES:
                break
        frames = self._whole_frames()
        if closed and not frames:
            raise LinkBroken("The other side closed the link.")
        return frames

    def _whole_frames(self) -> list[Frame]:
        frames, start, end = [], 0, len(self._buffer)
        while end - start >= _LENGTH.size:
            body = start + _LENGTH.size
            length = _checked_length(bytes(self._buffer[start:body]))
            if end - body < length:
                break
            frames.append(decode(bytes(self._buffer[body : body + length])))
            start = body + length
        del self._buffer[:start]
        return frames


class FrameWriter:
    """Sends frames over a connected socket, and never waits for who reads them (the engine's side).

    What the socket has no room for is held and goes out first, so that the steps of an engine go on while the front
    end is busy. Only beyond MAX_HELD_BYTES does a sender wait.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._held = bytearray()

    def send(self, frame: Mapping[str, Any]) -> None:
        """Raises LinkBroken for a frame that is too large, and OSError where the other side is gone."""
        encoded = encode(frame)
        if self._held:
            self._held += encoded
            self.flush()
        elif (num := self._send_some(encoded)) < len(encoded):
            self._held += encoded[num:]
        if len(self._held) > MAX_HELD_BYTES:
            self._sock.sendall(self._held)
            self._held.clear()

    def flush(self) -> bool:
        """Sends what is held as far as there is room. Returns whether nothing is held any more. Raises OSError."""
        if self._held:
            del self._held[: self._send_some(self._held)]
        return not self._held

    def _send_some(self, data: bytes | bytearray) -> int:
        """Returns how many bytes there was room for."""
        try:
            return self._sock.send(data, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
