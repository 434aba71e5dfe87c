"""What requests do to their logits before a token is taken: biases, tokens held back, penalties.

Everything is elementwise and gathered for the rows that ask for it, so that a row gets the same numbers whatever
batch it shares.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.request import Request
from runtime.transfer import sent

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


def shaped(logits: Tensor, requests: Sequence[Request]) -> Tensor:
    """Returns logits as `SamplingParams` says, float32 copies where any row asks for something, else the same tensor.

    logits: [len(requests), vocab].
    """
    rows = [row for row, request in enumerate(requests) if is_shaped(request)]
    if not rows:
        return logits
    logits = logits.float() if logits.dtype != torch.float32 else logits.clone()
    added = [_pairs(row, *found) for row in rows for found in _added(requests[row], logits.shape[1])]
    if added:
        _add(logits, *(np.concatenate(part) for part in zip(*added, strict=True)))
    known = [(row, requests[row]) for row in rows if requests[row].sampling.repetition_penalty != 1.0]
    if known:
        _repeat(logits, known)
    costs = [_pairs(row, *_costs(requests[row])) for row in rows if _has_costs(requests[row])]
    if costs:
        _add(logits, *(np.concatenate(part) for part in zip(*costs, strict=True)))
    return logits


def is_shaped(request: Request) -> bool:
    """Whether it asks for other logits than the model's."""
    params = request.sampling
    return bool(params.logit_bias) or params.has_penalties or request.num_output_tokens < params.min_tokens


def _added(request: Request, vocab_size: int) -> Iterator[tuple[Ints, Floats]]:
    """Tokens and what is added to their logits."""
    params = request.sampling
    if params.logit_bias:
        tokens, values = zip(*params.logit_bias, strict=True)
        yield np.array(tokens, dtype=np.int64), np.array(values, dtype=np.float32)
    if request.num_output_tokens < params.min_tokens and request.stop_token_ids:
        ends = np.array(sorted(end for end in request.stop_token_ids if end < vocab_size), dtype=np.int64)
        yield ends, np.full(len(ends), -np.inf, dtype=np.float32)


def _has_costs(request: Request) -> bool:
    params = request.sampling
    return bool(params.presence_penalty or params.frequency_penalty) and request.num_output_tokens > 0


def _costs(request: Request) -> tuple[Ints, Floats]:
    """Tokens of the output, and what their presence and frequency take off."""
    params = request.sampling
    tokens, counts = np.unique(request.output_ids, return_counts=True)
    cost = params.presence_penalty + params.frequency_penalty * counts
    return tokens.astype(np.int64), -cost.astype(np.float32)


def _pairs(row: int, tokens: Ints, values: Floats) -> tuple[Ints, Ints, Floats]:
    return np.full(len(tokens), row, dtype=np.int64), tokens, values


def _add(logits: Tensor, rows: Ints, tokens: Ints, values: Floats) -> None:
    where, what = (sent(one, logits.device) for one in (np.stack((rows, tokens)), values))
    logits.index_put_((where[0], where[1]), what, accumulate=True)


def _repeat(logits: Tensor, known: Sequence[tuple[int, Request]]) -> None:
    """Divides the logits of tokens that the prompt or the output has; multiplies where they are negative.

    Source: Keskar et al. 2019, "CTRL", and the sign rule that transformers made of it.
    """
    found = []
    for row, request in known:
        assert request.token_ids is not None, "a replayed request draws no tokens"
        tokens = np.unique(request.token_ids[: request.num_tokens]).astype(np.int64)
        found.append(
            _pairs(row, tokens, np.full(len(tokens), request.sampling.repetition_penalty, np.float32))
        )
    rows, tokens, penalties = (np.concatenate(part) for part in zip(*found, strict=True))
    where, penalty = (sent(one, logits.device) for one in (np.stack((rows, tokens)), penalties))
    old = logits[where[0], where[1]]
    logits[where[0], where[1]] = torch.where(old > 0, old / penalty, old * penalty)
