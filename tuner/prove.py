"""The fifteen-minute proof: from a poor start, unattended, to a promoted configuration that stands the comparison.

    python -m tuner.prove [--config configs/demo.yaml] [--data-dir var/prove]

Starts `tuner run` as a user would, on a fresh store, and only watches until a promotion is applied. Then it
measures the promoted configuration for as long as the start was measured, and at last sends the same requests
to it and to the shipped default, block by block. Slices of experiments are left out
of every figure. Prints what it found; the last line is one JSON document; exit 1 where a claim fails.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from runtime.client import RuntimeClient
from runtime.knobs import EngineConfig, default_config
from store import decisions, queries
from store.database import StoreReader
from store.errors import StoreError
from store.tables import Change
from tuner.api import DaemonClient
from tuner.judging.objective import quantile
from tuner.load.report import Outcome, read_report
from tuner.load.traffic import command as traffic_command
from tuner.promote import describe
from tuner.report import explain_report
from tuner.settings import TrafficSettings

MEASURE_S = 185.0
SETTLE_S = 15.0
START_UP_S = 5.0
BLOCK_S, NUM_BLOCK_PAIRS = 30.0, 7
MAX_PROMOTION_S = 900.0
MIN_DROP, MAX_EXCESS = 0.60, 0.10
POLL_S = 2.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tuner.prove", description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--data-dir", type=Path, default=Path("var/prove"))
    parser.add_argument("--port", type=int, default=0, help="port of the API; any free one if not given")
    args = parser.parse_args()
    if args.data_dir.exists():
        shutil.rmtree(args.data_dir)
    words = [
        sys.executable,
        "-m",
        "tuner.cli",
        "run",
        "--config",
        str(args.config),
        "--data-dir",
        str(args.data_dir),
        "--port",
        str(args.port),
        "--plain",
        "--set",
        f"learn.champion_s={MEASURE_S + 2 * START_UP_S}",
    ]
    began = time.time()
    child = subprocess.Popen(
        words, start_new_session=True
    )  # Ctrl-C is for us; the child gets one signal, from us
    try:
        report = prove(args.data_dir, child, began)
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(120)
    print(json.dumps(report))
    return 0 if all(report["claims"].values()) else 1


def prove(data_dir: Path, child: subprocess.Popen[bytes], began: float) -> dict[str, Any]:
    reader = StoreReader(data_dir)
    start, change = wait_for_promotion(reader, child, began)
    applied_at = change.applied_at or began
    promoted_s = applied_at - began
    print(
        f"\nPromoted after {promoted_s:.0f} s: {change.to_config_id}. Measuring it for {MEASURE_S:.0f} s.",
        flush=True,
    )
    wait_until(applied_at + SETTLE_S + MEASURE_S, child)
    before = measured(reader, [undisturbed_start(reader, data_dir)], start.to_config_id, is_warm=False)
    after = measured(
        reader,
        [(applied_at + SETTLE_S, applied_at + SETTLE_S + MEASURE_S)],
        change.to_config_id,
    )
    promoted, default = compare_with_default(reader, data_dir, child, change)
    drop = 1.0 - after["p95_s"] / before["p95_s"]
    excess = promoted["p95_s"] / default["p95_s"] - 1.0
    report = {
        "promoted_s": round(promoted_s, 1),
        "drop_ratio": round(drop, 4),
        "excess_over_default_ratio": round(excess, 4),
        "before": before,
        "after": after,
        "promoted_beside_default": promoted,
        "default_beside_promoted": default,
        "claims": {
            "promoted within 15 minutes": promoted_s <= MAX_PROMOTION_S,
            "p95 at least 60 % lower": drop >= MIN_DROP,
            "p95 within 10 % of the shipped default": excess <= MAX_EXCESS,
            "measured for 3 minutes each": min(
                before["seconds"], after["seconds"], promoted["seconds"], default["seconds"]
            )
            >= 180.0,
            "the whole chain stands in the store": chain_is_whole(data_dir, change),
        },
    }
    print_report(report, data_dir, change)
    return report


def wait_for_promotion(
    reader: StoreReader, child: subprocess.Popen[bytes], began: float
) -> tuple[Change, Change]:
    """The change that put the start in force and the one that promoted its successor."""
    while True:
        alive(child)
        try:
            with reader.journal() as session:
                changes = [change for change in queries.changes(session) if change.state == "APPLIED"]
        except StoreError:
            changes = []
        by_kind = {change.kind: change for change in sorted(changes, key=lambda change: -change.change_id)}
        if "promote" in by_kind:
            return by_kind["start"], by_kind["promote"]
        if time.time() - began > 2 * MAX_PROMOTION_S:
            raise SystemExit("No promotion within half an hour; `tuner history` tells what was tried.")
        time.sleep(POLL_S)


def undisturbed_start(reader: StoreReader, data_dir: Path) -> tuple[float, float]:
    """From the first seconds of traffic to the first experiment: the start configuration alone."""
    with open(data_dir / "traffic.jsonl") as report:
        started_at = json.loads(report.readline())["started_at"]
    with reader.journal() as session:
        first = min(experiment.created_at for experiment in decisions.all_experiments(session))
    return started_at + START_UP_S, first


def measured(
    reader: StoreReader, spans: Sequence[tuple[float, float]], config_id: str, is_warm: bool = True
) -> dict[str, Any]:
    """End-to-end latency of the requests that arrived in the spans outside all slices.

    `config_id` is what served them; a request that waited so long that another configuration made its first
    token counts where nothing else was chosen for it (`is_warm` False: the start, with its backlog).
    """
    latencies, num_failed, quiet_s = [], 0, 0.0
    for start_at, end_at in spans:
        with reader.journal() as session:
            slices = queries.slices_between(session, start_at, end_at)
        quiet_s += end_at - start_at
        quiet_s -= sum(
            min(row.planned_end_at, end_at) - max(row.planned_start_at, start_at) for row in slices
        )
        with reader.metrics() as session:
            rows = [
                row for row in queries.timings_between(session, start_at, end_at) if row.arrival_slice is None
            ]
        rows = [row for row in rows if not is_warm or row.config_id == config_id]
        latencies += [
            row.finished_at - row.arrived_at for row in rows if row.finish_reason in ("stop", "length")
        ]
        num_failed += sum(row.finish_reason in ("error", "rejected", "timeout") for row in rows)
    if not latencies:
        raise SystemExit(f"No request was served under {config_id} outside of slices; nothing to compare.")
    return figures(config_id, quiet_s, latencies, num_failed)


def compare_with_default(
    reader: StoreReader, data_dir: Path, child: subprocess.Popen[bytes], change: Change
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Promoted and shipped default on the same requests; leaves the promoted one in force.

    Tuning is paused and the generated traffic stopped. Each pair of blocks then gets arrivals of its own, the
    same ones for both configurations, from an empty queue: the bursts of separate minutes would hide what differs.
    """
    DaemonClient(data_dir).act("pause", {})
    control = RuntimeClient.of_run_dir(data_dir / "run")
    identity = control.identity()
    hardware = identity["hardware"]
    with reader.journal() as session:
        promoted = EngineConfig.of(decisions.config_values(session, change.to_config_id))
    default = default_config(hardware["device"], hardware["num_cores"], identity.get("fitted_knobs"))
    stop_traffic(child.pid)
    while control.state()["gauges"]["num_live"]:
        wait_until(time.time() + POLL_S, child)
    print(
        f"Beside the shipped default ({describe(promoted.values(), default.values())}), "
        f"{NUM_BLOCK_PAIRS} pairs of blocks of {BLOCK_S:.0f} s, the same requests in both of a pair.",
        flush=True,
    )
    sent = TrafficSettings.model_validate(traffic_settings(data_dir))
    outcomes: dict[bool, list[Outcome]] = {False: [], True: []}
    for pair in range(NUM_BLOCK_PAIRS):
        settings = sent.model_copy(update={"seed": sent.seed + 1000 + pair})
        for is_default in (False, True) if pair % 2 == 0 else (True, False):
            alive(child)
            control.reconfigure((default if is_default else promoted).values(), None)
            outcomes[is_default] += block(settings, identity, data_dir)
    control.reconfigure(promoted.values(), None)
    control.close()
    return block_figures(outcomes[False], promoted.config_id), block_figures(
        outcomes[True], default.config_id
    )


