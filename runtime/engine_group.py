"""The engines of one model behind one front end: as many as `replicas` says, each a process with its own KV pool.

Engine 0 is always there. Preparing a configuration with more `replicas` starts the missing ones beside it; they
stay while the champion, the configuration in force or the plan's configurations need them, and are stopped once
nobody has needed them for `keep_s` and they have no request left: until then a rollback finds them warm.

A control call goes to all engines at once, so that each of them sees the calls in one order. Each executes the
slice plan by itself. The group answers when all agree, and ends the plan where one refuses.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runtime.engine_process import Answer, EngineProcess
from runtime.errors import (
    EngineNotReady,
    InvalidKnob,
    InvalidPlan,
    PrepareFailed,
    RuntimeFault,
    StaleVersion,
)
from runtime.footprint import check_room
from runtime.front_end import FrontEnd
from runtime.host import free_memory_bytes
from runtime.knobs import ApplyMode, EngineConfig, knob_named
from runtime.plan import SlicePlan
from runtime.replica import Replica

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.5  # how often engines are looked for that nobody needs any more


@dataclass(frozen=True)
class Member:
    process: EngineProcess
    task: "asyncio.Task[None]"


class EngineGroup:
    """`make` builds an engine's process from what the front end is to know it by; its flag: on trial or not."""

    def __init__(
        self, front: FrontEnd, make: Callable[[Replica, bool], EngineProcess], keep_s: float
    ) -> None:
        self._front, self._make, self._keep_s = front, make, keep_s
        self._first = make(front.engine.replicas[0], False)
        self._members: dict[int, Member] = {}  # engine 0 from the start of `run`
        self._needed_at: dict[int, float] = {}  # monotonic s
        self._changing = asyncio.Lock()  # while engines are started or stopped
        self.unusable = self._first.unusable

    async def run(self) -> None:
        """Keeps the engines alive until `stop`. A group whose engines were all given up stays as it is."""
        self._members[0] = Member(self._first, asyncio.create_task(self._first.run()))
        if await self._first.first_ready is None:
            await self._start_asked()
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            for member in self._members.values():
                if member.task.done():
                    member.task.result()  # a defect of ours ends the server
            if len(self._members) > 1:
                await self._retire()

    async def stop(self) -> None:
        """Asks all engines to end, then makes them."""
        members = list(self._members.values())
        await asyncio.gather(*(member.process.stop() for member in members))
        for member in members:
            member.task.cancel()
        await asyncio.gather(*(member.task for member in members), return_exceptions=True)

    def kill(self) -> None:
        for member in self._members.values():
            member.process.kill()

    async def call(self, name: str, args: Answer, limit_s: float) -> Answer:
        """Makes a control call of all the engines that it concerns.

        Raises:
            EngineNotReady: an engine that it needs is not ready, went away, or did not answer in time.
            StaleVersion, InvalidKnob, InvalidPlan, NoPlan, PrepareFailed, RequestFailed: as an engine answered.
        """
        if name == "reconfigure":
            return await self._reconfigure(args, limit_s)
        if name == "prepare":
            return await self._prepare(args, limit_s)
        if name == "plan":
            return await self._plan(args, limit_s)
        if name in ("lease", "abort"):
            return await self._of_plan(name, args, limit_s)
        return await self._process(self._front.engine.leader).call(
            name, args, limit_s
        )  # one answer is enough

    # -- control calls ---------------------------------------------------------------------------------------

    async def _reconfigure(self, args: Answer, limit_s: float) -> Answer:
        """Neither waits for an engine that is being restarted nor for one that was given up: a rollback is urgent."""
        started = time.perf_counter()
        if self._front.engine.champion:
            await self._make_ready(args, limit_s)
        prepare_s = time.perf_counter() - started
        processes = self._ready()
        answers = await self._ask_all(processes, "reconfigure", args, limit_s)
        done = [answer for answer in answers if isinstance(answer, dict)]
        if not done:
            raise _first_error(answers) or EngineNotReady("No engine answered. Try again.")
        for process, answer in zip(processes, answers, strict=True):
            if not isinstance(answer, dict) or answer["config_id"] != done[0]["config_id"]:
                told = answer if isinstance(answer, BaseException) else f"it is at {answer['config_id']}"
                log.error(
                    "%s did not follow the others to %s, killed: %s", process, done[0]["config_id"], told
                )
                process.kill()  # it comes back with the champion
        return {**done[0], "prepare_s": max(prepare_s, *(one["prepare_s"] for one in done))}

    async def _prepare(self, args: Answer, limit_s: float) -> Answer:
        started, config = time.perf_counter(), EngineConfig.of(args["values"])
        extra_bytes = await self._start_missing(config.replicas)
        down = [
            index for index in range(config.replicas) if self._members[index].process.replica.phase != "ready"
        ]
        if down:
            raise EngineNotReady(f"`prepare` needs engine {down[0]}, which is not ready. Try again.")
        told = await self._ask_all(self._ready(), "prepare", args, limit_s)
        if error := _first_error(told):
            raise error
        extra_bytes += sum(int(one["extra_bytes"]) for one in told if isinstance(one, dict))
        prepare_s = time.perf_counter() - started
        return {"config_id": config.config_id, "prepare_s": prepare_s, "extra_bytes": extra_bytes}

    async def _plan(self, args: Answer, limit_s: float) -> Answer:
        plan = SlicePlan.from_dict(args)
        num = max(EngineConfig.of(values).replicas for values in plan.configs.values())
        processes = self._first_processes(num, plan.plan_id)
        answers = await self._ask_all(processes, "plan", args, limit_s)
        if error := _first_error(answers):
            refusal = {"plan_id": plan.plan_id, "reason": "another engine refused the plan"}
            await self._ask_all(processes, "abort", refusal, limit_s)
            raise error
        self._front.engine.plan_replicas = num
        return _first_answer(answers)

    async def _of_plan(self, name: str, args: Answer, limit_s: float) -> Answer:
        """Renews or ends the plan on the engines that execute it."""
        ready = self._ready()
        processes = [one for one in ready if one.replica.index < self._front.engine.plan_replicas] or ready
        answers = await self._ask_all(processes, name, args, limit_s)
        if error := _first_error(answers):
            if len(processes) > 1:
                left = {"plan_id": args["plan_id"], "reason": "another engine has left the plan"}
                await self._ask_all(processes, "abort", left, limit_s)
            raise error
        return _first_answer(answers)

    async def _make_ready(self, args: Answer, limit_s: float) -> None:
        """Starts the engines that a patch adds, and lets none of several find out alone that it cannot commit."""
        champion = EngineConfig.of(self._front.engine.champion)
        config = champion.patched(args["patch"])
        version, expected = self._front.engine.version, args.get("expected_version")
        if expected is not None and expected != version:
            raise StaleVersion(
                f"Expected configuration version {expected}, but version {version} is in force. Read the state again."
            )
        if config.replicas > champion.replicas:
            await self._start_missing(config.replicas)
        warm = [
            name for name in config.changes_from(champion) if knob_named(name).apply is not ApplyMode.LIVE
        ]
        processes = self._ready()
        if len(processes) > 1 and any(name != "replicas" for name in warm):
            told = await self._ask_all(processes, "prepare", {"values": config.values()}, limit_s)
            if error := _first_error(told):
                raise error

    async def _ask_all(
        self, processes: Sequence[EngineProcess], name: str, args: Answer, limit_s: float
    ) -> list[Answer | BaseException]:
        """One answer a process, or its error."""
        asked = [(process, process.ask(name, args)) for process in processes]
        answers = (process.answered(answer, name, limit_s) for process, answer in asked)
        return await asyncio.gather(*answers, return_exceptions=True)

    # -- starting and stopping engines -----------------------------------------------------------------------

    async def _start_asked(self) -> None:
        """The other engines of the first champion. What does not fit is left out, with a warning."""
        wished = self._front.engine.num_in_force
        high = self._most_replicas()
        if wished > high:
            log.warning("`replicas` = %d was asked for, %d fit on this machine: using those", wished, high)
            await self._reconfigure({"patch": {"replicas": high}, "expected_version": None}, 10.0)
        try:
            await self._start_missing(min(wished, high))
        except RuntimeFault as error:
            log.error("serving with fewer engines than configured: %s", error)

    async def _start_missing(self, num: int) -> int:
        """Returns once the missing ones of engines 0 to `num` - 1 are ready, with the bytes that these hold.

        Raises:
            InvalidKnob: this machine can never hold so many.
            PrepareFailed: there is no memory for them now, or one did not start; the others serve on.
        """
        if num > self._most_replicas():
            raise InvalidKnob(
                f"`replicas` must be at most {self._most_replicas()} on this machine, but got {num}."
            )
        async with self._changing:
            self._needed_at |= dict.fromkeys(range(num), time.monotonic())
            missing = [index for index in range(num) if not self._is_alive(index)]
            if missing:
                engine = self._front.engine
                check_room(len(missing), num, engine.identity, engine.leader.gauges, free_memory_bytes())
                await self._start(missing)
            self._needed_at |= dict.fromkeys(range(num), time.monotonic())
        return sum(self._held_bytes(index) for index in missing)

    async def _start(self, indexes: Sequence[int]) -> None:
        """Starts engines beside those that serve. Where one does not get ready, all of them are gone again."""
        log.info("starting engine(s) %s", ", ".join(map(str, indexes)))
        for index in indexes:
            await self._discard(index)
            replica = Replica(index)
            self._front.engine.replicas = sorted(
                [*self._front.engine.replicas, replica], key=lambda one: one.index
            )
            process = self._make(replica, True)
            self._members[index] = Member(process, asyncio.create_task(process.run()))
        failures = {index: await self._members[index].process.first_ready for index in indexes}
        told = "; ".join(
            f"engine {index}: {failure}" for index, failure in failures.items() if failure is not None
        )
        if told:
            for index in indexes:
                await self._discard(index)
            raise PrepareFailed(f"`replicas` = {max(indexes) + 1} could not be prepared: {told}.")

    async def _retire(self) -> None:
        """Stops what nobody has needed for `keep_s`, once its last request is over."""
        now = time.monotonic()
        self._needed_at |= dict.fromkeys(range(self._front.engine.num_needed), now)
        for index, member in list(self._members.items()):
            is_idle = member.process.replica.num_live == 0
            if index > 0 and is_idle and now - self._needed_at.get(index, now) >= self._keep_s:
                async with self._changing:
                    if now - self._needed_at[index] >= self._keep_s and member.process.replica.num_live == 0:
                        log.info("engine %d was not needed for %g s: stopping it", index, self._keep_s)
                        await self._discard(index)

    async def _discard(self, index: int) -> None:
        """Nothing is left of an engine. Its requests, were there any, would have to be routed before."""
        member = self._members.pop(index, None)
        if member is not None:
            replica = member.process.replica
            replica.phase = "stopping"
            await member.process.stop()
            member.task.cancel()
            await asyncio.gather(member.task, return_exceptions=True)
            self._front.engine_stopped(replica)

    def _is_alive(self, index: int) -> bool:
        """Engine 0 is never started anew once it was given up: then something is wrong with this server."""
        return index == 0 or (index in self._members and not self._members[index].task.done())

    def _ready(self) -> list[EngineProcess]:
        """In order of index; where none is ready, the leader, which says so."""
        engine = self._front.engine
        ready = [one for one in engine.replicas if one.phase == "ready"]
        return [self._process(replica) for replica in ready or [engine.leader]]

    def _first_processes(self, num: int, plan_id: str) -> list[EngineProcess]:
        """The engines that execute a plan: the first `num`, all of them ready."""
        alive = [index for index in range(num) if self._is_alive(index)]
        if len(alive) < num:
            raise InvalidPlan(
                f"Plan {plan_id} needs {num} engines, but {len(alive)} are there: not prepared. Prepare its "
                "configurations first."
            )
        processes = [self._members[index].process for index in alive]
        down = [process for process in processes if process.replica.phase != "ready"]
        if down:
            raise EngineNotReady(f"`plan` needs {down[0]}, which is {down[0].replica.phase}. Try again.")
        return processes

    def _process(self, replica: Replica) -> EngineProcess:
        return self._members[replica.index].process

    def _most_replicas(self) -> int:
        told = next((one for one in self._front.engine.knobs if one["name"] == "replicas"), None)
        return int(told["high"]) if told is not None else 1

    def _held_bytes(self, index: int) -> int:
        """What an engine told; one that has not spoken yet holds what the leader does, which is its like."""
        gauges = self._members[index].process.replica.gauges or self._front.engine.leader.gauges
        return int(gauges.get("rss_bytes", 0)) + int(gauges.get("device_memory_bytes", 0))


def _first_error(answers: Sequence[Answer | BaseException]) -> BaseException | None:
    return next((answer for answer in answers if isinstance(answer, BaseException)), None)


def _first_answer(answers: Sequence[Answer | BaseException]) -> Answer:
    return next(answer for answer in answers if isinstance(answer, dict))
