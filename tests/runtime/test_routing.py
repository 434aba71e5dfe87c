"""Which engine gets a request, whatever engines come and go: never more than are in force, and each ends once."""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.clock import Clock
from runtime.exchange import Exchange, Sampling, Wake
from runtime.front_end import FrontEnd
from runtime.knobs import EngineConfig
from runtime.link import Frame
from runtime.replica import Replica, group_phase, least_loaded, summed_gauges

NUM_ENGINES = 3
PHASES = ("starting", "ready", "restarting", "failed", "stopping")

replicas_with_any_state = st.lists(
    st.builds(
        Replica, index=st.just(0), phase=st.sampled_from(PHASES), outstanding_tokens=st.integers(0, 50)
    ),
    max_size=8,
)


@given(replicas_with_any_state, st.integers(1, 8))
def test_a_request_goes_to_the_least_loaded_of_the_engines_in_force(
    replicas: list[Replica], num: int
) -> None:
    chosen = least_loaded(replicas, num)
    in_force = [one for one in replicas if one.phase == "ready"][:num]
    if chosen is None:
        assert not in_force
        return
    assert any(chosen is one for one in in_force)
    assert chosen.outstanding_tokens == min(one.outstanding_tokens for one in in_force)


@given(replicas_with_any_state)
def test_the_group_is_ready_while_any_engine_is_and_failed_once_all_are(replicas: list[Replica]) -> None:
    phases = [one.phase for one in replicas]
    assert (group_phase(replicas) == "ready") == ("ready" in phases)
    assert (group_phase(replicas) == "failed") == all(phase == "failed" for phase in phases)


def test_gauges_are_added_ratios_averaged_and_instants_the_latest() -> None:
    first = {
        "at": 1.0,
        "num_running": 2,
        "hit_ratio": 0.5,
        "config_id": "a",
        "lease_expires_at": None,
        "version": 3,
    }
    second = {
        "at": 2.0,
        "num_running": 3,
        "hit_ratio": 0.1,
        "config_id": "b",
        "lease_expires_at": 9.0,
        "version": 3,
    }
    both = summed_gauges([Replica(0, gauges=first), Replica(1), Replica(2, gauges=second)])
    assert both == {
        "at": 2.0, "num_running": 5, "hit_ratio": 0.3, "config_id": "a", "lease_expires_at": 9.0, "version": 3,
    }  # fmt: skip
    assert summed_gauges([Replica(0, gauges=first)]) == first and summed_gauges([Replica(0)]) == {}


@dataclass
class Engine:
    """What one engine was told, and what it still has to make."""

    replica: Replica
    config: EngineConfig
    num_left: dict[str, int] = field(default_factory=dict)
    num_ever: int = 0

    def hear(self, frame: Frame) -> None:
        if frame["op"] == "submit":
            assert self.replica.phase == "ready" and frame["id"] not in self.num_left
            self.num_left[frame["id"]] = frame["max_tokens"]
            self.num_ever += 1
        elif frame["op"] == "cancel":
            self.num_left.pop(frame["id"], None)

    def step(self, now: float) -> Frame:
        """One token for each of its oldest two requests."""
        items: list[list[Any]] = []
        for request_id in list(self.num_left)[:2]:
            self.num_left[request_id] -= 1
            over = self.num_left[request_id] == 0
            items.append([request_id, 7, "length" if over else None, now, 0])
            if over:
                del self.num_left[request_id]
        return {
            "op": "tokens",
            "at": now,
            "config_id": self.config.config_id,
            "slice_id": None,
            "items": items,
        }


