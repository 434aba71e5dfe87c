import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.batch import Batch
from runtime.errors import InvalidRequest
from runtime.knobs import EngineConfig, knob_named
from runtime.kv_cache import BlockPool
from runtime.policy import MAX_OVERTAKEN_S
from runtime.request import Request, SamplingParams
from runtime.scheduler import SCORED_PIECE_TOKENS, Scheduler


def scheduler(
    num_blocks: int = 64, block_tokens: int = 4, max_model_len: int = 256, **knobs: object
) -> Scheduler:
    return Scheduler(BlockPool(num_blocks, block_tokens), EngineConfig.of(knobs), max_model_len)


def request(id: str, prompt: int = 8, output: int = 4, at: float = 0.0) -> Request:
    return Request.of_lengths(id, prompt, output, at)


def ids(batch: Batch | None) -> list[str]:
    return [] if batch is None else [request.id for request in batch.requests]


def held_tables(s: Scheduler) -> list[np.ndarray]:
    return [s._seats.blocks_of(request.seat) for request in s.running]


def left_of(s: Scheduler, request: Request) -> int:
    computed = 0 if request.seat is None else int(s._seats.computed[request.seat])
    return request.num_tokens - computed


def run(s: Scheduler, num_steps: int = 10_000, now: float = 100.0) -> list[Request]:
    finished = []
    for _ in range(num_steps):
        batch = s.schedule(now)
        if batch is None:
            break
        finished += s.finish_step(batch, None, now)
    return finished


def test_decode_rows_come_before_pieces_of_prompts_in_one_step() -> None:
    s = scheduler(prefill_chunk=16, max_batched_tokens=64)
    s.add(request("a"))
    s.finish_step(s.schedule(0.0), None, 0.0)
    s.add(request("b", prompt=20))
    batch = s.schedule(1.0)
    assert ids(batch) == ["a", "b"] and batch.new_tokens.tolist() == [1, 16]
    assert batch.sampled.tolist() == [True, False]
    assert (batch.num_decode, batch.num_prefill_rows, batch.num_prefill_tokens) == (1, 1, 16)
    assert batch.context_tokens == 9 + 16 and batch.attention_pairs == 9 + 16 * 16


@pytest.mark.parametrize("wants_runs", [True, False])
def test_rows_that_decode_lie_in_the_order_of_their_lengths(wants_runs: bool) -> None:
    config = EngineConfig.of({"max_batched_tokens": 64, "prefill_chunk": 32})
    s = Scheduler(BlockPool(64, 4, wants_runs=wants_runs), config, 256)
    for id, prompt in (("long", 20), ("short", 4), ("middle", 9)):
        s.add(request(id, prompt, 9))
    run(s, 1)
    s.add(request("new", 40))
    s.add(request("newer", 5))
    expected = ["short", "middle", "long"] if wants_runs else ["long", "middle", "short"]
    assert ids(s.schedule(100.0)) == [*expected, "new", "newer"]


def test_a_prompt_is_computed_in_chunks_within_the_budget() -> None:
    s = scheduler(prefill_chunk=16, max_batched_tokens=24)
    s.add(request("a", prompt=40))
    s.add(request("b", prompt=40))
    pieces = []
    for _ in range(5):
        batch = s.schedule(0.0)
        pieces.append(dict(zip(ids(batch), batch.new_tokens.tolist(), strict=True)))
        s.finish_step(batch, None, 0.0)
    assert pieces[:3] == [{"a": 16, "b": 8}, {"a": 16, "b": 8}, {"a": 8, "b": 16}]


def test_lowering_max_num_seqs_stops_admission_and_ends_nothing() -> None:
    s = scheduler(max_num_seqs=4)
    for name in "abcdef":
        s.add(request(name))
    s.finish_step(s.schedule(0.0), None, 0.0)
    s.config = s.config.patched({"max_num_seqs": 1})
    assert ids(s.schedule(0.0)) == ["a", "b", "c", "d"]
    assert {request.id for request in run(s)} == set("abcdef")


