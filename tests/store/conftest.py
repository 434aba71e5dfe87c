import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from store.database import Store
from tests.store.story import write_story


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store and one with a story, to copy: making one takes longer than most tests."""
    folder = tmp_path_factory.mktemp("templates")
    Store.open(folder / "empty").close()
    with Store.open(folder / "told") as store:
        write_story(store)
    return folder


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(data_dir: Path, templates: Path) -> Iterator[Store]:
    yield from opened_copy(templates / "empty", data_dir)


@pytest.fixture
def told(data_dir: Path, templates: Path) -> Iterator[Store]:
    """A store that holds `tests.store.story`."""
    yield from opened_copy(templates / "told", data_dir)


def opened_copy(template: Path, data_dir: Path) -> Iterator[Store]:
    shutil.copytree(template, data_dir)
    with Store.open(data_dir) as opened:
        yield opened
