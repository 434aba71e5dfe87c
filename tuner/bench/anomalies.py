"""What noticing finds, how late, at what price: 100 anomalies of each kind put into synthetic traffic.

    tuner bench anomalies [--num 100] [--days 3] [--jobs 2] [--seed N]

Prints recall and delay by kind for the statistics and for every rule, then runs whole days of quiet traffic at
1 Hz through the real stage, store and Prophet: false alarms, CPU seconds a day, tick times with and without a
refit under way. The traffic has a day of 30 %, noise whose neighbours depend on each other (AR(1), 0.6 at 10 s),
and bursts; no series is white noise.
"""

import copy
import math
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store import metrics
from store.database import Store
from store.metrics import Metric
from store.noticing import recent_anomalies
from tuner.collect import Collected
from tuner.notice.detect import BIN_S, Detector, State
from tuner.notice.rule_book import RuleBook
from tuner.notice.rules import RULES, limits_for
from tuner.notice.signals import Signals
from tuner.notice.stage import NoticeStage
from tuner.notice.watched import WATCHED, Key, watched_as
from tuner.readings import Readings
from tuner.settings import Settings

Array = NDArray[np.float64]
Generator = np.random.Generator

DAY_S = 86400.0
AR = 0.6
WARM_BINS = 8640  # a day before the anomaly
WATCH_BINS = 270  # three quarters of an hour in which it counts as found


@dataclass(frozen=True)
class Shape:
    """One synthetic series: level, relative noise at 10 s, unit of judgement as in `watched`."""

    key: Key
    level: float
    noise: float
    day: float = 0.3

    def bins(self, num: int, rng: Generator, start_s: float = 0.0) -> Array:
        """[num] means of 10 s."""
        at = start_s + BIN_S * np.arange(num)
        day = 1.0 + self.day * np.sin(2 * np.pi * at / DAY_S)
        return np.asarray(self.level * day * np.exp(self.noise * correlated(num, rng)))


def correlated(num: int, rng: Generator) -> Array:
    """AR(1) noise of sd 1."""
    innovations = math.sqrt(1 - AR * AR) * rng.standard_normal(num)
    noise = np.empty(num)
    last = rng.standard_normal()
    for index in range(num):
        last = noise[index] = AR * last + innovations[index]
    return noise


SHAPES = (
    Shape((metrics.REQUESTS_PER_S, ""), 20.0, 0.10),
    Shape((metrics.TTFT_S, "p95"), 0.3, 0.08),
    Shape((metrics.ITL_S, "p99"), 0.04, 0.05),
    Shape((metrics.STEP_S, "p50"), 0.02, 0.04, 0.1),
    Shape((metrics.KV_USED_RATIO, ""), 0.4, 0.08),
    Shape((metrics.CPU_UTIL_RATIO, "all"), 0.5, 0.06),
)


# --- layer B: what is put in ----------------------------------------------------------------------

Injection = Callable[[Array, Generator], Array | None]  # the quiet future -> the anomalous one; None: silence


def _spike(quiet: Array, rng: Generator) -> Array:
    changed = quiet.copy()
    changed[:1] *= 3.0
    return changed


def _burst(quiet: Array, rng: Generator) -> Array:
    changed = quiet.copy()
    changed[:4] *= 2.0
    return changed


def _shift(quiet: Array, rng: Generator) -> Array:
    return quiet * (1.2 if rng.random() < 0.5 else 0.8)


def _drift(quiet: Array, rng: Generator) -> Array:
    minutes = np.arange(len(quiet)) * BIN_S / 60.0
    return quiet * (1.0 + 0.01 * minutes)


def _spread(quiet: Array, rng: Generator) -> Array:
    """Variance times three about the same mean."""
    smooth = np.convolve(np.pad(quiet, 30, mode="edge"), np.ones(61) / 61, mode="valid")
    return np.asarray(smooth + math.sqrt(3.0) * (quiet - smooth))