def test_every_decode_row_gets_its_turn_when_the_budget_is_smaller_than_their_number() -> None:
    s = scheduler(num_blocks=256, max_num_seqs=40, max_batched_tokens=512)
    for i in range(40):
        s.add(request(str(i), prompt=4, output=50))
    s.finish_step(s.schedule(0.0), None, 0.0)
    s.config = s.config.patched({"max_batched_tokens": 16})
    served: list[str] = []
    for _ in range(5):
        batch = s.schedule(0.0)
        assert batch.num_tokens == 16
        served += ids(batch)
        s.finish_step(batch, None, 0.0)
    assert {served.count(str(i)) for i in range(40)} == {2}


@pytest.mark.parametrize("mixed", [16, 32768])
def test_a_prompt_in_progress_is_not_starved_by_decode_rows_that_fill_the_budget(mixed: int) -> None:
    s = scheduler(
        num_blocks=256, max_num_seqs=40, max_batched_tokens=512, prefill_chunk=16, mixed_step_tokens=mixed
    )
    for i in range(20):
        s.add(request(str(i), prompt=4, output=200))
    s.add(request("long", prompt=100))
    s.finish_step(s.schedule(0.0), None, 0.0)
    s.config = s.config.patched({"max_batched_tokens": 16})
    finished = run(s, num_steps=60)
    assert [request.id for request in finished] == ["long"]


def test_first_come_first_served_admits_in_order_of_arrival() -> None:
    s = scheduler(max_num_seqs=1)
    for name, prompt in (("a", 30), ("b", 5), ("c", 10)):
        s.add(request(name, prompt))
    assert [request.id for request in run(s)] == ["a", "b", "c"]


def test_shortest_prefill_overtakes_but_not_forever() -> None:
    s = scheduler(max_num_seqs=1, policy="shortest_prefill")
    s.add(request("long", 30, at=0.0))
    s.add(request("short", 5, at=1.0))
    assert ids(s.schedule(1.0)) == ["short"]
    s = scheduler(max_num_seqs=1, policy="shortest_prefill")
    s.add(request("long", 30, at=0.0))
    s.add(request("short", 5, at=1.0))
    assert ids(s.schedule(MAX_OVERTAKEN_S)) == ["long"]


def test_short_prompts_pass_long_ones_that_share_their_tokens() -> None:
    knobs = {"prefill_chunk": 64, "max_batched_tokens": 128, "max_num_seqs": 8}
    load = (("long", 100), ("long too", 100), ("short", 20), ("short too", 20))
    s = scheduler(num_blocks=128, long_prompt_threshold=32, **knobs)
    for name, prompt in load:
        s.add(request(name, prompt))
    batch = s.schedule(0.0)
    assert dict(zip(ids(batch), batch.new_tokens.tolist(), strict=True)) == {
        "long": 32,
        "short": 20,
        "short too": 20,
    }
    s.finish_step(batch, None, 0.0)
    assert s.schedule(0.0).num_prefill_tokens == 32, "the second long prompt waits for the first"
    s = scheduler(num_blocks=128, **knobs)
    for name, prompt in load:
        s.add(request(name, prompt))
    assert ids(s.schedule(0.0)) == ["long", "long too"], "without the knob they fill the step"


def test_long_prompts_in_progress_share_their_tokens_in_order() -> None:
    s = scheduler(num_blocks=128, prefill_chunk=20, max_batched_tokens=128)
    for name in "abc":
        s.add(request(name, 100))
    s.finish_step(s.schedule(0.0), None, 0.0)
    s.config = s.config.patched({"long_prompt_threshold": 30})
    batch = s.schedule(0.0)
    assert dict(zip(ids(batch), batch.new_tokens.tolist(), strict=True)) == {"a": 20, "b": 10}
    finished = run(s)
    assert [one.id for one in finished] == ["a", "b", "c"]


