"""The dashboard's end of the daemon's API: whatever is the case becomes a state, never an exception."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from dashboard import daemon


@pytest.fixture
def stranger():
    """Something that listens where the daemon did, and keeps what it was sent."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.headers.get("authorization"))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port, seen
    server.shutdown()
    thread.join()
    server.server_close()


def announce(folder, url):
    folder.mkdir(exist_ok=True)
    (folder / "daemon.json").write_text(json.dumps({"url": url, "pid": 1}))
    (folder / "daemon.key").write_text("k" * 64)


def test_status_and_wishes_reach_the_daemon(empty, served, data_dir):
    asked = served("Tuning is paused; the champion serves.", is_paused=True, num_failures={"search": 2})
    found = daemon.status_of(data_dir)
    assert found.is_running and found.role == "operator" and found.is_paused and found.why_not_act == ""
    assert found.failures == {"search": 2}
    answer = daemon.act(data_dir, "pause", {}, "ada")
    assert answer.is_done and asked == [("pause", {}, "ada", "operator")]


def test_refusal_is_not_taken_for_a_success(empty, served, data_dir):
    served("Refused: champion a was expected, but b serves by now.")
    assert not daemon.act(data_dir, "rollback", {"to": "previous"}, "ada").is_done


def test_bad_argument_is_answered_and_not_raised(empty, served, data_dir):
    asked = served()
    assert not daemon.act(data_dir, "rollback", {"to": "elsewhere"}, "ada").is_done and asked == []


def test_missing_daemon_is_a_state(tmp_path):
    found = daemon.status_of(tmp_path)
    assert not found.is_running and "No daemon runs" in found.why_not and "tuner run" in found.why_not_act


def test_silent_daemon_is_a_state(tmp_path):
    announce(tmp_path, "http://127.0.0.1:9")
    assert "does not answer" in daemon.status_of(tmp_path).why_not


def test_stranger_on_the_port_is_not_the_daemon(tmp_path, stranger):
    announce(tmp_path, f"http://127.0.0.1:{stranger[0]}")
    assert "not the daemon" in daemon.status_of(tmp_path).why_not


@pytest.mark.parametrize(
    "url",
    [
        "http://evil.example:80",
        "http://127.0.0.1.evil.example:80",
        "http://127.0.0.1:1@evil.example",
        "file:///x",
        "",
    ],
)
def test_key_is_sent_to_loopback_alone(tmp_path, url):
    announce(tmp_path, url)
    assert "not on this machine" in daemon.status_of(tmp_path).why_not


def test_without_a_readable_key_the_reason_is_told(tmp_path):
    announce(tmp_path, "http://127.0.0.1:9")
    (tmp_path / "daemon.key").unlink()
    assert "daemon.key nor viewer.key" in daemon.status_of(tmp_path).why_not


def test_viewers_key_is_used_where_the_role_or_the_files_say_so(tmp_path, monkeypatch):
    for name, key in (("daemon.key", "o"), ("viewer.key", "v")):
        (tmp_path / name).write_text(key)
    assert daemon.key_of(tmp_path) == ("operator", "o")
    monkeypatch.setenv("TUNER_DASHBOARD_ROLE", "viewer")
    assert daemon.key_of(tmp_path) == ("viewer", "v")
    monkeypatch.setenv("TUNER_DASHBOARD_ROLE", "operator")
    (tmp_path / "daemon.key").unlink()
    assert daemon.key_of(tmp_path) == ("viewer", "v")
