"""Requests that the tuner makes itself, for demos and benchmarks: how many, when, and how long."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tuner.settings_section import Section

Positive = Annotated[float, Field(gt=0)]


class PromptShare(Section):
    """A share of the requests whose prompts are low to high tokens long."""

    share: float = Field(gt=0, le=1)
    low: int = Field(ge=1)
    high: int = Field(ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.low > self.high:
            raise ValueError(
                f"`traffic.prompt_mix` must have low <= high, but got [{self.low}, {self.high}]. Swap the two."
            )
        return self


class OutputTokens(Section):
    """Lengths of the answers, in tokens."""

    mean: float = Field(default=96.0, ge=1)
    max: int = Field(default=256, ge=1)


class BurstSettings(Section):
    """Arrivals `factor` times as dense for `duration_s` seconds, every `every_s` seconds."""

    every_s: Positive = 60.0
    duration_s: Positive = 10.0
    factor: float = Field(default=4.0, ge=1, le=1000)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.duration_s >= self.every_s:
            raise ValueError(
                f"`traffic.burst.duration_s` must be less than `traffic.burst.every_s` ({self.every_s:g}), "
                f"but got {self.duration_s:g}."
            )
        return self


DEFAULT_PROMPT_MIX = (
    PromptShare(share=0.6, low=16, high=511),
    PromptShare(share=0.3, low=512, high=2048),
    PromptShare(share=0.1, low=2049, high=4096),
)


class TrafficSettings(Section):
    """Requests that the tuner makes itself, for demos and benchmarks. Lengths and rates, never stored prompts."""

    kind: Literal["poisson", "constant", "bursts", "daily", "replay"] = "poisson"
    """Shape of the arrivals; `replay` repeats those of a trace."""
    rate_per_s: float | None = Field(default=None, gt=0)
    """Requests a second on average; of a replay: the trace is stretched to it."""
    utilisation: float | None = Field(default=None, gt=0, le=10)
    """The same as a share of the measured capacity of the start configuration."""
    trace: Path | None = None
    """CSV of arrivals and lengths, for `replay`."""
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """Seed of arrivals, lengths and words."""
    length_scale: float | None = Field(default=None, gt=0)
    """Factor on all lengths; fitted to the model's context if not given."""
    prompt_mix: tuple[PromptShare, ...] = DEFAULT_PROMPT_MIX
    """Shares of short, middle and long prompts."""
    output_tokens: OutputTokens = OutputTokens()
    """Lengths of the answers."""
    burst: BurstSettings = BurstSettings()
    """Shape of `bursts`."""
    day_s: Positive = 86400.0
    """Length of the day of `daily`, in seconds."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        total = sum(part.share for part in self.prompt_mix)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"`traffic.prompt_mix` must hold shares that add up to 1, but got {total:g}.")
        if self.kind == "replay" and self.trace is None:
            raise ValueError(
                "`traffic.trace` must name a CSV file when `traffic.kind` is replay, but got nothing."
            )
        if self.rate_per_s is not None and self.utilisation is not None:
            raise ValueError(
                "`traffic.utilisation` must not be given beside `traffic.rate_per_s`, but got both. Remove one."
            )
        if self.kind != "replay" and self.rate_per_s is None and self.utilisation is None:
            raise ValueError(
                "`traffic.rate_per_s` must be given, or `traffic.utilisation` (such as 0.7), but got neither."
            )
        return self
