"""Several engine processes behind one front end: started beside, fed, lost, and stopped again."""

import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from runtime.errors import EngineNotReady, InvalidKnob, InvalidPlan, NoPlan, PrepareFailed, StaleVersion
from runtime.knobs import EngineConfig
from runtime.plan import PlannedSlice, SlicePlan
from tests.servers import GUARD_S, LiveServer, live_server, wait_until

CORES = {"FAKE_CORES": "4"}
SLOW = {
    **CORES,
    "FAKE_STEP_S": "0.005",
}  # requests of many tokens overlap, so that one engine alone is not enough


def state(server: LiveServer) -> dict[str, Any]:
    with server.control() as control:
        return control.state()


def replicas(server: LiveServer) -> list[dict[str, Any]]:
    return list(state(server)["replicas"])


def champion_with(server: LiveServer, **knobs: Any) -> dict[str, Any]:
    return {**state(server)["champion"], **knobs}


def records(server: LiveServer, kind: str) -> list[dict[str, Any]]:
    with server.control() as control:
        return [record for record in control.drain(None, 0, 20_000)["records"] if record["kind"] == kind]


def plan_of(
    server: LiveServer, plan_id: str, slices: list[tuple[str, int, float, float]], **knobs: Any
) -> SlicePlan:
    """`slices`: (slice_id, replicas, start, end), the instants in seconds from now."""
    told, now = state(server), time.time()
    configs, planned = {}, []
    for slice_id, num, start, end in slices:
        config = EngineConfig.of({**told["champion"], **knobs, "replicas": num})
        configs[config.config_id] = config.values()
        arm = "champion" if config.config_id == told["champion_config_id"] else "challenger"
        planned.append(PlannedSlice(slice_id, arm, config.config_id, now + start, now + end, 0.0))  # type: ignore[arg-type]
    return SlicePlan(plan_id, "x1", told["version"], configs, tuple(planned), 5.0)


def ask(server: LiveServer, num_tokens: int = 4, prompt: str = "one two three") -> httpx.Response:
    with server.http() as http:
        return http.post(
            "/v1/completions", json={"prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True}
        )


class Load:
    """Clients that ask without a pause until the block ends; `answers` holds what each request came to."""

    def __init__(self, server: LiveServer, num_clients: int, num_tokens: int = 8) -> None:
        self.answers: list[httpx.Response] = []
        self._server, self._num_tokens = server, num_tokens
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(index,)) for index in range(num_clients)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(GUARD_S)

    def _run(self, index: int) -> None:
        while not self._over.is_set():
            self.answers.append(ask(self._server, self._num_tokens, f"client {index} asks"))


def test_a_prepared_replica_serves_once_it_is_in_force_and_not_before(tmp_path: Path) -> None:
    with live_server(tmp_path, env=SLOW) as server, server.control() as control:
        wanted = champion_with(server, replicas=2)
        prepared = control.prepare(wanted)
        assert prepared["config_id"] == EngineConfig.of(wanted).config_id and prepared["prepare_s"] > 0
        assert [one["phase"] for one in replicas(server)] == ["ready", "ready"]
        with Load(server, 4, 60) as load:
            wait_until(lambda: len(load.answers) > 8, "requests were served")
        assert {record["replica"] for record in records(server, "step")} == {0}

        done = control.reconfigure({"replicas": 2}, state(server)["version"])
        assert done["config"]["replicas"] == 2 and state(server)["config_id"] == done["config_id"]
        seen = len(records(server, "step"))
        with Load(server, 4, 60) as load:
            wait_until(lambda: len(load.answers) > 30, "requests were served")
        per_replica = Counter(record["replica"] for record in records(server, "step")[seen:])
        assert set(per_replica) == {0, 1} and min(per_replica.values()) > 0.2 * max(per_replica.values())
        assert all(answer.status_code == 200 for answer in load.answers)
        assert len({one["pid"] for one in replicas(server)}) == 2
        assert state(server)["num_engine_restarts"] == 0


