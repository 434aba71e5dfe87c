"""Among how many programs the context of a row is shared out in decode attention."""

MAX_SPLITS = 64
PROGRAMS_PER_SM = 2  # so many at least keep an SM's loads under way while some wait


def choose_splits(num_rows: int, kv_heads: int, num_sms: int) -> int:
    """So many that all SMs have work, in [1, 64]. Depends on shapes alone, so that a CUDA graph may keep it.

    `kv_heads`: key heads; of a latent cache 1 for every 64 heads that share it.
    """
    wanted = -(-PROGRAMS_PER_SM * num_sms // max(1, num_rows * kv_heads))
    return min(MAX_SPLITS, max(1, wanted))
