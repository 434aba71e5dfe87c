"""The engine's process: started, watched, started again, and the frames that go to it and come from it.

starting ──ready frame──▶ ready ──link closed or silent──▶ restarting ──ready frame──▶ ready
    └──────── restarts spent, or the engine says that its model is unusable ────────▶ failed
"""

import asyncio
import contextlib
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.clock import Clock
from runtime.engine_socket import EngineSocket
from runtime.errors import (
    EngineNotReady,
    InvalidKnob,
    InvalidPlan,
    InvalidRequest,
    LinkBroken,
    NoPlan,
    RequestFailed,
    RuntimeFault,
    StaleVersion,
)
from runtime.front_end import FrontEnd
from runtime.link import Frame, encode, read_frame

log = logging.getLogger(__name__)

BACKOFF_S = (0.1, 1.0, 2.0, 4.0, 8.0)
RESTART_WINDOW_S = 600.0
START_LIMIT_S = 3600.0  # a large model on a slow disk
STOP_LIMIT_S = 5.0
UNUSABLE_EXIT_CODES = (2, 66)  # bad usage, model missing or damaged: starting again cannot help

CHILD_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "GOMP_SPINCOUNT": "0"}

_ERRORS: dict[str, type[RuntimeFault]] = {
    "stale_version": StaleVersion, "invalid_knob": InvalidKnob, "invalid_plan": InvalidPlan, "no_plan": NoPlan,
    "invalid_request": InvalidRequest,
}  # fmt: skip