def test_reconfiguring_prepares_by_itself_and_keeps_both_engines_alike(tmp_path: Path) -> None:
    with live_server(tmp_path, env=SLOW) as server, server.control() as control:
        control.reconfigure({"replicas": 3, "max_num_seqs": 5}, 0)
        done = control.reconfigure({"max_num_seqs": 6}, 1)
        assert done["version"] == 2
        with pytest.raises(StaleVersion):
            control.reconfigure({"max_num_seqs": 7}, 1)
        with pytest.raises(InvalidKnob):
            control.reconfigure({"max_num_seqs": 0}, None)
        told = state(server)
        assert (told["version"], told["champion"]["max_num_seqs"], len(told["replicas"])) == (2, 6, 3)
        with Load(server, 6, 60) as load:
            wait_until(lambda: len(load.answers) > 30, "requests were served")
        tagged = {(record["replica"], record["config_id"]) for record in records(server, "step")}
        assert tagged == {(index, done["config_id"]) for index in range(3)}
        assert [one["event"] for one in records(server, "event")].count("config_committed") == 2


def test_gauges_and_metrics_are_of_all_engines(tmp_path: Path) -> None:
    with live_server(tmp_path, env={**CORES, "FAKE_STEP_S": "0.02"}) as server, server.control() as control:
        one_pool = state(server)["gauges"]["kv_total_tokens"]
        control.reconfigure({"replicas": 2}, None)
        threads = [threading.Thread(target=ask, args=(server, 100)) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait_until(lambda: [one["num_running"] for one in replicas(server)] == [2, 2], "both run two")
        told, metrics = state(server), control.metrics()
        assert told["gauges"]["kv_total_tokens"] == 2 * one_pool and told["gauges"]["num_running"] == 4
        assert metrics['tuner_requests_running{model_name="demo_model"}'] == 4.0
        assert metrics['tuner_replica_requests{model_name="demo_model",replica="1"}'] == 2.0
        assert 0 < metrics['tuner_replica_outstanding_tokens{model_name="demo_model",replica="0"}'] <= 2 * 110
        assert len(control.identity()["engine_pids"]) == 2
        for thread in threads:
            thread.join(GUARD_S)
        assert [one["outstanding_tokens"] for one in replicas(server)] == [0, 0]


def test_killing_one_of_two_loses_no_request_that_had_no_token(tmp_path: Path) -> None:
    """Half of the requests are streams that have begun, half wait behind them."""
    env = {**CORES, "FAKE_STEP_S": "0.01", "FAKE_MAX_SEQS": "4"}
    with live_server(tmp_path, env=env) as server, server.control() as control:
        control.reconfigure({"replicas": 2}, None)
        answers: list[httpx.Response] = []
        threads = [threading.Thread(target=lambda: answers.append(ask(server, 60))) for _ in range(32)]
        for thread in threads:
            thread.start()
        wait_until(lambda: [one["num_running"] for one in replicas(server)] == [16, 16], "both are full")
        begun_at = time.time()
        killed = replicas(server)[1]
        os.kill(killed["pid"], signal.SIGKILL)
        statuses = []
        with server.http() as http:
            while any(thread.is_alive() for thread in threads):
                statuses.append(http.get("/health").status_code)
                time.sleep(0.005)
        assert set(statuses) == {200}
        ended = Counter(answer.status_code for answer in answers)
        assert ended[200] + ended[500] == 32 and 1 <= ended[500] <= 16
        timings = records(server, "request")
        assert len({timing["request_id"] for timing in timings}) == len(timings) == 32
        lost = [timing for timing in timings if timing["finish_reason"] == "error"]
        assert len(lost) == ended[500]
        assert all(timing["first_token_at"] < begun_at + 1.0 for timing in lost)  # they had begun
        assert all(timing["output_tokens"] == 60 for timing in timings if timing["finish_reason"] == "length")
        wait_until(lambda: [one["phase"] for one in replicas(server)] == ["ready", "ready"], "it is back")
        told = state(server)
        assert told["num_engine_restarts"] == 1
        assert [one["num_restarts"] for one in told["replicas"]] == [0, 1]
        assert ask(server).status_code == 200


def test_each_engine_in_turn_may_die_and_the_champion_stays(tmp_path: Path) -> None:
    with live_server(tmp_path, env=CORES) as server, server.control() as control:
        done = control.reconfigure({"replicas": 2, "max_num_seqs": 9}, None)
        for index in (0, 1, 0):
            before = state(server)["num_engine_restarts"]
            os.kill(replicas(server)[index]["pid"], signal.SIGKILL)
            wait_until(lambda before=before: state(server)["num_engine_restarts"] == before + 1, "it died")  # type: ignore[misc]
            assert ask(server).status_code == 200
            wait_until(lambda: [one["phase"] for one in replicas(server)] == ["ready", "ready"], "it is back")
        told = state(server)
        assert (told["version"], told["config_id"]) == (done["version"], done["config_id"])


def test_an_engine_that_was_away_during_a_change_comes_back_with_it(tmp_path: Path) -> None:
    env = {**CORES, "FAKE_READY_S": "1", "FAKE_STEP_S": "0.005"}
    with live_server(tmp_path, env=env) as server, server.control() as control:
        control.reconfigure({"replicas": 2}, None)
        pid = replicas(server)[1]["pid"]
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: replicas(server)[1]["pid"] not in (None, pid), "it starts again")
        for num_seqs in (3, 4):  # after its hello, before it is ready
            done = control.reconfigure({"max_num_seqs": num_seqs}, None)
        assert replicas(server)[1]["phase"] == "restarting"
        wait_until(lambda: replicas(server)[1]["phase"] == "ready", "it is back")
        assert control.reconfigure({"max_num_seqs": 5}, done["version"])["version"] == done["version"] + 1
        with Load(server, 4, 60) as load:
            wait_until(lambda: len(load.answers) > 20, "requests were served")
        tagged = {(one["replica"], one["config_id"]) for one in records(server, "step")}
        assert tagged == {(index, state(server)["config_id"]) for index in (0, 1)}


