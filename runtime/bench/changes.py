"""What a benchmark of changing knobs measures by: another value of each knob, windows, and what they come to. Pure."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from runtime.knobs import KnobValue

STEP_PERCENT = 99.9
GAP_PERCENT = 99.0
FEW_PART = 64  # of the requests, so many fewer seats: those that are let in again are no more than usual
MIN_SAMPLES = 10  # a percentile of less is none
STEP_BAR, ITL_BAR = 1.2, 1.5  # times the percentile of quiet windows


class Window(NamedTuple):
    """What fell into an interval: seconds from step to step, and between two tokens of a request."""

    steps_s: list[float]
    gaps_s: list[float]

    @classmethod
    def joined(cls, windows: Sequence["Window"]) -> "Window":
        return cls(
            [step for window in windows for step in window.steps_s],
            [gap for window in windows for gap in window.gaps_s],
        )


class Visit(NamedTuple):
    """A knob's way to another value and back. `quiet`: before either commit, so under both values, as `changed` is,
    which follows them. `preparing`, `before`: while something was prepared, and the quiet window before that."""

    other: KnobValue
    prepare_s: list[float]
    commit_us: list[float]
    quiet: list[Window]
    changed: list[Window]
    preparing: list[Window]
    before: list[Window]
    num_dropped: int


class Row(NamedTuple):
    """One knob, or all of a kind. Ratios: None where there were too few samples, or nothing was prepared.

    A knob's windows hold some hundred steps, so their p99.9 is the longest of them. So also: `run_ratio` and
    `run_itl_ratio`, against the quiet windows of the whole run; `num_over`, of its steps those longer than STEP_BAR
    times the p99.9 of these; and `over_chance` of as many or more, if one step in a thousand were as long and steps
    did not depend on one another. That p99.9 is taken as known, but rests on few steps itself: seven of 7,000.
    """

    knob: str
    apply: str
    values: list[KnobValue]
    num_dropped: int
    num_commits: int
    commit_us: float
    most_commit_us: float
    prepare_s: float
    num_steps: int
    quiet_step_p50_ms: float | None
    quiet_step_ms: float | None
    changed_step_ms: float | None
    step_ratio: float | None
    run_ratio: float | None
    num_over: int
    over_chance: float
    before_itl_ms: float | None
    preparing_itl_ms: float | None
    itl_ratio: float | None
    run_itl_ratio: float | None


def other_value(
    report: Mapping[str, Any], current: KnobValue, turn: int = 0, num_requests: int | None = None
) -> KnobValue | None:
    """Another value of a knob, as the engine reports it; None where it has no other. `turn`: another one again, where
    a value that was prepared before would need nothing. `num_requests`: at once, of whom some lose their seats."""
    if report["choices"]:
        others = [one for one in report["choices"] if one != current and one not in report["promises"]]
        return others[turn % len(others)] if others else None
    assert isinstance(current, int | float), "a knob without choices is a number"
    low, high = report["low"], report["high"]
    if report["name"] == "max_num_seqs":
        taken = int(current if num_requests is None else min(current, num_requests))
        wanted: float = taken - max(1, taken // FEW_PART)
    elif current > low:
        wanted = max(low, current / 2 - turn * _least(report))
    else:
        wanted = 2 * current if current > 0 else _least(report)
    wanted = min(max(wanted, low), high)
    if report["kind"] == "int":
        wanted = math.floor(wanted)
    return None if wanted == current or not low <= wanted <= high else wanted


def _least(report: Mapping[str, Any]) -> float:
    """A small step: a block of 16 tokens of the pool, one of what is counted, a hundredth of a range."""
    if report["name"] == "kv_tokens":
        return 16.0
    return 1.0 if report["kind"] == "int" else float(report["high"]) / 100.0


def row_of(knob: str, apply: str, visits: Sequence[Visit], of_run: Window) -> Row:
    """At least one visit. `of_run`: the quiet windows of all knobs."""
    quiet = Window.joined([window for visit in visits for window in visit.quiet])
    changed = Window.joined([window for visit in visits for window in visit.changed])
    before = Window.joined([window for visit in visits for window in visit.before])
    preparing = Window.joined([window for visit in visits for window in visit.preparing])
    commits = [us for visit in visits for us in visit.commit_us]
    steps = [percentile(window.steps_s, STEP_PERCENT) for window in (quiet, changed)]
    gaps = [percentile(window.gaps_s, GAP_PERCENT) for window in (before, preparing)]
    run_step_s = percentile(of_run.steps_s, STEP_PERCENT)
    num_over = sum(run_step_s is not None and step > STEP_BAR * run_step_s for step in changed.steps_s)
    return Row(
        knob=knob, apply=apply, values=list(dict.fromkeys(visit.other for visit in visits)),
        num_dropped=sum(visit.num_dropped for visit in visits), num_commits=len(commits),
        commit_us=float(np.median(commits)), most_commit_us=max(commits),
        prepare_s=max(seconds for visit in visits for seconds in visit.prepare_s), num_steps=len(changed.steps_s),
        quiet_step_p50_ms=_ms(percentile(quiet.steps_s, 50)), quiet_step_ms=_ms(steps[0]),
        changed_step_ms=_ms(steps[1]), step_ratio=ratio(*steps),
        run_ratio=ratio(run_step_s, steps[1]), num_over=num_over,
        over_chance=chance_of(num_over, len(changed.steps_s), 1.0 - STEP_PERCENT / 100.0), before_itl_ms=_ms(gaps[0]),
        preparing_itl_ms=_ms(gaps[1]), itl_ratio=ratio(*gaps),
        run_itl_ratio=ratio(percentile(of_run.gaps_s, GAP_PERCENT), gaps[1]),
    )  # fmt: skip


def percentile(seconds: Sequence[float], percent: float) -> float | None:
    return float(np.percentile(seconds, percent)) if len(seconds) >= MIN_SAMPLES else None


def chance_of(num_hits: int, num_draws: int, probability: float) -> float:
    """Of so many hits or more among independent draws: the upper tail of the binomial distribution."""
    fewer, term = 0.0, (1.0 - probability) ** num_draws
    for hits in range(num_hits):
        fewer += term
        term *= (num_draws - hits) / (hits + 1) * probability / (1.0 - probability)
    return max(0.0, 1.0 - fewer)


def ratio(base: float | None, value: float | None) -> float | None:
    return None if base is None or value is None else value / base


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds
