"""Noticing beside the loop: what is written down, what freezes, what starts a study, what a restart takes up."""

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from store import metrics, noticing
from store.database import Store
from store.tables import Anomaly, Change, Experiment, Note, QualityCheck, Sample, SampleRollup, Slice, Study
from tests.simulated_runtime import IDENTITY, SimulatedRuntime
from tests.tuner.test_daemon import FAST, World
from tuner.bench.anomalies import quiet_second
from tuner.collect import Collected
from tuner.notice.stage import NoticeStage
from tuner.rows import ensure_config
from tuner.settings import Settings
from tuner.snapshot import record_snapshot


@dataclass
class Probe:
    """A host probe whose answers are set."""

    readings: dict = field(default_factory=dict)

    def sample(self, monotonic_s):
        return dict(self.readings)


@pytest.fixture
def world(tmp_path):
    made = []

    def build(mode="auto", rate_per_s=5.0, **sections):
        settings = Settings(mode=mode, data_dir=tmp_path, **{**FAST, **sections})
        one = World(tmp_path, SimulatedRuntime(rate_per_s), settings).start()
        one.probe = Probe({(metrics.CPU_UTIL_RATIO, "all"): 0.5})
        one.daemon.collector.probes = [one.probe]
        made.append(one)
        return one

    yield build
    for one in made:
        if one.daemon is not None:
            one.daemon.close()
            assert one.daemon.num_failures == {}
        one.store.close()


def anomalies(one, rule=None):
    return [row for row in one.rows(Anomaly) if rule in (None, row.rule)]


def promoted(one):
    return lambda: any(change.kind == "promote" for change in one.rows(Change))


# --- in the loop ----------------------------------------------------------------------------------


def test_poor_start_with_every_threshold_on_still_tunes_and_its_queue_is_why(world):
    slos = [{"metric": "e2e_s", "statistic": "p99", "limit": 0.5}]
    one = world(rate_per_s=12.0, slos=slos, learn={"champion_s": 90})
    one.run(1500, promoted(one))
    assert promoted(one)()
    found = anomalies(one)
    assert {row.rule for row in found} & {"slo", "queue"} and {row.kind for row in found} == {"condition"}
    first = min(one.rows(Study), key=lambda study: study.study_id)
    condition = next(row for row in found if row.anomaly_id == first.anomaly_id)
    assert first.cause == condition.reason


def in_a_pair(one):
    return lambda: any(
        row.state == "PLANNED" and row.planned_start_at < one.clock.at for row in one.rows(Slice)
    )


def test_stolen_cores_void_the_pair_and_freeze_until_they_are_back(world):
    one = world()
    one.run(400, in_a_pair(one))
    one.probe.readings[metrics.CLOCK_STEP_S, ""] = 5.0
    one.run(1)
    one.probe.readings[metrics.CLOCK_STEP_S, ""] = 0.0
    [fault] = anomalies(one, "clock_step")
    assert (fault.kind, fault.ended_at) == ("fault", None)
    voided = [row for row in one.rows(Slice) if row.state == "VOID"]
    assert len(voided) == 2 and all("The system clock was set by 5.0 s" in row.void_reason for row in voided)
    assert one.runtime.runner.plan is None and "Frozen" in one.daemon.doing
    num = len(one.rows(Slice))
    one.run(25)
    assert len(one.rows(Slice)) == num
    one.run(30)
    assert anomalies(one, "clock_step")[0].ended_at is not None
    assert len(one.rows(Slice)) > num  # the same experiment goes on with another pair
    assert [row.state for row in one.rows(Experiment)].count("STOPPED") == 0


def test_engine_that_dies_freezes_and_voids_nothing_by_itself(world):
    one = world()
    one.run(60)
    one.runtime.num_engine_restarts += 1
    one.run(2)
    [fault] = anomalies(one, "engine_down")
    assert fault.kind == "fault" and not fault.details["voids_pair"]
    one.run(10)
    assert anomalies(one, "engine_down")[0].ended_at is not None


def test_silent_runtime_is_missing_data_and_told_once(world):
    one = world()
    one.run(20)
    one.runtime.is_down = True
    one.run(20)
    one.runtime.is_down = False
    one.run(10)
    [row] = anomalies(one)
    assert (row.rule, row.label, row.kind) == (
        "missing_data",
        "runtime",
        "fault",
    ) and row.ended_at is not None
    told = [note.text for note in one.rows(Note) if note.stage == "notice"]
    assert len(told) == 2 and told[0].startswith("Page, fault: The runtime was not sampled")
    one.daemon.num_failures.clear()


