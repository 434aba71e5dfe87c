"""How soon weights that are damaged, or another model's, are refused: python -m tests.benchmarks.bad_weights.

The demo model's folder with one thing wrong, loaded as an engine loads it. Prints a table, then one JSON document;
exit 1 where a load was not refused or took longer than the bar.
"""

import argparse
import gc
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from runtime.errors import ModelError
from runtime.loader import load_model
from tests.servers import DEMO_MODEL

BAR_S = 0.050
WEIGHTS = "model.safetensors"


def cut(num_bytes: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        weights = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(weights[:-num_bytes])

    return damage


def replaced(content: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / WEIGHTS).write_bytes(content)

    return damage


def described_as(**changes: object) -> Callable[[Path], None]:
    """As weights of another model are: they do not fit their configuration."""

    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return damage


BAD: dict[str, Callable[[Path], None]] = {
    "a byte is missing": cut(1),
    "a million bytes are missing": cut(1_000_000),
    "an empty file": replaced(b""),
    "no header": replaced(b"\xff" * 1000),
    "a header of garbage": replaced((40).to_bytes(8, "little") + b"{" * 40),
    "of fewer layers": described_as(num_hidden_layers=28, layer_types=["full_attention"] * 28),
    "of another width": described_as(intermediate_size=50),
    "of another vocabulary": described_as(vocab_size=77),
    "no weights at all": lambda folder: (folder / WEIGHTS).unlink(),
}


def refused_after(folder: Path) -> float | None:
    """Seconds; None where it was loaded."""
    started = time.perf_counter()
    try:
        load_model(folder, torch.device("cpu"), torch.float32)
    except ModelError:
        return time.perf_counter() - started
    return None


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.bad_weights", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument(
        "--times", type=int, default=5, help="each is loaded so often, after one that is not counted"
    )
    times = parser.parse_args().times
    failed, rows = [], []
    print(f"{'weights':<30}{'median ms':>11}{'worst ms':>10}")
    with tempfile.TemporaryDirectory() as passing:
        for name, damage in BAD.items():
            folder = Path(passing) / name
            shutil.copytree(DEMO_MODEL, folder)
            damage(folder)
            refused_after(folder)
            gc.collect()  # or some load pays for what the first one imported
            took = [refused_after(folder) for _ in range(times)]
            known = [seconds for seconds in took if seconds is not None]
            if len(known) < times or max(known) > BAR_S:
                failed.append(name)
            worst, middle = max(known, default=0.0), median(known or [0.0])
            rows.append({"name": name, "median_s": middle, "worst_s": worst, "num_refused": len(known)})
            print(f"{name:<30}{1000 * middle:>11.1f}{1000 * worst:>10.1f}", flush=True)
    print(
        json.dumps(
            {"benchmark": "bad_weights", "times": times, "bar_s": BAR_S, "failed": failed, "rows": rows}
        )
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
