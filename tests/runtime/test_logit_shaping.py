"""Penalties, biases and held-back ends, beside transformers' own processors; top-k and min-p beside its warpers."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from runtime.logit_shaping import shaped
from runtime.request import Request, SamplingParams
from runtime.sampling import sample

VOCAB = 40


def asked(prompt: list[int], output: list[int], stops: tuple[int, ...] = (), **params: Any) -> Request:
    request = Request.of_tokens("a", prompt, 100, 0.0, SamplingParams(**params), stops)
    for token in output:
        request.append(token, 0.0)
    return request


def random_logits(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def test_who_asks_for_nothing_costs_nothing() -> None:
    logits = random_logits(3)
    assert shaped(logits, [asked([1], [2], top_k=5, min_p=0.1, temperature=0.7)] * 3) is logits


@given(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30), st.floats(0.5, 2.0))
def test_repetition_penalty_is_that_of_transformers(context: list[int], penalty: float) -> None:
    logits = random_logits(1, len(context))
    half = len(context) // 2
    ours = shaped(logits, [asked(context[:half] or [0], context[half:], repetition_penalty=penalty)])
    known = torch.tensor([(context[:half] or [0]) + context[half:]])
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(known, logits.clone())
    assert torch.allclose(ours, theirs)


def test_presence_and_frequency_count_the_output_and_not_the_prompt() -> None:
    logits = torch.zeros(1, VOCAB)
    found = shaped(logits, [asked([7, 7], [3, 5, 3], presence_penalty=0.5, frequency_penalty=0.25)])[0]
    assert found[3] == -1.0 and found[5] == -0.75
    assert found[7] == 0.0 and found.count_nonzero() == 2
    assert logits.count_nonzero() == 0  # the model's own numbers are left alone


def test_bias_is_added_and_ends_are_held_back_below_min_tokens() -> None:
    few = asked([1], [2], (4, 9), logit_bias=((6, 5.0), (4, 1.0)), min_tokens=2)
    enough = asked([1], [2, 3], (4, 9), logit_bias=((6, 5.0),), min_tokens=2)
    found = shaped(torch.zeros(2, VOCAB, dtype=torch.bfloat16), [few, enough])
    assert found[0, 6] == found[1, 6] == 5.0
    assert found[0, 4] == found[0, 9] == -torch.inf
    assert found[1, 4] == found[1, 9] == 0.0


def test_greedy_tokens_obey_too() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 4], logits[0, 6] = 3.0, 2.0
    assert sample(logits, [asked([1], [])]) == [4]
    assert sample(logits, [asked([1], [], (4,), min_tokens=1)]) == [6]
    assert sample(logits, [asked([1], [4], frequency_penalty=2.0)]) == [6]
    assert sample(logits, [asked([1], [], logit_bias=((11, 100.0),))]) == [11]


@settings(max_examples=60)
@given(
    st.integers(0, 10), st.sampled_from([0.0, 0.05, 0.3]), st.sampled_from([1.0, 0.9, 0.5]),
    st.sampled_from([0.5, 1.0, 1.7]), st.integers(0, 99),
)  # fmt: skip
def test_what_is_left_to_draw_from_is_what_transformers_leaves(
    top_k: int, min_p: float, top_p: float, temperature: float, seed: int
) -> None:
    logits = random_logits(1, seed)
    warpers = LogitsProcessorList()
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    left = torch.softmax(warpers(torch.tensor([[0]]), logits / temperature), -1)[0].numpy()
    num = 300
    params = {"temperature": temperature, "top_k": top_k, "min_p": min_p, "top_p": top_p}
    drawn = sample(logits.expand(num, -1), [asked([1], [], seed=i, **params) for i in range(num)])
    shares = np.bincount(drawn, minlength=VOCAB) / num
    assert shares[left == 0.0].sum() == 0.0
    assert np.abs(np.cumsum(shares) - np.cumsum(left)).max() < 0.15  # Kolmogorov's distance at 300 draws


@pytest.mark.parametrize("params", [{"top_k": 3}, {"min_p": 0.2}, {"repetition_penalty": 1.3}])
def test_a_draw_does_not_depend_on_the_company(params: dict[str, Any]) -> None:
    logits = random_logits(1, 5)
    one = asked([1, 2], [3, 3], temperature=1.0, seed=11, **params)
    alone = sample(logits, [one])
    company = [asked([i], [i], temperature=1.0, presence_penalty=1.0, top_k=i, seed=i) for i in range(1, 6)]
    together = sample(torch.cat((random_logits(5, 6), logits)), [*company, one])
    assert together[-1] == alone[0]


def test_parameters_survive_the_frame() -> None:
    params = SamplingParams(0.5, 0.9, 7, 3, 0.1, 0.2, 0.3, 1.1, ((4, 1.5),), 2)
    told = params.told()
    assert SamplingParams.of({**told, "logit_bias": [[4, 1.5]]}) == params  # as msgpack brings it
    assert SamplingParams().told() == {}
