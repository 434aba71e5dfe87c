"""Benchmarks: `python -m tuner.bench aa | azure --trace FILE | harm | hour | anomalies | quality`.

Each prints a table for people; the last line of stdout is one JSON document. Progress goes to stderr.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.host import num_cores
from runtime.knobs import EngineConfig
from store.interval import Rate
from tuner.bench import hour as hour_bench
from tuner.bench import quality as quality_bench
from tuner.bench.aa import LevelReport, lord_level, run_aa
from tuner.bench.harm import run_harm
from tuner.bench.trace import run_demo, run_trace

SEED = 20261123


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tuner.bench", description="Benchmarks of the judge.")
    commands = parser.add_subparsers(dest="command", required=True)
    aa = commands.add_parser("aa", help="false promotions of the champion against itself, and power")
    aa.add_argument("--experiments", type=int, default=5000)
    aa.add_argument("--alpha", type=float, default=0.05)
    aa.add_argument("--lord", action="store_true", help="both again at the first LORD++ level")
    azure = commands.add_parser(
        "azure", help="pair noise on a recorded trace, with and without the champion twin"
    )
    azure.add_argument("--trace", type=Path, required=True)
    azure.add_argument(
        "--runs", type=int, default=5, help="times the trace is served, with other noise each time"
    )
    harm = commands.add_parser("harm", help="false stops and speed of the harm rule")
    harm.add_argument("--experiments", type=int, default=4000)
    hour = commands.add_parser("hour", help="the real engine against itself for an hour, and coins over it")
    hour_bench.add_arguments(hour)
    anomalies = commands.add_parser("anomalies", help="recall, delay, false alarms and price of noticing")
    anomalies.add_argument("--num", type=int, default=100, help="anomalies of each kind; 0 for none")
    anomalies.add_argument("--days", type=float, default=3.0, help="quiet days at 1 Hz; 0 for none")
    anomalies.add_argument("--jobs", type=int, default=num_cores(), help="kinds that are tried at a time")
    quality = commands.add_parser(
        "quality", help="weight formats against the loaded weights, beside live streams"
    )
    quality_bench.add_arguments(quality)
    for command in (aa, azure, harm, hour, anomalies, quality):
        command.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args(argv)
    began = time.monotonic()
    benchmarks = {
        "aa": bench_aa,
        "azure": bench_azure,
        "harm": bench_harm,
        "hour": hour_bench.bench_hour,
        "anomalies": bench_anomalies,
        "quality": quality_bench.bench_quality,
    }
    document = benchmarks[args.command](args)
    elapsed_s = time.monotonic() - began
    print(
        json.dumps(
            {"benchmark": args.command, "seed": args.seed, "elapsed_s": round(elapsed_s, 1), **document}
        )
    )
    return 0


def bench_aa(args: argparse.Namespace) -> dict[str, Any]:
    levels = (args.alpha, lord_level()) if args.lord else (args.alpha,)
    reports = run_aa(args.experiments, levels, args.seed, lambda done: _progress(done, args.experiments))
    print(
        f"{args.experiments} experiments of equal arms, 60 pairs of 60 s slices at most, pair sd "
        f"{reports[0].pair_sd:.3f} log units; the same with a challenger that is 10 % faster"
    )
    print(
        f"{'level':>9}  {'false promotions (95 % interval)':<36}{'holds level':<13}"
        f"{'power at 10 % (95 % interval)':<34}pairs"
    )
    for report in reports:
        print(_aa_row(report))
    return {"experiments": args.experiments, "levels": [report.to_dict() for report in reports]}


def _aa_row(report: LevelReport) -> str:
    verdict = (
        "contains"
        if report.holds_level
        else "below"
        if report.false_promotions.high < report.level
        else "ABOVE"
    )
    pairs = "-" if report.pairs_to_promote is None else f"{report.pairs_to_promote:.0f}"
    return (
        f"{report.level:>9.3%}  {_rate(report.false_promotions):<36}{verdict:<13}"
        f"{_rate(report.promotions_at_gain):<34}{pairs}"
    )


def _rate(rate: Rate) -> str:
    return f"{rate.ratio:.2%} ({rate.low:.2%} to {rate.high:.2%})"


DEMO_START = {"max_num_seqs": 2, "batch_wait_ms": 50, "max_batched_tokens": 64}  # that of configs/demo.yaml


def bench_azure(args: argparse.Namespace) -> dict[str, Any]:
    found = run_trace(args.trace, args.seed, args.runs)
    _print_noise(f"{found['trace']}, lengths times {found['length_factor']:.4f}", found)
    demo = {
        "demo traffic under the demo's poor start": run_demo(
            args.seed, EngineConfig.of(DEMO_START), 0.87, args.runs
        ),
        "demo traffic under the default": run_demo(args.seed, EngineConfig.of({}), 0.6, args.runs),
    }
    for name, noise in demo.items():
        _print_noise(name, noise)
    print(
        "drifting twin: follows its own backlog. twin: starts each pair from the engine's real one (the default). "
        "covariates: in use only where the twin is not, and where they cut the sd by 10 % on windows of the past."
    )
    return {**found, "demo": demo}


def _print_noise(name: str, found: Mapping[str, Any]) -> None:
    busy = sum(run["utilisation"] for run in found["runs"]) / len(found["runs"])
    print(
        f"\n{name}: {found['num_requests']} requests, clock times {found['clock_stretch']:.3f} "
        f"({found['requests_per_s']:.2f} requests/s, utilisation {busy:.2f})"
    )
    print("Fitted on the first third; errors of the step model and of a window's latency, by run:")
    print(
        f"{'run':>4}{'steps':>8}{'step error':>12}{'twin error':>12}{'used':>6}{'later twin error':>18}"
        f"{'covariates pass their rule':>28}"
    )
    for index, run in enumerate(found["runs"]):
        print(
            f"{index:>4}{run['num_steps']:>8}{run['step_error']:>12.1%}{_share(run['twin_error']):>12}"
            f"{'yes' if run['twin_usable'] else 'no':>6}{_share(run['later_twin_error']):>18}"
            f"{'yes' if run['covariates_usable'] else 'no':>28}"
        )
    print(
        "Champion against itself: sd of a pair (log units) and pairs for 80 % power for a 10 % gain at 5 %:"
    )
    kinds = ("raw", "covariates", "drifting", "twin")
    print(
        f"{'slice':>6}{'pairs':>7}{'requests':>10}"
        + "".join(f"{kind + (' twin' if kind == 'drifting' else ''):>15}" for kind in kinds)
        + f"{'twin, hours':>13}"
    )
    for row in found["pairs"]:
        columns = "".join(f"{row[kind + '_sd']:>8.3f}{row[kind + '_pairs_needed']:>7}" for kind in kinds)
        print(
            f"{row['slice_s']:>4.0f} s{row['num_pairs']:>7}{row['requests_per_slice']:>10.0f}{columns}"
            f"{row['twin_hours_needed']:>13.2f}"
        )


def bench_harm(args: argparse.Namespace) -> dict[str, Any]:
    found = run_harm(args.experiments, args.seed)
    false_stops = Rate.of(found["false_stops"], found["experiments"])
    print(
        f"Equal challengers stopped: {_rate(false_stops)} of {found['experiments']} experiments of "
        f"{found['pairs_each']} pairs (limit 2 %)"
    )
    print(
        f"{'slower by':>10}{'stopped':>9}{'in 15 s or 60 requests':>24}{'median s':>10}{'90 % s':>8}"
        f"{'median requests':>17}{'judge alone, pairs':>20}"
    )
    for row in found["slow"]:
        p90 = "-" if row["p90_scored_s"] is None else f"{row['p90_scored_s']:.0f}"
        print(
            f"{row['slowdown']:>9.1f}x{row['stopped_share']:>9.0%}{row['within_15_s_or_60_requests_share']:>24.0%}"
            f"{row['median_scored_s']:>10.0f}{p90:>8}{row['median_requests']:>17.0f}{row['judge_median_pairs']:>20.0f}"
        )
    return {**found, "false_stop_rate": {**false_stops._asdict(), "ratio": false_stops.ratio}}


def bench_anomalies(args: argparse.Namespace) -> dict[str, Any]:
    from tuner.bench.anomalies import report, run_anomalies  # the store, which the others need not load

    found = run_anomalies(
        args.num, args.days, args.seed, args.jobs, lambda what: print(what, file=sys.stderr, flush=True)
    )
    print(report(found))
    return found


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _progress(done: int, total: int) -> None:
    if done % 500 == 0 or done == total:
        print(
            f"\r{done} of {total} experiments", end="\n" if done == total else "", file=sys.stderr, flush=True
        )


if __name__ == "__main__":
    raise SystemExit(main())