def stop_traffic(run_pid: int) -> None:
    """Ends the load that `tuner run` makes; it takes no notice before its own end."""
    for process in psutil.Process(run_pid).children(recursive=True):
        if "tuner.load.traffic" in process.cmdline():
            process.terminate()


def traffic_settings(data_dir: Path) -> dict[str, Any]:
    """The `traffic` section as it was sent, with the rate that the measured capacity gave."""
    with open(data_dir / "traffic.jsonl") as report:
        sent: dict[str, Any] = json.loads(report.readline())["settings"]
    return sent


def block(settings: TrafficSettings, identity: Mapping[str, Any], data_dir: Path) -> list[Outcome]:
    """Sends one block's requests and waits until the last has ended."""
    path = data_dir / "block.jsonl"
    vocab_size = identity["model"]["vocab_size"]
    words = traffic_command(
        identity["api_url"], settings, duration_s=BLOCK_S, report=path, vocab_size=vocab_size
    )
    subprocess.run(words, check=True, capture_output=True)
    return read_report(path).outcomes


def block_figures(outcomes: Sequence[Outcome], config_id: str) -> dict[str, Any]:
    latencies = [outcome.e2e_s for outcome in outcomes if outcome.ok and outcome.e2e_s is not None]
    num_failed = sum(not outcome.ok for outcome in outcomes)
    return figures(config_id, NUM_BLOCK_PAIRS * BLOCK_S, latencies, num_failed)


