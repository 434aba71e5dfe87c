import logging
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine

import store as store_package
from runtime.knobs import EngineConfig
from store import migrations
from store.connection import sqlite_library
from store.database import Store, StoreReader
from store.errors import DamagedStore, NewerStore
from store.export import proof_of_champion
from store.migrations import draft, newest, upgrade
from store.tables import SCHEMA_VERSIONS, Config, JournalBase, MetricsBase, Note, Which

BASES: dict[Which, Any] = {"journal": JournalBase, "metrics": MetricsBase}
RELEASED = Path(__file__).parent / "released"

pytestmark = pytest.mark.filterwarnings("error")


def rows_of(path: Path, statement: str) -> list[Any]:
    opened = sqlite_library().module.connect(str(path))
    try:
        return list(opened.execute(statement).fetchall())
    finally:
        opened.close()


def schema_of(path: Path) -> dict[str, list[str]]:
    """Every table and index but Alembic's own, by name; a statement as its words, since constraints have no order."""
    found = rows_of(
        path, "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'tuner_%_version'"
    )
    return {name: sorted(re.findall(r"[\w.]+|[()]", sql)) for name, sql in found}


@pytest.fixture(params=BASES)
def which(request: pytest.FixtureRequest) -> Which:
    return request.param


def test_the_revisions_make_exactly_the_declared_tables(tmp_path: Path, which: Which) -> None:
    made, declared = tmp_path / "made.db", tmp_path / "declared.db"
    assert upgrade(made, which) == (0, SCHEMA_VERSIONS[which], None)
    engine = create_engine(f"sqlite:///{declared}")
    BASES[which].metadata.create_all(engine)
    engine.dispose()
    assert schema_of(made) == schema_of(declared)

    engine = create_engine(f"sqlite:///{made}")
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"version_table": f"tuner_{which}_version", "render_as_batch": True}
        )
        assert compare_metadata(context, BASES[which].metadata) == [], (
            "store/tables.py changed: draft a revision"
        )
    engine.dispose()


def test_the_known_schema_is_the_newest_revision(which: Which) -> None:
    assert newest(which) == SCHEMA_VERSIONS[which]


def test_a_file_that_is_up_to_date_is_not_touched(tmp_path: Path, which: Which) -> None:
    path = tmp_path / "some.db"
    upgrade(path, which)
    before = path.read_bytes()
    head = SCHEMA_VERSIONS[which]
    assert upgrade(path, which) == (head, head, None)
    assert path.read_bytes() == before


def test_the_version_is_kept_in_the_file_and_in_its_own_table(tmp_path: Path, which: Which) -> None:
    path = tmp_path / "some.db"
    upgrade(path, which)
    assert rows_of(path, "PRAGMA user_version") == [(SCHEMA_VERSIONS[which],)]
    assert rows_of(path, f"SELECT version_num FROM tuner_{which}_version") == [
        (f"{SCHEMA_VERSIONS[which]:04d}",)
    ]


def test_upgrading_is_quiet(
    tmp_path: Path, which: Which, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO):
        upgrade(tmp_path / "some.db", which)
    assert [record.name for record in caplog.records] == ["store.migrations"]
    assert capfd.readouterr() == ("", "")


def test_works_wherever_the_package_is_installed(tmp_path: Path) -> None:
    """The scripts are found beside the package, and none of the repository's other files are needed."""
    site = tmp_path / "site 100%"
    shutil.copytree(
        Path(store_package.__file__).parent, site / "store", ignore=shutil.ignore_patterns("__pycache__")
    )
    opens = """
from pathlib import Path
import store
from store.database import Store
print(store.__file__)
Store.open(Path("s")).close()
"""
    env = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", opens],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(str(site))
    assert "alembic" not in done.stderr.lower()
    assert rows_of(tmp_path / "s" / "journal.db", "PRAGMA user_version") == [(SCHEMA_VERSIONS["journal"],)]


# --- from one schema to the next ------------------------------------------------------------------

SECOND = '''
"""A second schema: a column more, a column renamed, a table rebuilt."""
import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "{after:04d}", "{before:04d}", None, None


def upgrade():
    with op.batch_alter_table("note") as table:
        table.add_column(sa.Column("author", sa.String(), nullable=False, server_default="daemon"))
    with op.batch_alter_table("config") as table:  # others refer to it
        table.alter_column("created_at", new_column_name="first_seen_at")
    {more}
'''


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    """The shipped revisions, and one that is not shipped after them."""
    return scripts_with(tmp_path / "alembic", more="pass")


