"""Layer C: what the forecasting process makes of a series, and what becomes of it when it hangs or dies."""

import os
import signal
import sys
import time

import numpy as np
import pytest

from store.database import Store
from store.noticing import forecast_fits
from store.queries import forecasts
from tuner.notice.forecast import answer, fit, thinned
from tuner.notice.forecast_process import ForecastProcess
from tuner.notice.forecast_stage import ForecastRules, ForecastStage, learning_words, relevelled
from tuner.notice.statistics_stage import Band, BandPoint, State, StatisticsStage

DAY_S = 86400.0
RATE = ("requests_per_s", "")
T0 = 20_000 * DAY_S


def days(num, rng=None, noise=0.1):
    """Minutes of a metric whose day is a sine about 10."""
    rng = np.random.default_rng(1) if rng is None else rng
    at = T0 + 60.0 * np.arange(int(num * 1440))
    return at, 10.0 + 3.0 * np.sin(2 * np.pi * at / DAY_S) + noise * rng.standard_normal(len(at))


def asked(at, values, ahead, number=1, floor=0.01):
    arrays = {"at": at, "values": values, "ahead": ahead}
    return {
        "id": number,
        "floor": floor,
        **{name: np.asarray(x, "<f8").tobytes() for name, x in arrays.items()},
    }


# --- bad series (in this process; Prophet itself is asked in the child below) ------------------------


def test_constant_series_has_a_band_that_is_no_thread():
    at, _ = days(3)
    fitted = fit(at, np.full(len(at), 7.0), at[-1] + np.array([60.0, 120.0]), floor=0.01)
    assert fitted.expected.tolist() == [7.0, 7.0] and fitted.scale == 0.01


@pytest.mark.parametrize("values", [[], [1.0], [np.inf, np.nan, 3.0]])
def test_too_little_is_an_answer_with_its_reason(values):
    found = answer(asked(np.arange(len(values)), values, [1e5]))
    assert found["error"].startswith("ValueError: A forecast needs at least 2 finite values")


def test_long_past_is_thinned_and_its_gap_stays():
    at, values = days(7)
    keep = (at < T0 + 2 * DAY_S) | (at > T0 + 4 * DAY_S)
    thin_at, thin = thinned(at[keep], values[keep])
    assert len(thin_at) <= 2016 and len(thin) == len(thin_at)
    assert not ((thin_at > T0 + 2.1 * DAY_S) & (thin_at < T0 + 3.9 * DAY_S)).any()


def test_levels_of_former_champions_are_moved_to_the_present_one():
    at, values = days(3, noise=0.01)
    changed = T0 + 1.5 * DAY_S
    stepped = np.where(at < changed, values + 5.0, values)
    assert (
        np.abs(relevelled(at, stepped, [changed]) - values).max() < 0.6
    )  # half an hour of the slope of the day
    assert relevelled(at, values, [T0 - 1.0]).tolist() == values.tolist()


# --- the process ----------------------------------------------------------------------------------


def wait_for(process, limit_s=120.0):
    until = time.monotonic() + limit_s
    while (found := process.poll()) is None:
        assert time.monotonic() < until, "no answer"
        time.sleep(0.01)
    return found


@pytest.fixture(scope="module")
def process():
    one = ForecastProcess(timeout_s=120.0)
    yield one
    one.close()


def ask(process, values, at=None, ahead=None):
    at = days(len(values) / 1440)[0] if at is None else at
    ahead = at[-1] + 600.0 * np.arange(1, 10) if ahead is None else ahead
    process.submit(asked(at, values, ahead))
    found = wait_for(process)
    return found, (np.frombuffer(found["expected"], "<f8") if "expected" in found else None), ahead


def test_day_is_learnt_and_its_noise_is_the_scale(process):
    _, values = days(4)
    found, expected, ahead = ask(process, values)
    truth = 10.0 + 3.0 * np.sin(2 * np.pi * ahead / DAY_S)
    assert np.abs(expected - truth).max() < 0.1
    assert found["scale"] == pytest.approx(0.1, rel=0.2)


@pytest.mark.parametrize("poison", [1e12, np.inf, np.nan])
def test_one_impossible_value_bends_nothing(process, poison):
    _, values = days(4)
    values[100] = poison
    found, expected, ahead = ask(process, values)
    assert np.abs(expected - 10.0 - 3.0 * np.sin(2 * np.pi * ahead / DAY_S)).max() < 0.15
    assert found["scale"] < 0.2


def test_fits_leave_no_files_behind(process):
    _, values = days(3)
    ask(process, values)
    folder = process.child_folder
    assert [path for path in folder.rglob("*") if path.is_file()] == []
    assert os.getpriority(os.PRIO_PROCESS, process.pid) == 19


def test_killed_process_is_an_answer_and_the_next_one_is_new(process):
    _, values = days(3)
    ask(process, values)
    os.kill(process.pid, signal.SIGKILL)
    found, _, _ = ask(process, values)
    assert "ended" in found["error"]
    found, _, _ = ask(process, values)
    assert "error" not in found


HANGS = [sys.executable, "-c", "import sys, time; sys.stdin.buffer.read(4); time.sleep(600)"]


def test_hanging_process_is_ended_in_time_and_leaves_no_folder():
    process = ForecastProcess(timeout_s=0.5, command=HANGS)
    _, values = days(1)
    process.submit(asked(days(1)[0], values, [T0]))
    folder = None
    while process.is_busy and (found := process.poll()) is None:
        folder = process.child_folder or folder
        time.sleep(0.01)
    assert "not ready in time" in found["error"]
    assert folder is not None and not folder.exists()
    process.close()


