"""The answers of the OpenAI API: objects for whole answers, bytes for streamed ones, one body for every error."""

import json
from collections.abc import Sequence
from json.encoder import encode_basestring_ascii
from typing import Any, Literal, NamedTuple

from runtime.errors import (
    EngineNotReady,
    InvalidRequest,
    QueueFull,
    RequestTimedOut,
    RequestTooLarge,
    RuntimeFault,
    UnknownModel,
)

Kind = Literal["chat", "completion"]
PromptLogprobs = list[dict[str, Any] | None]  # an entry a token, by token id; None for the first

DONE = b"data: [DONE]\n\n"
_PREFIX = {"chat": "chatcmpl-", "completion": "cmpl-"}
_WHOLE = {"chat": "chat.completion", "completion": "text_completion"}
_CHUNK = {"chat": "chat.completion.chunk", "completion": "text_completion"}


class Usage(NamedTuple):
    prompt_tokens: int
    completion_tokens: int

    def body(self) -> dict[str, int]:
        return {**self._asdict(), "total_tokens": self.prompt_tokens + self.completion_tokens}


def whole(
    kind: Kind,
    request_id: str,
    created: int,
    model: str,
    choices: list[dict[str, Any]],
    usage: Usage,
    prompt_logprobs: Sequence[PromptLogprobs] = (),
) -> dict[str, Any]:
    """`prompt_logprobs`: of each choice, where they were asked for. A chat has one prompt and tells them once, beside
    its choices, as vLLM does."""
    body = {
        "id": _PREFIX[kind] + request_id, "object": _WHOLE[kind], "created": created, "model": model,
        "choices": choices, "usage": usage.body(),
    }  # fmt: skip
    if prompt_logprobs and kind == "chat":
        body["prompt_logprobs"] = prompt_logprobs[0]
    elif prompt_logprobs:
        body["choices"] = [
            {**told, "prompt_logprobs": logprobs}
            for told, logprobs in zip(choices, prompt_logprobs, strict=True)
        ]
    return body


def choice(
    kind: Kind, index: int, text: str, finish_reason: str, logprobs: dict[str, Any] | None
) -> dict[str, Any]:
    told = {"message": {"role": "assistant", "content": text}} if kind == "chat" else {"text": text}
    return {"index": index, **told, "logprobs": logprobs, "finish_reason": finish_reason}


class ChunkWriter:
    """Writes the server-sent events of one answer. What never changes is encoded once."""

    def __init__(self, kind: Kind, request_id: str, created: int, model: str, include_usage: bool) -> None:
        self._kind = kind
        head = {"id": _PREFIX[kind] + request_id, "object": _CHUNK[kind], "created": created, "model": model}
        self._head = b"data: " + json.dumps(head)[:-1].encode() + b', "choices": ['
        self._text_key = b', "delta": {"content": ' if kind == "chat" else b', "text": '
        self._text_end = b"}" if kind == "chat" else b""
        self._usage = b', "usage": null' if include_usage else b""
        self._around: dict[int, tuple[bytes, bytes]] = {}  # by choice, what its text is put between

    def more(self, index: int, text: str) -> bytes:
        """`text` in the middle of an answer, where no logprobs were asked for."""
        around = self._around.get(index)
        if around is None:
            before, _, after = self.text(index, "", None).rpartition(b'""')
            around = self._around[index] = before, after
        return around[0] + encode_basestring_ascii(text).encode() + around[1]

    def role(self, index: int) -> bytes:
        """The first event of a chat answer; a completion has none."""
        if self._kind != "chat":
            return b""
        delta = b'"delta": {"role": "assistant", "content": ""}'
        return self._event(b'{"index": %d, %b, "logprobs": null, "finish_reason": null}' % (index, delta))

    def text(
        self, index: int, text: str, finish_reason: str | None, logprobs: dict[str, Any] | None = None
    ) -> bytes:
        told = b'{"index": %d%b%b%b, "logprobs": %b, "finish_reason": %b}' % (
            index, self._text_key, json.dumps(text).encode(), self._text_end,
            b"null" if logprobs is None else json.dumps(logprobs).encode(), json.dumps(finish_reason).encode(),
        )  # fmt: skip
        return self._event(told)

    def usage(self, usage: Usage) -> bytes:
        """The last event where usage was asked for; its `choices` are empty."""
        return self._head + b'], "usage": ' + json.dumps(usage.body()).encode() + b"}\n\n"

    def _event(self, choice: bytes) -> bytes:
        return self._head + choice + b"]" + self._usage + b"}\n\n"


class ErrorAnswer(NamedTuple):
    status: int
    body: dict[str, Any]
    headers: dict[str, str]

    def event(self) -> bytes:
        """The same error inside a stream that has begun."""
        return b"data: " + json.dumps(self.body).encode() + b"\n\n"


def error_body(message: str, type: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def error_answer(error: RuntimeFault) -> ErrorAnswer:
    """What a client is told: our own sentence, never a path or a traceback."""
    message = str(error)
    match error:
        case InvalidRequest():
            return ErrorAnswer(400, error_body(message, "invalid_request_error", error.param), {})
        case UnknownModel():
            return ErrorAnswer(
                404, error_body(message, "invalid_request_error", "model", "model_not_found"), {}
            )
        case RequestTooLarge():
            body = error_body(message, "invalid_request_error", None, "body_too_large")
            return ErrorAnswer(413, body, {"connection": "close"})
        case QueueFull():
            body = error_body(message, "rate_limit_error", None, "queue_full")
            return ErrorAnswer(429, body, {"retry-after": str(error.retry_after_s)})
        case EngineNotReady():
            body = error_body(message, "service_unavailable", None, "not_ready")
            return ErrorAnswer(503, body, {"retry-after": "10"})
        case RequestTimedOut():
            return ErrorAnswer(504, error_body(message, "timeout_error", None, "timeout"), {})
    return ErrorAnswer(500, error_body(message, "server_error", None, getattr(error, "kind", None)), {})
