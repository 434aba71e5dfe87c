import http.client
import json
import stat
from concurrent.futures import Future
from urllib.parse import urlsplit

import httpx
import pytest

from tuner.api import ACTIONS, KEY_FILES, MAX_BODY_BYTES, ROUTES, DaemonClient, DaemonServer
from tuner.errors import DaemonNotRunning, PortInUse


@pytest.fixture
def server(tmp_path):
    asked = []

    def wish(action, arguments, actor, role):
        asked.append((action, dict(arguments), actor, role))
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


@pytest.fixture
def keys(client, tmp_path):
    """role -> its header; the client is asked for first: by then the server answers."""
    return {
        role: {"authorization": f"Bearer {(tmp_path / name).read_text()}"} for role, name in KEY_FILES.items()
    }


def call(server, method, path, headers, **sent):
    return httpx.request(method, server.url + path, headers=headers, trust_env=False, **sent)


def test_status_and_actions_reach_the_daemon_with_actor_and_role(client, server, monkeypatch):
    monkeypatch.setenv("USER", "ada")
    assert client.status() == {"doing": "Nothing.", "role": "operator"}
    assert client.act("rollback", {"to": "initial", "expected_champion": "abc"}) == "rollback done"
    assert server.asked == [("rollback", {"to": "initial", "expected_champion": "abc"}, "ada", "operator")]


def test_every_route_of_the_app_is_in_the_table_and_every_route_of_the_table_is_served(server):
    served = {(method, route.path) for route in server.app().routes for method in route.methods}
    assert served == set(ROUTES)


@pytest.mark.parametrize("role", ["viewer", "operator", None])
@pytest.mark.parametrize(("method", "path"), sorted(ROUTES))
def test_each_role_may_what_the_table_says_and_nothing_else(server, keys, role, method, path):
    for action in ACTIONS if "{action}" in path else ("",):
        answer = call(server, method, path.format(action=action), keys.get(role, {}), json={})
        expected = 401 if role is None else 200 if role in ROUTES[method, path] else 403
        assert answer.status_code == expected, answer.text
    if role != "operator":
        assert server.asked == []


def test_viewer_is_told_why_and_where_the_other_key_stands(server, keys):
    answer = call(server, "POST", "/actions/pause", keys["viewer"], json={})
    assert "viewer" in answer.json()["detail"] and "daemon.key" in answer.json()["detail"]
    assert call(server, "GET", "/status", keys["viewer"]).json()["role"] == "viewer"


def test_wrong_or_missing_key_is_refused_on_every_route(client, server):
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": server.key},
        {"authorization": ""},
    ):
        for method, path in (("GET", "/status"), ("POST", "/actions/pause"), ("GET", "/nothing")):
            answer = call(server, method, path, headers, json={})
            assert answer.status_code == 401 and "Nothing." not in answer.text
    assert server.asked == []


def test_other_host_names_are_refused_whatever_the_key(server, keys):
    for host in ("evil.example", "127.0.0.1.evil.example", "", "localhost.:80:80"):
        answer = call(server, "GET", "/status", {**keys["operator"], "host": host})
        assert answer.status_code == 421, host
    assert call(server, "GET", "/status", {**keys["operator"], "host": "localhost:1"}).status_code == 200


def test_body_is_limited_whatever_its_headers_say(server, keys):
    long = b'{"actor": "' + b"a" * MAX_BODY_BYTES + b'"}'
    assert call(server, "POST", "/actions/pause", keys["operator"], content=long).status_code == 413
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=10)
    connection.request("POST", "/actions/pause", iter([long]), keys["operator"], encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()
    assert server.asked == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[" * 8000,
        b"[]",
        b'{"to": "elsewhere"}',
        b'{"recommendation_id": -1}',
        b'{"actor": "a\\nb"}',
        b'{"x": 1}',
    ],
)
def test_bad_bodies_are_refused_and_never_reach_the_daemon(server, keys, body):
    headers = {**keys["operator"], "content-type": "application/json"}
    answer = call(server, "POST", "/actions/rollback", headers, content=body)
    assert answer.status_code in (400, 422)
    assert server.asked == []


def test_unknown_action_names_the_known_ones(client):
    with pytest.raises(DaemonNotRunning, match="pause, resume, rollback"):
        client.act("explode", {})


def test_keys_and_address_are_for_the_owner_alone(server, tmp_path):
    for name in ("daemon.key", "viewer.key", "daemon.json"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    assert (tmp_path / "daemon.key").read_text() != (tmp_path / "viewer.key").read_text()


def test_empty_key_file_lets_nobody_in(tmp_path):
    (tmp_path / "daemon.key").write_text("")
    one = DaemonServer(tmp_path, 0, dict, lambda *a: None)
    assert len(one.key) == 64 and one.role_of(b"Bearer ") is None
    one.close()


def test_client_with_the_viewers_key_alone_may_look_and_not_act(client, server, tmp_path):
    (tmp_path / "daemon.key").unlink()
    viewer = DaemonClient(tmp_path)
    assert viewer.status()["role"] == "viewer"
    with pytest.raises(DaemonNotRunning, match="403"):
        viewer.act("pause", {})


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
