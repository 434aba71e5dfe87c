"""Which full blocks hold which beginnings of texts, so that a request that begins alike need not compute them.

A block is known by a chain: SHA-256 of its parent's key and its own token ids. The chain's root is a random
salt of this boot, a namespace, and the salt that a request may bring: nobody outside can aim at a key, and what
other weights or requests of another salt computed is never found. Blocks that nobody holds stay here, least
recently used first, until their memory is wanted.
"""

import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

SALT_BYTES = 32
HASHED_AHEAD = 16  # blocks: a look that misses at once costs as many hashes, some 10 us


class PrefixIndex:
    """Keys and blocks of one pool. The pool says who holds a block; the index only names them."""

    def __init__(self, salt: bytes | None = None) -> None:
        self.salt = secrets.token_bytes(SALT_BYTES) if salt is None else salt
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, int] = (
            OrderedDict()
        )  # registered and held by nobody -> use; oldest first
        self._num_uses = 0

    def __len__(self) -> int:
        return len(self._key_of)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    def root(self, namespace: str, tenant: str | None = None) -> bytes:
        """Where a chain begins. `tenant`: the salt of its requests; those without one share theirs."""
        # Behind our secret, never behind a key: a tenant could else name the bytes of somebody's first block.
        own = "" if tenant is None else f"\0{tenant}"
        return hashlib.sha256(self.salt + (namespace + own).encode()).digest()

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known beginning of this chain."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def key_of(self, block: int) -> bytes | None:
        return self._key_of.get(block)

    def add(self, block: int, key: bytes) -> bool:
        """Names a held block. False where another block has the key already: one copy is enough."""
        if key in self._block_of or block in self._key_of:
            return False
        self._block_of[key], self._key_of[block] = block, key
        return True

    def rest(self, block: int) -> bool:
        """Nobody holds the block any more. True if it stays known, as the most recently used one."""
        if block not in self._key_of:
            return False
        self._use(block)
        return True

    def wake(self, block: int) -> None:
        self._idle.pop(block, None)

    def touch(self, blocks: Sequence[int]) -> None:
        """The chain was used. Its end becomes older than its beginning, without which it is worth nothing."""
        for block in reversed(blocks):
            if block in self._idle:
                self._use(block)

    def is_stale(self, block: int) -> bool:
        """Idle, and about half of the idle blocks were used since."""
        used = self._idle.get(block)
        return used is not None and 2 * (self._num_uses - used) >= len(self._idle)

    def is_idle(self, block: int) -> bool:
        return block in self._idle

    def idle_blocks(self) -> list[int]:
        return list(self._idle)

    def oldest(self, avoid: frozenset[int]) -> int | None:
        return next((block for block in self._idle if block not in avoid), None)

    def _use(self, block: int) -> None:
        self._num_uses += 1
        self._idle[block] = self._num_uses
        self._idle.move_to_end(block)

    def forget(self, block: int) -> None:
        self._idle.pop(block, None)
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]


@dataclass(slots=True)
class KnownPrefix:
    """The keys of a request's full blocks as far as they were needed, and the weights under which it began."""

    root: bytes
    epoch: int
    keys: list[bytes] = field(default_factory=list)

    def find(
        self, index: PrefixIndex, token_ids: NDArray[np.int32], block_tokens: int, num_blocks: int
    ) -> list[int]:
        """The known blocks among the first `num_blocks`. Keys are kept for the next look, and hashed a few ahead:
        far fewer than all of a prompt that is not known."""
        found = index.find(self.keys[:num_blocks])
        while len(found) == len(self.keys) < num_blocks:
            extended(
                self.root, self.keys, token_ids, block_tokens, min(num_blocks, len(found) + HASHED_AHEAD)
            )
            found += index.find(self.keys[len(found) :])
        return found


def chain(root: bytes, token_ids: NDArray[np.int32], block_tokens: int, num_blocks: int) -> list[bytes]:
    """Keys of the first `num_blocks` full blocks of `token_ids`, each of which must be known."""
    return extended(root, [], token_ids, block_tokens, num_blocks)


def extended(
    root: bytes, keys: list[bytes], token_ids: NDArray[np.int32], block_tokens: int, num_blocks: int
) -> list[bytes]:
    """`keys`, made as long as `num_blocks` (in place)."""
    first, size = len(keys), 4 * block_tokens
    tokens = np.ascontiguousarray(
        token_ids[first * block_tokens : num_blocks * block_tokens], np.int32
    ).tobytes()
    for start in range(0, (num_blocks - first) * size, size):
        parent = keys[-1] if keys else root
        keys.append(hashlib.sha256(parent + tokens[start : start + size]).digest())
    return keys
