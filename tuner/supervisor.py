"""Starts the runtime or finds the one that serves already, and starts it again when it dies.

              attach: one serves already
    STOPPED ────────────────────────────────▶ SERVING ──died──▶ WAITING ──backoff over──▶ STARTING
       └───────start──────▶ STARTING ──ready──▶                    └─ died again in safe mode ─▶ GAVE_UP

After 5 deaths in 10 minutes it is started once more, in safe mode: on the defaults of its knobs, and nothing is
tuned. Ten minutes without a death end safe mode.
Serving outlives the tuner: a daemon that dies leaves the runtime alone, and the next one attaches to it.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from runtime.client import RuntimeFile, read_runtime_file
from runtime.clock import Clock
from runtime.errors import InvalidKnob, RuntimeFault
from runtime.knobs import EngineConfig
from store.errors import StoreError
from store.last_good import read_last_good
from tuner import runtime_process
from tuner.connection import Connection, RuntimeConnection
from tuner.errors import (
    Busy,
    ModelMissing,
    OtherRuntime,
    RuntimeGaveUp,
    RuntimeStartFailed,
    SettingsError,
    TunerError,
)
from tuner.runtime_process import RuntimeProcess, process_noted, process_of_runtime, start_process
from tuner.settings import Settings

log = logging.getLogger(__name__)

MAX_DEATHS = 5
DEATH_WINDOW_S = 600.0
MAX_BACKOFF_S = 60.0
READY_LIMIT_S = 1800.0  # a large model on a slow disk
STOP_GRACE_S = 10.0  # beyond the drain, before the signals
TERM_GRACE_S = 5.0
LOOK_S = 0.1
LOOKS_A_READING = 3


class Phase(StrEnum):
    STOPPED = "stopped"
    STARTING = "starting"
    SERVING = "serving"
    WAITING = "waiting"  # for the backoff to end
    GAVE_UP = "gave up"


class RuntimeSupervisor:
    """Owns the runtime's process, its log and its run directory, one of each for a data folder.

    `clock` and `sleep` are of monotonic seconds; `extra` is appended to the runtime's command line.
    """

    def __init__(
        self,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        extra: Sequence[str] = (),
        launch: Callable[[Sequence[str], Path, Path], RuntimeProcess] = start_process,
        connect: Callable[[Path], Connection] = RuntimeConnection,
    ) -> None:
        self.settings, self._clock, self._sleep, self._extra = settings, clock, sleep, list(extra)
        self._launch, self._connect = launch, connect
        self.run_dir: Path = settings.data_dir.resolve() / "run"
        self.log_path: Path = settings.data_dir.resolve() / "runtime.log"
        self.phase = Phase.STOPPED
        self.error: TunerError | None = None  # why the last start or life ended
        self.num_restarts = 0
        self.clock: Clock | None = None  # of the runtime that served first: those that follow keep it
        self.is_safe_mode = False
        self.while_stopping: Callable[[], object] = lambda: (
            None
        )  # called while the runtime drains its last requests
        self._values: dict[str, Any] = {}
        self._port = settings.server.port
        self._process: RuntimeProcess | None = None
        self._connection = connect(self.run_dir)
        self._handed_out: list[Connection] = []
        self._engine_pid: int | None = None
        self._log_since = 0
        self._until_s = 0.0  # of STARTING: the latest it may be ready; of WAITING: the next start
        self._deaths_s: list[float] = []

    # -- start and stop, which wait ------------------------------------------------------------------------

    def attach_or_start(
        self, values: Mapping[str, Any], is_cancelled: Callable[[], bool] = lambda: False
    ) -> None:
        """Returns when a runtime serves (or `is_cancelled`): one that did already, else a new one on `values`.

        Raises:
            OtherRuntime: the one that serves from this data folder has another model.
            Busy: one is there and does not answer.
            ModelMissing, PortInUse, SettingsError, RuntimeStartFailed: a new one did not come up.
        """
        self._values = dict(values)
        if not self.attach():
            self._start()
        while self.phase is Phase.STARTING and not is_cancelled():
            error = self._look_at_start()
            if error is not None and self._process is not None and self._process.is_found:
                log.warning("The runtime that was there has ended; a new one is started.")
                self._start()
            elif error is not None:
                self.phase, self.error = Phase.STOPPED, error
                raise error
            elif self.phase is Phase.STARTING:
                self._sleep(LOOK_S)

    def attach(self) -> bool:
        """Takes over a runtime that lives. Returns False where there is none.

        Raises:
            OtherRuntime, Busy.
        """
        file = read_runtime_file(self.run_dir)
        found = process_of_runtime(file.pid) if file is not None else None
        if file is None or found is None:
            self._process = process_noted(self.run_dir)
            if self._process is None:
                return False
            log.info("A runtime is starting already (pid %d); waiting for it.", self._process.pid)
        else:
            try:
                self._check_model(self._connection.identity())
            except RuntimeFault as error:
                raise Busy(
                    f"The runtime of {self.run_dir} (pid {file.pid}) lives and does not answer: {error} "
                    f"End it with `kill {file.pid}`, or give another `data_dir`."
                ) from error
            log.info("Attached to the runtime that serves at %s (pid %d).", file.api_url, file.pid)
            self._warn_of_other_port(file)
            self._process = found
        self._log_since = runtime_process.log_size(self.log_path)
        self.phase, self._until_s = Phase.STARTING, self._clock() + READY_LIMIT_S
        return True

    def stop(self, drain_s: float | None = None) -> None:
        """Ends the runtime: asked to drain, then SIGTERM, then SIGKILL. Returns when it is gone."""
        process, self.phase = self._process, Phase.STOPPED
        if process is None or not process.is_alive():
            return
        drain_s = self.settings.server.drain_s if drain_s is None else drain_s
        log.info("The runtime (pid %d) drains for at most %g s and ends.", process.pid, drain_s)
        try:
            self._connection.shutdown(drain_s)
        except RuntimeFault as error:
            log.warning("The runtime cannot be asked to drain: %s", error)
        else:
            self._ended_within(process, drain_s + STOP_GRACE_S, self.while_stopping)
        for end in (process.terminate, process.kill):
            if not process.is_alive():
                break
            log.warning("The runtime (pid %d) still lives: %s.", process.pid, end.__name__)
            end()
            self._ended_within(process, TERM_GRACE_S)
        self._connection.close()

    def close(self) -> None:
        """Closes the connections; the runtime goes on serving."""
        for connection in (*self._handed_out, self._connection):
            connection.close()

    def client(self) -> Connection:
        """A connection of its own for each caller. It stays good when the runtime starts again."""
        self._handed_out.append(self._connect(self.run_dir))
        return self._handed_out[-1]

    # -- once a tick, which does not wait ------------------------------------------------------------------

    def check(self, engine: str | None = None) -> Phase:
        """Notices that the runtime died and starts it again in time, on the last confirmed configuration.

        Args:
            engine: what the runtime says of its engine, if it is known. A front end that gave its engine up serves
                nobody; it is ended and started again like one that died.
        """
        if self.phase is Phase.SERVING and not self._is_alive():
            self._died(f"The runtime died, {runtime_process.how_ended(self._exit_code())}.")
        elif self.phase is Phase.SERVING and engine == "failed" and self._process is not None:
            self._process.kill()
            self._ended_within(self._process, TERM_GRACE_S)
            self._died("The runtime gave its engine up, which died too often.")
        elif self.phase is Phase.SERVING and self.is_safe_mode and not self._recent_deaths():
            self.is_safe_mode = False
            log.info("Safe mode ends: the runtime lived for %g minutes.", DEATH_WINDOW_S / 60)
        elif self.phase is Phase.WAITING and self._clock() >= self._until_s:
            self._values = {} if self.is_safe_mode else self._last_good()
            self.num_restarts += 1
            try:
                self._start()
            except RuntimeStartFailed as failed:
                self._died(str(failed))
        elif self.phase is Phase.STARTING and (error := self._look_at_start()) is not None:
            self._died(str(error), is_hopeless=isinstance(error, ModelMissing | SettingsError))
        return self.phase

    def pids(self) -> dict[str, int]:
        """Our processes by the labels of `store.metrics.PROCESS`; those that are not known are absent."""
        pids = {"daemon": os.getpid()}
        if self.phase is Phase.SERVING and self._process is not None:
            pids["front_end"] = self._process.pid
            if self._engine_pid is None or not psutil.pid_exists(self._engine_pid):
                with suppress(RuntimeFault):
                    self._engine_pid = self._connection.identity()["engine_pid"]
            if self._engine_pid is not None:
                pids["engine"] = self._engine_pid
        return pids

    @property
    def trouble(self) -> str | None:
        """Why nobody is served, or why nothing is tuned, in words; None while all is well."""
        if self.phase is not Phase.SERVING:
            return f"The runtime is {self.phase}. {self.error or ''}".strip()
        if self.is_safe_mode:
            return f"Safe mode: the runtime died {MAX_DEATHS} times and serves on default knobs; nothing is tuned."
        return None

    def left_running(self) -> str:
        """For a person who ends the daemon without ceremony: what goes on without it, and how to end that."""
        if self._process is None or not self._process.is_alive():
            return "No runtime is left running."
        pid, file = self._process.pid, read_runtime_file(self.run_dir)
        where = f" and serves at {file.api_url}" if file is not None and file.pid == pid else ""
        return (
            f"The runtime (pid {pid}) goes on{where}. `kill {pid}` drains and ends it; `tuner run` with the "
            "same data folder attaches to it."
        )

    # -- inside --------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._log_since = runtime_process.log_size(self.log_path)
        extra = list(self._extra)
        if (
            self.clock is not None
        ):  # or a stepped system clock would part the next runtime's from the daemon's
            extra += ["--clock-anchor", f"{self.clock.boot_epoch!r}:{self.clock.boot_monotonic!r}"]
        command = runtime_process.server_command(self.settings, self.run_dir, self._values, self._port, extra)
        try:
            self._process = self._launch(command, self.run_dir, self.log_path)
        except OSError as error:
            raise RuntimeStartFailed(f"The runtime cannot be started: {error}.") from error
        self.phase, self._until_s = Phase.STARTING, self._clock() + READY_LIMIT_S
        log.info("The runtime starts (pid %d, log %s).", self._process.pid, self.log_path)

    def _look_at_start(self) -> TunerError | None:
        """SERVING once the engine is ready. Returns what went wrong, with the process gone."""
        assert self._process is not None
        if not self._process.is_alive():
            return runtime_process.start_error(self._process.exit_code, self.log_path, self._log_since)
        file = read_runtime_file(self.run_dir)
        engine = "starting"
        if file is not None and file.pid == self._process.pid:
            with suppress(RuntimeFault):  # announced a moment before it answers
                engine = self._connection.state()["engine"]
        if engine == "ready" and file is not None:
            return self._ready(file)
        if engine != "failed" and self._clock() < self._until_s:
            return None
        if engine == "failed" and self._ended_within(self._process, TERM_GRACE_S):
            # It ended by itself, and its exit code says more than we could.
            return runtime_process.start_error(self._process.exit_code, self.log_path, self._log_since)
        self._process.kill()
        self._ended_within(self._process, TERM_GRACE_S)
        complaint = runtime_process.last_complaint(self.log_path, self._log_since)
        why = "its engine failed" if engine == "failed" else f"it was not ready within {READY_LIMIT_S:g} s"
        return RuntimeStartFailed(f"The runtime did not come up, {why}: {complaint} (log: {self.log_path})")

    def _ready(self, file: RuntimeFile) -> TunerError | None:
        try:
            identity = self._connection.identity()
            self._check_model(identity)
        except RuntimeFault:
            return None  # the next look tells
        except OtherRuntime as error:
            return error
        self.phase, self.error = Phase.SERVING, None
        self._engine_pid = identity["engine_pid"]
        self._port = urlsplit(file.api_url).port or self._port  # a free port stays the same across restarts
        log.info("The runtime serves at %s.", file.api_url)
        return None

    def _died(self, reason: str, is_hopeless: bool = False) -> None:
        now_s = self._clock()
        self._deaths_s = [*self._recent_deaths(), now_s]
        num = len(self._deaths_s)
        if is_hopeless or self.is_safe_mode:
            often = (
                "and cannot start again" if is_hopeless else f"{num} times in {DEATH_WINDOW_S / 60:g} minutes"
            )
            self.phase = Phase.GAVE_UP
            self.error = RuntimeGaveUp(f"The runtime died {often}; it is not started any more. {reason}")
            log.error("%s", self.error)
            return
        self.is_safe_mode = num >= MAX_DEATHS
        backoff_s = min(MAX_BACKOFF_S, 2.0 ** (num - 1))
        self.phase, self._until_s = Phase.WAITING, now_s + backoff_s
        self.error = RuntimeStartFailed(reason)
        how = ", in safe mode: on the defaults of its knobs" if self.is_safe_mode else ""
        log.error("%s Next start in %g s%s.", reason, backoff_s, how)

    def _recent_deaths(self) -> list[float]:
        now_s = self._clock()
        return [at_s for at_s in self._deaths_s if now_s - at_s < DEATH_WINDOW_S]

    def _last_good(self) -> dict[str, Any]:
        """What was confirmed last, else what the runtime had at its first start."""
        try:
            if (last_good := read_last_good(self.settings.data_dir)) is not None:
                EngineConfig.of(last_good.values)
                return dict(last_good.values)  # knobs that it does not name are the engine's to fit
        except StoreError as error:
            log.warning("The last confirmed configuration cannot be read: %s", error)
        except InvalidKnob as error:
            log.warning("The last confirmed configuration is of another version: %s", error)
        return self._values

    def _check_model(self, identity: Mapping[str, Any]) -> None:
        """Raises OtherRuntime."""
        asked, served = self.settings.model.location, Path(identity["model"]["path"])
        if served.resolve() != asked:
            raise OtherRuntime(
                f"The runtime of {self.run_dir} (pid {identity['pid']}) serves {served}, but the settings ask for "
                f"{asked}. End it with `kill {identity['pid']}`, or give another `data_dir`."
            )

    def _warn_of_other_port(self, file: RuntimeFile) -> None:
        port = urlsplit(file.api_url).port
        if self._port not in (0, port):
            log.warning("`server.port` is %d, but the runtime that serves listens on %s.", self._port, port)

    def _is_alive(self) -> bool:
        return self._process is not None and self._process.is_alive()

    def _exit_code(self) -> int | None:
        return self._process.exit_code if self._process is not None else None

    def _ended_within(
        self, process: RuntimeProcess, limit_s: float, meanwhile: Callable[[], object] = lambda: None
    ) -> bool:
        end_s, num_looks = self._clock() + limit_s, 0
        while process.is_alive():
            if self._clock() >= end_s:
                return False
            if num_looks % LOOKS_A_READING == 0:
                meanwhile()
            num_looks += 1
            self._sleep(LOOK_S)
        return True
