"""Where running requests sit: their numbers as arrays, so that a step over hundreds of them is a few calls."""

import numpy as np
from numpy.typing import NDArray

from runtime.batch import IntArray


class Seats:
    """The numbers of the running requests, as arrays indexed by seat."""

    def __init__(self, max_blocks: int) -> None:
        self.known: IntArray = np.zeros(0, np.int64)  # tokens whose ids are known
        self.computed: IntArray = np.zeros(0, np.int64)  # tokens whose keys and values are cached
        self.last_token: IntArray = np.zeros(0, np.int64)
        self.turn: IntArray = np.zeros(
            0, np.int64
        )  # rises with every row served: the lowest has gone without longest
        self.num_blocks: IntArray = np.zeros(0, np.int64)
        self.registered: IntArray = np.zeros(0, np.int64)  # full blocks that the prefix cache was told of
        self.blocks: NDArray[np.int32] = np.zeros((0, max_blocks), np.int32)
        self._empty: list[int] = []

    def take(self) -> int:
        if not self._empty:
            size = len(self.known)
            grown = max(16, 2 * size)
            for name in ("known", "computed", "last_token", "turn", "num_blocks", "registered", "blocks"):
                old = getattr(self, name)
                new = np.zeros((grown, *old.shape[1:]), old.dtype)
                new[:size] = old
                setattr(self, name, new)
            self._empty = list(range(grown - 1, size - 1, -1))
        return self._empty.pop()

    def leave(self, seat: int) -> None:
        self._empty.append(seat)

    def use_width(self, max_blocks: int) -> None:
        """Tables of so many blocks, empty."""
        self.blocks = np.zeros((len(self.blocks), max_blocks), np.int32)

    def blocks_of(self, seat: int) -> NDArray[np.int32]:
        return self.blocks[seat, : self.num_blocks[seat]]