def test_a_plan_sends_new_requests_to_as_many_engines_as_its_slice_says(tmp_path: Path) -> None:
    with live_server(tmp_path, env=SLOW) as server, server.control() as control:
        with pytest.raises(InvalidPlan, match="not prepared"):
            control.plan(plan_of(server, "p0", [("s0", 1, 0.0, 1.0), ("s0b", 2, 1.0, 2.0)]))
        control.prepare(champion_with(server, replicas=2))
        with Load(server, 4, 60) as load:
            wait_until(lambda: len(load.answers) > 4, "requests are served")
            slices = [("s1", 1, 0.5, 3.0), ("s2", 2, 3.0, 5.5), ("s3", 1, 5.5, 8.0)]
            control.plan(plan_of(server, "p1", slices))
            while state(server)["slice_id"] != "s3":
                control.lease("p1", 5.0)
                time.sleep(0.2)
            wait_until(lambda: state(server)["plan_id"] is None, "the plan is over")
        assert all(answer.status_code == 200 for answer in load.answers)
        steps: dict[Any, set[int]] = {}
        for step in records(server, "step"):
            steps.setdefault(step["slice_id"], set()).add(step["replica"])
        assert steps["s1"] == {0} and steps["s2"] == {0, 1} and 0 in steps["s3"]
        told = [
            (one["event"], one.get("slice_id")) for one in records(server, "event") if "slice" in one["event"]
        ]
        assert told == [
            (kind, one) for one in ("s1", "s2", "s3") for kind in ("slice_started", "slice_ended")
        ]
        by_slice = Counter(record["first_token_slice"] for record in records(server, "request"))
        assert min(by_slice[one] for one in ("s1", "s2", "s3")) > 0


