"""What the front end knows of the engine, from the engine's own frames: never assumed, always read back."""

from dataclasses import dataclass, field
from typing import Any, Literal

from runtime.knobs import EngineConfig
from runtime.link import Frame

Phase = Literal["starting", "ready", "restarting", "failed"]


@dataclass
class EngineState:
    """`asked` is what the operator gave at start; the champion is unknown until the engine was ready once."""

    asked: dict[str, Any] = field(default_factory=dict)
    phase: Phase = "starting"
    num_restarts: int = 0
    pid: int | None = None
    identity: dict[str, Any] = field(default_factory=dict)
    knobs: list[dict[str, Any]] = field(default_factory=list)
    version: int = 0
    champion_id: str | None = None
    champion: dict[str, Any] = field(default_factory=dict)
    config_id: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    slice_id: str | None = None
    plan_id: str | None = None
    lease_expires_at: float | None = None
    gauges: dict[str, Any] = field(default_factory=dict)

    @property
    def max_queued_requests(self) -> int:
        value = self.config.get("max_queued_requests", self.asked.get("max_queued_requests"))
        return int(value) if value is not None else EngineConfig().max_queued_requests

    @property
    def config_to_push(self) -> dict[str, Any]:
        """The champion that was in force; before there was one, what the operator asked for."""
        return self.champion or self.asked

    def ready(self, frame: Frame) -> None:
        self.phase = "ready"
        self.identity, self.knobs = frame["identity"], frame["knobs"]
        self.version = frame["version"]
        self.champion = self.config = frame["config"]
        self.champion_id = self.config_id = EngineConfig.of(frame["config"]).config_id

    def lost(self) -> list[Frame]:
        """Forgets what died with the engine. Returns the events that it can no longer send itself."""
        ended: list[Frame] = []
        if self.slice_id is not None:
            ended.append({"kind": "slice_ended", "slice_id": self.slice_id})
        if self.plan_id is not None:
            ended.append({"kind": "plan_aborted", "plan_id": self.plan_id, "reason": "the engine was lost"})
        self.slice_id = self.plan_id = self.lease_expires_at = None
        self.config, self.config_id = self.champion, self.champion_id
        self.gauges, self.pid = {}, None
        return ended

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
            self.plan_id = self.lease_expires_at = None

    def gauge(self, frame: Frame) -> None:
        """Gauges are sums and may lag an event by a fraction of a second; what is in force comes from events."""
        self.gauges = {key: value for key, value in frame.items() if key != "op"}
        self.lease_expires_at = frame.get("lease_expires_at") if self.plan_id is not None else None

    def _back_to_champion(self) -> None:
        self.slice_id = None
        self.config_id, self.config = self.champion_id, self.champion
