"""What an engine computes before the first real request, and before the first over another kind of pool.

Requests of several shapes and of the largest step; and steps for what they launch alone.
"""

from collections.abc import Iterator

from runtime.batch import PackedBatch
from runtime.knobs import EngineConfig
from runtime.kv_cache import BLOCK_TOKENS, BlockPool
from runtime.request import Request, SamplingParams
from runtime.scheduler import Scheduler

WARM_UP_ROWS = (1, 2, 4, 8, 16)
FEWEST_TOKENS = 16  # of a step: the least that `max_batched_tokens` may be
PIECE_TOKENS = 16  # of a prompt, where steps are computed for what they launch alone


def warm_up_requests(rows: int, prompt_tokens: int) -> Iterator[Request]:
    """One long prompt when alone, else short ones; one request in two is drawn rather than greedy."""
    for row in range(rows):
        length = prompt_tokens if rows == 1 else min(8 + row, prompt_tokens)
        yield Request.of_tokens(str(row), [0] * length, 2, 0.0, SamplingParams(float(row % 2), 0.9, seed=row))


def largest_requests(config: EngineConfig, max_model_len: int) -> Iterator[Request]:
    """Prompts that fill a step with as many tokens as it may have, shared out among as many rows."""
    rows, length = _largest_rows(config)
    for row in range(rows):
        ids = [0] * min(length, max_model_len - 1)
        yield Request.of_tokens(str(row), ids, 1, 0.0, SamplingParams(float(row % 2), 0.9, seed=row))


def _largest_rows(config: EngineConfig) -> tuple[int, int]:
    """Rows of the largest step, and tokens of each."""
    rows = min(config.max_num_seqs, config.max_batched_tokens)
    return rows, max(1, config.max_batched_tokens // rows)


def largest_blocks(config: EngineConfig) -> int:
    """What a pool must have for these requests."""
    rows, length = _largest_rows(config)
    return (rows + 1) * (-(-(length + 1) // BLOCK_TOKENS) + 1)


def woken_steps(rows: int, block_tokens: int, max_model_len: int) -> tuple[int, Iterator[PackedBatch]]:
    """The blocks that a pool must have for them, and steps: pieces of prompts at once, then behind others and beside
    rows that decode, then rows that decode alone."""
    lengths = [min(length, max_model_len - 3) for length in (PIECE_TOKENS // 2, 2 * PIECE_TOKENS)]
    num_blocks = rows * (1 + -(-(lengths[1] + 3) // block_tokens))  # one is kept free for each that runs

    def steps() -> Iterator[PackedBatch]:
        config = EngineConfig.of({"prefill_chunk": PIECE_TOKENS, "max_num_seqs": rows})
        scheduler = Scheduler(BlockPool(num_blocks, block_tokens), config, max_model_len)
        for row in range(rows):
            scheduler.add(Request.of_tokens(str(row), [0] * lengths[row % 2], 3, 0.0))
        while (batch := scheduler.schedule(0.0)) is not None:
            yield scheduler.pack(batch)
            scheduler.finish_step(batch, [0] * int(batch.sampled.sum()), 0.0)

    return num_blocks, steps()
