"""Clients that no one here wrote, against the demo: python -m tests.end_to_end.foreign_clients WHICH --environment DIR.

    schemathesis   requests drawn from our OpenAPI document; every answer of 500 and above is a defect
    guidellm       a run of the load generator; every request must be answered
    aiperf         the same

Each needs an environment of its own, since they pin other versions than ours: `python -m venv DIR`, then
`DIR/bin/pip install schemathesis` (or guidellm, or aiperf). What the client prints comes through; the last line is one
JSON document, and the exit code is 1 where a request failed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.servers import DEMO_MODEL, LiveServer, live_server

NUM_REQUESTS = 60
PROMPT_TOKENS, OUTPUT_TOKENS = 32, 16
LIMIT_S = 580.0
SHORT_CONTEXT_TOKENS = 64  # chats are drawn without `max_tokens` and with 64 answers, which fill it


def schemathesis(bin_dir: Path, server: LiveServer, folder: Path, examples: int) -> dict[str, Any]:
    words = [
        str(bin_dir / "schemathesis"), "run", f"{server.api_url}/openapi.json", "--checks", "not_a_server_error",
        "--max-examples", str(examples), "--generation-database", "none", "--continue-on-failure", "--request-timeout",
        "60", "--report", "ndjson", "--report-dir", str(folder),
    ]  # fmt: skip
    code = run(words, folder, {})
    return {"exit_code": code, "errors_by_kind": counters(server)["errors_by_kind"]}


def guidellm(bin_dir: Path, server: LiveServer, folder: Path, examples: int) -> dict[str, Any]:
    words = [
        str(bin_dir / "guidellm"), "run", "--backend", f"kind=openai_http,target={server.api_url},model=demo_model",
        "--profile", "kind=concurrent,streams=4", "--constraint", f"kind=max_requests,count={NUM_REQUESTS}",
        "--tokenizer", f"kind=hf_auto,model={DEMO_MODEL}",
        "--data", f"kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}",
        "--output", f"kind=json,path={folder / 'guidellm.json'}",
    ]  # fmt: skip
    code = run(words, folder, {"HF_HUB_OFFLINE": "1"})
    told = json.loads((folder / "guidellm.json").read_text())["benchmarks"][0]["metrics"]["request_totals"]
    return {"exit_code": code, "num_answered": told["successful"], **counters(server)}


def aiperf(bin_dir: Path, server: LiveServer, folder: Path, examples: int) -> dict[str, Any]:
    words = [
        str(bin_dir / "aiperf"), "profile", "--model", "demo_model", "--tokenizer", str(DEMO_MODEL), "--url",
        server.api_url, "--endpoint-type", "chat", "--streaming", "--concurrency", "4", "--request-count",
        str(NUM_REQUESTS), "--isl", str(PROMPT_TOKENS), "--osl", str(OUTPUT_TOKENS), "--use-server-token-count",
        "--ui", "simple", "--output-artifact-dir", str(folder),
    ]  # fmt: skip
    code = run(words, folder, {})
    told = json.loads((folder / "profile_export_aiperf.json").read_text())[
        "request_count"
    ]  # errors not among them
    return {"exit_code": code, "num_answered": int(told["avg"]), **counters(server)}


CLIENTS: Mapping[str, Callable[[Path, LiveServer, Path, int], dict[str, Any]]] = {
    "schemathesis": schemathesis, "guidellm": guidellm, "aiperf": aiperf,
}  # fmt: skip


def run(words: list[str], folder: Path, more: Mapping[str, str]) -> int:
    """Runs a client in `folder`, where what it leaves behind goes with it. Returns its exit code."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))
    }
    return subprocess.run(words, cwd=folder, env={**kept, **more}, timeout=LIMIT_S, check=False).returncode


def counters(server: LiveServer) -> dict[str, Any]:
    with server.control() as control:
        told: dict[str, Any] = control.state()["counters"]
    return told


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.end_to_end.foreign_clients")
    parser.add_argument("which", choices=sorted(CLIENTS))
    parser.add_argument(
        "--environment", type=Path, required=True, help="virtual environment that holds the client"
    )
    parser.add_argument(
        "--examples", type=int, default=100, help="requests drawn for each route (schemathesis)"
    )
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--device", "cpu", "--kv-tokens", "16384"]
        if asked.which == "schemathesis":
            arguments += ["--max-model-len", str(SHORT_CONTEXT_TOKENS)]
        with live_server(Path(folder) / "run", *arguments, engine_module="runtime.engine") as server:
            found = CLIENTS[asked.which](
                asked.environment.resolve() / "bin", server, Path(folder), asked.examples
            )
            defects = Counter(
                line.split(" ERROR ")[-1] for line in server.log().splitlines() if " ERROR " in line
            )
            alive = server.process.poll() is None
    failed = found["exit_code"] != 0 or bool(defects) or not alive
    failed |= found.get("num_answered", NUM_REQUESTS) != NUM_REQUESTS
    print(json.dumps({"client": asked.which, **found, "logged_errors": dict(defects), "server_alive": alive}))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
