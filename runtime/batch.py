"""One step's work: which tokens of which requests, and as a model's forward pass takes them. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.request import Request
from runtime.retable import BlockMove
from runtime.speculate import right_of

IntArray = NDArray[np.int64]


class ScoredPiece(NamedTuple):
    """Tokens [start, end) of the prompt in the batch's row `row`; the token after each is what is scored."""

    row: int
    start: int
    end: int

    @classmethod
    def of(
        cls, scoring: Request, requests: Sequence[Request], starts: IntArray, new_tokens: IntArray
    ) -> "ScoredPiece | None":
        """What a step with these rows tells of the prompt; None where it has no row, or computes known scores again."""
        for row, request in enumerate(requests):
            if request is scoring:
                start = max(int(starts[row]), request.num_scored)
                end = min(int(starts[row] + new_tokens[row]), request.prompt_tokens - 1)
                return cls(row, start, end) if start < end else None
        return None


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one step, one a request; those of a single token come first.

    `new_tokens`, `starts`: [rows] tokens computed by this step, and tokens of the row cached before it.
    `sampled`: [rows] whether the row reaches its request's last known token, so that a next one is drawn.
    `copies`: cached prefixes that must be copied before the step is computed. `scored`: what the step tells of the
    prompt that is being scored. `drafted`: [rows] how many of the new tokens, the last ones, are a draft; behind each
    of them another token is drawn. None where no row has any.
    """

    requests: list[Request]
    seats: IntArray
    new_tokens: IntArray
    starts: IntArray
    sampled: NDArray[np.bool_]
    copies: BlockMove | None = None
    scored: ScoredPiece | None = None
    drafted: IntArray | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.new_tokens.sum())

    @property
    def num_decode(self) -> int:
        """Rows of a single token, beside its draft."""
        alone = self.new_tokens if self.drafted is None else self.new_tokens - self.drafted
        return int((alone == 1).sum())

    @property
    def num_drafted(self) -> int:
        return 0 if self.drafted is None else int(self.drafted.sum())

    @property
    def num_prefill_rows(self) -> int:
        return len(self.requests) - self.num_decode

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens beside one for each row that decodes: those of prompts, and of drafts."""
        return self.num_tokens - self.num_decode

    @property
    def contexts(self) -> IntArray:
        """[rows] cached tokens that the row's last token attends to, itself included."""
        return self.starts + self.new_tokens

    @property
    def context_tokens(self) -> int:
        return int(self.contexts.sum())

    @property
    def attention_pairs(self) -> int:
        return int((self.new_tokens * self.contexts).sum())

    def sampled_requests(self) -> list[Request]:
        return [self.requests[row] for row in np.flatnonzero(self.sampled)]

    @property
    def num_drawn(self) -> IntArray:
        """[sampled rows] tokens that each draws."""
        if self.drafted is None:
            return np.ones(int(self.sampled.sum()), np.int64)
        return 1 + self.drafted[self.sampled]

    def drawing_requests(self) -> list[Request]:
        """By drawn token, its request as the draw must see it. Before `Scheduler.advance`."""
        if self.drafted is None:
            return self.sampled_requests()
        pairs = zip(self.sampled_requests(), self.num_drawn.tolist(), strict=True)
        return [request.ahead(place) for request, num in pairs for place in range(num)]

    def runs(self, drawn: list[int | None] | list[int] | None) -> list[list[int | None]]:
        """By sampled row, the tokens that count, one at least. `drawn`: row after row; None in a replay."""
        if drawn is None:
            return [[None]] * int(self.sampled.sum())
        if self.drafted is None:
            return [[token] for token in drawn]
        found, first = [], 0
        for row, num in zip(np.flatnonzero(self.sampled).tolist(), self.num_drawn.tolist(), strict=True):
            request, known = self.requests[row], self.starts[row] + 1
            assert request.token_ids is not None, "a replayed request has no draft"
            draft = request.token_ids[known : known + num - 1]
            found.append(right_of([*drawn[first : first + num]], draft, request.stop_token_ids))
            first += num
        return found

    def owners(self, drawn: list[int | None]) -> Sequence[Request | None]:
        """By drawn token, the request that it counts for; None where it does not count."""
        requests = self.sampled_requests()
        if self.drafted is None:
            return requests
        rows = zip(requests, self.runs(drawn), self.num_drawn.tolist(), strict=True)
        return [request if place < len(run) else None for request, run, num in rows for place in range(num)]


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """The tokens of one step, row after row: what a model's forward pass needs.

    `token_ids`, `positions`, `slots` (where keys and values are written): [tokens]. `row_starts`: [rows + 1]
    offsets into them. `contexts`: [rows]. `block_tables`: [rows, blocks], valid up to each row's context.
    `last_tokens`: [drawn tokens + scored tokens] offsets of the tokens whose logits are needed.
    """

    token_ids: IntArray
    positions: IntArray
    slots: IntArray
    row_starts: IntArray
    contexts: IntArray
    block_tables: NDArray[np.int32]
    last_tokens: IntArray
    block_tokens: int
    copies: BlockMove | None = None

    @property
    def has_pending(self) -> bool:
        """Whether some token is one that the step before draws, named by -1 - its place."""
        return bool((self.token_ids < 0).any())
