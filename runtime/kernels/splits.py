"""Among how many programs the context of a row is shared out in decode attention."""

MAX_SPLITS = 64


def choose_splits(num_rows: int, kv_heads: int, num_sms: int) -> int:
    """A power of two in [1, 64] with which no SM waits for another program's end: about one program each. More were
    slower everywhere on an H200, as the parts must be merged: 32 rows of 8 heads at 256 tokens took 15 us in 1 and 23
    in 2, a single one 8 in 4 and 10 in 33. Depends on shapes alone, so that a CUDA graph may keep it.

    `kv_heads`: key heads; of a latent cache 1 for every 64 heads that share it.
    """
    wanted = max(1, num_sms // max(1, num_rows * kv_heads))
    return min(MAX_SPLITS, 1 << (wanted.bit_length() - 1))
