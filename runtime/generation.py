"""One answer on its way to one client: tokens become text, text becomes a body or a stream of events."""

import asyncio
import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from runtime.answers import DONE, ChunkWriter, Kind, PromptLogprobs, Usage, choice, error_answer, whole
from runtime.body_pipe import BODY_PIPE, BodyPipe
from runtime.detokenize import Decode, Detokenizer, StopMatcher
from runtime.errors import RuntimeFault
from runtime.exchange import Exchange, Wake
from runtime.front_end import FrontEnd
from runtime.logprob_writer import LogprobWriter, Written, together

SLOW_READER_S = 30.0  # a client that takes no byte for so long is taken to be gone


class Delta(NamedTuple):
    choice_index: int
    text: str
    finish_reason: str | None
    logprobs: list[Written]  # of the tokens that this text is made of; empty where nobody asked


class Echo(NamedTuple):
    """The prompt, which comes in front of a completion's text, with the logprobs of its tokens where asked for."""

    text: str
    num_logprobs: int | None = None
    is_all: bool = False  # nothing is to be generated: the one token that the engine draws is left out


class Choice:
    """One exchange's text. `stopped` is called when a stop string ends it before the engine does.

    Text of the first `min_tokens` tokens is not searched for stop strings.
    """

    def __init__(
        self,
        index: int,
        exchange: Exchange,
        decode: Decode,
        stops: list[str],
        stopped: Callable[[Exchange], None],
        min_tokens: int = 0,
        writer: LogprobWriter | None = None,
        echo: Echo | None = None,
    ) -> None:
        self.index, self.exchange = index, exchange
        self._num_unstoppable, self._writer, self._echo = min_tokens, writer, echo
        self._is_echoed = echo is None
        self._num_behind = 0  # tokens that came together with the one that a stop string ended at
        self.finish_reason: str | None = None
        self._detokenizer, self._matcher, self._stopped = Detokenizer(decode), StopMatcher(stops), stopped
        asked = exchange.sampling is not None and exchange.sampling.params.num_logprobs is not None
        # Nothing is looked for in the text and nothing told beside it, which is so of most answers.
        self.is_plain = not stops and echo is None and not asked

    def advance(self) -> Delta | None:
        """Returns what is new, or None.

        Raises:
            RuntimeFault: the exchange ended with this error.
        """
        if self.is_plain and self.exchange.finish is None:
            text = self.text()
            return Delta(self.index, text, None, []) if text else None
        tokens, logprobs, finish = self.exchange.take()
        text, told = self._echoed() if tokens else ("", [])
        num_echoed = len(told)
        if self._echo is not None and self._echo.is_all:
            tokens, logprobs = [], []
        told += self._written(tokens, logprobs)
        last = len(tokens) - 1 if finish is not None and finish.reason == "stop" else None
        for position, token in enumerate(tokens):
            ends_it = position == last and self._is_stop_token(token)
            piece = "" if ends_it else self._detokenizer.push(token)
            if self._num_unstoppable > 0:
                self._num_unstoppable -= 1
                text += piece
                continue
            matched = self._matcher.push(piece)
            text += matched.text
            if matched.stopped:
                self._stopped(self.exchange)
                self.finish_reason, self._num_behind = "stop", len(tokens) - position - 1
                return Delta(self.index, text, "stop", told[: num_echoed + position + 1])
        if finish is None:
            return Delta(self.index, text, None, told) if text or told else None
        if finish.error is not None:
            raise finish.error
        return self._last(text, finish.reason, told)

    def text(self) -> str:
        """What is new of a plain choice that has not ended."""
        return "".join(map(self._detokenizer.push, self.exchange.take_tokens()))

    @property
    def num_tokens(self) -> int:
        """How many were made for the client."""
        is_all = self._echo is not None and self._echo.is_all
        return 0 if is_all else self.exchange.num_tokens - self._num_behind

    def _echoed(self) -> tuple[str, list[Written]]:
        """The prompt, once, when the first token is there: by then its logprobs are too."""
        if self._is_echoed or self._echo is None:
            return "", []
        self._is_echoed = True
        text, num_logprobs, _ = self._echo
        if self._writer is None or num_logprobs is None:
            return text, []
        exchange = self.exchange
        assert exchange.prompt_ids is not None, "a request with tokens has a prompt"
        return text, self._writer.write_echo(
            text, exchange.prompt_ids, exchange.prompt_logprobs, num_logprobs
        )

    def _written(self, tokens: list[int], logprobs: list[Any]) -> list[Written]:
        if self._writer is None or not logprobs:
            return []
        return [self._writer.write(*pair) for pair in zip(tokens, logprobs, strict=True)]

    def _last(self, text: str, reason: str, told: list[Written]) -> Delta:
        matched = self._matcher.push(self._detokenizer.flush())
        text += matched.text + ("" if matched.stopped else self._matcher.flush())
        self.finish_reason = "stop" if matched.stopped else reason
        return Delta(self.index, text, self.finish_reason, told)

    def _is_stop_token(self, token: int) -> bool:
        return self.exchange.sampling is not None and token in self.exchange.sampling.stop_token_ids


