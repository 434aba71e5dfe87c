"""From logits to tokens: greedy, or drawn with temperature, min-p, top-k and top-p.

A draw uses one uniform number that is a hash of the request's seed and the token's position in its output.
So a seeded request gets the same numbers whatever batch it shares and however often it was preempted. What becomes of
that number is `sample`, a kernel where there is Triton, and its plain twin elsewhere.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.kernels import PLAIN, Kernels
from runtime.logit_shaping import is_shaped, shaped
from runtime.request import Request
from runtime.transfer import sent

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def sample(logits: Tensor, requests: Sequence[Request]) -> list[int | None]:
    """Returns the next token of each request; None where its logits hold NaN or no finite number.

    logits: [len(requests), vocab].
    """
    return tokens_of(draw(logits, requests))  # one copy from the device


def draw(logits: Tensor, requests: Sequence[Request], kernels: Kernels = PLAIN) -> Tensor:
    """The same where the logits lie, without waiting for them: int64 [2, len(requests)], tokens and whether to take
    them."""
    logits = shaped(logits, requests)
    asked = [request.sampling for request in requests]
    if not any(one.temperature > 0.0 for one in asked):
        return kernels.greedy(logits)
    params = _params_of(requests, logits.shape[1])
    has_top_k, has_top_p = (bool(row.any()) for row in (params[3] > 0.0, params[2] < 1.0))
    if kernels.sample is not PLAIN.sample or not (has_top_k or has_top_p):
        return kernels.sample(logits, sent(params, logits.device), has_top_k, has_top_p)
    # The twin sorts each row that it is given, so that it is given only those which need it.
    is_cut = (params[3] > 0.0) | (params[2] < 1.0)
    drawn = torch.empty(2, len(requests), dtype=torch.int64, device=logits.device)
    for rows, cuts in ((np.flatnonzero(~is_cut), False), (np.flatnonzero(is_cut), True)):
        if len(rows):
            which = sent(rows, logits.device)
            some = logits.index_select(0, which), sent(params[:, rows], logits.device)
            drawn.index_copy_(1, which, kernels.sample(*some, cuts, cuts))
    return drawn


def _params_of(requests: Sequence[Request], vocab_size: int) -> NDArray[np.float64]:
    """As `sample` reads them: [5, len(requests)]."""
    asked = [request.sampling for request in requests]
    draws = uniform([one.seed for one in asked], [request.num_output_tokens for request in requests])
    rows = [
        (one.temperature, one.min_p, one.top_p, one.top_k if one.top_k < vocab_size else 0)
        if one.temperature > 0.0
        else (0.0, 0.0, 1.0, 0)
        for one in asked
    ]
    return np.array([*zip(*rows, strict=True), draws], np.float64)


def are_greedy(requests: Sequence[Request]) -> bool:
    """Whether each takes the likeliest token of its logits as they are."""
    return not any(request.sampling.temperature > 0.0 or is_shaped(request) for request in requests)


def tokens_of(drawn: Tensor) -> list[int | None]:
    """drawn: as `draw` returns it."""
    return [token if is_finite else None for token, is_finite in zip(*drawn.tolist(), strict=True)]


def uniform(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """Returns numbers in [0, 1), each a function of its seed (any integer) and position.

    Source: splitmix64, Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
    """
    keys = np.array([seed % 2**64 for seed in seeds], dtype=np.uint64)
    with np.errstate(over="ignore"):
        mixed = _mix(_mix(keys + _GOLDEN) + np.asarray(positions, dtype=np.uint64) * _GOLDEN)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
