"""One reading of a machine at a time: absent where it fails, said once, tried again at the next sample."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import psutil

from store.metrics import Metric

log = logging.getLogger(__name__)

T = TypeVar("T")
Reading = Callable[..., float]
Readings = dict[tuple[Metric, str], float]

# What a reading may raise beside NVML's own error: a file or process that went away, a field that this
# kernel, driver or library version does not have, a counter that is not kept here (None).
FAILURES = (OSError, psutil.Error, AttributeError, LookupError, ValueError, TypeError, NotImplementedError)


class Probe(Protocol):
    def sample(self, monotonic_s: float) -> Readings:
        """The values now; those which cannot be read are absent."""


@dataclass
class Reader:
    """Takes one reading at a time, and remembers which ones fail so that each is logged once."""

    probe: str
    failures: tuple[type[Exception], ...] = FAILURES
    failing: set[tuple[str, str]] = field(default_factory=set)
    _counters: dict[tuple[Metric, str], tuple[float, float]] = field(default_factory=dict)

    def read(self, what: str, label: str, reading: Callable[..., T], *args: Any) -> T | None:
        """`reading(*args)`, or None where it fails."""
        named = f"{what}[{label}]" if label else str(what)
        try:
            value = reading(*args)
        except self.failures as error:
            if (what, label) not in self.failing:
                self.failing.add((what, label))
                log.warning("%s: %s cannot be read and is left out: %r", self.probe, named, error)
            return None
        if (what, label) in self.failing:
            self.failing.remove((what, label))
            log.info("%s: %s can be read again.", self.probe, named)
        return value

    def gauge(self, into: Readings, metric: Metric, label: str, reading: Reading, *args: Any) -> None:
        value = self.read(metric, label, lambda: float(reading(*args)))
        if value is not None:
            into[metric, label] = value

    def rate(
        self, into: Readings, metric: Metric, label: str, monotonic_s: float, counter: Reading, *args: Any
    ) -> None:
        """Growth of a counter a second. A counter that fell was reset or wrapped: no rate this time."""
        value = self.read(metric, label, lambda: float(counter(*args)))
        before = self._counters.pop((metric, label), None)
        if value is None:
            return
        self._counters[metric, label] = (monotonic_s, value)
        if before is not None and monotonic_s > before[0] and value >= before[1]:
            into[metric, label] = (value - before[1]) / (monotonic_s - before[0])

    def forget(self, metric: Metric, label: str) -> None:
        """The counter starts anew: its owner is another one."""
        self._counters.pop((metric, label), None)