def _flat(quiet: Array, rng: Generator) -> Array:
    return np.full(len(quiet), quiet[0])


def _silence(quiet: Array, rng: Generator) -> None:
    return None


KINDS: Mapping[str, Injection] = {
    "point spike x3 (10 s)": _spike,
    "burst x2 (40 s)": _burst,
    "level shift +-20 %": _shift,
    "drift 1 %/min": _drift,
    "variance x3": _spread,
    "flat line": _flat,
    "missing data": _silence,
    "wrong hour": _shift,  # its future is replaced by that of the other half of the day, see `episodes`
}


@dataclass(frozen=True)
class Found:
    """One anomaly: seconds from its start to its notice, None where it was missed."""

    delay_s: float | None


def episodes(
    kind: str, num: int, rng: Generator, warm: list[tuple[Shape, Detector, float]]
) -> Iterator[Found]:
    """`num` anomalies of a kind, each behind a day of its own series. `warm`: series, detector, time of day."""
    for index in range(num):
        shape, learnt, at_s = warm[index % len(warm)]
        detector = copy.deepcopy(learnt)
        judged = watched_as(shape.key)
        assert judged is not None
        start_s = at_s + (DAY_S / 2 if kind == "wrong hour" else 0.0)
        quiet = shape.bins(WATCH_BINS, rng, start_s)
        values = quiet if kind == "wrong hour" else KINDS[kind](quiet, rng)
        found = None
        for step in range(WATCH_BINS):
            now = at_s + step * BIN_S
            if values is None:
                state = detector.silent(now + BIN_S)
                hit = state is State.STALE
            else:
                # It is for the layer to notice a latency that fell as well; whether it is harm is asked later.
                hit = detector.push(now, judged.judged(float(values[step]))) is State.ANOMALOUS
            if hit:
                found = (step + 1) * BIN_S
                break
        yield Found(found)


def warm_detectors(rng: Generator, num_hours: int = 6) -> list[tuple[Shape, Detector, float]]:
    """Every series at several hours of its second day, none of them in alarm by chance."""
    found = []
    for shape in SHAPES:
        how = watched_as(shape.key)
        assert how is not None
        detector = Detector(how.floor, how.smallest_shift)
        num = WARM_BINS + num_hours * 1440 + 1
        values = shape.bins(num, rng)
        for index in range(num):
            detector.push(index * BIN_S, how.judged(float(values[index])))
            is_due = index >= WARM_BINS and index % 1440 == 0
            if is_due and detector.state is State.OK:
                found.append((shape, copy.deepcopy(detector), (index + 1) * BIN_S))
    return found


# --- layer A: a world a second --------------------------------------------------------------------

STEPS_PER_S = 20  # 8 gaps between tokens each, so that a p99 of them is known within the minute


@dataclass
class Second:
    """What one tick brings."""

    readings: Readings
    records: list[dict[str, Any]]
    state: dict[str, Any] | None


