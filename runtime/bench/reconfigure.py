"""What changing knobs costs those who are served meanwhile: python -m runtime.bench reconfigure.

Requests run through the serving engine in this process, each followed by another when it ends. Each knob goes to
another value and back, first those that are LIVE, then those that are WARM, and all that again:

    quiet ▶ commit ▶ changed ▶ quiet ▶ commit back ▶ changed        windows of a second

Half of either kind of window are under the one value and half under the other, and they alternate: what the value
itself does to a step and what the machine does cancel. Their p99.9 is the longest of some hundred steps, though, which
differs by a fifth between windows where nothing changes; so it is also set against the quiet windows of the whole run,
and the steps that are longer than those allow are counted, with their chance if there were one in a thousand. A step's
time counts from the end of the one before, so commits are part of it. `replicas` is a knob of the front end and not
changed here.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from runtime.bench.arrivals import ranged_wishes
from runtime.bench.changes import ITL_BAR, STEP_BAR, Row, Visit, Window, other_value, row_of
from runtime.bench.serving import Serving, quiet_collector
from runtime.bench.shapes import SHAPES, source_of
from runtime.bench.step_log import longest_of, print_longest
from runtime.bench.traffic import serve_for
from runtime.bench.words import patches_of
from runtime.errors import InvalidKnob
from runtime.host import cpu_model
from runtime.knobs import KnobValue, knob_named
from runtime.loader import resolve_device, resolve_dtype

DEMO_MODEL = Path(__file__).parents[1] / "demo_model"
NOT_HERE = ("replicas",)
LENGTHS = {"cuda": ((64, 512), (128, 512)), "cpu": ((8, 32), (16, 64))}  # of prompts and outputs
MAX_MODEL_LEN = 4096


class Changed(NamedTuple):
    """One commit, as instants: quiet from the first to the second, changed from the fourth to the fifth; between them
    something was prepared, where that is more than bookkeeping."""

    began_at: float
    asked_at: float
    replied_at: float
    counted_from: float
    ended_at: float
    prepare_s: float
    commit_us: float

    @property
    def is_prepared(self) -> bool:
        return self.counted_from == self.replied_at


class Changes:
    """Visits of knobs while requests are served. What falls into windows is gathered when a visit is over, so that
    this takes the time of none."""

    def __init__(self, serving: Serving, window_s: float) -> None:
        self.serving, self.window_s = serving, window_s
        self.behind: list[dict[str, Any]] = []  # steps behind commits, each with its `knob`

    def visit(self, knob: str, other: KnobValue) -> Visit:
        """There and back; what an earlier visit prepared is prepared anew."""
        serving = self.serving
        serving.executor.warm.drop_unused([])
        serving.forget()
        while not serving.steps:
            serving.step()
        failed, base = serving.num_failed, serving.config.values()[knob]
        done = [self._change(knob, value) for value in (other, base)]
        ended = [one for one in serving.answers.values() if one.finish_reason is not None]
        scheduler = serving.engine.scheduler
        num_lost = len(serving.answers) - len(ended) - len(scheduler.running) - len(scheduler.waiting)
        num_short = sum(not one.is_whole for one in ended)
        prepared = [one for one in done if one.is_prepared]
        self._note_behind(knob, done)
        return Visit(
            other, [one.prepare_s for one in done], [one.commit_us for one in done],
            [self._window(one.began_at, one.asked_at) for one in done],
            [self._window(one.counted_from, one.ended_at) for one in done],
            [self._window(one.asked_at, one.replied_at) for one in prepared],
            [self._window(one.began_at, one.asked_at) for one in prepared],
            serving.num_failed - failed + num_lost + num_short,
        )  # fmt: skip

    def _change(self, knob: str, value: KnobValue) -> Changed:
        serving, clock = self.serving, self.serving.clock
        began_at = serving.steps[-1].at
        serve_for(serving, self.window_s)
        last_step_at, asked_at = serving.steps[-1].at, clock.now()
        done = serving.reconfigure({knob: value})
        replied_at = clock.now()
        if serving.config.values()[knob] != value:
            raise RuntimeError(
                f"`{knob}` was accepted as {value!r} but is {serving.config.values()[knob]!r}."
            )
        serve_for(serving, self.window_s)
        is_prepared = done["prepare_s"] > self.window_s / 100
        counted_from = replied_at if is_prepared else last_step_at
        return Changed(
            began_at, asked_at, replied_at, counted_from, clock.now(), done["prepare_s"], done["commit_us"]
        )

    def _note_behind(self, knob: str, done: Sequence[Changed]) -> None:
        for step, record in zip(self.serving.steps, self.serving.records, strict=True):
            if any(one.counted_from < step.at <= one.ended_at for one in done):
                self.behind.append({**record, "knob": knob, "step_s": step.seconds})

    def _window(self, since: float, until: float) -> Window:
        answers = self.serving.answers.values()
        return Window(
            [step.seconds for step in self.serving.steps if since < step.at <= until],
            [gap for answer in answers for gap in answer.gaps_s(since, until)],
        )


def bench(changes: Changes, names: Sequence[str], num_rounds: int, num_requests: int) -> list[Row]:
    """A row for each knob in the order of their visits, then one for all of each kind."""
    serving = changes.serving
    visits: dict[str, list[Visit]] = {}
    apply: dict[str, str] = {}
    of_run = Window([], [])
    for turn in range(num_rounds):
        for report in reports_in_order(serving.reports, names):
            name = report["name"]
            other = other_value(report, serving.config.values()[name], turn, num_requests)
            if other is None:
                print(f"{name}: there is no other value here", file=sys.stderr)
                continue
            apply[name] = str(report["apply"])
            visits.setdefault(name, []).append(changes.visit(name, other))
            of_run = Window.joined([of_run, *visits[name][-1].quiet])
            print_rows([row_of(name, apply[name], visits[name], of_run)], file=sys.stderr)
    rows = [row_of(name, apply[name], some, of_run) for name, some in visits.items()]
    for kind in dict.fromkeys(apply.values()):
        of_kind = [visit for name, some in visits.items() if apply[name] == kind for visit in some]
        rows.append(row_of(f"all {kind}", kind, of_kind, of_run)._replace(values=[]))
    return rows


def reports_in_order(reports: Sequence[dict[str, Any]], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Those named, or all; LIVE ones first."""
    for kind in ("live", "warm"):
        for report in reports:
            is_asked = report["name"] in names if names else report["name"] not in NOT_HERE
            if is_asked and report["apply"] == kind:
                yield report


