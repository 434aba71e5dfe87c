import asyncio
import pickle
import socket
import struct
import threading
import time
from collections.abc import Iterator

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import link
from runtime.errors import LinkBroken
from runtime.link import MAX_FRAME_BYTES, Frame, FrameReader, FrameWriter, decode, encode, read_frame

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    left, right = socket.socketpair()
    with left, right:
        yield left, right


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=50)
@given(st.dictionaries(st.text(max_size=8), values, max_size=5))
def test_a_frame_arrives_as_it_was_sent(fields: Frame) -> None:
    frame = {**fields, "op": "submit"}
    assert decode(encode(frame)[4:]) == frame


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        pickle.dumps({"op": "submit"}),
        msgpack.packb([1, 2]),
        msgpack.packb({"id": 1}),
        msgpack.packb({"op": 1}),
        msgpack.packb({1: "op"}),
        msgpack.packb({"op": "x", "v": msgpack.ExtType(5, b"x")}),
        msgpack.packb({"op": "x"}) + b"\x00",
    ],
)
def test_rejects_what_is_no_frame(payload: bytes) -> None:
    with pytest.raises(LinkBroken):
        decode(payload)


def test_rejects_a_length_over_the_cap_before_reading_it(pair: Pair) -> None:
    pair[0].sendall(struct.pack(">I", MAX_FRAME_BYTES + 1))
    with pytest.raises(LinkBroken, match=str(MAX_FRAME_BYTES)):
        FrameReader(pair[1]).poll(5.0)


def test_pickle_bytes_on_the_socket_close_the_link(pair: Pair) -> None:
    pair[0].sendall(pickle.dumps({"op": "submit"}))
    with pytest.raises(LinkBroken):
        FrameReader(pair[1]).poll(5.0)


def test_reader_hands_out_whole_frames_in_order_however_the_bytes_are_cut(pair: Pair) -> None:
    frames = [{"op": "cancel", "id": "x" * size} for size in (0, 1, 300, 70_000)]
    stream = b"".join(encode(frame) for frame in frames)

    def write() -> None:
        for start in range(0, len(stream), 997):
            pair[0].sendall(stream[start : start + 997])
        pair[0].shutdown(socket.SHUT_WR)

    writer = threading.Thread(target=write)
    writer.start()
    reader, got = FrameReader(pair[1]), []
    with pytest.raises(LinkBroken, match="closed"):
        while True:
            got += reader.poll(None)
    writer.join()
    assert got == frames


def test_poll_without_bytes_returns_nothing_at_once(pair: Pair) -> None:
    assert FrameReader(pair[1]).poll(0.0) == []


def test_frames_sent_before_the_close_are_still_handed_out(pair: Pair) -> None:
    pair[0].sendall(encode({"op": "stop"}))
    pair[0].close()
    reader = FrameReader(pair[1])
    assert reader.poll(5.0) == [{"op": "stop"}]
    with pytest.raises(LinkBroken):
        reader.poll(5.0)


def read_all(data: bytes) -> list[Frame]:
    async def run() -> list[Frame]:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        frames = []
        while (frame := await read_frame(reader)) is not None:
            frames.append(frame)
        return frames

    return asyncio.run(run())


def test_async_reader_ends_between_frames_and_breaks_inside_one() -> None:
    whole = encode({"op": "ready"}) + encode({"op": "gauge", "at": 1.5})
    assert read_all(whole) == [{"op": "ready"}, {"op": "gauge", "at": 1.5}]
    with pytest.raises(LinkBroken, match="middle"):
        read_all(whole[:-1])
    with pytest.raises(LinkBroken):
        read_all(struct.pack(">I", MAX_FRAME_BYTES + 1))


def test_a_writer_does_not_wait_for_who_does_not_read_and_nothing_is_lost(pair: Pair) -> None:
    writer, reader = FrameWriter(pair[0]), FrameReader(pair[1])
    frames = [{"op": "tokens", "number": number, "items": [0] * 50_000} for number in range(40)]
    for frame in frames:
        writer.send(frame)
    assert not writer.flush(), "more than the socket has room for"
    arrived: list[Frame] = []
    while len(arrived) < len(frames):
        writer.flush()
        arrived += reader.poll(0.0)
    assert arrived == frames and writer.flush()


def test_a_writer_waits_where_it_would_hold_too_much(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "MAX_HELD_BYTES", 100_000)
    writer, arrived = FrameWriter(pair[0]), []

    def read() -> None:
        reader = FrameReader(pair[1])
        while len(arrived) < 50:
            arrived.extend(reader.poll(1.0))

    reading = threading.Timer(0.05, read)
    reading.start()
    for number in range(50):
        writer.send({"op": "tokens", "number": number, "items": [0] * 50_000})
    while not writer.flush():  # as an engine does until nothing is left
        time.sleep(0.001)
    reading.join(30)
    assert [frame["number"] for frame in arrived] == list(range(50))
