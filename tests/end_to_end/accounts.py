"""Holds a client's own ledger against the store, after processes were killed. Values in, values out."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Kill:
    """One kill -9: when, of what, and how long until all was well again (s; None: never within the limit)."""

    at: float  # UTC epoch s, the clock of the ledger
    pid: int
    recovered_s: float | None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Accounts:
    """What became of the requests of one ledger."""

    num_sent: int
    num_ok: int
    failed: Mapping[str, int]  # kind -> how many
    lost: Sequence[int]  # sent, and never heard of again
    not_allowed: Sequence[Line]  # failures that this kill does not excuse
    missing: Sequence[str]  # answered in full, and not in the store
    doubled: Sequence[str]  # more than once in the store
    other_words: int  # answers that differ from the first answer to the same prompt
    unknown_rows: int  # in the store, finished, and not in the ledger


def read_ledger(path: Path) -> list[Line]:
    """A line that was cut off, because its writer was, is passed over."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def settle(
    lines: Iterable[Line],
    stored_ids: Iterable[str],
    excuses: frozenset[str],
    kills: Sequence[Kill],
    slack_s: float,
) -> Accounts:
    """`excuses`: kinds of failure that are allowed between a kill and `slack_s` after its recovery."""
    sent = {line["n"]: line for line in lines if "n" in line and "outcome" not in line}
    ended = {line["n"]: line for line in lines if "n" in line and "outcome" in line}
    ok = [line for line in ended.values() if line["outcome"] == "ok"]
    failed = [line for line in ended.values() if line["outcome"] != "ok"]
    stored = Counter(stored_ids)
    ids = {request_id(line) for line in ok}
    return Accounts(
        num_sent=len(sent),
        num_ok=len(ok),
        failed=dict(Counter(kind_of(line) for line in failed)),
        lost=sorted(set(sent) - set(ended)),
        not_allowed=[line for line in failed if not is_excused(line, excuses, kills, slack_s)],
        missing=sorted(id for id in ids if stored[id] == 0),
        doubled=sorted(id for id, count in stored.items() if count > 1),
        other_words=num_other_words(ok),
        unknown_rows=len(set(stored) - {request_id(line) for line in ended.values()}),
    )


def request_id(line: Line) -> str:
    """As the store has it: the answer's id without what the API puts before it."""
    return str(line.get("id") or "").removeprefix("cmpl-")


def kind_of(line: Line) -> str:
    return " ".join(str(line[key]) for key in ("outcome", "status", "detail") if line.get(key) is not None)


def is_excused(line: Line, excuses: frozenset[str], kills: Sequence[Kill], slack_s: float) -> bool:
    if kind_of(line) not in excuses and line["outcome"] not in excuses:
        return False
    return any(
        line["sent_at"] <= kill.at + (kill.recovered_s or 0.0) + slack_s and line["done_at"] >= kill.at - 0.5
        for kill in kills
    )


def num_other_words(ok: Iterable[Line]) -> int:
    first: dict[tuple[str, int], str] = {}
    return sum(first.setdefault((line["prompt"], line["asked"]), line["text"]) != line["text"] for line in ok)
