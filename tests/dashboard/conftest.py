"""Pages under Streamlit's AppTest, on a store of their own and with a daemon where one is wanted."""

import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from dashboard import daemon
from store.database import Store
from tests.store.story import write_story
from tuner.api import DaemonServer

APP = Path(__file__).parents[2] / "dashboard" / "app.py"
PAGES = ("overview", "history", "experiments", "recommendations")


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("templates")
    Store.open(folder / "empty").close()
    with Store.open(folder / "told") as store:
        write_story(store)
    return folder


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "store"
    monkeypatch.setenv("TUNER_DATA_DIR", str(folder))
    monkeypatch.setenv("TUNER_DASHBOARD_ROLE", "operator")
    return folder


@pytest.fixture
def told(data_dir: Path, templates: Path) -> Iterator[Store]:
    shutil.copytree(templates / "told", data_dir)
    with Store.open(data_dir) as store:
        yield store


@pytest.fixture
def empty(data_dir: Path, templates: Path) -> Iterator[Store]:
    shutil.copytree(templates / "empty", data_dir)
    with Store.open(data_dir) as store:
        yield store


@pytest.fixture
def served(data_dir: Path) -> Iterator[Callable[..., list[Any]]]:
    """Starts a daemon's API on the folder; gives the list of wishes that reached it."""
    servers: list[DaemonServer] = []

    def start(answer: str = "Done.", **status: Any) -> list[Any]:
        asked: list[Any] = []

        def wish(*what: Any) -> "Future[str]":
            asked.append(what)
            promise: Future[str] = Future()
            promise.set_result(answer)
            return promise

        said = {"doing": "Learning, 30 s more.", "mode": "approve", "engine": "ready", **status}
        servers.append(DaemonServer(data_dir, 0, lambda: said, wish))
        servers[-1].start()
        deadline = time.monotonic() + 10
        while not daemon.status_of(data_dir).is_running and time.monotonic() < deadline:
            time.sleep(0.02)
        return asked

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def opened(data_dir: Path) -> Callable[..., AppTest]:
    """Runs a page; every test of a page is also a test that no traceback stands on it."""

    def run(name: str, **query: str) -> AppTest:
        app = AppTest.from_file(str(APP), default_timeout=60)
        app.query_params.update(query)
        app.run()
        if name != "overview":
            app.switch_page(f"views/{name}.py")
            app.query_params.update(query)
            app.run()
        assert [one.value for one in app.exception] == []
        return app

    return run


def text_of(app: AppTest) -> str:
    """All words on a page."""
    kinds = ("title", "subheader", "markdown", "caption", "info", "warning", "error", "success", "code")
    words = [str(one.value) for kind in kinds for one in getattr(app, kind)]
    words += [f"{one.label} {one.value}" for one in app.metric]
    words += [one.proto.text for one in app.get("progress")]
    return "\n".join(words).replace("\\", "").replace("\u2060", "")
