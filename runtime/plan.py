"""The slice plan: which configuration serves when, executed by the engine itself.

The daemon posts the next pair of slices; the engine swaps at the step, so that every token is tagged
with the slice that made it. A challenger is held under a lease: when nobody renews it, the champion
is back at the next step, whatever became of the daemon.

    champion ──accept──▶ planned ──start_at──▶ slice 1 ──▶ slice 2 ──end──▶ champion
                            └──── abort, or lease lapsed ──────────────────────▲
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from runtime.errors import InvalidKnob, InvalidPlan, NoPlan, StaleVersion
from runtime.knobs import EngineConfig

MAX_LEASE_S = 5.0

Arm = Literal["champion", "challenger"]
Event = dict[str, Any]


@dataclass(frozen=True)
class PlannedSlice:
    """One interval served by one arm. Instants are UTC epoch seconds; the burn-in is served but not judged."""

    slice_id: str
    arm: Arm
    config_id: str
    start_at: float
    end_at: float
    burn_in_s: float


@dataclass(frozen=True)
class SlicePlan:
    plan_id: str
    experiment_id: str
    expected_version: int
    configs: Mapping[str, Mapping[str, Any]]
    slices: tuple[PlannedSlice, ...]
    lease_s: float

    def slice_at(self, now: float) -> PlannedSlice | None:
        return next((planned for planned in self.slices if planned.start_at <= now < planned.end_at), None)

    @property
    def end_at(self) -> float:
        return self.slices[-1].end_at

    def to_dict(self) -> dict[str, Any]:
        return {
            "plan_id": self.plan_id,
            "experiment_id": self.experiment_id,
            "expected_version": self.expected_version,
            "configs": {config_id: dict(values) for config_id, values in self.configs.items()},
            "slices": [vars(planned) for planned in self.slices],
            "lease_s": self.lease_s,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "SlicePlan":
        """Raises InvalidPlan where the plan contradicts itself or lacks a part."""
        try:
            plan = cls(
                plan_id=str(data["plan_id"]),
                experiment_id=str(data["experiment_id"]),
                expected_version=int(data["expected_version"]),
                configs={str(key): dict(values) for key, values in data["configs"].items()},
                slices=tuple(PlannedSlice(**planned) for planned in data["slices"]),
                lease_s=float(data["lease_s"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidPlan(
                f"A slice plan needs plan_id, experiment_id, expected_version, configs, slices, lease_s: {error!r}."
            ) from error
        plan.check()
        return plan

    def check(self) -> None:
        if not self.slices:
            raise InvalidPlan("A slice plan must hold at least one slice, but got none.")
        if not 0.0 < self.lease_s <= MAX_LEASE_S:
            raise InvalidPlan(f"`lease_s` must be in (0, {MAX_LEASE_S:g}] s, but got {self.lease_s!r}.")
        previous_end_at = float("-inf")
        for planned in self.slices:
            if planned.arm not in ("champion", "challenger"):
                raise InvalidPlan(
                    f"The arm of a slice must be champion or challenger, but got {planned.arm!r}."
                )
            if planned.config_id not in self.configs:
                raise InvalidPlan(
                    f"Slice {planned.slice_id} names configuration {planned.config_id}, which `configs` lacks."
                )
            if not previous_end_at <= planned.start_at < planned.end_at:
                raise InvalidPlan(
                    f"Slices must follow one another in time, but {planned.slice_id} is "
                    f"[{planned.start_at}, {planned.end_at})."
                )
            if not 0.0 <= planned.burn_in_s < planned.end_at - planned.start_at:
                raise InvalidPlan(
                    f"The burn-in of {planned.slice_id} must be shorter than the slice, "
                    f"but got {planned.burn_in_s!r} s."
                )
            previous_end_at = planned.end_at
        for config_id, values in self.configs.items():
            try:
                actual = EngineConfig.of(values).config_id
            except InvalidKnob as error:
                raise InvalidPlan(f"Configuration {config_id}: {error}") from error
            if actual != config_id:
                raise InvalidPlan(
                    f"Configuration {config_id} hashes to {actual}: another knob schema, "
                    "or values were changed on the way."
                )


class PlanTick(NamedTuple):
    """What is in force now, and what happened since the last tick (dicts ready for the link)."""

    config: EngineConfig
    slice_id: str | None
    events: list[Event]


class Committed(NamedTuple):
    version: int
    config: EngineConfig
    prepare_s: float
    commit_us: float


@dataclass
class PlanRunner:
    """Owns the champion's configuration, its version and the plan in force. `now` is UTC epoch seconds.

    `fits` raises InvalidKnob for a configuration which this machine cannot run; a plan with such a
    configuration is refused before its first slice, and so is one that `is_prepared` does not know.
    """

    champion: EngineConfig
    version: int = 0
    fits: Callable[[EngineConfig], None] = lambda config: None
    is_prepared: Callable[[EngineConfig], bool] = lambda config: True
    plan: SlicePlan | None = None
    lease_expires_at: float | None = None
    _current: PlannedSlice | None = None
    _configs: dict[str, EngineConfig] = field(default_factory=dict)
    _events: list[Event] = field(default_factory=list)

    @property
    def configs(self) -> list[EngineConfig]:
        """The champion, and those of the plan in force."""
        return [self.champion, *self._configs.values()]

    def target(self, patch: Mapping[str, Any], expected_version: int | None) -> EngineConfig:
        """What `commit` would make the champion.

        Raises:
            InvalidKnob, StaleVersion.
        """
        self._expect(expected_version)
        config = self.champion.patched(patch)
        self.fits(config)
        return config

    def commit(
        self, patch: Mapping[str, Any], expected_version: int | None, now: float, prepare_s: float = 0.0
    ) -> Committed:
        """Makes champion + patch the champion from the next step on, and ends a plan that is in force.
        `prepare_s`: what its preparation took before.

        Raises:
            InvalidKnob, StaleVersion.
        """
        started = time.perf_counter()
        config = self.target(patch, expected_version)
        prepared = time.perf_counter()
        if self.plan is not None:
            self._end_plan("plan_aborted", now, reason="the champion was reconfigured")
        self.champion, self.version = config, self.version + 1
        done = Committed(
            self.version, config, prepare_s + prepared - started, 1e6 * (time.perf_counter() - prepared)
        )
        self._events.append(
            {
                "kind": "config_committed",
                "at": now,
                "version": self.version,
                "config_id": config.config_id,
                "config": config.values(),
                "prepare_s": done.prepare_s,
                "commit_us": done.commit_us,
            }
        )
        return done

    def accept(self, plan: SlicePlan, now: float) -> None:
        """Puts a plan in force. The same plan again changes nothing; a new one follows the slices of the old.

        Raises:
            StaleVersion, InvalidPlan.
        """
        if self.plan is not None and self.plan.plan_id == plan.plan_id:
            return
        self._expect(plan.expected_version)
        if plan.end_at <= now:
            raise InvalidPlan(f"The plan ended at {plan.end_at:.3f}, but it is {now:.3f}.")
        configs = {config_id: EngineConfig.of(values) for config_id, values in plan.configs.items()}
        for config in configs.values():
            try:
                self.fits(config)
            except InvalidKnob as error:
                raise InvalidPlan(str(error)) from error
            if not self.is_prepared(config):
                raise InvalidPlan(f"Configuration {config.config_id} is not prepared; call prepare first.")
        if self.plan is not None:
            self._end_plan("plan_aborted", now, reason="replaced by another plan")
        self.plan, self._configs = plan, configs
        self.lease_expires_at = now + plan.lease_s
        self._events.append(
            {"kind": "plan_accepted", "at": now, "plan_id": plan.plan_id, "experiment_id": plan.experiment_id}
        )

    def renew(self, plan_id: str, lease_s: float, now: float) -> float:
        """Returns the new end of the lease.

        Raises:
            NoPlan, InvalidPlan.
        """
        if not 0.0 < lease_s <= MAX_LEASE_S:
            raise InvalidPlan(f"`lease_s` must be in (0, {MAX_LEASE_S:g}] s, but got {lease_s!r}.")
        if self.plan is None or self.plan.plan_id != plan_id:
            raise NoPlan(f"Plan {plan_id} is not in force; it ended, was aborted, or its lease lapsed.")
        self.lease_expires_at = now + lease_s
        return self.lease_expires_at

    def abort(self, plan_id: str, reason: str, now: float) -> None:
        """The champion is back at the next step. A plan that is not in force is already aborted."""
        if self.plan is not None and self.plan.plan_id == plan_id:
            self._end_plan("plan_aborted", now, reason=reason)

    def tick(self, now: float) -> PlanTick:
        if self.plan is not None:
            assert self.lease_expires_at is not None
            if now >= self.lease_expires_at and now < self.plan.end_at:
                self._end_plan("lease_lapsed", now)
            elif now >= self.plan.end_at:
                self._end_plan("plan_finished", now)
            else:
                self._enter(self.plan.slice_at(now), now)
        events, self._events = self._events, []
        current = self._current
        config = self._configs[current.config_id] if current is not None else self.champion
        return PlanTick(config, current.slice_id if current is not None else None, events)

    def next_change_at(self, now: float) -> float | None:
        """The next instant at which a tick changes something; an idle engine wakes then."""
        if self.plan is None:
            return None
        assert self.lease_expires_at is not None
        edges = [
            edge for planned in self.plan.slices for edge in (planned.start_at, planned.end_at) if edge > now
        ]
        return min([*edges, max(now, self.lease_expires_at)])

    def _expect(self, version: int | None) -> None:
        if version is not None and version != self.version:
            raise StaleVersion(
                f"Expected configuration version {version}, but version {self.version} is in force. "
                "Read the state again."
            )

    def _enter(self, planned: PlannedSlice | None, now: float) -> None:
        if planned == self._current:
            return
        if self._current is not None:
            self._events.append({"kind": "slice_ended", "at": now, "slice_id": self._current.slice_id})
        self._current = planned
        if planned is not None:
            assert self.plan is not None
            self._events.append(
                {
                    "kind": "slice_started",
                    "at": now,
                    "plan_id": self.plan.plan_id,
                    "config": dict(self.plan.configs[planned.config_id]),
                    "commit_us": 1e6 * max(0.0, now - planned.start_at),
                    **vars(planned),
                }
            )

    def _end_plan(self, kind: str, now: float, **details: Any) -> None:
        assert self.plan is not None
        self._enter(None, now)
        self._events.append({"kind": kind, "at": now, "plan_id": self.plan.plan_id, **details})
        self.plan, self.lease_expires_at, self._configs = None, None, {}
