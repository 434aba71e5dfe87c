"""From logits to tokens: greedy, or drawn with temperature, min-p, top-k and top-p.

A draw uses one uniform number that is a hash of the request's seed and the token's position in its output.
So a seeded request gets the same numbers whatever batch it shares and however often it was preempted.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.logit_shaping import is_shaped, shaped
from runtime.request import Request, SamplingParams
from runtime.transfer import sent

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
        some = Rows.of(drawn, logits)
        some.put(tokens, _draw(some.take(logits), [requests[row] for row in drawn]))
    return torch.stack((tokens, torch.isfinite(best).to(tokens.dtype)))


def are_greedy(requests: Sequence[Request]) -> bool:
    """Whether each takes the likeliest token of its logits as they are."""
    return not any(request.sampling.temperature > 0.0 or is_shaped(request) for request in requests)


def tokens_of(drawn: Tensor) -> list[int | None]:
    """drawn: as `draw` returns it."""
    return [token if is_finite else None for token, is_finite in zip(*drawn.tolist(), strict=True)]


class Rows(NamedTuple):
    """Some rows of a batch, or all of them (None), without asking the device."""

    which: Tensor | None

    @classmethod
    def of(cls, rows: Sequence[int], like: Tensor) -> "Rows":
        """rows: of `like`, in order."""
        return cls(None if len(rows) == len(like) else sent(np.array(rows, np.int64), like.device))

    def take(self, values: Tensor) -> Tensor:
        return values if self.which is None else values.index_select(0, self.which)

    def put(self, target: Tensor, values: Tensor) -> None:
        target.copy_(values) if self.which is None else target.index_copy_(0, self.which, values)


def _draw(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """logits: [rows, vocab]. Returns [rows] tokens."""
    device = logits.device
    temperatures = sent(np.array([request.sampling.temperature for request in requests], np.float32), device)
    seeds, positions = zip(
        *((request.sampling.seed, request.num_output_tokens) for request in requests), strict=True
    )
    uniforms = sent(uniform(seeds, positions), device)
    logits = logits.float()
    highest = logits.amax(dim=-1, keepdim=True)
    probabilities = torch.softmax((logits - highest) / temperatures[:, None], dim=-1)
    tokens = torch.empty(len(requests), dtype=torch.int64, device=device)
    # Which of the two forms a row takes depends on that row alone, or its tokens would depend on the batch.
    narrow = [row for row, request in enumerate(requests) if request.sampling.narrows]
    whole = [row for row, request in enumerate(requests) if not request.sampling.narrows]
    if whole:
        some = Rows.of(whole, logits)
        some.put(tokens, _invert(some.take(probabilities), some.take(uniforms)))
    if narrow:
        some = Rows.of(narrow, logits)
        ordered, order = some.take(probabilities).sort(dim=-1, descending=True, stable=True)
        ordered = _narrowed(ordered, [requests[row].sampling for row in narrow])
        some.put(tokens, order.gather(1, _invert(ordered, some.take(uniforms))[:, None])[:, 0])
    return tokens


def _narrowed(ordered: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Zeroes what min-p, top-k and top-p leave out; the likeliest always stays.

    ordered: [rows, vocab] probabilities, the highest first. top-p counts what the other two have left as the whole.
    """
    device, vocab_size = ordered.device, ordered.shape[1]
    min_p = sent(np.array([one.min_p for one in params], np.float32), device)
    top_k = sent(np.array([min(one.top_k, vocab_size) or vocab_size for one in params], np.int64), device)
    top_p = sent(np.array([one.top_p for one in params], np.float32), device)
    ranks = torch.arange(vocab_size, device=device)
    ordered = ordered.masked_fill(
        (ordered < min_p[:, None] * ordered[:, :1]) | (ranks >= top_k[:, None]), 0.0
    )
    summed = ordered.cumsum(dim=-1)
    # In a row without min-p and top-k the whole is 1: taken from the sum, it would only bring in its rounding.
    is_cut = sent(np.array([one.min_p > 0.0 or one.top_k > 0 for one in params], np.bool_), device)
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
