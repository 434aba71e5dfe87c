"""`tuner run`: puts the parts together, starts what is missing, and takes down in order what it started.

    lock the store ▶ attach to the runtime or start it ▶ snapshot ▶ champion in force ▶ traffic ▶ tick … ▶ drain

Killed with -9, the runtime goes on serving; the next run finds it by `runtime.json` and attaches.
"""

import contextlib
import hashlib
import json
import logging
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from logging.handlers import RotatingFileHandler
from typing import Any

from runtime.client import read_runtime_file
from runtime.clock import Clock
from runtime.errors import InvalidKnob
from runtime.knobs import EngineConfig
from store.database import Store
from store.errors import StoreError
from store.recovery import Recovered, open_store
from tuner.api import DaemonServer, write_private
from tuner.collect import Collector
from tuner.confirmed import last_good_or_none
from tuner.daemon import Daemon, Wish
from tuner.dashboard_keeper import DashboardKeeper
from tuner.errors import Unavailable
from tuner.hardware import HostProbe, NvmlProbe, Probe, ProcessProbe
from tuner.load.arrivals import at_rate
from tuner.load.traffic import API_KEY_VARIABLE
from tuner.load.traffic import command as traffic_command
from tuner.rows import tell
from tuner.settings import Settings, TrafficSettings
from tuner.snapshot import end_run, initial_config, record_run, record_snapshot
from tuner.supervisor import RuntimeSupervisor

logger = logging.getLogger(__name__)

CAPACITY_S = 25.0
CAPACITY_FILE = "capacity.json"
STOP_TRAFFIC_S = 15.0
LOOK_S = 0.1


