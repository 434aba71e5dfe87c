"""How soon bad requests are answered and what they leave in memory: python -m tests.benchmarks.bad_input.

A real server with the demo model. Prints a table, then one JSON document; exit 1
where an answer took longer than the bar, was none of the client's errors, or left memory behind.
"""

import argparse
import http.client
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple
from urllib.parse import urlsplit

import psutil

from tests.servers import LiveServer, live_server

BAR_S = 0.050
MAX_GROWTH_BYTES = 16 * 2**20
HUGE_BYTES = 100_000_000
PIECE = b" " * 2**16


class Bad(NamedTuple):
    name: str
    body: bytes
    path: str = "/v1/completions"
    is_huge: bool = False
    is_announced: bool = True


def bads() -> Iterator[Bad]:
    def one(name: str, **changed: object) -> Bad:
        asked = {"model": "demo_model", "prompt": "def f():\n", "max_tokens": 4, **changed}
        return Bad(name, json.dumps(asked).encode())

    yield one("n of 1000", n=1000)
    yield one("logprobs of 1000", logprobs=1000)
    yield one("logprobs of 64 long prompts", prompt=[[5] * 2000] * 64, echo=True, logprobs=20)
    yield one("prompt_logprobs of a stream", prompt_logprobs=1, stream=True)
    yield one("temperature NaN", temperature=float("nan"))
    yield one("temperature infinite", temperature=float("inf"))
    yield one("max_tokens beyond the context", max_tokens=10**9)
    yield one("prompt beyond the context", prompt="x " * 100_000)
    yield one("prompt of a million tokens", prompt=[5] * 650_000)
    yield one("token id that is none", prompt=[5, 10**8])
    yield one("stop of a thousand", stop=["a"] * 1000)
    yield one("logit_bias of 100000", logit_bias={str(token): 1 for token in range(100_000)})
    # As many as are parsed, so that only the fields' own rules refuse them.
    yield one("130000 token ids", prompt=[4000] * 130_000)
    yield one("16000 fractions", prompt=[1e-9] * 16_000)
    yield one("130000 fractions", prompt=[1e-9] * 130_000)
    yield one("130000 lists", prompt=[[]] * 130_000)
    yield one("32000 names", logit_bias={f"{token:x}": 1 for token in range(32_000)})
    yield Bad("500 numbers of 4000 digits", b'{"prompt": [' + b",".join([b"9" * 4000] * 500) + b"]}")
    yield Bad("number of 5000 digits", b'{"seed": 1' + b"0" * 5000 + b"}")
    yield Bad("depth of 10000", b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}")
    yield Bad("depth of a million", b"[" * 1_000_000)
    yield Bad("no JSON", b"\xff\xfe\0")
    yield Bad("lone surrogate", b'{"model": "demo_model", "prompt": "\\ud800"}')
    yield Bad("100 MB announced", b"", is_huge=True)
    yield Bad("100 MB unannounced", b"", is_huge=True, is_announced=False)
    messages = [{"role": "user", "content": "x"}] * 100_000
    yield Bad(
        "100000 messages", json.dumps({"messages": messages}).encode()[: 2 * 2**20], "/v1/chat/completions"
    )


def ask(url: str, bad: Bad) -> tuple[int, float]:
    """The status, and how long its answer took from the first byte sent (of a huge body: while it is still sent)."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30.0)
    try:
        connection.connect()
        started = time.perf_counter()
        connection.putrequest("POST", bad.path)
        if not bad.is_announced:
            connection.putheader("transfer-encoding", "chunked")
        else:
            connection.putheader("content-length", str(HUGE_BYTES if bad.is_huge else len(bad.body)))
        connection.endheaders(b"" if bad.is_huge else bad.body)
        if bad.is_huge:
            threading.Thread(target=_send_huge, args=(connection, bad.is_announced), daemon=True).start()
        answer = connection.getresponse()
        return answer.status, time.perf_counter() - started
    finally:
        connection.close()


def _send_huge(connection: http.client.HTTPConnection, is_announced: bool) -> None:
    """Until the server hangs up, as it should."""
    piece = PIECE if is_announced else b"%x\r\n%b\r\n" % (len(PIECE), PIECE)
    try:
        for _ in range(HUGE_BYTES // len(PIECE)):
            connection.send(piece)
    except (OSError, http.client.HTTPException, AttributeError):
        pass


def rss_bytes(server: LiveServer) -> int:
    process = psutil.Process(server.process.pid)
    return sum(one.memory_info().rss for one in [process, *process.children(recursive=True)])


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.bad_input", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("--times", type=int, default=20, help="each is asked so often")
    times = parser.parse_args().times
    failed, rows = [], []
    with tempfile.TemporaryDirectory() as folder:
        arguments = ("--device", "cpu", "--kv-tokens", "8192")
        with live_server(Path(folder), *arguments, engine_module="runtime.engine") as server:
            known = list(bads())
            for bad in known:  # what is loaded at first use is no growth
                ask(server.api_url, bad)
            print(f"{'bad input':<32}{'status':>7}{'median ms':>11}{'worst ms':>10}{'memory MiB':>12}")
            for bad in known:
                before = rss_bytes(server)
                answers = [ask(server.api_url, bad) for _ in range(times)]
                grown = rss_bytes(server) - before
                statuses = {status for status, _ in answers}
                took = [seconds for _, seconds in answers]
                rows.append({
                    "name": bad.name, "statuses": sorted(statuses), "median_s": median(took), "worst_s": max(took),
                    "grown_bytes": grown,
                })  # fmt: skip
                print(f"{bad.name:<32}{'/'.join(map(str, sorted(statuses))):>7}{1000 * median(took):>11.1f}"
                      f"{1000 * max(took):>10.1f}{grown / 2**20:>12.1f}", flush=True)  # fmt: skip
                if (
                    max(took) > BAR_S
                    or grown > MAX_GROWTH_BYTES
                    or not all(400 <= status < 500 for status in statuses)
                ):
                    failed.append(bad.name)
            server.wait_idle()
    print(
        json.dumps({"benchmark": "bad_input", "times": times, "bar_s": BAR_S, "failed": failed, "rows": rows})
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
