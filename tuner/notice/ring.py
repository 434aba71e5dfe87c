"""The newest so many numbers of a series, in an array that does not grow."""

import numpy as np
from numpy.typing import NDArray


class Ring:
    """`push` is cheap; `values` and `tail` are views, oldest first, valid until the next push."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept = np.empty(0)
        self._end = 0

    def __len__(self) -> int:
        return min(self._end, self._size)

    @property
    def newest(self) -> float:
        """Raises IndexError where there is none."""
        if not self._end:
            raise IndexError("The ring is empty.")
        return float(self._kept[self._end - 1])

    def push(self, value: float) -> None:
        if self._end == len(self._kept):
            self._make_room()
        self._kept[self._end] = value
        self._end += 1

    def values(self) -> NDArray[np.float64]:
        return self._kept[max(0, self._end - self._size) : self._end]

    def tail(self, num: int) -> NDArray[np.float64]:
        """The newest `num`, or as many as there are."""
        return self._kept[max(0, self._end - min(num, self._size)) : self._end]

    def clear(self) -> None:
        self._end = 0

    def _make_room(self) -> None:
        """Doubles up to a quarter more than the size; then the newest move to the front."""
        kept = self.values().copy()
        room = min(max(64, 2 * len(kept)), self._size + max(64, self._size // 4))
        if room != len(self._kept):
            self._kept = np.empty(room)
        self._kept[: len(kept)] = kept
        self._end = len(kept)
