"""A server that is asked to end keeps its last records for the daemon that read the ones before."""

import time
from contextlib import suppress

from runtime.errors import RuntimeUnreachable
from tests.servers import GUARD_S, live_server

BODY = {"prompt": [5, 6, 7], "max_tokens": 4}


def test_last_records_wait_for_the_daemon_that_read_the_ones_before(tmp_path):
    with live_server(tmp_path) as server, server.http() as http, server.control() as control:
        page = control.drain(server.file.boot_id, 0)
        answer = http.post("/v1/completions", json=BODY).json()
        control.shutdown(10.0)
        time.sleep(0.5)  # it has drained by now, and still answers us
        seen: list[str] = []
        while server.process.poll() is None and not seen:
            page = control.drain(server.file.boot_id, page["next_seq"])
            seen += [record["request_id"] for record in page["records"] if record["kind"] == "request"]
        assert seen == [answer["id"].removeprefix("cmpl-")]
        with suppress(
            RuntimeUnreachable
        ):  # it waits some seconds only, and has ended on a machine that is busy
            control.drain(server.file.boot_id, page["next_seq"])  # which says that we have them
        assert server.process.wait(GUARD_S) == 0


def test_server_whose_records_nobody_reads_does_not_wait(tmp_path):
    with live_server(tmp_path) as server, server.http() as http, server.control() as control:
        http.post("/v1/completions", json=BODY)
        control.shutdown(10.0)
        assert server.process.wait(GUARD_S) == 0
        assert "stopped" in server.log()
