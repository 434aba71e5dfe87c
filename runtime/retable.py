"""The tokens of running requests in another pool of blocks: who lies where, and what must be copied. No torch.

Blocks of both pools are whole multiples of one another. Over the same tensors (`stays`) a larger block falls apart into
smaller ones where it lies, so nothing is copied; smaller ones that lie as a larger one would stay, the others move.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.kv_cache import BlockIds, BlockPool

IntArray = NDArray[np.int64]


class BlockMove(NamedTuple):
    """Blocks whose keys and values go from `sources` to `targets`. A target may be an earlier source, never a later
    one, so that copying in this order is right."""

    sources: BlockIds
    targets: BlockIds


class Retabled(NamedTuple):
    """`tables`: of each request, in the new pool. `move`: in blocks of `block_tokens`, the smaller ones of both pools;
    within one pool (`stays`) everything must be read before anything is written."""

    tables: list[BlockIds]
    move: BlockMove
    block_tokens: int


class WantedBlocks(NamedTuple):
    """The blocks of the new pool that requests need, one request behind the other.

    `edges`: [requests + 1], where those of each begin. Of each: `key`, equal where it is shared; `units`: [pieces,
    units], the smaller blocks that it is made from, -1 behind the last; `home`: where it lies already, over the same
    tensors, else -1.
    """

    edges: IntArray
    key: IntArray
    units: IntArray
    home: IntArray

    @classmethod
    def of(
        cls, tables: Sequence[BlockIds], num_tokens: Sequence[int], old: BlockPool, new: BlockPool
    ) -> "WantedBlocks":
        """What each table of the old pool becomes; `num_tokens` of each request must have room. A block that is shared
        but not full would be written to by both, so only whole ones have a key in common."""
        lengths = np.array([len(table) for table in tables], np.int64)
        blocks = np.concatenate([np.empty(0, np.int64), *tables]).astype(np.int64)
        if old.block_tokens >= new.block_tokens:
            split = old.block_tokens // new.block_tokens
            units = (blocks[:, None] * split + np.arange(split)).ravel()
            needed = np.maximum(1, -(-np.asarray(num_tokens, np.int64) // new.block_tokens))
            is_kept = _place_in_row(split * lengths) < np.repeat(needed, split * lengths)
            units = units[is_kept]
            return cls(_edges(np.minimum(split * lengths, needed)), units, units[:, None], units)
        joined = new.block_tokens // old.block_tokens
        counts = -(-lengths // joined)
        edges = _edges(counts)
        units = np.full((edges[-1], joined), -1)
        place = _place_in_row(lengths)
        units[np.repeat(edges[:-1], lengths) + place // joined, place % joined] = blocks
        first, is_whole = units[:, 0], units[:, -1] >= 0
        follows = (units == first[:, None] + np.arange(joined)) | (units < 0)
        lies_so = (first % joined == 0) & follows.all(1) & (first // joined < new.num_blocks)
        key = np.arange(len(units))
        if len(np.unique(first[is_whole])) < is_whole.sum():  # some may be shared
            _, first_of, same = np.unique(units[is_whole], axis=0, return_index=True, return_inverse=True)
            key[is_whole] = key[is_whole][first_of][same.ravel()]
        return cls(edges, key, units, np.where(lies_so, first // joined, -1))

    def num_fitting(self, num_blocks: int) -> int:
        """How many of the first requests fit into so many blocks."""
        is_new = np.zeros(len(self.key) + 1, np.int64)
        is_new[1 + np.unique(self.key, return_index=True)[1]] = 1
        return int((np.cumsum(is_new)[self.edges[1:]] <= num_blocks).sum())

    def of_first(self, num_requests: int) -> "WantedBlocks":
        end = self.edges[num_requests]
        return WantedBlocks(self.edges[: num_requests + 1], self.key[:end], self.units[:end], self.home[:end])


def retabled(pieces: WantedBlocks, old: BlockPool, new: BlockPool, stays: bool) -> Retabled:
    """Gives all pieces blocks of the new pool, which nobody else holds yet."""
    _, first, of_piece = np.unique(pieces.key, return_index=True, return_inverse=True)
    target = np.full(len(first), -1)
    if stays:  # the first of those that want a place has it
        home = pieces.home[first]
        by_age = np.argsort(first)
        by_age = by_age[home[by_age] >= 0]
        taken, at = np.unique(home[by_age], return_index=True)
        new.claim(taken)
        target[by_age[at]] = taken
    is_first = np.zeros(len(pieces.key), np.bool_)
    is_first[first] = True
    is_missing = is_first & (target[of_piece] < 0)
    # Where runs of blocks matter, each request has its own.
    edges = pieces.edges if new.wants_runs else pieces.edges[[0, -1]]
    for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        missing = of_piece[start:end][is_missing[start:end]]
        if len(missing):
            target[missing] = new.allocate(len(missing))
    new.share(target[of_piece[~is_first]].tolist())
    blocks = target[of_piece]
    joined = max(1, new.block_tokens // old.block_tokens)
    sources, targets = (
        pieces.units.ravel(),
        (blocks[:, None] * joined + np.arange(pieces.units.shape[1])).ravel(),
    )
    is_moved = (sources >= 0) & ((sources != targets) | (not stays))
    sources, targets = sources[is_moved], targets[is_moved]
    # One that is shared may go to several, where what follows it differs; and what several share goes once.
    once = np.sort(np.unique(sources << 32 | targets, return_index=True)[1])
    move = BlockMove(sources[once].astype(np.int32), targets[once].astype(np.int32))
    ends = zip(pieces.edges[:-1].tolist(), pieces.edges[1:].tolist(), strict=True)
    tables = [blocks[start:end].astype(np.int32) for start, end in ends]
    return Retabled(tables, move, min(old.block_tokens, new.block_tokens))


def _edges(counts: IntArray) -> IntArray:
    return np.concatenate(([0], np.cumsum(counts)))


def _place_in_row(lengths: IntArray) -> IntArray:
    """0, 1, .. of rows of these lengths, one behind the other."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
