"""Writes `released/` files of the newest schema, filled with `tests.store.story`: python -m tests.store.dump_released

A file belongs to its schema: once that is released, the file is never written again.
"""

import sqlite3
import tempfile
from pathlib import Path

from store.database import Store
from store.tables import SCHEMA_VERSIONS
from tests.store.story import write_story

RELEASED = Path(__file__).parent / "released"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        with Store.open(Path(folder)) as store:
            write_story(store)
        for which, number in SCHEMA_VERSIONS.items():
            opened = sqlite3.connect(Path(folder) / f"{which}.db")  # pysqlite3 cannot dump
            target = RELEASED / f"{which}-{number:04d}.sql"
            target.write_text("\n".join([*opened.iterdump(), f"PRAGMA user_version={number};", ""]))
            opened.close()
            print(target)


if __name__ == "__main__":
    main()
