"""The store is locked, damaged, or its disk is full: serving goes on, and it is said why nothing is tuned."""

import os
import random
import shutil
import time

import pytest
from sqlalchemy import func, select

from store.connection import sqlite_library
from store.database import StoreReader
from store.tables import Anomaly, Experiment, Sample
from tests.end_to_end.accounts import read_ledger, settle
from tests.end_to_end.deployment import Deployment
from tests.end_to_end.kill_matrix import Matrix, store_breaches, stored_ids
from tuner.settings import load_settings

pytestmark = pytest.mark.slow
MARGIN_BYTES = 300_000_000  # others write to this disk too


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    # Room is back at 1.2 times the limit, so that much must be free now; the test takes it away for a while.
    limit = max(1_000_000, int((shutil.disk_usage(folder).free - MARGIN_BYTES) / 1.25))
    one = Deployment(folder, f"keep: {{min_free_bytes: {limit}}}\n")
    yield one
    one.clear()


@pytest.fixture(scope="module")
def matrix(site):
    one = Matrix(site, 2.0, random.Random(3))
    yield one
    one.close()


@pytest.fixture
def under_load(matrix, request):
    """The deployment under load; afterwards every request must have been answered, and stand in the store once."""
    site, book = matrix.site, matrix.site.folder / f"{request.node.name}.jsonl"
    book.write_text("")
    matrix._up()
    began_at = time.time()
    matrix._begin(book)
    yield site
    matrix._end()
    time.sleep(5.0)
    accounts = settle(read_ledger(book), stored_ids(site.data_dir, began_at), frozenset(), [], 0.0)
    assert accounts.num_ok > 0
    assert (accounts.lost, accounts.not_allowed, accounts.missing, accounts.doubled) == ([], [], [], [])
    assert store_breaches(site.data_dir, []) == []


def newest_sample_at(site: Deployment) -> float:
    with StoreReader(site.data_dir).metrics() as session:
        return float(session.scalar(select(func.max(Sample.at))) or 0.0)


def full_faults(site: Deployment) -> list[Anomaly]:
    with StoreReader(site.data_dir).journal() as session:
        return list(session.scalars(select(Anomaly).where(Anomaly.rule == "store_full")))


@pytest.mark.parametrize("name", ["metrics", "journal"])
def test_store_that_somebody_locks_for_a_while_is_written_afterwards(under_load, name):
    other = sqlite_library().module.connect(
        under_load.data_dir / f"{name}.db", isolation_level=None, timeout=30.0
    )
    other.execute("BEGIN IMMEDIATE")
    time.sleep(15.0)
    assert under_load.serves()
    other.execute("ROLLBACK")
    other.close()
    since_at = newest_sample_at(under_load)
    under_load.wait(lambda: newest_sample_at(under_load) > since_at + 5.0, "samples are written again", 90.0)
    under_load.wait(under_load.daemon_answers, "the daemon ticks", 60.0)


def test_disk_that_fills_up_stops_metrics_and_experiments_and_no_request(under_load):
    site, ballast = under_load, under_load.folder / "ballast"
    limit = load_settings(site.config, environ={}).keep.min_free_bytes
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(site.folder).free - limit + MARGIN_BYTES)
    try:
        site.wait(
            lambda: any(one.ended_at is None for one in full_faults(site)), "the full disk is noticed", 60.0
        )
        fault = full_faults(site)[-1]
        assert fault.kind == "fault" and "keep.min_free_bytes" in fault.reason
        time.sleep(3.0)
        stopped_at = newest_sample_at(site)
        time.sleep(8.0)
        assert newest_sample_at(site) == stopped_at and site.serves()
        with StoreReader(site.data_dir).journal() as session:
            opened = select(Experiment).where(Experiment.created_at > fault.started_at + 2.0)
            assert session.scalars(opened).all() == []
    finally:
        ballast.unlink()
    site.wait(lambda: all(one.ended_at is not None for one in full_faults(site)), "room is noticed", 60.0)
    site.wait(lambda: newest_sample_at(site) > stopped_at, "samples are written again", 60.0)


def test_damaged_journal_is_set_aside_and_the_champion_goes_on_serving(matrix):
    site = matrix.site
    matrix._up()
    site.wait(site.is_champion_in_force, "the champion serves")
    served = site.state()["champion_config_id"]
    site.stop()
    journal = site.data_dir / "journal.db"
    damaged = bytearray(journal.read_bytes())
    for at in range(4096, len(damaged), 4096):
        damaged[at : at + 64] = b"\xff" * 64
    journal.write_bytes(damaged)

    matrix._up()
    site.wait(site.is_champion_in_force, "the champion serves again")
    assert site.state()["champion_config_id"] == served  # as the plain file says, whatever the journal lost
    told = (site.data_dir / "daemon.log").read_text()
    assert "journal.db could not be used" in told and "It was kept as" in told
    assert [
        path
        for path in site.data_dir.iterdir()
        if path.name.startswith("journal.db.") and path.name != "journal.db-wal"
    ]
    assert store_breaches(site.data_dir, []) == []
