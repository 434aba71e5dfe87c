"""The tokens of running requests in another pool of blocks: who lies where, and what must be copied. No torch.

Blocks of both pools are whole multiples of one another. Over the same tensors (`stays`) a larger block falls apart into
smaller ones where it lies, so nothing is copied; smaller ones that lie as a larger one would stay, the others move.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from runtime.kv_cache import BlockIds, BlockPool


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


class Piece(NamedTuple):
    """One block of the new pool. `key`: equal for those who share it. `units`: the smaller blocks that it is made from.
    `home`: where it lies already, over the same tensors."""

    key: Hashable
    units: tuple[int, ...]
    home: int | None


def pieces_of(
    owner: int, table: Sequence[int], num_tokens: int, old: BlockPool, new: BlockPool
) -> list[Piece]:
    """What the table of request `owner` becomes; `num_tokens` must have room. A block that is shared but not full would
    be written to by both, so only whole ones have a key in common."""
    if old.block_tokens >= new.block_tokens:
        split = old.block_tokens // new.block_tokens
        units = [block * split + part for block in table for part in range(split)]
        return [Piece(unit, (unit,), unit) for unit in units[: max(1, new.blocks_for(num_tokens))]]
    joined, pieces = new.block_tokens // old.block_tokens, []
    for start in range(0, len(table), joined):
        units_here = tuple(table[start : start + joined])
        at = units_here[0]
        lies_so = at % joined == 0 and units_here == tuple(range(at, at + len(units_here)))
        home = at // joined if lies_so and at // joined < new.num_blocks else None
        key = units_here if len(units_here) == joined else (owner, start, None)
        pieces.append(Piece(key, units_here, home))
    return pieces


def num_fitting(pieces: Sequence[Sequence[Piece]], num_blocks: int) -> int:
    """How many of the first requests fit into so many blocks."""
    keys: set[Hashable] = set()
    for index, of_one in enumerate(pieces):
        keys.update(piece.key for piece in of_one)
        if len(keys) > num_blocks:
            return index
    return len(pieces)


def retabled(pieces: Sequence[Sequence[Piece]], old: BlockPool, new: BlockPool, stays: bool) -> Retabled:
    """Gives all pieces blocks of the new pool, which nobody else holds yet."""
    target_of: dict[Hashable, int] = {}
    if stays:
        for piece in (piece for of_one in pieces for piece in of_one):
            if piece.home is not None and piece.key not in target_of and new.claim(piece.home):
                target_of[piece.key] = piece.home
    tables, is_held = [], set(target_of)  # by their first holder, who does not count again
    for of_one in pieces:
        known = [piece.key for piece in of_one if piece.key in target_of]
        new.share([target_of[key] for key in known if key not in is_held])
        is_held.difference_update(known)
        missing = [piece.key for piece in of_one if piece.key not in target_of]
        target_of |= zip(missing, new.allocate(len(missing)).tolist(), strict=True)
        tables.append(np.array([target_of[piece.key] for piece in of_one], np.int32))
    joined = max(1, new.block_tokens // old.block_tokens)
    moves = {  # one that is shared may go to several, where what follows it differs
        (unit, target_of[piece.key] * joined + part): None
        for of_one in pieces
        for piece in of_one
        for part, unit in enumerate(piece.units)
    }
    moved = [pair for pair in moves if not stays or pair[0] != pair[1]]
    sources, targets = np.array(moved, np.int32).reshape(-1, 2).T
    return Retabled(tables, BlockMove(sources, targets), min(old.block_tokens, new.block_tokens))
