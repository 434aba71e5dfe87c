"""A fake engine that ships with the tests: speaks the link, computes nothing, makes the same tokens every time.

    python -m runtime.server --engine-module tests.fakes --model ...

The k-th token of an answer is the prompt's token k modulo its length, so an answer repeats its prompt. The
environment tells it how to behave:
    FAKE_STEP_S         seconds a step (default 0.001)
    FAKE_PREFILL_S      seconds before a request's first token (default 0)
    FAKE_READY_S        seconds before it is ready (default 0)
    FAKE_MAX_SEQS       requests in a step, instead of the knob max_num_seqs
    FAKE_HOLD_FILE      while this file exists no step is made
    FAKE_EXIT_CODE      exit with this code instead of connecting
    FAKE_CORES          cores that the machine is said to have (default 2)
    FAKE_RSS_BYTES      memory that it is said to hold (default 1)
    FAKE_FAIL_FILE      while this file exists, it exits with 66 instead of connecting
    FAKE_REFUSE_FILE    while this file exists, engine 1 refuses plans
"""

import argparse
import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runtime.clock import Clock
from runtime.errors import InvalidKnob, InvalidPlan, InvalidRequest, LinkBroken, NoPlan, StaleVersion
from runtime.knobs import EngineConfig, knob_reports
from runtime.link import Frame, FrameReader, encode
from runtime.plan import PlanRunner, SlicePlan
from runtime.scoring import checked_sequences

KV_TOTAL_TOKENS = 65536
GAUGE_EVERY_S = 0.25
_KINDS = {
    StaleVersion: "stale_version",
    InvalidKnob: "invalid_knob",
    InvalidPlan: "invalid_plan",
    NoPlan: "no_plan",
    InvalidRequest: "invalid_request",
}


@dataclass
class FakeRequest:
    id: str
    token_ids: list[int]
    max_tokens: int
    stop_token_ids: list[int]
    accepted_at: float
    num_made: int = 0
    admitted_at: float | None = None


