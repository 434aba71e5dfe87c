"""The serving process: python -m runtime.server --model PATH. Listens, runs the engine beside it, drains, ends.

    bind ─▶ announce in runtime.json ─▶ serve ──SIGTERM, SIGINT or /control/shutdown──▶ drain ─▶ stop ─▶ exit 0
A second signal ends the process at once; the engine goes with it.

Exit codes (sysexits.h): 0 drained, 2 bad usage or configuration, 66 model missing or damaged,
70 a defect of ours, 75 address or run directory in use. No torch is imported here.
"""

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import socket
import sys
import uuid
from collections.abc import Sequence
from typing import Any

from runtime import __version__
from runtime.api import Service, create_api
from runtime.clock import Clock
from runtime.control import Boot, create_control
from runtime.engine_group import EngineGroup
from runtime.engine_process import EngineProcess
from runtime.engine_state import EngineState
from runtime.errors import AddressInUse, EngineNotReady, InvalidKnob, ModelError, Unauthorized
from runtime.footprint import device_of
from runtime.front_end import FrontEnd
from runtime.key_guard import check_exposure, client_key
from runtime.listener import Listener, bind, url_of
from runtime.model_folder import ModelFolder
from runtime.prompts import Prompts, without_torch
from runtime.record_spool import RecordSpool
from runtime.replica import Replica
from runtime.run_dir import RunDir, RuntimeFile
from runtime.server_options import asked_config, engine_arguments, parser

log = logging.getLogger("runtime.server")

