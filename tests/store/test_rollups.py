import math
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from store import queries
from store.database import Store
from store.metrics import CPU_UTIL_RATIO, ERRORS_TOTAL, TTFT_S
from store.rollups import HOUR_S, LATE_S, MINUTE_S, SeriesKey, roll_up, rolled_up_until
from store.samples import save_forecasts, save_samples
from store.series import TIERS, WIDTHS_S, width_for
from store.tables import Forecast, Sample, SampleRollup

NOW = 1_790_002_800.0  # a whole hour
CPU = SeriesKey(CPU_UTIL_RATIO, "all")


def fill(store: Store, since: float, num: int, config_id: str | None = "c", step_s: float = 1.0) -> None:
    with store.metrics() as session:
        save_samples(
            session,
            (Sample(CPU_UTIL_RATIO, "all", since + step_s * n, n % 60, config_id) for n in range(num)),
        )


def bins(store: Store, bin_s: int) -> list[tuple[float, int, float, float, float]]:
    with store.metrics() as session:
        rows = session.query(SampleRollup).where(SampleRollup.bin_s == bin_s).order_by(SampleRollup.at)
        return [(row.at, row.num_samples, row.mean, row.low, row.high) for row in rows]


def test_a_sample_takes_the_place_of_one_of_the_same_time(store: Store) -> None:
    with store.metrics() as session:
        assert save_samples(session, [Sample(TTFT_S, "p50", 1.0, 0.5), Sample(TTFT_S, "p50", 1.0, 0.7)]) == 2
    with store.metrics() as session:
        assert [point.value for point in queries.samples(session, TTFT_S, "p50", 0.0, 9.0)] == [0.7]


def test_a_measurement_that_failed_is_absent(store: Store) -> None:
    with store.metrics() as session:
        values = (math.nan, math.inf, -math.inf, 0.0)
        samples = [Sample(TTFT_S, "p50", float(at), value) for at, value in enumerate(values)]
        assert save_samples(session, samples) == 1
        assert save_samples(session, []) == 0
        save_forecasts(session, [])
        save_forecasts(session, [Forecast(TTFT_S, 1.0, 0.0, 1.0, 0.5, 2.0)])
    with store.metrics() as session:
        assert [point.value for point in queries.samples(session, TTFT_S, "p50", 0.0, 9.0)] == [0.0]
        assert [row.high for row in queries.forecasts(session, TTFT_S, 0.0, 9.0)] == [2.0]


def test_each_minute_that_is_over_becomes_one_bin_and_no_sample_is_lost(store: Store) -> None:
    fill(store, NOW, 150)
    with store.metrics() as session:
        assert roll_up(session, CPU, MINUTE_S, NOW + 150) is False
        assert roll_up(session, CPU, MINUTE_S, NOW + 150) is False
    assert bins(store, MINUTE_S) == [(NOW, 60, 29.5, 0.0, 59.0), (NOW + 60, 60, 29.5, 0.0, 59.0)]
    with store.metrics() as session:
        assert session.query(Sample).count() == 150


def test_a_minute_waits_for_samples_that_are_written_late(store: Store) -> None:
    fill(store, NOW, 55)
    with store.metrics() as session:
        roll_up(session, CPU, MINUTE_S, NOW + 60 + LATE_S - 0.1)
    assert bins(store, MINUTE_S) == []
    fill(store, NOW, 60)
    with store.metrics() as session:
        roll_up(session, CPU, MINUTE_S, NOW + 60 + LATE_S)
    assert bins(store, MINUTE_S) == [(NOW, 60, 29.5, 0.0, 59.0)]


def test_hours_weigh_minutes_by_their_samples(store: Store) -> None:
    with store.metrics() as session:
        save_samples(session, [Sample(CPU_UTIL_RATIO, "all", NOW + n, 1.0) for n in range(60)])
        save_samples(session, [Sample(CPU_UTIL_RATIO, "all", NOW + 60.0, 62.0)])
        for bin_s in (MINUTE_S, HOUR_S):
            roll_up(session, CPU, bin_s, NOW + HOUR_S + LATE_S)
    assert bins(store, HOUR_S) == [(NOW, 61, pytest.approx(2.0), 1.0, 62.0)]