class EngineProcess:
    """Owns the child and the link. `unusable` is set to the exit code when the engine can never start."""

    def __init__(
        self,
        front: FrontEnd,
        clock: Clock,
        run_dir: Path,
        module: str,
        arguments: Sequence[str],
        silence_s: float,
    ) -> None:
        self._front, self._clock, self._module = front, clock, module
        self._arguments, self._silence_s = list(arguments), silence_s
        self._socket = EngineSocket(run_dir)
        self._child: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._calls: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._num_calls = 0
        self._restarts_at: deque[float] = deque()
        self._last_frame_at = 0.0  # monotonic s
        self._stopping = False
        self.unusable: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        front.send = self._send

    async def run(self) -> None:
        """Keeps an engine alive until `stop`, or until it is given up."""
        await self._socket.listen()
        while True:
            code = await self._live_once()
            if self._stopping:
                return
            if self._is_unusable(code):
                return
            wait_s = self._next_backoff()
            if wait_s is None:
                log.error("the engine ended %d times in %g s: given up", len(BACKOFF_S) + 1, RESTART_WINDOW_S)
                self._front.engine_given_up()
                return
            log.warning("the engine ended (exit code %s), next start in %g s", code, wait_s)
            await asyncio.sleep(wait_s)
            self._front.engine.num_restarts += 1

    async def stop(self) -> None:
        """Asks the engine to end, then makes it. The socket is gone afterwards."""
        self._stopping = True
        self._send({"op": "stop"})
        if self._child is not None and self._child.returncode is None:
            try:
                await asyncio.wait_for(self._child.wait(), STOP_LIMIT_S)
            except TimeoutError:
                self.kill()
        self._socket.close()

    def kill(self) -> None:
        if self._child is not None and self._child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._child.kill()

    async def call(self, name: str, args: dict[str, Any], limit_s: float) -> dict[str, Any]:
        """Makes a control call of the engine and returns its answer.

        Raises:
            EngineNotReady: there is no engine, it went away meanwhile, or it did not answer in time.
            StaleVersion, InvalidKnob, InvalidPlan, NoPlan: as the engine answered.
            RequestFailed: any other answer of the engine.
        """
        if self._front.engine.phase != "ready" or self._writer is None:
            raise EngineNotReady(
                f"`{name}` needs the engine, which is {self._front.engine.phase}. Try again."
            )
        self._num_calls += 1
        call = self._num_calls
        answer = self._calls[call] = asyncio.get_running_loop().create_future()
        self._send({"op": "control", "call": call, "name": name, "args": args})
        try:
            return await asyncio.wait_for(answer, limit_s)
        except TimeoutError:
            raise EngineNotReady(f"The engine did not answer `{name}` within {limit_s:g} s.") from None
        finally:
            self._calls.pop(call, None)

    # -- one life of the engine ----------------------------------------------------------------------------

    async def _live_once(self) -> int | None:
        """Starts the engine, serves its link until it closes, and returns the exit code."""
        self._child = child = await self._spawn()
        connected = self._socket.expect(child.pid)
        ended: asyncio.Task[int] = asyncio.create_task(child.wait())
        watch: asyncio.Task[None] | None = None
        try:
            first: set[asyncio.Future[Any]] = {ended, connected}
            await asyncio.wait(first, timeout=START_LIMIT_S, return_when=asyncio.FIRST_COMPLETED)
            if connected.done():
                reader, self._writer = connected.result()
                self._front.engine.pid = child.pid
                watch = asyncio.create_task(self._watch_silence(child))
                self._greet()
                await self._serve_link(reader)
        except LinkBroken as error:
            log.error("the link to the engine broke: %s", error)
        finally:
            if watch is not None:
                watch.cancel()
            self._drop_link()
            await self._reap(child, ended)
        return child.returncode

    async def _spawn(self) -> asyncio.subprocess.Process:
        command = [sys.executable, "-m", "runtime.child", str(os.getpid()), self._module]
        command += ["--socket", str(self._socket.path), *self._arguments]
        root = str(Path(__file__).resolve().parent.parent)
        python_path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
        # A session of its own: Ctrl-C in a terminal reaches the front end only, which drains first.
        child = await asyncio.create_subprocess_exec(
            *command, env={**os.environ, **CHILD_ENVIRONMENT, "PYTHONPATH": python_path}, start_new_session=True,
            stdin=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        log.info("engine process %d started", child.pid)
        return child

    def _greet(self) -> None:
        engine = self._front.engine
        self._send({
            "op": "hello", "boot_epoch": self._clock.boot_epoch, "boot_monotonic": self._clock.boot_monotonic,
            "config": engine.config_to_push, "version": engine.version,
        })  # fmt: skip

    async def _serve_link(self, reader: asyncio.StreamReader) -> None:
        while (frame := await read_frame(reader)) is not None:
            self._last_frame_at = time.monotonic()
            try:
                self._handle(frame)
            except (KeyError, TypeError, ValueError, RuntimeFault) as error:
                raise LinkBroken(f"The frame {frame['op']} is not as agreed: {error!r}.") from error

    def _handle(self, frame: Frame) -> None:
        if frame["op"] == "ready":
            self._front.engine_ready(frame)
            engine = self._front.engine
            log.info("engine ready, version %d, configuration %s", engine.version, engine.config_id)
        elif frame["op"] == "reply":
            self._handle_reply(frame)
        else:
            self._front.on_frame(frame)

    def _handle_reply(self, frame: Frame) -> None:
        answer = self._calls.pop(frame["call"], None)
        if answer is None or answer.done():
            return
        error = frame.get("error")
        if error is None:
            answer.set_result(frame["value"])
        elif error["kind"] in _ERRORS:
            answer.set_exception(_ERRORS[error["kind"]](error["message"]))
        else:
            message = f"The engine refused ({error['kind']}): {error['message']}"
            answer.set_exception(RequestFailed(message, error["kind"]))

    async def _watch_silence(self, child: asyncio.subprocess.Process) -> None:
        """A ready engine sends gauges even when idle. One that is silent hangs or is stopped: end it."""
        self._last_frame_at = time.monotonic()
        while True:
            await asyncio.sleep(min(1.0, self._silence_s / 4))
            silent_s = time.monotonic() - self._last_frame_at
            if self._front.engine.phase == "ready" and silent_s > self._silence_s:
                log.error("the engine was silent for %.1f s: killed", silent_s)
                with contextlib.suppress(ProcessLookupError):
                    child.kill()
                return

    def _drop_link(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(
                    EngineNotReady("The engine went away before it answered. Read the state again.")
                )
        self._calls.clear()
        was_ready = self._front.engine.phase == "ready"
        if not self._stopping:
            self._front.engine_lost(
                "restarting" if was_ready or self._front.engine.num_restarts else "starting"
            )

    async def _reap(self, child: asyncio.subprocess.Process, ended: asyncio.Task[int]) -> None:
        """The link is closed. An engine that ends by itself gets a moment, so that its exit code is its own."""
        done, _ = await asyncio.wait({ended}, timeout=STOP_LIMIT_S if self._stopping else 1.0)
        if not done:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
        await ended

    # -- deciding to start again ---------------------------------------------------------------------------

    def _is_unusable(self, code: int | None) -> bool:
        if (
            code not in UNUSABLE_EXIT_CODES or self._front.engine.champion
        ):  # it did serve: the folder may come back
            return False
        self._front.engine_given_up()
        if not self.unusable.done():
            self.unusable.set_result(code)
        return True

    def _next_backoff(self) -> float | None:
        now = time.monotonic()
        while self._restarts_at and self._restarts_at[0] < now - RESTART_WINDOW_S:
            self._restarts_at.popleft()
        if len(self._restarts_at) >= len(BACKOFF_S):
            return None
        self._restarts_at.append(now)
        return BACKOFF_S[len(self._restarts_at) - 1]

    def _send(self, frame: Frame) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(encode(frame))
