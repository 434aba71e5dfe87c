"""Steps with pieces of prompts, captured as CUDA graphs like those of rows alone: one launch instead of hundreds.

    rows of one token | pieces of prompts | padding ──▶ all layers ──▶ hidden states, of which the head takes some

Launching such a step kernel by kernel takes the host longer than the device takes to compute a small one: on an H200
128 tokens of llama-8b take the device 5.3 ms and the host 12 to 40. A graph belongs to a number of tokens and to one
of rows alone, to which a step is padded. Whose logits are wanted differs from step to step, so the head is no part of
it. All sizes would take a start seconds, so that each is captured when it is met: some layers each time, as long as
others wait for their next token meanwhile. Where that fails a size is run once more before it is tried again, for what
it launches may be new.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from runtime.batch import PackedBatch
from runtime.captures import Captured, Captures, Pools, reason
from runtime.fused_pass import DecodeInputs, MixedInputs
from runtime.kernels.splits import LONG_CONTEXT, QUERY_TILE, tiles_of
from runtime.step_tensors import num_single_rows

log = logging.getLogger(__name__)

FINE_TO = 2048  # tokens up to which sizes lie a tile apart; beyond, steps are mostly as large as they may be
COARSE = 512
ROWS_APART = (0, 16, 64, 128, 256, 512)
MOST_PIECES = 32
TOKENS_A_PIECE = 16  # on average, at least: a piece takes a tile however small it is
NUM_PARTS = 4  # of the layers, each a graph of its own
PARTS_BESIDE_OTHERS = 1  # that one step captures, where rows wait for their next token
MOST_SIZES = 128  # the one that was not replayed for longest goes
MOST_DRAWN = 2**14  # tokens that a step of any kind draws at most
EDGES = MOST_PIECES + 4  # two more are used; what lies behind them begins where 16 bytes do


class Key(NamedTuple):
    """What a graph was captured for: every Python value that reached a kernel."""

    num_tokens: int
    num_apart: int
    pools: Pools
    weights: str
    backend: str


class Given(NamedTuple):
    """What differs from step to step, but for tables. `tokens`: int64 [3, most tokens], ids, positions and slots;
    `contexts`: int64 [rows + pieces]; `edges`, `tiles`: int32, as `MixedInputs` has them."""

    tokens: Tensor
    contexts: Tensor
    edges: Tensor
    tiles: Tensor

    @classmethod
    def of(cls, wide: Tensor, narrow: Tensor, most_tokens: int) -> "Given":
        """Views of these two."""
        tokens, contexts = wide.split((3 * most_tokens, len(wide) - 3 * most_tokens))
        return cls(tokens.view(3, most_tokens), contexts, narrow[:EDGES], narrow[EDGES:].view(-1, 2))


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
    ) -> None:
        """`most_tokens`: of a step that is captured; larger ones keep the device busy while they are launched. `width`,
        `dtype`: of hidden states; `parts`: the layers of each graph."""
        self.most_tokens = most_tokens = padded_tokens(most_tokens)
        self._device = device
        rows = ROWS_APART[-1] + MOST_PIECES + 1
        sizes = (3 * most_tokens + rows, EDGES + 2 * num_tiles_of(most_tokens))
        self._wide = torch.zeros(sizes[0], dtype=torch.int64, device=device)
        self._narrow = torch.zeros(sizes[1], dtype=torch.int32, device=device)
        self._given = Given.of(self._wide, self._narrow, most_tokens)
        self._tables = torch.zeros(rows, max_blocks, dtype=torch.int32, device=device)
        self._drawn = torch.zeros(MOST_DRAWN, dtype=torch.int64, device=device)
        # The residual, and what is normed of it: between two parts, and behind the last one.
        self._x, self._y = (torch.zeros(most_tokens, width, dtype=dtype, device=device) for _ in range(2))
        # In turns: one may still be on its way when the next step is written.
        self._host = [
            tuple(torch.zeros_like(one, device="cpu").pin_memory() for one in (self._wide, self._narrow))
            for _ in range(2)
        ]
        self._host_tables = [
            torch.zeros(self._tables.numel(), dtype=torch.int32).pin_memory() for _ in range(2)
        ]
        self._turn = 0
        self._parts = parts
        self.captures = Captures(device)
        self._graphs: OrderedDict[Key, list[Captured[None]]] = OrderedDict()  # of the first parts, or of all
        self._failed: set[Key] = set()  # once
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
        key = Key(padded_tokens(num_tokens), padded_rows(num_apart, num_tokens), pools, weights, self.backend)
        if key in self._refused:
            return None
        self._show(packed, num_apart, key)
        if packed.has_pending:
            self._drawn[: len(drawn)].copy_(drawn)
        captured = self._graphs_of(key)
        num_more = PARTS_BESIDE_OTHERS if num_apart else len(self._parts)
        is_whole = True
        for at, part in enumerate(self._parts):
            if at == len(captured) and num_more:
                num_more -= 1
                self._try_to_capture(key, part, run, captured)
            if at < len(captured):
                captured[at].graph.replay()
            else:
                is_whole = False
                self._computed(run, key, part)
        self.replayed_tokens = key.num_tokens if is_whole else None
        return self._y[:num_tokens]

    def prepare(self, pools: Pools, weights: str, run: Run) -> None:
        """Captures the largest step, so that the others find its memory. Where there is none, no step is captured."""
        key = Key(
            self.most_tokens, padded_rows(ROWS_APART[-1], self.most_tokens), pools, weights, self.backend
        )
        if not self.most_tokens or key in self._graphs:
            return
        self._blank()
        captured = self._graphs_of(key)
        try:
            for part in self._parts:
                self.captures.run_apart(partial(self._computed, run, key, part), 1)
            for part in self._parts:
                self._capture(key, part, run, captured)
        except RuntimeError as error:
            log.warning("no steps with prompts are captured, so small ones take longer: %s", reason(error))
            self.most_tokens = 0
            self.captures.let_go(self._graphs.pop(key))

    def forget(self, pools: int | None, weights: str | None) -> None:
        """Drops the graphs that read pools or weights which are about to go."""
        keys = {*self._graphs, *self._failed, *self._refused}
        gone = {key for key in keys if key.pools.identity == pools or key.weights == weights}
        for key in gone & set(self._graphs):
            self.captures.let_go(self._graphs.pop(key))
        self._failed -= gone
        self._refused -= gone

    def _graphs_of(self, key: Key) -> list[Captured[None]]:
        """Those of its parts, in order, as far as they are captured."""
        found = self._graphs.setdefault(key, [])
        self._graphs.move_to_end(key)
        if len(self._graphs) > MOST_SIZES:
            self.captures.let_go(self._graphs.popitem(last=False)[1])
        return found

    def _try_to_capture(self, key: Key, part: range, run: Run, captured: list[Captured[None]]) -> None:
        try:
            self._capture(key, part, run, captured)
        except RuntimeError as error:  # torch.OutOfMemoryError among them
            if key not in self._failed:
                log.info(
                    "steps of %d tokens are run before they are captured: %s", key.num_tokens, reason(error)
                )
                self._failed.add(key)
                return
            log.warning(
                "steps of %d tokens with prompts are not captured, so they take longer: %s",
                key.num_tokens,
                reason(error),
            )
            self._refused.add(key)
            self.captures.let_go(self._graphs.pop(key))

    def _capture(self, key: Key, part: range, run: Run, captured: list[Captured[None]]) -> None:
        """The next part of its graphs."""
        captured.append(self.captures.capture(partial(self._computed, run, key, part)))
        log.info(
            "captured layers %d to %d of steps of %d tokens, %d rows alone, in %.3f s",
            part.start, part.stop - 1, key.num_tokens, key.num_apart, captured[-1].seconds,
        )  # fmt: skip

    def _computed(self, run: Run, key: Key, part: range) -> None:
        """What a graph does."""
        run(self._inputs(key), self._x[: key.num_tokens], self._y[: key.num_tokens], part)

    def _inputs(self, key: Key) -> MixedInputs:
        given, rows = self._given, ROWS_APART[-1]
        token_ids, positions, slots = given.tokens[:, : key.num_tokens]
        alone = given.contexts[: key.num_apart], self._tables[: key.num_apart]
        return MixedInputs(
            DecodeInputs(token_ids, positions, slots, *alone, self._drawn),
            given.contexts[rows:],
            self._tables[rows:],
            given.edges[: MOST_PIECES + 2],
            given.tiles[: num_tiles_of(key.num_tokens)],
        )

    def _blank(self) -> None:
        """A step of nothing but padding."""
        for one in (self._wide, self._narrow):
            one.zero_()
        self._given.tokens[2] = -1

    def _show(self, packed: PackedBatch, num_apart: int, key: Key) -> None:
        """Writes the step where the graph reads it, behind what the device is doing."""
        self._turn = 1 - self._turn
        wide, narrow = self._host[self._turn]
        tokens, contexts, edges, tiles = (
            one.numpy() for one in Given.of(wide, narrow, self._given.tokens.shape[1])
        )
        count, rows, starts = len(packed.token_ids), ROWS_APART[-1], packed.row_starts[num_apart:]
        for at, values in enumerate((packed.token_ids, packed.positions, packed.slots)):
            tokens[at, :count] = values
        tokens[:2, count : key.num_tokens] = 0  # also ids: one of a former step may be no token but a place
        tokens[2, count : key.num_tokens] = -1
        contexts[:] = 0
        contexts[:num_apart] = packed.contexts[:num_apart]
        contexts[rows : rows + len(starts) - 1] = packed.contexts[num_apart:]
        edges[:] = count
        edges[: len(starts)] = starts
        found = tiles_of(np.diff(starts), packed.contexts[num_apart:])
        tiles[:] = MOST_PIECES, 0
        tiles[: len(found)] = found
        self._wide.copy_(wide, non_blocking=True)
        self._narrow.copy_(narrow, non_blocking=True)
        tables = packed.block_tables
        pinned = self._host_tables[self._turn]
        pinned.numpy()[: tables.size] = tables.ravel()
        shown = pinned[: tables.size].view(tables.shape)
        for first, some in ((0, shown[:num_apart]), (rows, shown[num_apart:])):
            if len(some):
                self._tables[first : first + len(some), : tables.shape[1]].copy_(some, non_blocking=True)


def padded_tokens(num_tokens: int) -> int:
    """The size of the graph that computes so many."""
    unit = QUERY_TILE if num_tokens <= FINE_TO else COARSE
    return -(-num_tokens // unit) * unit


def padded_rows(num_apart: int, num_tokens: int) -> int:
    """Of one token, in a graph of so many tokens: as many as that, at most."""
    return min(next(size for size in ROWS_APART if size >= num_apart), padded_tokens(num_tokens))


def most_pieces_of(num_tokens: int) -> int:
    return min(MOST_PIECES, num_tokens // TOKENS_A_PIECE)


def num_tiles_of(num_tokens: int) -> int:
    """Those that so many tokens take at most."""
    return num_tokens // QUERY_TILE + most_pieces_of(num_tokens)
