"""One request for text, from its arrival to its last token."""

from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from runtime.prefix_cache import KnownPrefix
from runtime.speculate import Lookup

FinishReason = Literal["stop", "length"]
Int32Array = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How a request's tokens are drawn, in the order in which it is done. Equal seeds give equal draws in any batch.

    First the logits: `logit_bias` is added to the tokens that it names, tokens that end the request are out of the
    question below `min_tokens`, logits of known tokens (prompt and output) are divided or, where negative, multiplied
    by `repetition_penalty`, and each token of the output costs `presence_penalty` and, as often as it is there,
    `frequency_penalty`. Then `temperature` (0: the likeliest token, and nothing below matters), `min_p` as a share of
    the likeliest token's probability, `top_k` (0: all), and `top_p` of what is left.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    num_logprobs: int | None = None  # of the likeliest tokens, beside that of the drawn one
    num_prompt_logprobs: int | None = None  # the same at each of the prompt's tokens but the first

    @property
    def has_penalties(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)

    def told(self) -> dict[str, Any]:
        """For a frame: what differs from the defaults."""
        values = {known.name: getattr(self, known.name) for known in fields(self)}
        return {name: value for name, value in values.items() if value != _DEFAULTS[name]}

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Self:
        """From a frame. Raises TypeError for a field that nobody knows."""
        bias = tuple((int(token), float(value)) for token, value in told.get("logit_bias", ()))
        return cls(**{**told, "logit_bias": bias})


_DEFAULTS = {known.name: known.default for known in fields(SamplingParams)}


@dataclass(eq=False, slots=True)
class Request:
    """`token_ids` has room for prompt and output, of which the first `num_tokens` are known; a replayed
    request knows only its lengths (None). Of the known tokens the last `num_pending` are drawn, but not read back from
    the device yet. `seat` is its row in the scheduler's arrays while it runs. `num_scored` are
    the prompt's tokens after the first whose logprobs are known, where they were asked for; a preemption leaves them.
    """

    id: str
    prompt_tokens: int
    max_tokens: int
    arrived_at: float
    token_ids: Int32Array | None = None
    sampling: SamplingParams = SamplingParams()
    stop_token_ids: frozenset[int] = frozenset()
    priority: int = 0  # the lowest comes first, where the policy asks for it
    cache_salt: str | None = None  # cached prefixes are shared between requests of the same one only

    num_tokens: int = field(init=False)
    num_pending: int = 0
    num_scored: int = 0
    seat: int | None = None
    admitted_at: float | None = None
    first_token_at: float | None = None
    finished_at: float | None = None
    finish_reason: FinishReason | None = None
    num_preemptions: int = 0
    prefix: KnownPrefix | None = None  # since it was first looked up in the prefix cache
    lookup: Lookup | None = None  # since its next tokens were first guessed

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
        priority: int = 0,
        cache_salt: str | None = None,
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
            priority,
            cache_salt,
        )

    @classmethod
    def of_lengths(cls, id: str, prompt_tokens: int, output_tokens: int, arrived_at: float) -> "Request":
        """A request to replay: it finishes after `output_tokens`, whatever they are."""
        return cls(id, prompt_tokens, output_tokens, arrived_at)

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.prompt_tokens

    @property
    def is_scoring(self) -> bool:
        """Whether logprobs of its prompt were asked for and some are still to come."""
        return self.sampling.num_prompt_logprobs is not None and self.num_scored < self.prompt_tokens - 1

    @property
    def num_reusable_tokens(self) -> int:
        """Known tokens that need not be computed where a cache has them: those that are to be scored must be."""
        return self.num_scored if self.is_scoring else self.num_tokens

    @property
    def output_ids(self) -> Int32Array:
        assert self.token_ids is not None, "a replayed request has no token ids"
        return self.token_ids[self.prompt_tokens : self.num_tokens]

    @property
    def num_read_tokens(self) -> int:
        """Known tokens without the pending ones."""
        return self.num_tokens - self.num_pending

    @property
    def needs_host(self) -> bool:
        """Whether its next token cannot be drawn before the last one is read back."""
        params = self.sampling
        asked = (params.logit_bias, params.has_penalties, params.min_tokens, params.num_logprobs is not None)
        return any(asked) or params.num_prompt_logprobs is not None

    def ahead(self, num: int) -> "Request":
        """The request as it will be if the `num` tokens of a draft behind the known ones are right: for the draw of the
        token behind them. Itself where no known token matters to that."""
        params = self.sampling
        if num == 0 or not (params.temperature or params.has_penalties or params.min_tokens):
            return self
        later = copy(self)
        later.num_tokens += num
        return later

    def extend(self) -> None:
        """One more output token is being drawn."""
        self.num_tokens += 1
        self.num_pending += 1

    def settle(self, token: int | None, now: float) -> None:
        """Records the first pending token and, when it was the last of all, why. What was drawn behind it is void."""
        at = self.num_read_tokens
        if token is not None and self.token_ids is not None:
            self.token_ids[at] = token
        self.num_pending -= 1
        if self.first_token_at is None:
            self.first_token_at = now
        if token in self.stop_token_ids:
            self.finish_reason = "stop"
        elif at + 1 >= self.prompt_tokens + self.max_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            self.num_tokens, self.num_pending, self.finished_at = at + 1, 0, now

    def append(self, token: int | None, now: float) -> None:
        """Records one more output token and, when it was the last, why."""
        self.extend()
        self.settle(token, now)
