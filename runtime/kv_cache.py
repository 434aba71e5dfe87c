"""Who holds which blocks of the KV pool. The tensors themselves belong to the executor.

A sequence's blocks may lie anywhere, but the pool prefers consecutive ones: then its keys and values are
one slice of the pool, which the CPU path attends over without copying.

    free ──allocate──▶ held by one or several ──free──▶ free, or idle where the prefix index knows the block
                          ▲────────share────────────────────────────┤
                                                       free ◀──evict─┘  when free blocks run out
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.prefix_cache import PrefixIndex

BLOCK_TOKENS = 16  # of the smallest block; pools are whole multiples of it
# Consecutive blocks are worth some cached ones, but not all: at most this many times the blocks asked for.
EVICTED_FOR_A_RUN = 4
BlockIds = NDArray[np.int32]
_NONE: frozenset[int] = frozenset()


class BlockPool:
    """`num_blocks` blocks of `block_tokens` tokens each: every one is free, held, or idle (cached, held by nobody).

    `wants_runs`: consecutive blocks matter more than sharing, so that a known prefix is copied to them.
    """

    def __init__(
        self, num_blocks: int, block_tokens: int = BLOCK_TOKENS, wants_runs: bool = True,
        index: PrefixIndex | None = None,
    ) -> None:  # fmt: skip
        if num_blocks < 1 or block_tokens < 1:
            raise ValueError(
                f"A block pool must have at least 1 block of at least 1 token, but got {num_blocks} of {block_tokens}."
            )
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.wants_runs = wants_runs
        self.num_free = num_blocks  # blocks that can be handed out, the idle ones among them
        self.index = PrefixIndex() if index is None else index
        self._free = np.ones(num_blocks, dtype=np.bool_)  # neither held nor idle
        self._holders = np.zeros(num_blocks, dtype=np.int32)

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_tokens

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    def allocate(self, num_blocks: int, avoid: frozenset[int] = _NONE) -> BlockIds:
        """Blocks for a new sequence: consecutive if some free run is long enough. The caller checks `num_free`.

        Idle blocks give way, the longest unused first; those in `avoid` never do.
        """
        idle_kept = sum(self.index.is_idle(block) for block in avoid)
        if num_blocks > self.num_free - idle_kept:
            raise ValueError(
                f"The pool has {self.num_free - idle_kept} free blocks, but {num_blocks} were asked for."
            )
        start = self._make_room(num_blocks, avoid)
        if start is None:
            blocks = np.flatnonzero(self._free)[:num_blocks].astype(np.int32)
        else:
            blocks = np.arange(start, start + num_blocks, dtype=np.int32)
        self._hold(blocks)
        return blocks

    def extend(self, last_block: int) -> int:
        """One more block for the sequence that ends with `last_block`: the next one if it can be had. What is cached
        there gives way for a run of blocks, unless it was used lately."""
        follower = last_block + 1
        is_near = follower < self.num_blocks and not self._holders[follower]
        if is_near and (self._free[follower] or (self.wants_runs and self.index.is_stale(follower))):
            self._evict(follower)
            self._hold(np.array([follower], np.int32))
            return follower
        return int(self.allocate(1)[0])

    def claim(self, blocks: NDArray[np.integer]) -> None:
        """Holds these very blocks, each named once, which must be free."""
        if not self._free[blocks].all():
            raise ValueError(f"Blocks {blocks[~self._free[blocks]].tolist()} are not free.")
        self._hold(blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """One more holder for blocks that are held or idle."""
        for block in blocks:
            if not self._holders[block]:
                if self._free[block]:
                    raise ValueError(f"Block {block} is free, so there is nothing in it to share.")
                self.index.wake(block)
                self.num_free -= 1
            self._holders[block] += 1

    def free(self, blocks: BlockIds) -> None:
        """One holder less. What nobody holds any more is idle where the index knows it, else free."""
        if not self._holders[blocks].all():
            raise ValueError(f"Blocks {blocks[self._holders[blocks] == 0].tolist()} are free already.")
        self._holders[blocks] -= 1
        left = blocks[self._holders[blocks] == 0]
        self.num_free += len(left)
        if not len(self.index):
            self._free[left] = True
            return
        for block in left[::-1].tolist():  # the end of a chain is the first to be evicted
            self._free[block] = not self.index.rest(block)

    def register(self, block: int, key: bytes) -> None:
        """The held block is full and computed: from now on others may find it under `key`."""
        self.index.add(block, key)

    def resized(self, num_slots: int, block_tokens: int) -> "BlockPool":
        """An empty pool to take this one's place, of as many blocks as fit, for which the same keys mean the same."""
        index = PrefixIndex(self.index.salt)
        return BlockPool(num_slots // block_tokens, block_tokens, self.wants_runs, index)

    def forget_prefixes(self) -> None:
        """Idle blocks become free, and no held block can be found any more."""
        for block in self.index.idle_blocks():
            self._free[block] = True
        self.index = PrefixIndex(self.index.salt)

    def check_integrity(self, tables: Iterable[BlockIds]) -> None:
        """Raises AssertionError unless each block is held as often as `tables` name it, and free or idle if not."""
        held = np.concatenate([np.empty(0, np.int32), *tables])
        counts = np.bincount(held, minlength=self.num_blocks)
        assert (counts == self._holders).all(), "a block is held by nobody, or by more than are counted"
        assert self.num_free == int((self._holders == 0).sum()), "the count of free blocks is wrong"
        idle = np.zeros(self.num_blocks, np.bool_)
        idle[self.index.idle_blocks()] = True
        assert not (idle & (self._holders > 0)).any(), "an idle block is held"
        assert ((self._holders == 0) == (self._free | idle)).all(), (
            "a block is neither free nor idle nor held"
        )
        assert not (self._free & idle).any(), "a block is both free and idle"

    def _hold(self, blocks: NDArray[np.integer]) -> None:
        self._free[blocks] = False
        self._holders[blocks] = 1
        self.num_free -= len(blocks)

    def _evict(self, block: int) -> None:
        self.index.forget(block)
        self._free[block] = True

    def _make_room(self, num_blocks: int, avoid: frozenset[int]) -> int | None:
        """Evicts until `num_blocks` are free, in a run if that is to be had; where the run starts."""
        num_evicted, start = 0, self._place(num_blocks)
        while start is None:
            is_short = int(self._free.sum()) < num_blocks
            if not is_short and (not self.wants_runs or num_evicted >= EVICTED_FOR_A_RUN * num_blocks):
                return None
            oldest = self.index.oldest(avoid)
            if oldest is None:
                return None
            self._evict(oldest)
            num_evicted += 1
            if num_evicted % 8 == 0 or is_short or not self.index.num_idle:
                start = self._place(num_blocks)
        return start

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