def quiet_second(now: float, rng: Generator) -> Second:
    """A healthy machine with one GPU that serves some 20 requests a second."""
    u = rng.random(6).tolist()
    gauges: dict[tuple[Metric, str], float] = {
        (metrics.REQUESTS_RUNNING, ""): 8.0 + int(3 * u[0]),
        (metrics.REQUESTS_WAITING, ""): float(int(4 * u[1])),
        (metrics.REQUESTS_PER_S, ""): float(rng.poisson(20.0)),
        (metrics.KV_FRAGMENTATION_RATIO, ""): 0.03 + 0.005 * u[2],
        (metrics.CPU_UTIL_RATIO, "all"): 0.4 + 0.1 * u[3],
        (metrics.CPU_STEAL_RATIO, ""): 0.01 * u[4],
        (metrics.CLOCK_STEP_S, ""): 1e-4 * u[4],
        (metrics.SUSPENDED_S, ""): 0.0,
        (metrics.MEMORY_USED_BYTES, ""): 5e9,
        (metrics.MEMORY_TOTAL_BYTES, ""): 1e10,
        (metrics.DISK_USED_RATIO, ""): 0.4,
        (metrics.GPU_UTIL_RATIO, "0"): 0.7 + 0.1 * u[5],
        (metrics.GPU_TEMPERATURE_CELSIUS, "0"): 60.0,
        (metrics.GPU_TEMPERATURE_LIMIT_CELSIUS, "0"): 90.0,
        (metrics.GPU_POWER_WATTS, "0"): 400.0,
        (metrics.GPU_POWER_LIMIT_WATTS, "0"): 700.0,
        (metrics.GPU_THROTTLE_REASONS, "0"): 0.0,
        (metrics.GPU_ECC_UNCORRECTED_TOTAL, "0"): 0.0,
        (metrics.TTFT_S, "p95"): 0.2,
    }
    times = (0.025 * np.exp(0.05 * rng.standard_normal(STEPS_PER_S))).tolist()
    records = [step_record(now + i / STEPS_PER_S, step_s) for i, step_s in enumerate(times)]
    state = {"engine": "ready", "num_engine_restarts": 0, "champion_config_id": "c", "config_id": "c"}
    return Second(gauges, records, state)


def step_record(at: float, step_s: float) -> dict[str, Any]:
    return {
        "kind": "step", "at": at, "step_s": step_s, "num_decode": 8, "num_prefill_rows": 0,
        "num_prefill_tokens": 0, "num_running": 8, "config_id": "c",
    }  # fmt: skip


Fault = Callable[[Second, int, Generator], None]  # bends the second that came `int` seconds after the start


def _set(metric: Metric, label: str, value: float) -> Fault:
    def bend(second: Second, since_s: int, rng: Generator) -> None:
        second.readings[metric, label] = value * (1 + 0.005 * rng.random())

    return bend


def _slow_tokens(second: Second, since_s: int, rng: Generator) -> None:
    second.records[:] = [step_record(record["at"], 0.15) for record in second.records[::3]]


def _stalls(second: Second, since_s: int, rng: Generator) -> None:
    if since_s % 10 == 0:
        second.records[3]["step_s"] = 0.12


def _gone(second: Second, since_s: int, rng: Generator) -> None:
    second.state, second.records = None, []
    for key in [key for key in second.readings if key[0].source == "runtime"]:
        del second.readings[key]


def _down(second: Second, since_s: int, rng: Generator) -> None:
    assert second.state is not None
    second.state["engine"] = "starting"


def _once(metric: Metric, label: str, value: float) -> Fault:
    def bend(second: Second, since_s: int, rng: Generator) -> None:
        if since_s == 0 or metric is metrics.GPU_ECC_UNCORRECTED_TOTAL:
            second.readings[metric, label] = value

    return bend


def _saturated(second: Second, since_s: int, rng: Generator) -> None:
    second.readings[metrics.GPU_UTIL_RATIO, "0"] = 0.99
    second.readings[metrics.REQUESTS_WAITING, ""] = 5.0 + since_s / 20


def _rate(second: Second, since_s: int, rng: Generator) -> None:
    second.readings[metrics.REQUESTS_PER_S, ""] = float(rng.poisson(32.0))


def _bad_quality(second: Second, since_s: int, rng: Generator) -> None:
    """Two failed rounds, as the stage reads them off the journal."""


