"""The daemon's own API on loopback: what it is doing, and a person's wishes. Both ends of it live here.

Two keys stand in the data folder, each 0600: `viewer.key` may look, `daemon.key` (the operator's) may also act.
Wishes are put into the daemon's queue and answered by its next tick, so that the tick stays the only writer.
`daemon.json` tells where the daemon listens. `ROUTES` is all there is; whatever is not in it is refused.
"""

import asyncio
import hmac
import json
import logging
import os
import secrets
import socket
import threading
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import httpx

from tuner.errors import DaemonNotRunning, PortInUse

logger = logging.getLogger(__name__)

Role = Literal["viewer", "operator"]
Scope = dict[str, Any]
Channel = Callable[..., Awaitable[Any]]

ANSWER_TIMEOUT_S = 30.0
MAX_BODY_BYTES = 16 * 1024
ADDRESS_FILE = "daemon.json"
KEY_FILES: dict[Role, str] = {"operator": "daemon.key", "viewer": "viewer.key"}
KEY_FILE = KEY_FILES["operator"]
ACTIONS = ("pause", "resume", "rollback", "approve", "reject")
ROUTES: dict[tuple[str, str], frozenset[Role]] = {
    ("GET", "/status"): frozenset({"viewer", "operator"}),
    ("POST", "/actions/{action}"): frozenset({"operator"}),
}
# A page of another site that has its name resolved to 127.0.0.1 sends that name here; no key helps it, but why listen.
HOSTS = frozenset({"127.0.0.1", "localhost"})


class DaemonServer:
    """Serves the API from a thread of its own until closed. `wish(action, arguments, actor, role)` gives a Future."""

    def __init__(
        self, data_dir: Path, port: int, status: Callable[[], dict[str, Any]], wish: Callable[..., Any]
    ) -> None:
        self._data_dir, self._status, self._wish = data_dir, status, wish
        self._keys = {role: read_or_make_key(data_dir / name) for role, name in KEY_FILES.items()}
        self.key = self._keys["operator"]
        self._socket = bound_socket(port)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._server: Any = None
        self._thread = threading.Thread(target=self._run, name="api", daemon=True)

    def start(self) -> None:
        import uvicorn

        class Server(uvicorn.Server):
            def capture_signals(self) -> Any:  # the daemon alone handles signals
                return nullcontext()

        guarded = Guard(self.app(), self.role_of)
        self._server = Server(uvicorn.Config(guarded, log_level="warning", access_log=False, lifespan="off"))
        self._thread.start()
        write_private(self._data_dir / ADDRESS_FILE, json.dumps({"url": self.url, "pid": os.getpid()}))

    def close(self) -> None:
        (self._data_dir / ADDRESS_FILE).unlink(missing_ok=True)
        if self._server is not None:
            self._server.should_exit = True
            self._thread.join(timeout=5.0)
        self._socket.close()

    def _run(self) -> None:
        asyncio.run(self._server.serve(sockets=[self._socket]))

    def role_of(self, authorization: bytes) -> Role | None:
        """Whose key this is. Every key is compared, each in constant time."""
        matches = [
            role
            for role, key in self._keys.items()
            if hmac.compare_digest(authorization, f"Bearer {key}".encode())
        ]
        return matches[0] if matches else None

    def app(self) -> Any:
        """The routes of `ROUTES`, without the guard before them."""
        from fastapi import Depends, FastAPI, HTTPException, Request
        from pydantic import BaseModel, ConfigDict, Field

        def authorised(request: Request) -> Role:
            role: Role = request.scope["role"]
            if role not in ROUTES.get((request.method, request.scope["route"].path), frozenset()):
                logger.warning("A %s was refused %s %s", role, request.method, request.url.path)
                raise HTTPException(
                    403,
                    f"The key is the {role}'s, who may look and not act. The operator's key stands in "
                    f"{KEY_FILE} of the data folder.",
                )
            return role

        class Wanted(BaseModel):
            model_config = ConfigDict(extra="forbid")
            actor: str = Field(default="unknown", max_length=80, pattern=r"^[^\x00-\x1f\x7f]+$")
            to: Literal["previous", "initial"] | None = None
            recommendation_id: int | None = Field(default=None, ge=1, le=2**53)
            expected_champion: str | None = Field(default=None, max_length=64)

        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

        @app.get("/status")
        def status(role: Role = Depends(authorised)) -> dict[str, Any]:
            return {**self._status(), "role": role}

        @app.post("/actions/{action}")
        def act(action: str, wanted: Wanted, role: Role = Depends(authorised)) -> dict[str, str]:
            if action not in ACTIONS:
                raise HTTPException(404, f"Unknown action {action!r}; known: {', '.join(ACTIONS)}.")
            arguments = wanted.model_dump(exclude_none=True, exclude={"actor"})
            try:
                asked = self._wish(action, arguments, wanted.actor, role)
                return {"answer": asked.result(timeout=ANSWER_TIMEOUT_S)}
            except TimeoutError:
                raise HTTPException(
                    503, "The daemon has not answered yet; `tuner history` will show what became of it."
                ) from None

        return app


