"""Kernels that start while the one before them ends (programmatic dependent launch, from compute capability 9 on).

A kernel that is launched so lets its successor start as soon as all of its own programs have, and waits for its
predecessor before it touches anything but weights. Every such kernel waits, so whoever waits for the last one waits for
all before it; a kernel launched in the common way waits by itself.
"""

import functools
from typing import Any

import torch
from torch import Tensor

MIN_CAPABILITY = (9, 0)


def early_start(like: Tensor) -> dict[str, Any]:
    """Options of a launch on the device of `like`, for a kernel that takes PDL as a constant."""
    return {"PDL": True, "launch_pdl": True} if has_early_start(like.device) else {"PDL": False}


@functools.cache
def has_early_start(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= MIN_CAPABILITY
