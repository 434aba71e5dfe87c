"""How attention is shared out among programs."""

import math

import numpy as np
from numpy.typing import NDArray

MAX_SPLITS = 64
QUERY_TILE = 64  # new tokens of one program, where there are several
LONG_CONTEXT = 4096  # tokens of a tile below which its parts would take longer to merge than they save
PROGRAMS_AN_SM = 2  # of attention over pieces, at once
GOOD_SHARE = 0.85  # of the device that is busy on average
MAX_TILE_SPLITS = 8

IntArray = NDArray[np.int64]


def choose_splits(num_rows: int, kv_heads: int, num_sms: int) -> int:
    """A power of two in [1, 64] with which no SM waits for another program's end: about one program each. More were
    slower everywhere on an H200, as the parts must be merged: 32 rows of 8 heads at 256 tokens took 15 us in 1 and 23
    in 2, a single one 8 in 4 and 10 in 33. Depends on shapes alone, so that a CUDA graph may keep it.

    `kv_heads`: key heads; of a latent cache 1 for every 64 heads that share it.
    """
    wanted = max(1, num_sms // max(1, num_rows * kv_heads))
    return min(MAX_SPLITS, 1 << (wanted.bit_length() - 1))


def tiles_of(new_tokens: IntArray, contexts: IntArray) -> NDArray[np.int32]:
    """Tiles of QUERY_TILE new tokens, for attention over pieces of prompts: [tiles, 2], the piece of each and its place
    among the piece's. What sees most comes first, so that nothing long is begun last.

    new_tokens, contexts: [pieces], the latter with the new ones.
    """
    counts = -(-new_tokens // QUERY_TILE)
    piece = np.repeat(np.arange(len(counts)), counts)
    tile = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    seen = contexts[piece] - np.maximum(new_tokens[piece] - (tile + 1) * QUERY_TILE, 0)
    return np.stack((piece, tile), 1)[np.argsort(-seen, kind="stable")].astype(np.int32)


def choose_tile_splits(num_tiles: int, num_heads: int, longest: int, num_sms: int) -> int:
    """Among how many programs what a tile of new tokens sees is shared out: a power of two in [1, 8]. A device computes
    as many tiles at once as it has room for, and the last of them are waited for by all SMs; 9 tiles of 32 heads would
    keep 132 SMs busy for 55 % of the time, in four parts each for 87 %.

    `longest`: tokens of the longest context.
    """
    if longest < LONG_CONTEXT:
        return 1
    best, best_share, num = 1, 0.0, 1
    while num <= MAX_TILE_SPLITS and best_share < GOOD_SHARE:
        turns = num * num_tiles * num_heads / (PROGRAMS_AN_SM * num_sms)
        share = turns / math.ceil(turns)
        if share > best_share:
            best, best_share = num, share
        num *= 2
    return best