def test_a_prompt_with_no_more_tokens_left_than_the_threshold_is_short() -> None:
    s = scheduler(num_blocks=128, prefill_chunk=64, max_batched_tokens=128, long_prompt_threshold=40)
    for name in "ab":
        s.add(request(name, 70))
    pieces = []
    for _ in range(3):
        batch = s.schedule(0.0)
        pieces.append(dict(zip(ids(batch), batch.new_tokens.tolist(), strict=True)))
        s.finish_step(batch, None, 0.0)
    assert pieces == [{"a": 40}, {"a": 30, "b": 40}, {"a": 1, "b": 30}]


def test_a_watermark_keeps_blocks_free_where_somebody_runs() -> None:
    for watermark, admitted in ((0.0, ["a", "b", "c"]), (0.25, ["a", "b", "c"]), (0.4, ["a", "b"])):
        s = scheduler(num_blocks=16, kv_watermark=watermark)  # of which each request takes 4
        for name in "abc":
            s.add(request(name, prompt=16, output=2))
        assert ids(s.schedule(0.0)) == admitted
    s = scheduler(num_blocks=16, kv_watermark=0.5)
    s.add(request("a", prompt=60, output=2))
    assert ids(s.schedule(0.0)) == ["a"], "who runs alone needs no room for others"
    assert [one.id for one in run(s)] == ["a"]


def test_a_watermark_saves_preemptions() -> None:
    nums = []
    for watermark in (0.0, 0.4):
        s = scheduler(num_blocks=24, kv_watermark=watermark)
        for number in range(12):
            s.add(request(str(number), prompt=8, output=24))
        assert len(run(s)) == 12
        nums.append(s.num_preemptions)
    assert nums[1] < nums[0]


def test_priority_admits_the_most_urgent_and_preempts_the_least() -> None:
    s = scheduler(max_num_seqs=1, policy="priority")
    for name, priority in (("usual", 0), ("urgent", -5), ("later", 7), ("usual too", 0)):
        one = request(name, 5)
        one.priority = priority
        s.add(one)
    assert [one.id for one in run(s)] == ["urgent", "usual", "usual too", "later"]
    s = scheduler(num_blocks=8, policy="priority")
    for name, priority in (("background", 9), ("urgent", -1), ("usual", 0)):
        one = request(name, 8, 24)
        one.priority = priority
        s.add(one)
    finished = run(s, num_steps=400)
    assert s.num_preemptions > 0 and finished[0].id == "urgent" and finished[0].num_preemptions == 0
    assert finished[-1].id == "background" and finished[-1].num_preemptions > 0


def test_batch_wait_holds_a_request_until_its_time_or_until_the_seats_are_filled() -> None:
    s = scheduler(max_num_seqs=2, batch_wait_ms=100.0)
    s.add(request("a", at=10.0))
    assert s.schedule(10.05) is None and s.next_wake(10.05) == pytest.approx(10.1)
    assert ids(s.schedule(10.1)) == ["a"]
    s = scheduler(max_num_seqs=2, batch_wait_ms=100.0)
    s.add(request("a", at=10.0))
    s.add(request("b", at=10.01))
    assert s.next_wake(10.02) == 10.02 and ids(s.schedule(10.02)) == ["a", "b"]


def test_an_idle_scheduler_never_wakes_and_a_busy_one_at_once() -> None:
    s = scheduler()
    assert s.next_wake(5.0) is None
    s.add(request("a"))
    s.schedule(5.0)
    assert s.next_wake(5.0) == 5.0


def test_a_full_pool_preempts_the_newest_which_is_recomputed_first() -> None:
    s = scheduler(num_blocks=8, max_num_seqs=3)  # 32 tokens
    for name in "abc":
        s.add(request(name, prompt=8, output=12))
    finished = run(s)
    assert [request.id for request in finished] == ["a", "b", "c"]
    assert finished[0].num_preemptions == 0
    assert s.num_preemptions == sum(request.num_preemptions for request in finished) >= 1
    assert s.pool.num_free == 8


