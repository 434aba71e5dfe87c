"""The prefix cache between pool, index and scheduler: who holds what, what is found, and what is never found."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.batch import Batch
from runtime.knobs import EngineConfig, knob_named
from runtime.kv_cache import BlockPool
from runtime.prefix_cache import HASHED_AHEAD, KnownPrefix, PrefixIndex, chain
from runtime.request import Request
from runtime.retable import BlockMove
from runtime.scheduler import Scheduler

SIZE = 4  # tokens a block


def scheduler(
    num_blocks: int = 32, wants_runs: bool = True, max_model_len: int = 64, **knobs: object
) -> Scheduler:
    pool = BlockPool(num_blocks, SIZE, wants_runs)
    return Scheduler(pool, EngineConfig.of({"prefix_cache": "on", **knobs}), max_model_len)


def serve(
    s: Scheduler, id: str, prompt: list[int], output: int = 3, cache_salt: str | None = None
) -> Request:
    request = Request.of_tokens(id, prompt, output, arrived_at=0.0, cache_salt=cache_salt)
    s.add(request)
    run(s)
    return request


def run(s: Scheduler) -> None:
    while (batch := s.schedule(0.0)) is not None:
        s.finish_step(batch, [token_after(request) for request in batch.sampled_requests()], 0.0)


def token_after(request: Request) -> int:
    """A token that depends on the text so far and on nothing else, as a greedy model's."""
    return hash(tuple(request.token_ids[: request.num_tokens].tolist())) % 50


def held_tables(s: Scheduler) -> list[np.ndarray]:
    return [s._seats.blocks_of(request.seat) for request in s.running]


@pytest.mark.parametrize("wants_runs", [True, False])
def test_a_prompt_that_was_served_before_computes_its_last_block_only(wants_runs: bool) -> None:
    s = scheduler(wants_runs=wants_runs)
    prompt = list(range(20))
    serve(s, "first", prompt)
    s.add(Request.of_tokens("second", prompt, 3, arrived_at=0.0))
    batch = s.schedule(0.0)
    assert batch is not None and batch.starts.tolist() == [16] and batch.new_tokens.tolist() == [4]
    assert (s.num_hit_tokens, s.num_looked_up_tokens) == (16, 40)
    assert (batch.copies is not None) == wants_runs


def test_a_running_requests_blocks_are_shared_and_outlive_it() -> None:
    s = scheduler(wants_runs=False)
    prompt = list(range(12))
    s.add(Request.of_tokens("long", prompt, 20, arrived_at=0.0))
    s.finish_step(s.schedule(0.0), [7], 0.0)
    s.add(Request.of_tokens("short", prompt, 1, arrived_at=0.0))
    s.finish_step(s.schedule(0.0), [7, 7], 0.0)
    first, second = (s._seats.blocks_of(0), [*held_tables(s)])
    assert s.num_hit_tokens == 8 and len(second) == 1
    s.pool.check_integrity(held_tables(s))
    assert s.cancel("long") and len(first)
    s.pool.check_integrity([])
    assert s.cached_tokens >= 8 and s.pool.num_free == s.pool.num_blocks


def test_a_copied_prefix_lies_in_consecutive_blocks() -> None:
    s = scheduler()
    serve(s, "first", list(range(20)))
    for name in "abc":
        s.add(Request.of_tokens(name, [*range(16), 90, 91, 92], 5, arrived_at=0.0))
    batch = s.schedule(0.0)
    assert batch is not None and batch.copies is not None and len(batch.copies.targets) == 12
    for table in held_tables(s):
        assert (np.diff(table) == 1).all()
    assert len(np.unique(np.concatenate(held_tables(s)))) == 15  # nobody writes into another's blocks


def test_other_weights_find_nothing_of_these_and_find_their_own_again() -> None:
    s = scheduler()
    s.use_namespace("float32")
    serve(s, "a", list(range(20)))
    s.use_namespace("int8")
    serve(s, "b", list(range(20)))
    assert s.num_hit_tokens == 0
    s.use_namespace("float32")
    serve(s, "c", list(range(20)))
    assert s.num_hit_tokens == 16


