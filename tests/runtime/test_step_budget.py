"""A step's budget: the closed form against addition, and what prompts get beside so many rows that decode."""

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from runtime.knobs import EngineConfig
from runtime.step_budget import (
    FEWEST_PROMPT_TOKENS,
    GOOD_ROWS,
    MORE,
    OVERLOAD_STEPS,
    TILE_ROWS,
    StepBudget,
    cost_of,
    most_tokens,
)

COSTS = st.sampled_from([0.0, 1e-9, 4e-5, 1e-3, 0.5, 3.0])


def budget(
    mixed: int, num_decode: int, waiting: int = 0, attention_cost: float = 0.0, cap: int = 8192
) -> StepBudget:
    knobs = {"mixed_step_tokens": mixed, "max_batched_tokens": cap}
    return StepBudget.of(EngineConfig.of(knobs), num_decode, waiting, attention_cost)


@given(st.integers(0, 300), st.integers(0, 100_000), COSTS)
def test_a_piece_costs_what_its_tokens_cost_one_by_one(num: int, context: int, attention_cost: float) -> None:
    added = math.fsum(1 + attention_cost * (context + place) for place in range(num))
    assert cost_of(num, context, attention_cost) == pytest.approx(added)


@given(st.floats(0, 2000), st.integers(0, 100_000), COSTS)
@example(1.0, 0, 3.0)
@example(1e-148, 0, 3.0)
def test_the_most_tokens_for_a_cost_are_those_that_counting_finds(
    cost: float, context: int, attention_cost: float
) -> None:
    counted = 0
    while cost_of(counted + 1, context, attention_cost) <= cost:
        counted += 1
    assert most_tokens(cost, context, attention_cost) == counted


def test_without_attention_a_token_is_a_token() -> None:
    assert [most_tokens(cost, 10_000, 0.0) for cost in (-1.0, 0.0, 0.5, 1.0, 1535.0)] == [0, 0, 0, 1, 1535]


def test_only_the_hard_cap_applies_where_nobody_decodes_or_too_many_wait_or_the_knob_is_off() -> None:
    assert budget(1536, 0).cost == math.inf
    assert budget(1536, 10, waiting=OVERLOAD_STEPS * 1536).cost == 1526
    assert budget(1536, 10, waiting=OVERLOAD_STEPS * 1536 + 1).cost == math.inf
    assert budget(32768, 10).cost == math.inf
    free = budget(1536, 0)
    assert free.take(10_000, 0) == 8192 and not free.has_room


def test_a_piece_that_the_budget_cuts_makes_a_good_number_of_rows() -> None:
    step = budget(1000, 100)
    assert step.take(300, 0) == 300, "what is not cut is left as it is"
    assert step.take(2048, 0) == 2 * GOOD_ROWS - 100 - 300, "a little more than the budget"
    assert step.num_rows == 2 * GOOD_ROWS and not step.has_room
    less = budget(1664, 64)  # 2,048 rows would be too many
    assert less.take(2048, 0) == 3 * GOOD_ROWS - 64
    far = budget(1250, 100)  # from any multiple of GOOD_ROWS
    assert far.take(2048, 0) == 9 * TILE_ROWS - 100
    few = budget(1216, 768)  # 1,024 rows would take much from prompts and little from the step
    assert few.take(2048, 0) == 9 * TILE_ROWS - 768
    fewest = budget(1200, 1000)  # down to 1,024 rows they would have less than they get at least
    assert fewest.take(2048, 0) == 9 * TILE_ROWS - 1000
    ends = budget(1000, 100)  # 924 tokens would be good, but there are fewer
    assert ends.take(910, 0) == 7 * TILE_ROWS - 100
    deep = budget(1000, 100, attention_cost=4e-5)  # where 1,024 rows would take too much
    assert deep.take(924, 6000) == 6 * TILE_ROWS - 100
    small = budget(300, 200)  # 100 tokens are left, 56 in whole tiles: fewer than prompts get at least
    assert small.take(2048, 0) == 100 and not small.has_room
    last = budget(700, 100)
    assert last.take(595, 0) == 595 and last.take(2048, 0) == 5, "rounding would leave nothing of it"


@pytest.mark.parametrize(("mixed", "num_decode"), [(16, 1), (256, 256), (256, 500), (1536, 1600)])
def test_prompts_get_some_tokens_however_many_rows_decode(mixed: int, num_decode: int) -> None:
    step = budget(mixed, num_decode)
    assert step.take(40, 0) == 40 and step.has_room
    assert step.take(2048, 50_000) == FEWEST_PROMPT_TOKENS - 40 and not step.has_room
    tight = budget(mixed, num_decode, cap=num_decode + 16)
    tight.share_out(np.ones(num_decode, np.int64), np.ones(num_decode, np.int64), np.ones(num_decode, bool))
    assert tight.take(2048, 0) == 16, "as far as the hard cap allows"


def test_deep_in_a_prompt_a_piece_is_shorter() -> None:
    pieces = [budget(1536, 64, attention_cost=4e-5).take(8192, context) for context in (0, 8192, 32_768)]
    assert pieces == [1472, 960, 576]
    assert all((64 + piece) % TILE_ROWS == 0 for piece in pieces)


def test_who_has_a_seat_gets_a_token_even_if_its_prefix_makes_it_dear() -> None:
    step = budget(1000, 100, attention_cost=1e-3)
    step.take(800, 0)
    step.cost = 1.5
    assert step.has_room and step.take(50, 100_000) == 1 and not step.has_room


@given(
    st.integers(16, 2000),
    st.integers(1, 400),
    st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 50_000)), max_size=8),
    st.integers(0, 8),
    COSTS,
    st.integers(16, 4096),
)
def test_no_step_has_more_than_its_caps(
    mixed: int,
    num_decode: int,
    prompts: list[tuple[int, int]],
    num_running: int,
    attention_cost: float,
    cap: int,
) -> None:
    step = budget(mixed, num_decode, attention_cost=attention_cost, cap=cap)
    running = prompts[:num_running]
    wanted = np.array([1] * num_decode + [want for want, _ in running])
    contexts = np.array([9] * num_decode + [context for _, context in running])
    granted = step.share_out(wanted, contexts, np.arange(len(wanted)) < num_decode).tolist()
    given = list(zip(granted[num_decode:], running, strict=True))
    for want, context in prompts[num_running:]:
        if not step.has_room:
            break
        tokens = step.take(max(1, want), context)
        assert tokens >= 1
        given.append((tokens, (max(1, want), context)))
    total = sum(granted[:num_decode]) + sum(tokens for tokens, _ in given)
    assert total <= cap and all(tokens <= want for tokens, (want, _) in given)
    num_prompt = sum(tokens for tokens, _ in given)
    spent = sum(cost_of(tokens, context, attention_cost) for tokens, (_, context) in given)
    dearest = max((1 + attention_cost * (context + want) for _, (want, context) in given), default=0.0)
    if num_prompt > FEWEST_PROMPT_TOKENS:  # one token may pass the budget, since a seat is worth one
        most = max(mixed, num_decode) + MORE * max(0, mixed - num_decode)
        assert num_decode + spent <= most + FEWEST_PROMPT_TOKENS * dearest
    if attention_cost == 0.0:
        free = max(0, mixed - num_decode)
        assert num_prompt <= max(FEWEST_PROMPT_TOKENS, (1 + MORE) * free) + len(given)
    if num_prompt < min(FEWEST_PROMPT_TOKENS, sum(want for _, (want, _) in given)):
        assert total == cap
