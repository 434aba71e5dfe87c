"""Who holds which blocks of the KV pool. The tensors themselves belong to the executor.

A sequence's blocks may lie anywhere, but the pool prefers consecutive ones: then its keys and values are
one slice of the pool, which the CPU path attends over without copying.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

BLOCK_TOKENS = 16
BlockIds = NDArray[np.int32]


class BlockPool:
    """`num_blocks` blocks of `block_tokens` tokens each, every one either free or held."""

    def __init__(self, num_blocks: int, block_tokens: int = BLOCK_TOKENS) -> None:
        if num_blocks < 1 or block_tokens < 1:
            raise ValueError(
                f"A block pool must have at least 1 block of at least 1 token, but got {num_blocks} of {block_tokens}."
            )
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.num_free = num_blocks
        self._free = np.ones(num_blocks, dtype=np.bool_)

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_tokens

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    def allocate(self, num_blocks: int) -> BlockIds:
        """Blocks for a new sequence: consecutive if some free run is long enough. The caller checks `num_free`."""
        if num_blocks > self.num_free:
            raise ValueError(f"The pool has {self.num_free} free blocks, but {num_blocks} were asked for.")
        start = self._place(num_blocks)
        if start is None:
            blocks = np.flatnonzero(self._free)[:num_blocks].astype(np.int32)
        else:
            blocks = np.arange(start, start + num_blocks, dtype=np.int32)
        self._free[blocks] = False
        self.num_free -= num_blocks
        return blocks

    def extend(self, last_block: int) -> int:
        """One more block for the sequence that ends with `last_block`: the next one if it is free."""
        follower = last_block + 1
        if follower < self.num_blocks and self._free[follower]:
            self._free[follower] = False
            self.num_free -= 1
            return follower
        return int(self.allocate(1)[0])

    def free(self, blocks: BlockIds) -> None:
        if self._free[blocks].any():
            raise ValueError(f"Blocks {blocks[self._free[blocks]].tolist()} are free already.")
        self._free[blocks] = True
        self.num_free += len(blocks)

    def check_integrity(self, tables: Iterable[BlockIds]) -> None:
        """Raises AssertionError unless the held blocks are exactly those in `tables`, each in one table once."""
        held = np.concatenate([np.empty(0, np.int32), *tables])
        assert len(held) == len(np.unique(held)), "a block is held twice"
        assert self.num_free == int(self._free.sum()), "the count of free blocks is wrong"
        assert len(held) == self.num_held and not self._free[held].any(), "a block is held by nobody"

    def _place(self, num_blocks: int) -> int | None:
        """Where a new sequence starts: in the longest free run, halfway, so that the sequence before that
        run keeps room to grow as well. None if no run is long enough.
        """
        padded = np.concatenate(([False], self._free, [False]))
        starts, ends = np.flatnonzero(padded[1:] != padded[:-1]).reshape(-1, 2).T
        if not len(starts) or (lengths := ends - starts).max() < num_blocks:
            return None
        longest = int(lengths.argmax())
        start, room = int(starts[longest]), int(lengths[longest])
        return start if start == 0 else start + min(room // 2, room - num_blocks)
