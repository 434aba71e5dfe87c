"""The commands that export, verify, check, copy and restore, as a shell meets them: exit codes and one clear line."""

import json
import os
import sys
from pathlib import Path

import pytest

from store.backups import daily_backups
from store.database import Store
from store.lock import DataDirLock
from tests.tuner.proven import CHALLENGER, add_test, begin
from tuner import cli


class Shell:
    """Runs a command in this process. `code`, `out` and `err` are of the last one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        self.code: int = 0
        self.out = self.err = ""

    def __call__(self, *words: object) -> int:
        self._monkeypatch.setattr(sys, "argv", ["tuner", *map(str, words)])
        try:
            cli.main()
            self.code = 0
        except SystemExit as ended:
            self.code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        self.out, self.err = self._capsys.readouterr()
        return self.code


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store with one promotion."""
    with Store.open(tmp_path / "store") as store:
        add_test(store, begin(store))
    return tmp_path / "store"


def test_exported_evidence_is_verified(shell: Shell, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "evidence.json"
    assert shell("export", "-d", folder, "--evidence", path) == 0
    assert f"Check it with `tuner verify {path}`." in shell.out and "knobs:" not in shell.out
    assert shell("verify", path) == 0
    assert shell.out.count("ok   ") == 11 and "FAIL" not in shell.out
    assert shell("verify", path, "--json") == 0
    assert all(check["passed"] for check in json.loads(shell.out))


def test_changed_evidence_ends_with_1_and_names_what_differs(
    shell: Shell, folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "evidence.json"
    shell("export", "-d", folder, "--evidence", path)
    path.write_text(path.read_text().replace('"outcome": "PROMOTE"', '"outcome": "REJECT"', 1))
    assert shell("verify", path) == 1
    assert "FAIL seal: `verdict." in shell.out


@pytest.mark.parametrize(
    ("content", "code", "told"),
    [(None, 2, "cannot be read"), (b"\x00\xff", 65, "is not JSON"), (b"{}", 65, "is not evidence"),
     (b'{"format": "tuner-evidence", "evidence_schema_version": 7}', 65, "has form 7")],
)  # fmt: skip
def test_a_file_that_is_no_evidence_is_one_clear_line(
    shell: Shell, tmp_path: Path, content: bytes | None, code: int, told: str
) -> None:
    path = tmp_path / "evidence.json"
    if content is not None:
        path.write_bytes(content)
    assert shell("verify", path) == code
    assert shell.err.startswith("error: ") and told in shell.err and shell.err.count("\n") == 1


def test_evidence_and_settings_may_be_written_at_once(shell: Shell, folder: Path, tmp_path: Path) -> None:
    evidence, settings = tmp_path / "evidence.json", tmp_path / "champion.env"
    assert shell("export", "-d", folder, "--evidence", evidence, "-f", "env", "-o", settings) == 0
    assert "TUNER_KNOBS__START__PREFILL_CHUNK=64" in settings.read_text()
    assert CHALLENGER.config_id in settings.read_text()
    assert shell("verify", evidence) == 0


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("export", "--experiment", "t1"), 2, "give --evidence FILE too"),
        (("export", "--evidence", "e.json", "--experiment", "nope"), 75, "No experiment has the id 'nope'"),
        (("export", "-o", "/nowhere/champion.yaml"), 2, "/nowhere/champion.yaml cannot be written"),
        (("export", "-f", "toml"), 2, "toml"),
        (("store", "restore", "absent.db"), 2, "absent.db is not a file"),
        (("store", "backup", "-o", "/nowhere/copy.db"), 2, "the copy cannot be written"),
    ],
)
def test_wrong_arguments_are_refused(
    shell: Shell, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], code: int,
    told: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert shell(*words, "-d", folder) == code
    assert told in shell.err and "Traceback" not in shell.err


def test_the_store_is_checked_copied_and_restored(shell: Shell, folder: Path) -> None:
    assert shell("store", "check", "-d", folder) == 0
    assert "no copies of the decisions yet" in shell.out
    assert shell("store", "backup", "-d", folder) == 0
    (copy,) = daily_backups(folder)
    with Store.open(folder) as store:
        add_test(store, begin_id(store), "t2", seed=4)
    assert shell("store", "restore", copy, "-d", folder) == 0
    assert "before-restore" in shell.out
    assert shell("export", "-d", folder, "--evidence", folder / "e.json", "--experiment", "t2") == 75
    assert shell("store", "check", "-d", folder, "--json") == 0
    assert [row["file"] for row in json.loads(shell.out)] == [
        "journal.db",
        "metrics.db",
        f"backups/{copy.name}",
    ]


def begin_id(store: Store) -> str:
    from store.queries import last_snapshot

    with store.journal() as session:
        found = last_snapshot(session)
    assert found is not None
    return found.snapshot_id


def test_damage_is_found_with_the_file_that_has_it(shell: Shell, folder: Path) -> None:
    shell("store", "backup", "-d", folder)
    (copy,) = daily_backups(folder)
    for path in (folder / "metrics.db", copy):
        content = bytearray(path.read_bytes())
        content[8192:16384] = os.urandom(8192)
        path.write_bytes(content)
    assert shell("store", "check", "-d", folder) == 65
    lines = shell.out.splitlines()
    assert [line[:4] for line in lines] == ["ok  ", "FAIL", "FAIL"]
    assert "metrics.db" in lines[1] and copy.name in lines[2]


def test_reading_a_damaged_journal_is_no_busy_store(shell: Shell, folder: Path) -> None:
    (folder / "journal.db").write_bytes(b"no database " * 1000)
    assert shell("export", "-d", folder) == 65
    assert "journal.db is damaged (file is not a database). `tuner run` sets it aside" in shell.err


def test_a_damaged_copy_is_not_restored(shell: Shell, folder: Path, tmp_path: Path) -> None:
    before = (folder / "journal.db").read_bytes()
    bad = tmp_path / "bad.db"
    bad.write_bytes(b"no database " * 1000)
    assert shell("store", "restore", bad, "-d", folder) == 65
    assert "is no whole copy of a journal" in shell.err
    assert (folder / "journal.db").read_bytes() == before


def test_nothing_is_restored_under_a_running_tuner(shell: Shell, folder: Path) -> None:
    shell("store", "backup", "-d", folder)
    (copy,) = daily_backups(folder)
    lock = DataDirLock(folder)
    lock.acquire()
    try:
        assert shell("store", "restore", copy, "-d", folder) == 75
        assert f"is written by process {os.getpid()}" in shell.err
        assert shell("store", "check", "-d", folder) == 0
        assert shell("store", "backup", "-d", folder) == 0
    finally:
        lock.release()


@pytest.mark.parametrize("command", ["check", "backup"])
def test_a_folder_without_a_store_says_so(shell: Shell, tmp_path: Path, command: str) -> None:
    assert shell("store", command, "-d", tmp_path / "none") == 75
    assert "There is no store at" in shell.err
