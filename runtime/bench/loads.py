"""The loads that engines are compared under: token ids in, numbers of tokens out, everything there at the start."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

PROMPT_TOKENS, OUTPUT_TOKENS = 128, 64  # of each request, or on average
SPREAD = 6  # no request is longer than so many times the average
BATCHES = 3  # ragged requests are so many times as many as are served at once


class Load(NamedTuple):
    """`num_at_once`: requests that an engine may compute together."""

    name: str
    num_at_once: int
    prompts: list[list[int]]
    output_tokens: list[int]

    @property
    def num_tokens(self) -> int:
        """Those that were asked for, over all requests."""
        return sum(self.output_tokens)


def equal_load(num: int, vocab_size: int, scale: float, rng: np.random.Generator) -> Load:
    prompt_tokens, output_tokens = _scaled(PROMPT_TOKENS, scale), _scaled(OUTPUT_TOKENS, scale)
    prompts = [_tokens(prompt_tokens, vocab_size, rng) for _ in range(num)]
    return Load("equal", num, prompts, [output_tokens] * num)


def ragged_load(
    num: int, vocab_size: int, scale: float, lengths: Sequence[tuple[int, int]], rng: np.random.Generator
) -> Load:
    """Consecutive requests of a trace, with lengths that keep their shape and have the averages of the equal load."""
    chosen = np.array(lengths[: max(BATCHES * num, 2 * BATCHES)], float)
    wanted = scale * np.array([PROMPT_TOKENS, OUTPUT_TOKENS])
    sizes = np.clip(np.rint(chosen * wanted / chosen.mean(axis=0)), 2, SPREAD * wanted).astype(int)
    prompts = [_tokens(prompt_tokens, vocab_size, rng) for prompt_tokens, _ in sizes.tolist()]
    return Load("ragged", num, prompts, sizes[:, 1].tolist())


def trace_lengths(file: Path) -> list[tuple[int, int]]:
    """Prompt and output tokens by request, of a file as Microsoft publishes its Azure traces; `#` begins a comment."""
    with file.open(encoding="utf-8", newline="") as lines:
        rows = csv.DictReader(line for line in lines if not line.startswith("#"))
        return [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in rows]


def _scaled(tokens: int, scale: float) -> int:
    return max(2, round(tokens * scale))


def _tokens(num: int, vocab_size: int, rng: np.random.Generator) -> list[int]:
    return rng.integers(2, vocab_size, num).tolist()


# Requests at once, and the lengths of prompt and output of each.
WORKLOADS: dict[str, tuple[int, Callable[[np.random.Generator, int], tuple[int, int]]]] = {
    "b1": (1, lambda rng, at: (128, 256)),
    "b32": (32, lambda rng, at: (128, 256)),
    "b256": (256, lambda rng, at: (128, 256)),
    "mix300": (300, lambda rng, at: (mixed_prompt_tokens(rng, at), 128)),
    "nano256": (256, lambda rng, at: (int(rng.integers(100, 1025)), int(rng.integers(100, 1025)))),
    "tiny": (4, lambda rng, at: (20 + at, 8)),
}


def workload(name: str, vocab_size: int, rng: np.random.Generator) -> Load:
    """One of WORKLOADS, with the same lengths whatever the tokens are."""
    num, lengths_of = WORKLOADS[name]
    lengths = np.random.default_rng(0)
    sizes = [lengths_of(lengths, at) for at in range(num)]
    return Load(
        name, num, [_tokens(prompt, vocab_size, rng) for prompt, _ in sizes], [out for _, out in sizes]
    )


def mixed_prompt_tokens(rng: np.random.Generator, at: int) -> int:
    """Of ten prompts six are short, three of middle length and one is long."""
    low, high = ((16, 512), (512, 2048), (2048, 4096))[(0, 0, 0, 0, 0, 0, 1, 1, 1, 2)[at % 10]]
    return int(rng.integers(low, high + 1))
