"""How fast the device multiplies with this model's weights, timed once at loading, and the step that is short enough.

    rate of one large layer ──▶ tokens whose products with all weights take STEP_S ──▶ default of `mixed_step_tokens`

Products take most of a step that computes prompts, and their rate is what differs from device to device.
Those of routed experts have fewer rows each, so that a step of theirs takes longer than it says here.
"""

import logging
import time
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from runtime.kv_size import is_out_of_memory
from runtime.step_budget import TILE_ROWS

log = logging.getLogger(__name__)

# Of a step that prompts share with decode rows: what lies between two tokens of those who are read as they come.
STEP_S = 0.039
FEWEST_STEP_TOKENS = 256  # or the products of a prompt would have too few rows, and first tokens come late
TIMED_ROWS = 2048  # about what a step has, and enough that products reach their rate
WARM_UP_S = 0.1  # in which the library chooses its kernels and the clock rises and settles
NUM_TIMED = 9


def measured_step_tokens(model: nn.Module, num_active: int, vocab_size: int) -> int | None:
    """Tokens of a step that takes STEP_S, by the largest linear layer beside the head; None where there is none, or no
    memory for its product. `num_active`: weights that multiply one token."""
    layer = largest_linear(model, vocab_size)
    if layer is None:
        return None
    try:
        rate = flop_per_s(layer.weight)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        log.warning("there is no memory to time a product, so `mixed_step_tokens` stays off: %s", error)
        return None
    tokens = step_tokens(rate, num_active)
    log.info(
        "products of %d rows reach %.3g FLOP/s: a step of %.0f ms computes %d tokens", TIMED_ROWS, rate,
        1e3 * STEP_S, tokens,
    )  # fmt: skip
    return tokens


def step_tokens(flop_per_s: float, num_active: int) -> int:
    """Tokens whose products with so many weights take STEP_S, in whole tiles."""
    tokens = int(STEP_S * flop_per_s / (2 * num_active))
    return max(FEWEST_STEP_TOKENS, tokens // TILE_ROWS * TILE_ROWS)


def largest_linear(model: nn.Module, vocab_size: int) -> nn.Linear | None:
    """But for the head, whose product with so many rows would take gigabytes."""
    layers = [
        module
        for module in model.modules()
        if type(module) is nn.Linear and module.out_features != vocab_size
    ]
    return max(layers, key=lambda layer: layer.weight.numel(), default=None)


@torch.inference_mode()
def flop_per_s(weight: Tensor, num_rows: int = TIMED_ROWS) -> float:
    """The median of several products of random rows with `weight` [out, in]: what the data are changes the clock."""
    x = torch.randn(num_rows, weight.shape[1], device=weight.device, dtype=weight.dtype)
    until = time.perf_counter() + WARM_UP_S
    _product_s(x, weight)
    while time.perf_counter() < until:
        _product_s(x, weight)
    seconds = median(_product_s(x, weight) for _ in range(NUM_TIMED))
    del x
    if weight.device.type == "cuda":
        torch.cuda.empty_cache()  # whoever sizes the KV pool next counts what is free
    return 2 * num_rows * weight.numel() / seconds


def _product_s(x: Tensor, weight: Tensor) -> float:
    if x.device.type != "cuda":
        started = time.perf_counter()
        linear(x, weight)
        return time.perf_counter() - started
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device(x.device):
        began.record()
        linear(x, weight)
        ended.record()
    ended.synchronize()
    return 1e-3 * began.elapsed_time(ended)
