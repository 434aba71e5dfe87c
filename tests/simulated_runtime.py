"""A runtime in virtual time: the real scheduler, plan runner, slice ledger and record buffer; only the seconds
of a step come from a model instead of a machine. It offers the daemon the same two Protocols as the real one.
"""

import json
import random
from collections.abc import Callable
from typing import Any

from runtime.errors import NoPlan, RuntimeUnreachable
from runtime.knobs import EngineConfig, knob_reports
from runtime.kv_cache import BlockPool
from runtime.plan import PlanRunner, SlicePlan
from runtime.request import Request
from runtime.scheduler import Scheduler
from runtime.slice_stats import SliceLedger
from runtime.step_model import StepModel
from runtime.timings import RecordBuffer
from tests.fakes import fake_scores
from tuner.preparation import warm_changes

IDENTITY = {
    "boot_id": "boot-1", "pid": 1, "engine_pid": 2, "started_at": 0.0, "api_url": "http://127.0.0.1:1",
    "model": {
        "name": "simulated", "path": "/nowhere", "architecture": "Qwen2ForCausalLM", "num_parameters": 5_000_000,
        "weight_bytes": 20_000_000, "num_layers": 6, "hidden_size": 256, "vocab_size": 4096, "max_model_len": 2048,
        "dtype": "float32", "weights_sha256": "0" * 64,
    },
    "hardware": {
        "device": "cpu", "device_name": "cpu", "cpu_model": "simulated", "num_cores": 2, "memory_bytes": 8 << 30,
    },
    "versions": {"python": "3.11", "torch": "2.13", "transformers": "5", "runtime": "0.1.0"},
    "tier": "B", "kv_total_tokens": 65_536, "kv_block_tokens": 64,
}  # fmt: skip

# 4 ms a step, 60 us a token, 0.3 ms a sequence: the shape of the demo model on one core.
STEP_MODEL = StepModel(
    a=60e-6 / 1e7,
    b=0.0,
    c=0.0,
    d=4e-3,
    e=3e-4,
    weight_bytes=2e7,
    flop_per_token=1e7,
    attention_flop_per_pair=0.0,
    kv_bytes_per_token=1e3,
)


