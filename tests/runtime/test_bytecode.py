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
from runtime.bytecode import keep_compiled
folder = keep_compiled("library")
import library.part
print(json.dumps([None if folder is None else str(folder), library.part.__cached__, sys.dont_write_bytecode]))
"""


@pytest.fixture
def library(tmp_path: Path) -> Path:
    folder = tmp_path / "site" / "library"
    folder.mkdir(parents=True)
    for name in ("__init__.py", "part.py"):
        (folder / name).write_text("value = 1\n")
    return folder


def imported(library: Path, **environment: str) -> Any:
    given = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "XDG_"))
    } | {"HOME": str(library.parents[1]), "PYTHONPATH": f"{library.parent}:{ROOT}", **environment}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], env=given, capture_output=True, text=True, check=True, timeout=60
    )
    return json.loads(done.stdout)


def test_what_nobody_has_compiled_is_compiled_once_into_the_cache(library: Path) -> None:
    cache = library.parents[1] / ".cache" / "tuner" / "python"
    times = []
    for _ in range(2):
        folder, compiled, is_off = imported(library, PYTHONDONTWRITEBYTECODE="1")
        assert folder == str(cache) and compiled.startswith(folder) and not is_off
        times.append(Path(compiled).stat().st_mtime_ns)
    assert times[0] == times[1], "found there by the second"
    assert not (library / "__pycache__").exists()
    Path(compiled).write_bytes(b"half a file")  # of a full disk
    assert imported(library, PYTHONDONTWRITEBYTECODE="1")[0] == folder


def test_another_cache_is_taken_as_named(library: Path) -> None:
    elsewhere = library.parents[1] / "elsewhere"
    folder, _, _ = imported(library, PYTHONDONTWRITEBYTECODE="1", XDG_CACHE_HOME=str(elsewhere))
    assert folder == str(elsewhere / "tuner" / "python")
    prefix = str(library.parents[1] / "prefix")
    folder, compiled, is_off = imported(library, PYTHONDONTWRITEBYTECODE="1", PYTHONPYCACHEPREFIX=prefix)
    assert folder is None and compiled.startswith(prefix) and is_off


@pytest.mark.parametrize("is_compiled", [False, True])
def test_what_is_compiled_beside_the_library_is_left_there(library: Path, is_compiled: bool) -> None:
    """Also where Python writes it there itself."""
    if is_compiled:
        py_compile.compile(str(library / "__init__.py"))
    folder, compiled, is_off = imported(library, **({"PYTHONDONTWRITEBYTECODE": "1"} if is_compiled else {}))
    assert folder is None and Path(compiled).parent == library / "__pycache__" and is_off == is_compiled


def test_a_cache_that_cannot_be_written_costs_nothing_but_its_use(library: Path) -> None:
    (library.parents[1] / ".cache").write_text("a file, where a folder should be")
    folder, compiled, _ = imported(library, PYTHONDONTWRITEBYTECODE="1")
    assert folder is not None and not Path(compiled).exists()
