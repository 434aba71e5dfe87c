"""Logprobs in the forms of the OpenAI API (parallel lists for completions, objects for chats), of prompts in vLLM's."""

from collections.abc import Sequence
from typing import Any

from runtime.answers import Kind, PromptLogprobs
from runtime.token_text import TokenText

Written = dict[str, Any]  # one token's part of the answer

LOWEST = -9999.0  # JSON has no infinity; vLLM writes the same


class LogprobWriter:
    """Of one choice: it counts the characters so far."""

    def __init__(self, kind: Kind, token_text: TokenText) -> None:
        self._kind, self._texts, self._offset = kind, token_text, 0

    def write(self, token: int, logprobs: Sequence[Any]) -> Written:
        """`logprobs`: [logarithm of the token, [[token, logarithm], ...]], as the engine sends it."""
        logprob, top = logprobs
        if self._kind == "chat":
            others = [self._entry(other, value) for other, value in top]
            return {**self._entry(token, logprob), "top_logprobs": others}
        text = self._texts.text_of(token)
        offset, self._offset = self._offset, self._offset + self._texts.num_chars(token)
        best: dict[str, float] = {}
        for other, value in [*top, (token, logprob)]:  # the drawn one is always among them
            best.setdefault(self._texts.text_of(other), max(LOWEST, value))
        return {
            "tokens": text, "token_logprobs": max(LOWEST, logprob), "top_logprobs": best, "text_offset": offset,
        }  # fmt: skip

    def write_echo(
        self, text: str, token_ids: Sequence[int], logprobs: Sequence[Any], num_top: int
    ) -> list[Written]:
        """The prompt `text` in front of a completion; nothing comes before its first token, which has no logprob.

        Args:
            logprobs: as for `prompt_logprobs` below.
            num_top: of the likeliest tokens of each that are told.
        """
        written = []
        for token, told in zip(token_ids, [None, *logprobs], strict=True):
            if told is None:
                one: Written = {
                    "tokens": self._texts.text_of(token), "token_logprobs": None, "top_logprobs": None,
                    "text_offset": 0,
                }  # fmt: skip
                self._offset = 0 if self._is_added(token, text) else self._texts.num_chars(token)
            else:
                one = self.write(token, (told[0], told[2][:num_top]))
            written.append({**one, "text_offset": min(one["text_offset"], len(text))})
        self._offset = len(text)  # what is drawn begins here, whatever the tokenizer made of the text
        return written

    def _is_added(self, token: int, text: str) -> bool:
        """Whether the tokenizer put it in front of the text, as models with a token for the beginning have it."""
        return self._texts.is_special(token) and not text.startswith(self._texts.text_of(token))

    def _entry(self, token: int, logprob: float) -> Written:
        raw = self._texts.bytes_of(token)
        return {"token": raw.decode(errors="replace"), "logprob": max(LOWEST, logprob), "bytes": list(raw)}


def together(kind: Kind, written: Sequence[Written]) -> dict[str, Any] | None:
    """The `logprobs` of a choice or of a piece of it; None where nothing was asked for."""
    if not written:
        return None
    if kind == "chat":
        return {"content": list(written)}
    return {name: [one[name] for one in written] for name in written[0]}


def prompt_logprobs(
    texts: TokenText, token_ids: Sequence[int], logprobs: Sequence[Any], num_top: int
) -> PromptLogprobs:
    """Of a prompt, as vLLM writes them: its own token with its rank, then the likeliest in their order.

    Args:
        logprobs: [logarithm, rank, [[token, logarithm], ...]] of each token but the first, as the engine sends it.
    """
    told: PromptLogprobs = [None]
    for token, (logprob, rank, top) in zip(token_ids[1:], logprobs, strict=True):
        ranked = [(token, logprob, rank), *((*pair, place) for place, pair in enumerate(top[:num_top], 1))]
        told.append({
            str(one): {"logprob": max(LOWEST, value), "rank": at, "decoded_token": texts.text_of(one)}
            for one, value, at in ranked
        })  # fmt: skip
    return told