def test_requests_of_another_salt_find_nothing_and_those_of_the_same_do() -> None:
    s = scheduler()
    prompt = list(range(20))
    for number, cache_salt in enumerate([None, "ada", "eve", "ada", None, "float32"]):
        before = s.num_hit_tokens
        serve(s, str(number), prompt, cache_salt=cache_salt)
        assert s.num_hit_tokens - before == (16 if number in (3, 4) else 0), (number, cache_salt)
    assert s.num_looked_up_tokens == 6 * 20


def test_a_salt_cannot_name_the_beginning_of_others() -> None:
    """The root of a salt that spells the bytes of a block is not the key of that block."""
    index, tokens = PrefixIndex(), np.frombuffer(b"an eavesdropper!", np.int32)
    for namespace in ("", "float32"):
        key = chain(index.root(namespace), tokens, SIZE, 1)[0]
        assert index.root(namespace, "an eavesdropper!") != key
    assert index.root("a", "b") != index.root("a\0", "b") and index.root("a", "b") != index.root("ab")


def test_longest_prefix_admits_what_is_cached_first_and_sees_own_salts_only() -> None:
    def first_of(*waiting: tuple[str, list[int], str | None]) -> str:
        s = scheduler(policy="longest_prefix", max_num_seqs=1)
        serve(s, "half", list(range(10)), 1)
        serve(s, "whole", list(range(20)), 1)
        serve(s, "foreign", list(range(100, 130)), 1, cache_salt="ada")
        hits = s.num_hit_tokens
        for id, prompt, cache_salt in waiting:
            s.add(Request.of_tokens(id, prompt, 1, arrived_at=0.0, cache_salt=cache_salt))
        batch = s.schedule(0.0)
        assert s.num_hit_tokens - hits == int(batch.starts[0]), "who is only compared is not counted"
        return batch.requests[0].id

    new = ("new", list(range(50, 70)), None)
    half, whole = ("h", [*range(8), *range(60, 72)], None), ("w", [*range(20), 1], None)
    foreign = list(range(100, 130))
    assert first_of(new, half, whole) == "w"
    assert first_of(new, half) == "h"
    assert first_of(half, ("spy", foreign, None), ("eve", foreign, "eve")) == "h"
    assert first_of(half, ("own", foreign, "ada")) == "own"


def test_longest_prefix_without_a_cache_is_the_order_of_arrival() -> None:
    s = scheduler(policy="longest_prefix", prefix_cache="off", max_num_seqs=1)
    for id in "ab":
        serve(s, id, list(range(20)), 1)
    s.add(Request.of_tokens("new", list(range(50, 70)), 1, arrived_at=0.0))
    s.add(Request.of_tokens("again", list(range(20)), 1, arrived_at=0.0))
    assert s.schedule(0.0).requests[0].id == "new"


def test_a_waiting_request_is_looked_up_under_the_weights_and_in_the_pool_of_the_moment() -> None:
    s = scheduler(policy="longest_prefix", max_num_seqs=1)
    s.use_namespace("float32")
    serve(s, "float32", list(range(20)), 1)
    s.add(Request.of_tokens("runs", list(range(70, 80)), 9, arrived_at=0.0))
    s.finish_step(s.schedule(0.0), [1], 0.0)
    s.add(Request.of_tokens("waits", list(range(20)), 1, arrived_at=0.0))
    assert s._cached_tokens(s.waiting[0]) == 16
    s.use_namespace("int8")
    assert s._cached_tokens(s.waiting[0]) == 0
    s.use_namespace("float32")
    assert s._cached_tokens(s.waiting[0]) == 16
    s.move_to(BlockPool(32, SIZE))
    assert s._cached_tokens(s.waiting[0]) == 0
    run(s)
    assert s.num_hit_tokens == 0