def test_a_dead_engine_takes_the_plan_with_it_on_all_the_others(tmp_path: Path) -> None:
    with live_server(tmp_path, env=CORES) as server, server.control() as control:
        control.prepare(champion_with(server, replicas=2))
        for index in (1, 0):
            control.plan(plan_of(server, f"p{index}", [(f"s{index}", 2, 0.0, 500.0)]))
            wait_until(lambda index=index: state(server)["slice_id"] == f"s{index}", "the slice began")  # type: ignore[misc]
            os.kill(replicas(server)[index]["pid"], signal.SIGKILL)
            wait_until(lambda: state(server)["plan_id"] is None, "the plan ended")
            told = state(server)
            assert told["slice_id"] is None and told["config_id"] == told["champion_config_id"]
            with pytest.raises((NoPlan, EngineNotReady)):
                control.lease(f"p{index}", 5.0)
            wait_until(lambda: {one["phase"] for one in replicas(server)} == {"ready"}, "it is back")
            with pytest.raises(NoPlan):
                control.lease(f"p{index}", 5.0)
            assert ask(server).status_code == 200
            assert [one for one in records(server, "step") if one["slice_id"] is None]
        ended = [one["plan_id"] for one in records(server, "event") if one["event"] == "plan_aborted"]
        assert ended == ["p1", "p0"]


def test_a_plan_that_one_engine_refuses_is_on_none(tmp_path: Path) -> None:
    refuse = tmp_path / "refuse"
    env = {**CORES, "FAKE_REFUSE_FILE": str(refuse)}
    with live_server(tmp_path / "run", env=env) as server, server.control() as control:
        control.prepare(champion_with(server, replicas=2))
        refuse.touch()
        with pytest.raises(InvalidPlan, match="told to refuse"):
            control.plan(plan_of(server, "p1", [("s1", 2, 0.0, 500.0)]))
        wait_until(lambda: state(server)["plan_id"] is None, "no plan is in force")
        with pytest.raises(NoPlan):
            control.lease("p1", 5.0)
        refuse.unlink()
        control.plan(plan_of(server, "p2", [("s2", 2, 0.0, 500.0)]))
        assert control.lease("p2", 5.0)["plan_id"] == "p2"
        control.abort("p2", "enough")
        wait_until(lambda: state(server)["plan_id"] is None, "the plan is over")


def test_a_lapsed_lease_brings_the_champion_back_on_all(tmp_path: Path) -> None:
    with live_server(tmp_path, env=CORES) as server, server.control() as control:
        control.prepare(champion_with(server, replicas=2))
        plan = plan_of(server, "p1", [("s1", 2, 0.0, 500.0)])
        control.plan(SlicePlan(plan.plan_id, "x1", plan.expected_version, plan.configs, plan.slices, 0.5))
        wait_until(lambda: state(server)["plan_id"] is None, "the lease lapsed")
        with pytest.raises(NoPlan):
            control.lease("p1", 5.0)
        told = state(server)
        assert told["config_id"] == told["champion_config_id"]


