"""The daemon's connection to its runtime, the same object across restarts of the runtime."""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from runtime.client import Control, RuntimeClient, read_control_key, read_runtime_file
from runtime.errors import RuntimeUnreachable
from runtime.plan import SlicePlan

Answer = dict[str, Any]


class Connection(Control, Protocol):
    """A `Control` that somebody holds and gives up."""

    def close(self) -> None: ...


class RuntimeConnection:
    """Looks up the address at each call: a runtime that starts again listens elsewhere.

    Every method raises RuntimeUnreachable, Unauthorized, EngineNotReady, and what `RuntimeClient` names.
    """

    def __init__(self, run_dir: Path, limit_s: float = 10.0) -> None:
        """`limit_s` is the longest wait for an answer."""
        self._run_dir, self._limit_s = run_dir, limit_s
        self._turn = threading.Lock()
        self._url: str | None = None
        self._client: RuntimeClient | None = None

    def close(self) -> None:
        with self._turn:
            if self._client is not None:
                self._client.close()
            self._client = self._url = None

    def identity(self) -> Answer:
        return self._now().identity()

    def metrics(self) -> dict[str, float]:
        return self._now().metrics()

    def state(self) -> Answer:
        return self._now().state()

    def reconfigure(self, patch: Mapping[str, Any], expected_version: int | None) -> Answer:
        return self._now().reconfigure(patch, expected_version)

    def prepare(self, values: Mapping[str, Any]) -> Answer:
        return self._now().prepare(values)

    def plan(self, plan: SlicePlan) -> Answer:
        return self._now().plan(plan)

    def lease(self, plan_id: str, lease_s: float) -> Answer:
        return self._now().lease(plan_id, lease_s)

    def abort(self, plan_id: str, reason: str) -> Answer:
        return self._now().abort(plan_id, reason)

    def tokenize(self, texts: Sequence[str]) -> Answer:
        return self._now().tokenize(texts)

    def score(
        self, values: Mapping[str, Any], sequences: Sequence[Sequence[int]], piece_tokens: int | None = None
    ) -> Answer:
        return self._now().score(values, sequences, piece_tokens)

    def drain(self, boot_id: str | None, after_seq: int, limit: int = 5000) -> Answer:
        return self._now().drain(boot_id, after_seq, limit)

    def shutdown(self, drain_s: float) -> Answer:
        return self._now().shutdown(drain_s)

    def _now(self) -> RuntimeClient:
        file = read_runtime_file(self._run_dir)
        if file is None:
            raise RuntimeUnreachable(f"No runtime has announced itself in {self._run_dir}.")
        with self._turn:
            if self._client is None or self._url != file.control_url:
                if self._client is not None:
                    self._client.close()
                self._client = RuntimeClient(file.control_url, read_control_key(self._run_dir), self._limit_s)
                self._url = file.control_url
            return self._client
