"""kill -9 at random instants: what was promised is there, and nothing is half done."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from store.connection import sqlite_library
from store.database import Store
from store.tables import SCHEMA_VERSIONS, Note
from tests.store.story import write_story
from tests.store.test_migrations import scripts_with

ROUNDS = 12


def killed_again_and_again(*arguments: object) -> list[dict[str, Any]]:
    command = [sys.executable, "-W", "error", "-m", "tests.store.crash", *map(str, arguments)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    rounds = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rounds) == ROUNDS
    return rounds


def test_a_killed_writer_loses_nothing_that_it_had_acknowledged(data_dir: Path) -> None:
    rounds = killed_again_and_again("writes", data_dir, ROUNDS, 1)
    for found in rounds:
        assert found["lost_notes"] == []
        assert found["lost_records"] == []
        assert found["half_commits"] == 0
        assert found["cursor_is_rows"]
        assert found["checks"] == ["ok", "ok"]
    assert sum(found["num_told"] for found in rounds) > 100
    with Store.open(data_dir) as store, store.journal() as session:
        session.add(Note(2.0, "sample", "and it goes on"))


TELLING = """
    import os
    for number in range(35):
        op.execute("INSERT INTO note (at, stage, text, details) VALUES (1, 'a', '{text}', '{{}}')")
        if "TOLD" in os.environ:
            os.write(int(os.environ["TOLD"]), b"inserted\\n")
    op.execute("DELETE FROM note WHERE stage = 'a'")
""".replace("{text}", "x" * 3000)


def test_a_killed_migration_leaves_the_old_schema_or_the_new(data_dir: Path, tmp_path: Path) -> None:
    with Store.open(data_dir) as store:
        write_story(store)
    (data_dir / "journal.db").rename(data_dir / "old.db")
    scripts = scripts_with(tmp_path / "alembic", more=TELLING.strip())
    rounds = killed_again_and_again("upgrades", data_dir, ROUNDS, 2, scripts)
    old, new = SCHEMA_VERSIONS["journal"], SCHEMA_VERSIONS["journal"] + 1
    for found in rounds:
        assert found["has_column"] == (found["found"] == new)
        assert found["found"] == new or "upgraded" not in found["told"]
        assert found["checks"] == ["ok", "ok"]
        assert found["after"] == new
    assert {found["found"] for found in rounds} == {old, new}, (
        "all were killed before, or all after the commit"
    )


def test_a_migration_killed_at_each_of_its_steps_leaves_the_old_schema_or_the_new(data_dir: Path) -> None:
    """From the released schema 1 by the shipped revisions: before every statement, and before every commit."""
    data_dir.mkdir()
    old = sqlite_library().module.connect(str(data_dir / "old.db"))
    old.executescript((Path(__file__).parent / "released" / "journal-0001.sql").read_text())
    old.close()
    command = [sys.executable, "-W", "error", "-m", "tests.store.crash", "steps", str(data_dir), "1", "0"]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    rounds = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rounds) > 10
    for found in rounds:
        assert (found["schema"] == 1) == found["is_old"] and (found["schema"] > 1) == found["is_new"], found
        assert found["check"] == "ok" and found["after"] == SCHEMA_VERSIONS["journal"]
    assert [found["schema"] for found in rounds] == sorted(found["schema"] for found in rounds)
    assert rounds[0]["schema"] == 1 and rounds[-1]["schema"] == SCHEMA_VERSIONS["journal"]
