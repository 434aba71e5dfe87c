import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.kv_cache import BlockPool


def is_consecutive(blocks: list[int]) -> bool:
    return blocks == list(range(blocks[0], blocks[0] + len(blocks)))


def test_sequences_stay_consecutive_while_they_grow_side_by_side() -> None:
    pool = BlockPool(64)
    tables = [pool.allocate(2).tolist() for _ in range(4)]
    for _ in range(10):
        for table in tables:
            table.append(pool.extend(table[-1]))
    assert all(is_consecutive(table) for table in tables)


def test_falls_back_to_any_free_blocks_when_no_run_is_long_enough() -> None:
    pool = BlockPool(8)
    singles = [pool.allocate(1) for _ in range(8)]
    odd = [table for table in singles if table[0] % 2]
    for table in odd:
        pool.free(table)
    scattered = pool.allocate(3)
    assert set(scattered.tolist()) < {1, 3, 5, 7}
    pool.check_integrity([*(table for table in singles if table[0] % 2 == 0), scattered])


def test_a_sequence_that_fills_the_pool_fits() -> None:
    pool = BlockPool(8)
    assert pool.allocate(8).tolist() == list(range(8)) and pool.num_free == 0


def test_rejects_more_blocks_than_are_free() -> None:
    with pytest.raises(ValueError, match="2 free blocks, but 3"):
        BlockPool(2).allocate(3)


def test_rejects_freeing_twice() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.free(blocks)
    with pytest.raises(ValueError, match="free already"):
        pool.free(blocks)


def test_integrity_check_notices_a_lost_block() -> None:
    pool = BlockPool(4)
    pool.allocate(2)
    with pytest.raises(AssertionError, match="held by nobody"):
        pool.check_integrity([])


@given(st.data(), st.integers(1, 40))
def test_blocks_are_conserved_under_any_use(data: st.DataObject, num_blocks: int) -> None:
    pool, tables = BlockPool(num_blocks), []
    for _ in range(data.draw(st.integers(0, 40))):
        action = data.draw(st.sampled_from(["allocate", "extend", "free"]))
        if action == "allocate" and pool.num_free:
            tables.append(pool.allocate(data.draw(st.integers(1, pool.num_free))))
        elif action == "extend" and tables and pool.num_free:
            chosen = data.draw(st.integers(0, len(tables) - 1))
            tables[chosen] = np.append(tables[chosen], np.int32(pool.extend(int(tables[chosen][-1]))))
        elif action == "free" and tables:
            pool.free(tables.pop(data.draw(st.integers(0, len(tables) - 1))))
        pool.check_integrity(tables)
