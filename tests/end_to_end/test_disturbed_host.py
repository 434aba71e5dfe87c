"""What a host does to its processes: its clock is set, some or all of them stand still for a while.

Expected each time: no request without an end, no row twice, no negative latency, no pair scored over the disturbance,
the champion in force, and a loop that goes on.
"""

import os
import random
import signal
import time
from collections.abc import Callable

import psutil
import pytest
from sqlalchemy import select

from store.database import StoreReader
from store.tables import Anomaly, RequestTiming, Slice
from tests.end_to_end.accounts import read_ledger, settle
from tests.end_to_end.deployment import Deployment
from tests.end_to_end.kill_matrix import Matrix, store_breaches, stored_ids
from tests.servers import ROOT

pytestmark = pytest.mark.slow
STILL_S = 20.0
SLICE_S, LEASE_S = 8.0, 5.0


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disturbed")
    one = Deployment(folder, slice_s=SLICE_S)
    one.environment = {
        "PYTHONPATH": f"{ROOT / 'tests' / 'end_to_end' / 'stepped_clock'}{os.pathsep}{ROOT}",
        "TUNER_TEST_CLOCK_FILE": str(folder / "clock"),
    }
    yield one
    one.clear()


@pytest.fixture(scope="module")
def matrix(site):
    one = Matrix(site, 2.0, random.Random(2))
    yield one
    one.close()


def in_a_slice(site: Deployment) -> None:
    """Waits for a slice of a pair that goes on for longer than a lease lasts."""

    def found() -> bool:
        state = site.state()
        if state is None or state["slice_id"] is None:
            return False
        with StoreReader(site.data_dir).journal() as session:
            row = session.get(Slice, state["slice_id"])
            if row is None:
                return False
            pair = select(Slice).where(
                Slice.experiment_id == row.experiment_id, Slice.pair_index == row.pair_index
            )
            return max(one.planned_end_at for one in session.scalars(pair)) > state["now"] + LEASE_S + 3.0

    site.wait(found, "a slice runs")


def disturbed(matrix: Matrix, name: str, disturb: Callable[[Deployment], None]) -> tuple[float, float]:
    """Disturbs in the middle of a pair, under load; checks what must hold for every disturbance. Returns the span."""
    site, book = matrix.site, matrix.site.folder / f"{name}.jsonl"
    book.write_text("")
    matrix._up()
    began_at = time.time()
    matrix._begin(book)
    in_a_slice(site)
    span_from = site.state()["now"]
    disturb(site)
    site.wait(lambda: site.daemon_answers() and site.serves() and site.is_champion_in_force(), "well again")
    span = (span_from, site.state()["now"])
    site.wait(lambda: num_scored_after(site, span[1]) > 0, "a pair is scored again")
    matrix._end()
    time.sleep(5.0)
    accounts = settle(read_ledger(book), stored_ids(site.data_dir, began_at), frozenset(), [], 0.0)
    assert (accounts.lost, accounts.not_allowed, accounts.missing, accounts.doubled) == ([], [], [], [])
    assert store_breaches(site.data_dir, []) == []
    with StoreReader(site.data_dir).metrics() as session:
        for row in session.scalars(select(RequestTiming).where(RequestTiming.finish_reason == "length")):
            assert row.arrived_at <= row.first_token_at <= row.finished_at <= row.arrived_at + 120.0
    return span


def slices_over(site: Deployment, span: tuple[float, float]) -> list[Slice]:
    with StoreReader(site.data_dir).journal() as session:
        over = select(Slice).where(Slice.planned_start_at <= span[1], Slice.planned_end_at >= span[0])
        return list(session.scalars(over))


def num_scored_after(site: Deployment, at: float) -> int:
    with StoreReader(site.data_dir).journal() as session:
        scored = select(Slice).where(Slice.state == "SCORED", Slice.planned_start_at > at)
        return len(session.scalars(scored).all())


def faults(site: Deployment, rule: str) -> list[Anomaly]:
    with StoreReader(site.data_dir).journal() as session:
        return list(session.scalars(select(Anomaly).where(Anomaly.rule == rule)))


@pytest.mark.parametrize("step_s", [3600.0, -3600.0])
def test_clock_that_is_set_by_an_hour_voids_the_pair_and_bends_no_latency(matrix, step_s):
    def step(site: Deployment) -> None:
        path = site.folder / "clock"
        before = float(path.read_text()) if path.exists() else 0.0
        path.write_text(str(before + step_s))
        site.wait(lambda: len(faults(site, "clock_step")) > known, "the step is noticed", 60.0)

    known = len(faults(matrix.site, "clock_step")) if matrix.site.data_dir.exists() else 0
    span = disturbed(matrix, f"clock{step_s:+.0f}", step)
    fault = faults(matrix.site, "clock_step")[-1]
    assert fault.kind == "fault" and "clock" in fault.reason and abs(abs(fault.observed) - 3600.0) < 60.0
    void = [row for row in slices_over(matrix.site, (span[0], span[0])) if row.state == "VOID"]
    assert void and all("clock" in row.void_reason for row in void)


def stand_still(find: Callable[[Deployment], list[int]]) -> Callable[[Deployment], None]:
    def disturb(site: Deployment) -> None:
        pids = find(site)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(STILL_S)
        for pid in reversed(pids):
            os.kill(pid, signal.SIGCONT)

    return disturb


def everything(site: Deployment) -> list[int]:
    daemon, front_end = psutil.Process(site.daemon_pid()), psutil.Process(site.front_end_pid())
    return [one.pid for parent in (daemon, front_end) for one in (parent, *parent.children(recursive=True))]


@pytest.mark.parametrize(
    ("name", "find"),
    [
        ("daemon", lambda site: [site.daemon_pid()]),
        ("engine", lambda site: [site.engine_pid()]),
        ("everything", everything),
    ],
)
def test_processes_that_stood_still_score_no_pair_over_it(matrix, name, find):
    boot_id, engine = (state_of := matrix.site.state()) and state_of["boot_id"], matrix.site.engine_pid()
    span = disturbed(matrix, f"still-{name}", stand_still(find))
    over = slices_over(matrix.site, (span[0] + 1.0, span[0] + STILL_S - 1.0))
    assert over and all(row.state == "VOID" and row.void_reason for row in over)
    if boot_id is not None:  # what stood still is the same afterwards: nobody started a second one
        assert (matrix.site.state()["boot_id"], matrix.site.engine_pid()) == (boot_id, engine)
