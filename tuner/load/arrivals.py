"""When requests come and how long they are: a pure generator, the same for the same seed.

    for arrival in arrivals(settings, np.random.default_rng(settings.seed), context_tokens=2048): ...

Lengths are drawn as the settings say (60 % short, 30 % medium, 10 % long prompts unless told otherwise) and
then scaled to the context of the model at hand by one factor, prompts and answers alike, so that the shape
of the mix survives on a small model.
"""

import csv
import math
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tuner.errors import SettingsError
from tuner.settings import PromptShare, TrafficSettings

TRACE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
LENGTH_CLASSES = ("short", "medium", "long")
# Longest prompts of the first two classes, in tokens before scaling.
SHORT_TOKENS, MEDIUM_TOKENS = 511, 2048
# The daily curve swings by this share of the mean: a peak of 1.7, a night of 0.3 of the mean rate.
DAILY_SWING = 0.7
# Spread of answer lengths: sigma of the logarithm. Half of all answers are shorter than 0.83 of the mean.
ANSWER_LOG_SIGMA = 0.6


class Arrival(NamedTuple):
    """One request to come: seconds after the start, its lengths, the class of its prompt before scaling."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    length_class: str


class TraceRow(NamedTuple):
    at_s: float
    prompt_tokens: int
    output_tokens: int


def arrivals(settings: TrafficSettings, rng: np.random.Generator, context_tokens: int) -> Iterator[Arrival]:
    """Yields arrivals without end, in order of time. A trace starts over when it is through.

    Times and lengths come from two streams of `rng`: another rate or process leaves the lengths as they are.

    Raises:
        SettingsError: no rate is known, or the trace cannot be read.
    """
    for_times, for_lengths = rng.spawn(2)
    if settings.kind == "replay":
        yield from trace_arrivals(settings, context_tokens)
        return
    scale = length_scale(settings, context_tokens)
    for at_s in arrival_times(settings, for_times):
        yield sized(at_s, *draw_lengths(settings, for_lengths), scale, context_tokens)


def at_rate(settings: TrafficSettings, rate_per_s: float) -> TrafficSettings:
    """The same traffic at a known rate; what `utilisation` becomes once the capacity is measured."""
    return settings.model_copy(update={"rate_per_s": rate_per_s, "utilisation": None})


def length_scale(settings: TrafficSettings, context_tokens: int) -> float:
    """The one factor on every length: as given, else what makes the longest prompt and answer fit."""
    if settings.length_scale is not None:
        return settings.length_scale
    if settings.kind == "replay":
        longest = max(row.prompt_tokens + row.output_tokens for row in read_trace(trace_path(settings)))
    else:
        longest = max(part.high for part in settings.prompt_mix) + settings.output_tokens.max
    return min(1.0, context_tokens / longest)


def sized(at_s: float, prompt_tokens: int, output_tokens: int, scale: float, context_tokens: int) -> Arrival:
    """Both lengths scaled; at least one token each, and together never more than the context."""
    prompt = min(max(1, round(prompt_tokens * scale)), context_tokens - 1)
    output = min(max(1, round(output_tokens * scale)), context_tokens - prompt)
    return Arrival(at_s, prompt, output, class_of(prompt_tokens))


def class_of(prompt_tokens: int) -> str:
    """The class of a prompt by its length before scaling."""
    if prompt_tokens <= SHORT_TOKENS:
        return "short"
    return "medium" if prompt_tokens <= MEDIUM_TOKENS else "long"


# --- times ----------------------------------------------------------------------------------------


def arrival_times(settings: TrafficSettings, rng: np.random.Generator) -> Iterator[float]:
    """Yields seconds after the start, without end. Not for traces, which bring their own times."""
    rate = settings.rate_per_s
    if rate is None or not rate > 0.0:
        raise SettingsError(
            f"`traffic.rate_per_s` must be above 0 requests/s for {settings.kind} traffic, but got {rate!r}. "
            "Where `utilisation` is given, measure the capacity first and set the rate from it."
        )
    if settings.kind == "constant":
        return constant_times(rate)
    if settings.kind == "poisson":
        return poisson_times(rate, rng)
    return varying_times(settings, rate, rng)


def constant_times(rate_per_s: float) -> Iterator[float]:
    index = 0
    while True:
        yield index / rate_per_s
        index += 1


def poisson_times(rate_per_s: float, rng: np.random.Generator) -> Iterator[float]:
    at_s = 0.0
    while True:
        at_s += float(rng.exponential(1.0 / rate_per_s))
        yield at_s


def varying_times(settings: TrafficSettings, rate_per_s: float, rng: np.random.Generator) -> Iterator[float]:
    """A Poisson process whose rate follows `rate_at`, by thinning one at the highest rate.

    Source: Lewis and Shedler, "Simulation of nonhomogeneous Poisson processes by thinning", 1979.
    """
    highest = max(
        rate_at(settings, rate_per_s, at_s) for at_s in (settings.burst.every_s, settings.day_s / 2.0)
    )
    for at_s in poisson_times(highest, rng):
        if rng.random() * highest < rate_at(settings, rate_per_s, at_s):
            yield at_s


def rate_at(settings: TrafficSettings, rate_per_s: float, at_s: float) -> float:
    """Requests a second at one instant; `rate_per_s` is the mean over a day, or over a burst and its calm.

    A start is calm: a day begins at its quietest, and the first burst comes after one full interval.
    """
    if settings.kind == "daily":
        return rate_per_s * (1.0 - DAILY_SWING * math.cos(2.0 * math.pi * at_s / settings.day_s))
    burst = settings.burst
    calm = rate_per_s / (1.0 + (burst.factor - 1.0) * burst.duration_s / burst.every_s)
    inside = at_s >= burst.every_s and at_s % burst.every_s < burst.duration_s
    return calm * burst.factor if inside else calm


# --- lengths --------------------------------------------------------------------------------------


def draw_lengths(settings: TrafficSettings, rng: np.random.Generator) -> tuple[int, int]:
    """Returns (prompt tokens, output tokens) before scaling."""
    part = pick(settings.prompt_mix, rng)
    prompt_tokens = int(rng.integers(part.low, part.high + 1))
    answer = settings.output_tokens
    # The mean of a lognormal is exp(mu + sigma²/2).
    output_tokens = rng.lognormal(math.log(answer.mean) - ANSWER_LOG_SIGMA**2 / 2.0, ANSWER_LOG_SIGMA)
    return prompt_tokens, max(1, min(round(output_tokens), answer.max))


def pick(mix: Sequence[PromptShare], rng: np.random.Generator) -> PromptShare:
    """One part of the mix, as often as its share."""
    mark = rng.random() * sum(part.share for part in mix)
    for part in mix:
        mark -= part.share
        if mark < 0.0:
            return part
    return mix[-1]


# --- traces ---------------------------------------------------------------------------------------


def trace_path(settings: TrafficSettings) -> Path:
    if settings.trace is None:
        raise SettingsError(
            "`traffic.trace` must name a CSV file when `traffic.kind` is replay, but got nothing."
        )
    return Path(settings.trace)


def read_trace(path: Path) -> list[TraceRow]:
    """Rows in order of time, the first at 0 s. Lines that start with # are comments.

    TIMESTAMP is an ISO 8601 instant or a number of seconds.

    Raises:
        SettingsError: the file is missing, lacks a column, holds no row or a row that is not a request.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(line for line in file if line.strip() and not line.startswith("#"))
            missing = [name for name in TRACE_COLUMNS if name not in (table.fieldnames or [])]
            if missing:
                raise SettingsError(
                    f"A trace needs {', '.join(TRACE_COLUMNS)}, but {path} lacks {', '.join(missing)}."
                )
            rows = sorted(trace_row(path, number, row) for number, row in enumerate(table, start=1))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"The trace {path} cannot be read: {error}. Check `traffic.trace`.") from error
    if not rows:
        raise SettingsError(f"A trace must hold at least one request, but {path} holds none.")
    return [row._replace(at_s=row.at_s - rows[0].at_s) for row in rows]


