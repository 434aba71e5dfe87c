from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from store.database import Store
from store.metrics import CPU_UTIL_RATIO, METRICS, TTFT_S
from store.retention import DAY_S, MIN_KEPT_S, Retention, Upkeep, all_series, live_bytes
from store.rollups import SeriesKey
from store.samples import save_samples
from store.tables import Forecast, Note, RequestTiming, RuntimeEvent, Sample, SampleRollup, Step

NOW = 1_790_002_800.0  # a whole hour


def upkeep_of(store: Store, **kept: float) -> Upkeep:
    return Upkeep(store.metrics, Retention(**kept), store.data_dir / "journal.db")  # type: ignore[arg-type]


def fill(store: Store, since: float, num: int, step_s: float = 60.0, metric: str = CPU_UTIL_RATIO) -> None:
    with store.metrics() as session:
        save_samples(session, (Sample(metric, "all", since + step_s * n, 1.0, "c") for n in range(num)))


def step(seq: int, at: float) -> Step:
    return Step("b", seq, at, 0.1, 0.1, 1, 0, 0, 1, 1, 1, 0, 1, 1, "c")


def count(store: Store, noun: Any, *where: Any) -> int:
    with store.metrics() as session:
        return int(session.query(noun).where(*where).count())


def test_samples_become_minutes_and_minutes_hours_as_they_grow_old(store: Store) -> None:
    fill(store, NOW - 30 * DAY_S, 30 * 24 * 6, step_s=600.0)
    upkeep_of(store).finish(NOW)
    assert count(store, Sample) == count(store, Sample, Sample.at >= NOW - DAY_S) == 144
    minutes = SampleRollup.bin_s == 60
    assert count(store, SampleRollup, minutes) == count(
        store, SampleRollup, minutes, SampleRollup.at >= NOW - 14 * DAY_S
    )
    assert count(store, SampleRollup, minutes) == 14 * 144
    assert count(store, SampleRollup, SampleRollup.bin_s == 3600) == 30 * 24 - 1, (
        "the last hour waits for late ones"
    )


def test_hours_go_after_400_days(store: Store) -> None:
    fill(store, NOW - 402 * DAY_S, 5 * 24, step_s=3600.0)
    upkeep_of(store).finish(NOW)
    assert count(store, SampleRollup, SampleRollup.bin_s == 3600) == 3 * 24


def test_nothing_is_forgotten_before_it_is_rolled_up(store: Store) -> None:
    """An Upkeep that has time for one chore only must not delete what no bin holds."""
    fill(store, NOW - 4 * DAY_S, 4 * 24, step_s=3600.0)
    upkeep = upkeep_of(store)
    for second in range(200):
        upkeep.step(NOW + second, budget_s=0.0)
        with store.metrics() as session:
            held = {row.at for row in session.query(Sample)} | {row.at for row in session.query(SampleRollup)}
        assert len(held) == 4 * 24
    assert count(store, Sample) <= 24


def test_old_steps_timings_events_and_forecasts_go_and_their_room_is_given_back(store: Store) -> None:
    keep = Retention()
    with store.metrics() as session:
        session.add_all(step(seq, NOW - keep.steps_s - 1.0) for seq in range(5000))
        session.add(step(9999, NOW - keep.steps_s + 1.0))
        for seq, at in enumerate((NOW - keep.timings_s - 1.0, NOW - keep.timings_s + 1.0)):
            session.add(RequestTiming("b", seq, "r", at, at + 1.0, 1, 1, "stop"))
        session.add(RuntimeEvent("b", 1, NOW - keep.minutes_s - 1.0, "old", {}))
        session.add(Forecast(TTFT_S, NOW - keep.minutes_s - 1.0, 0.0, 1.0, 1.0, 1.0))
        session.flush()
        pages = session.connection().exec_driver_sql("PRAGMA page_count").scalar_one()
    upkeep_of(store).finish(NOW)
    with store.metrics() as session:
        assert session.query(RuntimeEvent).count() == session.query(Forecast).count() == 0
        assert session.query(Step).one().seq == 9999
        assert session.query(RequestTiming).one().seq == 1
        assert session.connection().exec_driver_sql("PRAGMA page_count").scalar_one() < pages / 2


def test_a_tick_does_a_slice_and_the_next_goes_on(store: Store) -> None:
    for name in list(METRICS)[:20]:
        fill(store, NOW - 610, 10, metric=name)
    clock = iter(range(10_000))
    upkeep = Upkeep(store.metrics, Retention(), timer=lambda: float(next(clock)))
    upkeep.step(NOW, budget_s=5.0)
    after_one = count(store, SampleRollup)
    upkeep.step(NOW + 1, budget_s=5.0)
    assert 0 < after_one < count(store, SampleRollup) < 200
    for second in range(2, 30):
        upkeep.step(NOW + second, budget_s=5.0)
    assert count(store, SampleRollup) == 200