def run(
    settings: Settings,
    watch: Callable[[Daemon, threading.Event], None] | None = None,
    keep_runtime: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Runs until SIGINT or SIGTERM; the second signal ends the process at once, and says what is left running.

    Args:
        watch: shown beside the loop (the live view), in the main thread, until its event is set.
        keep_runtime: leaves the runtime serving at the end instead of draining it.
        say: told what is waited for before anything is shown.

    Raises:
        TunerError, StoreError: what kept it from starting.
    """
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    log_to_file(settings)
    with contextlib.ExitStack() as stack:
        opened, recovered = open_store(settings.data_dir, time.time())
        store = stack.enter_context(opened)
        tell_recovered(store, recovered)
        stop = threading.Event()
        supervisor = RuntimeSupervisor(settings)
        left_running = [supervisor.left_running]
        stack.enter_context(signals_set(stop, lambda: " ".join(told() for told in left_running)))
        # A runtime that served before we came goes on serving when we fail to start.
        is_ours = read_runtime_file(supervisor.run_dir) is None
        owned = [is_ours and not keep_runtime]
        stack.callback(supervisor.close)
        stack.callback(lambda: supervisor.stop() if owned[0] else None)
        supervisor.attach_or_start(start_values(settings, store), stop.is_set)
        if not stop.is_set():
            serve(settings, store, supervisor, stop, watch, stack, left_running, say)
            owned[0] = not keep_runtime  # it was ours to run, so it is ours to stop


def serve(
    settings: Settings,
    store: Store,
    supervisor: RuntimeSupervisor,
    stop: threading.Event,
    watch: Callable[[Daemon, threading.Event], None] | None,
    stack: contextlib.ExitStack,
    left_running: list[Callable[[], str]],
    say: Callable[[str], None],
) -> None:
    """`left_running`: what to say of what outlives this process, should a person insist."""
    control = supervisor.client()
    identity = control.identity()
    # The runtime's clock, which never steps: a plan's instants mean the same on both sides.
    clock = Clock(control.state()["now"], time.monotonic())
    supervisor.clock = clock
    snapshot_id = record_snapshot(store, identity, clock.now())
    run_id = record_run(store, settings, clock.now())
    stack.callback(end_run, store, run_id, clock)
    initial = initial_config(settings, identity)
    probes: list[Probe] = [HostProbe(settings.data_dir), NvmlProbe(), ProcessProbe(supervisor.pids)]
    collector = Collector(supervisor.client(), store, probes, run_dir=supervisor.run_dir)
    daemon = Daemon(
        settings,
        store,
        supervisor.client(),
        supervisor.client(),
        collector,
        identity,
        snapshot_id,
        run_id,
        clock,
    )
    supervisor.while_stopping = lambda: read_last(collector, clock)
    daemon.stop_event = stop
    daemon.start(initial)
    stack.callback(daemon.close)
    api = DaemonServer(
        settings.data_dir, settings.api.port, lambda: status_of(daemon, supervisor), wisher(daemon)
    )
    stack.callback(api.close)
    api.start()
    keeper = (
        DashboardKeeper(settings.data_dir, settings.dashboard.port) if settings.dashboard.enabled else None
    )
    if keeper is not None:
        keeper.start()
        stack.callback(keeper.stop)
        left_running.append(keeper.left_running)
    if settings.traffic is not None:
        stack.enter_context(traffic(settings, settings.traffic, supervisor, initial, stop, say))

    def supervise() -> None:
        supervisor.check((daemon.state or {}).get("engine"))
        told = (
            []
            if supervisor.trouble == daemon.trouble
            else [supervisor.trouble or "The runtime serves again."]
        )
        daemon.trouble = supervisor.trouble
        if keeper is not None:
            told += [said] if (said := keeper.check()) is not None else []
            daemon.dashboard_url = keeper.url
        for text in told:
            with store.journal() as session:
                tell(session, clock.now(), "supervise", text)

    def tick_on() -> None:
        try:
            daemon.run(supervise)
        finally:
            stop.set()  # a loop that ended, however, ends the command: nobody would tick, and it would look alive

    loop = threading.Thread(target=tick_on, name="daemon")
    loop.start()
    stack.callback(loop.join)
    stack.callback(stop.set)
    if watch is not None:
        watch(daemon, stop)
    stop.wait()


def tell_recovered(store: Store, recovered: Sequence[Recovered]) -> None:
    """What was done about damaged files, as the first lines of the story that goes on."""
    if recovered:
        with store.journal() as session:
            for one in recovered:
                tell(session, time.time(), "keep", one.told, {"aside": one.aside.name})


def read_last(collector: Collector, clock: Clock) -> None:
    """What ends while the runtime drains belongs into the store like all before it."""
    try:
        collector.collect(clock.now())
    except StoreError as error:
        logger.warning("The last records are not stored: %s", error)


def start_values(settings: Settings, store: Store) -> Mapping[str, Any]:
    """What a fresh runtime starts with: the last confirmed configuration, else the settings' start."""
    last_good = last_good_or_none(store)
    if last_good is None:
        return settings.knobs.start
    try:
        EngineConfig.of(last_good.values)
    except InvalidKnob as error:  # written by a version whose knobs were others
        logger.warning(
            "The last confirmed configuration does not fit this version (%s); starting from the settings.",
            error,
        )
        return settings.knobs.start
    return last_good.values  # knobs that it does not name are the engine's to fit


# --- what people see and ask ----------------------------------------------------------------------


def status_of(daemon: Daemon, supervisor: RuntimeSupervisor) -> dict[str, Any]:
    """What the daemon knows without reading the store: it answers while a tick runs."""
    return {
        "pid": os.getpid(),
        "run_id": daemon.run_id,
        "snapshot_id": daemon.snapshot_id,
        "mode": daemon.settings.mode,
        "is_paused": daemon.desk.is_paused,
        "doing": daemon.doing,
        "notice": daemon.notice.status(),
        "planning": None if (planned := daemon.planned) is None else planned.to_dict(),
        "started_at": daemon.started_at,
        "api_url": daemon.identity["api_url"],
        "model": daemon.identity["model"]["name"],
        "num_failures": dict(daemon.num_failures),
        "costs": daemon.costs.to_dict(),
        "engine": (daemon.state or {}).get("engine", "unknown"),
        "dashboard_url": daemon.dashboard_url,
    }


def wisher(daemon: Daemon) -> Callable[..., Any]:
    def wish(action: str, arguments: Mapping[str, Any], actor: str, role: str) -> Any:
        asked = Wish(action, arguments, actor, role)
        daemon.wishes.put(asked)
        return asked.answer

    return wish


# --- traffic --------------------------------------------------------------------------------------


@contextlib.contextmanager
def traffic(
    settings: Settings,
    wanted: TrafficSettings,
    supervisor: RuntimeSupervisor,
    initial: EngineConfig,
    stop: threading.Event,
    say: Callable[[str], None],
) -> Iterator[None]:
    """The generated load, in its own process, for as long as the daemon runs; none where we are to stop before that."""
    identity = supervisor.client().identity()
    api_url = identity["api_url"]
    if wanted.utilisation is not None:
        share = wanted.utilisation
        capacity = capacity_per_s(settings, wanted, identity, supervisor, initial, stop, say)
        if capacity is None:
            yield
            return
        rate = share * capacity
        wanted = wanted.model_copy(update={"utilisation": None, "rate_per_s": rate})
        logger.info(
            "Traffic: %.2f requests/s, %s of the start configuration's capacity",
            rate,
            share,
        )
    words = traffic_command(
        api_url,
        wanted,
        report=settings.data_dir / "traffic.jsonl",
        vocab_size=identity["model"]["vocab_size"],
    )
    with open(settings.data_dir / "traffic.log", "ab") as log:
        child = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=client_environment(settings)
        )
    try:
        yield
    finally:
        child.terminate()
        try:
            child.wait(STOP_TRAFFIC_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def client_environment(settings: Settings) -> dict[str, str]:
    """For our own clients, which bring the key that everyone has to bring."""
    path = settings.server.api_key_file
    if path is None:
        return dict(os.environ)
    key = (path.expanduser().read_text().splitlines() or [""])[0].strip()
    return {**os.environ, API_KEY_VARIABLE: key}


def capacity_per_s(
    settings: Settings,
    wanted: TrafficSettings,
    identity: Mapping[str, Any],
    supervisor: RuntimeSupervisor,
    initial: EngineConfig,
    stop: threading.Event,
    say: Callable[[str], None],
) -> float | None:
    """Requests a second that the start configuration serves when there is always more to do; None where it was stopped
    meanwhile.

    Measured once a data folder and start configuration: a champion of a later run must not raise the load.
    """
    path = settings.data_dir / CAPACITY_FILE
    key = f"{initial.config_id}:{hashlib.sha256(wanted.model_dump_json().encode()).hexdigest()[:12]}"
    if path.exists():
        kept = json.loads(path.read_text())
        if kept["key"] == key:
            return float(kept["requests_per_s"])
    control = supervisor.client()
    champion = control.state()["champion"]
    if settings.mode != "observe":  # which touches nothing: then it is the capacity of what serves
        control.reconfigure(initial.values(), None)
    words = traffic_command(
        identity["api_url"],
        at_rate(wanted, 1.0),
        duration_s=CAPACITY_S,
        capacity=True,
        vocab_size=identity["model"]["vocab_size"],
    )
    say(
        f"{identity['model']['name']} is served at {identity['api_url']}. For {CAPACITY_S:g} s it is measured how much "
        "the start configuration serves at most, so that traffic suits this machine; once."
    )
    try:
        measured = told_by(words, CAPACITY_S + 120, client_environment(settings), stop)
    finally:
        if settings.mode != "observe":
            control.reconfigure(champion, None)
    if measured is None:
        return None
    write_private(path, json.dumps({"key": key, **measured}))
    return float(measured["requests_per_s"])


def told_by(
    words: Sequence[str], limit_s: float, environment: Mapping[str, str], stop: threading.Event
) -> dict[str, Any] | None:
    """The last line that a command writes, as JSON. It is ended and None returned when `stop` is set; a Ctrl-C reaches
    us alone.

    Raises:
        Unavailable: it failed, or took too long.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment, start_new_session=True
        )
        try:
            waited_until = time.monotonic() + limit_s
            while child.poll() is None and not stop.wait(LOOK_S) and time.monotonic() < waited_until:
                pass
        finally:
            has_ended = child.poll() is not None
            child.kill()
            child.wait()
        if stop.is_set():
            return None
        out.seek(0)
        err.seek(0)
        if not has_ended or child.returncode != 0:
            why = (err.read().strip().splitlines() or [f"it did not end within {limit_s:g} s"])[-1]
            raise Unavailable(f"The start configuration's capacity could not be measured: {why}")
        measured: dict[str, Any] = json.loads(out.read().splitlines()[-1])
        return measured


# --- process --------------------------------------------------------------------------------------


@contextlib.contextmanager
def signals_set(stop: threading.Event, last_words: Callable[[], str] = lambda: "") -> Iterator[None]:
    """SIGINT and SIGTERM set the event; the second one says what it leaves behind and ends the process at once."""

    def on_signal(number: int, frame: Any) -> None:
        if stop.is_set():
            # Written past every buffer and lock: the code that was interrupted may hold them.
            os.write(2, f"\nStopped at once. {last_words()}\n".encode())
            os._exit(128 + number)
        stop.set()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def log_to_file(settings: Settings) -> None:
    handler = RotatingFileHandler(settings.data_dir / "daemon.log", maxBytes=10_000_000, backupCount=3)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    logging.getLogger("httpx").setLevel(logging.WARNING)