def trace_row(path: Path, number: int, row: dict[str, str]) -> TraceRow:
    stamp, prompt, output = (row[name] for name in TRACE_COLUMNS)
    try:
        return TraceRow(trace_instant(stamp.strip()), max(1, int(float(prompt))), max(1, int(float(output))))
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise SettingsError(
            f"Request {number} of {path} must be an instant and two token counts: {error}."
        ) from error


def trace_instant(stamp: str) -> float:
    """Seconds on the trace's own clock. Only differences matter: an instant without a zone is read as UTC."""
    try:
        seconds = float(stamp)
    except ValueError:
        instant = datetime.fromisoformat(stamp)
        seconds = (instant if instant.tzinfo else instant.replace(tzinfo=UTC)).timestamp()
    if not math.isfinite(seconds):
        raise ValueError(f"{stamp!r} is not a finite instant")
    return seconds


def trace_arrivals(settings: TrafficSettings, context_tokens: int) -> Iterator[Arrival]:
    """The trace over and over, at its own pace or, where a rate is given, stretched to that mean rate."""
    rows = read_trace(trace_path(settings))
    scale = length_scale(settings, context_tokens)
    span_s = rows[-1].at_s
    # One more mean gap between the last row and the first of the next round.
    round_s = span_s * len(rows) / (len(rows) - 1) if span_s > 0.0 else 1.0
    pace = 1.0 if settings.rate_per_s is None else len(rows) / round_s / settings.rate_per_s
    lap = 0
    while True:
        for row in rows:
            at_s = (row.at_s + lap * round_s) * pace
            yield sized(at_s, row.prompt_tokens, row.output_tokens, scale, context_tokens)
        lap += 1