def under_way(s: Scheduler) -> Batch:
    """The next step, launched and not read."""
    batch = s.schedule(100.0)
    assert batch is not None
    s.advance(batch)
    return batch


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_who_is_preempted_with_a_step_under_way_waits_for_what_it_drew(policy: str) -> None:
    s = scheduler(16, 16, 128, policy=policy, prefill_chunk=16, max_batched_tokens=64)
    s.add(request("old", 8, 20))
    run(s, 1)
    s.add(Request("long", 116, 4, 0.0, priority=5))
    run(s, 1)
    s.add(Request("short", 10, 4, 0.0, priority=1))
    drew = under_way(s)
    assert [one.id for one in drew.sampled_requests()] == ["old", "short"]
    s.move_to(BlockPool(8, 16))  # of nine that they need; the long one stands in front, and has drawn nothing
    assert [one.id for one in s.waiting] == ["long", "short"]
    following = [under_way(s), under_way(s)]  # the first of them without prompts
    for batch in following:
        assert ids(batch) == ["old"], "the token that the short one goes on from is not read yet"
    for batch in (drew, *following):
        s.settle(batch, None, 100.0)
    run(s)
    assert not s.has_requests


def test_the_step_behind_a_move_computes_no_prompts_where_somebody_decodes() -> None:
    s = scheduler(32, 16, 128, prefill_chunk=16, max_batched_tokens=64)
    s.add(request("old", 8, 20))
    run(s, 1)
    s.add(request("long", 90))
    s.add(request("later", 12, 20))
    run(s, 2)  # the last turn was that of the request that decodes since the step before
    s.add(request("new", 8))
    s.move_to(BlockPool(16, 16))
    assert ids(under_way(s)) == ["old", "later"]
    s.move_to(BlockPool(16, 16))
    assert set(ids(under_way(s))) == {"old", "later", "long", "new"}, "also where moves follow one another"
    s.move_to(BlockPool(16, 16))
    assert set(ids(under_way(s))) == {"old", "later", "new"}
    alone = scheduler(32, 16, 128, prefill_chunk=16)
    alone.add(request("long", 60))
    run(alone, 1)
    alone.move_to(BlockPool(16, 16))
    assert ids(under_way(alone)) == ["long"]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4])  # in one of them it is the prompt's turn
def test_behind_a_move_a_prompt_gives_its_turn_to_those_who_decode(num_steps: int) -> None:
    s = scheduler(num_blocks=256, max_num_seqs=40, max_batched_tokens=512, prefill_chunk=16)
    for i in range(20):
        s.add(request(str(i), prompt=4, output=200))
    s.add(request("long", prompt=200))
    run(s, 1)
    s.config = s.config.patched({"max_batched_tokens": 16})
    run(s, num_steps)
    s.move_to(BlockPool(200, 4))
    batch = under_way(s)
    assert len(batch.requests) == 16 and "long" not in ids(batch)


def test_the_cache_keeps_nothing_of_a_step_under_way_whose_request_took_the_seat_of_another() -> None:
    s = scheduler(16, 16, 128, prefix_cache="on", prefill_chunk=32, max_batched_tokens=64)
    for id, prompt in (("old", 8), ("left", 70)):
        s.add(Request.of_tokens(id, [3] * prompt, 20, 0.0))
    while not (drew := under_way(s)).sampled.all():
        s.settle(drew, [5] * int(drew.sampled.sum()), 100.0)
    seat = int(drew.seats[1])
    s._preempt(s.running[-1])
    new = Request.of_tokens("new", [4] * 20, 20, 0.0)
    s.add(new)
    following = under_way(s)
    assert new.seat == seat and s._seats.computed[seat] == 20, "the test must reach what it claims"
    s.settle(drew, [5, 5], 100.0)
    assert s._seats.registered[seat] == 0
    s.settle(following, [5, 5], 100.0)
    assert s._seats.registered[seat] == 1


