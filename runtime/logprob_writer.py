"""Logprobs in the two forms of the OpenAI API: parallel lists for completions, a list of objects for chats."""

from collections.abc import Sequence
from typing import Any

from runtime.answers import Kind
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
        offset, self._offset = self._offset, self._offset + len(text)
        best: dict[str, float] = {}
        for other, value in [*top, (token, logprob)]:  # the drawn one is always among them
            best.setdefault(self._texts.text_of(other), max(LOWEST, value))
        return {
            "tokens": text, "token_logprobs": max(LOWEST, logprob), "top_logprobs": best, "text_offset": offset,
        }  # fmt: skip

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
