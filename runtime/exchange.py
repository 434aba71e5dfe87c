"""One client's request as the front end sees it: what was asked, what came so far, how it ended."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from runtime.errors import RuntimeFault
from runtime.replica import Replica
from runtime.request import SamplingParams
from runtime.slice_stats import SliceStats
from runtime.timings import FinishReason, RequestTiming, summarise_gaps


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn and when to stop; the part of a submission that is no prompt."""

    max_tokens: int
    params: SamplingParams = field(default_factory=SamplingParams)
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    priority: int = 0
    cache_salt: str | None = None


class Finish(NamedTuple):
    reason: FinishReason
    error: RuntimeFault | None = None


class Progress(NamedTuple):
    tokens: list[int]
    logprobs: list[Any]  # [logarithm, [[token, logarithm], ...]] of each token where asked for, else empty
    finish: Finish | None


class Wake(asyncio.Event):
    """Set whenever there is something to take, for the task that answers a call.

    While `instead` is there, the loop calls it once after such a time and leaves the task alone: a call takes a third
    of what waking a task does, which of a streamed token is a good part.
    """

    def __init__(self) -> None:
        super().__init__()
        self.instead: Callable[[], None] | None = None
        self._call_soon = asyncio.get_running_loop().call_soon
        self._is_called = False

    def set(self) -> None:
        if self.instead is None:
            super().set()
        elif not self._is_called:
            self._is_called = True
            self._call_soon(self._call)

    def rouse(self) -> None:
        """Wakes the task, whatever there is instead."""
        super().set()

    def _call(self) -> None:
        self._is_called = False
        if self.instead is None:
            super().set()
        else:
            self.instead()


@dataclass(eq=False, slots=True)
class SliceGaps:
    """Tokens that one slice made for one request, and the gaps before them, seconds."""

    num_tokens: int = 0
    num_gaps: int = 0
    sum_gap_s: float = 0.0
    max_gap_s: float = 0.0


@dataclass(eq=False, slots=True)
class Exchange:
    """Live from admission to its last token. `wake` is set whenever there is something to take."""

    id: str
    arrived_at: float
    streamed: bool
    wake: Wake
    config_id: str  # in force at arrival, then of the first token
    arrival_slice: str | None
    stats: SliceStats | None
    prompt_ids: list[int] | None = None  # None until tokenised
    sampling: Sampling | None = None
    gathers: bool = False  # tokens may wait for the next ones: where no stop string is looked for in each
    deadline: asyncio.TimerHandle | None = None
    replica: Replica | None = None  # the engine that has it; None while it waits for one

    num_tokens: int = 0
    admitted_at: float | None = None
    first_token_at: float | None = None
    first_token_slice: str | None = None
    last_token_at: float | None = None
    num_preemptions: int = 0
    gaps_s: list[float] = field(default_factory=list)
    slices: dict[str, SliceGaps] = field(default_factory=dict)
    finish: Finish | None = None
    logprobs: list[Any] = field(default_factory=list)  # where asked for: of each token that waits to be taken
    # Where asked for: [logarithm, rank, [[token, logarithm], ...]] of each of the prompt's tokens but the first.
    prompt_logprobs: list[Any] = field(default_factory=list)
    _untaken: list[int] = field(default_factory=list)

    def submission(self) -> dict[str, Any]:
        """The frame that asks the engine for this request, with the original arrival however often it is sent."""
        assert self.sampling is not None, "submitted before it was tokenised"
        return {
            "op": "submit", "id": self.id, "token_ids": self.prompt_ids, "arrived_at": self.arrived_at,
            "max_tokens": self.sampling.max_tokens, "sampling": self.sampling.params.told(),
            "stop_token_ids": list(self.sampling.stop_token_ids), "ignore_eos": self.sampling.ignore_eos,
            "priority": self.sampling.priority, "cache_salt": self.sampling.cache_salt,
        }  # fmt: skip

    @property
    def outstanding_tokens(self) -> int:
        """Tokens that its engine may still compute for it: those to be made, and before the first its prompt."""
        assert self.sampling is not None and self.prompt_ids is not None
        prompt = len(self.prompt_ids) if self.first_token_at is None else 0
        return prompt + self.sampling.max_tokens - self.num_tokens

    def add_token(self, token: int, at: float, config_id: str, slice_id: str | None) -> float | None:
        """Records one token made at `at`; returns the gap before it in seconds, None for the first."""
        gap_s = None
        if self.first_token_at is None:
            self.first_token_at, self.first_token_slice, self.config_id = at, slice_id, config_id
        else:
            gap_s = at - self.last_token_at  # type: ignore[operator]  # set with the first token
            self.gaps_s.append(gap_s)
        if slice_id is not None:
            part = self.slices.get(slice_id)
            if part is None:
                part = self.slices[slice_id] = SliceGaps()
            part.num_tokens += 1
            if gap_s is not None:
                part.num_gaps += 1
                part.sum_gap_s += gap_s
                part.max_gap_s = max(part.max_gap_s, gap_s)
        self.last_token_at = at
        self.num_tokens += 1
        self._untaken.append(token)
        return gap_s

    def add_prompt_logprobs(self, start: int, logprobs: list[Any]) -> None:
        """All of them are there before the first token. An engine that begins again sends them from 0 again."""
        self.prompt_logprobs[start:] = logprobs

    def is_due(self, stream_interval: int) -> bool:
        """Whether what came since the last call of `take` is to be sent now."""
        return not self.gathers or len(self._untaken) >= stream_interval

    def take(self) -> Progress:
        """Returns the tokens that came since the last call and, once it is over, how it ended."""
        tokens = self.take_tokens()
        logprobs, self.logprobs = self.logprobs, []
        return Progress(tokens, logprobs, self.finish)

    def take_tokens(self) -> list[int]:
        """As `take`, of a request that asked for no logprobs and is not over."""
        tokens, self._untaken = self._untaken, []
        return tokens

    def timing(self, finished_at: float) -> RequestTiming:
        assert self.finish is not None
        return RequestTiming(
            request_id=self.id,
            arrived_at=self.arrived_at,
            prompt_tokens=len(self.prompt_ids or ()),
            output_tokens=self.num_tokens,
            max_tokens=self.sampling.max_tokens if self.sampling is not None else 0,
            admitted_at=self.admitted_at,
            first_token_at=self.first_token_at,
            finished_at=finished_at,
            finish_reason=self.finish.reason,
            error_kind=None if self.finish.error is None else error_kind(self.finish.error),
            config_id=self.config_id,
            arrival_slice=self.arrival_slice,
            first_token_slice=self.first_token_slice,
            slices={
                slice_id: [part.num_tokens, part.num_gaps, part.sum_gap_s, part.max_gap_s]
                for slice_id, part in self.slices.items()
            },
            gaps=summarise_gaps(self.gaps_s),
            num_preemptions=self.num_preemptions,
            streamed=self.streamed,
        )


def error_kind(error: RuntimeFault) -> str:
    """One word a kind, as counters and records name it: the engine's own word, or the class in snake case."""
    kind = getattr(error, "kind", None)
    if kind is not None:
        return str(kind)
    name = type(error).__name__
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")
