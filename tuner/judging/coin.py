"""The coin that orders the two arms of a pair, and the hash that commits to it before the pair starts."""

import hashlib
import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Order = Literal["AB", "BA"]  # A is the champion, B the challenger
SALT_BITS = 128


@dataclass(frozen=True)
class Coin:
    """`value` 0 runs the champion first (AB), 1 the challenger (BA). `coin_hash` is journalled before the pair."""

    value: int
    salt: str
    coin_hash: str

    @property
    def order(self) -> Order:
        return "BA" if self.value else "AB"


def draw_coin(
    experiment_id: str, pair_index: int, random_bits: Callable[[int], int] = secrets.randbits
) -> Coin:
    """A fair coin and a fresh salt; `random_bits(k)` gives k random bits, as `random.Random(0).getrandbits` does."""
    value = random_bits(1)
    salt = f"{random_bits(SALT_BITS):032x}"
    return Coin(value, salt, coin_hash(experiment_id, pair_index, value, salt))


def coin_hash(experiment_id: str, pair_index: int, value: int, salt: str) -> str:
    """sha256 over the four; an audit recomputes it from the revealed coin and salt."""
    return hashlib.sha256(json.dumps([experiment_id, pair_index, value, salt]).encode()).hexdigest()