@dataclass
class FakeEngine:
    """One engine on one connected socket; `run` returns when the front end stops it or goes away."""

    sock: socket.socket
    max_model_len: int
    step_s: float = 0.001
    prefill_s: float = 0.0
    ready_s: float = 0.0
    max_seqs: int | None = None
    hold_file: Path | None = None
    requests: dict[str, FakeRequest] = field(default_factory=dict)
    prepared: set[str] = field(default_factory=set)

    def run(self) -> None:
        reader = FrameReader(self.sock)
        hello, *rest = reader.poll(None)
        self.clock = Clock(hello["boot_epoch"], hello["boot_monotonic"])
        self.plans = PlanRunner(
            EngineConfig.of(hello["config"]), hello["version"], is_prepared=self._is_prepared
        )
        self.gauged_at = 0.0
        self.config = self.plans.champion
        self.slice_id: str | None = None
        time.sleep(self.ready_s)
        self._send(op="ready", identity=self._identity(), knobs=knob_reports(2, 256), version=self.plans.version,
                   config=self.plans.champion.values())  # fmt: skip
        try:
            while all(self._handle(frame) for frame in rest):
                self._tick()
                self._step()
                rest = reader.poll(0.0 if self.requests else 0.005)
        except (LinkBroken, BrokenPipeError, ConnectionResetError):
            pass

    def _send(self, **frame: Any) -> None:
        self.sock.sendall(encode(frame))

    def _handle(self, frame: Frame) -> bool:
        """Returns whether to go on."""
        if frame["op"] == "submit":
            kept = {name: frame[name] for name in ("id", "token_ids", "max_tokens", "stop_token_ids")}
            self.requests[frame["id"]] = FakeRequest(**kept, accepted_at=self.clock.now())
        elif frame["op"] == "cancel":
            self.requests.pop(frame["id"], None)
        elif frame["op"] == "control":
            self._control(frame)
        return frame["op"] != "stop"

    def _control(self, frame: Frame) -> None:
        try:
            value = self._answer(frame["name"], frame["args"], self.clock.now())
        except tuple(_KINDS) as error:
            self._send(
                op="reply", call=frame["call"], error={"kind": _KINDS[type(error)], "message": str(error)}
            )
        else:
            self._tick()
            self._send(op="reply", call=frame["call"], value=value)

    def _answer(self, name: str, args: dict[str, Any], now: float) -> dict[str, Any]:
        if name == "reconfigure":
            done = self.plans.commit(args["patch"], args["expected_version"], now)
            return {"version": done.version, "config_id": done.config.config_id, "config": done.config.values(),
                    "prepare_s": done.prepare_s, "commit_us": done.commit_us}  # fmt: skip
        if name == "prepare":
            config = EngineConfig.of(args["values"])
            self.prepared.add(config.config_id)
            return {"config_id": config.config_id, "prepare_s": 0.0, "extra_bytes": 0}
        if name == "plan":
            if (
                Path(os.environ.get("FAKE_REFUSE_FILE", "/nowhere")).exists()
                and "engine-1" in self.sock.getpeername()
            ):
                raise InvalidPlan("The fake engine was told to refuse plans.")
            plan = SlicePlan.from_dict(args)
            self.plans.accept(plan, now)
            return {"plan_id": plan.plan_id, "accepted": True}
        if name == "lease":
            expires_at = self.plans.renew(args["plan_id"], args["lease_s"], now)
            return {"plan_id": args["plan_id"], "lease_expires_at": expires_at, "slice_id": self.slice_id}
        if name == "score":
            config = self.plans.champion.patched(args["values"])
            sequences = checked_sequences(args["sequences"], 2**31, self.max_model_len)
            return {"config_id": config.config_id, **fake_scores([ids.tolist() for ids in sequences]),
                    "num_pieces": 1, "elapsed_s": 0.0, "busy_s": 0.0, "longest_piece_s": 0.0}  # fmt: skip
        self.plans.abort(args["plan_id"], args["reason"], now)
        return {"version": self.plans.version, "config_id": self.plans.champion.config_id}

    def _is_prepared(self, config: EngineConfig) -> bool:
        """As of the real engine: weights and pool are prepared, the other knobs are not its own or need nothing."""
        changed = config.changes_from(self.plans.champion)
        return (
            not {"weight_format", "kv_tokens", "kv_dtype"} & set(changed) or config.config_id in self.prepared
        )

    def _tick(self) -> None:
        now = self.clock.now()
        self.config, self.slice_id, events = self.plans.tick(now)
        for event in events:
            self._send(op="event", **event)
        if now - self.gauged_at >= GAUGE_EVERY_S:
            self.gauged_at = now
            self._send_gauge(now)

    def _step(self) -> None:
        if not self.requests or (self.hold_file is not None and self.hold_file.exists()):
            return
        started_at = self.clock.now()
        time.sleep(self.step_s)
        batch = list(self.requests.values())[: self.max_seqs or self.config.max_num_seqs]
        now = self.clock.now()
        for request in batch:
            request.admitted_at = request.admitted_at or started_at
        items = [self._advance(request) for request in batch if now - request.accepted_at >= self.prefill_s]
        self._send(op="tokens", at=now, config_id=self.config.config_id, slice_id=self.slice_id, items=items)
        self._send(op="step", record=self._record(now, now - started_at, len(items)))

    def _advance(self, request: FakeRequest) -> list[Any]:
        token = request.token_ids[request.num_made % len(request.token_ids)]
        request.num_made += 1
        reason = "stop" if token in request.stop_token_ids else None
        reason = reason or ("length" if request.num_made >= request.max_tokens else None)
        if reason is not None:
            del self.requests[request.id]
        return [request.id, token, reason, request.admitted_at if request.num_made == 1 else None, 0]

    def _record(self, now: float, step_s: float, num_decode: int) -> dict[str, Any]:
        return {
            "at": now, "step_s": step_s, "forward_s": step_s, "num_decode": num_decode, "num_prefill_rows": 0,
            "num_prefill_tokens": 0, "context_tokens": self._used_tokens(), "attention_pairs": num_decode,
            "num_running": num_decode, "num_waiting": max(0, len(self.requests) - num_decode),
            "kv_used_tokens": self._used_tokens(), "config_id": self.config.config_id, "slice_id": self.slice_id,
            "threads": 1,
        }  # fmt: skip

    def _send_gauge(self, now: float) -> None:
        plan = self.plans.plan
        self._send(
            op="gauge", at=now, num_running=len(self.requests), num_waiting=0, kv_used_tokens=self._used_tokens(),
            kv_total_tokens=KV_TOTAL_TOKENS, num_preemptions_total=0, prefix_looked_up_tokens_total=0,
            prefix_hit_tokens_total=0, drafted_tokens_total=0, draft_right_tokens_total=0, slice_id=self.slice_id,
            plan_id=None if plan is None else plan.plan_id, lease_expires_at=self.plans.lease_expires_at,
            version=self.plans.version, config_id=self.config.config_id,
            rss_bytes=int(os.environ.get("FAKE_RSS_BYTES", "1")),
        )  # fmt: skip

    def _used_tokens(self) -> int:
        return sum(len(request.token_ids) + request.num_made for request in self.requests.values())

    def _identity(self) -> dict[str, Any]:
        model = {
            "architecture": "FakeForCausalLM", "num_parameters": 1, "weight_bytes": 1, "num_layers": 1,
            "hidden_size": 1, "max_model_len": self.max_model_len, "dtype": "float32", "weights_sha256": "0" * 64,
        }  # fmt: skip
        hardware = {
            "device": "cpu",
            "device_name": "fake",
            "cpu_model": "fake",
            "num_cores": int(os.environ.get("FAKE_CORES", "2")),
            "memory_bytes": 1,
        }
        versions = {"torch": "none", "transformers": "none"}
        return {
            "model": model,
            "hardware": hardware,
            "versions": versions,
            "tier": "fake",
            "kv_total_tokens": KV_TOTAL_TOKENS,
        }


def fake_scores(sequences: list[list[int]]) -> dict[str, Any]:
    """Of a model that finds every token of every text likeliest, with a loss that depends on the token alone."""
    return {
        "nll": [[1.0 + (token % 7) / 10 for token in ids[1:]] for ids in sequences],
        "top1": [list(ids[1:]) for ids in sequences],
    }


def main() -> None:
    if "FAKE_EXIT_CODE" in os.environ:
        raise SystemExit(int(os.environ["FAKE_EXIT_CODE"]))
    if Path(os.environ.get("FAKE_FAIL_FILE", "/nowhere")).exists():
        raise SystemExit(66)
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    parser.add_argument("--max-model-len", type=int, default=2048)
    options, _ = parser.parse_known_args()
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(options.socket)
    hold, seqs = os.environ.get("FAKE_HOLD_FILE"), os.environ.get("FAKE_MAX_SEQS")
    FakeEngine(
        sock, options.max_model_len, float(os.environ.get("FAKE_STEP_S", "0.001")),
        float(os.environ.get("FAKE_PREFILL_S", "0")), float(os.environ.get("FAKE_READY_S", "0")),
        int(seqs) if seqs else None, Path(hold) if hold else None,
    ).run()  # fmt: skip


if __name__ == "__main__":
    main()
