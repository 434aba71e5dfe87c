"""Single tokens as bytes and text, as the lists of logprobs show them."""

import re
from functools import cache
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class TokenText:
    """`bytes_of` tells what a token stands for; half a character is bytes that are no text by themselves."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._is_byte_level = _has_byte_level_decoder(tokenizer)
        self._special = set(tokenizer.all_special_ids)
        self._bytes: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        known = self._bytes.get(token)
        if known is None:  # asked for again and again, by every place of every prompt
            known = self._bytes[token] = self._bytes_of(token)
        return known

    def _bytes_of(self, token: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # the model's vocabulary may be wider than the tokenizer's
            return b""
        if token in self._special:
            return bytes(piece.encode())
        if self._is_byte_level:
            table = _byte_of_character()
            return b"".join(bytes((table[char],)) if char in table else char.encode() for char in str(piece))
        found = _BYTE.fullmatch(piece)
        return bytes((int(found[1], 16),)) if found else str(piece).replace("\u2581", " ").encode()

    def num_chars(self, token: int) -> int:
        """Characters that begin in it: all but UTF-8's continuation bytes. Of a text's tokens together, its length."""
        raw = self.bytes_of(token)
        return len(raw) if raw.isascii() else sum(byte & 0xC0 != 0x80 for byte in raw)

    def is_special(self, token: int) -> bool:
        return token in self._special

    def text_of(self, token: int) -> str:
        return self.bytes_of(token).decode(errors="replace")


def _has_byte_level_decoder(tokenizer: Any) -> bool:
    fast = getattr(tokenizer, "backend_tokenizer", None)
    return fast is not None and "ByteLevel" in repr(fast.decoder)


@cache
def _byte_of_character() -> dict[str, int]:
    """How byte-level vocabularies write bytes: printable ones as themselves, the others from U+0100 on.

    Source: Radford et al. 2019, "Language models are unsupervised multitask learners", the encoder of GPT-2.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(0x100 + number): byte for number, byte in enumerate(others)}