def test_a_prefix_is_found_as_by_the_whole_chain_and_hashed_little_further() -> None:
    index = PrefixIndex()
    tokens = np.arange(100 * SIZE, dtype=np.int32)
    root = index.root("")
    keys = chain(root, tokens, SIZE, 100)
    for num_cached in (0, 1, HASHED_AHEAD, HASHED_AHEAD + 1, 100):
        for block in range(num_cached):
            index.add(block, keys[block])
        prefix = KnownPrefix(root, 0)
        for num_blocks in (100, 100, 5):
            assert prefix.find(index, tokens, SIZE, num_blocks) == index.find(keys[:num_blocks])
        assert prefix.keys == keys[: len(prefix.keys)]
        assert len(prefix.keys) <= num_cached + HASHED_AHEAD
    index.forget(3)
    assert prefix.find(index, tokens, SIZE, 100) == [0, 1, 2]


def test_a_request_that_lived_through_a_swap_of_weights_leaves_nothing_behind() -> None:
    s = scheduler()
    s.use_namespace("float32")
    s.add(Request.of_tokens("a", list(range(6)), 30, arrived_at=0.0))
    s.finish_step(s.schedule(0.0), [1], 0.0)
    known = len(s.pool.index)
    s.use_namespace("int8")
    s.use_namespace("float32")
    run(s)
    assert len(s.pool.index) == known == 1


def test_switching_off_gives_the_blocks_back_and_keeps_who_runs() -> None:
    s = scheduler()
    serve(s, "a", list(range(20)))
    s.add(Request.of_tokens("b", list(range(30, 44)), 10, arrived_at=0.0))
    s.finish_step(s.schedule(0.0), [1], 0.0)
    s.config = s.config.patched({"prefix_cache": "off"})
    s.forget_prefixes()
    assert s.cached_tokens == 0 and len(s.pool.index) == 0
    s.pool.check_integrity(held_tables(s))
    run(s)
    assert s.pool.num_free == 32 and s.cached_tokens == 0


def test_a_replayed_request_is_never_looked_up() -> None:
    s = scheduler()
    for name in "ab":
        s.add(Request.of_lengths(name, 20, 3, 0.0))
        while (batch := s.schedule(0.0)) is not None:
            s.finish_step(batch, None, 0.0)
    assert (s.num_looked_up_tokens, s.num_hit_tokens, len(s.pool.index)) == (0, 0, 0)


def test_the_longest_unused_prefix_gives_way_and_its_end_before_its_beginning() -> None:
    s = scheduler(num_blocks=12, wants_runs=False, max_model_len=48)
    serve(s, "old", list(range(100, 116)), 1)
    serve(s, "new", list(range(200, 216)), 1)
    serve(s, "big", list(range(300, 316)), 8)  # wants 6 blocks of 12, of which 8 are idle
    assert s.pool.index.find(_keys(s, list(range(200, 216)), 4)) != []
    old = s.pool.index.find(_keys(s, list(range(100, 116)), 4))
    assert len(old) < 4


def _keys(s: Scheduler, tokens: list[int], num_blocks: int) -> list[bytes]:
    return chain(s.pool.index.root(""), np.array(tokens, np.int32), SIZE, num_blocks)


def test_keys_depend_on_salt_namespace_and_everything_before() -> None:
    tokens = np.arange(8, dtype=np.int32)
    here, there = PrefixIndex(), PrefixIndex()
    roots = {here.root("a"), here.root("b"), there.root("a")}
    assert len({chain(root, tokens, SIZE, 2)[1] for root in roots}) == 3
    other = np.array([9, *range(1, 8)], np.int32)
    assert chain(here.root("a"), tokens, SIZE, 2)[1] != chain(here.root("a"), other, SIZE, 2)[1]


