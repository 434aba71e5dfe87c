"""Logarithms of probabilities of drawn tokens and of the likeliest ones, as the model itself gives them.

They are of the raw logits, before biases, penalties and temperature, as OpenAI's API and vLLM have them.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.request import Request


class TokenLogprobs(NamedTuple):
    """`top`: the likeliest tokens and their logarithms, natural, as many as were asked for, the highest first."""

    logprob: float
    top: list[tuple[int, float]]


class PromptLogprob(NamedTuple):
    """Of one token of a prompt. `rank`: how many tokens are as likely or likelier, itself included. `top`: as above."""

    logprob: float
    rank: int
    top: list[tuple[int, float]]


def logprobs_of(
    logits: Tensor, tokens: Sequence[int | None], requests: Sequence[Request]
) -> dict[int, TokenLogprobs]:
    """By row, for the rows whose requests ask and that have a token. logits: [len(requests), vocab]."""
    rows = [
        row
        for row, request in enumerate(requests)
        if request.sampling.num_logprobs is not None and tokens[row] is not None
    ]
    if not rows:
        return {}
    asked = [requests[row].sampling.num_logprobs or 0 for row in rows]
    most = min(max(asked), logits.shape[1])
    logs = torch.log_softmax(logits[rows].float(), dim=-1)
    drawn = logs.gather(1, torch.tensor([[tokens[row]] for row in rows], device=logits.device))[:, 0]
    if most == 0:
        return {row: TokenLogprobs(log, []) for row, log in zip(rows, drawn.tolist(), strict=True)}
    highest, ids = logs.topk(most, dim=-1)
    told = zip(rows, asked, drawn.tolist(), ids.tolist(), highest.tolist(), strict=True)
    return {
        row: TokenLogprobs(log, list(zip(top[:num], values[:num], strict=True)))
        for row, num, log, top, values in told
    }


def prompt_logprobs_of(logits: Tensor, targets: Sequence[int], num_top: int) -> list[PromptLogprob] | None:
    """One entry for each of `targets`, the true token after each row's. None where the logits are not numbers.

    logits: [len(targets), vocab]; logarithms are taken in float32 at least.
    """
    logs = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    told = logs.gather(1, torch.tensor(targets, device=logits.device)[:, None])
    logprobs = told[:, 0].tolist()
    if any(map(math.isnan, logprobs)):
        return None
    ranks = (logs >= told).sum(dim=-1).tolist()
    highest, ids = logs.topk(min(num_top, logits.shape[1]), dim=-1)
    return [
        PromptLogprob(logprob, rank, list(zip(top, values, strict=True)))
        for logprob, rank, top, values in zip(logprobs, ranks, ids.tolist(), highest.tolist(), strict=True)
    ]
