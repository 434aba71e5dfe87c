"""What the WARM knobs cost and give on this machine: python -m runtime.bench warm --model FOLDER. No HTTP, one process.

Everything that is compared is measured in turns within one run, on requests that live through the swaps: the
machine's mood is then the same for all. `ms` are medians of forward passes, `commit us` of real swaps.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from runtime.errors import InvalidKnob, PrepareFailed
from runtime.executor import Executor, cpu_model, num_cores
from runtime.knobs import EngineConfig, default_config
from runtime.loader import load_model, resolve_device, resolve_dtype
from runtime.prepare import Prepared, Preparer
from runtime.prompts import load_tokenizer
from runtime.request import Request
from runtime.scheduler import Scheduler
from runtime.scoring import MAX_PIECE_TOKENS, packed_piece, pieces_of

PROMPT_TOKENS = 128
STEPS_A_TURN = 8
SETTLING_STEPS = 2  # after a swap: caches of the processor, kernels for a shape seen first
SHARED_TOKENS = 512
OWN_TOKENS = 32
POLL_S = 0.001


class FormatReport(NamedTuple):
    """`step_ms`: by batch. `delta_nll`: mean over positions of |NLL - NLL as loaded|, nats; `bias_nll`: of NLL - it."""

    weight_format: str
    step_ms: dict[int, float]
    prepare_s: float
    extra_bytes: int
    commit_us: float
    delta_nll: float
    bias_nll: float
    top1_agreement: float


class Bench:
    def __init__(
        self,
        executor: Executor,
        config: EngineConfig,
        seed: int,
        timer: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.executor, self.timer = executor, timer
        self.config = executor.warm.in_force(config)
        self.rng = np.random.default_rng(seed)
        self.scheduler = Scheduler(
            executor.pool, self.config, executor.max_model_len, attention_cost=executor.attention_cost
        )
        self._num_requests = 0

    def prepare(self, config: EngineConfig) -> Prepared:
        """As the engine does: in a thread, polled by this one."""
        preparer = Preparer(self.executor.warm, lambda: [self.config, config])
        asked = preparer.ask(config)
        while not asked.is_done:
            preparer.poll()
            time.sleep(POLL_S)
        return asked.outcome()

    def swap_us(self, config: EngineConfig) -> float:
        started = self.timer()
        self.scheduler.config = config
        self.executor.warm.install(config, self.scheduler)
        return 1e6 * (self.timer() - started)

    def add(self, prompt: Sequence[int], output_tokens: int) -> Request:
        self._num_requests += 1
        request = Request.of_tokens(str(self._num_requests), list(prompt), output_tokens, 0.0)
        self.scheduler.add(request)
        return request

    def tokens(self, num: int) -> list[int]:
        return self.rng.integers(2, self.executor.vocab_size, num).tolist()

    def step(self) -> float:
        """Returns the seconds of the forward pass and sampling; 0 where there was nothing to compute."""
        batch = self.scheduler.schedule(0.0)
        if batch is None:
            return 0.0
        started = self.timer()
        executed = self.executor.execute(batch, self.scheduler.pack(batch), self.scheduler.config)
        seconds = self.timer() - started
        self.scheduler.finish_step(batch, [token or 0 for token in executed.tokens], 0.0)
        return seconds

    def cancel_all(self) -> None:
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            self.scheduler.cancel(request.id)


def decode_turns(
    bench: Bench, configs: Sequence[EngineConfig], batch: int, num_turns: int
) -> tuple[list[float], list[list[float]]]:
    """Median ms a step and commits in us, by configuration, of `batch` requests that live through all swaps."""
    num_steps = len(configs) * num_turns * (STEPS_A_TURN + SETTLING_STEPS) + 2 * batch + 8
    for _ in range(batch):
        bench.add(bench.tokens(PROMPT_TOKENS), num_steps)
    while bench.scheduler.waiting or any(
        request.num_output_tokens == 0 for request in bench.scheduler.running
    ):
        bench.step()
    took: list[list[float]] = [[] for _ in configs]
    commits: list[list[float]] = [[] for _ in configs]
    for turn in range(num_turns):
        for index in np.roll(np.arange(len(configs)), turn).tolist():  # nobody is always first
            commits[index].append(bench.swap_us(configs[index]))
            for _ in range(SETTLING_STEPS):
                bench.step()
            took[index] += [bench.step() for _ in range(STEPS_A_TURN)]
    bench.cancel_all()
    bench.swap_us(bench.config)
    return [1000 * median(some) for some in took], commits


def scores(bench: Bench, config: EngineConfig, token_ids: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    """NLL and likeliest token of every known next token."""
    area = bench.executor.score_area(-(-max(map(len, token_ids)) // 16), config)
    nll: list[float | None] = []
    top1: list[int | None] = []
    sequences = [np.array(ids, np.int64) for ids in token_ids]
    for piece in pieces_of([len(ids) for ids in sequences], MAX_PIECE_TOKENS):
        ids = sequences[piece.sequence]
        scored = bench.executor.score(
            packed_piece(ids, piece), ids[piece.start + 1 : piece.end + 1], area, config
        )
        nll += scored.nll
        top1 += scored.top1
    return np.array(nll, float), np.array(top1)


def bench_formats(
    bench: Bench, batches: Sequence[int], num_turns: int, token_ids: Sequence[Sequence[int]]
) -> list[FormatReport]:
    formats = bench.executor.warm.formats
    configs = [bench.config.patched({"weight_format": name}) for name in formats]
    prepared = [bench.prepare(config) for config in configs]
    step_ms: dict[int, list[float]] = {}
    commits: list[list[float]] = [[] for _ in configs]
    for batch in batches:
        step_ms[batch], some = decode_turns(bench, configs, batch, num_turns)
        commits = [known + new for known, new in zip(commits, some, strict=True)]
    loaded_nll, loaded_top1 = scores(bench, configs[0], token_ids)
    reports = []
    for index, name in enumerate(formats):
        nll, top1 = scores(bench, configs[index], token_ids)
        reports.append(
            FormatReport(
                name, {batch: ms[index] for batch, ms in step_ms.items()}, prepared[index].prepare_s,
                prepared[index].extra_bytes, median(commits[index]), float(np.abs(nll - loaded_nll).mean()),
                float((nll - loaded_nll).mean()), float((top1 == loaded_top1).mean()),
            )
        )  # fmt: skip
    return reports


def bench_pool(bench: Bench, batch: int, num_turns: int) -> dict[str, float]:
    """Swaps between the pool and one of half its size, under `batch` live requests."""
    half = bench.config.patched({"kv_tokens": max(bench.config.kv_tokens // 2, bench.executor.max_model_len)})
    prepared = bench.prepare(half)
    live_tokens = batch * PROMPT_TOKENS
    step_ms, commits = decode_turns(bench, [bench.config, half], batch, num_turns)
    return {
        "kv_tokens": half.kv_tokens, "live_tokens": live_tokens, "prepare_s": prepared.prepare_s,
        "extra_bytes": prepared.extra_bytes, "grow_commit_us": median(commits[0][1:] or commits[0]),
        "shrink_commit_us": median(commits[1]), "step_ms": step_ms[0], "half_step_ms": step_ms[1],
    }  # fmt: skip


def bench_blocks(bench: Bench, batch: int, num_turns: int) -> list[dict[str, Any]]:
    """Swaps between blocks of several sizes, and to a rounded pool where there is room for one, under `batch` live
    requests."""
    configs = [bench.config.patched({"kv_block": size}) for size in ("16", "64", "256")]
    rounded = bench.config.patched({"kv_dtype": "fp8"})
    try:
        bench.executor.warm.check(rounded)
        bench.prepare(rounded)
        configs.append(rounded)
    except (InvalidKnob, PrepareFailed) as error:
        print(f"kv_dtype is not measured: {error}", file=sys.stderr)
    step_ms, commits = decode_turns(bench, configs, batch, num_turns)
    return [
        {"kv_block": config.kv_block, "kv_dtype": config.kv_dtype, "step_ms": ms, "commit_us": median(some)}
        for config, ms, some in zip(configs, step_ms, commits, strict=True)
    ]


def bench_prefixes(bench: Bench, num_requests: int) -> dict[str, float]:
    """First tokens of requests one at a time, in turns with the cache and without; all begin alike."""
    shared_tokens = min(SHARED_TOKENS, bench.executor.max_model_len // 2)
    shared = bench.tokens(shared_tokens)
    ttft_s: dict[str, list[float]] = {"off": [], "on": []}
    for turn in range(num_requests + 1):
        for cache in ("off", "on"):
            bench.scheduler.config = bench.config.patched({"prefix_cache": cache})
            request = bench.add([*shared, *bench.tokens(OWN_TOKENS)], 4)
            started = bench.timer()
            while request.num_output_tokens == 0:
                bench.step()
            if turn:  # the first one finds nothing yet
                ttft_s[cache].append(bench.timer() - started)
            bench.cancel_all()
    on, off = median(ttft_s["on"]), median(ttft_s["off"])
    hit_ratio = bench.scheduler.num_hit_tokens / max(1, bench.scheduler.num_looked_up_tokens)
    bench.scheduler.forget_prefixes()
    bench.scheduler.config = bench.config
    return {
        "shared_tokens": shared_tokens, "own_tokens": OWN_TOKENS, "ttft_off_ms": 1000 * off, "ttft_on_ms": 1000 * on,
        "ttft_ratio": on / off, "hit_ratio": hit_ratio,
    }  # fmt: skip


def held_out(model: Path, text: Path | None, max_model_len: int, limit: int = 6000) -> list[list[int]]:
    """Token ids of a text that the model was not trained on, cut into sequences."""
    file = (
        text
        if text is not None
        else next(path for path in (model / "README.md", Path(__file__)) if path.is_file())
    )
    tokenizer = load_tokenizer(model)
    ids = tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"][:limit]
    size = min(256, max_model_len)
    return [ids[at : at + size] for at in range(0, len(ids), size) if len(ids[at : at + size]) > 1]


def print_formats(reports: Sequence[FormatReport], batches: Sequence[int]) -> None:
    base = reports[0]
    columns = "".join(f"{f'ms at b{batch} (x)':>18}" for batch in batches)
    print(f"{'weights':<10}{columns}{'extra MiB':>11}{'prepare s':>11}{'commit us':>11}"
          f"{'|dNLL|':>9}{'dNLL':>10}{'top-1':>9}")  # fmt: skip
    for one in reports:
        steps = "".join(
            f"{f'{one.step_ms[batch]:.2f} ({one.step_ms[batch] / base.step_ms[batch]:.2f})':>18}"
            for batch in batches
        )
        costs = f"{one.extra_bytes / 2**20:>11.1f}{one.prepare_s:>11.3f}{one.commit_us:>11.0f}"
        quality = f"{one.delta_nll:>9.4f}{one.bias_nll:>+10.4f}{one.top1_agreement:>9.2%}"
        print(f"{one.weight_format:<10}{steps}{costs}{quality}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m runtime.bench warm", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--model",
        type=Path,
        default=Path(__file__).parents[1] / "demo_model",
        help="model folder (default: the demo's)",
    )
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--dtype", default="auto", help="auto, float32 or bfloat16")
    add("--kv-tokens", type=int, help="tokens of the KV pool (default: by free memory)")
    add("--batches", type=int, nargs="+", default=[1, 8, 16], help="requests that decode together")
    add("--turns", type=int, default=6, help="turns of each configuration")
    add("--text", type=Path, help="text that the model was not trained on (default: its README)")
    add("--threads", type=int, help="CPU threads (default: all but one)")
    add(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: of one thread, on a machine that others use",
    )
    add("--seed", type=int, default=0)
    add("--json", action="store_true", help="print one JSON object instead of tables")
    options = parser.parse_args(arguments)
    torch.set_num_interop_threads(1)
    device = resolve_device(options.device)
    is_cuda = device.type == "cuda"
    config = default_config("cuda" if is_cuda else "cpu", num_cores()).patched({"max_num_seqs": 256})
    if options.threads is not None:
        config = config.patched({"threads_decode": options.threads, "threads_prefill": options.threads})
    loaded = load_model(options.model, device, resolve_dtype(options.dtype, device))
    timer = time.thread_time if options.clock == "cpu" else time.perf_counter
    bench = Bench(Executor(loaded, options.kv_tokens, config), config, options.seed, timer)
    texts = held_out(options.model, options.text, bench.executor.max_model_len)
    if not texts:
        parser.error(
            f"the tokenizer in {options.model} makes fewer than two tokens of the text. Formats are compared on text: "
            "add the model's tokenizer to its folder, or name a longer text with --text."
        )
    formats = bench_formats(bench, options.batches, options.turns, texts)
    pool = bench_pool(bench, max(options.batches), options.turns)
    blocks = bench_blocks(bench, max(options.batches), options.turns)
    prefixes = bench_prefixes(bench, 2 * options.turns)
    name = torch.cuda.get_device_name(device) if is_cuda else cpu_model()
    about = {
        "model": loaded.identity["name"], "device": name, "threads": config.threads_decode,
        "torch": torch.__version__, "prompt_tokens": PROMPT_TOKENS, "positions": sum(map(len, texts)) - len(texts),
        "turns": options.turns, "clock": options.clock, "seed": options.seed,
    }  # fmt: skip
    if options.json:
        rows = [
            {**one._asdict(), "step_ms": {str(batch): ms for batch, ms in one.step_ms.items()}}
            for one in formats
        ]
        print(
            json.dumps({**about, "formats": rows, "pool": pool, "blocks": blocks, "prefix_cache": prefixes})
        )
        return 0
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print_formats(formats, options.batches)
    print(f"kv_tokens {bench.config.kv_tokens} -> {pool['kv_tokens']} under {pool['live_tokens']}+ live tokens: "
          f"prepare {pool['prepare_s']:.3f} s, shrink {pool['shrink_commit_us']:.0f} us, grow "
          f"{pool['grow_commit_us']:.0f} us, step {pool['half_step_ms'] / pool['step_ms']:.2f} x")  # fmt: skip
    for one in blocks:
        print(f"kv_block {one['kv_block']:>3}, kv_dtype {one['kv_dtype']}: step {one['step_ms']:.2f} ms, commit "
              f"{one['commit_us']:.0f} us")  # fmt: skip
    print(f"prefix_cache: first token of {prefixes['shared_tokens']} shared + {prefixes['own_tokens']} own tokens "
          f"{prefixes['ttft_off_ms']:.1f} ms off, {prefixes['ttft_on_ms']:.1f} ms on: {prefixes['ttft_ratio']:.2f} x, "
          f"hit share {prefixes['hit_ratio']:.0%}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