def test_refuses_to_share_a_block_that_nobody_filled() -> None:
    with pytest.raises(ValueError, match="nothing in it to share"):
        BlockPool(4).share([2])


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(4, 30), st.booleans())
def test_blocks_are_conserved_when_they_are_shared_cached_and_evicted(
    data: st.DataObject, num_blocks: int, wants_runs: bool
) -> None:
    pool, tables = BlockPool(num_blocks, SIZE, wants_runs), []
    for number in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["allocate", "extend", "free", "register", "share", "forget"]))
        chosen = data.draw(st.integers(0, len(tables) - 1)) if tables else 0
        if action == "allocate" and pool.num_free:
            tables.append(pool.allocate(data.draw(st.integers(1, pool.num_free))))
        elif action == "extend" and tables and pool.num_free:
            tables[chosen] = np.append(tables[chosen], np.int32(pool.extend(int(tables[chosen][-1]))))
        elif action == "free" and tables:
            pool.free(tables.pop(chosen))
        elif action == "register" and tables:
            pool.register(int(data.draw(st.sampled_from(tables[chosen].tolist()))), b"%d" % number)
        elif action == "share" and len(pool.index):
            known = [block for block in range(num_blocks) if pool.index.key_of(block)]
            block = data.draw(st.sampled_from(known))
            pool.share([block])
            tables.append(np.array([block], np.int32))
        elif action == "forget":
            pool.forget_prefixes()
        pool.check_integrity(tables)


def text_of(request: Request, end: int) -> tuple[str | None, bytes]:
    """What the keys and values of the last of `end` tokens depend on, and whom they may be shown."""
    return request.cache_salt, request.token_ids[:end].tobytes()


class Contents:
    """What each slot of the pool really holds: the text up to its token. Stands in for keys and values."""

    def __init__(self, num_slots: int) -> None:
        self.text_at: list[object] = [None] * num_slots

    def compute(self, s: Scheduler, batch: Batch) -> None:
        packed = s.pack(batch)
        if packed.copies is not None:
            self.move(packed.copies, packed.block_tokens, self)
        for row, request in enumerate(batch.requests):
            start, new = int(batch.starts[row]), int(batch.new_tokens[row])
            slots = packed.slots[packed.row_starts[row] : packed.row_starts[row + 1]].tolist()
            for slot, end in zip(slots, range(start + 1, start + new + 1), strict=True):
                self.text_at[slot] = text_of(request, end)
        for row, request in enumerate(batch.requests):
            size = packed.block_tokens
            for position in range(int(packed.contexts[row])):
                slot = int(packed.block_tables[row, position // size]) * size + position % size
                assert self.text_at[slot] == text_of(request, position + 1), "another text's keys"

    def move(self, move: BlockMove, size: int, other: "Contents") -> None:
        """All is read before any is written."""
        taken = [self.text_at[block * size : (block + 1) * size] for block in move.sources.tolist()]
        for block, content in zip(move.targets.tolist(), taken, strict=True):
            other.text_at[block * size : (block + 1) * size] = content


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(16, 40), st.booleans())
def test_every_row_attends_to_its_own_text_whatever_is_shared_copied_preempted_or_moved(
    data: st.DataObject, num_blocks: int, wants_runs: bool
) -> None:
    s = scheduler(num_blocks, wants_runs, max_model_len=64, prefill_chunk=16, max_batched_tokens=32)
    contents = Contents(num_blocks * SIZE)
    finished: list[Request] = []
    num_added = 0
    for step in range(3000):
        if step < 50:
            s.config = s.config.patched({
                "prefix_cache": data.draw(st.sampled_from(["on", "on", "off"])),
                "policy": data.draw(st.sampled_from(knob_named("policy").choices)),
                "long_prompt_threshold": data.draw(st.sampled_from([16, 20, 1_048_576])),
                "kv_watermark": data.draw(st.sampled_from([0.0, 0.2])),
            })  # fmt: skip
            s.use_namespace(data.draw(st.sampled_from(["", "", "", "", "other"])))
            for _ in range(data.draw(st.integers(0, 2))):
                shared = data.draw(st.integers(0, 30))
                prompt = [*range(shared), *data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=8))]
                salt = data.draw(st.sampled_from([None, "ada", "eve"]))
                output = data.draw(st.integers(1, 20))
                s.add(Request.of_tokens(str(num_added), prompt, output, 0.0, cache_salt=salt))
                num_added += 1
            if data.draw(st.integers(0, 9)) == 0 and s.running:
                finished.append(s.running[0])
                s.cancel(s.running[0].id)
            if data.draw(st.integers(0, 14)) == 0:
                stays, size = data.draw(st.booleans()), SIZE * data.draw(st.sampled_from([1, 1, 2, 4]))
                num_slots = len(contents.text_at) if stays else SIZE * data.draw(st.integers(16, 40))
                there = contents if stays else Contents(num_slots)
                retabled = s.move_to(s.pool.resized(num_slots, size), stays)
                contents.move(retabled.move, retabled.block_tokens, there)
                contents = there
        batch = s.schedule(0.0)
        s.pool.check_integrity(held_tables(s))
        if batch is None:
            if step >= 50 and not s.has_requests:
                break
            continue
        contents.compute(s, batch)
        finished += s.finish_step(batch, [token_after(r) for r in batch.sampled_requests()], 0.0)
    assert len({request.id for request in finished}) == num_added
    assert s.pool.num_held == 0