RULE_FAULTS: Mapping[str, Fault] = {
    "missing_data": _gone,
    "engine_down": _down,
    "clock_step": _once(metrics.CLOCK_STEP_S, "", 3.0),
    "host_suspended": _once(metrics.SUSPENDED_S, "", 60.0),
    "cpu_steal": _set(metrics.CPU_STEAL_RATIO, "", 0.4),
    "thermal_throttle": lambda second, since_s, rng: second.readings.__setitem__(
        (metrics.GPU_THROTTLE_REASONS, "0"), 0x40
    ),
    "ecc_errors": _once(metrics.GPU_ECC_UNCORRECTED_TOTAL, "0", 2.0),
    "slo": _slow_tokens,
    "queue": _set(metrics.REQUESTS_WAITING, "", 60.0),
    "request_rate": _rate,
    "quality": _bad_quality,
    "gpu_idle": _set(metrics.GPU_UTIL_RATIO, "0", 0.1),
    "gpu_saturated": _saturated,
    "slow_steps": _stalls,
    "fragmentation": _set(metrics.KV_FRAGMENTATION_RATIO, "", 0.2),
    "memory_full": _set(metrics.MEMORY_USED_BYTES, "", 9.4e9),
    "cpu_full": _set(metrics.CPU_UTIL_RATIO, "all", 0.96),
    "disk_full": _set(metrics.DISK_USED_RATIO, "", 0.95),
    "gpu_power": _set(metrics.GPU_POWER_WATTS, "0", 670.0),
    "gpu_hot": _set(metrics.GPU_TEMPERATURE_CELSIUS, "0", 84.0),
}

RULE_WARM_S = 2400
RULE_WATCH_S = 700


WarmRules = list[tuple[RuleBook, Signals, int]]


def warm_rules(rng: Generator) -> WarmRules:
    """The rules after 40 quiet minutes that end at any of ten seconds."""
    warm = []
    book, signals = RuleBook(RULES), Signals(limits_for([], 0.1))
    for now in range(RULE_WARM_S + 10):
        _tick(book, signals, float(now), quiet_second(float(now), rng))
        if now >= RULE_WARM_S:
            warm.append((copy.deepcopy(book), copy.deepcopy(signals), now + 1))
    return warm


def rule_episodes(name: str, num: int, rng: Generator, warm: WarmRules) -> Iterator[Found]:
    """`num` faults that one rule is there for."""
    for index in range(num):
        yield _rule_episode(name, RULE_FAULTS[name], *copy.deepcopy(warm[index % len(warm)]), rng)


def _rule_episode(
    name: str, fault: Fault, book: RuleBook, signals: Signals, start: int, rng: Generator
) -> Found:
    for since_s in range(RULE_WATCH_S):
        now = float(start + since_s)
        second = quiet_second(now, rng)
        fault(second, since_s, rng)
        if name == "quality":
            signals.quality = (now, 0.08, 2)
        if name in _tick(book, signals, now, second):
            return Found(since_s + 1.0)
    return Found(None)


def _tick(book: RuleBook, signals: Signals, now: float, second: Second) -> list[str]:
    signals.feed(now, second.readings, second.records, second.state)
    return [found.rule.name for found in book.step(signals, now) if found.event == "opened"]


# --- whole days -----------------------------------------------------------------------------------


@dataclass
class Days:
    """What whole quiet days cost and what was noticed in them."""

    num_days: float
    cpu_s: float
    tick_s: Array
    refit_tick_s: Array
    pages: int
    tickets: int
    faults: int
    num_series: int
    num_fits: int
    fit_s: list[float]
    reasons: list[str]


def all_keys() -> list[Key]:
    """Every series that is watched, as a machine with one GPU and three processes has them."""
    open_labels = {"process": ("daemon", "engine", "front_end"), "gpu": ("0",)}
    return [
        (str(how.metric), label)
        for how in WATCHED
        for label in (how.labels if how.labels is not None else open_labels[how.component])
    ]


_SMALL = {str(metrics.CPU_STEAL_RATIO): 0.01, str(metrics.KV_FRAGMENTATION_RATIO): 0.03}
_LEVELS = {"ratio": 0.4, "s": 0.1, "bytes": 4e9, "celsius": 60.0, "watts": 400.0, "hertz": 1.5e9}