# --- the stage ------------------------------------------------------------------------------------


class InProcess:
    """Answers at once, in this process, what a function says."""

    def __init__(self, reply):
        self.reply, self.is_busy, self.found, self.num = reply, False, None, 0

    def submit(self, request):
        self.is_busy, self.num, self.found = True, self.num + 1, self.reply(request)

    def poll(self):
        self.is_busy = self.found is None
        return self.found

    def close(self):
        pass


def fitted(request):
    num = len(request["ahead"]) // 8
    expected = np.full(num, 10.0).astype("<f8").tobytes()
    return {"id": request["id"], "expected": expected, "scale": 0.5, "num_points": 99, "fit_s": 0.1}


@pytest.fixture
def stage(tmp_path):
    with Store.open(tmp_path) as store:
        yield ForecastStage(store, StatisticsStage(), ForecastRules(), InProcess(fitted))


def rows(stage):
    with stage.store.metrics() as session:
        return {fit.metric: fit for fit in forecast_fits(session)}


def learn(stage, num_days, start=0.0):
    at, values = days(num_days)
    stage.statistics.remember(RATE, [], zip(at + start, values, strict=True))
    return float(at[-1] + start + 60.0)


def test_before_two_days_it_says_how_far_it_has_come(stage):
    now = learn(stage, 12 / 1440)
    stage.step(now)
    assert (rows(stage)["requests_per_s"].state, rows(stage)["requests_per_s"].reason) == (
        "LEARNING",
        "12 of 30 minutes",
    )
    assert learning_words(500, 5 * 3600.0, ForecastRules()) == "5 of 48 hours"
    assert stage.process.num == 0


def test_after_two_days_bands_are_written_that_reach_a_day_ahead(stage):
    now = learn(stage, 2.0)
    for _ in range(2):
        stage.step(now)
    fit = rows(stage)["requests_per_s"]
    assert (fit.state, fit.fitted_at, fit.residual_scale) == ("FITTED", now, 0.5)
    with stage.store.metrics() as session:
        found = forecasts(session, "requests_per_s", now, now + 2 * DAY_S)
    assert found[-1].at - now >= DAY_S
    assert (found[0].low, found[0].expected, found[0].high) == (8.0, 10.0, 12.0)


def test_refits_come_once_a_day_in_the_slot_of_the_metric(stage):
    now = learn(stage, 2.0)
    fitted_at = []
    for _ in range(4 * 144):
        num = stage.process.num
        stage.step(now)
        if stage.process.num > num:
            fitted_at.append(now)
        now += 600.0
    gaps = np.diff(fitted_at)
    assert 4 <= len(fitted_at) <= 6
    assert DAY_S / 2 <= gaps[0] <= 1.5 * DAY_S and gaps[1:] == pytest.approx(DAY_S, abs=1200.0)


def test_failure_keeps_the_last_bands_and_is_tried_again_less_and_less_often(stage):
    now = learn(stage, 2.0)
    for _ in range(2):
        stage.step(now)
    band = stage.statistics.bands["requests_per_s"]
    stage.process.reply = lambda request: {"id": request["id"], "error": "Stan said no"}
    tried = []
    for _ in range(3 * 1440):
        num = stage.process.num
        stage.step(now)
        if stage.process.num > num:
            tried.append(now)
        now += 60.0
    assert stage.statistics.bands["requests_per_s"] is band
    fit = rows(stage)["requests_per_s"]
    assert fit.state == "FAILED" and fit.reason == "Stan said no" and fit.fitted_at is not None
    assert np.diff(tried)[0] <= 240 and np.diff(tried)[-1] >= 3600


def test_another_champion_is_learnt_after_an_hour_where_it_matters(stage):
    now = learn(stage, 2.0)
    at, values = days(2.0)
    stage.statistics.remember(("e2e_s", "p95"), [], zip(at, values, strict=True))
    for _ in range(4):
        stage.step(now)
    assert stage.process.num == 2
    stage.statistics.champion_changed()
    stage.champion_changed(now)
    assert (
        stage.statistics.bands["e2e_s"].is_paused and not stage.statistics.bands["requests_per_s"].is_paused
    )
    for _ in range(240):
        stage.step(now)
        now += 60.0
    assert stage.process.num == 3
    assert not stage.statistics.bands["e2e_s"].is_paused


def test_restarted_daemon_takes_up_the_bands(stage):
    now = learn(stage, 2.0)
    for _ in range(2):
        stage.step(now)
    again = ForecastStage(stage.store, StatisticsStage(), ForecastRules(), InProcess(fitted))
    again.start(now + 3600.0)
    assert again.statistics.bands["requests_per_s"].at(now + 7200.0).expected == 10.0


def test_forecast_that_ended_is_stale_and_judges_nothing():
    band = Band([BandPoint(0.0, 1.0, 0.9, 1.1), BandPoint(600.0, 1.0, 0.9, 1.1)])
    assert [band.push(at, 5.0, 0.05)[0] for at in (0.0, 60.0, 120.0)] == [
        State.SUSPECT,
        State.SUSPECT,
        State.ANOMALOUS,
    ]
    assert band.push(700.0, 5.0, 0.05) == (State.STALE, None)