def test_engines_that_nobody_needs_are_stopped_once_their_requests_are_over(tmp_path: Path) -> None:
    env = {**CORES, "FAKE_STEP_S": "0.02"}
    with live_server(tmp_path, "--replica-keep-s", "0.2", env=env) as server, server.control() as control:
        control.reconfigure({"replicas": 2}, None)
        answers: list[httpx.Response] = []
        threads = [threading.Thread(target=lambda: answers.append(ask(server, 150))) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_until(lambda: [one["num_live"] for one in replicas(server)] == [1, 1], "one request each")
        control.reconfigure({"replicas": 1}, None)
        for thread in threads:
            thread.join(GUARD_S)
        assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [150, 150]
        wait_until(lambda: len(replicas(server)) == 1, "the second engine is stopped")
        assert state(server)["num_engine_restarts"] == 0
        assert [one["replica"] for one in records(server, "event") if one["event"] == "engine_stopped"] == [1]
        assert not (tmp_path / "engine-1.sock").exists()
        control.reconfigure({"replicas": 2}, None)
        assert [one["phase"] for one in replicas(server)] == ["ready", "ready"]


def test_a_server_started_with_two_replicas_has_two(tmp_path: Path) -> None:
    with live_server(tmp_path, "--config", '{"replicas": 2}', env=CORES) as server:
        wait_until(lambda: [one["phase"] for one in replicas(server)] == ["ready", "ready"], "both are ready")
        assert state(server)["version"] == 0


def test_too_many_replicas_are_lowered_at_the_start_and_refused_later(tmp_path: Path) -> None:
    with live_server(tmp_path, "--config", '{"replicas": 8}') as server, server.control() as control:
        wait_until(lambda: [one["phase"] for one in replicas(server)] == ["ready", "ready"], "two are ready")
        (report,) = [one for one in state(server)["knobs"] if one["name"] == "replicas"]
        assert report["high"] == 2 == state(server)["champion"]["replicas"]
        with pytest.raises(InvalidKnob, match="at most 2 on this machine, but got 3"):
            control.prepare(champion_with(server, replicas=3))
        with pytest.raises(InvalidKnob, match=r"must be in \[1, 8\]"):
            control.prepare(champion_with(server, replicas=9))
        with pytest.raises(InvalidKnob, match=r"must be in \[1, 8\]"):
            control.reconfigure({"replicas": 9}, None)


def test_a_replica_without_memory_is_refused_with_the_numbers(tmp_path: Path) -> None:
    with (
        live_server(tmp_path, env={**CORES, "FAKE_RSS_BYTES": str(10**15)}) as server,
        server.control() as control,
    ):
        wait_until(lambda: state(server)["gauges"] != {}, "the engine told its gauges")
        before = state(server)
        for refused in (
            lambda: control.prepare(champion_with(server, replicas=2)),
            lambda: control.reconfigure({"replicas": 2}, None),
        ):
            with pytest.raises(
                PrepareFailed, match=r"1 more engine\(s\) of 1,000,000,000 MB of memory, but 80% of"
            ):
                refused()
        after = state(server)
        assert (after["version"], after["config_id"]) == (before["version"], before["config_id"])
        assert len(after["replicas"]) == 1 and ask(server).status_code == 200


def test_a_replica_that_cannot_start_fails_the_preparation_alone(tmp_path: Path) -> None:
    fail = tmp_path / "fail"
    with live_server(tmp_path / "run", env={**CORES, "FAKE_FAIL_FILE": str(fail)}) as server:
        fail.touch()
        with server.control() as control:
            with pytest.raises(PrepareFailed, match="engine 1: it ended with exit code 66"):
                control.prepare(champion_with(server, replicas=2))
            assert len(replicas(server)) == 1 and ask(server).status_code == 200
            fail.unlink()
            control.prepare(champion_with(server, replicas=2))
            assert [one["phase"] for one in replicas(server)] == ["ready", "ready"]


def test_a_malformed_preparation_is_refused(tmp_path: Path) -> None:
    with live_server(tmp_path) as server:
        key = {"authorization": f"Bearer {(tmp_path / 'control.key').read_text()}"}
        url = f"{server.file.control_url}/control/prepare"
        for body in ({}, {"values": 3}, {"values": {"replicas": "two"}}, {"values": {"replicaz": 2}}, []):
            answer = httpx.post(url, json=body, headers=key, trust_env=False)
            assert answer.status_code == 400 and answer.json()["error"]["message"], answer.text


def test_sigterm_ends_all_engines(tmp_path: Path) -> None:
    with live_server(tmp_path, env=CORES) as server, server.control() as control:
        control.reconfigure({"replicas": 3}, None)
        pids = [one["pid"] for one in replicas(server)]
        server.process.terminate()
        assert server.process.wait(GUARD_S) == 0
        assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        assert not list(tmp_path.glob("engine*.sock"))