def print_rows(rows: Sequence[Row], file: Any = None) -> None:
    columns = ("dropped", "commits", "commit us", "most us", "prepare s", "steps")
    ratios = (
        "quiet p99.9", "changed", "ratio", "of run", "over", "chance", "p99 ITL ms", "preparing", "ratio", "of run"
    )  # fmt: skip
    print(f"{'knob':<22}{'apply':<6}" + "".join(f"{name:>11}" for name in (*columns, *ratios)), file=file)
    for row in rows:
        cells = (
            f"{row.num_dropped}", f"{row.num_commits}", f"{row.commit_us:.0f}", f"{row.most_commit_us:.0f}",
            f"{row.prepare_s:.3f}", f"{row.num_steps}",
            *("" if value is None else f"{value:.2f}" for value in (
                row.quiet_step_ms, row.changed_step_ms, row.step_ratio, row.run_ratio
            )),
            f"{row.num_over}", f"{row.over_chance:.3f}",
            *("" if value is None else f"{value:.2f}" for value in (
                row.before_itl_ms, row.preparing_itl_ms, row.itl_ratio, row.run_itl_ratio
            )),
        )  # fmt: skip
        print(
            f"{row.knob:<22}{row.apply:<6}" + "".join(f"{cell:>11}" for cell in cells), file=file, flush=True
        )


def parser_of() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m runtime.bench reconfigure", description=str(__doc__).splitlines()[0]
    )
    add = parser.add_argument
    add("--model", type=Path, help="model folder (default: the demo's)")
    add("--shape", choices=sorted(SHAPES), help="random weights of this shape instead of a model")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", default="auto", help="auto, float32 or bfloat16")
    add("--kv-tokens", type=int, help="tokens of the KV pool (default: by free memory)")
    add("--requests", type=int, default=300, help="at once, in the queue and running")
    add("--prompt-tokens", type=int, nargs=2, metavar=("LOW", "HIGH"), help="of a request, uniform")
    add("--output-tokens", type=int, nargs=2, metavar=("LOW", "HIGH"), help="of a request, uniform")
    add("--knob", nargs="+", default=[], metavar="NAME=VALUE", help="knobs that are not at their default")
    add("--only", nargs="+", default=[], metavar="NAME", help="knobs that are changed (default: all)")
    add("--rounds", type=int, default=3, help="visits of each knob")
    add("--window", type=float, default=1.0, help="seconds of each window")
    add("--warm-up", type=float, default=5.0, help="seconds that are served before the first window")
    add("--seed", type=int, default=0)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of()
    options = parser.parse_args(arguments)
    try:
        (knobs,) = patches_of([",".join(options.knob)])
        for name in options.only:
            knob_named(name)
    except (ValueError, InvalidKnob) as error:
        parser.error(str(error))
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    model = options.model if options.shape else options.model or DEMO_MODEL
    serving = Serving(
        source_of(model, options.shape, device, dtype, MAX_MODEL_LEN)(), knobs, options.kv_tokens
    )
    prompt, output = LENGTHS["cuda" if device.type == "cuda" else "cpu"]
    prompt, output = tuple(options.prompt_tokens or prompt), tuple(options.output_tokens or output)
    rng = np.random.default_rng(options.seed)
    began = time.perf_counter()
    with quiet_collector():
        serving.keep_busy(ranged_wishes(prompt, output, serving.vocab_size, rng), options.requests)
        serve_for(serving, options.warm_up)
        changes = Changes(serving, options.window)
        rows = bench(changes, options.only, options.rounds, options.requests)
        serving.drain()
    num_dropped = serving.num_failed + sum(not one.is_whole for one in serving.answers.values())
    print_rows(rows)
    longest = longest_of(changes.behind)
    print_longest("those behind commits", longest)
    print(json.dumps({
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "dtype": str(dtype).removeprefix("torch."), "torch": torch.__version__,
        "model": serving.executor.identity()["model"]["name"], "tier": serving.executor.identity()["tier"],
        "requests": options.requests, "prompt_tokens": prompt, "output_tokens": output, "rounds": options.rounds,
        "window_s": options.window, "seconds": time.perf_counter() - began, "seed": options.seed,
        "config": serving.config.values(), "step_bar": STEP_BAR, "itl_bar": ITL_BAR, "dropped_at_end": num_dropped,
        "rows": [row._asdict() for row in rows],
        "longest": longest,
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
