"""Steps of one token a row, captured once as CUDA graphs and replayed: one launch instead of hundreds.

A row with a draft is replayed as a row for each of its tokens, over the same blocks: a layer writes the keys and values
of all rows before it attends to any, so that each token finds those before it. What is cached is read for each of them.

A graph belongs to a number of rows (a batch is padded to the next one), to the pools it reads and to the weights it
multiplies; whatever a replay must know lies in tensors that never move. Padding rows write nothing and read nothing.
Where one context is much longer than the others there is another graph, which shares contexts out among more programs,
as soon as it is captured and if there is room for it.
One that is missing while steps are served is captured as several, some layers behind the launch of each step of its
size: those who wait for the next token wait no longer for that than they must.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from runtime.batch import IntArray, PackedBatch
from runtime.captures import Captured, Captures, Met, Pools, reason
from runtime.fused_pass import DecodeInputs, Midway
from runtime.kernels.launch import compiled_ahead
from runtime.kv_size import is_out_of_memory

log = logging.getLogger(__name__)

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
# Each of these has kernels of its own; those of larger ones are the last one's.
COMPILED_BUCKETS = (1, 2, 4, 8, 16, 32, 48, 64, 96)
MAX_DRAWN = 2**14  # tokens that a step of any kind draws at most
WARM_UPS = 2  # runs before a capture where kernels may not be compiled and loaded yet
MOST_AHEAD = 8  # sizes that are captured for what is being prepared: those met last
PUT_OFF = 1  # steps over other pools or by other weights that are run before any is captured


class Key(NamedTuple):
    """What a graph was captured for: every Python value that reached a kernel."""

    num_rows: int
    pools: Pools
    weights: str
    backend: str = "auto"
    are_uneven: bool = False  # contexts, as `kernels.splits` says


class Decoded(NamedTuple):
    """logits: [rows, vocab]; drawn: int64 [2, rows], the likeliest tokens, and whether each may be taken."""

    logits: Tensor
    drawn: Tensor


class Run(Protocol):
    """Computes a step, or some of its layers, from where those before have left it."""

    def __call__(
        self, inputs: DecodeInputs, part: range | None = None, midway: Midway | None = None
    ) -> Midway | Decoded: ...


class DecodeGraphs:
    """The graphs of one model, and the tensors from which they read their rows."""

    def __init__(
        self,
        device: torch.device,
        max_blocks: int,
        parts: Sequence[range],
        are_uneven: Callable[[IntArray, int], bool],
    ) -> None:
        """`parts`: the layers that one step captures; `are_uneven`: contexts of so many rows, padding among them."""
        rows = BUCKETS[-1]
        self._device = device
        self._scalars = torch.zeros(4, rows, dtype=torch.int64, device=device)
        self._drawn = torch.zeros(MAX_DRAWN, dtype=torch.int64, device=device)  # by the last step
        self._drawn_by: int | None = None  # where the graph lies that wrote them there, if one did
        self.replayed_rows: int | None = None  # of the graph that the last step replayed, if it did
        self._tables = torch.zeros(rows, max_blocks, dtype=torch.int32, device=device)
        # In turns: one may still be on its way when the next step is written.
        self._host_scalars = [torch.zeros(4, rows, dtype=torch.int64).pin_memory() for _ in range(2)]
        self._host_tables = [torch.zeros(rows * max_blocks, dtype=torch.int32).pin_memory() for _ in range(2)]
        self._turn = 0
        self._blank()
        self._shown = np.zeros((0, 0), np.int32)  # the tables that are on the device
        self._parts, self._are_uneven = parts, are_uneven
        self._graphs: dict[Key, list[Captured[Any]]] = {}  # replayed in turn; the last gives what was decoded
        self._begun: dict[Key, list[Captured[Any]]] = {}  # those of their first layers
        self._refused: set[Key] = set()
        self._failed_ahead: set[Key] = set()  # left to the step that meets them
        self._lacked_memory = False  # the last capture that failed
        self._woken: set[tuple[str, int]] = set()  # kv_dtype and tokens of a block
        self._met: Met[int] = Met(MOST_AHEAD)
        self._launched: set[int] = set()  # numbers of rows; other weights are woken for those there are then
        self._run_with: tuple[Pools, str, str] | None = None  # of the last step
        self.backend = "auto"  # `linear_backend` of the next one
        self._num_put_off = 0
        self.captures = Captures(device)

    def takes(self, packed: PackedBatch) -> bool:
        """Whether each token of the step gets its logits: rows of one token, and those with a draft."""
        num_tokens = len(packed.token_ids)
        if num_tokens != len(packed.last_tokens) or num_tokens > BUCKETS[-1]:
            return False
        return len(packed.contexts) == num_tokens or bool((packed.last_tokens == np.arange(num_tokens)).all())

    def replay(
        self, packed: PackedBatch, pools: Pools, weights: str, run: Run, drawn: Tensor
    ) -> Decoded | None:
        """Returns what the next replay may overwrite. Where `run` was not captured yet it is, now or behind the launch
        of this step; None where that failed. `drawn`: tokens of the last step."""
        num_rows = len(packed.token_ids)
        size = next(size for size in BUCKETS if size >= num_rows)
        in_use = pools, weights, self.backend
        self._met.add(size)
        if in_use != self._run_with:
            self._run_with, self._num_put_off = in_use, 0
        key = Key(size, *in_use)
        if self._are_uneven(packed.positions + 1, size):
            key = self._for_uneven(key, run)
        captured = self._graphs.get(key)
        if captured is None and key not in self._refused and self._is_known(key):
            self._capture_soon(key, run)
        elif captured is None:
            captured = self._try_to_capture(key, run)
            if captured is None:
                return None
        self._show(packed, key.num_rows)
        if packed.has_pending and drawn.data_ptr() != self._drawn_by:
            self._drawn[: len(drawn)].copy_(drawn)
        if captured is None:
            logits, drawn = self._completed(key, run)
            self._drawn_by = self.replayed_rows = None  # others may come to lie where this is
        else:
            for one in captured:
                one.graph.replay()
            logits, drawn = captured[-1].out
            self._drawn_by, self.replayed_rows = drawn.data_ptr(), key.num_rows
        return Decoded(logits[:num_rows], drawn[:, :num_rows])

    def prepare(
        self, num_rows: int, pools: Pools, weights: str, run: Run, only_largest: bool = False
    ) -> bool:
        """Captures the graphs of batches of up to `num_rows`, so that no step has to. The largest comes first, so that
        the others fit into its memory. False where one of them had no memory: the others are not tried then."""
        sizes = [size for at, size in enumerate(BUCKETS) if at == 0 or BUCKETS[at - 1] < num_rows]
        if not self._graphs and self._device.type == "cuda":
            self._compile(pools, weights, run)
        for size in sizes[-1:] if only_largest else sizes[::-1]:
            key = Key(size, pools, weights, self.backend)
            if key not in self._graphs and self._try_to_capture(key, run) is None and self._lacked_memory:
                return False
        if not only_largest:
            self.take_as_awake(pools.kv_dtype, pools.block_tokens)
        return True

    def capture_ahead(self, pools: Pools, weights: str, run: Run) -> bool:
        """Captures one graph that steps over these pools and by these weights will replay, if they are of the sizes
        that were met last. False where none is left that can be captured without a run."""
        left_out = self._graphs.keys() | self._refused | self._failed_ahead
        for size in self._met:
            key = Key(size, pools, weights, self.backend)
            if key in left_out or not self._is_known(key):
                continue
            try:
                self._capture(key, run)
            except RuntimeError as error:
                log.info("decode steps of %d rows are captured when they are met: %s", size, reason(error))
                self._failed_ahead.add(key)
            return True
        return False

    @property
    def launched_rows(self) -> Sequence[int]:
        """Numbers of rows for which all kernels but those over other pools have been launched."""
        return sorted(self._launched)

    def is_awake(self, kv_dtype: str, block_tokens: int) -> bool:
        """Whether steps over such pools have been computed, or what they launch over them has been launched."""
        return (kv_dtype, block_tokens) in self._woken

    def take_as_awake(self, kv_dtype: str, block_tokens: int) -> None:
        self._woken.add((kv_dtype, block_tokens))

    def forget(self, pools: int | None, weights: str | None) -> None:
        """Drops the graphs that read pools or weights which are about to go."""
        for graphs in (self._graphs, self._begun):
            for key in [key for key in graphs if key.pools.identity == pools or key.weights == weights]:
                self.captures.let_go(graphs.pop(key))
        self._refused, self._failed_ahead = (
            {key for key in keys if key.pools.identity != pools and key.weights != weights}
            for keys in (self._refused, self._failed_ahead)
        )
        self.captures.due = None
        self._drawn_by = None  # another graph may come to lie there
        self._run_with = None  # and others may come to be named so

    @torch.inference_mode()
    def _compile(self, pools: Pools, weights: str, run: Run) -> None:
        """What steps of all sizes launch, several kernels at once: 24 rows launch what 32 do, and `max_num_seqs` may
        rise while steps are served. Beside prompts tables are of int64."""
        self._blank()
        with compiled_ahead():
            for size in COMPILED_BUCKETS:
                inputs = self._inputs(Key(size, pools, weights))
                run(inputs)
                run(inputs._replace(tables=inputs.tables.long()))

    def _try_to_capture(self, key: Key, run: Run) -> list[Captured[Any]] | None:
        """None where it fails, now or before: such steps are launched kernel by kernel."""
        if key in self._refused:
            return None
        if self._is_known(key):
            try:
                return self._capture(key, run)
            except RuntimeError as error:
                log.info(
                    "decode steps of %d rows are run before they are captured: %s",
                    key.num_rows,
                    reason(error),
                )
        try:
            self._warm_up(key, run)
            return self._capture(key, run)
        except (
            RuntimeError
        ) as error:  # torch.OutOfMemoryError among them; a weight format that waits for the host
            self._lacked_memory = is_out_of_memory(error)
            log.warning(
                "decode steps of %d rows are not captured, so they take longer: %s",
                key.num_rows,
                reason(error),
            )
            self._refused.add(key)
            return None

    def _is_known(self, key: Key) -> bool:
        """Whether all that the step launches has been launched before: it is captured without a run."""
        return self.is_awake(key.pools.kv_dtype, key.pools.block_tokens) and key.num_rows in self._launched

    def _for_uneven(self, even: Key, run: Run) -> Key:
        """The graph that computes the step: the one for even contexts gives the same and takes longer, but does until
        the other is captured, and for good where it cannot be."""
        key = even._replace(are_uneven=True)
        if key in self._graphs or (even not in self._graphs and key not in self._refused):
            return key
        if key not in self._refused and self._is_known(key):
            self._capture_soon(key, run)
        return even

    def _capture_soon(self, key: Key, run: Run) -> None:
        """Some of it behind the launch of this step, which is computed otherwise: while the device does that. Not right
        behind a change of pools or weights: those who wait for the next step have just paid for that too."""
        if self._num_put_off < PUT_OFF:
            self._num_put_off += 1
        else:
            self.captures.due = partial(self._capture_next, key, run)

    def _completed(self, key: Key, run: Run) -> Midway | Decoded:
        """A step of which no or some parts are captured."""
        begun = self._begun.get(key, ())
        for one in begun:
            one.graph.replay()
        rest = range(self._parts[len(begun)].start, self._parts[-1].stop)
        return self._decoded(run, self._inputs(key), rest, begun[-1].out if begun else None)

    def _warm_up(self, key: Key, run: Run) -> None:
        self._drawn_by = None  # written to here too
        torch.cuda.synchronize(self._device)
        self._blank()
        self.captures.run_apart(partial(self._decoded, run, self._inputs(key)), WARM_UPS)
        self._launched.add(key.num_rows)

    def _capture(self, key: Key, run: Run) -> list[Captured[Any]]:
        """All of it as one."""
        self.captures.let_go(self._begun.pop(key, ()))
        return self._keep(key, [self.captures.capture(partial(self._decoded, run, self._inputs(key)))])

    def _capture_next(self, key: Key, run: Run) -> None:
        """The next part of it, which goes on from the tensors that the one before leaves in their common memory."""
        if key.are_uneven and not self.captures.has_spare_room():
            self._do_without(key, "there is no room")
            return
        begun = self._begun.setdefault(key, [])
        midway = begun[-1].out if begun else None
        step = partial(self._decoded, run, self._inputs(key), self._parts[len(begun)], midway)
        try:
            begun.append(self.captures.capture(step))
        except RuntimeError as error:
            if key.are_uneven:
                self._do_without(key, reason(error))
                return
            log.info("decode steps of %d rows are not captured by parts: %s", key.num_rows, reason(error))
            self._try_to_capture(key, run)
            return
        if len(begun) == len(self._parts):
            del self._begun[key]
            # What lies between two parts may be room for others from now on: one graph runs at a time.
            self._keep(key, [one._replace(out=None) for one in begun[:-1]] + begun[-1:])

    def _do_without(self, key: Key, why: str) -> None:
        """The graph for even contexts computes the step."""
        log.info("decode steps of %d rows of uneven contexts have no graph of their own: %s", key.num_rows, why)
        self.captures.let_go(self._begun.pop(key, ()))
        self._refused.add(key)

    def _keep(self, key: Key, captured: list[Captured[Any]]) -> list[Captured[Any]]:
        self._graphs[key] = captured
        seconds = sum(one.seconds for one in captured)
        log.info("captured decode steps of %d rows in %.3f s, as %d", key.num_rows, seconds, len(captured))
        return captured

    def _decoded(
        self, run: Run, inputs: DecodeInputs, part: range | None = None, midway: Midway | None = None
    ) -> Midway | Decoded:
        """What a graph does. What it draws, the next step finds without the host."""
        out = run(inputs, part, midway)
        if isinstance(out, Decoded):
            self._drawn[: len(inputs.token_ids)].copy_(out.drawn[0])
        return out

    def _inputs(self, key: Key) -> DecodeInputs:
        token_ids, positions, slots, contexts = self._scalars[:, : key.num_rows]
        tables = self._tables[: key.num_rows]
        return DecodeInputs(token_ids, positions, slots, contexts, tables, self._drawn, key.are_uneven)

    def _blank(self) -> None:
        """All rows are padding."""
        self._scalars.zero_()
        self._scalars[2] = -1

    def _show(self, packed: PackedBatch, num_rows: int) -> None:
        """Writes the batch where the graph reads it, behind what the device is doing."""
        self._turn = 1 - self._turn
        pinned = self._host_scalars[self._turn]
        count, host = len(packed.token_ids), pinned.numpy()
        host[0, :count], host[1, :count] = packed.token_ids, packed.positions
        host[2, :count], host[3, :count] = packed.slots, packed.positions + 1
        host[:, count:num_rows] = 0  # also their tokens: one of a former step may be no token but a place
        host[2, count:num_rows] = -1
        self._scalars.copy_(pinned, non_blocking=True)
        tables = packed.block_tables
        if len(tables) != count:
            tables = np.repeat(tables, np.diff(packed.row_starts), axis=0)
        if self._shown.shape != tables.shape or not np.array_equal(self._shown, tables):
            pinned = self._host_tables[self._turn]
            pinned.numpy()[: tables.size] = tables.ravel()
            shown = pinned[: tables.size].view(tables.shape)
            self._tables[:count, : tables.shape[1]].copy_(shown, non_blocking=True)
            self._shown = tables.copy()


def padding(num_rows: int, max_blocks: int, device: torch.device) -> DecodeInputs:
    """Rows that write nothing and read nothing, laid out as those of a graph."""
    token_ids, positions, slots, contexts = torch.zeros(4, BUCKETS[-1], dtype=torch.int64, device=device)[
        :, :num_rows
    ]
    tables = torch.zeros(BUCKETS[-1], max_blocks, dtype=torch.int32, device=device)[:num_rows]
    drawn = torch.zeros(MAX_DRAWN, dtype=torch.int64, device=device)
    return DecodeInputs(token_ids, positions, slots.fill_(-1), contexts, tables, drawn)