def test_restarted_daemon_takes_up_an_open_anomaly_and_ends_it(world):
    one = world(mode="observe")
    one.run(5)
    one.probe.readings[metrics.GPU_THROTTLE_REASONS, "0"] = 64.0
    one.run(20)
    [before] = anomalies(one, "thermal_throttle")
    probe = one.probe
    one.daemon.notice.close()
    one.crash()
    one.start()
    one.daemon.collector.probes = [probe]
    assert [row.anomaly_id for row in one.daemon.notice.open_faults()] == [before.anomaly_id]
    one.run(20)
    assert [row.anomaly_id for row in anomalies(one)] == [before.anomaly_id]
    probe.readings[metrics.GPU_THROTTLE_REASONS, "0"] = 0.0
    one.run(40)
    [after] = anomalies(one)
    assert after.ended_at is not None and one.daemon.notice.open_faults() == []


def test_rule_that_was_switched_off_meanwhile_leaves_nothing_open(world):
    one = world(mode="observe")
    one.probe.readings[metrics.GPU_THROTTLE_REASONS, "0"] = 64.0
    one.run(20)
    one.daemon.notice.close()
    one.crash()
    one.settings = one.settings.model_copy(update={"notice": Settings(notice={"rules": False}).notice})
    one.start()
    assert anomalies(one)[0].ended_at is not None and one.daemon.notice.open_faults() == []


# --- the stage alone, by injected time --------------------------------------------------------------


class Lone:
    """The stage with its store, a second at a time."""

    def __init__(self, folder: Path, **notice):
        self.store = Store.open(folder)
        self.settings = Settings(data_dir=folder, notice=notice)
        self.snapshot_id = record_snapshot(self.store, IDENTITY, 0.0)
        self.now, self.random = 1_000_000.0, random.Random(2)
        self.stage = self.started()

    def started(self):
        stage = NoticeStage(self.store, self.settings, self.snapshot_id)
        stage.start(self.now)
        return stage

    def tick(self, readings, config="c", champion="c"):
        state = {
            "engine": "ready",
            "num_engine_restarts": 0,
            "champion_config_id": champion,
            "config_id": config,
        }
        self.stage.step(self.now, Collected(self.now, state, 0, readings, ()))
        self.now += 1.0

    def run(self, seconds, level=1.0, config="c", champion="c"):
        for _ in range(int(seconds)):
            noise = lambda: self.random.lognormvariate(0.0, 0.1)  # noqa: E731
            self.tick(
                {
                    (metrics.REQUESTS_RUNNING, ""): 4.0 * noise(),
                    (metrics.TTFT_S, "p95"): 0.2 * level * noise(),
                    (metrics.E2E_S, "p95"): 2.0 * level * noise(),
                },
                config,
                champion,
            )

    def rows(self):
        with self.store.journal() as session:
            return session.query(Anomaly).all()


@pytest.fixture
def lone(tmp_path):
    made = []

    def build(**notice):
        made.append(Lone(tmp_path, **notice))
        return made[-1]

    yield build
    for one in made:
        one.stage.close()
        one.store.close()


def test_two_latencies_that_rise_are_one_page_and_it_ends(lone):
    one = lone()
    one.run(2400)
    assert one.rows() == []
    one.run(600, level=1.6)
    [row] = one.rows()
    assert (row.kind, row.layer, row.severity, row.details["component"]) == (
        "condition",
        "B",
        "page",
        "latency",
    )
    assert 0 <= one.now - 600 - row.started_at <= 60 or row.started_at >= one.now - 600
    assert row.details["noticed_at"] - row.started_at <= 180
    assert one.stage.condition_to_study().anomaly_id == row.anomaly_id
    one.run(900)
    assert one.rows()[0].ended_at is not None and len(one.rows()) == 1


def test_latency_that_falls_is_no_trouble(lone):
    one = lone()
    one.run(2400)
    one.run(600, level=0.5)
    assert one.rows() == []


