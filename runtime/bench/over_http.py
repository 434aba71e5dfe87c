"""What is left of the engine's throughput when it serves over HTTP: python -m runtime.bench http.

    the server with its engine ◀── streams of a workload from a client process     then, in a process of its own,
    the same weights, configuration and load in the engine's scheduler and executor, without processes around them

Every request is streamed, all are sent at once, and nothing ends early. Seconds are from the first byte sent to the
last event read, and of the engine alone from the first request to the last token; medians over runs after one that is
not counted. CPU is what the kernel charged to a process.
"""

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch

from runtime.bench.cells import MAX_MODEL_LEN, Bench
from runtime.bench.loads import WORKLOADS, Load, workload
from runtime.bench.shapes import SHAPES, random_model
from runtime.bench.streams import Heard
from runtime.bench.vocabulary import save_tokenizer
from runtime.client import RuntimeClient
from runtime.engine_process import CHILD_ENVIRONMENT
from runtime.executor import cpu_model, num_cores
from runtime.loader import load_model, resolve_device, resolve_dtype
from runtime.model_folder import ModelFolder
from runtime.run_dir import read_runtime_file

ROOT = Path(__file__).parents[2]
DEMO_MODEL = ROOT / "runtime" / "demo_model"
START_LIMIT_S = 900.0  # a large model on a slow disk
RECORDS_A_READ = 5000


class Served(NamedTuple):
    """One run over HTTP. CPU seconds are those of 1,000 streamed tokens. `busy_s`: the engine's steps together."""

    seconds: float
    tokens_per_s: float
    ttft_p95_s: float
    tpot_p95_ms: float
    events_a_token: float
    front_end_cpu_s: float
    engine_cpu_s: float
    client_cpu_s: float
    num_steps: int
    busy_s: float


class Server:
    """The serving process, as `python -m runtime.server` starts it."""

    def __init__(self, process: "subprocess.Popen[bytes]", control: RuntimeClient, port: int) -> None:
        self._process, self._control, self._port = process, control, port
        self._boot_id: str | None = None
        self._read_seq = 0

    def serve(self, load: Load) -> Served:
        front = psutil.Process(self._process.pid)
        processes = [front, *front.children()]
        self._steps()
        before = [cpu_s(one) for one in processes]
        job = {"port": self._port, "prompts": load.prompts, "output_tokens": load.output_tokens}
        told = json.loads(_child("runtime.bench.streams", json.dumps(job)))
        spent = [cpu_s(one) - early for one, early in zip(processes, before, strict=True)]
        heard = [Heard(*one) for one in told["heard"]]
        lengths = [one.num_tokens for one in heard]
        if lengths != load.output_tokens:
            raise RuntimeError(f"{load.num_tokens} tokens were asked for, but {sum(lengths)} came.")
        steps, thousands = self._steps(), load.num_tokens / 1000
        return Served(
            told["seconds"], load.num_tokens / told["seconds"],
            float(np.percentile([one.ttft_s for one in heard], 95)),
            1e3 * float(np.percentile([one.tpot_s for one in heard], 95)),
            sum(one.num_events for one in heard) / load.num_tokens,
            spent[0] / thousands, sum(spent[1:]) / thousands, told["cpu_s"] / thousands,
            len(steps), sum(step["step_s"] for step in steps),
        )  # fmt: skip

    def config(self) -> dict[str, Any]:
        """The knobs in force, as the engine tells them."""
        return dict(self._control.state()["champion"])

    def _steps(self) -> list[dict[str, Any]]:
        """Records of the steps since the last call."""
        steps = []
        while True:
            told = self._control.drain(self._boot_id, self._read_seq, RECORDS_A_READ)
            self._boot_id, self._read_seq = told["boot_id"], told["next_seq"]
            steps += [record for record in told["records"] if record["kind"] == "step"]
            if len(told["records"]) < RECORDS_A_READ:
                return steps


def cpu_s(process: psutil.Process) -> float:
    return float(sum(process.cpu_times()[:2]))


@contextlib.contextmanager
def server(
    folder: Path, device: str, dtype: str, max_model_len: int, patch: Mapping[str, Any]
) -> Iterator[Server]:
    """Ready to serve inside the block, and ended after it."""
    with tempfile.TemporaryDirectory() as scratch:
        run_dir = Path(scratch) / "run"
        run_dir.mkdir()
        words = [
            sys.executable, "-m", "runtime.server", "--model", str(folder), "--run-dir", str(run_dir), "--port", "0",
            "--device", device, "--dtype", dtype, "--max-model-len", str(max_model_len), "--log-level", "warning",
            "--config", json.dumps(patch),
        ]  # fmt: skip
        with subprocess.Popen(words, cwd=ROOT) as process:
            try:
                port = _ready_port(process, run_dir)
                with RuntimeClient.of_run_dir(run_dir, START_LIMIT_S) as control:
                    yield Server(process, control, port)
            finally:
                process.terminate()


def _ready_port(process: "subprocess.Popen[bytes]", run_dir: Path) -> int:
    end_at = time.monotonic() + START_LIMIT_S
    while time.monotonic() < end_at and process.poll() is None:
        file = read_runtime_file(run_dir)
        if file is not None:
            with RuntimeClient.of_run_dir(run_dir) as control:
                if control.state()["engine"] == "ready":
                    return int(file.api_url.rsplit(":", 1)[1])
        time.sleep(0.1)
    raise RuntimeError(f"The server was not ready within {START_LIMIT_S:g} s; its words are above.")


