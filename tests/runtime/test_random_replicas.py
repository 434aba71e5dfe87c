"""`replicas` changed at random together with every other knob while requests are served: none is lost, and each gets
the tokens that it gets when nothing changes.

One load is served twice by one server in float64, by a single engine at rest and under changes every few moments, of
which half are slices of a plan whose lease may lapse. Engines are started and stopped on the way.
"""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest

from runtime.client import RuntimeClient
from runtime.errors import InvalidKnob, InvalidPlan, RuntimeFault
from runtime.knobs import KNOBS, EngineConfig, Knob, KnobValue
from runtime.kv_cache import BLOCK_TOKENS
from runtime.plan import PlannedSlice, SlicePlan
from tests.runtime import test_random_knobs as one_engine
from tests.runtime.test_random_knobs import CONTEXT, POOL_TOKENS, Asked, random_load, random_value
from tests.runtime.tiny_models import save_tiny_model, save_tiny_tokenizer
from tests.servers import GUARD_S, LiveServer, live_server, wait_until

NUM_REQUESTS = 10_000
NUM_CLIENTS = 48  # each asks again as soon as it is answered
MOST_REPLICAS = 3
NOT_HERE = {"replicas", *one_engine.CHANGES_OUTPUTS}
OTHERS = [knob for knob in KNOBS if knob.name not in NOT_HERE]
FLOORS = {**one_engine.FLOORS, "max_queued_requests": NUM_CLIENTS}  # below, a client would rightly be refused
CEILINGS = {**one_engine.CEILINGS, "batch_wait_ms": 20.0}
CHANGES_A_SPELL = 25  # so long `replicas` keeps below one bound, and engines above it are stopped
KEEP_S = 3.0
PAUSE_S = 0.1
SLICE_S = 0.3


class Got(NamedTuple):
    text: str
    finish_reason: str
    num_tokens: int


class Changes:
    """Changes the server until it is told that the load is over."""

    def __init__(self, server: LiveServer, rng: np.random.Generator) -> None:
        self.taken: list[dict[str, KnobValue]] = []
        self.refused: list[RuntimeFault] = []
        self.over = threading.Event()
        self._server, self._rng = server, rng
        self._most, self._num = MOST_REPLICAS, 0

    def run(self) -> None:
        with self._server.control() as control:
            while not self.over.wait(self._rng.uniform(0.0, PAUSE_S)):
                self._change(control)

    def _change(self, control: RuntimeClient) -> None:
        self._num += 1
        if self._num % CHANGES_A_SPELL == 0:
            self._most = int(self._rng.integers(1, MOST_REPLICAS + 1))
        chosen = self._rng.choice(len(OTHERS), self._rng.integers(1, 5), replace=False)
        patch: dict[str, KnobValue] = {OTHERS[index].name: self._value(OTHERS[index]) for index in chosen}
        if self._rng.random() < 0.7:
            patch["replicas"] = int(self._rng.integers(1, self._most + 1))
        try:
            if self._rng.random() < 0.5:
                control.reconfigure(patch, None)
            else:
                self._plan(control, patch)
        except (InvalidKnob, InvalidPlan) as error:  # beyond this machine, or an engine was stopped just now
            self.refused.append(error)
        else:
            self.taken.append(patch)

    def _plan(self, control: RuntimeClient, patch: dict[str, KnobValue]) -> None:
        config = EngineConfig.of(control.state()["champion"]).patched(patch)
        control.prepare(config.values())
        told = control.state()
        start_at = told["now"]
        one = PlannedSlice(f"s{self._num}", "challenger", config.config_id, start_at, start_at + SLICE_S, 0.0)
        lease_s = self._rng.choice([SLICE_S / 2, 10 * SLICE_S])
        configs = {config.config_id: config.values()}
        control.plan(SlicePlan(f"p{self._num}", "x", told["version"], configs, (one,), float(lease_s)))
        wait_until(lambda: control.state()["plan_id"] is None, "the plan is over")

    def _value(self, knob: Knob) -> KnobValue:
        low, high = FLOORS.get(knob.name, knob.low), min(knob.high, CEILINGS.get(knob.name, knob.high))
        return random_value(knob, self._rng, low, high)


@contextmanager
def tiny_server(folder: Path) -> Iterator[LiveServer]:
    model = save_tiny_model("qwen2", folder / "tiny")
    save_tiny_tokenizer(model)
    with live_server(
        folder / "run", "--device", "cpu", "--dtype", "float64", "--kv-tokens", str(POOL_TOKENS),
        "--max-model-len", str(CONTEXT), "--replica-keep-s", str(KEEP_S),
        "--config", '{"max_num_seqs": 8, "threads_decode": 1, "threads_prefill": 1}',
        engine_module="tests.runtime.engine_of_four_cores", model=model,
    ) as server:  # fmt: skip
        yield server


