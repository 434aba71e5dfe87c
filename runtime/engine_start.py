"""What an engine is made of, and how it comes to be: libraries, the model, the first configuration.

environment ▶ torch ▶ load ▶ the model on its device ▶ engine_parts ▶ executor, runner, reports of the knobs
"""

import argparse
import gc
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.bytecode import keep_compiled
from runtime.errors import InvalidKnob, PrepareFailed
from runtime.host import num_cores
from runtime.knobs import EngineConfig, default_config, knob_reports
from runtime.kv_cache import BLOCK_TOKENS
from runtime.plan import PlanRunner
from runtime.weight_files import WeightsDigest

if TYPE_CHECKING:
    from runtime.executor import Executor
    from runtime.loader import LoadedModel

log = logging.getLogger(__name__)

# Set before torch is loaded: idle OpenMP threads must sleep, not spin on the cores of the front end.
THREAD_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "GOMP_SPINCOUNT": "0"}
# Also before torch: of each product that oneDNN compiled, it and PyTorch's binding keep half a megabyte. 1024 each by
# default, which is more than half a gigabyte once steps of that many sizes were seen.
CACHED_PRODUCTS = 256
CACHE_ENVIRONMENT = {
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(CACHED_PRODUCTS),
    "LRU_CACHE_CAPACITY": str(CACHED_PRODUCTS),
}


def load(
    options: argparse.Namespace, stage_ended: Callable[[str], None] = lambda name: None
) -> "LoadedModel":
    """The model on its device. `stage_ended` is called when all libraries are there."""
    set_environment()
    if (folder := keep_compiled("torch")) is not None:
        log.info("torch came without compiled Python modules: they are kept in %s", folder)
    gc.disable()  # or a quarter of the imports is walking over what they have made so far
    digest = WeightsDigest.begin(Path(options.model))  # in threads that work while torch is loaded
    import torch

    from runtime.head_start import begin

    reading = begin(Path(options.model), options.device, digest)
    from runtime.executor import Executor  # noqa: F401 - needed next, and counted as a library
    from runtime.loader import load_model, resolve_device, resolve_dtype

    gc.freeze()  # so that no later collection walks over the libraries
    gc.enable()
    stage_ended("imports")
    torch.set_num_interop_threads(1)
    device = resolve_device(options.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(
            device
        )  # Triton launches on the thread's current one, whatever its tensors lie on
    dtype = resolve_dtype(options.dtype, device)
    return load_model(options.model, device, dtype, options.max_model_len, reading, may_be_bare=True)


def set_environment() -> None:
    """To be called before torch is loaded."""
    for name, value in (THREAD_ENVIRONMENT | CACHE_ENVIRONMENT).items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def engine_parts(
    loaded: "LoadedModel", kv_tokens: int | None, asked: dict[str, Any], version: int = 0
) -> "tuple[Executor, PlanRunner, list[dict[str, Any]]]":
    """What an engine with this model is made of, and the reports of its knobs. The first configuration is our default,
    then what is asked for, as far as this machine can do it.

    Raises:
        ModelError, InvalidKnob.
    """
    from runtime.executor import Executor

    cores = num_cores()
    config = default_config("cuda" if loaded.model.device.type == "cuda" else "cpu", cores).patched(asked)
    executor = Executor(loaded, kv_tokens, config, asked.get("kv_tokens"))
    if executor.fitted_mixed_step_tokens is not None:
        config = config.patched({"mixed_step_tokens": executor.fitted_mixed_step_tokens, **asked})
    config = with_weights(executor, config, asked.get("weight_format"))
    warm = executor.warm
    # Of the fitted pool: engines that start later, on what `kv_tokens` is by then, must tell the same limit.
    fitted_blocks = executor.fitted_kv_tokens // BLOCK_TOKENS
    reports = knob_reports(
        cores, min(1024, fitted_blocks), executor.identity()["fitted_knobs"],
        warm.max_blocks * BLOCK_TOKENS, warm.formats, warm.fixed_knobs, executor.max_model_len,
        executor.max_batched_tokens,
    )  # fmt: skip
    limits = {
        report["name"]: report["high"]
        for report in reports
        if report["kind"] != "choice"
        and not report["is_off_at_high"]
        and report["name"] not in warm.fixed_knobs
    }
    if too_high := {name: int(high) for name, high in limits.items() if config.values()[name] > high}:
        log.warning("lowered to what this machine can do: %s", too_high)
        config = config.patched(too_high)

    def fits(config: EngineConfig) -> None:
        for name, high in limits.items():
            if (value := config.values()[name]) > high:
                raise InvalidKnob(f"`{name}` must be at most {high:g} on this machine, but got {value!r}.")
        warm.check(config)

    return executor, PlanRunner(config, version, fits), reports


def with_weights(executor: "Executor", config: EngineConfig, asked: str | None) -> EngineConfig:
    """The first configuration as it will be in force: with the pool that was fitted, and with the weights asked
    for where they can be had, else as loaded."""
    warm = executor.warm
    config = warm.in_force(config.patched({"weight_format": warm.loaded_format}))
    if asked is None or asked == warm.loaded_format:
        return config
    wished = config.patched({"weight_format": asked})
    try:
        warm.check(wished)
        wanted = warm.make_room(warm.missing(wished), [config], may_move_in_turn=False)
        warm.add(wanted, *warm.build(wanted, beside_steps=False))
    except (InvalidKnob, PrepareFailed) as error:
        log.warning("the weights stay as loaded: %s", error)
        return config
    return wished
