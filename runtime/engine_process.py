"""One engine's process: started, watched, started again, and the frames that go to it and come from it.

starting ──ready frame──▶ ready ──link closed or silent──▶ restarting ──ready frame──▶ ready
    └──────── restarts spent, or the engine says that its model is unusable ────────▶ failed

An engine on trial is started beside others that serve. It gets one try, and whoever asked for it hears why it
failed.
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

from runtime.child import python_path
from runtime.clock import Clock
from runtime.engine_socket import EngineSocket
from runtime.errors import (
    EngineNotReady,
    InvalidKnob,
    InvalidPlan,
    InvalidRequest,
    LinkBroken,
    NoPlan,
    PrepareFailed,
    RequestFailed,
    RuntimeFault,
    StaleVersion,
)
from runtime.front_end import UNASKED, FrontEnd
from runtime.knobs import ApplyMode, EngineConfig, knob_named
from runtime.link import Frame, encode, read_frame
from runtime.replica import Replica

log = logging.getLogger(__name__)

BACKOFF_S = (0.1, 1.0, 2.0, 4.0, 8.0)
RESTART_WINDOW_S = 600.0
START_LIMIT_S = 3600.0  # a large model on a slow disk
STOP_LIMIT_S = 5.0
UNUSABLE_EXIT_CODES = (2, 66)  # bad usage, model missing or damaged: starting again cannot help

CHILD_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "GOMP_SPINCOUNT": "0"}

_ERRORS: dict[str, type[RuntimeFault]] = {
    "stale_version": StaleVersion, "invalid_knob": InvalidKnob, "invalid_plan": InvalidPlan, "no_plan": NoPlan,
    "invalid_request": InvalidRequest, "prepare_failed": PrepareFailed,
}  # fmt: skip

Answer = dict[str, Any]


class EngineProcess:
    """Owns one child and its link.

    `first_ready` is set once: to None when the engine is ready, else to why it never was. `unusable` is set to
    the exit code when the engine can never start.
    """

    def __init__(
        self,
        front: FrontEnd,
        replica: Replica,
        clock: Clock,
        run_dir: Path,
        module: str,
        arguments: Sequence[str],
        silence_s: float,
        on_trial: bool = False,
    ) -> None:
        self.replica, self._on_trial = replica, on_trial
        self._front, self._clock, self._module = front, clock, module
        self._arguments, self._silence_s = list(arguments), silence_s
        self._socket = EngineSocket(run_dir, replica.index)
        self._child: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._calls: dict[int, asyncio.Future[Answer]] = {}
        self._num_calls = UNASKED
        self._restarts_at: deque[float] = deque()
        self._last_frame_at = 0.0  # monotonic s
        self._stopping = False
        self._complaint: str | None = None  # what we held against the engine that lived last
        self.unusable: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.first_ready: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        replica.send = self._send

    async def run(self) -> None:
        """Keeps an engine alive until `stop`, or until it is given up."""
        await self._socket.listen()
        try:
            await self._live_on()
        finally:
            self._tell_first_ready("it was stopped")

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

    async def call(self, name: str, args: Answer, limit_s: float) -> Answer:
        """Makes a control call of the engine and returns its answer; raises as `ask` says."""
        return await self.answered(self.ask(name, args), name, limit_s)

    def ask(self, name: str, args: Answer) -> "asyncio.Future[Answer]":
        """Sends a control call at once, so that calls to several engines are in one order on all of them.

        The answer, to be awaited with `answered`, raises
            EngineNotReady: there is no engine, it went away meanwhile, or it did not answer in time.
            StaleVersion, InvalidKnob, InvalidPlan, NoPlan, PrepareFailed, InvalidRequest: as the engine answered.
            RequestFailed: any other answer of the engine.
        """
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        if self.replica.phase != "ready" or self._writer is None:
            phase = self.replica.phase
            answer.set_exception(EngineNotReady(f"`{name}` needs the engine, which is {phase}. Try again."))
            return answer
        self._num_calls += 1
        self._calls[self._num_calls] = answer
        self._send({"op": "control", "call": self._num_calls, "name": name, "args": args})
        return answer

    async def answered(self, answer: "asyncio.Future[Answer]", name: str, limit_s: float) -> Answer:
        try:
            return await asyncio.wait_for(answer, limit_s)
        except TimeoutError:
            raise EngineNotReady(f"The engine did not answer `{name}` within {limit_s:g} s.") from None
        finally:
            self._calls = {call: one for call, one in self._calls.items() if one is not answer}

    # -- one life of the engine after another --------------------------------------------------------------

    async def _live_on(self) -> None:
        while not self._stopping:
            code = await self._live_once()
            if self._stopping or self._failed_trial(code) or self._is_unusable(code):
                return
            wait_s = self._next_backoff()
            if wait_s is None:
                log.error("%s ended %d times in %g s: given up", self, len(BACKOFF_S) + 1, RESTART_WINDOW_S)
                self._give_up(code)
                return
            log.warning("%s ended (exit code %s), next start in %g s", self, code, wait_s)
            self.replica.num_restarts += 1
            self._front.engine.num_restarts += 1
            await asyncio.sleep(wait_s)

    async def _live_once(self) -> int | None:
        """Starts the engine, serves its link until it closes, and returns the exit code."""
        self._child = child = await self._spawn()
        self._complaint = None
        connected = self._socket.expect(child.pid)
        ended: asyncio.Task[int] = asyncio.create_task(child.wait())
        watch: asyncio.Task[None] | None = None
        try:
            first: set[asyncio.Future[Any]] = {ended, connected}
            await asyncio.wait(first, timeout=START_LIMIT_S, return_when=asyncio.FIRST_COMPLETED)
            if connected.done():
                reader, self._writer = connected.result()
                self.replica.pid = child.pid
                watch = asyncio.create_task(self._watch_silence(child))
                self._greet()
                await self._serve_link(reader)
        except LinkBroken as error:
            self._complaint = str(error)
            log.error("the link to %s broke: %s", self, error)
        finally:
            if watch is not None:
                watch.cancel()
            self._drop_link()
            await self._reap(child, ended)
        return child.returncode

    async def _spawn(self) -> asyncio.subprocess.Process:
        command = [sys.executable, "-m", "runtime.child", str(os.getpid()), self._module]
        command += ["--socket", str(self._socket.path), *self._arguments]
        # A session of its own: Ctrl-C in a terminal reaches the front end only, which drains first.
        child = await asyncio.create_subprocess_exec(
            *command, env={**os.environ, **CHILD_ENVIRONMENT, "PYTHONPATH": python_path()}, start_new_session=True,
            stdin=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        log.info("%s started as process %d", self, child.pid)
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
                if isinstance(error, LinkBroken):
                    raise
                raise LinkBroken(f"The frame {frame['op']} is not as agreed: {error!r}.") from error

    def _handle(self, frame: Frame) -> None:
        if frame["op"] == "ready":
            self._handle_ready(frame)
        elif frame["op"] == "reply":
            self._handle_reply(frame)
        else:
            self._front.on_frame(self.replica, frame)

    def _handle_ready(self, frame: Frame) -> None:
        self._catch_up(frame)
        self._front.engine_ready(self.replica, frame)
        self._tell_first_ready(None)
        engine = self._front.engine
        log.info("%s ready, version %d, configuration %s", self, engine.version, engine.config_id)

    def _catch_up(self, frame: Frame) -> None:
        """Brings an engine to what was committed while it started, before it is given any request.

        The frame then says so too. Each commit raises the version by one, and the engine's must come out equal.

        Raises:
            LinkBroken: it runs something else than the others, or than what was committed, and must start again.
        """
        engine = self._front.engine
        num_missed = engine.version - frame["version"]
        if num_missed <= 0 and engine.phase != "ready":
            return  # nobody else serves: the group is what this engine says
        behind = EngineConfig.of(engine.champion).changes_from(EngineConfig.of(frame["config"]))
        not_live = [
            name for name in behind if knob_named(name).apply is not ApplyMode.LIVE and name != "replicas"
        ]
        if num_missed < 0 or not_live or (behind and num_missed == 0):
            differences = ", ".join(f"{name} is {old!r}, not {new!r}" for name, (old, new) in behind.items())
            raise LinkBroken(
                f"It came up with another configuration than the engines that serve: {differences}."
            )
        for _ in range(num_missed):
            args = {"patch": engine.champion, "expected_version": None}
            self._send({"op": "control", "call": UNASKED, "name": "reconfigure", "args": args})
        frame["version"], frame["config"] = engine.version, engine.champion

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
            if self.replica.phase == "ready" and silent_s > self._silence_s:
                log.error("%s was silent for %.1f s: killed", self, silent_s)
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
        self._calls = {}
        was_ready = self.replica.phase == "ready"
        if not self._stopping:
            again = was_ready or self.replica.num_restarts > 0
            self._front.engine_lost(self.replica, "restarting" if again else "starting")

    async def _reap(self, child: asyncio.subprocess.Process, ended: asyncio.Task[int]) -> None:
        """The link is closed. An engine that ends by itself gets a moment, so that its exit code is its own."""
        done, _ = await asyncio.wait({ended}, timeout=STOP_LIMIT_S if self._stopping else 1.0)
        if not done:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
        await ended

    # -- deciding to start again ---------------------------------------------------------------------------

    def _failed_trial(self, code: int | None) -> bool:
        """An engine on trial that never got ready is not tried again."""
        if not self._on_trial or self.first_ready.done():
            return False
        self._give_up(code)
        return True

    def _is_unusable(self, code: int | None) -> bool:
        if (
            code not in UNUSABLE_EXIT_CODES or self._front.engine.champion
        ):  # it did serve: the folder may come back
            return False
        self._give_up(code)
        if not self.unusable.done():
            self.unusable.set_result(code)
        return True

    def _give_up(self, code: int | None) -> None:
        self._front.engine_given_up(self.replica)
        self._tell_first_ready(self._complaint or f"it ended with exit code {code}; the log says why")

    def _tell_first_ready(self, failure: str | None) -> None:
        if not self.first_ready.done():
            self.first_ready.set_result(failure)

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

    def __str__(self) -> str:
        return f"engine {self.replica.index}"
