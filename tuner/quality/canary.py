"""The canary set: texts that every model reads, the same for all, before and after a change.

Many short passages rather than few long ones: prose, code, numbers, lists and other languages suffer from lost
precision in different places, and the interval of a comparison counts passages.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PASSAGES = Path(__file__).parent / "canary_set" / "passages.txt"
MARK = "%% "


@dataclass(frozen=True)
class CanarySet:
    """`digest` names the texts: scores of another set mean nothing beside these."""

    kinds: tuple[str, ...]
    passages: tuple[str, ...]
    digest: str


@cache
def canary_set() -> CanarySet:
    """The shipped set. What stands before the first mark is a comment."""
    text = PASSAGES.read_text(encoding="utf-8")
    parts = [part.partition("\n") for part in ("\n" + text).split("\n" + MARK)[1:]]
    kinds = tuple(kind.strip() for kind, _, _ in parts)
    passages = tuple(passage.rstrip("\n") for _, _, passage in parts)
    return CanarySet(kinds, passages, hashlib.sha256("\0".join(passages).encode()).hexdigest()[:12])
