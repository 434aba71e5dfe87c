"""When the champion twin is fitted, and when it stands back."""

import pytest

from runtime.knobs import EngineConfig
from store.database import Store
from tests.simulated_runtime import IDENTITY, SimulatedRuntime
from tuner.rows import ensure_config
from tuner.snapshot import record_snapshot
from tuner.twin_stage import TwinStage


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "data") as opened:
        yield opened


def stage_after(store: Store, seconds: float, **knobs) -> tuple[TwinStage, EngineConfig]:
    """A twin stage that has looked at so many seconds of a champion with these knobs."""
    runtime = SimulatedRuntime(5.0)
    champion = EngineConfig.of(runtime.reconfigure(knobs)["config"])
    start_at = runtime.now
    runtime.advance(start_at + seconds)
    drained = runtime.drain("boot-1", 0, 200_000)
    store.save_drained("boot-1", drained["records"], drained["next_seq"], 0, runtime.now)
    with store.journal() as session:
        ensure_config(session, champion, start_at)
    stage = TwinStage(store, record_snapshot(store, IDENTITY, start_at), IDENTITY)
    assert stage.prepare(champion, start_at, runtime.now, 10.0) is not None
    return stage, champion


def test_replays_one_engine_and_says_so_where_several_serve(store):
    stage, champion = stage_after(store, 120.0, replicas=2)
    assert stage.adjustment != "twin" and stage.fit is not None and not stage.fit.is_used
    assert "replays one engine, and `replicas` is 2" in stage.fit.reason
    assert stage.predicted_log_ratio("e2e_s", champion.patched({"max_num_seqs": 4})) is None


def test_of_one_engine_is_used_and_ranks_no_configuration_of_several(store):
    stage, champion = stage_after(store, 120.0)
    assert stage.adjustment == "twin", stage.fit.reason
    assert stage.predicted_log_ratio("e2e_s", champion.patched({"max_num_seqs": 4})) is not None
    assert stage.predicted_log_ratio("e2e_s", champion.patched({"replicas": 2})) is None
