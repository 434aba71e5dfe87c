"""Keys at the door: who may call, checked before a route is looked for, so that a route that is added is closed too."""

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from runtime.errors import Unauthorized

CLIENT_KEY_VARIABLE = "TUNER_API_KEY"
MIN_KEY_CHARS = 16
# What a load balancer asks, which has no key. They tell one word and nothing of the requests.
OPEN_TO_ALL = frozenset({"/health", "/ready", "/ping"})


class KeyGuard:
    """ASGI middleware: 401 with `refusal` as its body without `Authorization: Bearer KEY`, save for `public` paths."""

    def __init__(
        self, app: ASGIApp, key: str, refusal: Mapping[str, Any], public: frozenset[str] = frozenset()
    ) -> None:
        self._app, self._digest, self._refusal, self._public = app, _digest(key.encode()), refusal, public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self._public and not self._is_allowed(scope):
            answer = JSONResponse(self._refusal, 401, {"www-authenticate": "Bearer"})
            await answer(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1 or not given[0].startswith(b"Bearer "):
            return False
        return hmac.compare_digest(_digest(given[0].removeprefix(b"Bearer ")), self._digest)


def _digest(key: bytes) -> bytes:
    """Digests are of one length, so that comparing them takes one time."""
    return hashlib.sha256(key).digest()


def client_key(path: Path | None, environ: Mapping[str, str] | None = None) -> str | None:
    """The key that clients must bring: the file's first line, else TUNER_API_KEY; None where neither is given.

    There is no flag for the key itself: every user of the machine can read a command line.

    Raises:
        Unauthorized: the file cannot be read, or the key is too short to be one.
    """
    place = f"{CLIENT_KEY_VARIABLE} in the environment"
    key = (os.environ if environ is None else environ).get(CLIENT_KEY_VARIABLE) or None
    if path is not None:
        place = str(path)
        try:
            key = (path.read_text().splitlines() or [""])[0].strip()
        except (OSError, UnicodeDecodeError) as error:
            raise Unauthorized(f"The client key cannot be read from {path}: {error}.") from None
    if key is not None and (len(key) < MIN_KEY_CHARS or not key.isascii() or not key.isprintable()):
        raise Unauthorized(
            f"The client key of {place} must have at least {MIN_KEY_CHARS} printable ASCII characters, but has "
            f"{len(key)}. `openssl rand -hex 32` makes one."
        )
    return key


def check_exposure(host: str, key: str | None, is_insecure: bool) -> None:
    """Raises Unauthorized where other machines could use the server and nothing asks them who they are."""
    if key is not None or is_insecure or is_loopback(host):
        return
    raise Unauthorized(
        f"Other machines can reach {host}, so clients must bring a key, but none is given. Put one into a file for "
        f"`--api-key-file` (`server.api_key_file`) or into {CLIENT_KEY_VARIABLE}, listen on 127.0.0.1, or say "
        "`--insecure` (`server.insecure: true`) where something before this server asks for keys."
    )


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
