import asyncio
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tuner.fake_completions import FakeServer, serving
from tuner.errors import SettingsError
from tuner.load.stream_client import Reply, StreamClient, Target

EVENTS = [
    b'data: {"choices":[{"index":0,"text":"one"}]}\n\n',
    b'data: {"choices":[{"index":0,"text":"two \\n"}]}\n\n',
    b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":7}}\n\n',
    b"data: [DONE]\n\n",
]
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunked(parts: list[bytes]) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])


@given(cuts=st.lists(st.integers(1, 400), max_size=30), joined=st.booleans(), crlf=st.booleans())
def test_reads_the_same_however_the_bytes_are_cut(cuts: list[int], joined: bool, crlf: bool) -> None:
    events = [event.replace(b"\n\n", b"\r\n\r\n") for event in EVENTS] if crlf else EVENTS
    wire = CHUNKED + chunked([b"".join(events)] if joined else events)
    edges = [0, *sorted({cut for cut in cuts if cut < len(wire)}), len(wire)]
    reply = Reply()
    for at, (begin, end) in enumerate(pairwise(edges)):
        assert not reply.complete
        reply.feed(wire[begin:end], float(at))
    assert (reply.status, reply.complete, reply.finished, reply.keep_alive) == (200, True, True, True)
    assert (reply.num_events, reply.output_tokens, reply.error) == (2, 7, None)
    assert reply.first_token_at is not None and reply.last_token_at is not None
    assert reply.first_token_at <= reply.last_token_at


def test_counts_events_where_the_server_sends_no_usage() -> None:
    reply = Reply()
    reply.feed(CHUNKED + chunked([*EVENTS[:2], EVENTS[3]]), 1.0)
    assert reply.output_tokens == 2


def test_keeps_the_text_of_an_error_response() -> None:
    reply = Reply()
    reply.feed(b"HTTP/1.1 429 Too Many\r\nContent-Length: 9\r\nConnection: close\r\n\r\ntry later", 1.0)
    assert (reply.status, reply.complete, reply.keep_alive, reply.error) == (429, True, False, "try later")


@given(noise=st.binary(max_size=200))
def test_noise_is_refused_or_waited_for_but_never_taken_for_an_answer(noise: bytes) -> None:
    reply = Reply()
    try:
        reply.feed(noise, 0.0)
    except ValueError:
        return
    assert not reply.finished


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "127.0.0.1:8000", "http://127.0.0.1:8000/v1/"])
def test_address_is_understood_with_and_without_version(url: str) -> None:
    target = Target.of(url)
    assert (target.host, target.port, target.prefix) == ("127.0.0.1", 8000, "/v1")


def test_address_of_another_protocol_is_refused() -> None:
    with pytest.raises(SettingsError, match="ftp"):
        Target.of("ftp://somewhere")


def test_connection_is_used_again_and_replaced_when_the_server_closed_it() -> None:
    async def ask(client: StreamClient) -> Reply:
        reply = Reply()
        await client.complete(b'{"prompt":[1],"max_tokens":3}', reply)
        return reply

    async def scenario() -> int:
        async with serving(FakeServer()) as fake:
            client = StreamClient(Target.of(fake.url), asyncio.get_running_loop().time)
            assert [(await ask(client)).output_tokens for _ in range(3)] == [3, 3, 3]
            assert fake.num_connections == 1
            fake.fault, fake.fault_from = "close", 3
            with pytest.raises(ConnectionError):
                await ask(client)  # on the old connection, then once more on a new one
            fake.fault = None
            assert (await ask(client)).output_tokens == 3
            client.close()
            return len(fake.bodies)

    assert asyncio.run(scenario()) == 6


def test_key_is_sent_as_a_bearer() -> None:
    request = Target.of("http://h:1", api_key="secret").post("/completions", b"{}")
    assert b"Authorization: Bearer secret\r\n" in request
    assert request.endswith(b"\r\n\r\n{}")


def test_a_flood_without_an_event_is_refused() -> None:
    reply = Reply()
    reply.feed(b"HTTP/1.1 200 OK\r\n\r\n", 0.0)
    block = random.Random(0).randbytes(2**20).replace(b"\n", b" ")
    with pytest.raises(ValueError, match="more than"):
        for _ in range(8):
            reply.feed(block, 0.0)
