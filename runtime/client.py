"""The daemon's view of a runtime: two Protocols, and the client that keeps them over loopback HTTP. Blocking."""

import json
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import httpx

from runtime.errors import (
    EngineNotReady,
    InvalidKnob,
    InvalidPlan,
    InvalidRequest,
    NoPlan,
    PrepareFailed,
    RequestFailed,
    RuntimeFault,
    RuntimeUnreachable,
    StaleVersion,
    Unauthorized,
)
from runtime.plan import SlicePlan
from runtime.run_dir import RuntimeFile, read_control_key, read_runtime_file

__all__ = ["Control", "RuntimeClient", "RuntimeFile", "Watch", "read_control_key", "read_runtime_file"]

Answer = dict[str, Any]

CONNECT_LIMIT_S = 2.0
ANSWER_LIMIT_S = 10.0
SCORE_LIMIT_S = 600.0
RECONFIGURE_LIMIT_S = 310.0  # a little more than the runtime itself allows for preparing

_FAULTS: dict[str, type[RuntimeFault]] = {
    "unauthorized": Unauthorized,
    "stale_version": StaleVersion,
    "prepare_failed": PrepareFailed,
    "no_plan": NoPlan,
    "invalid_knob": InvalidKnob,
    "invalid_plan": InvalidPlan,
    "invalid_request": InvalidRequest,
    "engine_not_ready": EngineNotReady,
}


class Watch(Protocol):
    """What can be asked of any engine, ours or a foreign one."""

    def identity(self) -> Answer: ...

    def metrics(self) -> dict[str, float]: ...


class Control(Watch, Protocol):
    """What only our engine does: knobs, the slice plan, its lease, and records kept until acknowledged."""

    def state(self) -> Answer: ...

    def reconfigure(self, patch: Mapping[str, Any], expected_version: int | None) -> Answer: ...

    def prepare(self, values: Mapping[str, Any]) -> Answer: ...

    def plan(self, plan: SlicePlan) -> Answer: ...

    def lease(self, plan_id: str, lease_s: float) -> Answer: ...

    def abort(self, plan_id: str, reason: str) -> Answer: ...

    def tokenize(self, texts: Sequence[str]) -> Answer: ...

    def score(
        self, values: Mapping[str, Any], sequences: Sequence[Sequence[int]], piece_tokens: int | None = None
    ) -> Answer: ...

    def drain(self, boot_id: str | None, after_seq: int, limit: int = 5000) -> Answer: ...

    def shutdown(self, drain_s: float) -> Answer: ...


