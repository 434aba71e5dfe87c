"""What is ready to be swapped in at a step: weight formats and KV pools, prepared beside those in force.

    missing ──make_room (step thread)──▶ build (its own thread) ──▶ capture_ahead (a little between any two steps) ──▶
    ready ──install (between two steps)──▶ in force

A plan may name what is built: where not all was captured, its first steps take longer and are right.

Kept: what the champion, a plan in force or a preparation under way names, and of the rest the KEPT_UNUSED that
were prepared last, of each kind, for a rollback without waiting. They go earlier, oldest first, when a preparation
lacks memory. The loaded weights stay always: every format is made from them.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from runtime.errors import InvalidKnob, PrepareFailed
from runtime.kernels.aside import compiled_aside
from runtime.knobs import EngineConfig, KnobValue
from runtime.kv_cache import BLOCK_TOKENS
from runtime.kv_size import is_out_of_memory
from runtime.paged_model import KVPools, LayerCopier, PagedModel, block_rearranger
from runtime.scheduler import Scheduler
from runtime.weights import WeightSet, formats_from, prepared, wake_preparations, wanted_bytes

log = logging.getLogger(__name__)

KEPT_UNUSED = 2
FREE_SHARE = 0.8  # of free memory that a preparation may take
PAUSE_S = 0.001  # between two layers, so that the steps beside get the core
# On a GPU nothing has a lower priority than steps: a layer is waited for, then so many times as long, but not longer.
GPU_PAUSES, MAX_PAUSE_S = 4.0, 0.04


class PoolKey(NamedTuple):
    """What tells pools apart in memory: their size, in blocks of BLOCK_TOKENS, and what they hold. The blocks in which
    a pool is handed out are the scheduler's affair, so another `kv_block` needs no other tensors."""

    num_blocks: int
    kv_dtype: str

    @classmethod
    def of(cls, config: EngineConfig) -> "PoolKey":
        return cls(config.kv_tokens // BLOCK_TOKENS, config.kv_dtype)

    @property
    def num_slots(self) -> int:
        return self.num_blocks * BLOCK_TOKENS


@dataclass(frozen=True)
class Wanted:
    """What a configuration needs and nobody prepared yet. `steps`: the `kv_dtype` of pools, and tokens of their blocks,
    over which no step was computed yet. `in_turn`: no room for both pools at once."""

    weight_format: str | None
    pool: PoolKey | None
    steps: tuple[str, int] | None = None
    in_turn: bool = False


class WarmStates:
    """Owned by the step thread; `build` alone runs in another, and changes nothing that is in force."""

    def __init__(
        self,
        model: PagedModel,
        block_tokens: int,
        free_bytes: Callable[[], int],
        max_model_len: int,
        max_blocks: int,
    ) -> None:
        """`block_tokens`: of the pool in force. `free_bytes`: memory that can still be taken where the model lies.
        `max_blocks`: of any pool here, in blocks of BLOCK_TOKENS, with what the one in force holds."""
        self._model, self._free_bytes = model, free_bytes
        self._loaded_dtype: torch.dtype = next(model.model.parameters()).dtype
        self.formats = formats_from(self._loaded_dtype)
        self.weight_format = model.weights_key
        self.pool = PoolKey(model.num_slots // BLOCK_TOKENS, model.kv_dtype)
        self.block_tokens, self._max_model_len = block_tokens, max_model_len
        self._served_over = {(self.pool.kv_dtype, block_tokens)}  # also where no step could be captured
        self._bytes_for_steps = int((1.0 - FREE_SHARE) * free_bytes())
        self._max_bytes = max(max_blocks, self.pool.num_blocks) * self._block_bytes(model.kv_dtype)
        self._weights = {self.loaded_format: WeightSet.of_installed(model.model, self.loaded_format)}
        self._pools: dict[PoolKey, KVPools] = {self.pool: model.pools}
        # Of preparations; what the allocator caches is its own.
        self._stream = torch.cuda.Stream(model.device) if model.device.type == "cuda" else None

    @property
    def fixed_knobs(self) -> Mapping[str, KnobValue]:
        return self._model.fixed_knobs

    @property
    def loaded_format(self) -> str:
        return self.formats[0]

    @property
    def max_blocks(self) -> int:
        """Of BLOCK_TOKENS each, of any pool here, whatever it holds."""
        return max(map(self._most_blocks, self._model.kv_dtypes))

    def _most_blocks(self, kv_dtype: str) -> int:
        return self._max_bytes // self._block_bytes(kv_dtype)

    def _block_bytes(self, kv_dtype: str) -> int:
        return BLOCK_TOKENS * self._model.bytes_per_token(kv_dtype)

    # -- what there is -------------------------------------------------------------------------------------

    def check(self, config: EngineConfig) -> None:
        """Raises InvalidKnob where this model or machine can never run the configuration."""
        for name, value in self._model.fixed_knobs.items():
            if (got := config.values()[name]) != value:
                raise InvalidKnob(
                    f"`{name}` must be {value} for this model, which {self._model.why_is_fixed(name)}, but got {got}. "
                    "Leave it out."
                )
        if config.weight_format not in self.formats:
            raise InvalidKnob(
                f"`weight_format` must be one of {', '.join(self.formats)} for weights loaded as "
                f"{self.loaded_format}, but got {config.weight_format!r}."
            )
        size, most = config.block_tokens, self._most_blocks(config.kv_dtype)
        if (
            PoolKey.of(config).num_slots // size * size < self._max_model_len
            or config.kv_tokens // BLOCK_TOKENS > most
        ):
            low, high = -(-self._max_model_len // size) * size, most * BLOCK_TOKENS
            raise InvalidKnob(
                f"`kv_tokens` must be in [{low}, {high}] tokens here, so that the longest request fits into blocks of "
                f"{size} and memory holds it, but got {config.kv_tokens}."
            )

    def in_force(self, config: EngineConfig) -> EngineConfig:
        """The configuration with the weights and the pool that really serve, and what the model leaves no choice."""
        found: dict[str, object] = {
            **self._model.fixed_knobs, "weight_format": self.weight_format, "kv_block": str(self.block_tokens),
            "kv_dtype": self.pool.kv_dtype,
        }  # fmt: skip
        if PoolKey.of(config).num_blocks != self.pool.num_blocks:
            found["kv_tokens"] = self.pool.num_slots
        return config.patched(found)

    def is_ready(self, config: EngineConfig, may_move_in_turn: bool = False) -> bool:
        """Whether nothing is left to prepare. A pool that has no room beside the one in force cannot be swapped to
        and fro, so it counts only where the caller says that moving layer by layer will do."""
        pools = self._pools.get(PoolKey.of(config))
        has_pools = pools is not None and (bool(pools) or may_move_in_turn)
        return config.weight_format in self._weights and has_pools and self._is_awake(config)

    def _is_awake(self, config: EngineConfig) -> bool:
        steps = (config.kv_dtype, config.block_tokens)
        return steps in self._served_over or self._model.is_awake(*steps)

    def has_weights(self, config: EngineConfig) -> bool:
        return config.weight_format in self._weights

    def extra_bytes(self, config: EngineConfig) -> int:
        """What the configuration holds in memory beside the loaded weights and the pool in force."""
        weights, pool = self._weights.get(config.weight_format), PoolKey.of(config)
        num_bytes = 0 if weights is None else weights.nbytes
        if pool != self.pool and self._pools.get(pool):
            num_bytes += self._pool_bytes(pool)
        return num_bytes

    def missing(self, config: EngineConfig) -> Wanted:
        pool, steps = PoolKey.of(config), (config.kv_dtype, config.block_tokens)
        return Wanted(
            config.weight_format if config.weight_format not in self._weights else None,
            pool if not self._pools.get(pool) else None,
            steps if not self._is_awake(config) else None,
        )

    # -- preparing -----------------------------------------------------------------------------------------

    def make_room(self, wanted: Wanted, in_use: Iterable[EngineConfig], may_move_in_turn: bool) -> Wanted:
        """Drops what nobody uses until the wanted fits. Returns how it can be had.

        Raises:
            PrepareFailed: it does not fit.
        """
        used = list(in_use)
        if wanted.weight_format or wanted.pool:
            self.drop_unused(used, KEPT_UNUSED - 1)
        weight_bytes = wanted_bytes(self._model.model, wanted.weight_format) if wanted.weight_format else 0
        pool_bytes = self._pool_bytes(wanted.pool) if wanted.pool else 0
        step_bytes = self._model.waking_bytes(*wanted.steps) if wanted.steps else 0
        needed = weight_bytes + pool_bytes + step_bytes

        def in_room() -> Wanted | None:
            room = self._room_bytes()
            if needed <= room:
                return wanted
            if may_move_in_turn and wanted.pool is not None:
                more = max(0, pool_bytes - self._pool_bytes(self.pool))
                per_layer = pool_bytes // len(self._model.kv_shapes)
                if weight_bytes + more + max(per_layer, step_bytes) <= room:
                    return replace(wanted, in_turn=True)
            return None

        was_dropped = needed > self._room_bytes() and self.drop_unused(used)
        for gives_back in (was_dropped, True):
            if gives_back:  # waits for the step under way, and the next one for this
                self._give_back()
            if (found := in_room()) is not None:
                return found
        room = self._room_bytes()
        raise PrepareFailed(
            f"The configuration needs {needed} bytes more ({weight_bytes} of weights, {pool_bytes} of KV pool, "
            f"{step_bytes} to try its steps), but {room} may be taken ({FREE_SHARE:.0%} of what is free). Free memory "
            "or ask for less."
        )

    def build(self, wanted: Wanted, beside_steps: bool = True) -> tuple[WeightSet | None, KVPools | None]:
        """Makes what is wanted, in the calling thread. `beside_steps`: pausing, so that they get the core and the
        device.

        Raises:
            PrepareFailed: memory ran out, or the format cannot be made.
        """
        is_aside = beside_steps and wanted.steps is not None
        try:
            if self._stream is None:
                return self._build(wanted, beside_steps)
            with torch.cuda.stream(self._stream), compiled_aside() if is_aside else contextlib.nullcontext():
                made = self._build(wanted, beside_steps)
            self._stream.synchronize()
            return made
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError among them
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise PrepareFailed(f"The configuration could not be prepared: {reason}") from error

    def wake(self) -> None:
        """Before anybody is served: what preparations and moves launch is launched for little, so that the first of
        them holds up steps for less."""
        if self._stream is None:
            return
        thread = threading.Thread(target=self._wake, name="prepare")
        thread.start()
        thread.join()

    def _wake(self) -> None:
        try:
            with torch.cuda.stream(self._stream):
                wake_preparations(self._model.model, self.formats[1:], self._model.kernels)
                self._model.wake_moves()
        except RuntimeError as error:
            log.info("preparations are not tried beforehand: %s", str(error).partition("\n")[0])

    def _build(self, wanted: Wanted, beside_steps: bool) -> tuple[WeightSet | None, KVPools | None]:
        weights = pools = None
        if wanted.weight_format is not None:
            pause = _pause_on(self._model.device) if beside_steps else lambda: None
            weights = prepared(self._model.model, wanted.weight_format, pause, self._model.kernels)
            weights.wake(self._model.captured_rows)
        if wanted.pool is not None and not wanted.in_turn:
            pools = self._model.new_pools(wanted.pool.num_blocks, kv_dtype=wanted.pool.kv_dtype)
        if wanted.steps is not None:
            self._model.wake(*wanted.steps)
        return weights, pools

    def add(self, wanted: Wanted, weights: WeightSet | None, pools: KVPools | None) -> None:
        """Takes in what `build` made."""
        if weights is not None:
            self._weights[weights.format] = weights
        if wanted.pool is not None:
            self._pools[wanted.pool] = {} if pools is None else pools

    def capture_ahead(self, config: EngineConfig) -> bool:
        """Between two steps: captures a little of what they will replay under a configuration that was built, or its
        first steps would take longer. False where nothing of it is left, or where it would take the memory that
        preparations leave to steps."""
        pools = self._pools.get(PoolKey.of(config))
        if not pools or self._free_bytes() < self._bytes_for_steps:
            return False
        with self.weights_of(config):
            return self._model.capture_ahead(
                pools, config.kv_dtype, config.block_tokens, config.weight_format, config.linear_backend
            )

    def drop_unused(self, used: Iterable[EngineConfig], num_kept: int = 0) -> bool:
        """But for what is in force or in `used`, and of the rest the `num_kept` last of each kind. False where there is
        nothing else."""
        used = list(used)
        formats = {config.weight_format for config in used} | {self.loaded_format, self.weight_format}
        pools = {PoolKey.of(config) for config in used} | {self.pool}
        spare_formats = [name for name in self._weights if name not in formats]
        spare_pools = [key for key in self._pools if key not in pools]
        spare_formats = spare_formats[: max(0, len(spare_formats) - num_kept)]
        spare_pools = spare_pools[: max(0, len(spare_pools) - num_kept)]
        if self._model.device.type == "cuda" and (spare_formats or spare_pools):
            torch.cuda.synchronize(self._model.device)
        for name in spare_formats:
            self._model.forget(weights_key=name)
            del self._weights[name]
        for key in spare_pools:
            self._model.forget(self._pools.pop(key))
        return bool(spare_formats or spare_pools)

    def _give_back(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        self._model.give_back()

    def _room_bytes(self) -> int:
        return int(FREE_SHARE * self._free_bytes())

    def _pool_bytes(self, pool: PoolKey) -> int:
        return pool.num_blocks * self._block_bytes(pool.kv_dtype)

    # -- swapping ------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def install(self, config: EngineConfig, scheduler: Scheduler) -> bool:
        """Puts a ready configuration's weights and pool in force, between two steps; the first may still be under way
        on the device. False if they are already."""
        wanted, size = PoolKey.of(config), config.block_tokens
        is_other_pool = wanted != self.pool or size != self.block_tokens
        if config.weight_format == self.weight_format and not is_other_pool:
            return False
        if config.weight_format != self.weight_format:
            self._weights[config.weight_format].install()
            self.weight_format = self._model.weights_key = config.weight_format
        if is_other_pool:
            self._move(wanted, size, scheduler)
        scheduler.use_namespace(self.namespace)
        return True

    @property
    def namespace(self) -> str:
        """Names what computes now: what other weights made, or was rounded otherwise, is no cached prefix of ours."""
        return f"{self.weight_format} {self.pool.kv_dtype}"

    def _move(self, wanted: PoolKey, block_tokens: int, scheduler: Scheduler) -> None:
        stays, rounds = wanted == self.pool, wanted.kv_dtype != self.pool.kv_dtype
        pool = scheduler.pool.resized(wanted.num_slots, block_tokens)
        move = scheduler.move_to(pool, stays, keeps_prefixes=not rounds)
        if stays:
            if len(move.move.sources):
                copy = block_rearranger(move.move, move.block_tokens, self._model.device)
                for layer_pool in self._model.pools.values():
                    copy(layer_pool, layer_pool)
        else:
            self._move_tensors(wanted, self._model.copier(move, rounds))
        self.pool, self.block_tokens = wanted, block_tokens
        self._served_over.add((wanted.kv_dtype, block_tokens))

    def _move_tensors(self, wanted: PoolKey, copy: LayerCopier) -> None:
        model = self._model
        before, after = model.pools, self._pools[wanted]
        if after:
            for layer, pool in before.items():
                copy(layer, pool, after[layer])
        else:  # no room for both: each layer's old pool goes before the next layer's new one comes
            model.forget(self._pools.pop(self.pool))
            for layer, shape in model.shapes_of(wanted.kv_dtype).items():
                try:
                    after[layer] = model.new_pool(shape, wanted.num_slots)
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    self._give_back()  # graphs of the old pool are still there
                    after[layer] = model.new_pool(shape, wanted.num_slots)
                copy(layer, before[layer], after[layer])
                for part in before.pop(layer):
                    if (
                        part.is_cuda
                    ):  # it may be memory of the stream of preparations, which would give it out at once
                        part.record_stream(torch.cuda.current_stream(part.device))
                del part  # or it would stay until the next layer's is there
        model.pools, model.kv_dtype = after, wanted.kv_dtype

    @contextlib.contextmanager
    def weights_of(self, config: EngineConfig) -> Iterator[None]:
        """Computes with the weights of a ready configuration, then goes back to those in force. Step thread only.

        Raises:
            InvalidKnob: they are not prepared.
        """
        weights = self._weights.get(config.weight_format)
        if weights is None:
            raise InvalidKnob(f"`weight_format` {config.weight_format} is not prepared; call prepare first.")
        if weights.format == self.weight_format:
            yield
            return
        weights.install()
        try:
            yield
        finally:
            self._weights[self.weight_format].install()


def _pause_on(device: torch.device) -> Callable[[], None]:
    """What to call after each layer."""
    if device.type != "cuda":
        return lambda: time.sleep(PAUSE_S)
    began = time.perf_counter()

    def pause() -> None:
        nonlocal began
        torch.cuda.current_stream(device).synchronize()
        time.sleep(min(MAX_PAUSE_S, GPU_PAUSES * (time.perf_counter() - began)))
        began = time.perf_counter()

    return pause