def test_larger_blocks_over_the_same_slots_fall_apart_without_a_copy_and_join_again_where_they_lie() -> None:
    s = scheduler(64, wants_runs=False)
    for id in "abc":
        s.add(Request.of_tokens(id, list(range(19)), 30, 0.0))
    s.finish_step(s.schedule(0.0), [1, 2, 3], 0.0)
    larger = s.move_to(s.pool.resized(256, 4 * SIZE), stays=True)
    assert larger.block_tokens == SIZE and s.pool.block_tokens == 16 and s.pool.num_held == 6
    assert len(larger.move.sources) > 0, "three tables of five blocks each do not begin at a larger block"
    tables = [table.tolist() for table in held_tables(s)]
    smaller = s.move_to(s.pool.resized(256, SIZE), stays=True)
    assert smaller.block_tokens == SIZE and not len(smaller.move.sources)
    assert [table.tolist() for table in held_tables(s)] == [
        [4 * block + part for block in table for part in range(4)][:5] for table in tables
    ]
    again = s.move_to(s.pool.resized(256, 4 * SIZE), stays=True)
    assert not len(again.move.sources) and [table.tolist() for table in held_tables(s)] == tables


@pytest.mark.parametrize("size", [1, 2])
def test_what_is_held_through_a_change_of_blocks_is_found_in_the_new_ones(size: int) -> None:
    s = scheduler(64, wants_runs=False)
    s.add(Request.of_tokens("first", list(range(30)), 20, 0.0))
    s.finish_step(s.schedule(0.0), [1], 0.0)
    s.move_to(s.pool.resized(256, size * SIZE), stays=True)
    s.finish_step(s.schedule(0.0), [2], 0.0)
    s.add(Request.of_tokens("second", [*range(24), 5, 6], 3, 0.0))
    s.schedule(0.0)
    assert s.num_hit_tokens == 24


@settings(max_examples=30, deadline=None)
@given(st.data(), st.booleans())
def test_tokens_are_the_same_with_the_cache_and_without(data: st.DataObject, wants_runs: bool) -> None:
    prompts = data.draw(st.lists(st.tuples(st.integers(0, 24), st.integers(0, 3)), min_size=1, max_size=12))
    outputs = []
    for cache in ("on", "off"):
        s = scheduler(40, wants_runs, prefix_cache=cache)
        requests = [
            Request.of_tokens(str(i), [*range(shared), tail], 6, 0.0)
            for i, (shared, tail) in enumerate(prompts)
        ]
        for request in requests:
            s.add(request)
            s.finish_step(batch, [token_after(r) for r in batch.sampled_requests()], 0.0) if (
                batch := s.schedule(0.0)
            ) else None
        run(s)
        outputs.append([request.output_ids.tolist() for request in requests])
    assert outputs[0] == outputs[1]
