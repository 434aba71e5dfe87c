"""Logprobs of tokens beside torch's own, and tokens as bytes beside the tokenizer's own decoding."""

import pytest
import torch

from runtime.logprobs import logprobs_of
from runtime.model_folder import ModelFolder
from runtime.prompts import load_tokenizer
from runtime.request import Request, SamplingParams
from runtime.token_text import TokenText
from tests.servers import DEMO_MODEL


def asked(num: int | None, **params: float) -> Request:
    return Request.of_tokens("a", [1], 10, 0.0, SamplingParams(num_logprobs=num, **params))  # type: ignore[arg-type]


def test_only_rows_that_ask_are_told_and_of_the_raw_logits() -> None:
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(1)) * 4
    found = logprobs_of(
        logits.bfloat16(), [3, 4, 5, None], [asked(2, temperature=9.0), asked(None), asked(0), asked(5)]
    )
    expected = torch.log_softmax(logits.bfloat16().float(), -1)
    assert sorted(found) == [0, 2]
    assert found[0].logprob == pytest.approx(float(expected[0, 3]))
    assert [token for token, _ in found[0].top] == expected[0].topk(2).indices.tolist()
    assert found[2].top == [] and found[2].logprob == pytest.approx(float(expected[2, 5]))


def test_more_than_the_vocabulary_is_all_of_it() -> None:
    assert len(logprobs_of(torch.zeros(1, 3), [0], [asked(20)])[0].top) == 3


def test_tokens_put_together_are_the_bytes_of_the_text() -> None:
    tokenizer = load_tokenizer(ModelFolder.read(DEMO_MODEL).path)
    texts = TokenText(tokenizer)
    text = "def größe(x):\n\treturn '\u4f60\u597d \U0001f600' # a  b\x00\x7f"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(texts.bytes_of(token) for token in ids) == text.encode()
    assert all(texts.text_of(token) for token in ids)
    assert texts.bytes_of(10**6) == b""
