"""Kernels of our own decoder on a GPU, and for each a twin in plain torch.

    plain.py, plain_experts.py      what each of them computes: the contract
    paged_decode.py, paged_prefill.py, rope_and_cache.py, add_norm.py, silu_mul.py, skinny_linear.py  the same in Triton
    move_rows.py, e4m3.py    between a cache of whole values and one of 8 bits, and how those are rounded
    int8_rows.py             what lies before and behind a product of integers
    latent_rope.py, latent_few.py, route.py, lay_out.py, expert_linear.py, weigh.py    of latents, and of experts
    embed.py, greedy.py, sample.py    the first of a step, and the last: the likeliest tokens, or drawn ones
    expert_trials.py    what those are tried on
    splits.py           how attention is shared out among programs
    launch.py           how kernels are started, and compiled before anyone waits for them
    table.py            both as tables of functions, and the check of one against the other
    linear_table.py     which linear layers are faster here than in cuBLAS, measured on the device

Without Triton the plain functions are all there is.
"""

from runtime.kernels.table import PLAIN, TRITON, WHY_NO_TRITON, Kernels, Shape, checked, self_check

__all__ = ["PLAIN", "TRITON", "WHY_NO_TRITON", "Kernels", "Shape", "checked", "self_check"]
