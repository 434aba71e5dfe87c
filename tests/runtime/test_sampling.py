from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from runtime.kernels import PLAIN
from runtime.request import Request, SamplingParams
from runtime.sampling import draw, sample, uniform

VOCAB = 50


def asked(temperature: float = 1.0, top_p: float = 1.0, seed: int = 0, num_output: int = 0) -> Request:
    request = Request.of_tokens("a", [1], 10_000, 0.0, SamplingParams(temperature, top_p, seed))
    request.num_tokens += num_output
    return request


def random_logits(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def test_temperature_zero_takes_the_likeliest_token() -> None:
    logits = random_logits(4)
    assert sample(logits, [asked(temperature=0.0)] * 4) == logits.argmax(-1).tolist()


@given(st.integers(0, 2**64 - 1), st.integers(0, 1000), st.integers(0, 5), st.sampled_from([1.0, 0.7]))
def test_a_seeded_draw_does_not_depend_on_the_batch(
    seed: int, position: int, others: int, top_p: float
) -> None:
    logits = random_logits(1, seed % 1000)
    alone = sample(logits, [asked(seed=seed, top_p=top_p, num_output=position)])
    company = [asked(temperature=float(i % 2), top_p=0.5 + 0.5 * (i % 3 == 0), seed=i) for i in range(others)]
    together = sample(
        torch.cat((random_logits(others, 7), logits)),
        [*company, asked(seed=seed, top_p=top_p, num_output=position)],
    )
    assert together[-1] == alone[0]


def test_draws_follow_the_probabilities() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    num_draws = 4000
    drawn = sample(logits.expand(num_draws, -1), [asked(seed=i) for i in range(num_draws)])
    shares = np.bincount(drawn, minlength=4) / num_draws
    assert np.abs(shares - [0.5, 0.3, 0.15, 0.05]).max() < 0.03  # more than three standard deviations


def test_top_p_keeps_the_smallest_set_that_reaches_it_and_renormalises() -> None:
    logits = torch.log(torch.tensor([[0.15, 0.5, 0.05, 0.3]]))
    num_draws = 2000
    drawn = sample(logits.expand(num_draws, -1), [asked(top_p=0.75, seed=i) for i in range(num_draws)])
    shares = np.bincount(drawn, minlength=4) / num_draws
    assert shares[0] == shares[2] == 0.0 and abs(shares[1] - 0.5 / 0.8) < 0.05
    assert set(sample(logits.expand(50, -1), [asked(top_p=0.0, seed=i) for i in range(50)])) == {1}


def test_a_high_temperature_flattens_and_a_tiny_one_is_greedy() -> None:
    logits = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    hot = sample(logits.expand(2000, -1), [asked(temperature=100.0, seed=i) for i in range(2000)])
    assert np.bincount(hot, minlength=4).min() > 400
    assert sample(logits.expand(100, -1), [asked(temperature=1e-6, seed=i) for i in range(100)]) == [1] * 100


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_fail_their_row_only(bad: float, temperature: float) -> None:
    logits = random_logits(3)
    logits[1, 5] = bad
    tokens = sample(logits, [asked(temperature=temperature)] * 3)
    assert tokens[1] is None and tokens[0] is not None and tokens[2] is not None


def test_masked_tokens_are_never_drawn() -> None:
    logits = torch.full((100, VOCAB), float("-inf"))
    logits[:, [3, 8]] = 0.0
    assert set(sample(logits, [asked(seed=i) for i in range(100)])) == {3, 8}


def test_uniform_numbers_are_uniform_over_positions_and_over_seeds() -> None:
    for numbers in (uniform([7] * 5000, range(5000)), uniform(range(5000), [3] * 5000)):
        assert numbers.min() >= 0.0 and numbers.max() < 1.0
        assert np.abs(np.histogram(numbers, 10, (0, 1))[0] / 500 - 1).max() < 0.2
        assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.05


def test_a_kernel_draws_all_rows_at_once_and_the_twin_those_that_sort_apart() -> None:
    """The same tokens: what is greedy, shaped, whole and cut may stand side by side."""
    calls: list[tuple[int, bool, bool]] = []

    def counted(logits: Tensor, params: Tensor, *cuts: bool) -> Tensor:
        calls.append((len(logits), *cuts))
        assert params.is_contiguous(), "a kernel reads it by its address"
        return PLAIN.sample(logits, params, *cuts)

    company = [
        SamplingParams(), SamplingParams(1.0, seed=1), SamplingParams(0.7, 0.8, 2),
        SamplingParams(1.0, seed=3, top_k=4), SamplingParams(1.0, seed=4, min_p=0.2),
        SamplingParams(1.3, 0.9, 5, 7, 0.01),
        SamplingParams(logit_bias=((3, 50.0),)), SamplingParams(1.0, seed=6, top_k=VOCAB + 9),
    ]  # fmt: skip
    requests = [Request.of_tokens(str(at), [1], 9, 0.0, one) for at, one in enumerate(company)]
    logits = random_logits(len(requests))
    together = draw(logits, requests, PLAIN._replace(sample=counted))
    assert calls == [(len(requests), True, True)]
    assert torch.equal(draw(logits, requests), together) and together[1].all() and together[0, 6] == 3
    alone = [draw(logits[at : at + 1], [request])[0, 0] for at, request in enumerate(requests)]
    assert together[0].tolist() == alone


@pytest.mark.parametrize("seed", range(5))
def test_what_stays_is_what_the_processors_of_transformers_leave(seed: int) -> None:
    """Of four thousand draws none but these, each as often as it is likely."""
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    rng = np.random.default_rng(seed)
    temperature, top_p, top_k, min_p = (
        rng.uniform(0.3, 2.0),
        rng.uniform(0.2, 0.99),
        int(rng.integers(2, 30)),
        0.02,
    )
    logits = random_logits(1, seed)
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    for processor in (MinPLogitsWarper(min_p), TopKLogitsWarper(top_k), TopPLogitsWarper(top_p)):
        scores = processor(None, scores)
    expected = scores.softmax(dim=-1)[0]
    asked = [SamplingParams(temperature, top_p, at, top_k, min_p) for at in range(4000)]
    requests = [Request.of_tokens("a", [1], 9, 0.0, one) for one in asked]
    drawn = np.bincount(sample(logits.expand(4000, -1), requests), minlength=VOCAB) / 4000
    assert np.abs(drawn - expected.numpy()).max() < 0.035 and not drawn[expected.numpy() == 0].any()


def test_of_equals_at_the_cut_the_first_ones_stay() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 40] = 1.0
    many = torch.zeros(300, 5000)
    requests = [Request.of_tokens("a", [1], 9, 0.0, SamplingParams(1.0, 0.9, at, 3000)) for at in range(300)]
    drawn = [token for token in sample(many, requests) if token is not None]
    assert max(drawn) < 2700 and sum(token > 2000 for token in drawn) > 30, "nine tenths of three thousand"
    for asked, kept in (
        (SamplingParams(1.0, top_k=3), {40, 0, 1}),
        (SamplingParams(1e6, 0.1), {40, 0, 1, 2, 3}),
    ):
        requests = [Request.of_tokens("a", [1], 9, 0.0, replace(asked, seed=at)) for at in range(300)]
        assert set(sample(logits.expand(300, -1), requests)) == kept