def test_a_preempted_request_computes_its_own_output_again_as_prompt() -> None:
    s = scheduler(num_blocks=5, max_num_seqs=2)  # 20 tokens
    for name in "ab":
        s.add(Request.of_tokens(name, [1, 2, 3, 4, 5, 6], 8, arrived_at=0.0))
    token, again = 10, None
    while again is None:
        batch = s.schedule(0.0)
        if any(
            r.num_preemptions and start == 0 for r, start in zip(batch.requests, batch.starts, strict=True)
        ):
            again = s.pack(batch)
        s.finish_step(batch, [token] * len(batch.sampled_requests()), 0.0)
        token += 1
    assert again.token_ids.tolist() == [1, 2, 3, 4, 5, 6, 10, 11, 12]


def test_refuses_a_request_that_could_never_fit() -> None:
    with pytest.raises(InvalidRequest, match=r"must fit in 32 tokens, but got 30 \+ 3 = 33"):
        scheduler(num_blocks=8).add(request("a", prompt=30, output=3))
    with pytest.raises(InvalidRequest, match="at least 1"):
        scheduler().add(request("a", prompt=0))


def test_refuses_an_id_in_use() -> None:
    s = scheduler()
    s.add(request("a"))
    with pytest.raises(InvalidRequest, match="in use"):
        s.add(request("a"))


def test_a_cancelled_request_frees_its_blocks_at_once_wherever_it_is() -> None:
    s = scheduler(max_num_seqs=1)
    s.add(request("a"))
    s.add(request("b"))
    batch = s.schedule(0.0)
    assert s.cancel("a") and s.cancel("b") and not s.cancel("c")
    assert s.finish_step(batch, None, 0.0) == []
    assert s.pool.num_held == 0 and not s.has_requests and s.schedule(0.0) is None


def test_packed_tokens_lie_row_after_row_with_positions_and_slots() -> None:
    s = scheduler(num_blocks=16, prefill_chunk=16)
    s.add(Request.of_tokens("a", [7, 8, 9], 4, arrived_at=0.0))
    s.finish_step(s.schedule(0.0), [50], 0.0)
    s.add(Request.of_tokens("b", range(100, 120), 4, arrived_at=0.0))
    batch = s.schedule(0.0)
    packed = s.pack(batch)
    assert packed.token_ids.tolist() == [50, *range(100, 116)]
    assert packed.positions.tolist() == [3, *range(16)]
    assert packed.row_starts.tolist() == [0, 1, 17] and packed.contexts.tolist() == [4, 16]
    assert packed.last_tokens.tolist() == [0]
    for row, context in enumerate(packed.contexts):
        blocks = packed.block_tables[row].repeat(4) * 4 + np.tile(np.arange(4), packed.block_tables.shape[1])
        new = slice(packed.row_starts[row], packed.row_starts[row + 1])
        assert packed.slots[new].tolist() == blocks[:context].tolist()[-int(batch.new_tokens[row]) :]


def scored(id: str, prompt: int, output: int = 4, at: float = 0.0) -> Request:
    return Request.of_tokens(id, range(prompt), output, at, SamplingParams(num_prompt_logprobs=0))


def step(s: Scheduler) -> Batch:
    batch = s.schedule(100.0)
    assert batch is not None
    s.finish_step(batch, [0] * int(batch.sampled.sum()), 100.0)
    return batch


def test_a_scored_prompt_is_cut_so_that_its_logits_stay_few() -> None:
    s = scheduler(num_blocks=512, max_model_len=1024, prefill_chunk=1024, max_batched_tokens=2048)
    s.add(scored("a", 2 * SCORED_PIECE_TOKENS + 9))
    s.add(request("b", prompt=600))
    batches = [step(s) for _ in range(3)]
    assert [batch.new_tokens.tolist() for batch in batches] == [[256, 600], [1, 256], [1, 9]]
    assert [batch.scored and batch.scored[1:] for batch in batches] == [(0, 256), (256, 512), (512, 520)]
    assert step(s).scored is None


