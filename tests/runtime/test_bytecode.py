"""Compiled modules of libraries that came without them. Each case in a process of its own: Python's settings change."""

import json
import os
import py_compile
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
IMPORT = """
import json, sys
from runtime import bytecode
if FULL:
    bytecode.FREE_BYTES = 2**80
if FIRST:
    import library
folder = bytecode.keep_compiled("library")
import library.part
print(json.dumps([None if folder is None else str(folder), library.part.__cached__, sys.dont_write_bytecode]))
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "site" / "library"
    folder.mkdir(parents=True)
    for name in ("__init__.py", "part.py"):
        (folder / name).write_text("value = 1\n")
    described = tmp_path / "site" / "library-1.2.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: library\nVersion: 1.2\n")
    return tmp_path


def imported(home: Path, is_full: bool = False, is_first: bool = False, **environment: str) -> Any:
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "XDG_"))
    }
    given = {"HOME": str(home), "PYTHONPATH": f"{home / 'site'}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT.replace("FULL", str(is_full)).replace("FIRST", str(is_first))],
        env=kept | given | environment, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return json.loads(done.stdout)


def test_what_nobody_has_compiled_is_compiled_once_into_the_cache(home: Path) -> None:
    times = []
    for _ in range(2):
        folder, compiled, is_off = imported(home)
        assert folder == str(home / ".cache/tuner/python/library-1.2")
        assert compiled.startswith(folder) and not is_off
        times.append(Path(compiled).stat().st_mtime_ns)
    assert times[0] == times[1], "found there by the second"
    assert not (home / "site/library/__pycache__").exists()
    (home / "site/library-1.2.dist-info/METADATA").write_text("Name: library\nVersion: 1.3\n")
    assert imported(home)[0].endswith("library-1.3")


def test_another_cache_is_taken_as_named(home: Path) -> None:
    folder, _, _ = imported(home, XDG_CACHE_HOME=str(home / "elsewhere"))
    assert folder == str(home / "elsewhere/tuner/python/library-1.2")
    assert imported(home, XDG_CACHE_HOME="not/absolute")[0].startswith(str(home / ".cache"))
    folder, compiled, is_off = imported(home, PYTHONPYCACHEPREFIX=str(home / "prefix"))
    assert folder is None and compiled.startswith(str(home / "prefix")) and is_off


@pytest.mark.parametrize("is_compiled", [False, True])
def test_what_is_compiled_beside_the_library_is_left_there(home: Path, is_compiled: bool) -> None:
    """Also where Python writes it there itself."""
    library = home / "site" / "library"
    if is_compiled:
        py_compile.compile(str(library / "__init__.py"))
    folder, compiled, is_off = imported(home, PYTHONDONTWRITEBYTECODE="1" if is_compiled else "")
    assert folder is None and Path(compiled).parent == library / "__pycache__" and is_off == is_compiled


@pytest.mark.parametrize("why", ["imported", "full", "a file", "open to others"])
def test_without_a_cache_of_its_own_python_is_left_as_it_is(home: Path, why: str) -> None:
    """Or modules that are compiled beside their source would not be found either."""
    if why == "a file":
        (home / ".cache").write_text("where a folder should be")
    if why == "open to others":
        folder = Path(imported(home)[0])
        folder.chmod(0o777)
    folder, compiled, is_off = imported(home, why == "full", why == "imported")
    assert folder is None and is_off and Path(compiled).parent == home / "site/library/__pycache__"
