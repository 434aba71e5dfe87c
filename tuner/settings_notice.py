"""What is noticed: the `notice:` section of the settings."""

from pydantic import Field, field_validator

from tuner.notice.rules import RULES
from tuner.settings_section import Section


class ForecastSettings(Section):
    """What a metric does in the course of a day (Prophet, in a process of its own)."""

    enabled: bool = True
    """False leaves only rules and statistics."""
    min_points: int = Field(default=30, ge=30, le=2016)
    """Minutes that a metric must have been sampled before its first forecast."""
    min_history_s: float = Field(default=172_800.0, ge=0)
    """Seconds between the first and the last of them; below two days there is no day to learn."""
    refit_s: float = Field(default=86_400.0, ge=600)
    """Seconds between two fits of one metric."""
    timeout_s: float = Field(default=300.0, gt=0, le=3600)
    """Seconds after which a fit is given up; it runs at the lowest priority, and so may wait long for a core."""


class NoticeSettings(Section):
    """What is noticed, and what follows."""

    rules: bool = True
    """Rules with fixed thresholds; the table in the README lists them."""
    statistics: bool = True
    """Levels, drifts and spreads against each metric's own last hours."""
    studies: bool = True
    """Whether a condition (a breached SLO, a queue, another load) starts a study before its turn."""
    disabled: tuple[str, ...] = ()
    """Rules that are off, by name."""
    triggers: dict[str, float] = Field(default_factory=dict)
    """Other triggers, by name of the rule; the threshold at which it is over keeps its proportion."""
    itl_p99_s: float | None = Field(default=0.1, gt=0)
    """Limit on the p99 of the gap between two tokens, in seconds, beside the SLOs; null for none."""
    caution: float = Field(default=1.0, gt=0, le=10)
    """Factor on every threshold of the statistics: 2 notices less and later."""
    forecast: ForecastSettings = ForecastSettings()

    @field_validator("disabled", "triggers")
    @classmethod
    def _check_names(cls, names: tuple[str, ...] | dict[str, float]) -> tuple[str, ...] | dict[str, float]:
        known = [rule.name for rule in RULES]
        for name in names:
            if name not in known:
                raise ValueError(f"must name rules, but got {name!r}. The rules are: {', '.join(known)}.")
        return names