EXIT_USAGE, EXIT_MODEL, EXIT_DEFECT, EXIT_IN_USE = 2, 66, 70, 75
READER_SILENCE_S = 10.0  # a daemon reads the records every second; one that is silent for longer is gone
HAND_OVER_S = 3.0
MAX_OPEN_FILES = 65_536  # a connection is one; the usual soft limit of 1024 is less than a full queue


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the process's exit code."""
    options = parser().parse_args(arguments)
    logging.basicConfig(
        level=options.log_level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    os.umask(0o077)
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(serve(options))
    except (InvalidKnob, Unauthorized) as error:
        return _complain(error, EXIT_USAGE)
    except ModelError as error:
        return _complain(error, EXIT_MODEL)
    except AddressInUse as error:
        return _complain(error, EXIT_IN_USE)
    except Exception:
        log.exception("the server failed")
        return EXIT_DEFECT


async def serve(options: argparse.Namespace) -> int:
    """Serves until it was asked to stop and has drained.

    Raises:
        ModelError, InvalidKnob, AddressInUse, Unauthorized: it could not start.
    """
    clock: Clock = options.clock_anchor or Clock.started_now()
    folder = ModelFolder.read(options.model)
    asked = asked_config(options.config)
    if options.max_model_len is not None and not 1 < options.max_model_len <= folder.context_tokens:
        rule = f"must be in [2, {folder.context_tokens}] tokens, but got {options.max_model_len}"
        raise InvalidKnob(f"`--max-model-len` {rule}.")
    check_exposure(options.host, client_key(options.api_key_file), options.insecure)
    _raise_file_limit()
    run_dir = RunDir(options.run_dir.resolve())
    try:
        key = run_dir.control_key()
        with contextlib.ExitStack() as sockets:
            api_socket = sockets.enter_context(bind(options.host, options.port))
            control_socket = sockets.enter_context(bind("127.0.0.1", options.control_port))
            return await Serving(options, clock, folder, asked, run_dir, key).run(api_socket, control_socket)
    finally:
        run_dir.release()


class Serving:
    """The parts of one running server, and the order in which they start and stop."""

    def __init__(
        self, options: argparse.Namespace, clock: Clock, folder: ModelFolder, asked: dict[str, Any],
        run_dir: RunDir, key: str,
    ) -> None:  # fmt: skip
        self._options, self._clock, self._folder, self._run_dir, self._key = (
            options,
            clock,
            folder,
            run_dir,
            key,
        )
        self._front = FrontEnd(clock, options.request_timeout_s, EngineState(asked=asked))
        self._engine = EngineGroup(self._front, self._engine_process, options.replica_keep_s)
        self._service = Service(
            self._front, folder, options.served_model_name or folder.name, options.max_model_len,
            asyncio.get_running_loop().create_future(),
        )  # fmt: skip
        self._api_key = client_key(options.api_key_file)
        self._drain_s = options.drain_s
        self._stop_asked = asyncio.Event()
        self._num_signals = 0

    async def run(self, api_socket: socket.socket, control_socket: socket.socket) -> int:
        boot = Boot(
            uuid.uuid4().hex, os.getpid(), self._clock.now(), url_of(api_socket), url_of(control_socket)
        )
        self._front.records.spool = RecordSpool(self._run_dir.path, boot.boot_id)
        control = create_control(
            self._front, self._engine, boot, self._identity, self._shutdown, self._key, self._service.encode
        )
        listeners = [
            Listener(create_api(self._service, self._api_key), api_socket),
            Listener(control, control_socket),
        ]
        self._handle_signals()
        listening = [asyncio.create_task(listener.run_until_stopped()) for listener in listeners]
        engine = asyncio.create_task(self._engine.run())
        loading = asyncio.create_task(self._load_prompts())
        try:
            await _until_started(listeners, listening)
            self._run_dir.announce(
                RuntimeFile(boot.pid, boot.boot_id, boot.api_url, boot.control_url, boot.started_at)
            )
            log.info("listening on %s, boot %s", boot.api_url, boot.boot_id)
            return await self._until_stopped([engine, loading, *listening])
        finally:
            await self._stop(listeners, listening, [engine, loading])

    async def _until_stopped(self, tasks: list[asyncio.Task[None]]) -> int:
        """Returns the exit code: 0 when asked to stop and drained, the engine's own when it can never start."""
        asked = asyncio.create_task(self._stop_asked.wait())
        unusable = self._engine.unusable
        waiting: set[asyncio.Future[Any]] = {asked, unusable, *tasks}
        while not asked.done() and not unusable.done():
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {asked, unusable}:
                task.result()  # a task that ended with an error ends the server
        if unusable.done():
            asked.cancel()
            return unusable.result()
        await self._drain()
        return 0

    async def _drain(self) -> None:
        """New requests are refused from here on; those in flight get their time."""
        self._front.draining = True
        log.info("draining %d requests for at most %g s", len(self._front.live), self._drain_s)
        end_at = asyncio.get_running_loop().time() + self._drain_s
        while self._front.live and asyncio.get_running_loop().time() < end_at:
            await asyncio.sleep(0.02)
        if self._front.live:
            log.warning("%d requests were not finished within %g s", len(self._front.live), self._drain_s)
            self._front.end_all(EngineNotReady("The server shut down before this request was finished."))
        await self._hand_over()

    async def _hand_over(self) -> None:
        """The last records wait for whoever read the ones before: it has them once it asks for what follows."""
        read_at, now = self._front.records_read_at, self._clock.now()
        if read_at is None or now - read_at > READER_SILENCE_S:
            return
        end_at = asyncio.get_running_loop().time() + HAND_OVER_S
        while len(self._front.records) and asyncio.get_running_loop().time() < end_at:
            await asyncio.sleep(0.02)

    async def _stop(
        self, listeners: list[Listener], listening: list[asyncio.Task[None]], tasks: list[asyncio.Task[None]]
    ) -> None:
        await self._engine.stop()
        if self._service.prompts.done() and not self._service.prompts.cancelled():
            self._service.prompts.result().close()
        for listener in listeners:
            listener.should_exit = True
        await asyncio.wait(listening, timeout=5.0)
        for task in (*tasks, *listening):
            task.cancel()
        await asyncio.gather(*tasks, *listening, return_exceptions=True)
        self._front.records.close()
        log.info("stopped")

    def _engine_process(self, replica: Replica, on_trial: bool) -> EngineProcess:
        options = self._options
        device = device_of(replica.index, options.device, self._front.engine.identity)
        return EngineProcess(
            self._front, replica, self._clock, self._run_dir.path, options.engine_module,
            engine_arguments(options, device), options.engine_silence_s, on_trial,
        )  # fmt: skip

    async def _load_prompts(self) -> None:
        """The tokenizer loads while the engine does."""

        def load() -> Prompts:
            with without_torch():
                prompts = Prompts.load(self._folder)
            prompts.start()
            return prompts

        prompts = await asyncio.to_thread(load)
        gc.collect()
        gc.freeze()  # a collection that walks all of transformers would pause every stream
        self._service.prompts.set_result(prompts)

    def _identity(self) -> dict[str, Any]:
        """The engine's word on the model and hardware; before it spoke, what the folder tells."""
        told = self._front.engine.identity
        model = {
            "path": str(self._folder.path),
            "vocab_size": self._folder.vocab_size,
            **told.get("model", {}),
        }
        model |= {"name": self._service.served_name, "max_model_len": self._service.max_model_len}
        versions = {"python": sys.version.split()[0], **told.get("versions", {}), "runtime": __version__}
        return {**told, "model": model, "versions": versions}

    def _handle_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: int) -> None:
        self._num_signals += 1
        if self._num_signals > 1:
            self._engine.kill()
            self._run_dir.release()
            os._exit(128 + number)
        self._shutdown(self._options.drain_s)

    def _shutdown(self, drain_s: float) -> None:
        self._drain_s = drain_s
        self._front.draining = True
        self._stop_asked.set()


async def _until_started(listeners: list[Listener], listening: list[asyncio.Task[None]]) -> None:
    while not all(listener.started for listener in listeners):
        for task in listening:
            if task.done():
                task.result()
        await asyncio.sleep(0.005)


def _raise_file_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _complain(error: Exception, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
