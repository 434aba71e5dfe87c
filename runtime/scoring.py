"""Teacher-forced scores of known texts, computed between serving steps: what quality checks are made of.

    add ──▶ waiting ──▶ a piece after a serving step, when it is due ──▶ … ──▶ reply

A text is read in pieces of at most MAX_PIECE_TOKENS tokens on a small KV area of its own, so that a request waits
for one piece at most and no cached token of anybody is touched. While there are requests, pieces take at most
BUSY_SHARE of the time. How texts are cut depends on nothing but the call: the same call under the same
configuration gives the same numbers, beside traffic or without. No torch here.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from runtime.batch import IntArray, PackedBatch
from runtime.errors import InvalidRequest, RuntimeFault
from runtime.knobs import EngineConfig
from runtime.kv_cache import BLOCK_TOKENS
from runtime.link import Frame

MAX_SEQUENCES = 256
MAX_SEQUENCE_TOKENS = 4096
MAX_TOKENS = 32_768  # of all sequences of a call
MAX_PIECE_TOKENS = 128
MAX_WAITING = 4
MAX_LIMIT_S = 600.0
BUSY_SHARE = 0.1


class Scored(NamedTuple):
    """One value a position: nats, and the likeliest token; both None where the output was no number."""

    nll: list[float | None]
    top1: list[int | None]


class ScoringExecutor(Protocol):
    """What scoring needs of the executor. `area` is whatever `score_area` made."""

    vocab_size: int
    max_model_len: int

    def score_area(self, num_blocks: int, config: EngineConfig) -> Any: ...

    def score(self, packed: PackedBatch, targets: IntArray, area: Any, config: EngineConfig) -> Scored: ...


class Piece(NamedTuple):
    """Tokens [start, end) of one sequence; the token after each is what is scored."""

    sequence: int
    start: int
    end: int


def pieces_of(lengths: Sequence[int], piece_tokens: int) -> list[Piece]:
    """In the order in which they must be computed. The last token of a sequence predicts nothing that is known."""
    return [
        Piece(index, start, min(start + piece_tokens, length - 1))
        for index, length in enumerate(lengths)
        for start in range(0, length - 1, piece_tokens)
    ]


def packed_piece(token_ids: IntArray, piece: Piece) -> PackedBatch:
    """A step of one row that begins at slot 0 of the area, with the logits of every token."""
    positions = np.arange(piece.start, piece.end)
    return PackedBatch(
        token_ids=token_ids[piece.start : piece.end],
        positions=positions,
        slots=positions,
        row_starts=np.array([0, len(positions)]),
        contexts=np.array([piece.end]),
        block_tables=np.arange(-(-piece.end // BLOCK_TOKENS), dtype=np.int32)[None],
        last_tokens=np.arange(len(positions)),
        block_tokens=BLOCK_TOKENS,
    )


@dataclass
class ScoreJob:
    """One call, and how far it is. Durations in seconds."""

    call: int
    config: EngineConfig
    sequences: list[IntArray]
    pieces: deque[Piece]
    started_at: float
    limit_s: float
    area: Any = None
    scored: list[Scored] = field(default_factory=list)
    num_pieces: int = 0
    busy_s: float = 0.0
    longest_piece_s: float = 0.0

    def answer(self, now: float) -> dict[str, Any]:
        return {
            "config_id": self.config.config_id,
            "nll": [one.nll for one in self.scored],
            "top1": [one.top1 for one in self.scored],
            "num_pieces": self.num_pieces,
            "elapsed_s": now - self.started_at,
            "busy_s": self.busy_s,
            "longest_piece_s": self.longest_piece_s,
        }


class Scorer:
    """Owns the calls that are being scored. It ends with the engine: who waits is told that the link closed."""

    def __init__(
        self, executor: ScoringExecutor, send: Callable[[Frame], None],
        timer: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        self._executor, self._send, self._timer = executor, send, timer
        self._jobs: deque[ScoreJob] = deque()
        self._due_at = 0.0

    @property
    def has_work(self) -> bool:
        return bool(self._jobs)

    @property
    def configs(self) -> list[EngineConfig]:
        """Those whose weights are needed."""
        return [job.config for job in self._jobs]

    def add(self, call: int, args: Mapping[str, Any], config: EngineConfig) -> None:
        """Queues a call. Its reply is sent when it is scored, or failed.

        Raises:
            InvalidRequest: over a limit, out of the vocabulary, or too many calls wait.
        """
        if len(self._jobs) >= MAX_WAITING:
            raise InvalidRequest(f"At most {MAX_WAITING} scoring calls may wait. Send it again later.")
        sequences = checked_sequences(
            args["sequences"], self._executor.vocab_size, self._executor.max_model_len
        )
        piece_tokens = int(args.get("piece_tokens") or MAX_PIECE_TOKENS)
        if not 1 <= piece_tokens <= MAX_PIECE_TOKENS:
            raise InvalidRequest(
                f"`piece_tokens` must be in [1, {MAX_PIECE_TOKENS}], but got {piece_tokens}."
            )
        limit_s = min(MAX_LIMIT_S, float(args.get("limit_s") or MAX_LIMIT_S))
        pieces = deque(pieces_of([len(sequence) for sequence in sequences], piece_tokens))
        self._jobs.append(ScoreJob(call, config, sequences, pieces, self._timer(), limit_s))

    def due_in_s(self, is_busy: bool) -> float | None:
        """Seconds until `step` has something to do; None without a call. `is_busy`: there are requests."""
        if not self._jobs:
            return None
        return max(0.0, self._due_at - self._timer()) if is_busy else 0.0

    def step(self, is_busy: bool) -> bool:
        """Computes the next piece if it is due. False if there was none."""
        if self.due_in_s(is_busy) != 0.0:
            return False
        job, began = self._jobs[0], self._timer()
        try:
            if began - job.started_at > job.limit_s:
                raise InvalidRequest(f"The scoring call was not done within {job.limit_s:g} s.")
            self._compute(job)
        except InvalidRequest as error:
            self._fail("invalid_request", str(error))
        except RuntimeFault as error:
            self._fail("score_failed", str(error))
        except RuntimeError as error:  # of torch: out of memory, a kernel that fails
            self._fail("score_failed", f"{type(error).__name__}: {str(error).splitlines()[0]}")
        else:
            self._count(job, self._timer() - began)
        # Requests get the rest of the time: nine times as long as the piece took.
        ended = self._timer()
        self._due_at = ended + (ended - began) * (1.0 / BUSY_SHARE - 1.0)
        return True

    def _compute(self, job: ScoreJob) -> None:
        if job.area is None:
            longest = max(len(sequence) for sequence in job.sequences)
            job.area = self._executor.score_area(-(-longest // BLOCK_TOKENS), job.config)
        piece = job.pieces.popleft()
        token_ids = job.sequences[piece.sequence]
        scored = self._executor.score(
            packed_piece(token_ids, piece), token_ids[piece.start + 1 : piece.end + 1], job.area, job.config
        )
        if piece.start == 0:
            job.scored.append(Scored([], []))
        job.scored[-1].nll.extend(scored.nll)
        job.scored[-1].top1.extend(scored.top1)

    def _count(self, job: ScoreJob, piece_s: float) -> None:
        job.num_pieces += 1
        job.busy_s += piece_s
        job.longest_piece_s = max(job.longest_piece_s, piece_s)
        if not job.pieces:
            self._jobs.popleft()
            self._send({"op": "reply", "call": job.call, "value": job.answer(self._timer())})

    def _fail(self, kind: str, message: str) -> None:
        job = self._jobs.popleft()
        self._send({"op": "reply", "call": job.call, "error": {"kind": kind, "message": message}})


def checked_sequences(sequences: Any, vocab_size: int, max_model_len: int) -> list[IntArray]:
    """Raises InvalidRequest where a limit is passed."""
    longest = min(MAX_SEQUENCE_TOKENS, max_model_len)
    if not isinstance(sequences, list) or not 1 <= len(sequences) <= MAX_SEQUENCES:
        got = len(sequences) if isinstance(sequences, list) else type(sequences).__name__
        raise InvalidRequest(
            f"`sequences` must be a list of 1 to {MAX_SEQUENCES} lists of tokens, but got {got}."
        )
    checked: list[IntArray] = []
    for index, sequence in enumerate(sequences):
        if not isinstance(sequence, list) or not all(type(token) is int for token in sequence):
            raise InvalidRequest(f"Sequence {index} must be a list of whole numbers.")
        if not 2 <= len(sequence) <= longest:
            raise InvalidRequest(
                f"Sequence {index} must hold 2 to {longest} tokens, but got {len(sequence)}. Split it."
            )
        if not 0 <= min(sequence) <= max(sequence) < vocab_size:
            raise InvalidRequest(
                f"Token ids must be in [0, {vocab_size - 1}], but sequence {index} has "
                f"{min(sequence)} to {max(sequence)}."
            )
        checked.append(np.array(sequence, np.int64))
    if (total := sum(map(len, checked))) > MAX_TOKENS:
        raise InvalidRequest(f"`sequences` must hold at most {MAX_TOKENS} tokens together, but got {total}.")
    return checked
