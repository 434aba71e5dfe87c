"""Steps with pieces of prompts, captured as CUDA graphs like those of rows alone: one launch instead of hundreds.

    rows of one token | pieces of prompts | padding ──▶ all layers ──▶ hidden states, of which the head takes some

Launching such a step kernel by kernel takes the host longer than the device takes to compute a small one: on an H200
128 tokens of llama-8b take the device 5.3 ms and the host 12 to 40. A graph belongs to a number of tokens and to one
of rows alone, to which a step is padded. Whose logits are wanted differs from step to step, so the head is no part of
it. All sizes would take a start seconds, so that each is captured when it is met: at once where nobody else waits, or
else some layers each time, the last ones first, while the device computes those before them. Where that fails a size is
run once more before it is tried again, for what it launches may be new. For weights or pools that are being prepared,
the sizes that were met last are captured before.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from runtime.batch import IntArray, PackedBatch
from runtime.captures import Captured, Captures, Met, Pools, reason
from runtime.decode_graph import MAX_DRAWN
from runtime.fused_pass import DecodeInputs, MixedInputs
from runtime.kernels.splits import LONG_CONTEXT, QUERY_TILE, tiles_of
from runtime.kv_size import is_out_of_memory
from runtime.step_tensors import num_single_rows

log = logging.getLogger(__name__)

FINE_TO = 2048  # tokens up to which sizes lie a tile apart; beyond, steps are mostly as large as they may be
COARSE = 512
ROWS_APART = (0, 16, 64, 128, 256, 512)
MOST_PIECES = 32
TOKENS_A_PIECE = 16  # on average, at least: a piece takes a tile however small it is
MOST_SIZES = 256  # the one that was not replayed for longest goes
MOST_AHEAD = 32  # sizes that are captured for what is being prepared
# Tokens of a context that may be shared out among more programs than others have: a step with prompts takes longer
# anyway, and graphs of their own for all its sizes would cost more than they save.
UNEVEN_BESIDE_PROMPTS = LONG_CONTEXT
RETRY_STEPS = 256  # behind one for which memory was lacking, before its size is tried again
# What lies behind these begins where 16 bytes do.
CONTEXTS = ROWS_APART[-1] + MOST_PIECES + 2  # one more is used
EDGES = MOST_PIECES + 4  # two more are used


class Key(NamedTuple):
    """What a graph was captured for: every Python value that reached a kernel."""

    num_tokens: int
    num_apart: int
    pools: Pools
    weights: str
    backend: str
    are_uneven: bool = False  # contexts of rows alone, as `kernels.splits` says


class Given(NamedTuple):
    """What differs from step to step, but for tables. `contexts`: int64, of rows and behind them of pieces; `tokens`:
    int64 [3, tokens], ids, positions and slots; `edges`, `tiles`: int32, as `MixedInputs` has them."""

    contexts: Tensor
    tokens: Tensor
    edges: Tensor
    tiles: Tensor

    @classmethod
    def of(cls, wide: Tensor, narrow: Tensor, num_tokens: int) -> "Given":
        """Views of the first of these two, for a graph of so many tokens."""
        wide, narrow = wide[: wide_size(num_tokens)], narrow[: narrow_size(num_tokens)]
        return cls(
            wide[:CONTEXTS], wide[CONTEXTS:].view(3, num_tokens), narrow[:EDGES], narrow[EDGES:].view(-1, 2)
        )


Run = Callable[[MixedInputs, Tensor, Tensor, range], None]


class MixedGraphs:
    """The graphs of one model, and the tensors from which they read their steps."""

    def __init__(
        self,
        device: torch.device,
        most_tokens: int,
        max_blocks: int,
        width: int,
        dtype: torch.dtype,
        parts: Sequence[range],
        are_uneven: Callable[[IntArray, int], bool],
    ) -> None:
        """`most_tokens`: of a step that is captured; larger ones keep the device busy while they are launched. `width`,
        `dtype`: of hidden states; `parts`: the layers of each graph; `are_uneven`: contexts of so many rows alone."""
        self.most_tokens = most_tokens = padded_tokens(most_tokens)
        self._wide = torch.zeros(wide_size(most_tokens), dtype=torch.int64, device=device)
        self._narrow = torch.zeros(narrow_size(most_tokens), dtype=torch.int32, device=device)
        self._tables = torch.zeros(CONTEXTS, max_blocks, dtype=torch.int32, device=device)
        self._drawn = torch.zeros(MAX_DRAWN, dtype=torch.int64, device=device)
        # The residual, and what is normed of it: between two parts, and behind the last one.
        self._x, self._y = (torch.zeros(most_tokens, width, dtype=dtype, device=device) for _ in range(2))
        # In turns: one may still be on its way when the next step is written.
        self._host = [
            [_pinned_like(one) for one in (self._wide, self._narrow, self._tables.flatten())] for _ in range(2)
        ]
        self._turn = 0
        self._parts, self._are_uneven = parts, are_uneven
        self.captures = Captures(device)
        # Of the last parts or of all, the last one first.
        self._graphs: OrderedDict[Key, list[Captured[None]]] = OrderedDict()
        self._met: Met[tuple[int, int]] = Met(MOST_AHEAD)  # tokens, and rows alone
        self._failed: set[Key] = set()  # once
        self._failed_ahead: set[Key] = set()  # left to the step that meets them
        self._lacked_memory: dict[Key, int] = {}  # by step with prompts
        self._num_steps = 0
        # Weights, and the memory that holds their largest step.
        self._known: set[tuple[str, tuple[int, int] | None]] = set()
        self._held: list[Captured[None]] = []  # until the next one
        self._refused: set[Key] = set()
        self.replayed_tokens: int | None = None  # of the graph that the last step replayed, if it did
        self.backend = "auto"  # `linear_backend` of the next one

    def takes(self, packed: PackedBatch, kv_dtype: str) -> bool:
        """A rounded cache is gathered, and a long context shared out among more programs."""
        num_tokens, num_apart = len(packed.token_ids), num_single_rows(packed)
        contexts = packed.contexts[num_apart:]
        return (
            kv_dtype == "auto"
            and num_tokens <= self.most_tokens
            and num_apart <= ROWS_APART[-1]
            and 0 < len(contexts) <= most_pieces_of(padded_tokens(num_tokens))
            and int(contexts.max()) < LONG_CONTEXT
        )

    def replay(
        self, packed: PackedBatch, pools: Pools, weights: str, run: Run, drawn: Tensor
    ) -> Tensor | None:
        """Returns hidden states, [tokens, width], which the next replay overwrites; None where the step cannot be
        captured. `drawn`: tokens of the last step."""
        num_tokens, num_apart = len(packed.token_ids), num_single_rows(packed)
        size, rows = padded_tokens(num_tokens), padded_rows(num_apart, num_tokens)
        key = Key(size, rows, pools, weights, self.backend)
        alone = packed.contexts[:num_apart]
        if num_apart and alone.max() >= UNEVEN_BESIDE_PROMPTS and self._are_uneven(alone, rows):
            key = self._for_uneven(key, run)
        if key in self._refused:
            return None
        self._num_steps += 1
        self._met.add((key.num_tokens, key.num_apart))
        self._show(packed, num_apart, key)
        if packed.has_pending:
            self._drawn[: len(drawn)].copy_(drawn)
        captured = self._graphs_of(key)
        # Rows with drafts decode too.
        has_others = num_apart > 0 or len(packed.last_tokens) > len(packed.contexts)
        missing = self._parts[: len(self._parts) - len(captured)]
        if has_others:
            for part in missing[:-1]:
                self._computed(run, key, part)
            missing = missing[-1:]
        while missing and self._try_to_capture(key, missing[-1], run, captured, has_others):
            missing = missing[:-1]
        for part in missing:
            self._computed(run, key, part)
        for one in reversed(captured):
            one.graph.replay()
        self.replayed_tokens = key.num_tokens if len(captured) == len(self._parts) else None
        return self._y[:num_tokens]

    def _for_uneven(self, even: Key, run: Run) -> Key:
        """The graphs that compute the step: those for even contexts give the same and take longer, but do until the
        others are captured, behind the launches of such steps, and for good where they cannot be."""
        key = even._replace(are_uneven=True)
        do_without = key in self._refused or key in self._lacked_memory
        if self._is_whole(key) or not (self._is_whole(even) or do_without):
            return key
        if key not in self._refused:
            self.captures.due = partial(self._capture_next, key, run)
        return even

    def _capture_next(self, key: Key, run: Run) -> None:
        captured = self._graphs_of(key)
        self._try_to_capture(key, self._parts[-1 - len(captured)], run, captured, has_others=True)

    def _is_whole(self, key: Key) -> bool:
        return len(self._graphs.get(key, ())) == len(self._parts)

    def prepare(self, pools: Pools, weights: str, run: Run) -> bool:
        """Captures the largest step, so that the others find its memory. False where there is none."""
        key = self._largest(pools, weights)
        if key in self._graphs:
            return True
        captured = self._graphs_of(key)
        given = self._given(key)
        for one in given:
            one.zero_()
        given.tokens[2] = -1
        try:
            for part in self._parts if weights not in {name for name, _ in self._known} else ():
                self.captures.run_apart(partial(self._computed, run, key, part), 1)
            for part in reversed(self._parts):
                self._capture(key, part, run, captured)
        except RuntimeError as error:
            log.warning("steps with prompts cannot be captured: %s", reason(error))
            self.captures.let_go(self._graphs.pop(key))
            self._let_go_held()
            self.captures.give_back()
            return not is_out_of_memory(error)
        self._known.add((weights, self.captures.memory))
        return True

    def capture_ahead(self, pools: Pools, weights: str, run: Run) -> bool:
        """Captures one part more of what steps over these pools and by these weights will replay, if they are of the
        sizes that were met last. False where nothing of it is left to be captured."""
        left_out = self._refused | self._failed_ahead
        for size in self._met:
            key = Key(*size, pools, weights, self.backend)
            if key in left_out:
                continue
            captured = self._graphs_of(key)
            if len(captured) < len(self._parts):
                try:
                    if not self._hold_largest(key, run):
                        self._capture(key, self._parts[-1 - len(captured)], run, captured)
                except RuntimeError as error:
                    told = "steps of %d tokens with prompts are captured when they are met: %s"
                    log.info(told, key.num_tokens, reason(error))
                    self._failed_ahead.add(key)
                return True
        return False

    def forget(self, pools: int | None, weights: str | None) -> None:
        """Drops the graphs that read pools or weights which are about to go."""
        keys = {*self._graphs, *self._failed, *self._failed_ahead, *self._lacked_memory, *self._refused}
        gone = {key for key in keys if key.pools.identity == pools or key.weights == weights}
        for key in gone & set(self._graphs):
            self.captures.let_go(self._graphs.pop(key))
        self._failed -= gone
        self._failed_ahead -= gone
        self._refused -= gone
        for key in gone & set(self._lacked_memory):
            del self._lacked_memory[key]
        self._known = {one for one in self._known if one[0] != weights}
        self._let_go_held()
        self.captures.due = None

    def _graphs_of(self, key: Key) -> list[Captured[None]]:
        """Those of its parts, as far as they are captured, the last one first."""
        found = self._graphs.setdefault(key, [])
        self._graphs.move_to_end(key)
        if len(self._graphs) > MOST_SIZES:
            self.captures.let_go(self._graphs.popitem(last=False)[1])
        return found

    def _try_to_capture(
        self, key: Key, part: range, run: Run, captured: list[Captured[None]], has_others: bool
    ) -> bool:
        """`has_others`: who wait meanwhile, so that no two captures are made."""
        if self._num_steps < self._lacked_memory.get(key, -RETRY_STEPS) + RETRY_STEPS:
            return False
        if key.are_uneven and not self.captures.has_spare_room():
            self._lacked_memory[key] = self._num_steps
            return False
        try:
            if self._hold_largest(key, run) and has_others:
                return False
            self._capture(key, part, run, captured)
        except RuntimeError as error:
            told = "steps of %d tokens with prompts are run before they are captured: %s"
            if is_out_of_memory(error):
                self._lacked_memory[key] = self._num_steps
            elif key not in self._failed:
                self._failed.add(key)
            else:
                told = "steps of %d tokens with prompts are not captured, so they take longer: %s"
                self._refused.add(key)
                self.captures.let_go(self._graphs.pop(key))
            log.log(
                logging.WARNING if key in self._refused else logging.INFO, told, key.num_tokens, reason(error)
            )
            return False
        self._failed.discard(key)
        return True

    def _hold_largest(self, key: Key, run: Run) -> bool:
        """The first capture by other weights, or in new memory, is of the largest step: what smaller ones would take,
        one after the other, is no room for a larger one. It computes nothing and is kept until the next one, as memory
        goes with the last graph in it. False where there was one."""
        if (key.weights, self.captures.memory) in self._known:
            return False
        largest = self._largest(key.pools, key.weights)
        held = self.captures.capture(partial(self._computed, run, largest, self._parts[0]))
        self._let_go_held()
        self._held = [held]
        self._known.add((key.weights, self.captures.memory))
        return True

    def _let_go_held(self) -> None:
        self.captures.let_go(self._held)
        self._held = []

    def _largest(self, pools: Pools, weights: str) -> Key:
        size = self.most_tokens
        return Key(size, padded_rows(ROWS_APART[-1], size), pools, weights, self.backend)

    def _capture(self, key: Key, part: range, run: Run, captured: list[Captured[None]]) -> None:
        """The next part of its graphs."""
        captured.append(self.captures.capture(partial(self._computed, run, key, part)))
        self._let_go_held()
        log.info(
            "captured layers %d to %d of steps of %d tokens, %d rows alone, in %.3f s",
            part.start, part.stop - 1, key.num_tokens, key.num_apart, captured[-1].seconds,
        )  # fmt: skip

    def _computed(self, run: Run, key: Key, part: range) -> None:
        """What a graph does."""
        run(self._inputs(key), self._x[: key.num_tokens], self._y[: key.num_tokens], part)

    def _inputs(self, key: Key) -> MixedInputs:
        given, rows = self._given(key), ROWS_APART[-1]
        token_ids, positions, slots = given.tokens
        alone = given.contexts[: key.num_apart], self._tables[: key.num_apart]
        return MixedInputs(
            DecodeInputs(token_ids, positions, slots, *alone, self._drawn, key.are_uneven),
            given.contexts[rows:],
            self._tables[rows:],
            given.edges[: MOST_PIECES + 2],
            given.tiles,
        )

    def _given(self, key: Key) -> Given:
        return Given.of(self._wide, self._narrow, key.num_tokens)

    def _show(self, packed: PackedBatch, num_apart: int, key: Key) -> None:
        """Writes the step where the graph reads it, behind what the device is doing."""
        self._turn = 1 - self._turn
        wide, narrow, flat = self._host[self._turn]
        wide, narrow = wide[: wide_size(key.num_tokens)], narrow[: narrow_size(key.num_tokens)]
        contexts, tokens, edges, tiles = (one.numpy() for one in Given.of(wide, narrow, key.num_tokens))
        count, rows, starts = len(packed.token_ids), ROWS_APART[-1], packed.row_starts[num_apart:]
        for at, values in enumerate((packed.token_ids, packed.positions, packed.slots)):
            tokens[at, :count] = values
        tokens[:2, count:] = 0  # also ids: one of a former step may be no token but a place
        tokens[2, count:] = -1
        contexts[:] = 0
        contexts[:num_apart] = packed.contexts[:num_apart]
        contexts[rows : rows + len(starts) - 1] = packed.contexts[num_apart:]
        edges[:] = count
        edges[: len(starts)] = starts
        found = tiles_of(np.diff(starts), packed.contexts[num_apart:])
        tiles[:] = MOST_PIECES, 0
        tiles[: len(found)] = found
        self._wide[: len(wide)].copy_(wide, non_blocking=True)
        self._narrow[: len(narrow)].copy_(narrow, non_blocking=True)
        tables = packed.block_tables
        shown = flat[: tables.size].view(tables.shape)
        np.copyto(shown.numpy(), tables)
        for first, some in ((0, shown[:num_apart]), (rows, shown[num_apart:])):
            if len(some):
                self._tables[first : first + len(some), : tables.shape[1]].copy_(some, non_blocking=True)


def _pinned_like(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, device="cpu").pin_memory()


def padded_tokens(num_tokens: int) -> int:
    """The size of the graph that computes so many."""
    unit = QUERY_TILE if num_tokens <= FINE_TO else COARSE
    return -(-num_tokens // unit) * unit


def padded_rows(num_apart: int, num_tokens: int) -> int:
    """Of one token, in a graph of so many tokens: as many as that, at most."""
    return min(next(size for size in ROWS_APART if size >= num_apart), padded_tokens(num_tokens))


def wide_size(num_tokens: int) -> int:
    """Of `Given`, in numbers of 64 bits."""
    return CONTEXTS + 3 * num_tokens


def narrow_size(num_tokens: int) -> int:
    """The same of 32 bits."""
    return EDGES + 2 * num_tiles_of(num_tokens)


def most_pieces_of(num_tokens: int) -> int:
    return min(MOST_PIECES, num_tokens // TOKENS_A_PIECE)


def num_tiles_of(num_tokens: int) -> int:
    """Those that so many tokens take at most."""
    return num_tokens // QUERY_TILE + most_pieces_of(num_tokens)
