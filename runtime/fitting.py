"""The first steps of an engine, and the KV pool that is fitted to what they leave: last, and never too large to start.

    warm-up, the largest step ──▶ a captured step ──▶ room ──▶ pool ──▶ all graphs ──▶ room for the largest step?
                                                                ▲──────── smaller ───────────┘ no

Whatever fails for want of memory on this way is tried again smaller, with a warning.
"""

import logging
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any, NamedTuple

import torch

from runtime.batch import Batch, PackedBatch
from runtime.host import free_memory_bytes
from runtime.knobs import EngineConfig
from runtime.kv_cache import BLOCK_TOKENS, BlockPool
from runtime.kv_size import FEWEST_BLOCKS, SHRINK, Room, StepMeter, driver_free_bytes, is_out_of_memory
from runtime.paged_model import PagedModel
from runtime.request import Request
from runtime.scheduler import Scheduler
from runtime.warm_up import FEWEST_TOKENS, WARM_UP_ROWS, largest_blocks, largest_requests, warm_up_requests

log = logging.getLogger(__name__)

CPU_KV_SEQUENCES = 64
CUDA_KV_SEQUENCES = 1024


class Fitted(NamedTuple):
    """`kv_tokens`: of the pool by default. `possible_tokens`: what the bytes allow at the default reserve.
    `max_blocks`: of any pool here, of BLOCK_TOKENS each. `max_batched_tokens`: where memory bounds it."""

    pool: BlockPool
    kv_tokens: int
    possible_tokens: int
    max_blocks: int
    max_batched_tokens: int | None


