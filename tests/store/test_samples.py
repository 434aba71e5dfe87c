import math

import pytest

from store import queries
from store.database import Store
from store.metrics import CPU_UTIL_RATIO, ERRORS_TOTAL, TTFT_S
from store.samples import DAY_S, HOUR_S, Retention, let_age, save_forecasts, save_samples
from store.tables import Forecast, RequestTiming, RuntimeEvent, Sample, Step

NOW = 1_790_000_040.0  # a whole minute
OLD = NOW - DAY_S - 2 * HOUR_S


def fill(store: Store, since: float, num: int, config_id: str | None = "c") -> None:
    """One sample a second of a gauge and of a counter."""
    with store.metrics() as session:
        save_samples(
            session, (Sample(CPU_UTIL_RATIO, "all", since + n, n % 60, config_id) for n in range(num))
        )
        save_samples(session, (Sample(ERRORS_TOTAL, "timeout", since + n, n, config_id) for n in range(num)))


def test_a_sample_takes_the_place_of_one_of_the_same_time(store: Store) -> None:
    with store.metrics() as session:
        assert save_samples(session, [Sample(TTFT_S, "p50", 1.0, 0.5), Sample(TTFT_S, "p50", 1.0, 0.7)]) == 2
    with store.metrics() as session:
        assert [point.value for point in queries.samples(session, TTFT_S, "p50", 0.0, 9.0)] == [0.7]


def test_a_measurement_that_failed_is_absent(store: Store) -> None:
    with store.metrics() as session:
        values = (math.nan, math.inf, -math.inf, 0.0)
        assert (
            save_samples(
                session, [Sample(TTFT_S, "p50", float(at), value) for at, value in enumerate(values)]
            )
            == 1
        )
        assert save_samples(session, []) == 0
        save_forecasts(session, [])
    with store.metrics() as session:
        assert [point.value for point in queries.samples(session, TTFT_S, "p50", 0.0, 9.0)] == [0.0]


def test_old_samples_become_one_a_minute_the_mean_of_a_gauge_and_the_end_of_a_counter(store: Store) -> None:
    start = math.floor(OLD / 60) * 60
    fill(store, start, 180)
    fill(store, NOW - 10, 5)
    with store.metrics() as session:
        let_age(session, NOW)
        let_age(session, NOW)  # thinning what is thin changes nothing
        gauge = queries.samples(session, CPU_UTIL_RATIO, "all", 0.0, NOW - HOUR_S)
        counter = queries.samples(session, ERRORS_TOTAL, "timeout", 0.0, NOW - HOUR_S)
        recent = queries.samples(session, CPU_UTIL_RATIO, "all", NOW - HOUR_S, NOW)
    assert gauge == [(start, 29.5, "c"), (start + 60, 29.5, "c"), (start + 120, 29.5, "c")]
    assert [point.value for point in counter] == [59, 119, 179]
    assert len(recent) == 5


def test_only_whole_minutes_are_thinned_so_that_none_is_averaged_twice(store: Store) -> None:
    edge = NOW - DAY_S
    fill(store, edge - 60, 120)
    with store.metrics() as session:
        let_age(session, NOW + 30)  # the raw samples end in the middle of a minute
        after_half = queries.samples(session, CPU_UTIL_RATIO, "all", 0.0, NOW)
        let_age(session, NOW + 60)
        after_whole = queries.samples(session, CPU_UTIL_RATIO, "all", 0.0, NOW)
    assert len(after_half) == 61
    assert [point.value for point in after_whole] == [29.5, 29.5]


def test_a_minute_of_two_configurations_belongs_to_neither(store: Store) -> None:
    start = math.floor(OLD / 60) * 60
    fill(store, start, 30, "c")
    fill(store, start + 30, 30, "d")
    with store.metrics() as session:
        let_age(session, NOW)
        assert [point.config_id for point in queries.samples(session, CPU_UTIL_RATIO, "all", 0.0, NOW)] == [
            None
        ]


def test_what_is_too_old_is_deleted_and_its_room_given_back(store: Store) -> None:
    def step(seq: int, at: float) -> Step:
        return Step("b", seq, at, 0.1, 0.1, 1, 0, 0, 1, 1, 1, 0, 1, 1, "c")

    keep = Retention()
    fill(store, NOW - keep.samples_s - HOUR_S, 60)
    with store.metrics() as session:
        session.add_all(step(seq, NOW - keep.steps_s - 1.0) for seq in range(2000))
        session.add(step(9999, NOW - keep.steps_s + 1.0))
        for seq, at in enumerate((NOW - keep.timings_s - 1.0, NOW - keep.timings_s + 1.0)):
            session.add(RequestTiming("b", seq, "r", at, at + 1.0, 1, 1, "stop"))
        session.add(RuntimeEvent("b", 1, NOW - keep.samples_s - 1.0, "old", {}))
        session.add(Forecast(TTFT_S, NOW - keep.samples_s - 1.0, 0.0, 1.0, 1.0, 1.0))
    pages = store_pages(store)
    with store.metrics() as session:
        let_age(session, NOW)
    with store.metrics() as session:
        assert (
            session.query(Sample).count()
            == session.query(RuntimeEvent).count()
            == session.query(Forecast).count()
            == 0
        )
        assert session.query(Step).one().seq == 9999
        assert session.query(RequestTiming).one().seq == 1
    assert store_pages(store) < pages / 2


def store_pages(store: Store) -> int:
    with store.metrics() as session:
        return int(session.connection().exec_driver_sql("PRAGMA page_count").scalar_one())


@pytest.mark.parametrize("bin_s", [1.0, 10.0, 60.0, 0.7])
def test_thinning_keeps_the_mean_whatever_the_bin(store: Store, bin_s: float) -> None:
    start = math.ceil((NOW - DAY_S - HOUR_S) / 420) * 420.0
    fill(store, start, 420)
    with store.metrics() as session:
        let_age(session, NOW, Retention(bin_s=bin_s))
        found = queries.samples(session, CPU_UTIL_RATIO, "all", 0.0, NOW)
    assert math.fsum(point.value for point in found) / len(found) == pytest.approx(29.5, rel=1e-9)
