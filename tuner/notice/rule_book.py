"""All rules over all labels: who holds how long, and what opened or closed in this tick. Pure."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tuner.notice.hysteresis import Event, Hold
from tuner.notice.rules import Reading, Rule
from tuner.notice.signals import Signals

RuleKey = tuple[str, str]  # rule, label


class RuleEvent(NamedTuple):
    """`event` None: it is open and goes on."""

    rule: Rule
    reading: Reading
    hold: Hold
    event: Event | None

    @property
    def key(self) -> RuleKey:
        return self.rule.name, self.reading.label


class RuleBook:
    """`step` once a tick, after `Signals.feed`."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = {rule.name: rule for rule in rules}
        self._holds: dict[RuleKey, Hold] = {}

    def adopt(self, key: RuleKey, since_at: float, worst: float | None) -> None:
        """It is open already, since an earlier life."""
        self._holds[key] = Hold(is_open=True, since_at=since_at, worst=worst)

    def step(self, signals: Signals, now: float) -> Iterator[RuleEvent]:
        """What opened, closed or stands open. A rule about the champion is not asked while a challenger serves."""
        for rule in self.rules.values():
            if rule.champion_only and not signals.is_champion:
                continue
            for reading in rule.signal(signals, now):
                hold = self._holds.setdefault((rule.name, reading.label), Hold())
                event = hold.advance(rule.band, _counted(rule, reading), now)
                if event is not None or hold.is_open:
                    yield RuleEvent(rule, reading, hold, event)


def _counted(rule: Rule, reading: Reading) -> float:
    """A value that does not count is not beyond, whatever the number says."""
    if reading.counts:
        return reading.value
    bound = min if rule.band.rises else max
    return bound(reading.value, rule.band.clear)
