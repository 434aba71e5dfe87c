"""Every knob changed at random while requests are served: none is lost, and each gets the tokens it would have had.

One load is served twice, under the default and under changes every few steps: outright, and as slices of a plan with
a lease that lapses. Prompts begin alike in part, the pool is small, some requests draw by seed and some are cancelled,
so that copies of prefixes, preemptions and moves between pools all fall between the changes.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from runtime.clock import Clock
from runtime.engine import Engine
from runtime.executor import Executor
from runtime.knobs import KNOBS, EngineConfig, Knob, KnobValue, knob_named
from runtime.link import Frame
from runtime.loader import load_model
from runtime.plan import PlannedSlice, PlanRunner, SlicePlan
from tests.runtime.tiny_models import VOCAB, save_tiny_model

CONTEXT = 96
POOL_TOKENS = 512
MAX_OPEN = 48  # requests in the engine at a time, running and waiting
MIN_GAP = 1e-4  # of the two likeliest tokens: what float32 may turn round
CLOCK_STEP_S = 0.0005
# What a run on two cores and a model of a few thousand parameters can tell apart.
CEILINGS = {"max_num_seqs": 64, "max_batched_tokens": 512, "prefill_chunk": 128, "threads_decode": 2,
            "threads_prefill": 2, "kv_tokens": 2048, "max_queued_requests": 64, "replicas": 3,
            "long_prompt_threshold": CONTEXT, "mixed_step_tokens": 256}  # fmt: skip
CHANGES_OUTPUTS = {"weight_format", "kv_dtype"}
FLOORS = {"kv_tokens": CONTEXT}
NOT_OF_ONE_ENGINE = {"replicas"}  # the front end's: tests/runtime/test_random_replicas.py


@dataclass(frozen=True)
class TickingClock(Clock):
    """Time that passes with each look at it, so that waits and leases end within the run and in the same places."""

    looks: "count[int]" = field(default_factory=count)

    def now(self) -> float:
        return self.boot_epoch + CLOCK_STEP_S * next(self.looks)


class Asked(NamedTuple):
    id: str
    prompt: list[int]
    max_tokens: int
    sampling: dict[str, Any]
    priority: int
    is_cancelled: bool
    cache_salt: str | None


class Got(NamedTuple):
    """By request: its tokens, by how much each was likelier than the second likeliest, and how often it ended."""

    tokens: dict[str, list[int]]
    gaps: dict[str, list[float]]
    ends: Counter[str]


@dataclass
class Served:
    """An engine of this process; `got` is put together as the frames come."""

    folder: Path
    dtype: torch.dtype
    config: EngineConfig = field(default_factory=lambda: EngineConfig.of({"max_num_seqs": 8}))
    got: Got = field(default_factory=lambda: Got({}, {}, Counter()))
    replies: dict[int, Frame] = field(default_factory=dict)
    events: Counter[str] = field(default_factory=Counter)
    num_calls: int = 0
    num_failed: int = 0

    def __post_init__(self) -> None:
        loaded = load_model(self.folder, torch.device("cpu"), self.dtype, CONTEXT)
        self.executor = Executor(loaded, POOL_TOKENS, self.config)
        warm = self.executor.warm
        self.runner = PlanRunner(warm.in_force(self.config), fits=warm.check)
        self.clock = TickingClock(1000.0, 0.0)
        self.engine = Engine(self.executor, self.runner, self.clock, self._take)

    def _take(self, frame: Frame) -> None:
        if frame["op"] == "reply":
            self.replies[frame["call"]] = frame
        elif frame["op"] == "failed":
            self.num_failed += 1
        elif frame["op"] == "event":
            self.events[frame["kind"]] += 1
        elif frame["op"] == "tokens":
            for id, token, end, _, _, *logprobs in frame["items"]:
                self.got.tokens.setdefault(id, []).append(token)
                for told in logprobs:
                    (_, first), (_, second) = told.top
                    self.got.gaps.setdefault(id, []).append(first - second)
                if end is not None:
                    self.got.ends[id] += 1

    def control(self, name: str, **args: Any) -> int:
        """Returns the number of the call, which is answered when what it needs is prepared."""
        self.num_calls += 1
        self.engine.control({"op": "control", "call": self.num_calls, "name": name, "args": args})
        return self.num_calls

    def serve(self, load: Sequence[Asked], change: "Changes | None" = None) -> None:
        waiting = list(reversed(load))
        cancelled: list[str] = []
        while waiting or self.engine.scheduler.has_requests:
            while waiting and self._num_open() < MAX_OPEN:
                asked = waiting.pop()
                self.engine.submit({
                    "op": "submit", "id": asked.id, "token_ids": asked.prompt, "max_tokens": asked.max_tokens,
                    "sampling": asked.sampling, "ignore_eos": True, "arrived_at": self.clock.now(),
                    "priority": asked.priority, "cache_salt": asked.cache_salt,
                })  # fmt: skip
                cancelled += [asked.id] * asked.is_cancelled
            if change is not None:
                change.perhaps(self)
            self.engine.step()
            if cancelled and len(self.got.tokens.get(cancelled[0], [])) >= 2:
                self.engine.scheduler.cancel(cancelled.pop(0))

    def _num_open(self) -> int:
        return len(self.engine.scheduler.running) + len(self.engine.scheduler.waiting)


class Changes:
    """Changes of a few knobs every few steps; half of them as a slice of a plan whose lease then lapses."""

    def __init__(self, rng: np.random.Generator, knobs: Sequence[Knob], formats: Sequence[str]) -> None:
        self.rng, self.knobs, self.formats = rng, knobs, formats
        self.asked: dict[int, dict[str, KnobValue]] = {}  # by call
        self.num_plans = 0

    def perhaps(self, served: Served) -> None:
        if self.rng.random() > 0.15:
            return
        chosen = self.rng.choice(len(self.knobs), self.rng.integers(2, 6), replace=False)
        patch = {self.knobs[index].name: self._value(self.knobs[index]) for index in chosen}
        is_plan = self.rng.random() < 0.5 and served.runner.plan is None
        call = self._plan(served, patch) if is_plan else served.control("reconfigure", patch=patch)
        self.asked[call] = patch

    def moved(self, served: Served) -> Counter[str]:
        """How often each knob was moved by a change that was taken, not refused."""
        return Counter(name for patch in self._taken(served) for name in patch)

    def chosen(self, served: Served, name: str) -> set[KnobValue]:
        return {patch[name] for patch in self._taken(served) if name in patch}

    def _taken(self, served: Served) -> list[dict[str, KnobValue]]:
        return [patch for call, patch in self.asked.items() if "value" in served.replies.get(call, {})]

    def _plan(self, served: Served, patch: dict[str, KnobValue]) -> int:
        """The slice needs what it changes prepared; where it is not, the plan is refused, which is an answer too."""
        self.num_plans += 1
        config, now = served.runner.champion.patched(patch), served.clock.now()
        served.control("prepare", values=config.values())
        one = PlannedSlice("s", "challenger", config.config_id, now, now + 0.05, burn_in_s=0.0)
        plan = SlicePlan(f"p{self.num_plans}", "e", served.runner.version, {config.config_id: config.values()}, (one,),
                         lease_s=0.02)  # fmt: skip
        return served.control("plan", **plan.to_dict())

    def _value(self, knob: Knob) -> KnobValue:
        if knob.name == "weight_format":
            return str(self.rng.choice(self.formats))
        if knob.name == "kv_block":  # small ones mostly: no two prompts here share as much as a large one
            return str(self.rng.choice(knob.choices or (), p=(0.5, 0.3, 0.1, 0.05, 0.05)))
        if knob.name == "prefix_cache":  # switched off, it forgets all
            return str(self.rng.choice(("on", "off"), p=(0.8, 0.2)))
        low, high = FLOORS.get(knob.name, knob.low), min(knob.high, CEILINGS.get(knob.name, knob.high))
        return random_value(knob, self.rng, low, high)


def random_value(knob: Knob, rng: np.random.Generator, low: float, high: float) -> KnobValue:
    if knob.choices is not None:
        return str(rng.choice(knob.choices))
    value = float(np.exp(rng.uniform(np.log(low), np.log(high)))) if knob.log else rng.uniform(low, high)
    return knob.check(round(value) if knob.kind == "int" else value)


def random_load(num: int, rng: np.random.Generator, wants_gaps: bool) -> list[Asked]:
    shared = [rng.integers(2, VOCAB, 48).tolist() for _ in range(4)]
    load = []
    for index in range(num):
        beginning = shared[rng.integers(4)][: rng.integers(49)] if rng.random() < 0.5 else []
        end = rng.integers(2, VOCAB, rng.integers(1, 24)).tolist()
        if rng.random() < 0.3:  # a text that is likely to go on with what it had before
            end = (end[:4] * 6)[: len(end)]
        prompt = [*beginning, *end]
        sampling: dict[str, Any] = {"num_logprobs": 2} if wants_gaps else {}
        if not wants_gaps and rng.random() < 0.3:
            sampling = {"temperature": 0.3, "top_p": 0.9, "seed": int(rng.integers(2**40))}
        max_tokens = int(rng.integers(1, 16))
        is_cancelled = max_tokens > 4 and rng.random() < 0.03
        salt = (None, None, "ada", "eve")[rng.integers(4)]
        load.append(Asked(str(index), prompt, max_tokens, sampling, int(rng.integers(3)), is_cancelled, salt))
    return load


def served_twice(
    folder: Path, dtype: torch.dtype, num: int, seed: int, without: set[str], wants_gaps: bool = False
) -> tuple[list[Asked], Got, Got]:
    """Under the default, and under changes of every knob but those in `without`. Checks what must hold of both."""
    rng = np.random.default_rng(seed)
    load = random_load(num, rng, wants_gaps)
    quiet, changed = Served(folder, dtype), Served(folder, dtype)
    knobs = [knob for knob in KNOBS if knob.name not in without | NOT_OF_ONE_ENGINE]
    changes = Changes(rng, knobs, changed.executor.warm.formats)
    quiet.serve(load)
    changed.serve(load, changes)

    lengths = {asked.id: asked.max_tokens for asked in load}
    for served in (quiet, changed):
        finished = {id for id, tokens in served.got.tokens.items() if len(tokens) == lengths[id]}
        assert served.num_failed == 0
        assert finished >= {asked.id for asked in load if not asked.is_cancelled}, "a request was lost"
        assert set(served.got.ends) == finished and set(served.got.ends.values()) == {1}, "ended once each"
        assert served.engine.scheduler.pool.num_held == 0, "a block was leaked"
    refused = {frame["error"]["kind"] for frame in changed.replies.values() if "error" in frame}
    assert refused <= {"invalid_plan", "invalid_knob"}
    moved, events = changes.moved(changed), changed.events
    assert set(moved) == {knob.name for knob in knobs}, "the test must reach what it claims"
    assert changes.chosen(changed, "policy") == set(knob_named("policy").choices or ()) or num < 1000
    assert events["config_committed"] and events["slice_started"] and events["lease_lapsed"]
    assert changed.engine.scheduler.num_hit_tokens or num < 1000
    assert changed.engine.scheduler.num_preemptions or num < 1000
    assert quiet.engine.scheduler.num_drafted_tokens == 0
    assert changed.engine.scheduler.num_drafted_tokens
    assert changed.engine.scheduler.num_right_tokens or num < 1000
    print(f"{num} requests, {changes.num_plans} plans, {len(changed.replies)} calls, "
          f"{changed.engine.scheduler.num_preemptions} preemptions, "
          f"{changed.engine.scheduler.num_hit_tokens} tokens found cached, "
          f"{changed.engine.scheduler.num_right_tokens} of "
          f"{changed.engine.scheduler.num_drafted_tokens} drafted tokens right, "
          f"events: {dict(events)}, moved: {dict(moved)}")  # fmt: skip
    return load, quiet.got, changed.got


def where_differing(asked: Asked, quiet: Got, changed: Got) -> int | None:
    """The first token that differs, up to where both go: one that was cancelled ends where it was."""
    both = zip(quiet.tokens.get(asked.id, ()), changed.tokens.get(asked.id, ()), strict=False)
    return next((at for at, (here, there) in enumerate(both) if here != there), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("qwen2", tmp_path_factory.mktemp("model") / "tiny")


sizes = pytest.mark.parametrize("num", [300, pytest.param(10_000, marks=pytest.mark.slow)])


@sizes
def test_float64_gives_the_same_tokens_under_any_changes(folder: Path, num: int) -> None:
    load, quiet, changed = served_twice(folder, torch.float64, num, 1, without=CHANGES_OUTPUTS)
    assert [asked.id for asked in load if where_differing(asked, quiet, changed) is not None] == []


@sizes
def test_float32_differs_only_where_two_tokens_are_nearly_as_likely(folder: Path, num: int) -> None:
    load, quiet, changed = served_twice(
        folder, torch.float32, num, 2, without=CHANGES_OUTPUTS, wants_gaps=True
    )
    gaps = []
    for asked in load:
        at = where_differing(asked, quiet, changed)
        if at is not None:
            gaps.append(quiet.gaps[asked.id][at])
    print(f"{len(gaps)} of {num} differ, gaps of the two likeliest tokens there: {gaps}")
    assert all(gap < MIN_GAP for gap in gaps)


@sizes
def test_no_request_is_lost_while_weights_and_what_the_cache_holds_change_too(folder: Path, num: int) -> None:
    served_twice(folder, torch.float32, num, 6, without=set())