class Fitting:
    """A model without a pool. `execute` computes a step and returns what has `tokens`, one for each sampled row."""

    def __init__(
        self,
        model: PagedModel,
        max_model_len: int,
        execute: Callable[[Batch, PackedBatch, EngineConfig], Any],
    ) -> None:
        self._model, self._max_model_len, self._execute = model, max_model_len, execute
        self._device = model.device
        self._step_bytes = 0  # of the largest step, at its peak
        self.max_batched_tokens: int | None = None

    def fit(self, config: EngineConfig, kv_tokens: int | None, asked_kv_tokens: int | None = None) -> Fitted:
        """Leaves the model with a pool in force and its steps captured.

        Args:
            kv_tokens: the size by default; by free memory if not given.
            asked_kv_tokens: the size to start with, where the knob was named.

        Raises:
            ModelError: there is no memory for two blocks.
        """
        self._step_bytes = self._warm_up(config)
        if self.max_batched_tokens is not None:
            self._model.most_mixed_tokens = min(self._model.most_mixed_tokens, self.max_batched_tokens)
        room = self._room(config)
        default = self._pool_blocks(room, kv_tokens, config)
        asked = default if asked_kv_tokens is None else self._pool_blocks(room, asked_kv_tokens, config)
        pool = self._settle(asked, config)
        possible = self._possible_tokens(room)
        self._keep_step_memory()
        taken = self._model.num_slots // BLOCK_TOKENS
        if asked_kv_tokens is None:
            default = taken
        return Fitted(
            pool, default * BLOCK_TOKENS, possible,
            room.limit_bytes // self._model.kv_bytes_per_token // BLOCK_TOKENS, self.max_batched_tokens,
        )  # fmt: skip

    def _warm_up(self, config: EngineConfig) -> int:
        """Computes a few steps of several shapes with both thread settings, on a small pool of its own; on a GPU also
        the largest step that the configuration allows.

        Returns the bytes that they took on the device at most, beside weights and pool (0 on a CPU).
        """
        prompt_tokens = min(config.max_batched_tokens, self._max_model_len - 2)
        most_rows = int(self._model.fixed_knobs.get("max_num_seqs", max(WARM_UP_ROWS)))
        tried_rows = [rows for rows in WARM_UP_ROWS if rows <= most_rows]
        num_blocks = -(-(prompt_tokens + 2 * max(WARM_UP_ROWS)) // config.block_tokens) + 3 * max(
            WARM_UP_ROWS
        )
        num_blocks = -(-num_blocks * config.block_tokens // BLOCK_TOKENS)
        if self._device.type == "cuda":
            config = config.patched(self._model.fixed_knobs)
            num_blocks = max(num_blocks, largest_blocks(config))
        self._model.allocate(num_blocks)
        with StepMeter(self._device) as meter:
            for threads, rows in product({config.threads_prefill, config.threads_decode}, tried_rows):
                tried = config.patched(
                    {"threads_prefill": threads, "threads_decode": threads, "max_num_seqs": rows}
                )
                self._compute(tried, num_blocks, warm_up_requests(rows, prompt_tokens))
            if self._device.type == "cuda":
                self._compute_largest(config, num_blocks)
        return meter.peak_bytes

    def _compute(self, config: EngineConfig, num_blocks: int, requests: Iterable[Request]) -> None:
        """`num_blocks`: of BLOCK_TOKENS each, cut as the configuration says: kernels are compiled for that."""
        size = config.block_tokens
        pool = BlockPool(num_blocks * BLOCK_TOKENS // size, size)
        scheduler = Scheduler(pool, config, self._max_model_len)
        for request in requests:
            scheduler.add(request)
        while (batch := scheduler.schedule(0.0)) is not None:
            tokens = self._execute(batch, scheduler.pack(batch), config).tokens
            scheduler.finish_step(batch, [token or 0 for token in tokens], 0.0)

    def _compute_largest(self, config: EngineConfig, num_blocks: int) -> None:
        """As many tokens and rows in one step as may be, each with its logits. Where memory does not hold that, half
        as many tokens, and so on; `max_batched_tokens` says how many."""
        tried = config.patched({"kv_block": str(BLOCK_TOKENS)})  # a smaller pool will do for many rows
        while True:
            try:
                return self._compute(tried, num_blocks, largest_requests(tried, self._max_model_len))
            except RuntimeError as error:
                if not is_out_of_memory(error) or tried.max_batched_tokens < 2 * FEWEST_TOKENS:
                    raise
                self.max_batched_tokens = tried.max_batched_tokens // 2
                log.warning(
                    "a step of %d tokens does not fit in memory, trying %d: %s",
                    tried.max_batched_tokens, self.max_batched_tokens, error,
                )  # fmt: skip
            tried = tried.patched({"max_batched_tokens": self.max_batched_tokens})
            torch.cuda.empty_cache()

    def _room(self, config: EngineConfig) -> Room:
        """What a pool may take, when steps and graphs have what they need. Gives the warm-up's pool back."""
        if self._device.type != "cuda":
            return Room.on_cpu(free_memory_bytes())
        before = driver_free_bytes(self._device)
        # The others fit into the memory of the largest one.
        self._model.prepare_steps(config.max_num_seqs, config.block_tokens, only_largest=True)
        graph_bytes = before - driver_free_bytes(self._device)
        self._model.release()
        free_bytes = driver_free_bytes(self._device)
        log.info(
            "%d bytes are free beside weights, of which steps take %d and captured ones %d",
            free_bytes, self._step_bytes, graph_bytes,
        )  # fmt: skip
        return Room.on_cuda(free_bytes - self._step_bytes - graph_bytes)

    def _pool_blocks(self, room: Room, asked_tokens: int | None, config: EngineConfig) -> int:
        size = max(BLOCK_TOKENS, config.block_tokens)  # the longest request needs its last block whole
        num_seqs = CUDA_KV_SEQUENCES if self._device.type == "cuda" else CPU_KV_SEQUENCES
        num_seqs = min(num_seqs, int(self._model.fixed_knobs.get("max_num_seqs", num_seqs)))
        most = num_seqs * -(-self._max_model_len // size) * size
        num_blocks = room.blocks(asked_tokens, most, BLOCK_TOKENS, self._model.kv_bytes_per_token)
        if asked_tokens is not None and num_blocks < asked_tokens // BLOCK_TOKENS:
            fitting = num_blocks * BLOCK_TOKENS
            log.warning(
                "a KV pool of %d tokens was asked for, %d fit in memory: using those", asked_tokens, fitting
            )
        return num_blocks

    def _settle(self, num_blocks: int, config: EngineConfig) -> BlockPool:
        """Puts a pool in force that leaves room for graphs and the largest step: what was asked for, or less."""
        half = num_blocks // 2  # graphs are not worth more
        while not self._fits(num_blocks, config, num_blocks > half) and num_blocks > FEWEST_BLOCKS:
            lacking = self._short_bytes() // (BLOCK_TOKENS * self._model.kv_bytes_per_token)
            smaller = max(FEWEST_BLOCKS, min(int(SHRINK * num_blocks), num_blocks - lacking))
            log.warning(
                "a KV pool of %d tokens leaves no room for steps and their graphs: trying %d",
                num_blocks * BLOCK_TOKENS, smaller * BLOCK_TOKENS,
            )  # fmt: skip
            self._model.release()
            num_blocks = smaller
        size = config.block_tokens
        if size > num_blocks * BLOCK_TOKENS:
            log.warning("a KV pool of %d tokens has blocks of %d", num_blocks * BLOCK_TOKENS, BLOCK_TOKENS)
            size = BLOCK_TOKENS
        return BlockPool(num_blocks * BLOCK_TOKENS // size, size, wants_runs=self._device.type != "cuda")

    def _fits(self, num_blocks: int, config: EngineConfig, needs_graphs: bool) -> bool:
        """Makes the pool, and captures steps over it. False where memory does not hold both and the largest step."""
        try:
            self._model.allocate(num_blocks)
        except RuntimeError as error:
            if not is_out_of_memory(error) or num_blocks <= FEWEST_BLOCKS:
                raise
            return False
        if self._short_bytes() > 0:
            return False
        is_captured = self._model.prepare_steps(config.max_num_seqs, config.block_tokens)
        return (is_captured or not needs_graphs) and self._short_bytes() <= 0

    def _short_bytes(self) -> int:
        """What the largest step lacks, with the pool and its graphs in place."""
        if self._device.type != "cuda":
            return 0
        return self._step_bytes - driver_free_bytes(self._device)

    def _keep_step_memory(self) -> None:
        """Has the allocator hold what the largest step takes, which it gave back to be counted: the first steps would
        ask the driver for it, tensor by tensor, while somebody waits. It holds it
        until a capture needs a run before, or somebody asks for more than there is."""
        if self._device.type != "cuda":
            return
        try:
            torch.empty(self._step_bytes, dtype=torch.uint8, device=self._device)
        except RuntimeError as error:  # there is no such piece; steps ask for smaller ones
            if not is_out_of_memory(error):
                raise
            log.info("the first steps will ask the driver for memory: %s", error)

    def _possible_tokens(self, room: Room) -> int:
        """What the bytes allow at the default reserve: on a GPU measured anew, with pool and graphs in place."""
        per_token = self._model.kv_bytes_per_token
        if self._device.type == "cuda":
            room = Room.on_cuda(self._model.num_slots * per_token - self._short_bytes())
        return room.default_bytes // per_token
