"""Continuous batching: which tokens of which requests the next step computes.

    waiting --admit--> running (prefill, then decode) --finish_step--> finished
       ^                  |
       +----preempt-------+   the pool is full: the newest gives its blocks back and is computed again later

A step holds decode rows first (one token each), then pieces of prompts, under `max_batched_tokens`. The
knobs are read from `config` at every step; swapping it between steps never ends a request. What is needed
per running request and step lies in arrays indexed by the request's seat. No torch, no clock, no I/O.

Where somebody decodes, prompts keep to `mixed_step_tokens` too (runtime/step_budget.py).

Which waiting request comes next is said in runtime/policy.py. Prompts with more than `long_prompt_threshold` tokens
left share that many a step; where they are used up, shorter requests pass.

With `prefix_cache` on, a request that begins like an earlier one starts behind the blocks that are known: it
holds them too, or on a CPU gets a copy in blocks of its own, which stay consecutive. At least its last token is
computed. Requests without token ids (a replay) are never looked up.

A request that asks for the logprobs of its prompt is computed from its first token on, in pieces of at most
SCORED_PIECE_TOKENS, since the logits of all these tokens are made. One such prompt is under way at a time; the
others wait, and whoever asks for nothing overtakes them.

With `speculation_length` above 0 a decode row may be longer: behind its last known token comes a draft of the next ones
(runtime/speculate.py), in what the step has left of tokens and blocks. Such a step is settled before the next.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from runtime.batch import Batch, IntArray, PackedBatch, ScoredPiece
from runtime.errors import InvalidRequest
from runtime.knobs import EngineConfig
from runtime.kv_cache import BlockIds, BlockPool
from runtime.policy import held_until, least_urgent, next_waiting
from runtime.prefix_cache import KnownPrefix, extended
from runtime.request import Request
from runtime.retable import BlockMove, Retabled, WantedBlocks, retabled
from runtime.seats import Seats
from runtime.speculate import MAX_STEP_DRAFT_TOKENS, foresees_draft, write_draft
from runtime.step_budget import StepBudget, shared_out
from runtime.waiting import Waiting

# Rows of logits that a step makes of a scored prompt: times the vocabulary, they are the memory that scoring takes.
SCORED_PIECE_TOKENS = 256
KNOWN_OVER = 16  # admitted requests over which the share of their prompts that was cached is averaged


class Picked(NamedTuple):
    """Seats and how many tokens each gets. `budget`: what others may still have in this step, of which long prompts
    `long_left`."""

    seats: IntArray
    new_tokens: IntArray
    budget: StepBudget
    long_left: int


class Scheduler:
    """Owns the queue, the running requests and their blocks. Not thread-safe: one engine steps it.

    `attention_cost`: of one token that a prompt's token attends to, in tokens, as `StepModel.attention_cost` says.
    """

    def __init__(
        self, pool: BlockPool, config: EngineConfig, max_model_len: int, *, attention_cost: float = 0.0
    ) -> None:
        self.pool = pool
        self.config = config
        self.max_model_len = min(max_model_len, pool.num_tokens)
        self.attention_cost = attention_cost
        self.waiting = Waiting()
        self.running: list[Request] = []  # in order of admission
        self.num_preemptions = 0
        self.num_looked_up_tokens = 0  # of admitted requests, while the prefix cache was on
        self.num_hit_tokens = 0
        self.num_drafted_tokens = 0
        self.num_right_tokens = 0  # of the drafted ones, those that the model drew itself
        self._known_share = (
            0.0  # of the prompts admitted lately, what was cached: those that wait have as much, likely
        )
        self._namespace, self._epoch = "", 0
        self._copies: list[tuple[BlockIds, BlockIds]] = []
        self._requests: dict[str, Request] = {}
        self._num_needing_host = 0
        self._seats = Seats(pool.blocks_for(self.max_model_len))
        self._running_seats: IntArray = np.zeros(0, np.int64)
        self._in_seat: dict[int, Request] = {}
        self._has_moved = False  # to another pool since the last step
        self._leaves_out = False  # prompts, in this step; never in two that follow one another
        self._num_turns = 0
        self._scoring: Request | None = None  # the running request whose prompt is being scored
        self._is_draft_under_way = False

    # -- requests come and go ------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queues the request.

        Raises:
            InvalidRequest: it could never be served, even alone.
        """
        if request.id in self._requests:
            raise InvalidRequest(f"Request id {request.id!r} is in use; ids must be unique.")
        if request.prompt_tokens < 1 or request.max_tokens < 1:
            raise InvalidRequest(
                "A request must have at least 1 prompt token and 1 output token, "
                f"but got {request.prompt_tokens} and {request.max_tokens}."
            )
        total = request.prompt_tokens + request.max_tokens
        if total > self.max_model_len:
            raise InvalidRequest(
                f"Prompt and output must fit in {self.max_model_len} tokens, but got {request.prompt_tokens} + "
                f"{request.max_tokens} = {total}. Shorten the prompt or lower max_tokens.",
                param="max_tokens",
            )
        self._requests[request.id] = request
        self._num_needing_host += request.needs_host
        self.waiting.append(request)

    def cancel(self, id: str) -> bool:
        """Forgets the request and frees its blocks. False if it is not here (any more)."""
        request = self._requests.get(id)
        if request is None:
            return False
        self._forget(request)
        if request.seat is None:
            self.waiting.remove(request)
        else:
            self._stand_up([request])
        return True

    @property
    def has_requests(self) -> bool:
        return bool(self._requests)

    @property
    def used_tokens(self) -> int:
        """Tokens' worth of blocks that are held."""
        return self.pool.num_held * self.pool.block_tokens

    def next_wake(self, now: float) -> float | None:
        """When `schedule` may have work although nothing arrives: None if never, `now` if at once."""
        if self.running:
            return now
        if not self.waiting:
            return None
        return held_until(self.waiting, self.config.batch_wait_ms) if self._is_held(now) else now

    @property
    def cached_tokens(self) -> int:
        """Tokens' worth of blocks that nobody holds and the prefix cache keeps."""
        return self.pool.index.num_idle * self.pool.block_tokens

    def use_namespace(self, namespace: str) -> None:
        """Other weights compute from now on. What these compute is found by them only; a request that lives
        through the change mixes both, so nothing more of it is kept."""
        if namespace != self._namespace:
            self._namespace = namespace
            self._epoch += 1

    def forget_prefixes(self) -> None:
        """The prefix cache is switched off for good: its blocks return."""
        self._known_share = 0.0
        self.pool.forget_prefixes()
        for request in self.running:
            request.prefix = None

    def move_to(self, pool: BlockPool, stays: bool = False, keeps_prefixes: bool = True) -> Retabled:
        """Continues with another pool, larger or smaller, or of other blocks. What it returns must be copied before the
        next step; its tables are in force already.

        Requests that no longer fit are preempted, the newest first. Prefixes that nobody holds stay behind.
        `stays`: over the same tensors. `keeps_prefixes`: what is held is worth finding under its keys.

        Raises:
            ValueError: a request that was promised room could not fit even alone.
        """
        if pool.num_tokens < self.max_model_len:
            raise ValueError(
                f"A pool of {pool.num_tokens} tokens cannot hold {self.max_model_len} of one request."
            )
        old, here = self.pool, self._seats
        seats = self._running_seats.tolist()
        before = [here.blocks_of(seat).copy() for seat in seats]
        pieces = WantedBlocks.of(before, here.known[seats].tolist(), old, pool)
        num_left = pieces.num_fitting(pool.num_blocks)
        while len(self.running) > num_left:
            self._preempt(self.running[-1])
        move = retabled(pieces.of_first(num_left), old, pool, stays)
        here.use_width(pool.blocks_for(self.max_model_len))
        for seat, table in zip(self._running_seats.tolist(), move.tables, strict=True):
            here.blocks[seat, : len(table)] = table
            here.num_blocks[seat] = len(table)
        if old.block_tokens != pool.block_tokens:
            self._forget_keys()
        elif keeps_prefixes and len(old.index):
            for table, source in zip(move.tables, before, strict=False):
                moved = zip(table.tolist(), source.tolist(), strict=False)  # but for what has no token yet
                for block, was in moved:
                    if (key := old.index.key_of(was)) is not None:
                        pool.register(block, key)
        self.pool, self._has_moved = pool, True
        return move

    def _forget_keys(self) -> None:
        """Blocks are of another size, so what they hold is named anew: what is held already at the next step."""
        for request in self._requests.values():
            if request.prefix is not None:
                request.prefix = KnownPrefix(request.prefix.root, request.prefix.epoch)
        self._seats.registered[:] = 0

    # -- one step ------------------------------------------------------------------------------------------

    def schedule(self, now: float) -> Batch | None:
        """The next step's rows, with blocks for every token; None if there is nothing to compute now."""
        assert not self._is_draft_under_way, "a step with drafts is settled before the next is scheduled"
        seats, new_tokens, budget, long_left = self._pick_running()
        if self._grow(seats):
            still_here = np.isin(seats, self._running_seats)
            seats, new_tokens = seats[still_here], new_tokens[still_here]
        else:
            admitted = self._admit(budget, long_left, now)
            if admitted:
                seats = np.concatenate((seats, [seat for seat, _ in admitted]))
                new_tokens = np.concatenate((new_tokens, [tokens for _, tokens in admitted]))
        if not len(seats):
            return None
        drafted = self._speculate(seats, new_tokens) if self._may_speculate else None
        if drafted is not None:
            new_tokens = new_tokens + drafted
        self._seats.turn[seats] = self._num_turns + np.arange(len(seats))
        self._num_turns += len(seats)
        # Rows of one token first, by length: what is attended to at once is of like length. The longest of them come
        # first, so that what takes longest is not begun last; or last, on a CPU, where the short ones go together.
        is_piece, lengths = new_tokens > 1, self._seats.computed[seats]
        order = np.lexsort((np.where(is_piece, 0, lengths if self.pool.wants_runs else -lengths), is_piece))
        return self._batch(seats[order], new_tokens[order], None if drafted is None else drafted[order])

    def finish_step(self, batch: Batch, tokens: list[int] | None, now: float) -> list[Request]:
        """`advance` and `settle` at once."""
        self.advance(batch)
        return self.settle(batch, tokens, now)

    def advance(self, batch: Batch) -> None:
        """The step is under way: what it computes counts as computed, and each token that it draws as known, though
        not read yet. The next step may be scheduled; `pack` names such a token by -1 - its place among those drawn.
        Of a row with a draft, what it computes of that counts when it is settled, which must be before the next step.
        """
        seats = self._seats
        seats.computed[batch.seats] += batch.new_tokens
        if batch.drafted is not None:
            seats.computed[batch.seats] -= batch.drafted
            self._is_draft_under_way = True
        if batch.scored is not None:
            self._note_scored(batch.requests[batch.scored.row], batch.scored)
        for index, request in enumerate(batch.sampled_requests()):
            if request.seat is None:
                continue
            request.extend()
            seats.last_token[request.seat] = -1 - index
            if request.num_tokens < request.prompt_tokens + request.max_tokens:
                seats.known[request.seat] += (
                    1  # else nothing is left to compute, and it waits for its last token
                )

    def settle(self, batch: Batch, tokens: list[int] | None, now: float) -> list[Request]:
        """Records the tokens of a step and returns the requests that it finished; their blocks are free again.

        `tokens`: as drawn, row after row: one for each row of `batch.sampled` and one for each token of its draft; None
        in a replay. Rows whose request was cancelled or has ended meanwhile are ignored.
        """
        seats, finished = self._seats, []
        for request, run in zip(batch.sampled_requests(), batch.runs(tokens), strict=True):
            if self._requests.get(request.id) is not request or not request.num_pending:
                continue
            request.settle(run[0], now)
            if len(run) > 1:
                self._record_right(request, run[1:], now)
            if request.seat is not None and not request.num_pending:
                seats.last_token[request.seat] = run[-1] or 0
            if request.finish_reason is not None:
                finished.append(request)
        if batch.drafted is not None:
            self._count_drafts(batch)
        if self.config.prefix_cache == "on":
            self._register(batch)
        for request in finished:
            self._forget(request)
            if request.seat is None:
                self.waiting.remove(request)  # preempted while its last token was being drawn
        self._stand_up([request for request in finished if request.seat is not None])
        return finished

    @property
    def may_overlap(self) -> bool:
        """Whether no request needs its last token on the host before the next one is drawn: to draw it, or for a draft
        that is to be expected, which spares more than the overlap does."""
        if self._num_needing_host or self._is_draft_under_way:
            return False
        return not self._may_speculate or not any(foresees_draft(request) for request in self.running)

    def is_here(self, request: Request) -> bool:
        return self._requests.get(request.id) is request

    def _forget(self, request: Request) -> None:
        del self._requests[request.id]
        self._num_needing_host -= request.needs_host

    def pack(self, batch: Batch) -> PackedBatch:
        """The batch, token by token. Needs requests with token ids."""
        seats, block_tokens = self._seats, self.pool.block_tokens
        row_starts = np.concatenate(([0], np.cumsum(batch.new_tokens)))
        positions = np.arange(row_starts[-1]) + np.repeat(batch.starts - row_starts[:-1], batch.new_tokens)
        block_tables = seats.blocks[batch.seats]
        row_of_token = np.repeat(np.arange(len(batch.seats)), batch.new_tokens)
        blocks = block_tables[row_of_token, positions // block_tokens].astype(np.int64)
        token_ids = np.empty(row_starts[-1], np.int64)
        at_end = batch.sampled & (batch.new_tokens == 1)
        token_ids[row_starts[:-1][at_end]] = seats.last_token[batch.seats[at_end]]
        for row in np.flatnonzero(~at_end):  # pieces of prompts: few, and copied whole
            request, start = batch.requests[row], batch.starts[row]
            assert request.token_ids is not None, "a replayed request cannot be packed"
            token_ids[row_starts[row] : row_starts[row + 1]] = request.token_ids[
                start : start + batch.new_tokens[row]
            ]
        last_tokens = row_starts[1:][batch.sampled] - 1
        if batch.drafted is not None:
            num_drawn = batch.num_drawn
            behind = np.repeat(np.cumsum(num_drawn), num_drawn) - np.arange(num_drawn.sum()) - 1
            last_tokens = np.repeat(last_tokens, num_drawn) - behind
        if batch.scored is not None:
            piece = batch.scored
            offset = row_starts[piece.row] - batch.starts[piece.row]
            scored = np.arange(offset + piece.start, offset + piece.end)
            last_tokens = np.concatenate((last_tokens, scored))
        return PackedBatch(
            token_ids=token_ids,
            positions=positions,
            slots=blocks * block_tokens + positions % block_tokens,
            row_starts=row_starts,
            contexts=batch.contexts,
            block_tables=block_tables[:, : self.pool.blocks_for(int(batch.contexts.max()))],
            last_tokens=last_tokens,
            block_tokens=block_tokens,
            copies=batch.copies,
        )

    def _batch(self, seats: IntArray, new_tokens: IntArray, drafted: IntArray | None) -> Batch:
        here = self._seats
        starts = here.computed[seats]
        requests = [self._in_seat[seat] for seat in seats.tolist()]
        copies, self._copies = self._copies, []
        move = BlockMove(*(np.concatenate(part) for part in zip(*copies, strict=True))) if copies else None
        sampled = starts + new_tokens - (0 if drafted is None else drafted) == here.known[seats]
        scoring = self._scoring
        scored = None if scoring is None else ScoredPiece.of(scoring, requests, starts, new_tokens)
        return Batch(requests, seats, new_tokens, starts, sampled, move, scored, drafted)

    # -- who gets tokens -----------------------------------------------------------------------------------

    def _pick_running(self) -> Picked:
        """The running requests that get tokens in this step."""
        running, here = self._running_seats, self._seats
        left = here.known[running] - here.computed[running]
        is_decode = left == 1
        num_decode = int(is_decode.sum())
        queued = int(self.waiting.queued_tokens * (1 - self._known_share))
        budget = StepBudget.of(self.config, num_decode, queued, self.attention_cost)
        if num_decode + (num_decode < len(running)) <= budget.num_tokens:
            order = np.argsort(~is_decode, kind="stable")
        else:  # not everyone can have a turn: whoever has gone without for longest comes first
            order = np.argsort(here.turn[running], kind="stable")
        wanted = np.minimum(left[order], self.config.prefill_chunk)
        if self._scoring is not None:
            mine = running[order] == self._scoring.seat
            wanted[mine] = np.minimum(wanted[mine], self._scored_chunk(self._scoring))
        self._leaves_out = self._has_moved and num_decode > 0 and not self._leaves_out
        self._has_moved = False
        if self._leaves_out:  # who waits for a token has just waited for the move
            wanted[~is_decode[order]] = 0
            budget.leave_out_prompts()
        is_long = left[order] > self.config.long_prompt_threshold
        wanted[is_long] = shared_out(wanted[is_long], self.config.long_prompt_threshold)
        granted = budget.share_out(wanted, here.computed[running[order]], is_decode[order])
        long_left = self.config.long_prompt_threshold - int(granted[is_long].sum())
        return Picked(running[order][granted > 0], granted[granted > 0], budget, long_left)

    def _grow(self, seats: IntArray) -> bool:
        """Gives a block to each row that has filled its last one, oldest request first; when there is none,
        the newest running request is preempted. True if any was.

        Prompts have all their blocks from admission on, so only decode rows come here.
        """
        here = self._seats
        full = seats[here.computed[seats] >= here.num_blocks[seats] * self.pool.block_tokens]
        if not len(full):
            return False
        if len(full) > self.pool.num_free:
            full = self._running_seats[np.isin(self._running_seats, full)]
        before = self.num_preemptions
        for seat in full.tolist():
            while self.pool.num_free == 0:
                self._preempt(least_urgent(self.running, self.config.policy))
            if before != self.num_preemptions and seat not in self._running_seats:
                continue
            self._add_block(seat)
        return self.num_preemptions > before

    def _add_block(self, seat: int) -> None:
        here = self._seats
        count = here.num_blocks[seat]
        here.blocks[seat, count] = self.pool.extend(int(here.blocks[seat, count - 1]))
        here.num_blocks[seat] += 1

    def _preempt(self, request: Request) -> None:
        """Frees the request's blocks; what it has generated so far becomes part of the prompt to recompute."""
        self._stand_up([request])
        self.waiting.appendleft(request)
        request.num_preemptions += 1
        self.num_preemptions += 1

    def _stand_up(self, requests: list[Request]) -> None:
        if not requests:
            return
        for request in requests:
            assert request.seat is not None, "only a running request has a seat to leave"
            self.pool.free(self._seats.blocks_of(request.seat))
            self._seats.leave(request.seat)
            del self._in_seat[request.seat]
            request.seat = None
            if request is self._scoring:
                self._scoring = None
        self.running = [request for request in self.running if request.seat is not None]
        self._running_seats = np.array([request.seat for request in self.running], np.int64)

    # -- drafts --------------------------------------------------------------------------------------------

    @property
    def _may_speculate(self) -> bool:
        return self.config.speculation_length > 0 and len(self.running) <= self.config.speculation_max_seqs

    def _speculate(self, seats: IntArray, new_tokens: IntArray) -> IntArray | None:
        """[rows] how long a draft each row has, written behind its known tokens, with blocks for it; None if none has.

        Drafts get what prompts have left, and no block that a running request or the watermark is waiting for.
        """
        here, left = self._seats, self.config.max_batched_tokens - int(new_tokens.sum())
        left, drafted = min(left, MAX_STEP_DRAFT_TOKENS), np.zeros_like(new_tokens)
        for row in np.flatnonzero(here.known[seats] - here.computed[seats] == 1).tolist():
            request = self._in_seat[int(seats[row])]
            if left > 0 and not request.num_pending:
                most = min(left, self.config.speculation_length)
                drafted[row] = self._room_for(int(seats[row]), write_draft(request, most))
                left -= int(drafted[row])
        return drafted if drafted.any() else None

    def _room_for(self, seat: int, num_drafted: int) -> int:
        """How many tokens of a draft have slots, beside the row's own token. A block that a draft did not need after
        all stays with the row, which is about to."""
        here, size = self._seats, self.pool.block_tokens
        wanted = int(here.computed[seat]) + 1 + num_drafted
        kept_free = max(len(self.running), int(self.config.kv_watermark * self.pool.num_blocks))
        while wanted > here.num_blocks[seat] * size and self.pool.num_free > kept_free:
            self._add_block(seat)
        return num_drafted - max(0, wanted - int(here.num_blocks[seat]) * size)

    def _record_right(self, request: Request, tokens: list[int | None], now: float) -> None:
        """Records what a row drew behind its first token, where its draft was right."""
        seat = request.seat
        assert seat is not None, "a step with drafts is settled before anyone leaves a seat"
        for token in tokens:
            self._seats.computed[seat] += 1
            request.append(token, now)
            self._seats.known[seat] += request.finish_reason is None

    def _count_drafts(self, batch: Batch) -> None:
        """Notes how many tokens of each draft were right."""
        assert batch.drafted is not None
        self._is_draft_under_way = False
        for row in np.flatnonzero(batch.drafted).tolist():
            request, num = batch.requests[row], int(batch.drafted[row])
            num_right = max(0, request.num_tokens - int(batch.starts[row]) - 2)
            self.num_drafted_tokens += num
            self.num_right_tokens += num_right
            if request.lookup is not None:
                request.lookup.told(num, num_right, request.num_tokens)

    # -- admission -----------------------------------------------------------------------------------------

    def _admit(self, budget: StepBudget, long_left: int, now: float) -> list[tuple[int, int]]:
        """Moves waiting requests to running while seats, blocks and budget last; their (seat, tokens)."""
        admitted: list[tuple[int, int]] = []
        if not self.waiting or self._is_held(now):
            return admitted
        knobs, cached_tokens = self.config, cache(self._cached_tokens)  # looked up once a step
        kept_free = int(knobs.kv_watermark * self.pool.num_blocks)
        while budget.has_room and len(self.running) < knobs.max_num_seqs:
            max_tokens = None if long_left > 0 else knobs.long_prompt_threshold
            request = next_waiting(self._eligible(), knobs.policy, now, cached_tokens, max_tokens)
            if request is None:
                break
            # One more block stays free for each running request, or the next steps would preempt again.
            kept_free = max(kept_free, len(self.running))
            if self.running and self.pool.blocks_for(request.num_tokens) + kept_free > self.pool.num_free:
                break
            self.waiting.remove(request)
            seat = self._seat(request, now)
            computed = int(self._seats.computed[seat])
            left = request.num_tokens - computed
            wanted = min(left, knobs.prefill_chunk)
            if request is self._scoring:
                wanted = min(wanted, self._scored_chunk(request))
            if is_long := left > knobs.long_prompt_threshold:
                wanted = min(wanted, long_left)
            tokens = budget.take(wanted, computed)
            long_left -= is_long * tokens
            admitted.append((seat, tokens))
        if admitted:
            self._running_seats = np.array([request.seat for request in self.running], np.int64)
        return admitted

    def _seat(self, request: Request, now: float) -> int:
        here = self._seats
        seat = here.take()
        blocks, num_hits = self._blocks_for(request)
        here.blocks[seat, : len(blocks)] = blocks
        here.num_blocks[seat] = len(blocks)
        here.registered[seat] = (
            0  # also those just found: should they be evicted, the copies take their place
        )
        here.known[seat] = request.num_tokens
        here.computed[seat] = num_hits * self.pool.block_tokens
        here.last_token[seat] = 0 if request.token_ids is None else request.token_ids[request.num_tokens - 1]
        request.seat = seat
        self._in_seat[seat] = request
        if request.is_scoring:
            self._scoring = request
        if request.admitted_at is None:
            request.admitted_at = now
        self.running.append(request)
        return seat

    # -- prompts whose tokens are scored ---------------------------------------------------------------------

    def _scored_chunk(self, request: Request) -> int:
        """The most tokens that a step may compute of it. Those scored before a preemption make no logits again."""
        assert request.seat is not None
        return max(0, request.num_scored - int(self._seats.computed[request.seat])) + SCORED_PIECE_TOKENS

    def _note_scored(self, request: Request, piece: ScoredPiece) -> None:
        request.num_scored = piece.end
        if request is self._scoring and not request.is_scoring:
            self._scoring = None

    # -- the prefix cache ----------------------------------------------------------------------------------

    def _blocks_for(self, request: Request) -> tuple[BlockIds, int]:
        """Blocks for all known tokens of a request, and how many of the first are computed already."""
        pool, num_blocks = self.pool, self.pool.blocks_for(request.num_tokens)
        hits = self._find_prefix(request)
        if self.config.prefix_cache == "on" and request.token_ids is not None:
            self.num_looked_up_tokens += request.num_reusable_tokens
            if not request.num_preemptions:  # one that comes back finds its own
                found = len(hits) * pool.block_tokens / request.num_tokens
                self._known_share += (found - self._known_share) / KNOWN_OVER
        # A copy needs blocks of its own beside those it is made from.
        while pool.wants_runs and hits and num_blocks > pool.num_free - sum(map(pool.index.is_idle, hits)):
            hits.pop()
        self.num_hit_tokens += len(hits) * pool.block_tokens
        if not hits:
            return pool.allocate(num_blocks), 0
        if not pool.wants_runs:
            pool.share(hits)
            rest = pool.allocate(num_blocks - len(hits))
            return np.concatenate((np.array(hits, np.int32), rest)), len(hits)
        blocks = pool.allocate(num_blocks, avoid=frozenset(hits))
        pool.index.touch(hits)
        self._copies.append((np.array(hits, np.int32), blocks[: len(hits)]))
        return blocks, len(hits)

    def _cached_tokens(self, request: Request) -> int:
        return len(self._find_prefix(request)) * self.pool.block_tokens

    def _find_prefix(self, request: Request) -> list[int]:
        """Known blocks of the request's beginning, of its own salt only. Its last token, and what is to be scored, is
        left to compute."""
        if self.config.prefix_cache != "on" or request.token_ids is None:
            return []
        index, size = self.pool.index, self.pool.block_tokens
        root = index.root(self._namespace, request.cache_salt)
        prefix = request.prefix
        if prefix is None or (prefix.root, prefix.epoch) != (root, self._epoch):
            prefix = request.prefix = KnownPrefix(root, self._epoch)
        num_tokens = min(request.num_tokens - 1, request.num_reusable_tokens)
        return prefix.find(index, request.token_ids, size, num_tokens // size)

    def _register(self, batch: Batch) -> None:
        """Tells the prefix cache of the blocks that the batch has filled. Rows whose token was drawn only: one whose
        logits were not numbers has left its seat, and its blocks are not worth keeping."""
        here, size = self._seats, self.pool.block_tokens
        has_more = here.computed[batch.seats] // size > here.registered[batch.seats]
        for row in np.flatnonzero(has_more & batch.sampled).tolist():
            seat, request = int(batch.seats[row]), batch.requests[row]
            if request.seat != seat or request.token_ids is None:  # another may sit there by now
                continue
            # Of a step that is under way nothing is kept yet: its logits may turn out to be no numbers.
            num_full, prefix = (
                min(int(here.computed[seat]), request.num_read_tokens - 1) // size,
                request.prefix,
            )
            if prefix is not None and prefix.epoch == self._epoch:
                extended(prefix.root, prefix.keys, request.token_ids, size, num_full)
                for index in range(int(here.registered[seat]), num_full):
                    self.pool.register(int(here.blocks[seat, index]), prefix.keys[index])
            here.registered[seat] = num_full

    def _eligible(self) -> Sequence[Request]:
        """Who may be admitted now: one prompt is scored at a time, and who was preempted waits for what it drew."""
        waiting: Sequence[Request] = self.waiting
        if self._scoring is not None:
            waiting = [request for request in waiting if not request.is_scoring]
        if waiting and waiting[0].num_preemptions:  # they stand in front
            waiting = [request for request in waiting if not request.num_pending]
        return waiting

    def _is_held(self, now: float) -> bool:
        """Whether `batch_wait_ms` keeps the waiting requests waiting, so that others join their batch."""
        if now >= held_until(self.waiting, self.config.batch_wait_ms):
            return False
        return len(self.waiting) < self.config.max_num_seqs - len(self.running)
