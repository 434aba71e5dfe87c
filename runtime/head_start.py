"""What a start begins as soon as torch is there, beside the rest: weights and the device.

    ┬─ torch ─┬─ (transformers, for models that need it) ── model ── engine ── first token
    │         ├─ weights ▶ device
    │         └─ context, cuBLAS, kernels compiled and checked        (on a GPU)
    └─ digest of the weights

Whatever is missing or fails here is done, or told, by those who need it later.
"""

import contextlib
import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from runtime.errors import ModelError
from runtime.kv_cache import BLOCK_TOKENS
from runtime.weight_files import WeightsDigest
from runtime.weight_stream import Reading, is_straight_type, raw_config

if TYPE_CHECKING:  # Triton is loaded on a GPU only, when the weights are on their way
    from runtime.kernels import Kernels, Shape

log = logging.getLogger(__name__)


def begin(folder: Path, device_name: str, digest: WeightsDigest | None = None) -> Reading | None:
    """`digest`: of the weights, where it has begun. None where the folder is at fault, which loading it will say."""
    device = torch.device("cpu")
    with contextlib.suppress(RuntimeError):  # no such device
        if torch.cuda.is_available():
            asked = torch.device("cuda" if device_name == "auto" else device_name)
            device = torch.device(asked.type, asked.index or 0)  # as tensors say it
    try:
        reading = Reading.begin(folder, device, digest)
    except ModelError:
        return None
    if device.type == "cuda":
        from runtime.kernels import (
            TRITON,
        )  # here, since two threads that import one library may meet in a circle

        waking = threading.Thread(target=_wake, args=(folder, device, TRITON), name="wake", daemon=True)
        waking.start()
    return reading


def _wake(folder: Path, device: torch.device, kernels: "Kernels | None") -> None:
    from runtime.kernels import checked

    try:
        some = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
        some @ some  # makes the context and loads cuBLAS
        config = raw_config(folder)
        if kernels is not None and is_straight_type(config) and (shape := shape_of(config)) is not None:
            checked(kernels, device, torch.bfloat16, shape)
    except Exception:  # of a driver or a compiler: anything, and it will come again where it is needed
        log.info("the device could not be woken beside the imports", exc_info=True)


def shape_of(config: Mapping[str, Any]) -> "Shape | None":
    """What the kernels will see of a dense model, as `runtime.fused_pass` finds it; None where a layer has a window."""
    from runtime.kernels import Shape

    if config.get("sliding_window") is not None and config.get("use_sliding_window", True):
        return None
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    return Shape(
        heads, config.get("num_key_value_heads") or heads, config.get("head_dim") or hidden // heads, hidden,
        config["intermediate_size"], BLOCK_TOKENS, None, config["model_type"] == "qwen3",
    )  # fmt: skip
