"""Requests by the clock: when they arrive, with which tokens, and how much they want. Pure."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from runtime.bench.loads import mixed_prompt_tokens

MIXED_OUTPUT_TOKENS = 128
SHARED_TOKENS, OWN_TOKENS, SHARED_OUTPUT_TOKENS = 2000, 200, 64
LONG_PROMPT_TOKENS = 32_768

Draw = Callable[[], "Wish"]


class Wish(NamedTuple):
    """What one request brings and wants."""

    token_ids: list[int]
    output_tokens: int


class Arrival(NamedTuple):
    """`at_s`: seconds since the beginning."""

    at_s: float
    wish: Wish


def poisson_instants(rate_per_s: float, seconds: float, rng: np.random.Generator) -> list[float]:
    """Instants in [0, seconds), in order, with independent exponential gaps."""
    instants: list[float] = []
    at_s = float(rng.exponential(1.0 / rate_per_s))
    while at_s < seconds:
        instants.append(at_s)
        at_s += float(rng.exponential(1.0 / rate_per_s))
    return instants


def mixed_wishes(vocab_size: int, scale: float, rng: np.random.Generator) -> Draw:
    """Requests with the lengths of mix300, each drawn on its own: 60 % of the prompts hold 16 to 512 tokens, 30 % 512
    to 2048, 10 % 2048 to 4096. `scale`: of all lengths."""

    def draw() -> Wish:
        prompt_tokens = mixed_prompt_tokens(rng, int(rng.integers(10)))
        return Wish(
            random_tokens(scaled(prompt_tokens, scale), vocab_size, rng), scaled(MIXED_OUTPUT_TOKENS, scale)
        )

    return draw


def mixed_arrivals(
    rate_per_s: float, seconds: float, vocab_size: int, scale: float, rng: np.random.Generator
) -> list[Arrival]:
    draw = mixed_wishes(vocab_size, scale, rng)
    return [Arrival(at_s, draw()) for at_s in poisson_instants(rate_per_s, seconds, rng)]


def shared_wishes(vocab_size: int, scale: float, rng: np.random.Generator) -> Draw:
    """Requests that begin with the same tokens and go on with tokens of their own."""
    shared = random_tokens(scaled(SHARED_TOKENS, scale), vocab_size, rng)

    def draw() -> Wish:
        own = random_tokens(scaled(OWN_TOKENS, scale), vocab_size, rng)
        return Wish([*shared, *own], scaled(SHARED_OUTPUT_TOKENS, scale))

    return draw


def ranged_wishes(
    prompt_tokens: tuple[int, int], output_tokens: tuple[int, int], vocab_size: int, rng: np.random.Generator
) -> Draw:
    """Lengths that are uniform in the ranges, both ends included."""

    def draw() -> Wish:
        prompt, output = (int(rng.integers(low, high + 1)) for low, high in (prompt_tokens, output_tokens))
        return Wish(random_tokens(prompt, vocab_size, rng), output)

    return draw


def scaled(tokens: int, scale: float) -> int:
    return max(2, round(tokens * scale))


def random_tokens(num: int, vocab_size: int, rng: np.random.Generator) -> list[int]:
    return rng.integers(2, vocab_size, num).tolist()
