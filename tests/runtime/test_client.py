"""The daemon's side: the control routes through RuntimeClient, against a live server with the fake engine."""

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from runtime.client import Control, RuntimeClient, read_control_key, read_runtime_file
from runtime.errors import (
    InvalidKnob,
    InvalidPlan,
    InvalidRequest,
    NoPlan,
    RuntimeUnreachable,
    StaleVersion,
    Unauthorized,
)
from runtime.knobs import EngineConfig
from runtime.plan import PlannedSlice, SlicePlan
from tests.servers import LiveServer, live_server, wait_until

ROUTES = [
    ("GET", "/control/identity"), ("GET", "/control/state"), ("POST", "/control/reconfigure"),
    ("POST", "/control/plan"),
    ("POST", "/control/lease"), ("POST", "/control/abort"), ("GET", "/control/drain"), ("POST", "/control/shutdown"),
    ("GET", "/control/nothing"), ("GET", "/"), ("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "//control/state"),
    ("GET", "/control/../control/state"), ("GET", "/%2e%2e/control/state"), ("OPTIONS", "/control/state"),
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("server"), "--served-model-name", "m") as live:
        yield live


@pytest.fixture
def control(server: LiveServer) -> Iterator[RuntimeClient]:
    with server.control() as control:
        yield control
        control.abort("p", "the test ended")
        control.reconfigure(EngineConfig().values(), None)


def plan_of(
    control: Control, *, plan_id: str = "p", lease_s: float = 5.0, version: int | None = None
) -> SlicePlan:
    state = control.state()
    challenger = EngineConfig.of({**state["champion"], "max_num_seqs": 3})
    now = time.time()
    configs = {state["champion_config_id"]: state["champion"], challenger.config_id: challenger.values()}
    slices = (
        PlannedSlice(f"{plan_id}-a", "challenger", challenger.config_id, now, now + 400.0, 0.0),
        PlannedSlice(f"{plan_id}-b", "champion", state["champion_config_id"], now + 400.0, now + 800.0, 0.0),
    )
    return SlicePlan(plan_id, "x", state["version"] if version is None else version, configs, slices, lease_s)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_needs_the_key(server: LiveServer, method: str, path: str) -> None:
    key = read_control_key(server.run_dir)
    wrong = [
        "",
        "Bearer",
        f"Bearer {key[:-1]}",
        f"Bearer {key}x",
        f"bearer {key}",
        key,
        f"Basic {key}",
    ]
    with httpx.Client(base_url=server.file.control_url, trust_env=False) as http:
        for given in wrong:
            answer = http.request(method, path, headers={"authorization": given} if given else {})
            assert answer.status_code == 401, (path, given)
            assert answer.json()["error"]["kind"] == "unauthorized"
        twice = http.request(
            method, path, headers=[("authorization", "Bearer x"), ("authorization", f"Bearer {key}")]
        )
        assert twice.status_code == 401


def test_a_wrong_key_is_unauthorized(server: LiveServer) -> None:
    with RuntimeClient(server.file.control_url, "0" * 64) as control, pytest.raises(Unauthorized):
        control.state()


def test_the_key_appears_in_no_log_and_no_command_line(server: LiveServer) -> None:
    key = read_control_key(server.run_dir)
    assert key not in server.log()
    assert key not in Path(f"/proc/{server.process.pid}/cmdline").read_text()


def test_unknown_routes_answer_with_the_error_shape(server: LiveServer) -> None:
    headers = {"authorization": f"Bearer {read_control_key(server.run_dir)}"}
    with httpx.Client(base_url=server.file.control_url, headers=headers, trust_env=False) as http:
        assert http.get("/control/nothing").json()["error"]["kind"] == "no_such_route"
        assert http.get("/control/plan").status_code == 405
        assert http.post("/control/reconfigure", content=b"{").status_code == 400
        assert http.post("/control/plan", json={"plan_id": "p"}).json()["error"]["kind"] == "invalid_plan"


def test_identity_tells_model_hardware_and_addresses(server: LiveServer, control: RuntimeClient) -> None:
    told = control.identity()
    assert (told["boot_id"], told["pid"], told["api_url"]) == (
        server.file.boot_id,
        server.process.pid,
        server.api_url,
    )
    assert (told["model"]["name"], told["model"]["vocab_size"], told["model"]["max_model_len"]) == (
        "m",
        4096,
        2048,
    )
    assert told["hardware"]["num_cores"] == 2
    assert set(told["versions"]) == {"python", "torch", "transformers", "runtime"}


def test_metrics_are_read_without_the_control_key(control: RuntimeClient) -> None:
    assert control.metrics()['tuner_engine_ready{model_name="m"}'] == 1.0


def test_reconfigure_raises_the_version_and_the_state_shows_it_at_once(control: RuntimeClient) -> None:
    before = control.state()
    done = control.reconfigure({"max_num_seqs": 9}, before["version"])
    after = control.state()
    assert done["version"] == before["version"] + 1 == after["version"]
    assert done["config_id"] == after["config_id"] == after["champion_config_id"] != before["config_id"]
    assert after["config"]["max_num_seqs"] == done["config"]["max_num_seqs"] == 9
    assert {"prepare_s", "commit_us"} <= done.keys()
    assert after["knobs"][0]["name"] == "max_num_seqs"


def test_a_stale_version_and_a_bad_knob_change_nothing(control: RuntimeClient) -> None:
    before = control.state()
    with pytest.raises(StaleVersion):
        control.reconfigure({"max_num_seqs": 9}, before["version"] - 1)
    with pytest.raises(InvalidKnob, match="Did you mean"):
        control.reconfigure({"max_num_seq": 9}, None)
    with pytest.raises(InvalidKnob, match="5000"):
        control.reconfigure({"max_num_seqs": 5000}, None)
    assert control.state()["config_id"] == before["config_id"]


def test_a_plan_puts_the_challenger_in_force_and_abort_takes_it_back(control: RuntimeClient) -> None:
    plan = plan_of(control)
    assert control.plan(plan) == control.plan(plan) == {"plan_id": "p", "accepted": True}
    wait_until(lambda: control.state()["slice_id"] == "p-a", "the challenger is in force")
    state = control.state()
    assert state["plan_id"] == "p" and state["config"]["max_num_seqs"] == 3
    assert state["config_id"] != state["champion_config_id"]
    assert "p-a" in state["slice_stats"]
    lease = control.lease("p", 5.0)
    assert (
        lease["slice_id"] == "p-a" and control.state()["lease_expires_at"] >= lease["lease_expires_at"] - 5.0
    )
    assert control.abort("p", "enough") == control.abort("p", "enough")
    wait_until(lambda: control.state()["slice_id"] is None, "the champion is back")
    state = control.state()
    assert (state["plan_id"], state["config_id"]) == (None, state["champion_config_id"])
    with pytest.raises(NoPlan):
        control.lease("p", 5.0)


def test_a_lease_that_nobody_renews_brings_the_champion_back(control: RuntimeClient) -> None:
    control.plan(plan_of(control, lease_s=0.3))
    wait_until(lambda: "lease_lapsed" in events(control), "the lease lapsed")
    state = control.state()
    assert (state["plan_id"], state["slice_id"], state["config_id"]) == (
        None,
        None,
        state["champion_config_id"],
    )


def test_a_stale_or_contradictory_plan_is_refused(control: RuntimeClient) -> None:
    with pytest.raises(StaleVersion):
        control.plan(plan_of(control, version=999))
    with pytest.raises(InvalidPlan):
        control.plan(plan_of(control, lease_s=60.0))
    with pytest.raises(InvalidRequest):
        control.lease("", 5.0)


def events(control: RuntimeClient) -> list[str]:
    return [
        record["event"] for record in control.drain(None, 0, 20_000)["records"] if record["kind"] == "event"
    ]


def test_a_drain_repeats_until_it_is_acknowledged(server: LiveServer, control: RuntimeClient) -> None:
    with server.openai() as client:
        client.completions.create(model="m", prompt="one two three", max_tokens=5)
    server.wait_idle()
    first = control.drain(None, 0)
    again = control.drain(first["boot_id"], 0)
    assert again["records"][: len(first["records"])] == first["records"]
    request = next(record for record in again["records"] if record["kind"] == "request")
    assert (
        request["output_tokens"] == 5 and request["gaps"]["num"] == 4 and request["admitted_at"] is not None
    )
    assert any(record["kind"] == "step" for record in again["records"])
    seqs = [record["seq"] for record in again["records"]]
    assert seqs == sorted(seqs) and again["next_seq"] == seqs[-1] and again["dropped"] == 0

    rest = control.drain(again["boot_id"], again["next_seq"])
    assert all(record["seq"] > again["next_seq"] for record in rest["records"])
    assert all(record["seq"] > again["next_seq"] for record in control.drain("another-boot", 0)["records"])
    assert (
        control.drain("another-boot", rest["next_seq"] + 100)["records"] == control.drain(None, 0)["records"]
    )


def test_a_drain_is_paged_in_order(server: LiveServer, control: RuntimeClient) -> None:
    with server.openai() as client:
        client.completions.create(model="m", prompt="one two three", max_tokens=8)
    server.wait_idle()
    boot, cursor, seen = server.file.boot_id, 0, []
    while (page := control.drain(boot, cursor, 3))["records"]:
        assert len(page["records"]) <= 3
        seen += [record["seq"] for record in page["records"]]
        cursor = page["next_seq"]
    assert seen == list(range(seen[0], seen[0] + len(seen)))


def test_tokens_are_attributed_to_the_slice_that_made_them(
    server: LiveServer, control: RuntimeClient
) -> None:
    control.plan(plan_of(control, plan_id="p"))
    wait_until(lambda: control.state()["slice_id"] == "p-a", "the slice began")
    with server.openai() as client:
        client.completions.create(model="m", prompt="one two three", max_tokens=6)
    server.wait_idle()
    requests = [record for record in control.drain(None, 0, 20_000)["records"] if record["kind"] == "request"]
    assert requests[-1]["arrival_slice"] == requests[-1]["first_token_slice"] == "p-a"
    assert requests[-1]["slices"]["p-a"][:2] == [6, 5]
    stats = control.state()["slice_stats"]["p-a"]
    assert (stats["num_arrived"], stats["num_finished"], stats["num_first_tokens"], stats["num_pending"]) == (
        1,
        1,
        1,
        0,
    )


def test_state_counts_requests_and_errors(server: LiveServer, control: RuntimeClient) -> None:
    before = control.state()["counters"]
    with server.http() as http:
        assert (
            http.post("/v1/completions", json={"prompt": "hi you", "max_tokens": 3, "odd": 1}).status_code
            == 200
        )
        assert http.post("/v1/completions", json={"prompt": "hi", "top_p": 9}).status_code == 400
    after = control.state()["counters"]
    assert after["requests_total"] == before["requests_total"] + 1
    assert after["finished_total"] == before["finished_total"] + 1
    assert after["tokens_total"] == before["tokens_total"] + 3
    assert after["prompt_tokens_total"] == before["prompt_tokens_total"] + 2
    assert (
        after["errors_by_kind"]["invalid_request"] == before["errors_by_kind"].get("invalid_request", 0) + 1
    )
    assert after["unknown_fields"]["odd"] == before["unknown_fields"].get("odd", 0) + 1


def test_an_address_where_nobody_listens_is_unreachable(tmp_path: Path) -> None:
    with (
        RuntimeClient("http://127.0.0.1:9", "0" * 64, limit_s=2.0) as control,
        pytest.raises(RuntimeUnreachable),
    ):
        control.state()
    with pytest.raises(RuntimeUnreachable, match="announced"):
        RuntimeClient.of_run_dir(tmp_path)
    assert read_runtime_file(tmp_path) is None
    (tmp_path / "runtime.json").write_text('{"pid": 1')
    assert read_runtime_file(tmp_path) is None
