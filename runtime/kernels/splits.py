"""How attention is shared out among programs."""

import math

import numpy as np
from numpy.typing import NDArray

MAX_SPLITS = 64
FEW_SPLITS = 8
FEW_ROWS = 64
QUERY_TILE = 64  # new tokens of one program, where there are several
LONG_CONTEXT = 4096  # tokens of a tile below which its parts would take longer to merge than they save
PROGRAMS_AN_SM = 2  # of attention, at once
UNEVEN_FROM = 1024  # tokens of a context that may be shared out among more programs than others have
IDLE_TOKENS = 64  # that a program reads in the time of one that has nothing to read: an estimate, not measured yet
GOOD_SHARE = 0.85  # of the device that is busy on average
MAX_TILE_SPLITS = 8

IntArray = NDArray[np.int64]


def choose_splits(num_rows: int, kv_heads: int, num_sms: int) -> int:
    """A power of two in [1, 64] with which no SM is idle while rows are few: about one program each, and two where that
    takes few parts, as one alone does not keep an SM's memory busy. More were slower, as the parts must be merged. On
    an H200, 8 KV heads of 128, us in half as many parts and in those chosen: 4 rows of 2,000 tokens 14.5 and 13.3, 8 of
    300 8.7 and 8.3, 8 ragged ones of 1,099 20.6 and 16.4, 16 of 300 11.0 and 10.0, of 8,000 132 and 124; latents of 32
    rows of 2,048 48 and 35. In twice as many: 2 rows of 2,000 10.5 and 10.7, 32 of 2,000 65.0 and 68.4, one of 8,000
    14.7 and 14.6. Depends on shapes alone, so that a CUDA graph may keep it. Of heads of their own, every choice is
    that of some batch of few rows, for which kernels are compiled.

    `kv_heads`: key heads; of a latent cache 1 for every 64 heads that share it.
    """
    if num_rows > FEW_ROWS:
        return 1
    num_apart = max(1, num_rows * kv_heads)
    of_two = _power_of_two(PROGRAMS_AN_SM * num_sms // num_apart)
    return min(MAX_SPLITS, of_two if of_two <= FEW_SPLITS else _power_of_two(num_sms // num_apart))


def uneven_splits(num_rows: int, kv_heads: int, num_sms: int) -> int:
    """The same where contexts are uneven: as many as few rows have, so that it is compiled for these."""
    chosen = choose_splits(num_rows, kv_heads, num_sms)
    return max(chosen, min(FEW_SPLITS, choose_splits(1, kv_heads, num_sms)))


def are_uneven(contexts: IntArray, num_rows: int, kv_heads: int, num_sms: int) -> bool:
    """Whether one context is so much longer than the others that the device waits for its programs alone, and more
    splits are faster although most of them find nothing to read. On an H200 one of 32,768 tokens beside 64 of a few
    hundred made a step of llama-8b 32 ms, of which all but 7 waited for it.

    contexts: of each row; `num_rows`: with padding.
    """
    longest = int(contexts.max())
    if longest < UNEVEN_FROM:
        return False
    few, more = choose_splits(num_rows, kv_heads, num_sms), uneven_splits(num_rows, kv_heads, num_sms)
    num_places = PROGRAMS_AN_SM * num_sms
    shared = int(contexts.sum()) * kv_heads / num_places  # tokens of each program, were all as long
    idle = more * num_rows * kv_heads * IDLE_TOKENS / num_places
    return max(longest / more, shared) + idle < GOOD_SHARE * max(longest / few, shared)


def _power_of_two(wanted: int) -> int:
    """The largest that is not larger, 1 at least."""
    return 1 << (max(1, wanted).bit_length() - 1)


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
