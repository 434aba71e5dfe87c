"""A document whose every part can be told apart from a changed one: canonical text, a digest a part, one over all.

A seal finds accidents and names the part that differs. Whoever edits on purpose can seal anew; against that
stands what can be derived again from the coins and scores (`tuner verify`).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

DEPTH = 4  # parts this deep are named one by one: `slices[3].stats.coin_salt`
PART_DIGITS = 12  # enough to find a part; the digest over all is whole

Document = dict[str, Any]


def canonical(document: Any) -> str:
    """The one text of a document: the same values give the same bytes.

    Raises:
        ValueError: a number is not finite.
    """
    return json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def sealed(document: Mapping[str, Any]) -> Document:
    """The document with its seal; an earlier one is replaced."""
    body = {name: part for name, part in document.items() if name != "seal"}
    parts = {path: _digest(part)[:PART_DIGITS] for path, part in _parts(body)}
    return {**body, "seal": {"parts": parts, "digest": _digest([body, parts])}}


def differences(document: Mapping[str, Any]) -> list[str]:
    """The parts that are not as they were sealed, in words; empty where the seal holds."""
    seal = document.get("seal")
    if not isinstance(seal, Mapping) or not isinstance(seal.get("parts"), Mapping):
        return ["the seal is missing"]
    known, now = dict(seal["parts"]), sealed(document)["seal"]
    found = [
        f"`{path}` was changed"
        for path in now["parts"]
        if path in known and known[path] != now["parts"][path]
    ]
    found += [f"`{path}` was added" for path in now["parts"].keys() - known.keys()]
    found += [f"`{path}` is gone" for path in known.keys() - now["parts"].keys()]
    if set(seal) != {"parts", "digest"}:
        found.append("`seal` holds more or less than its two parts")
    if not found and seal.get("digest") != now["digest"]:
        found.append("`seal.digest` was changed")
    return sorted(found)


def _parts(value: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Leaves, empty containers, and whatever lies at `DEPTH`, by path."""
    if depth == DEPTH or not value or not isinstance(value, dict | list):
        yield path, value
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from _parts(part, f"{path}.{name}" if path else str(name), depth + 1)
    else:
        for index, part in enumerate(value):
            yield from _parts(part, f"{path}[{index}]", depth + 1)


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
