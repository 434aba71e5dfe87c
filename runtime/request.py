"""One request for text, from its arrival to its last token."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FinishReason = Literal["stop", "length"]
Int32Array = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a request's tokens are drawn. `temperature` 0 is greedy. Equal seeds give equal draws in any batch."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(eq=False, slots=True)
class Request:
    """`token_ids` has room for prompt and output, of which the first `num_tokens` are known; a replayed
    request knows only its lengths (None). `seat` is its row in the scheduler's arrays while it runs.
    """

    id: str
    prompt_tokens: int
    max_tokens: int
    arrived_at: float
    token_ids: Int32Array | None = None
    sampling: SamplingParams = SamplingParams()
    stop_token_ids: frozenset[int] = frozenset()

    num_tokens: int = field(init=False)
    seat: int | None = None
    admitted_at: float | None = None
    first_token_at: float | None = None
    finished_at: float | None = None
    finish_reason: FinishReason | None = None
    num_preemptions: int = 0

    def __post_init__(self) -> None:
        self.num_tokens = self.prompt_tokens

    @classmethod
    def of_tokens(
        cls,
        id: str,
        prompt_ids: Iterable[int] | Int32Array,
        max_tokens: int,
        arrived_at: float,
        sampling: SamplingParams | None = None,
        stop_token_ids: Iterable[int] = (),
    ) -> "Request":
        prompt = np.asarray(prompt_ids, dtype=np.int32)
        token_ids = np.zeros(len(prompt) + max(0, max_tokens), dtype=np.int32)
        token_ids[: len(prompt)] = prompt
        return cls(
            id,
            len(prompt),
            max_tokens,
            arrived_at,
            token_ids,
            sampling or SamplingParams(),
            frozenset(stop_token_ids),
        )

    @classmethod
    def of_lengths(cls, id: str, prompt_tokens: int, output_tokens: int, arrived_at: float) -> "Request":
        """A request to replay: it finishes after `output_tokens`, whatever they are."""
        return cls(id, prompt_tokens, output_tokens, arrived_at)

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.prompt_tokens

    @property
    def output_ids(self) -> Int32Array:
        assert self.token_ids is not None, "a replayed request has no token ids"
        return self.token_ids[self.prompt_tokens : self.num_tokens]

    def append(self, token: int | None, now: float) -> None:
        """Records one more output token and, when it was the last, why."""
        if token is not None and self.token_ids is not None:
            self.token_ids[self.num_tokens] = token
        self.num_tokens += 1
        if self.first_token_at is None:
            self.first_token_at = now
        if token in self.stop_token_ids:
            self.finish_reason = "stop"
        elif self.num_output_tokens >= self.max_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            self.finished_at = now
