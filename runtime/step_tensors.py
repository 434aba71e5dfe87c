"""One step on the device: its tokens, where they are written, and in which form each row is attended to.

What is equal for all layers (slots, masks, indices) is prepared here, once a step. How it is used: `runtime.attention`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.batch import PackedBatch
from runtime.transfer import sent

# On a CPU one padded call beats a call a row only for several short rows. Measured on one Zen core, 16 rows, six
# layers of 2 KV heads of 64, the whole step in ms, a call a row against padded: 15.1 / 12.5 at 130 to 195 tokens,
# 16.6 / 16.3 at 230 to 295, 15.0 / 16.5 at 400 to 465.
PADDED_MIN_ROWS_CPU = 6
PADDED_MAX_CONTEXT_CPU = 256
# Where a token's keys and values lie in one piece, as in tier A, gathering them is cheap, and rows of like contexts are
# padded together. Measured on two Zen cores, us a row and layer of 2 KV heads of 64, a call a row against 8 rows
# padded: 23 / 9 at 64 tokens, 29 / 17 at 256, 39 / 33 at 512, 50 / 43 at 768; with keys and values apart 20 / 27,
# 26 / 82, 32 / 159 and 41 / 227. 32 rows of 1,024 tokens are too many for the caches beside it: 113 / 557.
LIKE_MIN_ROWS = 3  # of a group, on average
LIKE_MAX_CONTEXT = 768
LIKE_SPAN = 96  # tokens from the shortest to the longest context
LIKE_MAX_TOKENS = 4096  # padded, of one group
# Padding copies keys and values: a group of rows is closed at this many padded tokens.
PADDED_MAX_TOKENS = 131_072
PADDED_TO = 16  # tokens


def allowed_positions(num_new: int, context: int, window: int | None, device: torch.device) -> Tensor:
    """bool [num_new, context]: which cached tokens each of the last `num_new` tokens attends to."""
    at = torch.arange(context - num_new, context, device=device)[:, None]
    other = torch.arange(context, device=device)[None]
    allowed = other <= at
    return allowed if window is None else allowed & (other > at - window)


@dataclass(slots=True)
class Row:
    """One row of a step. `place`: its slots, as a slice of the pool where its blocks are consecutive."""

    first: int
    last: int  # tokens [first, last) of the packed step
    context: int
    place: slice | Tensor
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    @property
    def num_new(self) -> int:
        return self.last - self.first

    def allowed(self, window: int | None, device: torch.device) -> Tensor:
        if window not in self.masks:
            self.masks[window] = allowed_positions(self.num_new, self.context, window, device)
        return self.masks[window]


@dataclass(slots=True)
class PaddedRows:
    """Decode rows [first, last) attended to in one call. `index`: [rows * longest] slots, padded with the
    row's own first slot, so that nothing of another request is ever read."""

    first: int
    last: int
    index: Tensor
    contexts: Tensor  # [rows]
    longest: int
    biases: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)

    def bias(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """[rows, 1, 1, longest]: 0 where attended, -inf elsewhere."""
        if (window, dtype) not in self.biases:
            column = torch.arange(self.longest, device=self.contexts.device)[None]
            hidden = column >= self.contexts[:, None]
            if window is not None:
                hidden |= column < self.contexts[:, None] - window
            bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(
                hidden, float("-inf")
            )
            self.biases[window, dtype] = bias[:, None, None]
        return self.biases[window, dtype]


@dataclass(slots=True)
class StepTensors:
    """One step on the device: its tokens, where they are written, and how each row is attended to."""

    token_ids: Tensor  # [1, T]
    positions: Tensor  # [1, T]
    slots: Tensor  # [T]
    last_tokens: Tensor  # [sampled rows + scored tokens]
    last_rows: Tensor  # the row of each
    padded: list[PaddedRows]
    rows: list[Row]  # those that are not padded, in order
    has_single_rows: bool  # whether `rows` has any of a single token
    longest: int  # context of any row
    contexts: Tensor  # [all rows]
    tables: Tensor  # [all rows, blocks]
    num_apart: int  # leading rows of one token that a kernel attends to
    pieces: "Pieces | None"  # the other rows, where they are attended to in one call
    are_uneven: bool = False  # the contexts of those apart, as `kernels.splits` says

    @classmethod
    def of(
        cls,
        packed: PackedBatch,
        device: torch.device,
        has_kernel: bool = False,
        packs_pieces: bool = False,
        pads_like: bool = False,
    ) -> "StepTensors":
        """Moves the step to the device in a single copy and decides the form of attention of each row.

        `has_kernel`: rows of one token are attended to by a kernel that reads `contexts` and `tables`; they are neither
        among `padded` nor `rows`. `packs_pieces`: the others are `pieces`. `pads_like`: on a CPU, rows of like contexts
        are padded together.
        """
        tables = packed.block_tables.astype(np.int64)
        last_rows = np.searchsorted(packed.row_starts, packed.last_tokens, side="right") - 1
        parts = (
            packed.token_ids,
            packed.positions,
            packed.slots,
            packed.last_tokens,
            last_rows,
            packed.contexts,
            tables.ravel(),
        )
        token_ids, positions, slots, last_tokens, last_rows, contexts, blocks = _moved(parts, device)
        blocks = blocks.view(tables.shape)
        groups = [] if has_kernel else _padded_groups(packed, device, pads_like)
        num_apart = num_single_rows(packed) if has_kernel else groups[-1][1] if groups else 0
        padded = [
            _padded_rows(first, last, blocks[first:last], contexts[first:last], packed)
            for first, last in groups
        ]
        pieces = Pieces.of(packed, num_apart, device) if packs_pieces else None
        rows = [] if packs_pieces else _rows(packed, num_apart, blocks)
        has_single_rows = bool(rows) and rows[0].num_new == 1  # they come first
        longest = int(packed.contexts.max())
        return cls(
            token_ids[None], positions[None], slots, last_tokens, last_rows, padded, rows, has_single_rows, longest,
            contexts, blocks, num_apart if has_kernel else 0, pieces,
        )  # fmt: skip


class Pieces:
    """Pieces of prompts one behind the other, as a call over rows of all lengths takes them.

    `first`, `first_row`: token and row of the step at which they begin; `new_edges`, `context_edges`: int32 [rows + 1],
    where each begins among the new tokens and among the cached ones; `new_tokens`, `contexts`: [rows], on the host.
    """

    def __init__(self, packed: PackedBatch, first_row: int, device: torch.device) -> None:
        self.first_row, self.first = first_row, int(packed.row_starts[first_row])
        self.contexts = packed.contexts[first_row:]
        self.new_tokens = np.diff(packed.row_starts[first_row:])
        new_edges = packed.row_starts[first_row:] - self.first
        context_edges = np.concatenate(([0], np.cumsum(self.contexts)))
        self.new_edges, self.context_edges = sent(
            np.stack((new_edges, context_edges)).astype(np.int32), device
        )
        self.max_new, self.max_context = int(self.new_tokens.max()), int(self.contexts.max())
        self._packed, self._device = packed, device

    @classmethod
    def of(cls, packed: PackedBatch, start: int, device: torch.device) -> "Pieces | None":
        """Those from row `start` on; None where there are none."""
        return cls(packed, start, device) if start < len(packed.contexts) else None

    @cached_property
    def slots(self) -> Tensor | None:
        """int64, of all cached tokens, row after row; None where nothing was cached before, so that the step itself
        holds all keys and values."""
        packed, contexts, size = self._packed, self.contexts, self._packed.block_tokens
        if (contexts == self.new_tokens).all():
            return None
        before = np.cumsum(contexts) - contexts
        at = np.arange(contexts.sum()) - np.repeat(before, contexts)
        owners = np.repeat(np.arange(self.first_row, self.first_row + len(contexts)), contexts)
        blocks = packed.block_tables[owners, at // size].astype(np.int64)
        return sent(blocks * size + at % size, self._device)


def _moved(parts: Sequence[NDArray[np.int64]], device: torch.device) -> list[Tensor]:
    """All of them in one copy. Each begins where 16 bytes do: kernels are compiled anew for pointers that do not, and
    where a part begins would change from step to step."""
    edges = np.cumsum([0, *(part.size + part.size % 2 for part in parts)])
    flat = np.zeros(edges[-1], np.int64)
    for part, start in zip(parts, edges[:-1], strict=True):
        flat[start : start + part.size] = part
    whole = sent(flat, device)
    return [whole[start : start + part.size] for part, start in zip(parts, edges[:-1].tolist(), strict=True)]


def num_single_rows(packed: PackedBatch) -> int:
    """Rows of one token; they come first."""
    return int((np.diff(packed.row_starts) == 1).sum())


def _padded_groups(packed: PackedBatch, device: torch.device, pads_like: bool) -> list[tuple[int, int]]:
    """The leading rows (those of one token) that are attended to padded, in groups [first, last)."""
    contexts = packed.contexts[: num_single_rows(packed)]
    if device.type != "cpu":
        return _groups(contexts, PADDED_MAX_TOKENS)
    if pads_like:
        return like_groups(contexts)
    if len(contexts) < PADDED_MIN_ROWS_CPU or contexts.max() > PADDED_MAX_CONTEXT_CPU:
        return []
    return _groups(contexts, PADDED_MAX_TOKENS)


def _groups(contexts: NDArray[np.int64], most_tokens: int, span: int | None = None) -> list[tuple[int, int]]:
    """All rows, one group behind the other, each as large as `most_tokens` of it, padded, and `span`, from its shortest
    to its longest context, allow."""
    groups, first = [], 0
    while first < len(contexts):
        longest = np.maximum.accumulate(contexts[first:])
        fits = longest * np.arange(1, len(longest) + 1) <= most_tokens
        if span is not None:
            fits &= longest - np.minimum.accumulate(contexts[first:]) <= span
        last = first + max(1, int(fits.sum()))
        groups.append((first, last))
        first = last
    return groups


def like_groups(contexts: NDArray[np.int64]) -> list[tuple[int, int]]:
    """contexts: of rows of one token each. Returns the leading rows that are short enough, in groups [first, last);
    none where they are so unlike that groups would be too small."""
    too_long = contexts > LIKE_MAX_CONTEXT
    num_rows = int(too_long.argmax()) if too_long.any() else len(contexts)
    groups = _groups(contexts[:num_rows], LIKE_MAX_TOKENS, LIKE_SPAN)
    return groups if num_rows >= LIKE_MIN_ROWS * len(groups) else []


def _padded_rows(first: int, last: int, blocks: Tensor, contexts: Tensor, packed: PackedBatch) -> PaddedRows:
    size = packed.block_tokens
    context = int(packed.contexts[first:last].max())
    longest = -(-context // PADDED_TO) * PADDED_TO  # a large block is not padded to its end
    slots = _slots(blocks[:, : -(-context // size)], size)[:, :longest]
    longest = slots.shape[1]
    beyond = torch.arange(longest, device=slots.device)[None] >= contexts[:, None]
    index = torch.where(beyond, slots[:, :1], slots)
    return PaddedRows(first, last, index.reshape(-1), contexts, longest)


def _slots(blocks: Tensor, block_tokens: int) -> Tensor:
    """blocks: [rows, blocks]. Returns [rows, blocks * block_tokens]."""
    within = torch.arange(block_tokens, device=blocks.device)
    return (blocks[:, :, None] * block_tokens + within).flatten(1)


def _rows(packed: PackedBatch, start: int, blocks: Tensor) -> list[Row]:
    size, tables = packed.block_tokens, packed.block_tables[start:]
    num_blocks = -(-packed.contexts[start:] // size)
    broken = (np.diff(tables, axis=1) != 1) & (np.arange(1, tables.shape[1])[None] < num_blocks[:, None])
    consecutive = (~broken.any(axis=1)).tolist()
    firsts, contexts = (tables[:, 0] * size).tolist(), packed.contexts[start:].tolist()
    edges, counts = packed.row_starts[start:].tolist(), num_blocks.tolist()
    rows = []
    for i, context in enumerate(contexts):
        place: slice | Tensor = slice(firsts[i], firsts[i] + context)
        if not consecutive[i]:
            place = _slots(blocks[start + i : start + i + 1, : counts[i]], size)[0, :context]
        rows.append(Row(edges[i], edges[i + 1], context, place))
    return rows
