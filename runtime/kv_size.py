"""How large the KV pool is. On a GPU it comes last, and takes what all else leaves.

    weights ──▶ the largest step ──▶ a captured step ──▶ the rest, less the reserve ──▶ pool ──▶ all graphs

What stays in reserve is for a second pool or other weights beside those in force, and for steps that gather more than
the largest one that was tried. Everything is measured by the driver and by torch's allocator; nothing is estimated from
the model's shape.
"""

from typing import NamedTuple

import torch

from runtime.errors import ModelError

CUDA_RESERVE = 0.2  # of what weights, steps and graphs leave free
CUDA_LEAST_RESERVE = 0.05  # when a size is asked for
CPU_KV_SHARE = 0.25  # of free memory, by default
CPU_KV_LIMIT = 0.8  # of free memory, when asked for more
FEWEST_BLOCKS = 2
SHRINK = 0.95  # of the pool's size, from one try to the next


class Room(NamedTuple):
    """Bytes that the pool may take: by default, and where a size is asked for."""

    default_bytes: int
    limit_bytes: int

    @classmethod
    def on_cpu(cls, free_bytes: int) -> "Room":
        return cls(int(CPU_KV_SHARE * free_bytes), int(CPU_KV_LIMIT * free_bytes))

    @classmethod
    def on_cuda(cls, left_bytes: int) -> "Room":
        """`left_bytes`: what is free beside the weights once the largest step and the graphs have theirs."""
        left_bytes = max(0, left_bytes)
        return cls(int((1 - CUDA_RESERVE) * left_bytes), int((1 - CUDA_LEAST_RESERVE) * left_bytes))

    def blocks(
        self, asked_tokens: int | None, most_tokens: int, block_tokens: int, bytes_per_token: int
    ) -> int:
        """Whole blocks of what is asked for, as far as it fits; of the default, up to `most_tokens`, if nothing is.

        Raises:
            ModelError: not even two blocks fit.
        """
        limit = self.limit_bytes // bytes_per_token
        wished = min(self.default_bytes // bytes_per_token, most_tokens)
        if asked_tokens is not None:
            wished = min(asked_tokens, limit)
        num_blocks = wished // block_tokens
        if num_blocks < FEWEST_BLOCKS:
            raise ModelError(
                f"The KV pool must hold at least {FEWEST_BLOCKS * block_tokens} tokens, but got {wished} "
                f"({bytes_per_token} bytes a token, {self.limit_bytes} bytes free for it). Raise --kv-tokens or free "
                "memory."
            )
        return num_blocks


class StepMeter:
    """What runs inside takes so much of the device's memory at its peak, by torch's allocator: `peak_bytes`. 0 on a
    CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._before, self.peak_bytes = device, 0, 0

    def __enter__(self) -> "StepMeter":
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)  # an earlier executor's peak is not ours
            self._before = torch.cuda.memory_reserved(self._device)
        return self

    def __exit__(self, *_: object) -> None:
        # Reserved, not allocated: what lies unused between two tensors is gone for a pool all the same.
        if self._device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_reserved(self._device) - self._before


def driver_free_bytes(device: torch.device) -> int:
    """What the driver has left, when torch's allocator has given back all it can. Memory of graphs is not among it,
    though the allocator counts it as unused."""
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])


def is_out_of_memory(error: BaseException) -> bool:
    """torch.OutOfMemoryError or an error of the driver on CUDA, a plain RuntimeError on a CPU."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return any(
        words in str(error).lower() for words in ("out of memory", "not enough memory", "allocate memory")
    )