async def served(server: LiveServer, load: Sequence[Asked]) -> dict[str, Got]:
    waiting, got = list(reversed(load)), dict[str, Got]()

    async def client(http: httpx.AsyncClient) -> None:
        while waiting:
            asked = waiting.pop()
            body = {"prompt": asked.prompt, "max_tokens": asked.max_tokens, "ignore_eos": True, "temperature": 0,
                    "priority": asked.priority, "cache_salt": asked.cache_salt, **asked.sampling}  # fmt: skip
            answer = await http.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            (choice,) = answer.json()["choices"]
            got[asked.id] = Got(
                choice["text"], choice["finish_reason"], answer.json()["usage"]["completion_tokens"]
            )

    async with (
        httpx.AsyncClient(base_url=server.api_url, timeout=GUARD_S, trust_env=False) as http,
        asyncio.TaskGroup() as clients,
    ):
        for _ in range(NUM_CLIENTS):
            clients.create_task(client(http))
    return got


async def served_under(changes: Changes, server: LiveServer, load: Sequence[Asked]) -> dict[str, Got]:
    changing = asyncio.create_task(asyncio.to_thread(changes.run))
    try:
        return await served(server, load)
    finally:
        changes.over.set()
        await changing


def drained(control: RuntimeClient) -> Iterator[dict[str, Any]]:
    boot_id, seq = None, 0
    while (told := control.drain(boot_id, seq, 20_000))["records"]:
        yield from told["records"]
        boot_id, seq = told["boot_id"], told["next_seq"]


@pytest.mark.slow
def test_any_number_of_engines_gives_the_same_tokens_and_loses_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    load = random_load(NUM_REQUESTS, rng, wants_gaps=False)
    with tiny_server(tmp_path) as server, server.control() as control:
        quiet = asyncio.run(served(server, load))
        assert [one["index"] for one in control.state()["replicas"]] == [0]
        begun_at, changes = time.time(), Changes(server, rng)
        changed = asyncio.run(served_under(changes, server, load))
        took_s = time.time() - begun_at
        server.wait_idle()
        wait_until(lambda: control.state()["gauges"].get("kv_used_tokens") == 0, "every block is free")
        told, records = control.state(), list(drained(control))

    moved = Counter(name for patch in changes.taken for name in patch)
    events = Counter(one["event"] for one in records if one["kind"] == "event")
    steps = Counter(one["replica"] for one in records if one["kind"] == "step" and one["at"] > begun_at)
    print(f"{len(load)} requests in {took_s:.0f} s, {len(changes.taken)} changes, {len(changes.refused)} refused, "
          f"moved: {dict(moved)}, steps by engine: {dict(steps)}, events: {dict(events)}")  # fmt: skip

    for got in (quiet, changed):
        lengths = {id: one.num_tokens for id, one in got.items()}
        assert lengths == {asked.id: asked.max_tokens for asked in load}
        assert {one.finish_reason for one in got.values()} == {"length"}
    assert [asked.id for asked in load if quiet[asked.id] != changed[asked.id]] == []

    timings = [one for one in records if one["kind"] == "request"]
    assert len({one["request_id"] for one in timings}) == len(timings) == 2 * len(load)
    assert {one["finish_reason"] for one in timings} == {"length"}
    assert told["num_engine_restarts"] == 0
    assert {(one["num_live"], one["outstanding_tokens"]) for one in told["replicas"]} == {(0, 0)}

    assert set(moved) == {"replicas", *(knob.name for knob in OTHERS)}, "the test must reach what it claims"
    assert {patch["replicas"] for patch in changes.taken if "replicas" in patch} == {1, 2, 3}
    assert set(steps) == set(range(MOST_REPLICAS))
    assert events["config_committed"] and events["slice_started"] and events["engine_stopped"]
    assert events["lease_lapsed"] and events["plan_finished"]
    assert events["engine_ready"] > MOST_REPLICAS, "an engine that was stopped was started again"


def test_an_engine_that_starts_on_a_small_pool_takes_the_knobs_of_a_large_one(tmp_path: Path) -> None:
    num_seqs = POOL_TOKENS // BLOCK_TOKENS  # as many as the first pool had blocks; the second has a fifth
    with tiny_server(tmp_path) as server, server.control() as control:
        control.reconfigure({"kv_tokens": CONTEXT}, None)
        control.reconfigure({"replicas": 2}, None)
        control.reconfigure({"max_num_seqs": num_seqs}, None)
        told = control.state()
        assert told["champion"]["max_num_seqs"] == num_seqs and len(told["replicas"]) == 2
        assert "did not follow" not in server.log()