def test_one_prompt_is_scored_at_a_time_and_those_that_ask_for_nothing_pass() -> None:
    s = scheduler(
        num_blocks=512, max_model_len=1024, prefill_chunk=1024, max_batched_tokens=2048, max_num_seqs=3
    )
    for one in (scored("a", 300), scored("b", 20), request("c"), scored("d", 30)):
        s.add(one)
    batches = [step(s) for _ in range(4)]
    served = [sorted(ids(batch)) for batch in batches]
    assert served == [["a", "c"], ["a", "c"], ["a", "b", "c"], ["a", "b", "c"]]
    told = [(batch.requests[batch.scored.row].id, *batch.scored[1:]) for batch in batches if batch.scored]
    assert told == [("a", 0, 256), ("a", 256, 299), ("b", 0, 19)]
    assert step(s).requests[-1].id == "d"


def test_the_logits_of_a_scored_prompt_come_after_those_of_all_rows() -> None:
    s = scheduler(prefill_chunk=16)
    s.add(Request.of_tokens("a", [7, 8, 9], 4, arrived_at=0.0))
    step(s)
    s.add(scored("b", 10))
    s.add(Request.of_tokens("c", [5, 6], 4, arrived_at=0.0))
    batch = s.schedule(0.0)
    assert batch is not None and ids(batch) == ["a", "b", "c"]
    assert s.pack(batch).last_tokens.tolist() == [0, 10, 12, *range(1, 10)]


def test_a_preempted_prompt_goes_on_being_scored_where_it_was() -> None:
    s = scheduler(num_blocks=512, max_model_len=1024, prefill_chunk=200)
    s.add(scored("a", 500))
    pieces = [step(s).scored]
    s._preempt(s.running[0])
    while s.has_requests:
        pieces.append(step(s).scored)
    assert pieces[:4] == [(0, 0, 200), None, (0, 200, 400), (0, 400, 499)]
    assert set(pieces[4:]) == {None}


@pytest.mark.parametrize("end", ["cancel", "preempt"])
def test_a_scored_prompt_that_leaves_its_seat_lets_the_next_one_in(end: str) -> None:
    s = scheduler(num_blocks=512, max_model_len=1024, prefill_chunk=1024)
    s.add(scored("a", 300))
    s.add(scored("b", 300))
    assert ids(step(s)) == ["a"]
    s.cancel("a") if end == "cancel" else s._preempt(s.running[0])
    assert ids(step(s)) == ["b" if end == "cancel" else "a"]
    run(s)
    assert not s.has_requests and s.pool.num_free == 512


def test_a_prompt_of_one_token_has_nothing_to_score() -> None:
    s = scheduler()
    s.add(scored("a", 1))
    s.add(scored("b", 5))
    assert step(s).scored == (1, 0, 4)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_token_of_a_scored_prompt_is_told_once_whatever_happens(data: st.DataObject) -> None:
    s = scheduler(
        num_blocks=data.draw(st.integers(16, 40)), max_model_len=64, max_num_seqs=data.draw(st.integers(1, 6)),
        prefill_chunk=data.draw(st.sampled_from([16, 32])), max_batched_tokens=data.draw(st.integers(16, 48)),
        policy=data.draw(st.sampled_from(["fcfs", "shortest_prefill"])), prefix_cache="on",
    )  # fmt: skip
    told: dict[str, list[int]] = {}
    for number in range(12):
        length, output = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 20))
        asks = SamplingParams(num_prompt_logprobs=0) if data.draw(st.booleans()) else SamplingParams()
        s.add(Request.of_tokens(str(number), range(length), output, 0.0, asks))
        told |= {str(number): [] for _ in range(asks.num_prompt_logprobs is not None)}
    expected = {
        request.id: list(range(request.prompt_tokens - 1)) for request in s.waiting if request.id in told
    }
    while s.has_requests:
        batch = s.schedule(100.0)
        assert (
            batch is not None and len(s.pack(batch).last_tokens) <= batch.sampled.sum() + SCORED_PIECE_TOKENS
        )
        if batch.scored is not None:
            row, start, end = batch.scored
            assert batch.starts[row] <= start < end <= batch.contexts[row]
            told[batch.requests[row].id] += range(start, end)
        s.finish_step(batch, [0] * int(batch.sampled.sum()), 100.0)
    assert told == expected


