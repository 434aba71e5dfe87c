"""One clock for all processes of a runtime: UTC epoch seconds that never step.

The front end anchors the epoch once at boot; afterwards time is that anchor plus CLOCK_MONOTONIC, which all
processes of one host share. A stepped system clock therefore bends no duration and reorders no record.
"""

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Clock:
    boot_epoch: float  # s, UTC
    boot_monotonic: float  # s, CLOCK_MONOTONIC at the same instant

    @classmethod
    def started_now(cls) -> "Clock":
        return cls(time.time(), time.monotonic())

    def now(self) -> float:
        """Returns UTC epoch seconds."""
        return self.boot_epoch + (time.monotonic() - self.boot_monotonic)
