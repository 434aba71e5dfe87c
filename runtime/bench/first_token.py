"""The life of an engine until its first token, timed: python -m runtime.bench.first_token --model FOLDER --began S.

It does what the engine's process does, in that order, and prints one JSON object: seconds since `--began`, on the
monotonic clock, at the end of each stage, and the memory held then. Started by runtime/bench/start.py.
"""

import argparse
import cProfile
import gc
import json
import logging
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from pstats import Stats

PROMPT_TOKENS = 128
OUTPUT_TOKENS = 32
PROFILED_LINES = 60


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m runtime.bench.first_token")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--kv-tokens", type=int)
    parser.add_argument("--knobs", type=json.loads, default={})
    parser.add_argument(
        "--profile", action="store_true", help="print where the time went, function by function"
    )
    parser.add_argument("--began", type=float, required=True)
    options = parser.parse_args(arguments)
    ended: dict[str, float] = {}

    def stage_ended(name: str) -> None:
        ended[name] = time.monotonic() - options.began
        logging.getLogger(__name__).info("%s: after %.2f s", name, ended[name])

    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d ms %(name)s: %(message)s")
    stage_ended("python")
    profile = cProfile.Profile()
    if options.profile:
        profile.enable()
    from runtime.clock import Clock
    from runtime.engine import Engine
    from runtime.engine_start import engine_parts, load

    loaded = load(options, stage_ended)
    stage_ended("weights")
    executor, runner, _ = engine_parts(loaded, options.kv_tokens, options.knobs)
    gc.collect()
    gc.freeze()  # as the engine's process does
    stage_ended("engine")
    told_at: list[float] = []

    def take(frame: dict[str, object]) -> None:
        if frame["op"] == "tokens":
            told_at.append(time.monotonic() - options.began)

    engine = Engine(executor, runner, Clock.started_now(), take)
    engine.submit({
        "op": "submit", "id": "first", "token_ids": list(range(2, 2 + PROMPT_TOKENS)), "max_tokens": OUTPUT_TOKENS,
        "sampling": {}, "ignore_eos": True, "arrived_at": time.time(),
    })  # fmt: skip
    while engine.step():
        pass
    if options.profile:
        profile.disable()
        Stats(profile, stream=sys.stderr).sort_stats("cumulative").print_stats(PROFILED_LINES)
    gaps_s = [later - earlier for earlier, later in pairwise(told_at)]
    print(json.dumps({
        "ended_s": {**ended, "first_token": told_at[0]}, "longest_gap_s": max(gaps_s), "last_gap_s": gaps_s[-1],
        "tier": executor.identity()["tier"], "num_tokens": len(told_at), **executor.memory(),
    }))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
