"""From the start of a process to its first token, with the weights in the page cache: one child for each start."""

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from runtime.knobs import KnobValue

READ_BYTES = 2**26
START_BAR_S = 12.0  # of llama-8b on one H200
STAGES = ("python", "imports", "weights", "engine", "first_token")


class Start(NamedTuple):
    """Seconds that each stage took, by its name, and all together. `longest_gap_s`: between two tokens behind the
    first; `last_gap_s`: the last one of these."""

    stages_s: dict[str, float]
    first_token_s: float
    longest_gap_s: float
    last_gap_s: float
    tier: str


def start_once(
    folder: Path, device: str, dtype: str, knobs: Mapping[str, KnobValue], words: Sequence[str] = ()
) -> Start:
    """Raises RuntimeError where the child fails; its own words are on stderr."""
    began = time.monotonic()
    child = subprocess.run(
        [
            sys.executable, "-m", "runtime.bench.first_token", "--model", str(folder), "--device", device, "--dtype",
            dtype, "--knobs", json.dumps(dict(knobs)), "--began", repr(began), *words,
        ],
        stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if child.returncode != 0:
        raise RuntimeError(f"The start ended with {child.returncode} before its first token; see above.")
    return start_of(json.loads(child.stdout.splitlines()[-1]))


def start_of(told: Mapping[str, object]) -> Start:
    ended = told["ended_s"]
    assert isinstance(ended, dict)
    before = (0.0, *(ended[name] for name in STAGES))
    stages = {name: ended[name] - earlier for name, earlier in zip(STAGES, before, strict=False)}
    return Start(
        stages, ended["first_token"], float(str(told["longest_gap_s"])), float(str(told["last_gap_s"])),
        str(told["tier"]),
    )  # fmt: skip


def read_once(folder: Path) -> int:
    """Reads the weights, so that the page cache has them. Returns their bytes."""
    num_bytes = 0
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as opened:
            while chunk := opened.read(READ_BYTES):
                num_bytes += len(chunk)
    return num_bytes


def print_starts(starts: Sequence[Start]) -> None:
    print(
        "".join(f"{name + ' s':>15}" for name in STAGES)
        + f"{'together s':>12}{'longest gap ms':>16}{'last gap ms':>13}"
    )
    for one in starts:
        print(
            "".join(f"{one.stages_s[name]:>15.2f}" for name in STAGES)
            + f"{one.first_token_s:>12.2f}{1e3 * one.longest_gap_s:>16.1f}{1e3 * one.last_gap_s:>13.1f}"
        )
