"""README.md is held to the code: generated tables, files, commands and the places from which it installs."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tuner import __version__
from tuner.docs import SECTIONS, regenerated

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROSE = re.sub(r"<!-- (.*?) -->.*?<!-- end of \1 -->", "", README, flags=re.DOTALL)


def test_generated_tables_are_up_to_date() -> None:
    assert regenerated(README) == README, "Run `python -m tuner.docs`."


def test_refuses_a_text_without_its_markers() -> None:
    name = next(iter(SECTIONS))
    with pytest.raises(ValueError, match=name):
        regenerated(README.replace(f"<!-- {name} -->", ""))


def test_every_path_that_the_prose_names_exists() -> None:
    named = set(re.findall(r"`((?:runtime|store|tuner|dashboard|tests|configs)/[\w/.-]*)`", PROSE))
    assert named
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_every_command_that_the_prose_names_exists() -> None:
    known = subprocess.run(
        [sys.executable, "-m", "tuner.cli", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=ROOT,
    ).stdout
    named = set(re.findall(r"(?:bin/|`)tuner (\w+)", PROSE))
    assert {"run", "export", "rollback"} <= named
    assert [name for name in sorted(named) if not re.search(rf"\b{name}\b", known)] == []
    targets = set(re.findall(r"`make (\w+)`", PROSE))
    makefile = (ROOT / "Makefile").read_text()
    assert [name for name in sorted(targets) if f"\n{name}:" not in makefile] == []


def test_every_module_says_what_it_is() -> None:
    silent = [line for line in README.splitlines() if re.fullmatch(r"\| `\w+/[\w/]+\.py` \|  \|", line)]
    assert silent == []


def test_version_is_the_same_everywhere() -> None:
    assert PROJECT["project"]["version"] == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_only_the_public_index_of_pytorch_is_named() -> None:
    allowed = {"https://download.pytorch.org/whl/cpu"}
    for name in ("Makefile", "README.md", "pyproject.toml", "constraints.txt", ".ci/run"):
        text = (ROOT / name).read_text(encoding="utf-8")
        found = set(re.findall(r"\w+://[\w./-]*[\w/]", text))
        assert found <= allowed, name


def test_every_dependency_is_pinned_by_the_constraints() -> None:
    pins = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    }
    asked = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["dev"]
    names = {re.split(r"[\[<>=; ]", requirement)[0].lower().replace("_", "-") for requirement in asked}
    assert sorted(names - pins) == []


def test_constraints_fit_a_cpu_and_a_cuda_build_of_torch() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if "+" in line] == []
