"""The engine process: python -m runtime.engine --socket PATH --model FOLDER ...

It connects to the front end's socket, waits for `hello`, loads the model, answers `ready`, and then loops:

    frames in ──▶ plan tick ──▶ schedule ──▶ forward and sample ──▶ finish ──▶ frames out

Requests and configurations change only between two steps. It ends when it is told to stop or the link closes.
"""

import argparse
import gc
import logging
import os
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from runtime.batch import Batch, ScoredPiece
from runtime.clock import Clock
from runtime.engine_start import engine_parts, load
from runtime.errors import InvalidKnob, InvalidRequest, LinkBroken, ModelError, RuntimeFault
from runtime.knobs import EngineConfig
from runtime.link import Frame, FrameReader, FrameWriter
from runtime.plan import PlanRunner, PlanTick, SlicePlan
from runtime.prepare import Preparation, Prepared, Preparer
from runtime.request import Request, SamplingParams
from runtime.scheduler import Scheduler
from runtime.scoring import Scorer

if TYPE_CHECKING:
    from runtime.executor import Executed, Executor, Launched
    from runtime.logprobs import PromptLogprob

log = logging.getLogger(__name__)

GAUGE_EVERY_S = 0.25
FLUSH_EVERY_S = 0.002  # an idle engine tries so often to get rid of frames that the front end had no room for
PREPARE_POLL_S = 0.005  # an idle engine looks so often whether a preparation has ended
MODEL_ERROR_EXIT_CODE = 66  # EX_NOINPUT: the folder is missing or damaged; starting again cannot help


@dataclass(eq=False)
class Pending:
    """A control call that is answered when its preparation has ended; `finish` says what then."""

    preparation: Preparation
    finish: "Callable[[Prepared], dict[str, Any] | Pending]"
    call: int = 0
    name: str = ""


def told(prepared: Prepared) -> dict[str, Any]:
    return {
        "config_id": prepared.config.config_id, "prepare_s": prepared.prepare_s, "extra_bytes": prepared.extra_bytes,
    }  # fmt: skip


def _itself(pending: Pending) -> Pending:
    return pending


class UnderWay(NamedTuple):
    """A step that was launched and not read yet. `started`: when its scheduling began, by the performance counter.
    `tick`: what was in force then."""

    launched: "Launched"
    started: float
    tick: PlanTick


