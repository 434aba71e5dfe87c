"""`mixed_step_tokens` in the scheduler: small steps while somebody decodes, large ones otherwise."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.batch import Batch
from runtime.knobs import EngineConfig
from runtime.kv_cache import BlockPool
from runtime.request import Request, SamplingParams
from runtime.scheduler import SCORED_PIECE_TOKENS, Scheduler
from runtime.step_budget import FEWEST_PROMPT_TOKENS, GOOD_ROWS, MORE, OVERLOAD_STEPS, TILE_ROWS, cost_of

ATTENTION_COST = 4e-5
KNOBS = {"max_num_seqs": 256, "max_batched_tokens": 8192, "prefill_chunk": 2048}


def scheduler(num_blocks: int = 8192, attention_cost: float = ATTENTION_COST, **knobs: object) -> Scheduler:
    config = EngineConfig.of({**KNOBS, **knobs})
    return Scheduler(BlockPool(num_blocks), config, 100_000, attention_cost=attention_cost)


def request(id: str, prompt: int, output: int = 1000) -> Request:
    return Request.of_lengths(id, prompt, output, 0.0)


def with_decodes(num: int, **knobs: object) -> Scheduler:
    """A scheduler with so many requests that decode, and nobody else."""
    s = scheduler(**knobs)
    for index in range(num):
        s.add(request(f"decode {index}", 8))
    step(s)
    return s


def step(s: Scheduler) -> Batch:
    batch = s.schedule(100.0)
    assert batch is not None
    s.finish_step(batch, None, 100.0)
    return batch


def cost_beside(batch: Batch, num_decode: int) -> float:
    """Token equivalents of the rows that do not decode."""
    pieces = zip(batch.new_tokens[num_decode:].tolist(), batch.starts[num_decode:].tolist(), strict=True)
    return sum(cost_of(tokens, start, ATTENTION_COST) for tokens, start in pieces)


def test_a_long_prompt_beside_decodes_is_computed_in_steps_of_like_cost() -> None:
    s = with_decodes(64, mixed_step_tokens=1536)
    s.add(request("long", 24_000))
    pieces, done = [], 0
    while done < 24_000:
        batch = step(s)
        assert batch.num_decode == 64 and cost_beside(batch, 64) <= (1 + MORE) * (1536 - 64)
        pieces.append(int(batch.new_tokens[64]))
        done += pieces[-1]
    assert all((64 + piece) % TILE_ROWS == 0 for piece in pieces[:-1])
    assert pieces[0] == 3 * GOOD_ROWS - 64 and pieces[-2] == 704 and pieces == sorted(pieces, reverse=True)


def test_short_prompts_share_what_decodes_leave_and_the_rest_waits() -> None:
    s = with_decodes(100, mixed_step_tokens=1024, attention_cost=0.0)
    for index in range(4):
        s.add(request(f"prompt {index}", 400))
    assert step(s).new_tokens.tolist() == [1] * 100 + [400, 400, 124]
    assert step(s).new_tokens.tolist() == [1] * 102 + [276, 400]


def test_where_nobody_decodes_steps_are_as_large_as_may_be() -> None:
    s = scheduler(mixed_step_tokens=1536)
    for index in range(5):
        s.add(request(f"prompt {index}", 2048))
    assert step(s).num_tokens == 8192


def test_a_backlog_is_served_in_large_steps_until_it_is_gone() -> None:
    s = with_decodes(10, mixed_step_tokens=512)
    for index in range(10):
        s.add(request(f"prompt {index}", 2000))
    assert s.waiting.prompt_tokens == 20_000 > OVERLOAD_STEPS * 512
    assert step(s).num_tokens == 8192
    assert s.waiting.prompt_tokens == 20_000 - 5 * 2000 <= OVERLOAD_STEPS * 512 + 2000
    sizes = []
    while s.waiting:
        waiting = s.waiting.prompt_tokens
        batch = step(s)
        sizes.append((waiting > OVERLOAD_STEPS * 512, batch.num_tokens > 512))
    assert all(is_overloaded == is_large for is_overloaded, is_large in sizes) and len(set(sizes)) == 2


def test_prompts_that_wait_count_by_what_is_likely_not_cached() -> None:
    """64 requests of one beginning of 2,000 tokens hold 64 times that, but most of it is known."""
    s = scheduler(mixed_step_tokens=1536, prefix_cache="on")
    begin = list(range(2000))

    def asked(id: str) -> Request:
        return Request.of_tokens(id, [*begin, *[int(id)] * 200], 4, 0.0)

    def served(ids: range) -> list[int]:
        for id in ids:
            s.add(asked(str(id)))
        sizes = []
        while s.waiting or s.running:
            batch = s.schedule(0.0)
            assert batch is not None
            s.finish_step(batch, [0] * int(batch.sampled.sum()), 0.0)
            sizes.append(batch.num_tokens if batch.num_decode else 0)
        return sizes

    assert max(served(range(40))) > 4000, "nothing was known yet"
    served(range(100, 116))
    assert 1024 < max(served(range(200, 264))) <= 1536
    s.forget_prefixes()
    s.config = s.config.patched({"prefix_cache": "off"})
    assert max(served(range(300, 340))) > 4000


def test_prompts_go_on_however_many_rows_decode() -> None:
    s = with_decodes(200, mixed_step_tokens=128)
    s.add(request("long", 1000))
    batch = step(s)
    assert batch.num_decode == 200 and batch.num_prefill_tokens == FEWEST_PROMPT_TOKENS


def test_other_bounds_hold_within_the_budget() -> None:
    s = with_decodes(10, mixed_step_tokens=1536, long_prompt_threshold=600, prefill_chunk=300)
    for name in ("long", "long too", "short"):
        s.add(request(name, 100 if name == "short" else 5000))
    batch = step(s)
    pieces = zip([one.id for one in batch.requests], batch.new_tokens.tolist(), strict=True)
    assert [piece for piece in pieces if piece[1] > 1] == [("long", 300), ("long too", 300), ("short", 100)]


def test_a_scored_prompt_keeps_to_its_piece_and_to_the_budget() -> None:
    for mixed, piece in ((1536, SCORED_PIECE_TOKENS), (128, 128 - 10)):
        s = scheduler(mixed_step_tokens=mixed, attention_cost=0.0)
        for index in range(10):
            s.add(Request.of_tokens(f"decode {index}", [0] * 8, 100, 0.0))
        s.finish_step(s.schedule(0.0), [0] * 10, 0.0)
        s.add(Request.of_tokens("scored", [0] * 1500, 1, 0.0, SamplingParams(num_prompt_logprobs=0)))
        batch = s.schedule(0.0)
        assert batch.new_tokens[-1] == piece and batch.scored.end == piece


LENGTHS = st.tuples(st.integers(1, 600), st.integers(1, 40))
CONFIGS = st.fixed_dictionaries(
    {
        "max_num_seqs": st.integers(1, 12),
        "max_batched_tokens": st.integers(16, 600),
        "prefill_chunk": st.sampled_from([16, 100, 600]),
        "mixed_step_tokens": st.sampled_from([16, 40, 130, 300, 32768]),
        "policy": st.sampled_from(["fcfs", "shortest_prefill"]),
        "long_prompt_threshold": st.sampled_from([64, 1_048_576]),
    }
)


@settings(max_examples=60, deadline=None)
@given(
    st.builds(Random, st.integers(0, 10_000)),
    st.lists(LENGTHS, min_size=1, max_size=25),
    st.lists(CONFIGS, min_size=1, max_size=4),
    st.sampled_from([0.0, ATTENTION_COST, 1e-2]),
    st.integers(48, 200),
)
def test_no_step_passes_its_caps_and_the_queue_knows_its_tokens(
    random: Random,
    lengths: list[tuple[int, int]],
    configs: list[dict[str, object]],
    attention_cost: float,
    num_blocks: int,
) -> None:
    s = Scheduler(BlockPool(num_blocks), EngineConfig(), 700, attention_cost=attention_cost)
    to_come = [request(str(index), *length) for index, length in enumerate(lengths)]
    num_ended = 0
    while to_come or s.has_requests:
        s.config = EngineConfig.of(random.choice(configs))
        for _ in range(min(len(to_come), random.randint(0, 3))):
            s.add(to_come.pop())
        if s.has_requests and random.random() < 0.03:
            num_ended += s.cancel(random.choice([*s._requests]))
        assert s.waiting.prompt_tokens == sum(one.prompt_tokens for one in s.waiting)
        if (batch := s.schedule(100.0)) is None:
            assert not s.has_requests
            continue
        assert 0 < batch.num_tokens <= s.config.max_batched_tokens and batch.new_tokens.min() > 0
        num_ended += len(s.finish_step(batch, None, 100.0))
    assert num_ended == len(lengths) and s.waiting.prompt_tokens == 0 and s.pool.num_held == 0


def test_off_is_off_whatever_attention_costs() -> None:
    s = with_decodes(100, attention_cost=1.0)
    for index in range(5):
        s.add(request(f"prompt {index}", 5000))
    assert step(s).new_tokens.tolist() == [1] * 100 + [2048] * 3 + [8192 - 100 - 3 * 2048]


@pytest.mark.parametrize("mixed", [16, 256, 4096])
def test_every_request_ends_whatever_the_knob_is(mixed: int) -> None:
    s = scheduler(512, mixed_step_tokens=mixed)
    for index in range(30):
        s.add(request(str(index), 100 + 40 * index, 20))
    num_finished = 0
    while (batch := s.schedule(100.0)) is not None:
        num_finished += len(s.finish_step(batch, None, 100.0))
    assert num_finished == 30 and s.pool.num_held == 0