def test_a_minute_of_two_configurations_belongs_to_neither(store: Store) -> None:
    fill(store, NOW, 30, "c")
    fill(store, NOW + 30, 30, "d")
    fill(store, NOW + 60, 60, "d")
    fill(store, NOW + 120, 30, "d")
    fill(store, NOW + 150, 30, None)
    with store.metrics() as session:
        roll_up(session, CPU, MINUTE_S, NOW + 300)
        rows = session.query(SampleRollup).order_by(SampleRollup.at)
        assert [row.config_id for row in rows] == [None, "d", None]


def test_a_long_past_is_rolled_up_a_slice_a_call_and_gaps_cost_nothing(store: Store) -> None:
    for hour in (0, 1, 2, 500):
        fill(store, NOW + hour * 3600.0, 60, step_s=60.0)
    num_calls = 0
    with store.metrics() as session:
        while roll_up(session, CPU, MINUTE_S, NOW + 600 * 3600.0):
            num_calls += 1
    assert len(bins(store, MINUTE_S)) == 240
    assert 1 <= num_calls <= 4


def test_a_clock_that_once_stood_in_the_future_stops_nothing(store: Store) -> None:
    fill(store, NOW + 1e7, 120)
    with store.metrics() as session:
        roll_up(session, CPU, MINUTE_S, NOW + 1e7 + 300)
    fill(store, NOW, 120)
    with store.metrics() as session:
        roll_up(session, CPU, MINUTE_S, NOW + 300)
        assert rolled_up_until(session, CPU, MINUTE_S, NOW + 300) == NOW + 120


def test_series_are_rolled_up_apart(store: Store) -> None:
    fill(store, NOW, 60)
    with store.metrics() as session:
        save_samples(session, [Sample(ERRORS_TOTAL, "timeout", NOW + n, n) for n in range(60)])
        roll_up(session, SeriesKey(ERRORS_TOTAL, "timeout"), MINUTE_S, NOW + 90)
        assert {row.metric for row in session.query(SampleRollup)} == {"errors_total"}


# --- reading at the right resolution ----------------------------------------------------------------


@pytest.fixture
def aged(store: Store) -> Store:
    """Ten days that end at NOW: hours throughout, minutes of the last two days, samples (10 s) of the last hour."""
    with store.metrics() as session:
        for hour in range(240):
            at = NOW - (240 - hour) * 3600.0
            session.add(SampleRollup(CPU_UTIL_RATIO, "all", HOUR_S, at, 3600, 5.0, 1.0, 9.0, "c"))
        for minute in range(2880):
            at = NOW - (2880 - minute) * 60.0
            session.add(SampleRollup(CPU_UTIL_RATIO, "all", MINUTE_S, at, 60, 5.0, 1.0, 9.0, "c"))
        save_samples(session, [Sample(CPU_UTIL_RATIO, "all", NOW - 3600 + 10 * n, 5.0) for n in range(361)])
    return store


@pytest.mark.parametrize(
    ("span_s", "max_points", "width_s"),
    [
        (120, 300, 1),
        (3600, 400, 10),
        (3600, 60, 120),
        (86400, 300, 300),
        (10 * 86400, 300, 3600),
        (1e9, 10, None),
    ],
)
def test_width_follows_the_span(span_s: float, max_points: int, width_s: float | None) -> None:
    found = width_for(span_s, max_points)
    assert found * (max_points - 1) >= span_s
    assert width_s is None or found == width_s
    assert found < 60 or found % 60 == 0
    assert found < 3600 or found % 3600 == 0


def test_widths_hold_whole_bins_of_every_tier() -> None:
    assert all(width % tier == 0 for width in WIDTHS_S for tier in TIERS if 0 < tier <= width)


def test_a_day_is_read_from_minutes_and_ends_with_the_newest_samples(aged: Store) -> None:
    with aged.metrics() as session:
        found = queries.series(session, CPU_UTIL_RATIO, "all", NOW - 86400, NOW + 1, 300)
    assert found.width_s == 300
    assert [one.at for one in found.bins] == [NOW - 86400 + 300 * n for n in range(289)]
    assert {one.num for one in found.bins[:-1]} == {300}
    assert found.bins[-1] == (NOW, 5.0, 5.0, 5.0, 1), "not rolled up yet, so it comes from the samples"