class Engine:
    """Advances requests one step at a time under the configuration in force, and tells `send` what happened."""

    def __init__(
        self, executor: "Executor", runner: PlanRunner, clock: Clock, send: Callable[[Frame], None]
    ) -> None:
        self._executor = executor
        self._runner = runner
        self._clock = clock
        self._send = send
        self._gauge_due_at = 0.0
        self._preparer = Preparer(executor.warm, self._configs_in_use)
        self._pending: list[Pending] = []
        runner.is_prepared = executor.warm.is_ready
        self.scheduler = Scheduler(
            executor.pool, runner.champion, executor.max_model_len, attention_cost=executor.attention_cost
        )
        self.scheduler.use_namespace(executor.warm.namespace)
        self.scorer = Scorer(executor, send)
        self.tick = PlanTick(runner.champion, None, [])
        self._under_way: UnderWay | None = None
        self._landed = 0.0  # when the last step did

    def step(self) -> bool:
        """Computes one step. False if there was nothing to compute."""
        started = time.perf_counter()
        self._answer_pending()
        self._apply_plan()
        overlaps = self.tick.config.overlap_depth > 0 and self.scheduler.may_overlap
        if not overlaps:
            self._land()
        batch = self.scheduler.schedule(self._clock.now())
        if batch is None:
            if self._land():
                return True
            self._executor.rest()
            return False
        launched = self._executor.launch(batch, self.scheduler.pack(batch), self.tick.config)
        self.scheduler.advance(batch)
        self._land()
        self._under_way = UnderWay(launched, started, self.tick)
        if not overlaps or batch.num_drafted:
            self._land()
        return True

    def _land(self) -> bool:
        """Takes in what the step under way has drawn. False if there is none."""
        if self._under_way is None:
            return False
        launched, started, tick = self._under_way
        self._under_way = None
        executed = self._executor.land(launched)
        right_before = self.scheduler.num_right_tokens
        self._finish(launched.batch, executed, tick)
        ended = time.perf_counter()
        record = self._record(launched.batch, executed, tick, ended - max(started, self._landed))
        record["num_right"] = self.scheduler.num_right_tokens - right_before
        self._landed = ended
        self._send({"op": "step", "record": record})
        return True

    def idle_s(self) -> float:
        """How long nothing will happen unless a frame arrives: 0 if there is work now."""
        if self._under_way is not None:
            return 0.0
        now = self._clock.now()
        prepared_at = now + PREPARE_POLL_S if self._preparer.is_busy else None
        score_in_s = self.scorer.due_in_s(self.scheduler.has_requests)
        scored_at = None if score_in_s is None else now + score_in_s
        wakes = (
            self._gauge_due_at, self.scheduler.next_wake(now), self._runner.next_change_at(now), prepared_at, scored_at,
        )  # fmt: skip
        return max(0.0, min(wake for wake in wakes if wake is not None) - now)

    def score(self) -> bool:
        """Computes a piece of a text to be scored, if one is due between two steps."""
        return self.scorer.step(self.scheduler.has_requests)

    def send_gauge_if_due(self) -> None:
        now = self._clock.now()
        if now < self._gauge_due_at:
            return
        self._gauge_due_at = now + GAUGE_EVERY_S
        plan = self._runner.plan
        self._send({
            "op": "gauge", "at": now, **self._load(),
            "kv_total_tokens": self.scheduler.pool.num_tokens,
            "kv_cached_tokens": self.scheduler.cached_tokens,
            "prefix_looked_up_tokens_total": self.scheduler.num_looked_up_tokens,
            "prefix_hit_tokens_total": self.scheduler.num_hit_tokens,
            "drafted_tokens_total": self.scheduler.num_drafted_tokens,
            "draft_right_tokens_total": self.scheduler.num_right_tokens,
            "num_preemptions_total": self.scheduler.num_preemptions,
            "slice_id": self.tick.slice_id,
            "plan_id": plan.plan_id if plan is not None else None,
            "lease_expires_at": self._runner.lease_expires_at,
            "version": self._runner.version,
            "config_id": self.tick.config.config_id,
            **self._executor.memory(),
        })  # fmt: skip

    # -- frames of the front end -------------------------------------------------------------------------------

    def submit(self, frame: Frame) -> None:
        sampling = SamplingParams.of(frame.get("sampling") or {})
        stops = set(frame.get("stop_token_ids") or ())
        if not frame.get("ignore_eos"):
            stops |= self._executor.eos_token_ids
        try:
            self._check_tokens(frame["token_ids"])
            max_tokens, arrived_at = int(frame["max_tokens"]), float(frame["arrived_at"])
            self.scheduler.add(
                Request.of_tokens(
                    frame["id"],
                    frame["token_ids"],
                    max_tokens,
                    arrived_at,
                    sampling,
                    stops,
                    int(frame.get("priority", 0)),
                    frame.get("cache_salt"),
                )
            )
        except InvalidRequest as error:
            self._send({"op": "failed", "id": frame["id"], "kind": "invalid_request", "message": str(error)})

    def control(self, frame: Frame) -> None:
        """Answers a control call, now, or when what it needs is prepared (a text to be scored: is done). Its effect
        begins with the next step."""
        call, name, args = frame["call"], frame["name"], frame.get("args") or {}
        self._answer(call, name, lambda: self._controls(call)[name](args))

    def _answer(self, call: int, name: str, work: "Callable[[], dict[str, Any] | Pending | None]") -> None:
        reply: Frame = {"op": "reply", "call": call}
        try:
            value = work()
            while isinstance(value, Pending) and value.preparation.is_done:
                value = value.finish(value.preparation.outcome())
            if isinstance(value, Pending):
                value.call, value.name = call, name
                self._pending.append(value)
                return
            if value is None:
                return  # who does the work answers it
            reply["value"] = value
        except RuntimeFault as error:
            reply["error"] = {"kind": error_kind(error), "message": str(error)}
        except (KeyError, TypeError, ValueError) as error:
            reply["error"] = {"kind": "invalid_call", "message": f"{name}: {error!r}."}
        self._send(reply)
        self._apply_plan()

    def _answer_pending(self) -> None:
        """Between two steps: what was prepared beside them is taken in, and who waited for it is answered."""
        if self._preparer.is_busy:
            self._preparer.poll()
        if not any(one.preparation.is_done for one in self._pending):  # also by a poll for another call
            return
        pending, self._pending = self._pending, []
        for one in pending:
            self._answer(one.call, one.name, partial(_itself, one))

    def _configs_in_use(self) -> list[EngineConfig]:
        return [self.tick.config, *self._runner.configs, *self.scorer.configs]

    def _controls(
        self, call: int
    ) -> "dict[str, Callable[[dict[str, Any]], dict[str, Any] | Pending | None]]":
        return {
            "score": lambda args: self._add_score(call, args),
            "prepare": self._prepare,
            "reconfigure": self._reconfigure,
            "plan": self._plan,
            "lease": self._lease,
            "abort": self._abort,
        }

    def _prepare(self, args: dict[str, Any]) -> "Pending":
        config = EngineConfig.of(args["values"])
        self._runner.fits(config)
        return Pending(self._preparer.ask(config), told)

    def _reconfigure(self, args: dict[str, Any]) -> "Pending":
        target = self._runner.target(args["patch"], args.get("expected_version"))
        return Pending(self._preparer.ask(target, True), lambda prepared: self._commit(args, prepared))

    def _commit(self, args: dict[str, Any], prepared: Prepared) -> "dict[str, Any] | Pending":
        if not self._executor.warm.is_ready(
            self._runner.target(args["patch"], args.get("expected_version")), True
        ):
            return self._reconfigure(args)  # the champion became another meanwhile
        done = self._runner.commit(
            args["patch"], args.get("expected_version"), self._clock.now(), prepared.prepare_s
        )
        swap_us = self._apply_plan()
        if done.config.prefix_cache == "off":
            self.scheduler.forget_prefixes()
        return {
            "version": done.version, "config_id": done.config.config_id, "config": done.config.values(),
            "prepare_s": done.prepare_s, "commit_us": done.commit_us + swap_us,
        }  # fmt: skip

    def _plan(self, args: dict[str, Any]) -> dict[str, Any]:
        plan = SlicePlan.from_dict(args)
        self._runner.accept(plan, self._clock.now())
        return {"plan_id": plan.plan_id, "accepted": True}

    def _lease(self, args: dict[str, Any]) -> dict[str, Any]:
        expires_at = self._runner.renew(args["plan_id"], float(args["lease_s"]), self._clock.now())
        return {"plan_id": args["plan_id"], "lease_expires_at": expires_at, "slice_id": self.tick.slice_id}

    def _abort(self, args: dict[str, Any]) -> dict[str, Any]:
        self._runner.abort(args["plan_id"], str(args.get("reason", "")), self._clock.now())
        return {"version": self._runner.version, "config_id": self._runner.champion.config_id}

    def _add_score(self, call: int, args: dict[str, Any]) -> None:
        """Knobs that `values` does not name are the champion's."""
        champion = self._runner.champion
        config = champion.patched(args["values"])
        self._runner.fits(config)
        if not self._executor.warm.has_weights(config):
            raise InvalidRequest(f"`weight_format` {config.weight_format} is not prepared. Prepare it first.")
        self.scorer.add(call, args, config)

    def _check_tokens(self, token_ids: list[int]) -> None:
        last = self._executor.vocab_size - 1
        lowest, highest = min(token_ids, default=0), max(token_ids, default=0)
        if lowest < 0 or highest > last:
            raise InvalidRequest(f"Token ids must be in [0, {last}], but got {lowest} to {highest}.")

    # -- the parts of a step -----------------------------------------------------------------------------------

    def _apply_plan(self) -> float:
        """Puts in force what the plan says for now. Returns the microseconds that swapping took."""
        tick = self._runner.tick(self._clock.now())
        if tick.slice_id != self.tick.slice_id:
            self._land()  # or tokens of a slice would be told after its end
        self.tick = tick
        started = time.perf_counter()
        self.scheduler.config = self.tick.config
        swapped = self._executor.warm.install(self.tick.config, self.scheduler)
        swap_us = 1e6 * (time.perf_counter() - started) if swapped else 0.0
        for event in self.tick.events:
            if event["kind"] in ("config_committed", "slice_started"):
                event["commit_us"] += swap_us
            self._send({"op": "event", **event})
        return swap_us

    def _finish(self, batch: Batch, executed: "Executed", tick: PlanTick) -> None:
        """Records the tokens and sends them in one frame. A row without a token fails its request alone."""
        now, tokens, is_here = self._clock.now(), executed.tokens, self.scheduler.is_here
        owners = [
            request if request is not None and is_here(request) else None for request in batch.owners(tokens)
        ]
        if batch.scored is not None:
            self._send_scores(batch.requests[batch.scored.row], batch.scored, executed.scores)
        if None in tokens:
            for request, token in zip(owners, tokens, strict=True):
                if token is None and request is not None:
                    self._fail(request)
        self.scheduler.settle(batch, [token or 0 for token in tokens], now)
        rows: list[list[Any] | None] = [
            [
                request.id, token, request.finish_reason,
                request.admitted_at if request.first_token_at == now else None, request.num_preemptions,
            ]
            if request is not None and token is not None
            else None
            for request, token in zip(owners, tokens, strict=True)
        ]  # fmt: skip
        for number, logprobs in executed.logprobs.items():
            if (row := rows[number]) is not None:
                row.append(logprobs)
        items = [row for row in rows if row is not None]
        if batch.num_drafted:  # a request may have several, and ends with the last
            for item, following in pairwise(items):
                item[2] = None if item[0] == following[0] else item[2]
        if items:
            self._send({
                "op": "tokens", "at": now, "config_id": tick.config.config_id, "slice_id": tick.slice_id,
                "items": items, "stream_interval": tick.config.stream_interval,
            })  # fmt: skip

    def _send_scores(
        self, request: Request, piece: ScoredPiece, scores: "list[PromptLogprob] | None"
    ) -> None:
        """`start` counts the prompt's tokens after the first: sent again, a piece takes the place of the same one."""
        if scores is None:
            self._fail(request)
            return
        self._send({"op": "prompt_logprobs", "id": request.id, "start": piece.start, "logprobs": scores})

    def _fail(self, request: Request) -> None:
        if self.scheduler.cancel(request.id):
            message = "The model's output was not a number (NaN or infinite) for this request."
            self._send({"op": "failed", "id": request.id, "kind": "nan_logits", "message": message})

    def _record(self, batch: Batch, executed: "Executed", tick: PlanTick, step_s: float) -> dict[str, Any]:
        return {
            "at": self._clock.now(), "step_s": step_s, "forward_s": executed.forward_s,
            "num_decode": batch.num_decode, "num_prefill_rows": batch.num_prefill_rows,
            "num_prefill_tokens": batch.num_prefill_tokens, "num_drafted": batch.num_drafted,
            "context_tokens": batch.context_tokens, "attention_pairs": batch.attention_pairs, **self._load(),
            "device_s": executed.device_s, "graph_rows": executed.graph_rows,
            "config_id": tick.config.config_id, "slice_id": tick.slice_id, "threads": executed.threads,
        }  # fmt: skip

    def _load(self) -> dict[str, int]:
        scheduler = self.scheduler
        return {
            "num_running": len(scheduler.running), "num_waiting": len(scheduler.waiting),
            "kv_used_tokens": scheduler.used_tokens,
        }  # fmt: skip


