"""`tuner store`: look at the files of a data folder, copy the decisions, put a copy back."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

store_app = typer.Typer(no_args_is_help=True, help="Check, back up and restore the files of a data folder.")
ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="Settings file (YAML).")]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", "-d", help="Folder of the store; overrides the settings.")
]


def folder_of(config: Path | None, data_dir: Path | None) -> Path:
    if data_dir is not None:
        return data_dir
    from tuner.settings import load_settings

    return load_settings(config).data_dir


@store_app.command()
def check(
    config: ConfigOption = None,
    data_dir: DataDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of text.")] = False,
) -> None:
    """Read both files whole, and all copies. Works beside a running tuner. Exit code 65 where one is damaged."""
    from store.errors import NoStore

    folder = folder_of(config, data_dir)
    if not folder.is_dir():
        raise NoStore(f"There is no store at {folder}. Start `tuner run` with this data folder first.")
    found = examined(folder)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        for row in found:
            size = "" if row["bytes"] is None else f", {row['bytes'] / 1e6:.1f} MB"
            print(f"{'ok  ' if row['passed'] else 'FAIL'} {row['file']}{size}: {row['detail']}")
    if not all(row["passed"] for row in found):
        sys.exit(65)


def examined(folder: Path) -> list[dict[str, Any]]:
    """One row a file: the two that are in use, then every copy of the journal, newest first."""
    from store.backups import FOLDER, check_copy, daily_backups
    from store.database import FILE_NAMES, WHICH, StoreFile
    from store.errors import StoreError

    def examine(path: Path, look: Any) -> dict[str, Any]:
        size = path.stat().st_size if path.exists() else None
        try:
            passed, detail = True, look()
        except StoreError as error:
            passed, detail = False, str(error)
        return {"file": str(path.relative_to(folder)), "bytes": size, "passed": passed, "detail": detail}

    def whole(file: StoreFile) -> str:
        file.check()
        with file.session():  # compares the schema too
            return "whole, and of this version"

    rows = [
        examine(
            folder / FILE_NAMES[which],
            lambda which=which: whole(StoreFile(folder / FILE_NAMES[which], which, True)),
        )
        for which in WHICH
    ]
    copies = daily_backups(folder)
    rows += [examine(path, lambda path=path: f"whole, schema {check_copy(path)}") for path in copies]
    if not copies:
        rows.append(
            {"file": FOLDER, "bytes": None, "passed": True, "detail": "no copies of the decisions yet"}
        )
    return rows


@store_app.command()
def backup(
    config: ConfigOption = None,
    data_dir: DataDir = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write, instead of one among the daily copies."),
    ] = None,
) -> None:
    """Copy the decisions now, also while the tuner runs. The copy is checked."""
    from store.backups import check_copy, make_backup
    from store.connection import back_up
    from store.database import FILE_NAMES
    from store.errors import NoStore

    folder = folder_of(config, data_dir)
    journal = folder / FILE_NAMES["journal"]
    if not journal.exists():
        raise NoStore(f"There is no store at {folder}. Start `tuner run` with this data folder first.")
    try:
        if output is None:
            path = make_backup(folder, time.time(), num_kept=sys.maxsize)
        else:
            path = output
            back_up(journal, path)
            check_copy(path)
    except OSError as error:
        print(f"error: the copy cannot be written: {error}. Give another file.", file=sys.stderr)
        sys.exit(2)
    print(f"Decisions copied to {path} ({path.stat().st_size / 1e6:.1f} MB).")


@store_app.command()
def restore(
    copy: Annotated[Path, typer.Argument(help="A copy of the journal; `tuner store check` lists them.")],
    config: ConfigOption = None,
    data_dir: DataDir = None,
) -> None:
    """Put a copy of the decisions back. The present ones are set aside, not deleted. The tuner must not run."""
    from store.backups import check_copy, put_back
    from store.connection import make_private_dir
    from store.database import FILE_NAMES, set_aside
    from store.lock import DataDirLock

    folder = folder_of(config, data_dir)
    if not copy.is_file():
        print(f"error: {copy} is not a file. `tuner store check` lists the copies.", file=sys.stderr)
        sys.exit(2)
    check_copy(copy)
    make_private_dir(folder)
    with DataDirLock(folder):
        had_one = (folder / FILE_NAMES["journal"]).exists()
        aside = set_aside(folder, "journal", time.time(), "before-restore")
        put_back(folder, copy)
    print(f"{copy} is the journal now." + (f" The one before is {aside}." if had_one else ""))
    print(
        "The next `tuner run` serves what was confirmed last; `tuner rollback` returns to an earlier champion."
    )
