"""What drafts give and cost: python -m runtime.bench speculation, tokens a second with and without in turns.

Random weights copy nothing, so what a model draws is replaced by what a text goes on with: every step is computed and
every token drawn as ever, but the loads below say how often a draft is right. The texts are modules of Python's
standard library in the tokens of the demo model.

    copy    the answer is the end of the prompt again            text    the answer goes on with a module's text
    edit    the same, one token in twelve is another             random  the answer is random tokens: nothing to find
    own     the prompt is a module's text, and the model answers as it does (greedily)
"""

import argparse
import asyncio.base_events
import inspect
import json
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from runtime.batch import Batch
from runtime.bench.engine import DEMO_MODEL
from runtime.bench.loads import Load
from runtime.bench.peers import steps_of
from runtime.bench.shapes import SHAPES, random_model
from runtime.executor import Executor, cpu_model, num_cores
from runtime.knobs import EngineConfig, default_config
from runtime.loader import load_model, resolve_device, resolve_dtype
from runtime.request import Request
from runtime.scheduler import Scheduler

MODULES: tuple[ModuleType, ...] = (argparse, tarfile, asyncio.base_events)
LOADS = ("copy", "edit", "text", "random", "own")
PROMPT_TOKENS, ANSWER_TOKENS = 384, 128
EDITED_SHARE = 1 / 12
MAX_MODEL_LEN = 4096  # of a shape, so that its pool fits more than one request


class Script(NamedTuple):
    """`answers`: what each request of the load is given instead of what was drawn; None leaves the model its own."""

    load: Load
    answers: list[list[int]] | None


class Run(NamedTuple):
    seconds: float
    num_steps: int
    num_drafted: int
    num_right: int


class Row(NamedTuple):
    """One length of drafts under one load. `ratio`: of tokens a second to those without drafts, the median over turns.
    `right_share`: of drafted tokens; None where nothing was drafted."""

    load: str
    num_at_once: int
    length: int
    tokens_per_s: float
    ratio: float
    lowest_ratio: float
    highest_ratio: float
    num_steps: int
    num_drafted: int
    right_share: float | None


def texts(vocab_size: int) -> list[list[int]]:
    """Token ids of each module."""
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    sources = [inspect.getsource(module) for module in MODULES]
    return [[token % vocab_size for token in tokenizer.encode(source).ids] for source in sources]


def script_of(name: str, num: int, vocab_size: int, scale: float, rng: np.random.Generator) -> Script:
    """Requests of one load, from places of the texts that `rng` chooses."""
    known, num_prompt, num_answer = texts(vocab_size), int(PROMPT_TOKENS * scale), int(ANSWER_TOKENS * scale)
    prompts, answers = [], []
    for at in range(num):
        text = known[at % len(known)]
        start = int(rng.integers(len(text) - num_prompt - num_answer))
        prompt = text[start : start + num_prompt]
        answer = text[start + num_prompt : start + num_prompt + num_answer]
        if name in ("copy", "edit"):
            answer = prompt[-num_answer:]
        if name == "edit":
            answer = [
                int(rng.integers(2, vocab_size)) if rng.random() < EDITED_SHARE else one for one in answer
            ]
        if name == "random":
            answer = rng.integers(2, vocab_size, num_answer).tolist()
        prompts.append(prompt)
        answers.append(answer)
    load = Load(name, num, prompts, [num_answer] * num)
    return Script(load, None if name == "own" else answers)


def said_by(answers: Sequence[list[int]]) -> Callable[[Batch], list[int]]:
    """What each token drawn by a step is replaced by; a request's id is its place among the answers."""

    def said(batch: Batch) -> list[int]:
        found: list[int] = []
        known = batch.starts + batch.new_tokens - (0 if batch.drafted is None else batch.drafted)
        for request, row, num in zip(
            batch.sampled_requests(), np.flatnonzero(batch.sampled), batch.num_drawn.tolist(), strict=True
        ):
            first = int(known[row]) - request.prompt_tokens
            found += answers[int(request.id)][first : first + num]
        return found

    return said


def serve(executor: Executor, config: EngineConfig, script: Script, clock: Callable[[], float]) -> Run:
    load, answers = script
    config = config.patched({"max_num_seqs": load.num_at_once})
    scheduler = Scheduler(
        executor.pool, config, executor.max_model_len, attention_cost=executor.attention_cost
    )
    started = clock()
    for at, (prompt, num) in enumerate(zip(load.prompts, load.output_tokens, strict=True)):
        scheduler.add(Request.of_tokens(str(at), prompt, num, 0.0))
    num_steps = sum(
        1 for _ in steps_of(executor, scheduler, config, None if answers is None else said_by(answers))
    )
    seconds = clock() - started
    return Run(seconds, num_steps, scheduler.num_drafted_tokens, scheduler.num_right_tokens)


