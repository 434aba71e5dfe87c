"""Token ids to text as they come: whole characters only, and nothing that may turn into a stop string."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

REPLACEMENT = "\ufffd"  # how a decoder writes bytes that are not (yet) a character
MAX_UNFINISHED = 3  # bytes that an unfinished UTF-8 character can have; some decoders write one mark a byte
MAX_WINDOW_TOKENS = 64  # a longer run without one clean character is garbage, cut where it can be

Decode = Callable[[Sequence[int]], str]


class BytewiseDecode:
    """A decoder under which every token stands for the same bytes whatever is beside it, as of byte-level BPE.

    `whole` holds, by token, the text of those that are whole characters; None where one is a part of a character.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self.whole = _WholeTokens(decode)

    def __call__(self, token_ids: Sequence[int]) -> str:
        return self._decode(token_ids)


class _WholeTokens(dict[int, str | None]):
    """Filled as tokens are asked for: a dictionary's own look-up is the cheapest there is."""

    def __init__(self, decode: Decode) -> None:
        super().__init__()
        self._decode = decode

    def __missing__(self, token: int) -> str | None:
        text = self._decode([token])
        piece = self[token] = None if REPLACEMENT in text else text
        return piece


class Detokenizer:
    """Turns one request's tokens into text, piece by piece.

    The pieces put together are what `decode` says of all tokens at once (test). Tokens are decoded in a small
    window that starts one finished piece back, since many decoders treat the very first token differently. Under a
    decoder that does not, a whole token is looked up, and the window is empty between two whole characters.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._whole = decode.whole if isinstance(decode, BytewiseDecode) else None
        self._window: list[int] = []
        self._num_prefix = 0  # tokens of the window whose text was out when the window began
        self._sent_chars = 0  # characters of the window's text that are out

    def push(self, token: int) -> str:
        """Returns the text that is certain by now; may be empty."""
        if self._whole is not None and not self._window:
            whole = self._whole[token]
            if whole is not None:
                return whole
        self._window.append(token)
        text = self._decode(self._window)
        certain = _without_unfinished(text)
        piece = certain[self._sent_chars :]
        self._sent_chars = max(self._sent_chars, len(certain))
        if piece and len(certain) == len(text):
            if self._whole is not None:
                self._window, self._num_prefix, self._sent_chars = [], 0, 0
                return piece
            self._shift(len(self._window), text)
        elif len(self._window) - self._num_prefix > MAX_WINDOW_TOKENS:
            self._cut(text)
        return piece

    def flush(self) -> str:
        """Returns what was held back at the end of the answer: an unfinished character shows as U+FFFD."""
        text = self._decode(self._window) if self._window else ""
        piece = text[self._sent_chars :]
        self._sent_chars = max(self._sent_chars, len(text))
        return piece

    def _shift(self, end: int, text: str) -> None:
        """Starts the next window with the tokens [num_prefix, end) as its prefix; `text` is that of the old window."""
        self._window = self._window[self._num_prefix :]
        self._num_prefix = end - self._num_prefix
        self._sent_chars -= len(text) - len(self._decode(self._window))

    def _cut(self, text: str) -> None:
        """Garbage without end would make every push slower: cut before the last few tokens where texts agree."""
        last = len(self._window) - 1
        for end in range(last, max(self._num_prefix, last - 2 * MAX_UNFINISHED), -1):
            head = self._decode(self._window[:end])
            if text.startswith(head) and len(head) <= self._sent_chars:
                self._shift(end, text)
                return


def _without_unfinished(text: str) -> str:
    """Only the last few marks may still become a character; those before them are final."""
    certain = text
    for _ in range(MAX_UNFINISHED):
        if not certain.endswith(REPLACEMENT):
            break
        certain = certain[:-1]
    return certain


class Matched(NamedTuple):
    text: str  # may go out
    stopped: bool  # a stop string was found; the text ends before it


class StopMatcher:
    """Finds the first stop string in text that comes in pieces, and holds back what may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> Matched:
        if not self._stops:
            return Matched(text, False)
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self._held = ""
            return Matched(text[: min(found)], True)
        keep = self._possible_start(text)
        self._held = text[len(text) - keep :]
        return Matched(text[: len(text) - keep], False)

    def flush(self) -> str:
        """Returns what was held back: the answer ended and no stop string came of it."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """Returns the length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        for length in range(longest, 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops if len(stop) > length):
                return length
        return 0
