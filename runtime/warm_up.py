"""The requests that an engine computes before the first real one: several shapes of steps, and the largest."""

from collections.abc import Iterator

from runtime.knobs import EngineConfig
from runtime.kv_cache import BLOCK_TOKENS
from runtime.request import Request, SamplingParams

WARM_UP_ROWS = (1, 2, 4, 8, 16)
FEWEST_TOKENS = 16  # of a step: the least that `max_batched_tokens` may be


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