class Guard:
    """Before any route: the Host, the key and the size of the body. What passes carries its role in the scope."""

    def __init__(self, app: Any, role_of: Callable[[bytes], Role | None]) -> None:
        self._app, self._role_of = app, role_of

    async def __call__(self, scope: Scope, receive: Channel, send: Channel) -> None:
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").rsplit(":", 1)[0]
        role = self._role_of(headers.get(b"authorization", b""))
        if host not in HOSTS:
            await refuse(send, 421, "This API answers to 127.0.0.1 and localhost only.")
        elif role is None:
            told = "The key is missing or wrong; it stands in daemon.key or viewer.key of the data folder."
            await refuse(send, 401, told)
        elif (body := await read_body(receive)) is None:
            await refuse(send, 413, f"A request may be at most {MAX_BODY_BYTES} bytes long.")
        else:
            await self._app({**scope, "role": role}, once(body, receive), send)


async def read_body(receive: Channel) -> bytes | None:
    """The whole body; None as soon as it is longer than allowed, whatever its headers say."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            return None
        if not message.get("more_body"):
            return body


def once(body: bytes, receive: Channel) -> Channel:
    """A `receive` that gives a body that was read already, and then whatever follows it."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Any:
        return waiting.pop() if waiting else await receive()

    return again


async def refuse(send: Channel, status: int, why: str) -> None:
    body = json.dumps({"detail": why}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class DaemonClient:
    """The other end, for the command line: with the operator's key where it can be read, else the viewer's."""

    def __init__(self, data_dir: Path) -> None:
        try:
            address = json.loads((data_dir / ADDRESS_FILE).read_text())
            self._key = readable_key(data_dir)
        except (OSError, ValueError) as error:
            raise DaemonNotRunning(
                f"No daemon runs for {data_dir}. Start one with `tuner run`, or name its folder with --data-dir."
            ) from error
        self._url = address["url"]

    def status(self) -> dict[str, Any]:
        return dict(self._call("GET", "/status"))

    def act(self, action: str, arguments: Mapping[str, Any]) -> str:
        actor = os.environ.get("USER") or "a person"
        return str(self._call("POST", f"/actions/{action}", {**arguments, "actor": actor})["answer"])

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        try:
            answer = httpx.request(
                method,
                self._url + path,
                json=body,
                headers={"authorization": f"Bearer {self._key}"},
                timeout=ANSWER_TIMEOUT_S + 5.0,
                trust_env=False,
            )
        except httpx.HTTPError as error:
            raise DaemonNotRunning(
                f"The daemon at {self._url} does not answer ({error}). Start it with `tuner run`."
            ) from error
        if answer.status_code != 200:
            raise DaemonNotRunning(
                f"The daemon answered {answer.status_code}: {answer.json().get('detail', answer.text)}"
            )
        return answer.json()


def readable_key(data_dir: Path) -> str:
    """Raises OSError where neither key can be read."""
    try:
        return (data_dir / KEY_FILES["operator"]).read_text().strip()
    except OSError:
        return (data_dir / KEY_FILES["viewer"]).read_text().strip()


def bound_socket(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen()  # at once: a port that is bound and silent could be bound again
    except OSError as error:
        listener.close()
        raise PortInUse(
            f"`api.port` {port} is in use: {error.strerror}. Choose another, or 0 for any free one."
        ) from error
    return listener


def read_or_make_key(path: Path) -> str:
    """An empty file is no key: it is replaced, for an empty key would let everybody in."""
    if path.exists() and (key := path.read_text().strip()):
        return key
    key = secrets.token_hex(32)
    write_private(path, key)
    return key


def write_private(path: Path, text: str) -> None:
    """Atomically, readable by the owner alone."""
    beside = path.with_name(path.name + ".tmp")
    with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    beside.replace(path)
