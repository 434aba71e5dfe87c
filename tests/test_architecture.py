"""Who may import whom, read off the source: the arrows between the packages, and the one place of each big library."""

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {"runtime": set(), "store": set(), "tuner": {"runtime", "store"}, "dashboard": {"store"}}
ONLY_IN = {
    "torch": "runtime/", "transformers": "runtime/", "sqlalchemy": "store/", "alembic": "store/",
    "streamlit": "dashboard/", "optuna": "tuner/propose.py", "prophet": "tuner/notice/forecast.py",
    "triton": "runtime/kernels/",
}  # fmt: skip
SOURCES = [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]


@cache
def imported(path: Path, at_import_only: bool = False) -> set[str]:
    """Modules that a file imports, dotted; of `from a import b` both a and a.b, as b may be a module."""
    tree = ast.parse(path.read_text())
    names: set[str] = set()
    for node in tree.body if at_import_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_imports_only_what_its_package_may(path: Path) -> None:
    place = str(path.relative_to(ROOT))
    package = place.split("/")[0]
    roots = {name.split(".")[0] for name in imported(path)}
    assert roots & MAY_IMPORT.keys() <= MAY_IMPORT[package] | {package}
    assert roots.isdisjoint({"tests"})
    assert [
        library for library, home in ONLY_IN.items() if library in roots and not place.startswith(home)
    ] == []


@pytest.mark.parametrize("start", ["tuner", "store", "dashboard", "runtime/server.py", "runtime/client.py"])
def test_no_torch_is_loaded_by(start: str) -> None:
    """Follows imports at module level; one inside a function is loaded by those who call it."""
    waiting = [path for path in SOURCES if str(path.relative_to(ROOT)).startswith(start)]
    seen: set[Path] = set(waiting)
    while waiting:
        path = waiting.pop()
        names = imported(path, at_import_only=True)
        assert {name.split(".")[0] for name in names}.isdisjoint({"torch", "transformers"}), path
        found = {ROOT / f"{name.replace('.', '/')}.py" for name in names} & set(SOURCES) - seen
        seen |= found
        waiting += found


def test_dashboard_hides_no_library() -> None:
    """Streamlit puts the folder of its script first on the import path, and takes `pages` for its own."""
    names = {path.stem for path in (ROOT / "dashboard").glob("*.py")} | {
        path.name for path in (ROOT / "dashboard").glob("*/")
    }
    taken = (
        sys.stdlib_module_names
        | MAY_IMPORT.keys()
        | {"altair", "numpy", "pandas", "sqlalchemy", "streamlit", "pages"}
    )
    assert names.isdisjoint(taken)