class RuntimeClient:
    """Keeps `Control`. Usable from several threads; answers are the JSON objects of the routes.

    Every method raises RuntimeUnreachable (no answer in time), Unauthorized, or EngineNotReady (the runtime
    answers, but has no engine at the moment), beside what it names itself.
    """

    def __init__(self, control_url: str, key: str, limit_s: float = ANSWER_LIMIT_S) -> None:
        """`limit_s` is the longest wait for an answer, except that of `reconfigure`."""
        self._limit_s = limit_s
        self._http = httpx.Client(
            base_url=control_url, headers={"authorization": f"Bearer {key}"}, timeout=self._timeout(limit_s),
            trust_env=False,  # loopback: a proxy of the environment has no business here
        )  # fmt: skip
        self._api_url: str | None = None

    @classmethod
    def of_run_dir(cls, run_dir: Any, limit_s: float = ANSWER_LIMIT_S) -> Self:
        """Raises RuntimeUnreachable where no runtime announced itself, and Unauthorized where there is no key."""
        runtime = read_runtime_file(run_dir)
        if runtime is None:
            raise RuntimeUnreachable(f"No runtime has announced itself in {run_dir}.")
        return cls(runtime.control_url, read_control_key(run_dir), limit_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def identity(self) -> Answer:
        told = self._get("/control/identity")
        self._api_url = told["api_url"]
        return told

    def metrics(self) -> dict[str, float]:
        """Returns the samples of /metrics by name with labels, as `name{label="value"}`."""
        api_url = self._api_url or self.identity()["api_url"]
        # The key is for the control address only.
        page = self._asked("GET", f"{api_url}/metrics", headers={"authorization": ""})
        if page.status_code != 200:
            raise RuntimeUnreachable(f"{api_url}/metrics answered {page.status_code}.")
        samples = (
            line.rsplit(" ", 1) for line in page.text.splitlines() if line and not line.startswith("#")
        )
        return {name: float(value) for name, value in samples}

    def state(self) -> Answer:
        return self._get("/control/state")

    def reconfigure(self, patch: Mapping[str, Any], expected_version: int | None) -> Answer:
        """Raises InvalidKnob, or StaleVersion where `expected_version` is not in force."""
        body = {"patch": dict(patch), "expected_version": expected_version}
        return self._post("/control/reconfigure", body, max(self._limit_s, RECONFIGURE_LIMIT_S))

    def prepare(self, values: Mapping[str, Any]) -> Answer:
        """Makes a configuration ready beside the one that serves, so that a plan may name it. Safe to repeat.

        Raises InvalidKnob, or PrepareFailed where it cannot be made ready; nothing has changed then.
        """
        return self._post(
            "/control/prepare", {"values": dict(values)}, max(self._limit_s, RECONFIGURE_LIMIT_S)
        )

    def plan(self, plan: SlicePlan) -> Answer:
        """Safe to repeat. Raises InvalidPlan, StaleVersion."""
        return self._post("/control/plan", plan.to_dict())

    def lease(self, plan_id: str, lease_s: float) -> Answer:
        """Raises NoPlan where the plan ended or lapsed."""
        return self._post("/control/lease", {"plan_id": plan_id, "lease_s": lease_s})

    def abort(self, plan_id: str, reason: str) -> Answer:
        """Safe to repeat."""
        return self._post("/control/abort", {"plan_id": plan_id, "reason": reason})

    def tokenize(self, texts: Sequence[str]) -> Answer:
        """`token_ids`: one list a text, as the model's own tokenizer makes them. Raises InvalidRequest."""
        return self._post("/control/tokenize", {"texts": list(texts)})

    def score(
        self, values: Mapping[str, Any], sequences: Sequence[Sequence[int]], piece_tokens: int | None = None
    ) -> Answer:
        """Reads token sequences under a prepared configuration, beside serving; takes seconds to minutes.

        `nll`, `top1`: one list a sequence, one value for each token but its first: the negative log-likelihood of
        that token in nats, and the token that was likeliest; both None where the output was no number. Knobs that
        `values` does not name are the champion's.

        Raises:
            InvalidRequest: over a limit, or not prepared. InvalidKnob. RequestFailed: the engine could not.
        """
        body = {"values": dict(values), "sequences": [list(ids) for ids in sequences],
                "piece_tokens": piece_tokens, "limit_s": SCORE_LIMIT_S}  # fmt: skip
        return self._post("/control/score", body, max(self._limit_s, SCORE_LIMIT_S + 10.0))

    def drain(self, boot_id: str | None, after_seq: int, limit: int = 5000) -> Answer:
        """Acknowledges the records of this boot up to `after_seq`, and returns those after it."""
        asked = {
            "after_seq": str(after_seq),
            "limit": str(limit),
            **({"boot_id": boot_id} if boot_id else {}),
        }
        return self._get("/control/drain", asked)

    def shutdown(self, drain_s: float) -> Answer:
        return self._post("/control/shutdown", {"drain_s": drain_s})

    def _get(self, path: str, query: dict[str, str] | None = None) -> Answer:
        return self._told(self._asked("GET", path, params=query))

    def _post(self, path: str, body: Answer, limit_s: float | None = None) -> Answer:
        timeout = self._timeout(self._limit_s if limit_s is None else limit_s)
        return self._told(self._asked("POST", path, json=body, timeout=timeout))

    def _asked(self, method: str, path: str, **parts: Any) -> httpx.Response:
        try:
            return self._http.request(method, path, **parts)
        except httpx.HTTPError as error:
            reason = type(error).__name__
            raise RuntimeUnreachable(
                f"The runtime at {self._http.base_url} does not answer ({reason})."
            ) from error

    def _told(self, answer: httpx.Response) -> Answer:
        try:
            body = answer.json()
        except json.JSONDecodeError:
            raise RuntimeUnreachable(
                f"{self._http.base_url} answered {answer.status_code} and no JSON."
            ) from None
        if answer.is_success:
            return dict(body)
        error = body.get("error", {}) if isinstance(body, dict) else {}
        kind, message = str(error.get("kind")), str(error.get("message"))
        if kind in _FAULTS:
            raise _FAULTS[kind](message)
        raise RequestFailed(message, kind)

    @staticmethod
    def _timeout(limit_s: float) -> httpx.Timeout:
        return httpx.Timeout(limit_s, connect=min(limit_s, CONNECT_LIMIT_S))
