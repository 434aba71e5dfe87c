"""What the front end knows of its engines, from their own frames: never assumed, always read back.

All engines have one champion, one version and at most one plan. The leader, the first engine that is ready,
speaks for the group: only its events say what is in force.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from runtime.footprint import max_replicas
from runtime.host import free_memory_bytes
from runtime.knobs import EngineConfig
from runtime.link import Frame
from runtime.replica import Phase, Replica, group_phase, summed_gauges


@dataclass
class EngineState:
    """`asked` is what the operator gave at start; the champion is unknown until an engine was ready once."""

    asked: dict[str, Any] = field(default_factory=dict)
    replicas: list[Replica] = field(default_factory=lambda: [Replica(0)])  # by index
    num_restarts: int = 0  # of all engines since the start, stopped ones included
    identity: dict[str, Any] = field(default_factory=dict)
    knobs: list[dict[str, Any]] = field(default_factory=list)
    version: int = 0
    champion_id: str | None = None
    champion: dict[str, Any] = field(default_factory=dict)
    config_id: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    slice_id: str | None = None
    plan_id: str | None = None
    plan_replicas: int = 1  # engines that the plan in force needs: the first ones
    lease_expires_at: float | None = None
    _ended_plan_id: str | None = None  # the last one whose end was told
    _lost_plan_id: str | None = None  # ended here as an engine died; what the others still say of it is late
    _lost_totals: Counter[str] = field(
        default_factory=Counter
    )  # of engines that are gone: counters never go back

    @property
    def phase(self) -> Phase:
        return group_phase(self.replicas)

    @property
    def leader(self) -> Replica:
        return next((one for one in self.replicas if one.phase == "ready"), self.replicas[0])

    @property
    def pid(self) -> int | None:
        return self.leader.pid

    @property
    def num_in_force(self) -> int:
        """Engines that new requests go to, where as many are ready."""
        return int(self.config.get("replicas", 1))

    @property
    def num_needed(self) -> int:
        """Engines that the champion, the configuration in force or the plan's configurations need."""
        champion = int(self.champion.get("replicas", 1))
        return max(champion, self.num_in_force, self.plan_replicas if self.plan_id is not None else 1)

    @property
    def gauges(self) -> dict[str, Any]:
        """Empty without an engine."""
        summed = summed_gauges(self.replicas)
        for name in self._lost_totals.keys() & summed.keys():
            summed[name] += self._lost_totals[name]
        return summed

    @property
    def max_queued_requests(self) -> int:
        value = self.config.get("max_queued_requests", self.asked.get("max_queued_requests"))
        return int(value) if value is not None else EngineConfig().max_queued_requests

    @property
    def config_to_push(self) -> dict[str, Any]:
        """The champion that was in force; before there was one, what the operator asked for."""
        return self.champion or self.asked

    def ready(self, frame: Frame) -> None:
        """The first engine that is ready says what the group is."""
        self.identity, self.version = frame["identity"], frame["version"]
        self.knobs = [dict(report) for report in frame["knobs"]]
        for report in self.knobs:
            if report["name"] == "replicas":
                report["high"] = min(report["high"], max_replicas(self.identity, free_memory_bytes()))
        self.champion = self.config = frame["config"]
        self.champion_id = self.config_id = EngineConfig.of(frame["config"]).config_id

    def lost(self) -> list[Frame]:
        """Forgets the plan that died with an engine. Returns the events that no engine can be asked for any more."""
        ended: list[Frame] = []
        if self.slice_id is not None:
            ended.append({"kind": "slice_ended", "slice_id": self.slice_id})
        if self.plan_id is not None:
            ended.append({"kind": "plan_aborted", "plan_id": self.plan_id, "reason": "the engine was lost"})
            self._lost_plan_id = self.plan_id
        self.slice_id = self.plan_id = self.lease_expires_at = None
        self.config, self.config_id = self.champion, self.champion_id
        return ended

    def gone(self, replica: Replica) -> None:
        """Forgets what an engine said of itself, as it died or was stopped."""
        self._lost_totals.update(
            {name: num for name, num in replica.gauges.items() if name.endswith("_total")}
        )
        replica.gauges, replica.pid = {}, None

    def is_late(self, event: Frame) -> bool:
        """Whether an event tells of a plan that ended here before, when an engine died."""
        if event["kind"] == "slice_ended":
            return bool(event["slice_id"] != self.slice_id)
        return self._lost_plan_id is not None and event.get("plan_id") == self._lost_plan_id

    def accepted(self, plan_id: str) -> None:
        """All engines answered that they have the plan. While the slowest was waited for, it may have ended."""
        if plan_id not in (self._ended_plan_id, self._lost_plan_id):
            self.plan_id = plan_id

    def event(self, frame: Frame) -> None:
        kind = frame["kind"]
        if kind == "config_committed":
            self.version, self.champion_id, self.champion = (
                frame["version"],
                frame["config_id"],
                frame["config"],
            )
            if self.slice_id is None:
                self._back_to_champion()
        elif kind == "slice_started":
            self.slice_id, self.plan_id = frame["slice_id"], frame["plan_id"]
            self.config_id, self.config = frame["config_id"], frame["config"]
        elif kind == "slice_ended":
            self._back_to_champion()
        elif kind == "plan_accepted":
            self.plan_id = frame["plan_id"]
        elif (
            kind in ("plan_finished", "plan_aborted", "lease_lapsed") and frame.get("plan_id") == self.plan_id
        ):
            self._back_to_champion()
            self._ended_plan_id, self.plan_id, self.lease_expires_at = self.plan_id, None, None

    def gauge(self, replica: Replica, frame: Frame) -> None:
        """Gauges are sums and may lag an event by a fraction of a second; what is in force comes from events."""
        replica.gauges = {key: value for key, value in frame.items() if key != "op"}
        if replica is self.leader:
            self.lease_expires_at = frame.get("lease_expires_at") if self.plan_id is not None else None

    def _back_to_champion(self) -> None:
        self.slice_id = None
        self.config_id, self.config = self.champion_id, self.champion