def test_between_rounds_nothing_is_opened(store: Store) -> None:
    opened = []

    @contextmanager
    def counted() -> Iterator[Any]:
        opened.append(1)
        with store.metrics() as session:
            yield session

    upkeep = Upkeep(counted, Retention())
    upkeep.finish(NOW)
    num_opened = len(opened)
    for second in range(1, 60):
        upkeep.step(NOW + second)
    assert len(opened) == num_opened
    upkeep.step(NOW + 60)
    assert len(opened) > num_opened
    upkeep.finish(NOW + 60)
    num_opened = len(opened)
    upkeep.step(NOW - 5000)
    assert len(opened) > num_opened, "a clock that went back must not stop it for as long as it went back"


def test_series_of_undeclared_metrics_age_too(store: Store) -> None:
    fill(store, NOW - 3 * DAY_S, 24, step_s=3600.0, metric="of_an_older_version")
    with store.metrics() as session:
        assert all_series(session) == [SeriesKey("of_an_older_version", "all")]
    upkeep_of(store).finish(NOW)
    assert count(store, Sample) == 0
    with store.metrics() as session:
        assert all_series(session) == [SeriesKey("of_an_older_version", "all")]


# --- the cap ----------------------------------------------------------------------------------------


@pytest.fixture
def full(store: Store) -> Store:
    """Ten hours of samples and steps, five days of minutes, and a journal."""
    for name in list(METRICS)[:10]:
        fill(store, NOW - 10 * 3600.0, 3600, step_s=10.0, metric=name)
    with store.metrics() as session:
        session.add_all(step(seq, NOW - 36000.0 + 10 * seq) for seq in range(3600))
        session.add_all(
            SampleRollup(TTFT_S, "p95", 60, NOW - 5 * DAY_S + 60.0 * n, 60, 1.0, 0.0, 2.0)
            for n in range(7200)
        )
    with store.journal() as session:
        session.add_all(Note(NOW, "test", "x" * 900) for _ in range(200))
    return store


def size_of(store: Store) -> int:
    with store.metrics() as session:
        return live_bytes(session) + (store.data_dir / "journal.db").stat().st_size


def rounds(upkeep: Upkeep, num: int) -> list[str]:
    """As many rounds, a minute apart by the clock of the store that stands still."""
    told = []
    for _ in range(num):
        upkeep._round_at = -1e18
        line = upkeep.step(NOW, 1e9)
        told += [line] if line else []
    return told


def test_over_its_cap_the_oldest_raw_samples_go_first_and_it_is_said_once(full: Store) -> None:
    cap = size_of(full) - 400_000
    upkeep = upkeep_of(full, max_bytes=cap)
    told = rounds(upkeep, 12)
    assert size_of(full) <= cap
    assert len(told) == 1
    assert (
        "more than `keep.max_bytes`" in told[0] and "The oldest raw samples go before their time." in told[0]
    )
    assert count(full, Sample, Sample.at < NOW - MIN_KEPT_S) > 0
    assert count(full, Step) == 3600
    assert count(full, SampleRollup, SampleRollup.metric == TTFT_S, SampleRollup.bin_s == 60) == 7200


def test_under_a_tiny_cap_all_goes_but_the_last_hour_and_the_decisions(full: Store) -> None:
    told = rounds(upkeep_of(full, max_bytes=100_000), 60)
    assert count(full, Sample, Sample.at < NOW - MIN_KEPT_S - 60) == 0
    assert count(full, Sample) > 0
    assert count(full, Step, Step.at < NOW - MIN_KEPT_S) == 0
    assert count(full, Step) == 360
    assert count(full, SampleRollup, SampleRollup.bin_s == 60, SampleRollup.at < NOW - 2 * 3600) == 0
    with full.journal() as session:
        assert session.query(Note).count() == 200
    assert len(told) == 1


def test_with_room_again_metrics_are_kept_as_long_as_asked(full: Store) -> None:
    upkeep = upkeep_of(full, max_bytes=size_of(full) - 400_000)
    rounds(upkeep, 12)
    assert upkeep.kept.raw_s < upkeep.asked.raw_s
    with full.metrics() as session:
        session.query(Sample).delete()
        session.query(SampleRollup).delete()
    told = rounds(upkeep, 20)
    assert upkeep.kept == upkeep.asked
    assert told == ["The store has room again: metrics are kept as long as the settings say."]


def test_a_disk_that_others_fill_is_a_cap_too(full: Store) -> None:
    upkeep = upkeep_of(full)
    assert rounds(upkeep, 3) == [] and upkeep.kept == upkeep.asked
    upkeep._round_at = -1e18
    told = upkeep.step(NOW, 1e9, spare_bytes=-1.0)
    assert told is not None and "more than its disk has room for. The oldest raw samples go" in told
    assert upkeep.kept.raw_s < 10 * 3600
    upkeep._round_at = -1e18
    assert upkeep.step(NOW, 1e9, spare_bytes=-1.0) is None, "it is said once"
