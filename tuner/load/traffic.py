"""The load: a process that sends requests as planned, whatever the server does, and reports on them.

    URL=http://127.0.0.1:8000
    python -m tuner.load.traffic --url $URL --settings '{"rate_per_s": 5}' --duration 60 --report load.jsonl
    python -m tuner.load.traffic --url $URL --settings '{"rate_per_s": 5}' --duration 30 --capacity

The loop is open: a slow server does not slow the arrivals down. Two runs with the same settings see the
same instants, the same lengths and the same words; `phase` changes the words alone, so that a second run
over the same arrivals finds no prompt in a cache. SIGTERM stops the arrivals and lets open requests finish
for `DRAIN_S`.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from pydantic import ValidationError

from tuner.errors import SettingsError, TunerError
from tuner.load.arrivals import length_scale
from tuner.load.capacity import Capacity, measure_capacity
from tuner.load.report import Outcome, describe, outcome_line, summarise
from tuner.load.send import DEFAULT_TIMEOUT_S, MAX_OPEN_REQUESTS, Load, OnOutcome, Sender, served_model
from tuner.load.stream_client import Target
from tuner.settings import TrafficSettings

__all__ = ["Capacity", "command", "drive", "main", "measure_capacity", "run"]

DRAIN_S = 10.0
API_KEY_VARIABLE = "TUNER_API_KEY"


# --- open loop ------------------------------------------------------------------------------------


async def drive(load: Load, on_outcome: OnOutcome, stop: asyncio.Event) -> float:
    """Sends every arrival at its planned instant until the duration is over or `stop` is set, then lets
    open requests finish: to their time-out at the end of the duration, `DRAIN_S` seconds after a stop.

    Returns for how many seconds arrivals were sent.
    """
    sender = Sender(load, on_outcome)
    open_requests: set[asyncio.Task[None]] = set()
    start_at = sender.clock()
    for index, arrival in enumerate(load.arrivals()):
        if load.duration_s is not None and arrival.at_s >= load.duration_s:
            await is_set_within(stop, start_at + load.duration_s - sender.clock())
            break
        planned_at = start_at + arrival.at_s
        body = load.body(index, arrival)  # made before its moment, so that the request leaves on time
        if await is_set_within(stop, planned_at - sender.clock()):
            break
        if len(open_requests) >= MAX_OPEN_REQUESTS:
            sender.skip(index, arrival, planned_at)
            continue
        task = asyncio.create_task(sender.send(index, arrival, planned_at, body))
        open_requests.add(task)
        task.add_done_callback(open_requests.discard)
    window_s = sender.clock() - start_at
    await finish(open_requests, DRAIN_S if stop.is_set() else load.timeout_s + 1.0, stop)
    sender.client.close()
    return window_s


async def is_set_within(stop: asyncio.Event, wait_s: float) -> bool:
    """Waits that long, less if `stop` is set meanwhile; gives way to other tasks in any case."""
    if wait_s <= 0.0:
        await asyncio.sleep(0)
        return stop.is_set()
    try:
        async with asyncio.timeout(wait_s):
            return await stop.wait()
    except TimeoutError:
        return False


async def finish(tasks: set[asyncio.Task[None]], wait_s: float, stop: asyncio.Event) -> None:
    """Waits for the open requests, and cuts off what is open after `wait_s`, or `DRAIN_S` after a stop."""
    end_at = time.monotonic() + wait_s
    while tasks and (left_s := end_at - time.monotonic()) > 0.0:
        if stop.is_set():
            end_at = min(end_at, time.monotonic() + DRAIN_S)
            left_s = end_at - time.monotonic()
        await asyncio.wait(tasks, timeout=min(left_s, 0.25) if not stop.is_set() else left_s)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# --- the process ----------------------------------------------------------------------------------


def command(
    url: str,
    settings: TrafficSettings,
    *,
    duration_s: float | None = None,
    report: Path | None = None,
    phase: int = 0,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    vocab_size: int | None = None,
    capacity: bool = False,
) -> list[str]:
    """The command line of this process, which ends when the caller does.

    An API key goes into its environment as TUNER_API_KEY. `vocab_size` is asked of the server if not given.
    """
    words = [
        sys.executable,
        "-m",
        "tuner.load.traffic",
        "--url",
        url,
        "--settings",
        settings.model_dump_json(),
    ]
    words += ["--phase", str(phase), "--timeout-s", str(timeout_s), "--end-with-parent"]
    if duration_s is not None:
        words += ["--duration", str(duration_s)]
    if report is not None:
        words += ["--report", str(report)]
    if vocab_size is not None:
        words += ["--vocab-size", str(vocab_size)]
    if capacity:
        words += ["--capacity"]
    return words


def run(load: Load, report: TextIO | None = None, end_with_parent: bool = False) -> dict[str, Any]:
    """Sends the load until it ends or a signal stops it; returns the summary, also written to `report`.

    The report is JSON lines: one `plan`, one `outcome` a request as it ends, one `summary`.
    """
    plan = plan_of(load)
    outcomes: list[Outcome] = []

    def write(kind: str, record: dict[str, Any]) -> None:
        if report is not None:
            report.write(json.dumps({"record": kind, **record}) + "\n")

    def on_outcome(outcome: Outcome) -> None:
        outcomes.append(outcome)
        if report is not None:
            report.write(outcome_line(outcome) + "\n")

    write("plan", plan)
    cpu_before_s, began = time.process_time(), time.monotonic()
    window_s = asyncio.run(drive_until_told(load, on_outcome, end_with_parent))
    cpu_s, ran_s = time.process_time() - cpu_before_s, time.monotonic() - began
    summary = summarise(outcomes, window_s, planned_rate_per_s=load.settings.rate_per_s)
    summary |= {"sender_cpu_s": cpu_s, "sender_cpu_ratio": cpu_s / ran_s}
    write("summary", summary)
    return summary


def plan_of(load: Load) -> dict[str, Any]:
    return {
        "settings": load.settings.model_dump(mode="json"),
        "model": load.model._asdict(),
        "length_scale": length_scale(load.settings, load.model.context_tokens),
        "duration_s": load.duration_s,
        "phase": load.phase,
        "timeout_s": load.timeout_s,
        "started_at": time.time(),
    }


async def drive_until_told(load: Load, on_outcome: OnOutcome, end_with_parent: bool) -> float:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    watching = asyncio.create_task(stop_with_parent(stop)) if end_with_parent else None
    window_s = await drive(load, on_outcome, stop)
    if watching is not None:
        watching.cancel()
    return window_s


async def stop_with_parent(stop: asyncio.Event) -> None:
    """Sets `stop` when the parent is gone, so that a killed daemon leaves no load behind it."""
    parent_pid = os.getppid()
    while os.getppid() == parent_pid:
        await asyncio.sleep(1.0)
    stop.set()


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tuner.load.traffic", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--url", required=True, help="address of the server, such as http://127.0.0.1:8000")
    parser.add_argument("--settings", required=True, help="the `traffic` section of the settings as JSON")
    parser.add_argument("--duration", type=float, help="seconds of arrivals; without end if not given")
    parser.add_argument("--report", type=Path, help="file for the outcomes, as JSON lines")
    parser.add_argument("--phase", type=int, default=0, help="other words over the same arrivals")
    parser.add_argument(
        "--timeout-s", type=float, default=DEFAULT_TIMEOUT_S, help="seconds until a request is given up"
    )
    parser.add_argument("--model", help="name of the model; the first one served if not given")
    parser.add_argument(
        "--context-tokens", type=int, help="longest prompt plus answer; asked of the server if not given"
    )
    parser.add_argument(
        "--vocab-size", type=int, help="token ids are below it; asked of the server if not given"
    )
    parser.add_argument("--end-with-parent", action="store_true", help="stop when its parent process is gone")
    parser.add_argument(
        "--capacity", action="store_true", help="measure the capacity over --duration instead (20 s)"
    )
    parser.add_argument(
        "--concurrency", type=int, default=32, help="open requests while the capacity is measured"
    )
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """Returns the exit code. The summary goes to standard output as JSON, what a person reads to stderr."""
    args = parse(words)
    try:
        summary = perform(args)
    except TunerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(summary))
    return 0


def perform(args: argparse.Namespace) -> dict[str, Any]:
    try:
        settings = TrafficSettings.model_validate_json(args.settings)
    except ValidationError as error:
        raise SettingsError(
            *(f"--settings: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        ) from error
    api_key = os.environ.get(API_KEY_VARIABLE)
    target = Target.of(args.url, api_key)
    model = served_model(target, args.model, args.context_tokens, args.vocab_size)
    if args.capacity:
        measure_s = args.duration or 20.0
        return measure_capacity(
            args.url, settings, model, concurrency=args.concurrency, measure_s=measure_s, api_key=api_key
        )._asdict()
    load = Load(target, settings, model, args.duration, args.phase, args.timeout_s)
    print(announcement(load), file=sys.stderr, flush=True)
    with ExitStack() as stack:
        report = None if args.report is None else stack.enter_context(open_report(args.report))
        summary = run(load, report, args.end_with_parent)
    print(describe(summary), file=sys.stderr)
    return summary


def announcement(load: Load) -> str:
    settings, scale = load.settings, length_scale(load.settings, load.model.context_tokens)
    rate = (
        "at the trace's own pace" if settings.rate_per_s is None else f"at {settings.rate_per_s:g} requests/s"
    )
    return (
        f"Sending {settings.kind} arrivals {rate} to {load.model.name}; all lengths times {scale:.3f} "
        f"to fit a context of {load.model.context_tokens} tokens; seed {settings.seed}, phase {load.phase}."
    )


def open_report(path: Path) -> TextIO:
    """A file that only its owner reads, written line by line: a killed load leaves what it measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(
        path, "w", buffering=1, encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)
    )


if __name__ == "__main__":
    sys.exit(main())