class SimulatedRuntime:
    """`advance(now)` serves Poisson arrivals up to `now`; everything else is what the daemon calls."""

    def __init__(
        self, rate_per_s: float, seed: int = 0, noise_sd: float = 0.05, output_tokens: int = 24
    ) -> None:
        self.now = 1000.0
        self.rate_per_s, self.output_tokens, self.noise_sd = rate_per_s, output_tokens, noise_sd
        self.random = random.Random(seed)
        self.runner = PlanRunner(EngineConfig(), is_prepared=self._is_prepared)
        self.pool = BlockPool(1024, 64)
        self.scheduler = Scheduler(self.pool, EngineConfig(), 2048)
        self.slices, self.records = SliceLedger(), RecordBuffer()
        self.is_down = False
        self.slowdown: Callable[[EngineConfig], float] = lambda config: (
            1.0
        )  # a factor on its steps: harm to be found
        # Nats that its outputs lose a token, on average: what a bad weight format does.
        self.loss: Callable[[EngineConfig], float] = lambda config: 0.0
        self.score_error: Exception | None = None
        self.prepare_error: Exception | None = None
        self.prepared: list[str] = []  # config_ids, in the order in which they were prepared
        self._ready: set[str] = set()  # those of them that this engine holds
        self.scored: list[str] = []  # config_ids, in the order in which they were scored
        self.num_engine_restarts = 0
        self.boot_id = "boot-1"
        self.slice_id: str | None = None
        self._next_arrival = self.now + self.random.expovariate(rate_per_s)
        self._arrived: dict[str, Any] = {}
        self._num_requests = 0

    # -- virtual time --------------------------------------------------------------------------------------

    def advance(self, until: float) -> None:
        while self.now < until:
            self._tick()
            self._arrive()
            batch = self.scheduler.schedule(self.now) if self.scheduler.has_requests else None
            if batch is None:
                wakes = [
                    until,
                    self._next_arrival,
                    self.scheduler.next_wake(self.now),
                    self.runner.next_change_at(self.now),
                ]
                self.now = max(self.now + 1e-4, min(wake for wake in wakes if wake is not None))
                continue
            config = self.scheduler.config
            seconds = STEP_MODEL.step_s(
                batch.num_tokens, batch.context_tokens, batch.attention_pairs, len(batch.requests)
            )
            seconds *= self.random.lognormvariate(0.0, self.noise_sd) * self.slowdown(config)
            self.now += seconds
            for request in self.scheduler.finish_step(batch, None, self.now):
                self._finish(request)
            self.records.append(
                "step",
                {
                    "at": self.now,
                    "step_s": seconds,
                    "forward_s": seconds,
                    "num_decode": batch.num_decode,
                    "num_prefill_rows": batch.num_prefill_rows,
                    "num_prefill_tokens": batch.num_prefill_tokens,
                    "context_tokens": batch.context_tokens,
                    "attention_pairs": batch.attention_pairs,
                    "num_running": len(self.scheduler.running),
                    "num_waiting": len(self.scheduler.waiting),
                    "kv_used_tokens": self.scheduler.used_tokens,
                    "config_id": config.config_id,
                    "slice_id": self.slice_id,
                    "threads": 1,
                },
            )

    def _tick(self) -> None:
        tick = self.runner.tick(self.now)
        for event in tick.events:
            if event["kind"] == "slice_started":
                self.slices.start(event["slice_id"], event["start_at"], event["end_at"], event["burn_in_s"])
            elif event["kind"] == "slice_ended":
                self.slices.end(event["slice_id"])
            details = {key: value for key, value in event.items() if key not in ("kind",)}
            self.records.append("event", {"event": event["kind"], **details})
        self.scheduler.config, self.slice_id = tick.config, tick.slice_id

    def _arrive(self) -> None:
        while self._next_arrival <= self.now:
            at = self._next_arrival
            self._num_requests += 1
            request = Request.of_lengths(
                f"r{self._num_requests}",
                self.random.choice([20, 60, 200, 300]),
                max(2, round(self.random.expovariate(1 / self.output_tokens))),
                at,
            )
            arrival = self.slices.arrival(at)
            if arrival.stats is not None:
                arrival.stats.arrived(request.id, at)
            self._arrived[request.id] = arrival
            self.scheduler.add(request)
            self._next_arrival = at + self.random.expovariate(self.rate_per_s)

    def _finish(self, request: Request) -> None:
        arrival = self._arrived.pop(request.id)
        if arrival.stats is not None:
            arrival.stats.finished(request.id, request.finished_at - request.arrived_at)
        self.records.append(
            "request",
            {
                "request_id": request.id,
                "arrived_at": request.arrived_at,
                "prompt_tokens": request.prompt_tokens,
                "output_tokens": request.num_output_tokens,
                "max_tokens": request.max_tokens,
                "admitted_at": request.admitted_at,
                "first_token_at": request.first_token_at,
                "finished_at": request.finished_at,
                "finish_reason": "length",
                "error_kind": None,
                "config_id": self.scheduler.config.config_id,
                "arrival_slice": arrival.slice_id,
                "first_token_slice": None,
                "slices": {},
                "gaps": {"num": 0, "sum_s": 0.0, "max_s": None, "p99_s": None},
                "num_preemptions": 0,
                "streamed": True,
            },
        )

    # -- Watch and Control ---------------------------------------------------------------------------------

    def _answer(self) -> None:
        if self.is_down:
            raise RuntimeUnreachable("The simulated runtime is down.")

    def identity(self) -> dict[str, Any]:
        self._answer()
        return {**IDENTITY, "boot_id": self.boot_id}

    def state(self) -> dict[str, Any]:
        self._answer()
        config, champion = self.scheduler.config, self.runner.champion
        return {
            "boot_id": self.boot_id,
            "engine": "ready",
            "num_engine_restarts": self.num_engine_restarts,
            "version": self.runner.version,
            "config_id": config.config_id,
            "config": config.values(),
            "champion_config_id": champion.config_id,
            "champion": champion.values(),
            "slice_id": self.slice_id,
            "plan_id": self.runner.plan.plan_id if self.runner.plan else None,
            "lease_expires_at": self.runner.lease_expires_at,
            "knobs": knob_reports(2, 64),
            "now": self.now,
            "gauges": {
                "num_running": len(self.scheduler.running),
                "num_waiting": len(self.scheduler.waiting),
                "kv_used_tokens": self.scheduler.used_tokens,
                "kv_total_tokens": 65_536,
                "num_preemptions_total": 0,
            },
            "counters": {
                "requests_total": self._num_requests,
                "finished_total": self._num_requests - len(self._arrived),
                "errors_by_kind": {},
                "unknown_fields": {},
                "tokens_total": 0,
                "prompt_tokens_total": 0,
            },
            "slice_stats": self.slices.snapshot(self.now),
        }

    def reconfigure(self, patch: dict[str, Any], expected_version: int | None = None) -> dict[str, Any]:
        self._answer()
        done = self.runner.commit(patch, expected_version, self.now)
        return {
            "version": done.version,
            "config_id": done.config.config_id,
            "config": done.config.values(),
            "prepare_s": done.prepare_s,
            "commit_us": done.commit_us,
        }

    def plan(self, plan: SlicePlan) -> dict[str, Any]:
        self._answer()
        self.runner.accept(SlicePlan.from_dict(json.loads(json.dumps(plan.to_dict()))), self.now)
        return {"plan_id": plan.plan_id, "accepted": True}

    def lease(self, plan_id: str, lease_s: float) -> dict[str, Any]:
        self._answer()
        return {
            "plan_id": plan_id,
            "lease_expires_at": self.runner.renew(plan_id, lease_s, self.now),
            "slice_id": self.slice_id,
        }

    def abort(self, plan_id: str, reason: str) -> dict[str, Any]:
        self._answer()
        self.runner.abort(plan_id, reason, self.now)
        return {"version": self.runner.version, "config_id": self.runner.champion.config_id}

    def prepare(self, values: dict[str, Any]) -> dict[str, Any]:
        self._answer()
        if self.prepare_error is not None:
            raise self.prepare_error
        config = EngineConfig.of(values)
        self.prepared.append(config.config_id)
        self._ready.add(config.config_id)
        return {"config_id": config.config_id, "prepare_s": 0.0, "extra_bytes": 0}

    def _is_prepared(self, config: EngineConfig) -> bool:
        return not warm_changes(config, self.runner.champion) or config.config_id in self._ready

    def tokenize(self, texts: list[str]) -> dict[str, Any]:
        """A token a character."""
        self._answer()
        return {"token_ids": [[ord(letter) % 4096 for letter in text] for text in texts]}

    def score(
        self, values: dict[str, Any], sequences: list[list[int]], piece_tokens: int | None = None
    ) -> dict[str, Any]:
        """Loses `loss` nats a token, unevenly over the passages, and one top token in ten for each 0.1 of it."""
        self._answer()
        if self.score_error is not None:
            raise self.score_error
        config = self.runner.champion.patched(values)
        self.scored.append(config.config_id)
        loss = self.loss(config)
        told = fake_scores(sequences)
        for index, (nll, top1) in enumerate(zip(told["nll"], told["top1"], strict=True)):
            told["nll"][index] = [value + loss * (0.5 + index % 3 / 2) for value in nll]
            told["top1"][index] = [
                -1 if (at * 7) % 100 < 100 * loss else token for at, token in enumerate(top1)
            ]
        return {"config_id": config.config_id, **told, "num_pieces": len(sequences), "elapsed_s": 0.5,
                "busy_s": 0.1, "longest_piece_s": 0.01}  # fmt: skip

    def drain(self, boot_id: str | None, after_seq: int, limit: int = 5000) -> dict[str, Any]:
        self._answer()
        drained = self.records.drain(after_seq if boot_id == self.boot_id else 0, limit)
        return {
            "boot_id": self.boot_id,
            "next_seq": drained.next_seq,
            "dropped": drained.dropped,
            "records": json.loads(drained.records_json),
        }

    def kill_engine(self) -> None:
        """What a kill -9 of the engine does: the plan is gone, the champion is back."""
        self.num_engine_restarts += 1
        self.runner = PlanRunner(self.runner.champion, self.runner.version, is_prepared=self._is_prepared)
        self._ready.clear()
        self.slices.end()

    def has_plan(self, plan_id: str) -> bool:
        try:
            self.runner.renew(plan_id, 1.0, self.now)
        except NoPlan:
            return False
        return True
