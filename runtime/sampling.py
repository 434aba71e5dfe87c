"""From logits to tokens: greedy, or drawn with temperature, min-p, top-k and top-p.

A draw uses one uniform number that is a hash of the request's seed and the token's position in its output.
So a seeded request gets the same numbers whatever batch it shares and however often it was preempted.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.logit_shaping import is_shaped, shaped
from runtime.request import Request, SamplingParams

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def sample(logits: Tensor, requests: Sequence[Request]) -> list[int | None]:
    """Returns the next token of each request; None where its logits hold NaN or no finite number.

    logits: [len(requests), vocab].
    """
    return tokens_of(draw(logits, requests))  # one copy from the device


def draw(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """The same where the logits lie, without waiting for them: int64 [2, len(requests)], tokens and whether to take
    them."""
    logits = shaped(logits, requests)
    best, tokens = logits.max(dim=-1)  # NaN wins a max, so `best` tells of it
    drawn = [row for row, request in enumerate(requests) if request.sampling.temperature > 0.0]
    if drawn:
        tokens[drawn] = _draw(logits[drawn], [requests[row] for row in drawn])
    return torch.stack((tokens, torch.isfinite(best).to(tokens.dtype)))


def are_greedy(requests: Sequence[Request]) -> bool:
    """Whether each takes the likeliest token of its logits as they are."""
    return not any(request.sampling.temperature > 0.0 or is_shaped(request) for request in requests)


def tokens_of(drawn: Tensor) -> list[int | None]:
    """drawn: as `draw` returns it."""
    return [token if is_finite else None for token, is_finite in zip(*drawn.tolist(), strict=True)]


def _draw(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """logits: [rows, vocab]. Returns [rows] tokens."""
    device = logits.device
    temperatures = torch.tensor([request.sampling.temperature for request in requests], device=device)
    uniforms = torch.from_numpy(
        uniform(
            [request.sampling.seed for request in requests],
            [request.num_output_tokens for request in requests],
        )
    ).to(device)
    logits = logits.float()
    highest = logits.amax(dim=-1, keepdim=True)
    probabilities = torch.softmax((logits - highest) / temperatures[:, None], dim=-1)
    tokens = torch.empty(len(requests), dtype=torch.int64, device=device)
    # Which of the two forms a row takes depends on that row alone, or its tokens would depend on the batch.
    narrow = [row for row, request in enumerate(requests) if request.sampling.narrows]
    whole = [row for row, request in enumerate(requests) if not request.sampling.narrows]
    if whole:
        tokens[whole] = _invert(probabilities[whole], uniforms[whole])
    if narrow:
        ordered, order = probabilities[narrow].sort(dim=-1, descending=True, stable=True)
        ordered = _narrowed(ordered, [requests[row].sampling for row in narrow])
        tokens[narrow] = order.gather(1, _invert(ordered, uniforms[narrow])[:, None])[:, 0]
    return tokens


def _narrowed(ordered: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Zeroes what min-p, top-k and top-p leave out; the likeliest always stays.

    ordered: [rows, vocab] probabilities, the highest first. top-p counts what the other two have left as the whole.
    """
    device, vocab_size = ordered.device, ordered.shape[1]
    min_p = torch.tensor([one.min_p for one in params], device=device)
    top_k = torch.tensor([min(one.top_k, vocab_size) or vocab_size for one in params], device=device)
    top_p = torch.tensor([one.top_p for one in params], device=device)
    ranks = torch.arange(vocab_size, device=device)
    ordered = ordered.masked_fill(
        (ordered < min_p[:, None] * ordered[:, :1]) | (ranks >= top_k[:, None]), 0.0
    )
    summed = ordered.cumsum(dim=-1)
    # In a row without min-p and top-k the whole is 1: taken from the sum, it would only bring in its rounding.
    is_cut = torch.tensor([one.min_p > 0.0 or one.top_k > 0 for one in params], device=device)
    total = torch.where(is_cut, summed[:, -1], torch.ones_like(summed[:, -1]))
    ordered = ordered.masked_fill(summed - ordered >= (top_p * total)[:, None], 0.0)
    ordered[:, 0] = ordered[:, 0].clamp(min=torch.finfo(ordered.dtype).tiny)  # top_p 0 keeps the likeliest
    return ordered


def _invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Returns, for each row, the first index at which the summed weights exceed its share `uniforms` of them."""
    summed = weights.double().cumsum(dim=-1)
    targets = uniforms[:, None] * summed[:, -1:]
    return torch.searchsorted(summed, targets, right=True)[:, 0].clamp(max=weights.shape[1] - 1)


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