def compare(
    executor: Executor,
    config: EngineConfig,
    script: Script,
    lengths: Sequence[int],
    num_turns: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """A row for no drafts, then one for each of `lengths`; another length begins each turn."""
    load, tried = script.load, [0, *lengths]
    runs: dict[int, list[Run]] = {length: [] for length in tried}
    for turn in range(num_turns + 1):
        for index in np.roll(np.arange(len(tried)), turn).tolist():
            drafting = config.patched(
                {"speculation_length": tried[index], "speculation_max_seqs": min(64, load.num_at_once)}
            )
            run = serve(executor, drafting, script, clock)
            if turn:  # the first is not timed
                runs[tried[index]].append(run)
    rows = []
    for length, done in runs.items():
        ratios = [beside.seconds / one.seconds for one, beside in zip(done, runs[0], strict=True)]
        rows.append(
            Row(
                load.name, load.num_at_once, length, median(load.num_tokens / one.seconds for one in done),
                median(ratios), min(ratios), max(ratios), done[0].num_steps, done[0].num_drafted,
                done[0].num_right / done[0].num_drafted if done[0].num_drafted else None,
            )
        )  # fmt: skip
    return rows


def print_rows(rows: Sequence[Row]) -> None:
    for row in rows:
        ratio = f"{row.ratio:.2f} ({row.lowest_ratio:.2f} to {row.highest_ratio:.2f})"
        right = "" if row.right_share is None else f"{row.right_share:.0%}"
        print(f"{row.load:<8}{row.num_at_once:>8}{row.length:>8}{row.tokens_per_s:>10.1f}{ratio:>24}"
              f"{row.num_steps:>8}{row.num_drafted:>9}{right:>7}", flush=True)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m runtime.bench speculation", description=str(__doc__).splitlines()[0]
    )
    add = parser.add_argument
    add("--model", type=Path, default=DEMO_MODEL, help="model folder (default: the demo's)")
    add("--shape", choices=sorted(SHAPES), help="random weights of this shape instead of a model")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", default="auto", help="auto, float32 or bfloat16")
    add("--threads", type=int, default=num_cores(), help="CPU threads")
    add("--load", nargs="+", choices=LOADS, default=list(LOADS))
    add("--at-once", type=int, nargs="+", default=[1, 4, 8], help="requests that are served at once")
    add("--length", type=int, nargs="+", default=[4, 8], help="values of speculation_length beside 0")
    add(
        "--scale",
        type=float,
        default=1.0,
        help=f"of {PROMPT_TOKENS} prompt and {ANSWER_TOKENS} answer tokens",
    )
    add("--turns", type=int, default=3, help="timed turns of each")
    add(
        "--cpu-time",
        action="store_true",
        help="count this process's CPU seconds, where others use the cores too",
    )
    add("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_interop_threads(1)
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    threads = {"threads_decode": options.threads, "threads_prefill": options.threads}
    config = default_config("cuda" if device.type == "cuda" else "cpu", num_cores()).patched(threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    rows: list[Row] = []
    if options.shape is None:
        loaded = load_model(options.model, device, dtype)
    else:
        loaded = random_model(options.shape, device, dtype, MAX_MODEL_LEN)
    executor = Executor(loaded, None, config)
    about: dict[str, Any] = {
        "model": options.shape or loaded.identity["name"], "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "threads": options.threads, "torch": torch.__version__, "overlap_depth": config.overlap_depth,
        "scale": options.scale, "turns": options.turns, "seed": options.seed,
        "seconds": "of the CPU" if options.cpu_time else "of the clock",
    }  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"{'load':<8}{'at once':>8}{'length':>8}{'tokens/s':>10}{'x without (range)':>24}{'steps':>8}"
          f"{'drafted':>9}{'right':>7}")  # fmt: skip
    for num in options.at_once:
        for name in options.load:
            rng = np.random.default_rng(options.seed)
            script = script_of(name, num, loaded.identity["vocab_size"], options.scale, rng)
            rows += compare(executor, config, script, options.length, options.turns, clock)
            print_rows(rows[-1 - len(options.length) :])
    print(json.dumps({**about, "rows": [row._asdict() for row in rows]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
