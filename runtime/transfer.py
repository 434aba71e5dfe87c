"""Small arrays on their way to the device."""

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def sent(values: NDArray[Any], device: torch.device) -> Tensor:
    """A copy on the device, for which nobody waits: from pageable memory it would wait for all that the device has yet
    to do, and the host with it."""
    found = torch.from_numpy(values)
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found.to(device)
