"""A challenger that differs in a WARM knob is prepared before its first slice, and never holds up the tick."""

from concurrent.futures import Future
from typing import Any

import pytest

from runtime.errors import EngineNotReady, PrepareFailed
from runtime.knobs import EngineConfig
from store.tables import Experiment, Note, Slice, Trial
from tests.tuner.test_daemon import worlds
from tuner.preparation import RETRY_S, Preparation
from tuner.rows import ensure_config

CHAMPION = EngineConfig()
CHALLENGER = CHAMPION.patched({"kv_tokens": 65_536})
STATE = {"boot_id": "b1", "num_engine_restarts": 0, "engine": "ready"}
TOLD = {"config_id": CHALLENGER.config_id, "prepare_s": 0.25, "extra_bytes": 3 * 2**20}


class Asked:
    """Stands where the thread is: an answer comes when the test says so."""

    def __init__(self) -> None:
        self.answers: list[Future[dict[str, Any]]] = []
        self.preparation = Preparation(control=None, start=self.start)  # type: ignore[arg-type]

    def start(self, work: Any) -> Future[dict[str, Any]]:
        self.answers.append(Future())
        return self.answers[-1]

    def look(self, now: float = 0.0, challenger: EngineConfig = CHALLENGER, **state: Any) -> Any:
        return self.preparation.look(challenger, CHAMPION, STATE | state, now)


def test_a_challenger_of_live_knobs_is_ready_unasked() -> None:
    asked = Asked()
    assert asked.look(challenger=CHAMPION.patched({"max_num_seqs": 3})).state == "ready" and not asked.answers


def test_asks_once_waits_and_tells_what_it_took() -> None:
    asked = Asked()
    assert [asked.look().state for _ in range(3)] == ["waiting"] * 3 and len(asked.answers) == 1
    asked.answers[0].set_result(TOLD)
    found = asked.look()
    assert found.state == "ready" and "0.25 s" in found.words and "3.0 MiB" in found.words
    assert "burn-in covers re-warming" in found.words
    assert asked.look() == type(found)("ready") and len(asked.answers) == 1


def test_another_engine_has_prepared_nothing() -> None:
    asked = Asked()
    asked.look()
    asked.answers[0].set_result(TOLD)
    assert asked.look().state == "ready"
    assert asked.look(num_engine_restarts=1).state == "waiting" and len(asked.answers) == 2


def test_no_answer_is_asked_again_and_no_room_is_final() -> None:
    asked = Asked()
    asked.look()
    asked.answers[0].set_exception(EngineNotReady("restarting"))
    assert (
        asked.look(1.0).state == "waiting" and asked.look(2.0).state == "waiting" and len(asked.answers) == 1
    )
    assert asked.look(1.0 + RETRY_S).state == "waiting" and len(asked.answers) == 2
    asked.answers[1].set_exception(PrepareFailed("it needs 7 bytes more, but 5 may be taken"))
    found = asked.look(9.0)
    assert found.state == "failed" and "7 bytes" in found.words


# -- in the loop ---------------------------------------------------------------------------------------------


@pytest.fixture
def build(tmp_path: Any) -> Any:
    with worlds(tmp_path) as make:
        yield make


def record(one: Any, challenger: EngineConfig) -> None:
    with one.store.journal() as session:
        ensure_config(session, challenger, one.clock.at)


def probe(one: Any, challenger: EngineConfig) -> Experiment:
    record(one, challenger)
    return one.daemon._open("probe", challenger, None, one.clock.at)


def test_a_probe_of_a_warm_knob_prepares_before_its_pair_and_then_runs(build: Any) -> None:
    one = build(mode="observe")
    one.run(5)
    experiment = probe(one, one.daemon._champion.patched({"kv_tokens": 65_536}))
    one.run(300, lambda: one.rows(Experiment)[0].state != "RUNNING")
    assert one.runtime.prepared == [experiment.challenger_config_id]
    assert [row.state for row in one.rows(Slice)] == ["SCORED", "SCORED"]
    assert any("Prepared beside serving" in note.text for note in one.rows(Note))


def test_no_memory_ends_the_experiment_before_any_slice_with_the_reason(build: Any) -> None:
    one = build(mode="observe")
    one.runtime.prepare_error = PrepareFailed("it needs 9 bytes more, but 5 may be taken")
    one.run(5)
    probe(one, one.daemon._champion.patched({"kv_tokens": 65_536}))
    one.run(30, lambda: one.rows(Experiment)[0].state != "RUNNING")
    ended = one.rows(Experiment)[0]
    assert (ended.state, ended.reason) == ("STOPPED", f"could not be prepared: {one.runtime.prepare_error}")
    assert one.rows(Slice) == [] and one.runtime.runner.champion == one.daemon._champion


def test_the_study_learns_that_there_is_no_room(build: Any) -> None:
    one = build(mode="auto", knobs={"allow": ("kv_tokens",), "start": {"max_num_seqs": 2}})
    one.runtime.prepare_error = PrepareFailed("it needs 9 bytes more, but 5 may be taken")
    one.run(900, lambda: any(trial.constraints.get("memory") == 1.0 for trial in one.rows(Trial)))
    refused = [trial for trial in one.rows(Trial) if trial.constraints.get("memory") == 1.0]
    assert refused and {trial.state for trial in refused} == {"COMPLETE"}
    assert "9 bytes" in str(refused[0].reason)


def test_an_engine_that_was_replaced_prepares_again_before_the_next_pair(build: Any) -> None:
    one = build(mode="observe")
    one.run(5)
    challenger = one.daemon._champion.patched({"kv_tokens": 65_536})
    record(one, challenger)
    one.daemon.experiments.open(
        "test",
        one.daemon.snapshot_id,
        one.daemon._champion,
        challenger,
        one.daemon._rules("test"),
        one.clock.at,
    )
    one.run(100, lambda: any(row.state == "SCORED" for row in one.rows(Slice)))
    one.runtime.kill_engine()
    one.run(100, lambda: len(one.runtime.prepared) > 1)
    assert one.runtime.prepared == [challenger.config_id] * 2
