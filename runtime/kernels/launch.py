"""How kernels are launched: early where the device can, and before anyone waits for them where they must be compiled.

From compute capability 9 on a kernel starts while the one before it ends (programmatic dependent launch). It lets its
successor start as soon as all of its own programs have, and waits for its predecessor before it touches anything but
weights and what a step is given: tables, contexts, positions. Every such kernel waits, so whoever waits for the last
one waits for all before it; a kernel launched in the common way waits by itself.
"""

import contextlib
import functools
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch

from runtime.host import num_cores

MIN_CAPABILITY = (9, 0)
MAX_THREADS = 16
FEW_ROWS = 64  # of x, in products: every GPU has room for a tile of so many
NUM_SMS = 132
LARGE_TILE_BYTES = 200_000  # what those of more take

log = logging.getLogger(__name__)
_ahead: ContextVar[list[Any] | None] = ContextVar("kernels that are compiled and not run", default=None)


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *given: Any, **constants: Any) -> None:
    """Launches a kernel that takes PDL as a constant: whether it is started early."""
    if has_early_start(device):
        constants |= {"PDL": True, "launch_pdl": True}
    else:
        constants["PDL"] = False
    if (ahead := _ahead.get()) is not None:
        ahead.append(kernel.warmup(*given, grid=grid, **constants))
    else:
        kernel[grid](*given, **constants)


@functools.cache
def has_early_start(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


@functools.cache
def num_sms_of(device: torch.device) -> int:
    """Those of an H100 where there is no GPU."""
    if device.type != "cuda":
        return NUM_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def has_large_tiles(device: torch.device) -> bool:
    """Whether a program may share as much memory as tiles of more than FEW_ROWS take: 232 kB on data centre GPUs since
    Hopper, 101 kB on others."""
    if device.type != "cuda":
        return True
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= LARGE_TILE_BYTES


@contextlib.contextmanager
def compiled_ahead() -> Iterator[None]:
    """Within it kernels that are launched are compiled, several at once, and not run: what they would have written is
    left as it was. On leaving they are there, and loaded on the current device. One that cannot be says so when it is
    run."""
    try:
        from triton.runtime._async_compile import AsyncCompileMode
    except ImportError:  # kernels are then compiled when they are run, one after the other
        yield
        return
    promised: list[Any] = []
    token = _ahead.set(promised)
    try:
        with ThreadPoolExecutor(min(MAX_THREADS, num_cores())) as threads:
            with AsyncCompileMode(threads, ignore_errors=True):
                yield
            # Before Triton 3.7 that is a run of a C compiler for each kind of arguments.
            list(
                threads.map(
                    partial(_load, torch.cuda.current_device()), {id(one): one for one in promised}.values()
                )
            )
    except Exception:
        log.info("a kernel could not be compiled ahead", exc_info=True)
    finally:
        _ahead.reset(token)


def _load(device: int, promised: Any) -> None:
    try:
        compiled = promised.result() if hasattr(promised, "result") else promised
        with torch.cuda.device(device):
            _ = compiled.run
    except Exception:
        log.info("a kernel could not be loaded ahead", exc_info=True)