def _child(module: str, told: str, env: Mapping[str, str] | None = None) -> str:
    """Runs a module with text on its standard input, and returns what it writes."""
    done = subprocess.run([sys.executable, "-m", module], input=told, stdout=subprocess.PIPE, text=True, check=True,
                          cwd=ROOT, env={**os.environ, **(env or {})})  # fmt: skip
    return done.stdout


@contextlib.contextmanager
def served_folder(
    model: Path, shape: str | None, keep: Path | None, device: torch.device, dtype: torch.dtype
) -> Iterator[Path]:
    """The folder given, or one with random weights of a shape and a tokenizer; `keep` says where that one stays."""
    if shape is None:
        yield model
        return
    with tempfile.TemporaryDirectory() as passing:
        folder = keep or Path(passing) / shape
        if not (folder / "tokenizer.json").is_file():
            random_model(shape, device, dtype).model.save_pretrained(folder)
            save_tokenizer(folder, SHAPES[shape].vocab_size)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()  # the server takes what is free
        yield folder


class Alone(NamedTuple):
    """One run of the engine without a server."""

    seconds: float
    tokens_per_s: float
    engine_cpu_s: float  # of 1,000 tokens


def serve_alone(job: Mapping[str, Any]) -> list[Alone]:
    """One a load, of the engine that the cells of `runtime.bench gpu` time. It is made as the server makes its own,
    with the knobs that are fitted to the device and weights in the format asked for."""
    device = resolve_device(job["device"])
    dtype = resolve_dtype(job["dtype"], device)
    torch.set_num_interop_threads(1)
    bench = Bench(lambda: load_model(Path(job["folder"]), device, dtype, job["max_model_len"]), job["patch"])
    served = []
    for load in (Load(*load) for load in job["loads"]):
        cpu_s = time.process_time()
        seconds, _, _ = bench.run(load)
        cpu_s = time.process_time() - cpu_s
        served.append(Alone(seconds, load.num_tokens / seconds, 1000 * cpu_s / load.num_tokens))
    return served


def _alone_in_a_child(job: Mapping[str, Any]) -> list[Alone]:
    """With the environment of an engine's process, which must be set before torch is loaded."""
    return [Alone(*one) for one in json.loads(_child(__name__, json.dumps(job), CHILD_ENVIRONMENT))]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device)
    with served_folder(options.model, options.shape, options.keep, device, dtype) as folder:
        told = ModelFolder.read(folder)
        rngs = [np.random.default_rng(options.seed + at) for at in (1, *[0] * options.runs)]
        loads = [workload(options.workload, told.vocab_size, rng) for rng in rngs]  # the first is not counted
        patch = {"max_num_seqs": loads[0].num_at_once, **dict(map(_knob, options.knob))}
        max_model_len = min(options.max_model_len, told.context_tokens)
        with server(folder, options.device, options.dtype, max_model_len, patch) as live:
            runs = [live.serve(load) for load in loads][1:]
            config = live.config()
        job = {"folder": str(folder), "device": options.device, "dtype": options.dtype, "patch": patch,
               "max_model_len": max_model_len, "loads": loads}  # fmt: skip
        alone = sorted(_alone_in_a_child(job)[1:])[options.runs // 2]
    http = sorted(runs)[options.runs // 2]
    ratio = http.tokens_per_s / alone.tokens_per_s
    print(
        f"{options.workload}, {loads[0].num_at_once} streams: {http.tokens_per_s:.0f} tokens/s over HTTP, "
        f"{alone.tokens_per_s:.0f} of the engine alone, {ratio:.1%}; p95 TTFT {http.ttft_p95_s:.3f} s, "
        f"p95 TPOT {http.tpot_p95_ms:.2f} ms; CPU s a 1,000 tokens: front end {http.front_end_cpu_s:.4f}, "
        f"engine {http.engine_cpu_s:.4f} (alone {alone.engine_cpu_s:.4f}), client {http.client_cpu_s:.4f}"
    )
    about = {
        "model": options.shape or told.name, "workload": options.workload, "runs": options.runs,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "dtype": str(dtype).removeprefix("torch."), "torch": torch.__version__, "num_cores": num_cores(),
    }  # fmt: skip
    print(json.dumps({**about, "ratio": ratio, "http": http._asdict(), "alone": alone._asdict(),
                      "http_seconds": [run.seconds for run in runs], "config": config}))  # fmt: skip
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m runtime.bench http", description=str(__doc__).splitlines()[0]
    )
    add = parser.add_argument
    add("--model", type=Path, default=DEMO_MODEL, help="model folder (default: the demo's)")
    add("--shape", choices=sorted(SHAPES), help="random weights of this shape instead of a model")
    add("--keep", type=Path, help="folder for those weights, which is used again where it exists")
    add("--workload", choices=sorted(WORKLOADS), default="mix300")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--dtype", default="auto", help="auto, float32 or bfloat16")
    add("--max-model-len", type=int, default=MAX_MODEL_LEN, help="longest prompt and answer together, tokens")
    add("--runs", type=int, default=3, help="counted runs, after one that is not")
    add("--knob", nargs="+", default=[], metavar="NAME=VALUE", help="knobs that are not at their default")
    add("--seed", type=int, default=0)
    return parser


def _knob(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, json.loads(value) if value[:1].isdigit() else value


if __name__ == "__main__":
    json.dump(serve_alone(json.load(sys.stdin)), sys.stdout)