def test_same_trouble_within_six_hours_is_not_told_again_unless_it_is_much_worse(lone):
    one = lone()
    one.run(2400)
    one.run(300, level=1.6)
    one.run(3600)
    assert len(one.rows()) == 1
    one.run(300, level=1.6)
    one.run(3600)
    assert len(one.rows()) == 1
    one.run(300, level=30.0)
    assert len(one.rows()) == 2


def test_rule_that_fires_again_soon_is_the_same_anomaly_with_another_episode(lone):
    one = lone()

    def queue(waiting, seconds):
        for _ in range(seconds):
            one.tick({(metrics.REQUESTS_RUNNING, ""): 4.0, (metrics.REQUESTS_WAITING, ""): waiting})

    queue(80.0, 60)
    queue(0.0, 200)
    (row,) = one.rows()
    first = noticing.episodes(row)
    assert len(first) == 1 and row.ended_at is not None
    back_at = one.now
    queue(120.0, 60)
    (row,) = one.rows()
    assert row.ended_at is None and "120" in row.reason
    assert noticing.episodes(row) == [*first, (pytest.approx(back_at, abs=1.0), None)]
    queue(0.0, 200)
    (row,) = one.rows()
    with one.store.journal() as session:
        over = [note.text for note in session.query(Note) if note.text.startswith("Over after")]
    assert row.ended_at is not None and len(over) == 2
    assert all(text.startswith("Over after 1.5 min") for text in over)  # each of its own minute, not of both


def test_slices_of_a_challenger_are_left_out(lone):
    one = lone()
    one.run(2400)
    for _ in range(60):
        one.run(15, level=3.0, config="challenger")
        one.run(15)
    assert one.rows() == []


def test_another_champion_is_another_level_and_a_regression_is_blamed_on_it(lone):
    one = lone()
    one.run(2400)
    with one.store.journal() as session:
        from runtime.knobs import EngineConfig

        first, second = EngineConfig(), EngineConfig.of({"max_num_seqs": 3})
        ensure_config(session, first, 0.0)
        ensure_config(session, second, 0.0)
        session.flush()
        session.add(
            Change(one.snapshot_id, "promote", first.config_id, second.config_id, one.now, "won", "APPLIED",
                   applied_at=one.now)
        )  # fmt: skip
    one.tick({(metrics.CLOCK_STEP_S, ""): 9.0}, champion="d", config="d")
    one.run(900, level=1.6, config="d", champion="d")
    assert [row.rule for row in one.rows()] == ["clock_step"]
    assert one.rows()[0].change_id == 1


def test_quality_that_failed_twice_is_a_condition_without_a_study(lone):
    from runtime.knobs import EngineConfig

    one = lone()
    config = EngineConfig()
    with one.store.journal() as session:
        ensure_config(session, config, 0.0)
        session.flush()
        for _ in range(2):
            session.add(
                QualityCheck(one.snapshot_id, "periodic", config.config_id, config.config_id, one.now, 400, 0.1, 0.2,
                             0.9, 0.87, False, "It answers otherwise.")
            )  # fmt: skip
    one.run(3)
    [row] = one.rows()
    assert (row.rule, row.kind) == ("quality", "condition") and one.stage.condition_to_study() is None


def test_past_is_read_at_the_start_so_that_nothing_is_learnt_twice(lone):
    one = lone()
    rng = random.Random(4)
    with one.store.metrics() as session:
        for second in range(0, 4 * 3600, 10):
            at, value = one.now - 4 * 3600 + second, 0.2 * rng.lognormvariate(0, 0.1)
            session.add(Sample("ttft_s", "p95", at, value, "c"))
        for minute in range(1440):
            session.add(
                SampleRollup("requests_per_s", "", 60, one.now - 86400 + 60 * minute, 60, 5.0, 4.0, 6.0, "x")
            )
    one.stage = one.started()
    one.run(120)
    assert one.stage.statistics.series["ttft_s", "p95"].detector.num_bins > 1000
    assert len(one.stage.statistics.series["requests_per_s", ""].minutes) == 1440
    with one.store.journal() as session:
        assert noticing.open_anomalies(session) == []


def test_healthy_host_with_every_threshold_on_is_left_alone(lone):
    import numpy as np

    one, rng = lone(), np.random.default_rng(3)
    for _ in range(4000):
        one.tick(quiet_second(one.now, rng).readings)
    assert one.rows() == []
