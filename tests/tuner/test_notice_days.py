"""Three days by injected time: rows, refits by the real Prophet on schedule, memory that does not grow."""

import math
import random
import time

import numpy as np
import psutil
import pytest

from store import metrics
from store.database import Store
from store.noticing import forecast_fits
from store.queries import forecasts
from store.tables import Anomaly
from tuner.collect import Collected
from tuner.notice.stage import NoticeStage
from tuner.settings import Settings

DAY_S = 86400.0
TICK_S = 10.0
LEVELS = {
    (metrics.REQUESTS_PER_S, ""): 20.0,
    (metrics.TTFT_S, "p95"): 0.2,
    (metrics.E2E_S, "p95"): 2.0,
    (metrics.REQUESTS_RUNNING, ""): 8.0,
}
SHIFT_AT = 2.6 * DAY_S


def readings(now, rng):
    day = 1.0 + 0.3 * math.sin(2 * math.pi * now / DAY_S)
    shift = 1.8 if SHIFT_AT <= now < SHIFT_AT + 1200 else 1.0
    return {
        key: level
        * day
        * rng.lognormvariate(0.0, 0.05)
        * (shift if key[0] in (metrics.TTFT_S, metrics.E2E_S) else 1.0)
        for key, level in LEVELS.items()
    }


def test_three_days_are_noticed_forecast_and_bounded(tmp_path, capsys):
    rng, ticks, refit_ticks, memory = random.Random(1), [], [], []
    state = {"engine": "ready", "num_engine_restarts": 0, "champion_config_id": "c", "config_id": "c"}
    with Store.open(tmp_path) as store:
        stage = NoticeStage(store, Settings(data_dir=tmp_path), "snapshot")
        stage.start(0.0)
        for index in range(int(3 * DAY_S / TICK_S)):
            now = index * TICK_S
            collected = Collected(now, state, 0, readings(now, rng))
            is_busy, began = stage.forecasts.is_busy, time.perf_counter()
            stage.step(now, collected)
            (refit_ticks if is_busy else ticks).append(time.perf_counter() - began)
            if is_busy and len(refit_ticks) % 20 == 0:
                time.sleep(0.05)  # Prophet runs in real time, so that its day must not fly by meanwhile
            if index % 4320 == 0:
                memory.append(psutil.Process().memory_info().rss)
        with store.journal() as session:
            rows = session.query(Anomaly).all()
        with store.metrics() as session:
            fits = {fit.metric: fit for fit in forecast_fits(session)}
            bands = forecasts(session, "requests_per_s", 2.5 * DAY_S, 3.5 * DAY_S)
        stage.close()

    for name, times in (("tick", ticks), ("tick during a refit", refit_ticks)):
        p50, p99 = np.percentile(times, [50, 99]) * 1e3
        print(
            f"{name}: {len(times)} of them, p50 {p50:.2f} ms, p99 {p99:.2f} ms, longest {1e3 * max(times):.1f} ms"
        )
    print(f"memory after each half day, MB: {[round(one / 1e6) for one in memory]}")
    print(f"noticed: {[row.reason for row in rows]}")

    assert {fit.state for fit in fits.values()} == {"FITTED"} and len(fits) == len(LEVELS)
    assert all(
        2 * DAY_S - 300 <= fit.fitted_at <= 3 * DAY_S and not math.isnan(fit.residual_scale)
        for fit in fits.values()
    )
    at_noon = min(bands, key=lambda band: abs(band.at - 2.75 * DAY_S))
    assert at_noon.low < 20.0 * 0.7 < at_noon.high and at_noon.expected == pytest.approx(14.0, rel=0.1)
    found = [row for row in rows if row.details.get("component") == "latency"]
    assert [
        row for row in found if SHIFT_AT - 60 <= row.started_at <= SHIFT_AT + 240 and row.ended_at is not None
    ]
    assert len(rows) <= 3 * 4  # a page and three tickets a day
    assert memory[-1] - memory[2] < 60e6  # the forecasting thread and its buffers among it
