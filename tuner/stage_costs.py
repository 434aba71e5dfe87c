"""What the loop itself costs: CPU and wall seconds a stage and a tick, since the daemon started. No I/O."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

KEPT_TICKS = 3600  # an hour of them, for the percentiles


@dataclass
class Cost:
    """One stage. CPU is of the ticking thread alone; threads and children beside it are not in here."""

    num_calls: int = 0
    cpu_s: float = 0.0
    wall_s: float = 0.0
    max_wall_s: float = 0.0

    def add(self, cpu_s: float, wall_s: float) -> None:
        self.num_calls += 1
        self.cpu_s += cpu_s
        self.wall_s += wall_s
        self.max_wall_s = max(self.max_wall_s, wall_s)


@dataclass
class StageCosts:
    """`measured(name)` around each stage, `measured(TICK)` around them all."""

    TICK = "tick"

    costs: dict[str, Cost] = field(default_factory=dict)
    _ticks_s: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT_TICKS))

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        cpu_s, wall_s = time.thread_time(), time.monotonic()
        try:
            yield
        finally:
            wall_s = time.monotonic() - wall_s
            self.costs.setdefault(name, Cost()).add(time.thread_time() - cpu_s, wall_s)
            if name == self.TICK:
                self._ticks_s.append(wall_s)

    def tick_percentile_s(self, share: float) -> float | None:
        """Of the last hour's ticks, by nearest rank; None before the first."""
        ordered = sorted(self._ticks_s)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None

    def to_dict(self) -> dict[str, Any]:
        """For the API: seconds since the daemon started, by stage."""
        return {
            "stages": {name: vars(cost).copy() for name, cost in list(self.costs.items())},
            "tick_p50_s": self.tick_percentile_s(0.50),
            "tick_p99_s": self.tick_percentile_s(0.99),
        }