def day_values(num: int, start_s: float, rng: Generator) -> dict[Key, Array]:
    """[num] values a second of every series. Those of one component share half of their noise."""
    at = start_s + np.arange(num)
    shared: dict[str, Array] = {}
    values = {}
    for key in all_keys():
        how = watched_as(key)
        assert how is not None
        common = shared.setdefault(how.component, _slow_noise(num, rng))
        own = 0.7 * common + 0.7 * _slow_noise(num, rng)
        size = {"load": 0.10, "latency": 0.10, "engine": 0.08}.get(how.component, 0.03)
        noise = size * own + 2 * size * rng.standard_normal(num)
        level = _SMALL.get(key[0], _LEVELS.get(how.metric.unit, 20.0))
        swing = 0.3 if how.component in ("load", "latency", "engine") else 0.05
        day = 1.0 + swing * np.sin(2 * np.pi * at / DAY_S)
        values[key] = level * day * np.exp(noise)
    return values


def _slow_noise(num: int, rng: Generator) -> Array:
    """AR(1) at 10 s, held for 10 s each."""
    return np.repeat(correlated(num // 10 + 1, rng), 10)[:num]


def run_days(num_days: float, seed: int, folder: Path, progress: Callable[[str], None]) -> Days:
    """Quiet days at 1 Hz through the stage as the daemon runs it, with its store and its forecasts."""
    rng = np.random.default_rng(seed)
    settings = Settings(data_dir=folder)
    ticks: list[float] = []
    refits: list[float] = []
    with Store.open(folder) as store:
        stage = NoticeStage(store, settings, "snapshot")
        stage.start(0.0)
        began_cpu_s = time.process_time()
        generating_s = 0.0
        for start in range(0, int(num_days * DAY_S), 3600):
            progress(f"hour {start // 3600 + 1} of {num_days * 24:.0f}")
            paused = time.process_time()
            values = day_values(3600, float(start), rng)
            keys = [(metrics.METRICS[metric], label) for metric, label in values]
            columns = np.stack(list(values.values()), axis=1).tolist()
            generating_s += time.process_time() - paused
            for index in range(3600):
                now = float(start + index)
                readings: Readings = dict(zip(keys, columns[index], strict=True))
                state = {
                    "engine": "ready",
                    "num_engine_restarts": 0,
                    "champion_config_id": "c",
                    "config_id": "c",
                }
                collected = Collected(now, state, 0, readings, ())
                is_busy = stage.forecasts.is_busy
                before = time.perf_counter()
                stage.step(now, collected)
                (refits if is_busy else ticks).append(time.perf_counter() - before)
        cpu_s = time.process_time() - began_cpu_s - generating_s
        with store.journal() as session:
            rows = [*recent_anomalies(session, 0.0), *stage.open_anomalies()]
        fits = stage.forecasts.history
        stage.close()
    return Days(
        num_days, cpu_s, np.array(ticks), np.array(refits),
        sum(row.severity == "page" and row.kind == "condition" for row in rows),
        sum(row.severity == "ticket" for row in rows),
        sum(row.kind == "fault" for row in rows),
        len(all_keys()), len(fits), fits, [row.reason for row in rows],
    )  # fmt: skip


# --- the report -----------------------------------------------------------------------------------


def run_anomalies(
    num: int, num_days: float, seed: int, jobs: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Everything above, as one document. Deterministic in `seed` but for times, however many `jobs` there are."""
    tasks = [("statistics", kind) for kind in KINDS] + [("rules", name) for name in RULE_FAULTS]
    tasks = tasks if num else []
    summaries: dict[str, dict[str, Any]] = {"statistics": {}, "rules": {}}
    # Not forked: a child would inherit the locks that numpy's threads hold.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for (part, name), row in zip(tasks, pool.map(partial(_task, num, seed), tasks), strict=True):
            progress(f"{part}: {name}")
            summaries[part][name] = row
    with tempfile.TemporaryDirectory() as folder:  # alone on the machine: its ticks are timed
        days = run_days(num_days, seed, Path(folder), progress) if num_days else None
    return {"num": num, **summaries, "quiet": None if days is None else quiet_summary(days)}


def _task(num: int, seed: int, task: tuple[str, str]) -> dict[str, float | None]:
    """One kind or rule, in a process of its own: what it learns is the same for all, what is put in is its own."""
    part, name = task
    learning = np.random.default_rng(seed)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if part == "statistics":
        return summary(list(episodes(name, num, rng, warm_detectors(learning))))
    return summary(list(rule_episodes(name, num, rng, warm_rules(learning))))


def summary(found: list[Found]) -> dict[str, float | None]:
    delays = [one.delay_s for one in found if one.delay_s is not None]
    return {
        "recall": len(delays) / len(found),
        "median_delay_s": float(np.median(delays)) if delays else None,
        "p95_delay_s": float(np.percentile(delays, 95)) if delays else None,
    }


def quiet_summary(days: Days) -> dict[str, Any]:
    def milliseconds(times: Array) -> dict[str, float | None]:
        if not len(times):
            return {"p50": None, "p99": None, "max": None, "num": 0}
        p50, p99 = np.percentile(times, [50, 99]) * 1e3
        return {
            "p50": round(p50, 3),
            "p99": round(p99, 3),
            "max": round(1e3 * times.max(), 1),
            "num": len(times),
        }

    return {
        "days": days.num_days,
        "num_series": days.num_series,
        "pages_per_day": days.pages / days.num_days,
        "tickets_per_day": days.tickets / days.num_days,
        "faults_per_day": days.faults / days.num_days,
        "cpu_s_per_day": days.cpu_s / days.num_days,
        "share_of_a_core": days.cpu_s / days.num_days / DAY_S,
        "tick_ms": milliseconds(days.tick_s),
        "tick_during_refit_ms": milliseconds(days.refit_tick_s),
        "num_fits": days.num_fits,
        "mean_fit_s": float(np.mean(days.fit_s)) if days.fit_s else None,
        "noticed": days.reasons[:20],
    }


def report(found: Mapping[str, Any]) -> str:
    """For people."""
    lines = [f"{found['num']} anomalies of each kind.", "", f"{'':<24}{'recall':>8}{'median':>10}{'p95':>10}"]
    for title, part in (("statistics", found["statistics"]), ("rules", found["rules"])):
        lines.append(title)
        for name, row in part.items():
            delays = [row["median_delay_s"], row["p95_delay_s"]]
            told = "".join(f"{'-' if one is None else f'{one:.0f} s':>10}" for one in delays)
            lines.append(f"  {name:<22}{row['recall']:>8.0%}{told}")
    quiet = found["quiet"]
    if quiet is not None:
        tick, refit = quiet["tick_ms"], quiet["tick_during_refit_ms"]
        lines += [
            "",
            f"{quiet['days']:g} quiet days, {quiet['num_series']} series at 1 Hz: {quiet['pages_per_day']:.2f} pages, "
            f"{quiet['tickets_per_day']:.2f} tickets and {quiet['faults_per_day']:.2f} faults a day",
            f"CPU {quiet['cpu_s_per_day']:.0f} s a day, {quiet['share_of_a_core']:.2%} of a core (Prophet apart: "
            f"{quiet['num_fits']} fits of {quiet['mean_fit_s'] or 0:.2f} s on average)",
            f"tick p50 {tick['p50']} ms, p99 {tick['p99']} ms, longest {tick['max']} ms; while a refit was under way "
            f"p50 {refit['p50']} ms, p99 {refit['p99']} ms, longest {refit['max']} ms ({refit['num']} ticks)",
            *(f"  noticed: {reason}" for reason in quiet["noticed"]),
        ]
    return "\n".join(lines)