def figures(config_id: str, seconds: float, latencies: Sequence[float], num_failed: int) -> dict[str, Any]:
    return {
        "config_id": config_id,
        "seconds": round(seconds, 1),
        "num_requests": len(latencies),
        "num_failed": num_failed,
        "p50_s": round(quantile(latencies, 0.50) or 0.0, 4),
        "p95_s": round(quantile(latencies, 0.95) or 0.0, 4),
        "mean_s": round(sum(latencies) / len(latencies), 4),
    }


def chain_is_whole(data_dir: Path, change: Change) -> bool:
    """Every link from the change back to the study that caused it, with every pair's coin and scores."""
    story = explain_report(data_dir, str(change.change_id))
    return story.is_complete


def print_report(report: dict[str, Any], data_dir: Path, change: Change) -> None:
    print(explain_report(data_dir, str(change.change_id)).to_text())
    print(f"\n{'':24}{'requests':>9}{'failed':>8}{'seconds':>9}{'p50 s':>9}{'p95 s':>9}{'mean s':>9}")
    for name in ("before", "after", "promoted_beside_default", "default_beside_promoted"):
        row = report[name]
        print(
            f"{name:24}{row['num_requests']:>9}{row['num_failed']:>8}{row['seconds']:>9}"
            f"{row['p50_s']:>9}{row['p95_s']:>9}{row['mean_s']:>9}"
        )
    print(
        f"\np95 {report['drop_ratio']:.1%} lower than at the start; "
        f"{report['excess_over_default_ratio']:+.1%} against the shipped default."
    )
    for claim, holds in report["claims"].items():
        print(f"{'holds ' if holds else 'FAILS '} {claim}")


def alive(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is not None:
        raise SystemExit(f"`tuner run` ended with code {child.returncode} before it was asked to.")


def wait_until(instant: float, child: subprocess.Popen[bytes]) -> None:
    while time.time() < instant:
        alive(child)
        time.sleep(min(POLL_S, max(0.0, instant - time.time())))


if __name__ == "__main__":
    sys.exit(main())