def scripts_with(folder: Path, more: str) -> Path:
    shutil.copytree(migrations.SCRIPTS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    before = SCHEMA_VERSIONS["journal"]
    script = SECOND.format(before=before, after=before + 1, more=more).lstrip()
    (folder / "journal" / "versions" / f"{before + 1:04d}_second.py").write_text(script)
    return folder


def test_an_older_file_is_backed_up_and_brought_to_the_newest_schema(told: Store, scripts: Path) -> None:
    old = SCHEMA_VERSIONS["journal"]
    told.close()
    path = told.data_dir / "journal.db"
    champions = rows_of(path, "SELECT * FROM champion")
    backup = path.with_name(f"journal.db.schema-{old}.backup")
    assert upgrade(path, "journal", scripts) == (old, old + 1, backup)
    assert rows_of(path, "SELECT DISTINCT author FROM note") == [("daemon",)]
    assert "first_seen_at" in schema_of(path)["config"]
    assert rows_of(path, "SELECT * FROM champion") == champions
    assert rows_of(path, "PRAGMA foreign_key_check") == []
    assert rows_of(path, "PRAGMA quick_check") == [("ok",)]

    assert stat.S_IMODE(backup.stat().st_mode) == 0o600
    assert rows_of(backup, "PRAGMA user_version") == [(old,)]
    os.replace(backup, path)
    with Store.open(told.data_dir) as restored, restored.journal() as session:
        assert session.query(Note).count() == 2

    upgrade(path, "journal", scripts)
    with pytest.raises(NewerStore, match="a newer one wrote it"):
        Store.open(told.data_dir)


def test_a_revision_that_fails_leaves_the_old_schema_and_its_rows(told: Store, tmp_path: Path) -> None:
    told.close()
    path = told.data_dir / "journal.db"
    before = (schema_of(path), rows_of(path, "SELECT * FROM note"))
    with pytest.raises(ZeroDivisionError):
        upgrade(path, "journal", scripts_with(tmp_path / "failing", more="1 / 0"))
    assert (schema_of(path), rows_of(path, "SELECT * FROM note")) == before
    with Store.open(told.data_dir):
        pass


def test_a_revision_that_breaks_a_reference_is_undone(told: Store, tmp_path: Path) -> None:
    told.close()
    path = told.data_dir / "journal.db"
    losing = scripts_with(tmp_path / "losing", more="op.execute('DELETE FROM snapshot')")
    with pytest.raises(DamagedStore, match=r"refers to rows of snapshot that are gone. Restore"):
        upgrade(path, "journal", losing)
    with Store.open(told.data_dir) as again, again.journal() as session:
        assert session.query(Note).count() == 2


def test_a_draft_holds_what_changed_and_its_message(tmp_path: Path) -> None:
    folder = tmp_path / "drafts"
    shutil.copytree(migrations.SCRIPTS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    written = draft("metrics", "Nothing changed.", folder)
    assert written.name == f"{SCHEMA_VERSIONS['metrics'] + 1:04d}_nothing_changed.py"
    assert '"""Nothing changed."""' in written.read_text()
    assert "op." not in written.read_text().split("def upgrade")[1]
    for old in (folder / "metrics" / "versions").glob("0*.py"):
        old.unlink()
    assert "op.create_table('sample'" in draft("metrics", "Again.", folder).read_text()


# --- released schemas -----------------------------------------------------------------------------


def test_every_released_schema_has_a_file_here(which: Which) -> None:
    """`tests.store.dump_released` writes one; from its release on it is never changed again."""
    assert [path.name for path in sorted(RELEASED.glob(f"{which}-*.sql"))] == [
        f"{which}-{number:04d}.sql" for number in range(1, SCHEMA_VERSIONS[which] + 1)
    ]


@pytest.mark.parametrize("number", range(1, max(SCHEMA_VERSIONS.values()) + 1))
def test_a_store_of_every_released_schema_opens_and_its_story_is_told(data_dir: Path, number: int) -> None:
    data_dir.mkdir()
    for which in BASES:
        released = RELEASED / f"{which}-{min(number, SCHEMA_VERSIONS[which]):04d}.sql"
        opened = sqlite_library().module.connect(str(data_dir / f"{which}.db"))
        opened.executescript(released.read_text())
        opened.close()
    Store.open(data_dir).close()
    reader = StoreReader(data_dir)
    with reader.journal() as journal, reader.metrics() as measured:
        proof = proof_of_champion(journal, measured)
        assert proof.is_proven and proof.before is not None and proof.before.num == 35
        for row in journal.query(Config):  # knobs of a later version are at their defaults
            assert EngineConfig.of(row.values).values() == {**EngineConfig().values(), **row.values}
