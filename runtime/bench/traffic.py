"""Traffic through the serving engine, and what clients would feel of it.

    poisson: arrivals at a rate, with the lengths of mix300
    shared: so many requests at once, all with one beginning, each followed by another; prefix cache on
    long: one very long prompt beside requests that decode
    beside: requests that decode beside one with a very long prompt, which decodes too

TTFT counts from the instant of the arrival, so waiting for the step under way is part of it. ITL is the gap between
two tellings of one request; its percentile is over the gaps of all requests.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from runtime.bench.arrivals import (
    LONG_PROMPT_TOKENS,
    Wish,
    mixed_arrivals,
    random_tokens,
    ranged_wishes,
    scaled,
    shared_wishes,
)
from runtime.bench.serving import Answer, Serving, percentile_ms, quiet_collector
from runtime.knobs import KnobValue

TRAFFIC_MODEL_LEN = LONG_PROMPT_TOKENS + 1024
WARM_UP_S = 4.0  # of the same traffic with other tokens, not counted
DECODING_TOKENS = (128, 1024)  # prompt, and output that outlasts the long prompt
NUM_LONG = 3
LONG_ANSWER_TOKENS = 256
OUTLASTING_TOKENS = 4096  # of an output that outlasts its answer too

# What llama-8b shall keep to on one H200, ms or requests a second.
BARS: dict[str, dict[str, float]] = {
    "poisson": {"ttft_p95_ms": 200.0, "tpot_p95_ms": 20.0, "itl_p99_ms": 50.0},
    "shared": {"requests_per_s": 75.0, "ttft_p95_ms": 280.0},
    "long": {"ttft_p95_ms": 1500.0, "itl_p99_ms": 60.0},
}
AT_LEAST = ("requests_per_s",)  # of these more is better


class Scale(NamedTuple):
    """`lengths`: of all prompts and outputs. `num_at_once`: in all rows but `poisson`."""

    rate_per_s: float = 24.0
    seconds: float = 30.0
    num_at_once: int = 64
    lengths: float = 1.0


class Row(NamedTuple):
    """What one kind of traffic came to. `ttft_p95_ms` of `long` and `beside`: the median of the long prompts' TTFT;
    their ITL is that of the others while it is read, or while its answer is written. `hit_ratio`: of the prompts'
    tokens, those found cached, where the cache is on."""

    row: str
    variant: dict[str, KnobValue]
    num_requests: int
    requests_per_s: float
    output_tokens_per_s: float
    ttft_p50_ms: float | None
    ttft_p95_ms: float | None
    tpot_p95_ms: float | None
    itl_p99_ms: float | None
    num_preemptions: int
    hit_ratio: float | None
    num_dropped: int
    step_p50_ms: float | None = None
    step_p99_ms: float | None = None
    longest_step_ms: float | None = None  # warm-up included: a queue that it left is felt for long

    def missed(self) -> list[str]:
        """The bars that it does not keep to."""
        return [name for name, bar in BARS.get(self.row, {}).items() if not self._keeps(name, bar)]

    def _keeps(self, name: str, bar: float) -> bool:
        value = getattr(self, name)
        return value is not None and (value >= bar if name in AT_LEAST else value <= bar)


def row_of(
    row: str,
    serving: Serving,
    answers: Sequence[Answer],
    seconds: float,
    gaps_s: Sequence[float] | None = None,
    ttft_s: Sequence[float] | None = None,
) -> Row:
    """`answers`: all that ended within `seconds`. `gaps_s`, `ttft_s`: where they are not those of all answers."""
    told = [one for one in answers if one.told_at]
    gaps_s = [gap for one in told for gap in one.gaps_s()] if gaps_s is None else gaps_s
    ttft_s = [one.ttft_s for one in told] if ttft_s is None else ttft_s
    return Row(
        row, {}, len(answers), len(answers) / seconds, sum(one.num_tokens for one in answers) / seconds,
        percentile_ms(ttft_s, 50), percentile_ms(ttft_s, 95), percentile_ms([one.tpot_s for one in told], 95),
        percentile_ms(gaps_s, 99), 0, None, serving.num_failed,
    )  # fmt: skip


def poisson_row(serving: Serving, scale: Scale, rng: np.random.Generator) -> Row:
    """Requests that arrive in the first seconds are served and not counted."""
    warm_up_s = min(WARM_UP_S, scale.seconds)
    arrivals = mixed_arrivals(
        scale.rate_per_s, warm_up_s + scale.seconds, serving.vocab_size, scale.lengths, rng
    )
    answers = serving.play(arrivals)
    counted = [answer for arrival, answer in zip(arrivals, answers, strict=True) if arrival.at_s >= warm_up_s]
    dropped = sum(not answer.is_whole for answer in answers)
    return row_of("poisson", serving, counted, scale.seconds)._replace(num_dropped=dropped)


def shared_row(serving: Serving, scale: Scale, rng: np.random.Generator) -> Row:
    """Counts requests that ended after a warm-up, which takes the first ones at least, and within so many seconds."""
    before = serving.config.prefix_cache
    serving.reconfigure({"prefix_cache": "on"})
    scheduler = serving.engine.scheduler
    serving.keep_busy(shared_wishes(serving.vocab_size, scale.lengths, rng), scale.num_at_once)
    first = list(serving.answers)  # these find nothing cached
    serve_for(serving, min(WARM_UP_S, scale.seconds))
    while any(serving.answers[id].finish_reason is None for id in first):
        serving.step()
    ended_before = {id for id, one in serving.answers.items() if one.finish_reason is not None}
    hits, looked_up = scheduler.num_hit_tokens, scheduler.num_looked_up_tokens
    began = serving.clock.now()
    serve_for(serving, scale.seconds)
    seconds = serving.clock.now() - began
    ended = [
        one for id, one in serving.answers.items() if one.finish_reason is not None and id not in ended_before
    ]
    hit_ratio = (scheduler.num_hit_tokens - hits) / max(1, scheduler.num_looked_up_tokens - looked_up)
    serving.drain()
    serving.reconfigure({"prefix_cache": before})
    dropped = sum(not one.is_whole for one in serving.answers.values())
    row = row_of("shared", serving, ended, seconds)
    return row._replace(hit_ratio=hit_ratio, num_dropped=dropped)


def long_row(serving: Serving, scale: Scale, rng: np.random.Generator) -> Row:
    """Long prompts one after the other, each beside new requests that decode until its first token is there."""
    return _beside_long("long", serving, scale, rng)


def beside_row(serving: Serving, scale: Scale, rng: np.random.Generator) -> Row:
    """The same until the answer is there."""
    return _beside_long("beside", serving, scale, rng, scaled(LONG_ANSWER_TOKENS, scale.lengths))


def _beside_long(
    row: str, serving: Serving, scale: Scale, rng: np.random.Generator, num_answered: int = 0
) -> Row:
    """`num_answered`: tokens of the long prompt's answer beside which gaps are counted; of those before the first one
    where 0."""
    prompt, output = DECODING_TOKENS
    output = OUTLASTING_TOKENS if num_answered else output
    prompt, output = scaled(prompt, scale.lengths), scaled(output, scale.lengths)
    draw = ranged_wishes((prompt, prompt), (output, output), serving.vocab_size, rng)
    gaps_s: list[float] = []
    long: list[Answer] = []
    began = serving.clock.now()
    for _ in range(NUM_LONG):
        others = [serving.submit(draw()) for _ in range(scale.num_at_once)]
        while any(serving.answers[id].num_tokens < 2 for id in others) and serving.step():
            pass
        tokens = random_tokens(scaled(LONG_PROMPT_TOKENS, scale.lengths), serving.vocab_size, rng)
        answer = serving.answers[serving.submit(Wish(tokens, max(2, num_answered)))]
        while answer.num_tokens < max(1, num_answered) and serving.step():
            pass
        long.append(answer)
        for id in others if answer.told_at else ():
            first, last = answer.told_at[0], answer.told_at[-1]
            since, until = (first, last) if num_answered else (answer.arrived_at, first)
            gaps_s += serving.answers[id].gaps_s(since, until)
        serving.cancel(others)
        serving.drain()
    ttft_s = [median(one.ttft_s for one in long)] if all(one.told_at for one in long) else []
    found = row_of(row, serving, long, serving.clock.now() - began, gaps_s, ttft_s)
    return found._replace(num_dropped=sum(not one.is_whole for one in long))


ROWS: dict[str, Callable[[Serving, Scale, np.random.Generator], Row]] = {
    "poisson": poisson_row,
    "shared": shared_row,
    "long": long_row,
    "beside": beside_row,
}


def traffic(
    serving: Serving,
    names: Sequence[str],
    variants: Sequence[Mapping[str, KnobValue]],
    scale: Scale,
    seed: int,
    told: Callable[[Row], Any],
) -> list[Row]:
    """Each row under each variant: knobs that are changed for it, live, and changed back. `told`: called with each row
    when it is there, while `serving` still has its answers and steps."""
    rows = []
    for name in names:
        for variant in variants:
            before = serving.config.values()
            serving.reconfigure(variant)
            preemptions = serving.engine.scheduler.num_preemptions
            with quiet_collector():
                row = ROWS[name](serving, scale, np.random.default_rng(seed))
            num_preemptions = serving.engine.scheduler.num_preemptions - preemptions
            step_s = [step.seconds for step in serving.steps]
            row = row._replace(
                variant=dict(variant), num_preemptions=num_preemptions, step_p50_ms=percentile_ms(step_s, 50),
                step_p99_ms=percentile_ms(step_s, 99), longest_step_ms=percentile_ms(step_s, 100),
            )  # fmt: skip
            rows.append(row)
            told(row)
            serving.reconfigure({knob: before[knob] for knob in variant})
            serving.engine.scheduler.forget_prefixes()  # the next variant brings the same tokens
            serving.forget()
    return rows


def serve_for(serving: Serving, seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        serving.step()


def print_rows(rows: Sequence[Row]) -> None:
    print(
        f"{'traffic':<9}{'req/s':>8}{'out tok/s':>11}{'p50 TTFT ms':>13}{'p95 TTFT ms':>13}{'p95 TPOT ms':>13}"
        f"{'p99 ITL ms':>12}{'p50, p99, longest step':>24}{'preempted':>11}{'hits':>7}{'dropped':>9}  knobs"
    )
    for row in rows:
        ttft50, ttft, tpot, itl, *steps = (
            "" if value is None else f"{value:.1f}"
            for value in (row.ttft_p50_ms, row.ttft_p95_ms, row.tpot_p95_ms, row.itl_p99_ms,
                          row.step_p50_ms, row.step_p99_ms, row.longest_step_ms)
        )  # fmt: skip
        hits = "" if row.hit_ratio is None else f"{row.hit_ratio:.0%}"
        knobs = ",".join(f"{name}={value}" for name, value in row.variant.items())
        print(
            f"{row.row:<9}{row.requests_per_s:>8.1f}{row.output_tokens_per_s:>11.0f}{ttft50:>13}{ttft:>13}{tpot:>13}"
            f"{itl:>12}{', '.join(steps):>24}{row.num_preemptions:>11}{hits:>7}{row.num_dropped:>9}  {knobs}"
        )
