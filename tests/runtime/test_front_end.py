"""Admission and live requests without processes: frames are a list, the engine is whatever a test says."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from runtime import generation
from runtime.body_pipe import BODY_PIPE
from runtime.clock import Clock
from runtime.errors import EngineNotReady, QueueFull, RequestFailed
from runtime.exchange import Exchange, Sampling, Wake
from runtime.front_end import FrontEnd
from runtime.generation import Answer, Choice
from runtime.knobs import EngineConfig
from runtime.link import Frame

GREEDY = Sampling(max_tokens=4)


class Desk:
    """A front end, the frames it sent, and the other end's voice."""

    def __init__(self, **knobs: Any) -> None:
        self.clock = Clock.started_now()
        self.front = FrontEnd(self.clock, request_timeout_s=60.0)
        self.sent: list[Frame] = []
        self.replica = self.front.engine.replicas[0]
        self.replica.send = self.sent.append
        self.config = EngineConfig.of(knobs)

    def engine_ready(self) -> None:
        frame = {"identity": {}, "knobs": [], "version": 3, "config": self.config.values()}
        self.front.engine_ready(self.replica, frame)

    def submit(self, num_prompt_tokens: int = 3) -> Exchange:
        (exchange,) = self.front.open(1, self.clock.now(), True, Wake())
        self.front.submit(exchange, list(range(num_prompt_tokens)), GREEDY)
        return exchange

    def tokens(self, *items: tuple[Exchange, int, str | None]) -> None:
        rows = [[exchange.id, token, reason, self.clock.now(), 0] for exchange, token, reason in items]
        frame = {
            "op": "tokens",
            "at": self.clock.now(),
            "config_id": self.config.config_id,
            "slice_id": None,
            "items": rows,
        }
        self.front.on_frame(self.replica, frame)

    def ops(self) -> list[str]:
        return [frame["op"] for frame in self.sent]


def in_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(test())

    run.__name__ = test.__name__
    return run


@in_loop
async def test_a_submission_carries_its_priority_and_its_salt_however_often_it_is_sent() -> None:
    desk = Desk()
    desk.engine_ready()
    (exchange,) = desk.front.open(1, desk.clock.now(), True, Wake())
    desk.front.submit(exchange, [1, 2], Sampling(4, priority=-3, cache_salt="ada"))
    desk.submit()
    told = [(frame["priority"], frame["cache_salt"]) for frame in desk.sent if frame["op"] == "submit"]
    assert told == [(-3, "ada"), (0, None)]
    assert exchange.submission() == next(frame for frame in desk.sent if frame["op"] == "submit")


@in_loop
async def test_requests_wait_for_the_engine_and_are_submitted_in_order_of_arrival() -> None:
    desk = Desk()
    first, second = desk.submit(), desk.submit()
    assert desk.sent == []
    desk.engine_ready()
    assert [frame["id"] for frame in desk.sent] == [first.id, second.id]
    assert desk.sent[0]["arrived_at"] == first.arrived_at


@in_loop
async def test_after_an_engine_is_lost_only_requests_without_a_token_come_again() -> None:
    desk = Desk()
    desk.engine_ready()
    begun, waiting = desk.submit(), desk.submit()
    desk.tokens((begun, 5, None))
    desk.sent.clear()
    desk.front.engine_lost(desk.replica, "restarting")
    assert isinstance(begun.take().finish.error, RequestFailed)  # type: ignore[union-attr]
    desk.engine_ready()
    assert [(frame["id"], frame["arrived_at"]) for frame in desk.sent] == [(waiting.id, waiting.arrived_at)]


@in_loop
async def test_a_prompt_scored_by_two_engines_is_told_once() -> None:
    desk = Desk()
    desk.engine_ready()
    exchange = desk.submit()
    pieces = [("first half", [[-1.0, 1, []]]), ("whole", [[-1.5, 1, []], [-2.0, 3, []]])]
    for _, logprobs in pieces:
        desk.front.on_frame(
            desk.replica, {"op": "prompt_logprobs", "id": exchange.id, "start": 0, "logprobs": logprobs}
        )
        desk.front.engine_lost(desk.replica, "restarting")
        desk.engine_ready()
    assert exchange.prompt_logprobs == pieces[-1][1]
    desk.front.leave(exchange)
    late = {"op": "prompt_logprobs", "id": exchange.id, "start": 2, "logprobs": [[-3.0, 1, []]]}
    desk.front.on_frame(desk.replica, late)
    assert len(exchange.prompt_logprobs) == 2


@in_loop
async def test_a_request_that_left_while_the_engine_was_away_is_not_submitted() -> None:
    desk = Desk()
    exchange = desk.submit()
    desk.front.leave(exchange)
    desk.engine_ready()
    assert "submit" not in desk.ops()
    assert desk.front.num_queued == 0 and not desk.front.live


@in_loop
async def test_the_cap_counts_requests_without_a_first_token() -> None:
    desk = Desk(max_queued_requests=2)
    desk.engine_ready()
    first, second = desk.submit(), desk.submit()
    with pytest.raises(QueueFull) as error:
        desk.submit()
    assert 1 <= error.value.retry_after_s <= 60
    desk.tokens((first, 1, None))
    desk.submit()
    desk.tokens((second, 1, "stop"))
    assert desk.front.num_queued == 1
    assert desk.front.meter.finished_by_reason == {"rejected": 1, "stop": 1}


@in_loop
async def test_nothing_is_admitted_while_draining_or_given_up() -> None:
    desk = Desk()
    desk.engine_ready()
    desk.front.draining = True
    with pytest.raises(EngineNotReady):
        desk.submit()
    desk.front.draining = False
    waiting = desk.submit()
    desk.front.engine_given_up(desk.replica)
    assert isinstance(waiting.take().finish.error, EngineNotReady)  # type: ignore[union-attr]
    with pytest.raises(EngineNotReady):
        desk.submit()


@in_loop
async def test_one_failed_request_leaves_the_others_alone() -> None:
    desk = Desk()
    desk.engine_ready()
    bad, good = desk.submit(), desk.submit()
    failed = {"op": "failed", "id": bad.id, "kind": "nan_logits", "message": "at /home/x/model.py"}
    desk.front.on_frame(desk.replica, failed)
    error = bad.take().finish.error  # type: ignore[union-attr]
    assert isinstance(error, RequestFailed) and error.kind == "nan_logits" and "/home" not in str(error)
    desk.tokens((good, 7, "length"))
    assert good.take().finish.reason == "length"  # type: ignore[union-attr]
    assert desk.front.meter.errors_by_kind == {"nan_logits": 1}


@in_loop
async def test_tokens_of_a_request_that_left_are_not_delivered() -> None:
    desk = Desk()
    desk.engine_ready()
    exchange = desk.submit()
    desk.front.leave(exchange)
    desk.tokens((exchange, 7, None))
    assert desk.ops() == ["submit", "cancel"]
    assert exchange.num_tokens == 0


def answer_of(desk: Desk, exchange: Exchange, streamed: bool = True) -> Answer:
    choice = Choice(0, exchange, lambda tokens: "x" * len(tokens), [], desk.front.stop)
    return Answer(desk.front, "chat", exchange.id, 0, "m", [choice], exchange.wake, streamed, False)


@in_loop
async def test_tokens_behind_a_stop_string_are_not_the_clients() -> None:
    desk = Desk()
    desk.engine_ready()
    exchange = desk.submit()
    choice = Choice(
        0, exchange, lambda tokens: "".join(chr(token) for token in tokens), ["c"], desk.front.stop
    )
    desk.tokens((exchange, ord("a"), None), (exchange, ord("b"), None), (exchange, ord("c"), None),
                (exchange, ord("d"), None), (exchange, ord("e"), None))  # fmt: skip
    delta = choice.advance()
    assert delta is not None and (delta.text, delta.finish_reason) == ("ab", "stop")
    assert (choice.num_tokens, exchange.num_tokens) == (3, 5)


async def never() -> Any:
    await asyncio.Event().wait()


def test_a_reader_that_takes_nothing_loses_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "SLOW_READER_S", 0.01)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await never()

    async def run() -> None:
        desk = Desk()
        desk.engine_ready()
        exchange = desk.submit()
        desk.tokens((exchange, 7, None))
        await answer_of(desk, exchange)({"type": "http"}, never, send)
        assert desk.ops() == ["submit", "cancel"]
        assert not desk.front.live

    asyncio.run(run())


def test_a_disconnect_cancels_before_anything_else_is_sent() -> None:
    async def run() -> None:
        desk = Desk()
        desk.engine_ready()
        exchange = desk.submit()

        async def receive() -> Any:
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            raise AssertionError("nothing is sent to a client that left")

        await answer_of(desk, exchange, streamed=False)({"type": "http"}, receive, send)
        assert desk.ops() == ["submit", "cancel"]

    asyncio.run(run())


class Pipe:
    """As the one to a socket; `bodies` is what was written to either."""

    def __init__(self, bodies: list[bytes]) -> None:
        self.bodies, self.is_open, self.num_written = bodies, True, 0

    def write(self, body: bytes) -> None:
        self.bodies.append(body)
        self.num_written += 1


async def stream_of(desk: Desk, pipe: Pipe | None, bodies: list[bytes]) -> str:
    """What a client reads of six tokens, which come one by one. `pipe` is full for the third to the fourth of them."""

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            bodies.append(message["body"])

    exchange = desk.submit()
    answer = answer_of(desk, exchange)
    scope = {"type": "http"} if pipe is None else {"type": "http", BODY_PIPE: pipe}
    answering = asyncio.create_task(answer(scope, never, send))
    for number in range(6):
        if pipe is not None:
            pipe.is_open = number not in (2, 3)
        desk.tokens((exchange, number, "length" if number == 5 else None))
        for _ in range(4):
            await asyncio.sleep(0)
    await answering
    return b"".join(bodies).decode().replace(exchange.id, "id")


@in_loop
async def test_a_stream_is_the_same_past_the_layers_as_through_them() -> None:
    desk, bodies = Desk(), [[], []]  # type: tuple[Desk, list[list[bytes]]]
    desk.engine_ready()
    pipe = Pipe(bodies[0])
    told = await stream_of(desk, pipe, bodies[0])
    assert told == await stream_of(desk, None, bodies[1]) and told.count("data: ") == 8
    assert pipe.num_written == 2, "all but the first, the last, and those that found the socket full"
    assert not desk.front.live


@in_loop
async def test_tokens_of_a_stream_are_gathered_after_the_first() -> None:
    desk = Desk()
    desk.engine_ready()
    gathering, watched = desk.submit(), desk.submit()
    gathering.gathers = True
    woken: list[tuple[bool, bool]] = []
    for number in range(6):
        items = [[one.id, number, "length" if number == 5 else None, 0.0, 0] for one in (gathering, watched)]
        frame = {"op": "tokens", "at": 0.1 * number, "config_id": "c", "slice_id": None, "items": items}
        desk.front.on_frame(desk.replica, {**frame, "stream_interval": 3})
        woken.append((gathering.wake.is_set(), watched.wake.is_set()))
        for one in (gathering, watched):
            if one.wake.is_set():
                one.wake.clear()
                one.take()
    assert [one for one, _ in woken] == [True, False, False, True, False, True]
    assert all(one for _, one in woken), "where a stop string is looked for, every token is looked at"
