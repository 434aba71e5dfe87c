"""Guesses at how a text goes on: as it did when its last tokens stood there before ("prompt lookup").

    known tokens ──index──▶ where each n-gram ended last ──suffix──▶ what followed there: the draft
          ▲                                                             │ written behind the known tokens
          └───────── as many as the model draws itself ◀── one step ◀───┘

A draft is only a guess: the step that computes it draws each of its tokens as it would have been drawn without it, and
keeps them up to the first that is another one. So nothing here changes what is answered, only how many steps it takes.

Source: Saxena 2023, "Prompt Lookup Decoding"; transformers and vLLM ("ngram") do the same with a scan a step.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from runtime.request import Int32Array, Request

MIN_NGRAM, MAX_NGRAM = 2, 4  # a single token has followed too many others to tell what comes next
MAX_DRAFT_TOKENS = 8
# Rows of logits that one step makes of drafts: as many as of a scored prompt, and for the same reason.
MAX_STEP_DRAFT_TOKENS = 256
# After drafts of which no token was right, so many more tokens are made without: doubled each time. A text that repeats
# nothing costs a few drafts, and one that begins to repeat is noticed within a sentence.
FIRST_REST_TOKENS, MAX_REST_TOKENS = 2, 32

# Odd 64-bit numbers, one for each place of an n-gram. Two n-grams of the same key would cost a wrong draft, no more.
# Source: the first words of splitmix64 with seed 0, made odd.
_MULTIPLIERS = np.array(
    [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F5, 0x06C45D188009454F, 0xF88BB8A8724C81ED], dtype=np.uint64
)[:, None]


class Lookup:
    """The n-grams of one request's known tokens, and how its drafts have fared."""

    def __init__(self) -> None:
        self._end_of: dict[int, int] = {}  # key of an n-gram -> where it ended last with a token behind it
        self._num_indexed = 0  # tokens at which the n-grams that end there are known
        self._found: tuple[int, int | None] = (0, None)  # known tokens at the last search, and what it gave
        self._width = MAX_DRAFT_TOKENS
        self._num_failures = 0  # drafts in a row of which no token was right
        self._rests_until = 0  # known tokens below which nothing is drafted
        self._foreseen: tuple[int, int] | None = None  # a place in the text, and the token expected there

    def draft(self, token_ids: "Int32Array", num_known: int, max_tokens: int) -> "Int32Array":
        """Returns at most `max_tokens` tokens that may follow the first `num_known`; none where nothing tells."""
        self._check_foreseen(token_ids, num_known)
        end = None if num_known < self._rests_until else self._last_end(token_ids, num_known)
        if end is None:
            return token_ids[:0]
        # Where the text ends before the draft does, the draft goes on with its own beginning: a period.
        period = num_known - 1 - end
        places = end + 1 + np.arange(min(max_tokens, self._width)) % period
        return token_ids[places]

    def foresees(self, token_ids: "Int32Array", num_known: int) -> bool:
        """Whether there is a draft now. The token that it begins with is held to what comes: see `draft`."""
        found = self.draft(token_ids, num_known, 1)
        self._foreseen = (num_known, int(found[0])) if len(found) else None
        return len(found) > 0

    def told(self, num_drafted: int, num_right: int, num_known: int) -> None:
        """A draft was computed, with `num_known` tokens known after it: the next one is longer or shorter."""
        self._foreseen = None
        if not num_right:
            self._fail(num_known)
            return
        self._num_failures = 0
        if num_right == num_drafted:
            self._width = min(2 * self._width, MAX_DRAFT_TOKENS)
        else:
            self._width = num_right + 1

    def _check_foreseen(self, token_ids: "Int32Array", num_known: int) -> None:
        """A token foreseen wrongly is a failed draft, though nothing was computed for it."""
        if self._foreseen is not None and self._foreseen[0] < num_known:
            place, token = self._foreseen
            self._foreseen = None
            if token_ids[place] != token:
                self._fail(num_known)

    def _fail(self, num_known: int) -> None:
        self._width = max(1, self._width // 2)
        self._rests_until = num_known + min(FIRST_REST_TOKENS << self._num_failures, MAX_REST_TOKENS)
        self._num_failures = min(self._num_failures + 1, MAX_REST_TOKENS)

    def _last_end(self, token_ids: "Int32Array", num_known: int) -> int | None:
        """Where the longest n-gram that ends the text ended before; None if none did. Indexes what is new."""
        if self._found[0] == num_known:
            return self._found[1]
        first = min(self._num_indexed, num_known - 1)
        keys = keys_of(token_ids[:num_known], first)
        for of_length in keys:
            self._end_of.update(zip(of_length[:-1], range(first, num_known - 1), strict=True))
        self._num_indexed = num_known - 1
        ends = (self._end_of.get(of_length[-1]) for of_length in reversed(keys))
        self._found = (num_known, next((end for end in ends if end is not None), None))
        return self._found[1]


def keys_of(tokens: "Int32Array", first: int) -> list[list[int]]:
    """By length of n-gram, the shortest first: keys of those that end at token `first` and later."""
    num = len(tokens) - first
    values = np.ones(num + MAX_NGRAM - 1, np.uint64)  # 1: before the beginning; tokens are 2 and more
    taken = tokens[max(0, first - MAX_NGRAM + 1) :]
    values[len(values) - len(taken) :] = taken.astype(np.uint64) + np.uint64(2)
    last = MAX_NGRAM - 1
    places = np.stack([values[last - back : last - back + num] for back in range(MAX_NGRAM)])
    summed: list[list[int]] = (places * _MULTIPLIERS).cumsum(axis=0, dtype=np.uint64).tolist()
    return summed[MIN_NGRAM - 1 :]


def foresees_draft(request: "Request") -> bool:
    """Whether the tokens that are read suggest the next ones, so that waiting for the last one may pay."""
    lookup = _lookup_of(request)
    if lookup is None:
        return False
    assert request.token_ids is not None, "only a request with tokens has a lookup"
    return lookup.foresees(request.token_ids, request.num_read_tokens)


def write_draft(request: "Request", max_tokens: int) -> int:
    """Writes a draft behind the known tokens of a request that waits for none, and returns its length.

    At most `max_tokens`, and one less than may still be drawn: the last is drawn behind the draft.
    """
    lookup = _lookup_of(request)
    most = min(max_tokens, request.max_tokens - request.num_output_tokens - 1)
    if lookup is None or most < 1:
        return 0
    assert request.token_ids is not None, "only a request with tokens has a lookup"
    found = lookup.draft(request.token_ids, request.num_tokens, most)
    request.token_ids[request.num_tokens : request.num_tokens + len(found)] = found
    return len(found)


def _lookup_of(request: "Request") -> Lookup | None:
    """None for one that has drawn no token yet, so that its first one is alone in its step, and for a replayed one."""
    if request.token_ids is None or request.num_read_tokens <= request.prompt_tokens:
        return None
    if request.lookup is None:
        request.lookup = Lookup()
    return request.lookup


def right_of(
    drawn: "list[int | None]", draft: "Int32Array", stop_token_ids: frozenset[int]
) -> "list[int | None]":
    """What counts of the tokens that a row drew, `len(draft) + 1`: up to the first that ends its request, is no number,
    or is not what the draft said, since what comes after it was drawn behind another text."""
    for place, (token, guess) in enumerate(zip(drawn, draft.tolist(), strict=False)):
        if token != guess or token in stop_token_ids:
            return drawn[: place + 1]
    return drawn