def error_kind(error: RuntimeFault) -> str:
    """InvalidKnob -> "invalid_knob"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(error).__name__).lower()


def serve(link: socket.socket, options: argparse.Namespace) -> None:
    """One life of an engine on a connected link."""
    reader, writer = FrameReader(link), FrameWriter(link)
    send = writer.send
    hello, rest = _first_frame(reader)
    clock = Clock(hello["boot_epoch"], hello["boot_monotonic"])
    executor, runner, reports = _prepare(options, hello)
    engine = Engine(executor, runner, clock, send)
    send({
        "op": "ready", "identity": executor.identity(), "knobs": reports, "version": runner.version,
        "config": runner.champion.values(),
    })  # fmt: skip
    handlers: dict[str, Callable[[Frame], object]] = {
        "submit": engine.submit,
        "cancel": lambda frame: engine.scheduler.cancel(frame["id"]),
        "control": engine.control,
    }
    while True:
        idle_s = engine.idle_s() if writer.flush() else min(FLUSH_EVERY_S, engine.idle_s())
        for frame in rest or reader.poll(idle_s):
            if frame["op"] == "stop":
                return
            if frame["op"] not in handlers:
                raise LinkBroken(
                    f"A frame must be one of {', '.join(handlers)} or stop, but got {frame['op']!r}."
                )
            handlers[frame["op"]](frame)
        rest = []
        engine.step()
        engine.score()
        engine.send_gauge_if_due()


def _first_frame(reader: FrameReader) -> tuple[Frame, list[Frame]]:
    frames: list[Frame] = []
    while not frames:
        frames = reader.poll(None)
    if frames[0]["op"] != "hello":
        raise LinkBroken(f"The first frame must be hello, but got {frames[0]['op']!r}.")
    return frames[0], frames[1:]


def _prepare(
    options: argparse.Namespace, hello: Frame
) -> "tuple[Executor, PlanRunner, list[dict[str, Any]]]":
    """Loads the model and decides the first configuration."""
    loaded = load(options)
    parts = engine_parts(loaded, options.kv_tokens, hello.get("config") or {}, int(hello.get("version") or 0))
    gc.collect()
    gc.freeze()  # a collection that walks all of transformers would pause every stream
    return parts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m runtime.engine", description=__doc__.splitlines()[0])
    parser.add_argument("--socket", required=True, help="Unix socket of the front end")
    parser.add_argument("--model", required=True, help="folder with config.json and safetensors")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16 or float64")
    parser.add_argument("--kv-tokens", type=int, help="tokens of the KV pool (default: by free memory)")
    parser.add_argument(
        "--max-model-len", type=int, help="tokens of prompt and output (default: the model's)"
    )
    parser.add_argument("--log-level", default="info")
    options = parser.parse_args(arguments)
    logging.basicConfig(
        level=options.log_level.upper(), format="%(asctime)s %(levelname)s engine: %(message)s"
    )
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.connect(options.socket)
            serve(link, options)
    except (LinkBroken, ConnectionError) as error:
        log.info("the link is closed: %s", error)
    except (ModelError, InvalidKnob) as error:
        log.error("%s", error)
        return MODEL_ERROR_EXIT_CODE
    return 0


def _exit() -> NoReturn:
    """Ends at once: taking torch down takes seconds, in which the front end would take the engine for hung."""
    code = main()
    logging.shutdown()
    os._exit(code)


if __name__ == "__main__":
    _exit()
