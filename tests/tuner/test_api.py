import json
import stat
from concurrent.futures import Future

import httpx
import pytest

from tuner.api import DaemonClient, DaemonServer
from tuner.errors import DaemonNotRunning, PortInUse


@pytest.fixture
def server(tmp_path):
    asked = []

    def wish(action, arguments, actor):
        asked.append((action, dict(arguments), actor))
        answer = Future()
        answer.set_result(f"{action} done")
        return answer

    one = DaemonServer(tmp_path, 0, lambda: {"doing": "Nothing."}, wish)
    one.asked = asked
    one.start()
    yield one
    one.close()


@pytest.fixture
def client(server, tmp_path):
    for _ in range(100):
        try:
            DaemonClient(tmp_path).status()
            break
        except DaemonNotRunning:
            continue
    return DaemonClient(tmp_path)


def test_status_and_actions_reach_the_daemon(client, server):
    assert client.status() == {"doing": "Nothing."}
    assert client.act("rollback", {"to": "initial"}) == "rollback done"
    assert server.asked[0][:2] == ("rollback", {"to": "initial"})


def test_wrong_or_missing_key_is_refused_on_every_route(client, server):
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": server.key}):
        for method, path in (("GET", "/status"), ("POST", "/actions/pause"), ("GET", "/nothing")):
            answer = httpx.request(method, server.url + path, headers=headers, json={}, trust_env=False)
            assert answer.status_code in (401, 404) and "Nothing." not in answer.text
    assert server.asked == []


def test_unknown_action_names_the_known_ones(client):
    with pytest.raises(DaemonNotRunning, match="pause, resume, rollback"):
        client.act("explode", {})


def test_key_and_address_are_for_the_owner_alone(server, tmp_path):
    for name in ("daemon.key", "daemon.json"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


def test_dead_daemon_is_told_from_a_missing_one(tmp_path):
    with pytest.raises(DaemonNotRunning, match="No daemon runs"):
        DaemonClient(tmp_path)
    (tmp_path / "daemon.json").write_text(json.dumps({"url": "http://127.0.0.1:9", "pid": 1}))
    (tmp_path / "daemon.key").write_text("k")
    with pytest.raises(DaemonNotRunning, match="does not answer"):
        DaemonClient(tmp_path).status()


def test_taken_port_is_named(server, tmp_path):
    port = int(server.url.rpartition(":")[2])
    with pytest.raises(PortInUse, match=str(port)):
        DaemonServer(tmp_path, port, dict, lambda *a: None)
