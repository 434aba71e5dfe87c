"""What quality checks cost and find: every weight format of a model against its loaded weights, beside live streams.

    python -m tuner.bench quality [--model PATH] [--streams 4]

Starts a runtime of its own. For each format: positions, loss, agreement and the verdict at the shipped limits,
seconds alone and beside traffic, the longest piece (what the engine made others wait for), and the gaps between
tokens that clients saw without and with scoring.
"""

import argparse
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

from runtime.knobs import EngineConfig
from tuner.connection import Connection
from tuner.quality.comparison import QualityLimits, compare
from tuner.quality.read import read_canary
from tuner.settings import ModelSettings, ServerSettings, Settings
from tuner.settings_quality import QualitySettings
from tuner.supervisor import RuntimeSupervisor

QUIET_S = 8.0
MAX_TOKENS = 256


@dataclass
class Streams:
    """Clients that always have one request under way, and the gaps between tokens that they saw."""

    api_url: str
    model: str
    seed: int
    num: int
    gaps: list[tuple[float, float]] = field(default_factory=list)  # (when it ended, s)
    stop: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self) -> Iterator["Streams"]:
        threads = [threading.Thread(target=self._stream, args=(number,)) for number in range(self.num)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self.stop.set()
            for thread in threads:
                thread.join()

    def between(self, since: float, until: float) -> list[float]:
        return sorted(gap_s for at, gap_s in list(self.gaps) if since <= at < until)

    def _stream(self, number: int) -> None:
        with httpx.Client(base_url=self.api_url, timeout=120.0, trust_env=False) as http:
            while not self.stop.is_set():
                body = {"model": self.model, "prompt": f"# part {number}\n", "max_tokens": MAX_TOKENS, "stream": True,
                        "ignore_eos": True, "temperature": 1.0, "seed": self.seed + number}  # fmt: skip
                last_at: float | None = None
                with http.stream("POST", "/v1/completions", json=body) as answer:
                    for line in answer.iter_lines():
                        if not line.startswith("data: {"):
                            continue
                        now = time.monotonic()
                        if last_at is not None:
                            self.gaps.append((now, now - last_at))
                        last_at = now
                        if self.stop.is_set():
                            break


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="demo", help="model folder, or demo")
    parser.add_argument("--streams", type=int, default=4, help="clients beside the checks")


def bench_quality(args: argparse.Namespace) -> dict[str, Any]:
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tuner-quality-"))
        settings = Settings(
            model=ModelSettings(path=args.model),
            server=ServerSettings(port=0, drain_s=1.0),
            data_dir=Path(folder),
        )
        supervisor = RuntimeSupervisor(settings)
        stack.callback(supervisor.close)
        stack.callback(supervisor.stop, 1.0)
        supervisor.attach_or_start({})
        control = supervisor.client()
        identity = control.identity()
        name = identity["model"]["name"]
        streams = Streams(identity["api_url"], name, args.seed, args.streams)
        found = {
            "model": name,
            "device": identity["hardware"]["device_name"],
            "streams": args.streams,
            **measured(control, settings.quality, streams),
        }
    show(found)
    return found


def measured(control: Connection, quality: QualitySettings, streams: Streams) -> dict[str, Any]:
    configs = formats(control)
    limits = QualityLimits(quality.max_delta_nll, quality.min_top1_agreement)
    alone = [read_canary(control, config, None, quality.piece_tokens, True) for config in configs]
    with streams.running():
        time.sleep(QUIET_S / 4)
        quiet_since = time.monotonic()
        time.sleep(QUIET_S)
        quiet = streams.between(quiet_since, time.monotonic())
        rows = []
        for config, before in zip(configs, alone, strict=True):
            since = time.monotonic()
            beside = read_canary(control, config, before.token_ids, quality.piece_tokens, True)
            gaps = streams.between(since, time.monotonic())
            compared = compare(alone[0].scores, beside.scores, limits)
            rows.append({
                "weight_format": config.weight_format, "is_passed": compared.is_passed, **asdict(compared),
                "same_as_alone": beside.scores == before.scores,
                "alone_s": before.timings["elapsed_s"], "beside_s": beside.timings["elapsed_s"],
                "computed_s": beside.timings["busy_s"],
                "longest_piece_s": beside.timings["longest_piece_s"], **spread(gaps, "gap"),
            })  # fmt: skip
    return {"formats": rows, **spread(quiet, "quiet_gap")}


def formats(control: Connection) -> list[EngineConfig]:
    """The loaded format first: it is the reference, and stands in the table against itself."""
    state = control.state()
    champion = EngineConfig.of(state["champion"])
    report = next(knob for knob in state["knobs"] if knob["name"] == "weight_format")
    return [champion.patched({"weight_format": name}) for name in report["choices"]]


def spread(gaps: Sequence[float], name: str) -> dict[str, float | int | None]:
    """Median, 99th percentile and largest, in seconds; None where there was none."""
    if not gaps:
        return {f"num_{name}s": 0, f"{name}_p50_s": None, f"{name}_p99_s": None, f"{name}_max_s": None}
    return {
        f"num_{name}s": len(gaps), f"{name}_p50_s": gaps[len(gaps) // 2],
        f"{name}_p99_s": gaps[int(0.99 * (len(gaps) - 1))], f"{name}_max_s": gaps[-1],
    }  # fmt: skip


def show(found: dict[str, Any]) -> None:
    rows = found["formats"]
    print(
        f"{found['model']} on {found['device']}: {rows[0]['num_positions']} positions in {rows[0]['num_passages']} "
        f"passages, {found['streams']} streams beside"
    )
    print(
        f"{'weights':<10}{'loss, nats a token (95 %)':>28}{'same token (95 %)':>22}{'verdict':>9}"
        f"{'alone s':>9}{'beside s':>10}{'longest piece ms':>18}{'as alone':>10}"
    )
    for row in rows:
        loss = f"{row['delta_nll']:+.4f} (at most {row['delta_nll_high']:+.4f})"
        same = f"{row['top1_agreement']:.1%} (at least {row['top1_low']:.1%})"
        print(
            f"{row['weight_format']:<10}{loss:>28}{same:>24}{'holds' if row['is_passed'] else 'FAILS':>7}"
            f"{row['alone_s']:>9.2f}{row['beside_s']:>10.2f}{1e3 * row['longest_piece_s']:>18.1f}"
            f"{'yes' if row['same_as_alone'] else 'NO':>10}"
        )
    print("Gaps between tokens that clients saw, ms: median, 99 %, longest")
    print(f"{'no scoring':<22}{_gaps(found, 'quiet_gap')}")
    for row in rows:
        print(f"{'scoring ' + row['weight_format']:<22}{_gaps(row, 'gap')}")


def _gaps(found: dict[str, Any], name: str) -> str:
    if not found[f"num_{name}s"]:
        return "none"
    return "".join(f"{1e3 * found[f'{name}_{what}_s']:>9.1f}" for what in ("p50", "p99", "max"))
