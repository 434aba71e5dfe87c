"""Computes the scheduler's batches with a model in memory: threads, KV pool, forward pass, sampling."""

import logging
import math
import platform
import time
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any, NamedTuple

import psutil
import torch
import transformers
from transformers import PreTrainedModel

import runtime
from runtime.decoder_model import DecoderModel
from runtime.errors import ModelError
from runtime.hf_model import HFModel
from runtime.host import cpu_model, free_memory_bytes, num_cores
from runtime.knobs import EngineConfig
from runtime.kv_cache import BLOCK_TOKENS, BlockPool
from runtime.kv_size import FEWEST_BLOCKS, SHRINK, Room, StepMeter, driver_free_bytes, is_out_of_memory
from runtime.linear import lay_out_linears
from runtime.loader import LoadedModel
from runtime.logprobs import PromptLogprob, TokenLogprobs, logprobs_of, prompt_logprobs_of
from runtime.paged_model import KVPools, PagedModel
from runtime.plain_model import PlainModel
from runtime.request import Request
from runtime.sampling import are_greedy, draw, tokens_of
from runtime.scheduler import Batch, IntArray, PackedBatch, Scheduler, ScoredPiece
from runtime.scoring import Scored
from runtime.warm import WarmStates
from runtime.warm_up import FEWEST_TOKENS, WARM_UP_ROWS, largest_blocks, largest_requests, warm_up_requests

log = logging.getLogger(__name__)

LAID_OUT_SHARE = 0.3  # of free memory, for copies of weights that a CPU multiplies faster
CPU_KV_SEQUENCES = 64
CUDA_KV_SEQUENCES = 1024


class Executed(NamedTuple):
    """`tokens`: one for each sampled row, None where the logits were not numbers; `logprobs` by sampled row.

    `scores`: of the batch's scored piece, None where it has none or its logits were not numbers.
    """

    tokens: list[int | None]
    logprobs: dict[int, TokenLogprobs]
    forward_s: float
    threads: int
    scores: list[PromptLogprob] | None = None


class Launched(NamedTuple):
    """A step under way. `drawn`: as `draw` returns it, on the host once `read` has happened (None: it has)."""

    batch: Batch
    logits: torch.Tensor
    drawn: torch.Tensor
    read: torch.cuda.Event | None
    started: float
    threads: int


_NOTHING = torch.empty(2, 0, dtype=torch.int64)


