"""Who may call: the keys of clients, and the refusal to serve other machines without one."""

import subprocess

import pytest

from runtime.errors import Unauthorized
from runtime.key_guard import check_exposure, client_key, is_loopback
from tests.servers import command, live_server

KEY = "0123456789abcdef-of-a-client"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_needs_no_key(host):
    check_exposure(host, None, False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "127.0.0.1.example.org"])
def test_other_machines_need_a_key_or_an_explicit_word(host):
    with pytest.raises(Unauthorized, match=r"--api-key-file.*TUNER_API_KEY.*--insecure"):
        check_exposure(host, None, False)
    check_exposure(host, KEY, False)
    check_exposure(host, None, True)
    assert not is_loopback(host)


def test_file_wins_over_environment(tmp_path):
    path = tmp_path / "key"
    path.write_text(f"{KEY}\nwhat it is for\n")
    assert client_key(path, {"TUNER_API_KEY": "another-key-of-some-length"}) == KEY
    assert client_key(None, {"TUNER_API_KEY": KEY}) == KEY
    assert client_key(None, {"TUNER_API_KEY": ""}) is None
    assert client_key(None, {}) is None


@pytest.mark.parametrize("text", ["", "\n", "short", "schlüssel-mit-umlauten", "tab\tin-the-middle-of-it"])
def test_key_that_is_none_is_refused_by_its_length_and_never_shown(tmp_path, text):
    path = tmp_path / "key"
    path.write_text(text)
    with pytest.raises(Unauthorized, match="at least 16 printable") as refused:
        client_key(path, {})
    assert not text.strip() or text not in str(refused.value)


def test_missing_key_file_is_refused_with_its_path(tmp_path):
    with pytest.raises(Unauthorized, match="nowhere"):
        client_key(tmp_path / "nowhere", {"TUNER_API_KEY": KEY})


def test_server_for_other_machines_without_a_key_does_not_start(tmp_path):
    words = command(tmp_path, "--host", "0.0.0.0")
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env={"PATH": ""}, check=False)
    assert done.returncode == 2 and "--insecure" in done.stderr and "Traceback" not in done.stderr


def test_every_route_but_health_asks_for_the_key(tmp_path):
    with (
        live_server(tmp_path, "--host", "0.0.0.0", env={"TUNER_API_KEY": KEY}) as server,
        server.http() as http,
    ):
        paths = ["/v1/models", "/v1/models/demo_model", "/version", "/load", "/metrics", "/docs", "/openapi.json",
                 "/nowhere", "//health", "/health/", "/v1/%2e%2e/health", "/%2e/metrics"]  # fmt: skip
        for wrong in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}, {"host": "evil/?"}):
            for path in paths:
                answer = http.get(path, headers=wrong)
                assert answer.status_code == 401, (path, wrong)
                assert answer.json()["error"]["code"] == "invalid_api_key" and KEY not in answer.text
        body = {"prompt": "x", "max_tokens": 2}
        assert http.post("/v1/completions", json=body).status_code == 401
        right = {"authorization": f"Bearer {KEY}"}
        assert http.post("/v1/completions", json=body, headers=right).status_code == 200
        assert http.get("/v1/models", headers=right).status_code == 200
        assert [http.get(path).status_code for path in ("/health", "/ready", "/ping")] == [200] * 3
        control = server.control()
        assert control.state()["engine"] == "ready"  # the daemon's own listener has its own key
        control.close()
        assert KEY not in server.log()
