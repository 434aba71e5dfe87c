"""What happened, kept until it is acknowledged: one record a finished request, one a step, one an event.

The front end appends; the daemon drains by cursor. A record is freed only when a later drain acknowledges its
number, so that a reader that dies between reading and storing loses nothing.
"""

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Literal, NamedTuple, Self

from runtime.record_spool import RecordSpool

FinishReason = Literal["stop", "length", "abort", "error", "rejected", "timeout"]

MAX_RECORDS = 200_000


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step of the engine. `at` is its end; `step_s` is the whole loop iteration, `forward_s` the model alone.

    `context_tokens` sums the cached tokens that the rows attend to; `attention_pairs` sums new tokens times context.
    `device_s`: by the GPU's own clock, from when it came to the step; what it waited for the host in between is in it.
    `graph_rows`: tokens of the CUDA graph that was replayed, padding among them. Both None where there is none.
    """

    at: float
    step_s: float
    forward_s: float
    num_decode: int
    num_prefill_rows: int
    num_prefill_tokens: int
    context_tokens: int
    attention_pairs: int
    num_running: int
    num_waiting: int
    kv_used_tokens: int
    config_id: str
    slice_id: str | None
    threads: int
    device_s: float | None = None
    graph_rows: int | None = None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """Reads a drained record; keys that this version does not know are left out.

        Raises:
            KeyError: a field is missing that every version writes.
        """
        known = (one for one in fields(cls) if one.name in record or one.default is MISSING)
        return cls(**{one.name: record[one.name] for one in known})


@dataclass(frozen=True, slots=True)
class GapSummary:
    """Gaps between the tokens of one request, seconds. No gap: no maximum and no percentile."""

    num: int = 0
    sum_s: float = 0.0
    max_s: float | None = None
    p99_s: float | None = None


def summarise_gaps(gaps_s: list[float]) -> GapSummary:
    """The percentile is the nearest rank."""
    if not gaps_s:
        return GapSummary()
    ordered = sorted(gaps_s)
    rank = -(-99 * len(ordered) // 100)
    return GapSummary(len(ordered), sum(ordered), ordered[-1], ordered[rank - 1])


@dataclass(frozen=True, slots=True)
class RequestTiming:
    """One request from arrival to end. Instants are UTC epoch seconds; None is what never happened.

    `config_id` made the first token (before one: was in force at arrival). `slices` maps a slice to
    [tokens, gaps, sum of gaps s, longest gap s] of the tokens made in it; tokens outside slices are in `gaps` only.
    """

    request_id: str
    arrived_at: float
    prompt_tokens: int
    output_tokens: int
    max_tokens: int
    admitted_at: float | None
    first_token_at: float | None
    finished_at: float
    finish_reason: FinishReason
    error_kind: str | None
    config_id: str
    arrival_slice: str | None
    first_token_slice: str | None
    slices: dict[str, list[float]]
    gaps: GapSummary
    num_preemptions: int
    streamed: bool

    @property
    def e2e_s(self) -> float:
        return self.finished_at - self.arrived_at

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_at is None else self.first_token_at - self.arrived_at

    @property
    def tpot_s(self) -> float | None:
        """(latency - TTFT) / (output tokens - 1); absent below two tokens."""
        if self.first_token_at is None or self.output_tokens < 2:
            return None
        return (self.finished_at - self.first_token_at) / (self.output_tokens - 1)

    def to_record(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        """Raises KeyError where a field is missing; unknown keys are left out."""
        values = {known.name: record[known.name] for known in fields(cls)}
        gaps = values["gaps"]
        values["gaps"] = GapSummary(gaps["num"], gaps["sum_s"], gaps.get("max_s"), gaps.get("p99_s"))
        return cls(**values)


class Drained(NamedTuple):
    next_seq: int
    dropped: int
    records_json: bytes  # a JSON array, already encoded


@dataclass
class RecordBuffer:
    """Records numbered from 1 in the order of their arrival, held as JSON text, the oldest dropped when full.

    With a `spool` they are on disk too for as long as they are held.
    """

    max_records: int = MAX_RECORDS
    dropped: int = 0
    spool: RecordSpool | None = None
    _first_seq: int = 1
    _encoded: deque[bytes] = field(default_factory=deque)

    def __len__(self) -> int:
        return len(self._encoded)

    def append(self, kind: Literal["request", "step", "event"], record: Mapping[str, Any]) -> int:
        """Returns the record's number. Encoded here, a drain of thousands never holds up the event loop."""
        if len(self._encoded) >= self.max_records:
            self._free_first()
            self.dropped += 1
        seq = self._first_seq + len(self._encoded)
        encoded = json.dumps({**record, "seq": seq, "kind": kind}, separators=(",", ":")).encode()
        self._encoded.append(encoded)
        if self.spool is not None:
            self.spool.append(seq, encoded)
        return seq

    def drain(self, after_seq: int, limit: int) -> Drained:
        """Frees everything up to `after_seq`, and returns at most `limit` records after it, which stay here."""
        while self._encoded and self._first_seq <= after_seq:
            self._free_first()
        taken = [self._encoded[index] for index in range(min(limit, len(self._encoded)))]
        next_seq = self._first_seq + len(taken) - 1
        return Drained(next_seq, self.dropped, b"[" + b",".join(taken) + b"]")

    def close(self) -> None:
        """No record comes any more."""
        if self.spool is not None:
            self.spool.close(self._first_seq - 1)

    def _free_first(self) -> None:
        self._encoded.popleft()
        self._first_seq += 1
        if self.spool is not None:
            self.spool.acknowledge(self._first_seq - 1)