@dataclass
class Answer(Response):
    """Sends the answer of one call (one choice a prompt) and frees its requests however that ends.

    Headers wait for the first text, so that an error before it has its own status code.
    """

    front: FrontEnd
    kind: Kind
    request_id: str
    created: int
    model: str
    choices: list[Choice]
    wake: Wake
    streamed: bool
    include_usage: bool
    num_answers_a_prompt: int = 1
    tell_prompt: Callable[[Exchange], PromptLogprobs] | None = None  # where its logprobs were asked for

    background = None

    def __post_init__(self) -> None:
        self._unfinished = list(self.choices)
        self._pipe: BodyPipe | None = None
        self._begun: set[int] = set()  # choices whose first event is out
        self._writer = ChunkWriter(self.kind, self.request_id, self.created, self.model, self.include_usage)
        self._is_plain = all(told.is_plain for told in self.choices)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._pipe = scope.get(BODY_PIPE)
        work = asyncio.ensure_future(
            self._stream(send) if self.streamed else self._whole(scope, receive, send)
        )
        gone = asyncio.ensure_future(self._watch(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            self._leave()
            if not work.done():
                work.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        with contextlib.suppress(asyncio.CancelledError):  # the client left in the middle of the answer
            await work

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    def _leave(self) -> None:
        self.wake.instead = None
        for told in self.choices:
            self.front.leave(told.exchange)

    async def _news(self) -> list[Delta]:
        """Waits until something may be new in any choice that has not ended, and returns what is."""
        if self._begun and self._pipe is not None and self._is_plain:
            self.wake.instead = self._write_news
        await self.wake.wait()
        self.wake.instead = None
        self.wake.clear()
        news = [delta for told in self._unfinished if (delta := told.advance()) is not None]
        if any(delta.finish_reason is not None for delta in news):
            self._unfinished = [told for told in self._unfinished if told.finish_reason is None]
        return news

    def _usage(self) -> Usage:
        """A prompt with several answers counts once."""
        exchanges = [told.exchange for told in self.choices]
        prompts = exchanges[:: self.num_answers_a_prompt]
        return Usage(
            sum(len(one.prompt_ids or ()) for one in prompts), sum(told.num_tokens for told in self.choices)
        )

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        texts: dict[int, list[str]] = {told.index: [] for told in self.choices}
        logprobs: dict[int, list[Written]] = {told.index: [] for told in self.choices}
        try:
            while self._unfinished:
                for delta in await self._news():
                    texts[delta.choice_index].append(delta.text)
                    logprobs[delta.choice_index] += delta.logprobs
        except RuntimeFault as error:
            status, body, headers = error_answer(error)
            await JSONResponse(body, status, headers)(scope, receive, send)
            return
        choices = [
            choice(
                self.kind, told.index, "".join(texts[told.index]), told.finish_reason or "stop",
                together(self.kind, logprobs[told.index]),
            )
            for told in self.choices
        ]  # fmt: skip
        tell = self.tell_prompt
        prompts = []
        if tell is not None:  # beside the loop: of long prompts it takes as long as many tokens of others
            prompts = [await asyncio.to_thread(tell, told.exchange) for told in self.choices]
        body = whole(self.kind, self.request_id, self.created, self.model, choices, self._usage(), prompts)
        await JSONResponse(body)(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        try:
            await self._stream_events(send)
        except RuntimeFault as error:
            await self._fail(send, error, bool(self._begun))
        except TimeoutError:
            pass  # a slow reader: returning without an end closes the connection

    async def _stream_events(self, send: Send) -> None:
        while self._unfinished:
            news = await self._news()
            if not news:
                continue
            if not self._begun:
                await _start_stream(send)
            await _send_body(send, b"".join(map(self._event, news)))
        usage = self._writer.usage(self._usage()) if self.include_usage else b""
        await _send_body(send, usage + DONE, more=False)

    def _write_news(self) -> None:
        """What the task does between the first event and the last, without waking it. Where something has ended, or
        the socket is full, the task does it."""
        pipe = self._pipe
        has_ended = [told for told in self._unfinished if told.exchange.finish is not None]
        if has_ended or pipe is None or not pipe.is_open:
            self.wake.rouse()
            return
        events = b""
        for told in self._unfinished:
            if text := told.text():
                events += self._event(Delta(told.index, text, None, []))
        if events:
            pipe.write(events)

    def _event(self, delta: Delta) -> bytes:
        index, text, finish_reason, logprobs = delta
        writer, role = self._writer, b""
        if index not in self._begun:
            self._begun.add(index)
            role = writer.role(index)
        if finish_reason is None and not logprobs:
            return role + writer.more(index, text)
        return role + writer.text(index, text, finish_reason, together(self.kind, logprobs))

    async def _fail(self, send: Send, error: RuntimeFault, begun: bool) -> None:
        answer = error_answer(error)
        if begun:
            await _send_body(send, answer.event() + DONE, more=False)
            return
        headers = [(b"content-type", b"application/json")]
        headers += [(name.encode(), value.encode()) for name, value in answer.headers.items()]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await _send_body(send, json.dumps(answer.body).encode(), more=False)


async def _start_stream(send: Send) -> None:
    headers = [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _send_body(send: Send, body: bytes, more: bool = True) -> None:
    async with asyncio.timeout(SLOW_READER_S):
        await send({"type": "http.response.body", "body": body, "more_body": more})
