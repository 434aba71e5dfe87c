"""One clock for all processes of a runtime: UTC epoch seconds that never step.

The front end anchors the epoch once at boot, or takes over the anchor of the one before it; afterwards time is that
anchor plus CLOCK_MONOTONIC, which all processes of one host share. A stepped system clock therefore bends no
duration and reorders no record.
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

    @classmethod
    def of_text(cls, text: str) -> "Clock":
        """The clock of an earlier process, as "EPOCH:MONOTONIC"; a new one where that was before the host booted.

        Raises:
            ValueError: not two numbers of seconds.
        """
        epoch, monotonic = (float(part) for part in text.split(":"))
        if not (0.0 <= epoch < float("inf") and 0.0 <= monotonic < float("inf")):
            raise ValueError(f"must be EPOCH:MONOTONIC in seconds, but got {text}")
        return cls(epoch, monotonic) if monotonic <= time.monotonic() else cls.started_now()

    def now(self) -> float:
        """Returns UTC epoch seconds."""
        return self.boot_epoch + (time.monotonic() - self.boot_monotonic)