def test_what_is_too_old_for_the_wanted_resolution_comes_coarser(aged: Store) -> None:
    with aged.metrics() as session:
        found = queries.series(session, CPU_UTIL_RATIO, "all", NOW - 5400, NOW, 1000)
        old = queries.series(session, CPU_UTIL_RATIO, "all", NOW - 4 * 86400, NOW - 4 * 86400 + 7200, 1000)
    assert found.width_s == 10
    ats = [one.at for one in found.bins]
    assert ats == sorted(ats)
    assert ats[:30] == [NOW - 5400 + 60 * n for n in range(30)]
    assert ats[30:] == [NOW - 3600 + 10 * n for n in range(360)]
    assert [one.at for one in old.bins] == [NOW - 4 * 86400, NOW - 4 * 86400 + 3600]


def test_ranges_without_samples_are_empty(aged: Store) -> None:
    with aged.metrics() as session:
        for metric, label, t0, t1 in (
            (CPU_UTIL_RATIO, "all", 0.0, 10.0),
            (CPU_UTIL_RATIO, "all", NOW + 100, NOW + 200),
            (CPU_UTIL_RATIO, "7", NOW - 100, NOW),
            ("no_such_metric", "", NOW - 100, NOW),
        ):
            assert queries.series(session, metric, label, t0, t1).bins == ()


@pytest.mark.parametrize(("t0", "t1"), [(5.0, 5.0), (6.0, 5.0), (math.nan, 5.0), (0.0, math.inf)])
def test_refuses_a_range_that_is_none(store: Store, t0: float, t1: float) -> None:
    with (
        store.metrics() as session,
        pytest.raises(ValueError, match="must be finite and end after its start"),
    ):
        queries.series(session, CPU_UTIL_RATIO, "all", t0, t1)


def test_refuses_fewer_than_two_points(store: Store) -> None:
    with store.metrics() as session, pytest.raises(ValueError, match="at least 2, but got 1"):
        queries.series(session, CPU_UTIL_RATIO, "all", 0.0, 1.0, 1)


def test_labels_of_old_bins_are_known(aged: Store) -> None:
    with aged.metrics() as session:
        session.add(SampleRollup(CPU_UTIL_RATIO, "7", HOUR_S, NOW - 9e6, 3600, 5.0, 1.0, 9.0))
        session.flush()
        assert queries.labels_of(session, CPU_UTIL_RATIO) == ["7", "all"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_range_holds_every_sample_once_with_its_mean_low_and_high(
    store: Store, data: st.DataObject
) -> None:
    """Whatever was rolled up and forgotten so far: counts and means over whole hours are those of the samples."""
    rng = random.Random(data.draw(st.integers(0, 2**16)))
    values = {NOW + 20.0 * n: rng.gauss(0, 1) for n in range(540) if rng.random() < 0.8}  # three hours
    rolled = data.draw(st.floats(0, 4 * 3600))
    forgotten = data.draw(st.floats(0, 4 * 3600))
    max_points = data.draw(st.integers(2, 2000))
    with store.metrics() as session:
        session.query(Sample).delete()
        session.query(SampleRollup).delete()
        save_samples(session, [Sample(CPU_UTIL_RATIO, "all", at, value) for at, value in values.items()])
        for bin_s in (MINUTE_S, HOUR_S):
            while roll_up(session, CPU, bin_s, NOW + rolled):
                pass
        gone = min(NOW + forgotten // 60 * 60, rolled_up_until(session, CPU, MINUTE_S))
        session.query(Sample).where(Sample.at < gone).delete()
        session.flush()
        found = queries.series(session, CPU_UTIL_RATIO, "all", NOW, NOW + 3 * 3600, max_points).bins
    assert sum(one.num for one in found) == len(values)
    mean = math.fsum(one.mean * one.num for one in found) / len(values)
    assert mean == pytest.approx(math.fsum(values.values()) / len(values), abs=1e-9)
    assert min(one.low for one in found) == min(values.values())
    assert max(one.high for one in found) == max(values.values())
    assert len(found) <= max(max_points, 3 * 60 + 3)