class World:
    """A front end with engines that live and die as a test says, and every request that was ever asked."""

    def __init__(self, num_ready: int = 1) -> None:
        self.front = FrontEnd(Clock.started_now(), request_timeout_s=600.0)
        self.config = EngineConfig.of({"replicas": 1})
        self.front.engine.replicas = [Replica(index) for index in range(NUM_ENGINES)]
        self.engines = [Engine(replica, self.config) for replica in self.front.engine.replicas]
        for engine in self.engines:
            engine.replica.send = engine.hear
        self.exchanges: list[Exchange] = []
        for index in range(num_ready):
            self.turn_on(index)
        self.put_in_force(num_ready)

    def turn_on(self, index: int) -> None:
        engine = self.engines[index]
        if engine.replica.phase != "ready":
            frame = {"identity": {}, "knobs": [], "version": 0, "config": self.config.values()}
            self.front.engine_ready(engine.replica, frame)

    def turn_off(self, index: int) -> None:
        engine = self.engines[index]
        if engine.replica.phase == "ready":
            engine.num_left = {}
            self.front.engine_lost(engine.replica, "restarting")

    def put_in_force(self, num: int) -> None:
        self.config = EngineConfig.of({"replicas": num})
        self.front.engine.champion = self.front.engine.config = self.config.values()

    def submit(self, num_prompt: int, max_tokens: int) -> None:
        before = [engine.num_ever for engine in self.engines]
        in_force = [index for index, one in enumerate(self.engines) if one.replica.phase == "ready"]
        in_force = in_force[: self.config.replicas]
        (exchange,) = self.front.open(1, self.front.clock.now(), True, Wake())
        self.front.submit(exchange, [1] * num_prompt, Sampling(max_tokens))
        self.exchanges.append(exchange)
        given_to = [index for index, one in enumerate(self.engines) if one.num_ever > before[index]]
        assert len(given_to) == (1 if in_force else 0) and set(given_to) <= set(in_force)

    def step(self, index: int) -> None:
        engine = self.engines[index]
        if engine.replica.phase == "ready":
            self.front.on_frame(engine.replica, engine.step(self.front.clock.now()))

    def leave(self, which: int) -> None:
        if self.exchanges:
            self.front.leave(self.exchanges[which % len(self.exchanges)])

    def fail(self, index: int) -> None:
        engine = self.engines[index]
        if engine.num_left:
            request_id = next(iter(engine.num_left))
            del engine.num_left[request_id]
            frame = {"op": "failed", "id": request_id, "kind": "nan_logits", "message": "no number"}
            self.front.on_frame(engine.replica, frame)

    def check(self) -> None:
        """What the front end believes of each engine is what the engine has."""
        for engine in self.engines:
            mine = [one for one in self.exchanges if one.replica is engine.replica]
            assert {one.id for one in mine} == set(engine.num_left)
            assert engine.replica.num_live == len(mine)
            assert engine.replica.outstanding_tokens == sum(one.outstanding_tokens for one in mine) >= 0
            for one in mine:
                assert one.num_tokens + engine.num_left[one.id] == one.sampling.max_tokens  # type: ignore[union-attr]
        waiting = [one for one in self.exchanges if one.finish is None and one.replica is None]
        assert not waiting or self.front.engine.phase != "ready"
        assert self.front.num_queued == sum(
            1 for one in self.exchanges if one.finish is None and one.first_token_at is None
        )

    def run_to_the_end(self) -> None:
        for index in range(NUM_ENGINES):
            self.turn_on(index)
        while self.front.live:
            for index in range(NUM_ENGINES):
                self.step(index)
            self.check()


engine_index = st.integers(0, NUM_ENGINES - 1)
happenings = st.one_of(
    st.tuples(st.just("submit"), st.integers(1, 20), st.integers(1, 6)),
    st.tuples(st.just("step"), engine_index),
    st.tuples(st.just("turn_on"), engine_index),
    st.tuples(st.just("turn_off"), engine_index),
    st.tuples(st.just("put_in_force"), st.integers(1, NUM_ENGINES)),
    st.tuples(st.just("leave"), st.integers(0, 100)),
    st.tuples(st.just("fail"), engine_index),
)


def test_what_a_lost_engine_had_not_begun_goes_to_the_others_at_once() -> None:
    async def run() -> None:
        world = World(num_ready=2)
        for _ in range(6):
            world.submit(num_prompt=3, max_tokens=4)
        assert [engine.replica.num_live for engine in world.engines] == [3, 3, 0]
        world.step(1)  # two of its three have begun
        world.turn_off(1)
        world.check()
        assert [engine.replica.num_live for engine in world.engines] == [4, 0, 0]
        world.run_to_the_end()
        reasons = [one.finish.reason for one in world.exchanges if one.finish is not None]
        assert sorted(reasons) == ["error"] * 2 + ["length"] * 4

    asyncio.run(run())


@settings(deadline=None)
@given(st.integers(1, NUM_ENGINES), st.lists(happenings, min_size=10, max_size=60))
def test_routing_never_exceeds_what_is_in_force_and_every_request_ends_exactly_once(
    num_ready: int, story: list[Any]
) -> None:
    async def run() -> None:
        world = World(num_ready)
        for name, *arguments in story:
            getattr(world, name)(*arguments)
            world.check()
        world.run_to_the_end()
        drained = json.loads(world.front.records.drain(0, 10_000).records_json)
        ended = [one["request_id"] for one in drained if one["kind"] == "request"]
        assert sorted(ended) == sorted(one.id for one in world.exchanges)
        for one in world.exchanges:
            assert one.finish is not None and one.sampling is not None
            if one.finish.reason == "length":
                assert one.num_tokens == one.sampling.max_tokens
            lost = (
                one.finish.error is not None and getattr(one.finish.error, "kind", "") == "engine_restarted"
            )
            assert not lost or one.num_tokens > 0  # a request without a token is never lost
        assert all(one.replica.num_live == one.replica.outstanding_tokens == 0 for one in world.engines)

    asyncio.run(run())
