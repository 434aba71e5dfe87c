"""Kills a process that works on a store, again and again, and tells what it had promised and what is there.

    python -m tests.store.crash writes|upgrades DATA_DIR ROUNDS SEED [SCRIPTS]
    python -m tests.store.crash steps DATA_DIR EVERY 0    kills the shipped upgrade at each EVERYth step

A program of its own, so that forking meets no threads. Prints one JSON object a round.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import alembic.command  # noqa: F401  loaded here: the children shall be killed at work, not while importing
from sqlalchemy import Engine, event

from store.connection import sqlite_library
from store.database import Store
from store.migrations import upgrade
from store.tables import Note

MAX_LINES = 40
MAX_MORE_S = 0.01


def kill_while(work: Callable[[int], None], num_lines: int, more_s: float) -> list[str]:
    """Forks and kills the child `more_s` seconds after its `num_lines`th line. Returns all the lines that it wrote."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            work(writing)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        lines = [pipe.readline() for _ in range(num_lines)]  # "" where it ended before
        time.sleep(more_s)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return [line.strip() for line in [*lines, *pipe] if line]


def write_for_ever(data_dir: Path, told: int) -> None:
    """Two notes a commit, and records with their cursor; each is told after its commit."""
    with Store.open(data_dir) as store:
        boot_id = f"boot-{os.getpid()}"
        seq = 0
        while True:
            with store.journal() as session:
                session.add_all([first := Note(1.0, "crash", "a"), Note(1.0, "crash", "b")])
            os.write(told, f"note {first.note_id}\n".encode())
            event = {"kind": "event", "event": "e", "at": 1.0, "text": "x" * 300}
            records = [{**event, "seq": seq + n} for n in range(1, 51)]
            seq += 50
            store.save_drained(boot_id, records, seq, 0, 1.0)
            os.write(told, f"drained {boot_id} {seq}\n".encode())


def after_writes(data_dir: Path, lines: list[str]) -> dict[str, Any]:
    told = [line.split() for line in lines]
    with connected(data_dir / "journal.db") as journal:
        notes = (
            {row[0] for row in journal.execute("SELECT note_id FROM note")} if has_tables(journal) else set()
        )
        checks = [journal.execute("PRAGMA quick_check").fetchone()[0]]
    with connected(data_dir / "metrics.db") as metrics:
        cursors = (
            dict(metrics.execute("SELECT boot_id, after_seq FROM drain_cursor"))
            if has_tables(metrics)
            else {}
        )
        stored = (
            dict(metrics.execute("SELECT boot_id, count(*) FROM runtime_event GROUP BY boot_id"))
            if cursors
            else {}
        )
        checks.append(metrics.execute("PRAGMA quick_check").fetchone()[0])
    return {
        "num_told": len(told),
        "lost_notes": sorted({int(line[1]) for line in told if line[0] == "note"} - notes),
        "lost_records": [
            line for line in told if line[0] == "drained" and cursors.get(line[1], 0) < int(line[2])
        ],
        "half_commits": len(notes) % 2,
        "cursor_is_rows": cursors == stored,
        "checks": checks,
    }


def run_upgrade(path: Path, scripts: Path, told: int) -> None:
    os.environ["TOLD"] = str(told)  # the revision tells how far it is
    upgrade(path, "journal", scripts)
    os.write(told, b"upgraded\n")


def upgrade_until(path: Path, step: int, told: int) -> None:
    """Upgrades by the shipped revisions and kills itself just before statement or commit number `step`."""
    num_steps = 0

    def count(*arguments: Any, **named: Any) -> None:
        nonlocal num_steps
        if num_steps == step:
            os.kill(os.getpid(), signal.SIGKILL)
        num_steps += 1

    event.listen(Engine, "before_cursor_execute", count)
    event.listen(Engine, "commit", count)
    upgrade(path, "journal")
    os.write(told, b"upgraded\n")


def at_each_step(data_dir: Path, every: int) -> Iterator[dict[str, Any]]:
    """One round a step, until a child lives to the end."""
    path, step = data_dir / "journal.db", 0
    while True:
        for left in data_dir.glob("journal.db*"):
            left.unlink()
        shutil.copy(data_dir / "old.db", path)
        lines = kill_while(lambda told, step=step: upgrade_until(path, step, told), 1, 0.0)
        with connected(path) as journal:
            schema = journal.execute("PRAGMA user_version").fetchone()[0]
            columns = [row[1] for row in journal.execute("PRAGMA table_info(anomaly)")]
            tables = [
                row[0] for row in journal.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            ]
            check = journal.execute("PRAGMA quick_check").fetchone()[0]
        is_new = "layer" in columns and "quality_check" in tables
        is_old = "layer" not in columns and "quality_check" not in tables
        upgrade(path, "journal")
        with connected(path) as journal:
            after = journal.execute("PRAGMA user_version").fetchone()[0]
        yield {
            "step": step,
            "schema": schema,
            "is_old": is_old,
            "is_new": is_new,
            "check": check,
            "after": after,
        }
        if lines:
            return
        step += every


def after_upgrade(path: Path, scripts: Path, lines: list[str]) -> dict[str, Any]:
    with connected(path) as journal:
        found = journal.execute("PRAGMA user_version").fetchone()[0]
        columns = [row[1] for row in journal.execute("PRAGMA table_info(note)")]
        checks = [journal.execute("PRAGMA quick_check").fetchone()[0]]
    upgrade(path, "journal", scripts)
    with connected(path) as journal:
        checks.append(journal.execute("PRAGMA quick_check").fetchone()[0])
        after = journal.execute("PRAGMA user_version").fetchone()[0]
    return {
        "told": lines,
        "found": found,
        "has_column": "author" in columns,
        "after": after,
        "checks": checks,
    }


@contextmanager
def connected(path: Path) -> Iterator[Any]:
    connection = sqlite_library().module.connect(str(path))
    try:
        yield connection
    finally:
        connection.close()


def has_tables(connection: Any) -> bool:
    return bool(connection.execute("PRAGMA user_version").fetchone()[0])


def main(what: str, data_dir: Path, rounds: int, seed: int, scripts: Path | None = None) -> None:
    if what == "steps":
        for found in at_each_step(data_dir, rounds):
            print(json.dumps(found))
        return
    rng = random.Random(seed)
    path = data_dir / "journal.db"
    for _ in range(rounds):
        instant = rng.randrange(MAX_LINES), rng.uniform(0.0, MAX_MORE_S)
        if what == "writes":
            lines = kill_while(lambda told: write_for_ever(data_dir, told), *instant)
            found = after_writes(data_dir, lines)
        else:
            assert scripts is not None
            shutil.copy(data_dir / "old.db", path)
            lines = kill_while(lambda told: run_upgrade(path, scripts, told), *instant)
            found = after_upgrade(path, scripts, lines)
        print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), *map(Path, sys.argv[5:6]))