class Executor:
    """A model with its KV pool, ready to compute."""

    def __init__(
        self,
        loaded: LoadedModel,
        kv_tokens: int | None,
        config: EngineConfig,
        asked_kv_tokens: int | None = None,
        tiers: str = "ABC",
    ) -> None:
        """Sizes the pool last, after a warm-up has shown what the steps need. Too large a wish is answered
        by a smaller pool and a warning.

        Args:
            kv_tokens: the size by default; by free memory if not given.
            asked_kv_tokens: the size to start with, where the knob was named.
            tiers: those that may serve; the first that can does.

        Raises:
            ModelError: the model cannot be served, or there is no memory for even one sequence.
        """
        self._loaded = loaded
        self._model = servable(loaded.model, tiers, loaded.max_model_len)
        self._device = self._model.device
        self._threads = 0
        self._landed = 0.0  # when the last step did
        self._use_threads(config.threads_decode)
        if config.kv_dtype in self._model.kv_dtypes:
            self._model.kv_dtype = config.kv_dtype
        else:
            log.warning(
                "`kv_dtype` %s is not to be had: this model %s", config.kv_dtype, self._model.why_fixed
            )
        lay_out_linears(self._model.model, int(LAID_OUT_SHARE * free_memory_bytes()))
        self.max_batched_tokens: int | None = None  # where the machine cannot compute what was asked for
        self._step_bytes = self._warm_up(config)
        room, per_token = self._room(config), self._model.kv_bytes_per_token
        fitted, limit = self._pool_blocks(room, kv_tokens), room.limit_bytes // per_token // BLOCK_TOKENS
        num_blocks = fitted
        if asked_kv_tokens is not None:
            num_blocks = self._pool_blocks(room, asked_kv_tokens)
        self.pool = self._settle(num_blocks, config)
        taken = self._model.num_slots // BLOCK_TOKENS
        is_smaller = asked_kv_tokens is None and taken < fitted
        self.fitted_kv_tokens = (taken if is_smaller else fitted) * BLOCK_TOKENS
        self.kv_tokens_possible = self._possible_tokens(room)
        self.max_model_len = min(loaded.max_model_len, self.pool.num_tokens)
        self.warm = WarmStates(
            self._model, self.pool.block_tokens, self.free_bytes, self.max_model_len, limit
        )
        self.eos_token_ids = loaded.eos_token_ids
        self.vocab_size: int = loaded.identity["vocab_size"]
        self._process = psutil.Process()

    def execute(self, batch: Batch, packed: PackedBatch, config: EngineConfig) -> Executed:
        return self.land(self.launch(batch, packed, config))

    @torch.inference_mode()
    def launch(self, batch: Batch, packed: PackedBatch, config: EngineConfig) -> Launched:
        """Begins a step. On a GPU it computes while the host goes on; one more may be launched before it lands."""
        threads = config.threads_prefill if batch.num_prefill_rows else config.threads_decode
        self._use_threads(threads)
        started = time.perf_counter()
        logits = self._model.forward(packed)
        num_sampled = int(batch.sampled.sum())
        drawn = self._draw(logits[:num_sampled], batch.sampled_requests()) if num_sampled else _NOTHING
        self._model.drawn = drawn[0]
        if drawn.device.type != "cuda":
            return Launched(batch, logits, drawn, None, started, threads)
        on_host = torch.empty(drawn.shape, dtype=drawn.dtype, pin_memory=True)
        on_host.copy_(drawn, non_blocking=True)
        read = torch.cuda.Event()
        read.record()
        return Launched(batch, logits, on_host, read, started, threads)

    def _draw(self, logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
        greedy = self._model.greedy
        return greedy if greedy is not None and are_greedy(requests) else draw(logits, requests)

    def land(self, launched: Launched) -> Executed:
        """Waits for a step and reads what it drew."""
        batch, logits, threads = launched.batch, launched.logits, launched.threads
        if launched.read is not None:
            launched.read.synchronize()
        tokens = tokens_of(launched.drawn)
        logprobs = logprobs_of(logits[: len(tokens)], tokens, batch.sampled_requests()) if tokens else {}
        scores = None if batch.scored is None else _scores(batch, batch.scored, logits[len(tokens) :])
        ended = time.perf_counter()
        forward_s = ended - max(launched.started, self._landed)
        self._landed = ended
        return Executed(tokens, logprobs, forward_s, threads, scores)

    def rest(self) -> None:
        """Nothing is left to compute for now: what was held for the last requests is given back."""
        self._model.rest()

    def score_area(self, num_blocks: int, config: EngineConfig) -> KVPools:
        """Room for one sequence that is scored beside serving, of the `kv_dtype` of `config`. Raises RuntimeError where
        there is no memory."""
        return self._model.new_pools(num_blocks, kv_dtype=config.kv_dtype)

    @torch.inference_mode()
    def score(self, packed: PackedBatch, targets: IntArray, area: KVPools, config: EngineConfig) -> Scored:
        """What the model under `config` makes of `targets`, the true token after each of the packed ones.

        Logarithms are taken in float32 at least, whatever the model's type.
        """
        self._use_threads(config.threads_prefill)
        with self.warm.weights_of(config):
            logits = self._model.forward(packed, area)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        wanted = torch.from_numpy(targets).to(logits.device)
        nll = -logits.log_softmax(dim=-1).gather(1, wanted[:, None])[:, 0]
        found = zip(nll.tolist(), logits.argmax(dim=-1).tolist(), strict=True)
        rows = [(round(loss, 6), token) if math.isfinite(loss) else (None, None) for loss, token in found]
        return Scored([loss for loss, _ in rows], [token for _, token in rows])

    def free_bytes(self) -> int:
        """Memory that can still be taken where the model lies."""
        if self._device.type != "cuda":
            return free_memory_bytes()
        kept = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return torch.cuda.mem_get_info(self._device)[0] + kept

    def memory(self) -> dict[str, int]:
        """Bytes held by this process, and on the device where there is one."""
        held = {"rss_bytes": self._process.memory_info().rss}
        if self._device.type == "cuda":
            held["device_memory_bytes"] = torch.cuda.memory_reserved(self._device)
            held["device_free_bytes"] = torch.cuda.mem_get_info(self._device)[0]
        return held

    def identity(self) -> dict[str, Any]:
        """What was loaded and on what: the engine's part of the runtime's identity."""
        on_cuda = self._device.type == "cuda"
        return {
            "model": {**self._loaded.identity, "max_model_len": self.max_model_len},
            "hardware": {
                "device": self._device.type,
                "device_name": torch.cuda.get_device_name(self._device) if on_cuda else cpu_model(),
                "cpu_model": cpu_model(),
                "num_cores": num_cores(),
                "num_devices": torch.cuda.device_count() if on_cuda else 1,
                "memory_bytes": psutil.virtual_memory().total,
            },
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "runtime": runtime.__version__,
            },
            "tier": self._model.tier,
            "fitted_knobs": {
                "weight_format": self.warm.loaded_format,
                "kv_tokens": self.fitted_kv_tokens,
                **self._model.fixed_knobs,
            },
            "kv_total_tokens": self._model.num_slots,
            "kv_tokens_possible": self.kv_tokens_possible,
            "kv_block_tokens": self.pool.block_tokens,
            "kv_bytes_per_token": self._model.kv_bytes_per_token,
        }

    def _use_threads(self, threads: int) -> None:
        if threads != self._threads:
            torch.set_num_threads(threads)
            self._threads = threads

    # -- before the first request ----------------------------------------------------------------------------

    def _warm_up(self, config: EngineConfig) -> int:
        """Computes a few steps of several shapes with both thread settings, on a small pool of its own; on a GPU also
        the largest step that the configuration allows.

        Returns the bytes that they took on the device at most, beside weights and pool (0 on a CPU).
        """
        prompt_tokens = min(config.max_batched_tokens, self._loaded.max_model_len - 2)
        most_rows = int(self._model.fixed_knobs.get("max_num_seqs", max(WARM_UP_ROWS)))
        tried_rows = [rows for rows in WARM_UP_ROWS if rows <= most_rows]
        num_blocks = -(-(prompt_tokens + 2 * max(WARM_UP_ROWS)) // BLOCK_TOKENS) + 3 * max(WARM_UP_ROWS)
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
        scheduler = Scheduler(BlockPool(num_blocks), config, self._loaded.max_model_len)
        for request in requests:
            scheduler.add(request)
        while (batch := scheduler.schedule(0.0)) is not None:
            tokens = self.execute(batch, scheduler.pack(batch), config).tokens
            scheduler.finish_step(batch, [token or 0 for token in tokens], 0.0)

    def _compute_largest(self, config: EngineConfig, num_blocks: int) -> None:
        """As many tokens and rows in one step as may be, each with its logits. Where memory does not hold that, half
        as many tokens, and so on; `max_batched_tokens` says how many."""
        tried = config
        while True:
            try:
                return self._compute(tried, num_blocks, largest_requests(tried, self._loaded.max_model_len))
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

    def _pool_blocks(self, room: Room, asked_tokens: int | None) -> int:
        num_seqs = CUDA_KV_SEQUENCES if self._device.type == "cuda" else CPU_KV_SEQUENCES
        num_seqs = min(num_seqs, int(self._model.fixed_knobs.get("max_num_seqs", num_seqs)))
        most = num_seqs * -(-self._loaded.max_model_len // BLOCK_TOKENS) * BLOCK_TOKENS
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

    def _possible_tokens(self, room: Room) -> int:
        """What the bytes allow at the default reserve: on a GPU measured anew, with pool and graphs in place."""
        per_token = self._model.kv_bytes_per_token
        if self._device.type == "cuda":
            room = Room.on_cuda(self._model.num_slots * per_token - self._short_bytes())
        return room.default_bytes // per_token


def servable(model: PreTrainedModel, tiers: str = "ABC", max_model_len: int | None = None) -> PagedModel:
    """The model in the first tier that can serve it: A, our own decoder, B, its own code over our cache, or C,
    one request at a time by `generate`.

    Raises:
        ModelError: it cannot be served, with the reason of each tier.
    """
    try:
        plain = HFModel(model)
    except ModelError as refused:
        if "C" not in tiers:
            raise
        try:
            one_at_a_time = PlainModel(model)
        except ModelError as error:
            raise ModelError(f"{refused} {error}") from error
        log.warning("it is served one request at a time instead, by `generate` (tier C): %s", refused)
        return one_at_a_time
    try:
        if "A" in tiers:
            return DecoderModel(plain, max_model_len)
    except ModelError as error:
        log.info("tier B serves %s: %s", type(model).__name__, error)
    finally:
        plain.forget_probe()
    return plain


def _scores(batch: Batch, piece: ScoredPiece, logits: torch.Tensor) -> list[PromptLogprob] | None:
    """logits: [tokens of the piece, vocab]."""
    request = batch.requests[piece.row]
    assert request.token_ids is not None, "a replayed request is not scored"
    targets = request.token_ids[piece.start + 1 : piece.end + 1].tolist()
    return prompt_logprobs_of(logits, targets, request.sampling.num_prompt_logprobs or 0)