CONFIGS = st.fixed_dictionaries(
    {
        "max_num_seqs": st.integers(1, 12),
        "max_batched_tokens": st.integers(16, 64),
        "prefill_chunk": st.integers(16, 40),
        "policy": st.sampled_from(knob_named("policy").choices),
        "batch_wait_ms": st.sampled_from([0.0, 50.0]),
        "long_prompt_threshold": st.sampled_from([16, 24, 1_048_576]),
        "kv_watermark": st.sampled_from([0.0, 0.1, 0.5]),
    }
)
LENGTHS = st.tuples(st.integers(1, 40), st.integers(1, 24))


@settings(max_examples=60, deadline=None)
@given(
    st.data(), st.integers(16, 40), st.lists(LENGTHS, min_size=1, max_size=25), st.lists(CONFIGS, min_size=1)
)
def test_every_request_finishes_whatever_the_knobs_do(
    data: st.DataObject, num_blocks: int, lengths: list[tuple[int, int]], configs: list[dict[str, object]]
) -> None:
    s = scheduler(num_blocks=num_blocks, max_model_len=64)
    to_come = [request(str(i), *length) for i, length in enumerate(lengths)]
    first_admissions: dict[str, int] = {}
    finished: list[Request] = []
    now, num_computed = 0.0, 0
    for step in range(20_000):
        now += 0.01
        if step < 60:
            s.config = EngineConfig.of(data.draw(st.sampled_from(configs)))
            for _ in range(min(len(to_come), data.draw(st.integers(0, 3)))):
                arriving = to_come.pop(0)
                arriving.arrived_at, arriving.priority = now, data.draw(st.integers(-1, 1))
                s.add(arriving)
        num_running = len(s.running)
        left_before = {one.id: left_of(s, one) for one in [*s.running, *s.waiting]}
        batch = s.schedule(now)
        s.pool.check_integrity(held_tables(s))
        assert len(s.running) <= max(num_running, s.config.max_num_seqs)
        if batch is None:
            if step >= 60 and not s.has_requests and not to_come:
                break
            continue
        assert 0 < batch.num_tokens <= s.config.max_batched_tokens
        assert batch.new_tokens.max() <= s.config.prefill_chunk
        assert len(set(ids(batch))) == len(batch.requests)
        is_long = [left_before[id] > s.config.long_prompt_threshold for id in ids(batch)]
        assert batch.new_tokens[is_long].sum() <= s.config.long_prompt_threshold
        if num_running and len(s.running) > num_running:
            assert s.pool.num_free >= int(s.config.kv_watermark * num_blocks)
        assert sorted(batch.new_tokens > 1) == list(batch.new_tokens > 1)
        capacities = s._seats.num_blocks[batch.seats] * s.pool.block_tokens
        assert (batch.contexts <= capacities).all()
        for one in batch.requests:
            first_admissions.setdefault(one.id, len(first_admissions))
        num_computed += batch.num_tokens
        finished += s.finish_step(batch, None, now)
    assert {one.id for one in finished} | {one.id for one in to_come} == {str(i) for i in range(len(lengths))}
    assert all(one.num_output_tokens == one.max_tokens and one.finish_reason == "length" for one in finished)
    assert s.pool.num_held == 0
    if all(config["policy"] == "fcfs" and config["long_prompt_threshold"] > 64 for config in configs):
        seen = [int(id) for id in first_admissions]
        admitted_at = {int(one.id): one.admitted_at for one in finished}
        assert all(
            admitted_at[a] <= admitted_at[b] for a, b in zip(sorted(seen), sorted(seen)[1:], strict=False)
        )
    if s.num_preemptions == 0:
        assert num_computed == sum(one.prompt_tokens + one.max_tokens - 1 for one in finished)
