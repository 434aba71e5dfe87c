"""The daemon's own API on loopback: what it is doing, and a person's wishes. Both ends of it live here.

Every call carries the key from `daemon.key` (0600). Wishes are put into the daemon's queue and answered by
its next tick, so that the tick stays the only writer. `daemon.json` tells where the daemon listens.
"""

import asyncio
import hmac
import json
import os
import secrets
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx

from tuner.errors import DaemonNotRunning, PortInUse

ANSWER_TIMEOUT_S = 30.0
ADDRESS_FILE, KEY_FILE = "daemon.json", "daemon.key"
ACTIONS = ("pause", "resume", "rollback", "approve", "reject")


class DaemonServer:
    """Serves the API from a thread of its own until closed."""

    def __init__(
        self, data_dir: Path, port: int, status: Callable[[], dict[str, Any]], wish: Callable[..., Any]
    ) -> None:
        self._data_dir, self._status, self._wish = data_dir, status, wish
        self.key = read_or_make_key(data_dir / KEY_FILE)
        self._socket = bound_socket(port)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._server: Any = None
        self._thread = threading.Thread(target=self._run, name="api", daemon=True)

    def start(self) -> None:
        import uvicorn

        class Server(uvicorn.Server):
            def capture_signals(self) -> Any:  # the daemon alone handles signals
                return nullcontext()

        self._server = Server(
            uvicorn.Config(self._app(), log_level="warning", access_log=False, lifespan="off")
        )
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

    def _app(self) -> Any:
        from fastapi import Depends, FastAPI, HTTPException, Request

        def authorised(request: Request) -> None:
            given = request.headers.get("authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {self.key}".encode()):
                raise HTTPException(
                    401, "The key is missing or wrong; it stands in daemon.key of the data folder."
                )

        app = FastAPI(dependencies=[Depends(authorised)], docs_url=None, redoc_url=None, openapi_url=None)

        @app.get("/status")
        def status() -> dict[str, Any]:
            return self._status()

        @app.post("/actions/{action}")
        def act(action: str, arguments: dict[str, Any]) -> dict[str, str]:
            if action not in ACTIONS:
                raise HTTPException(404, f"Unknown action {action!r}; known: {', '.join(ACTIONS)}.")
            actor = str(arguments.pop("actor", "unknown"))
            try:
                return {"answer": self._wish(action, arguments, actor).result(timeout=ANSWER_TIMEOUT_S)}
            except TimeoutError:
                raise HTTPException(
                    503, "The daemon has not answered yet; `tuner history` will show what became of it."
                ) from None

        return app


class DaemonClient:
    """The other end, for the command line."""

    def __init__(self, data_dir: Path) -> None:
        try:
            address = json.loads((data_dir / ADDRESS_FILE).read_text())
            self._key = (data_dir / KEY_FILE).read_text().strip()
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
    if path.exists():
        return path.read_text().strip()
    key = secrets.token_hex(32)
    write_private(path, key)
    return key


def write_private(path: Path, text: str) -> None:
    """Atomically, readable by the owner alone."""
    beside = path.with_name(path.name + ".tmp")
    with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    beside.replace(path)
