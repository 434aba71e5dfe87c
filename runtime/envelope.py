"""Around every answer: a request id, and a plain 500 where our own code failed. Bytes pass through untouched."""

import json
import logging
import re
import traceback
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

_CLIENT_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class Envelope:
    """ASGI middleware; `internal_error` is the body of a 500.

    Logs of a failure hold the place in our code and the type of the exception, never its text, which may quote a
    client's prompt.
    """

    def __init__(self, app: ASGIApp, internal_error: Mapping[str, Any]) -> None:
        self._app, self._internal_error = app, internal_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope["request_id"] = request_id.decode()
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            place = "".join(traceback.format_tb(error.__traceback__)[-4:])
            log.error("request %s failed with %s at\n%s", request_id.decode(), type(error).__name__, place)
            if not started:
                body = json.dumps(self._internal_error).encode()
                headers = [(b"content-type", b"application/json")]
                await send_with_id({"type": "http.response.start", "status": 500, "headers": headers})
                await send_with_id({"type": "http.response.body", "body": body})


def _request_id(scope: Scope) -> bytes:
    """The client's own id where it is a plain word, else a new one."""
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given if _CLIENT_ID.fullmatch(given) else uuid.uuid4().hex.encode()
