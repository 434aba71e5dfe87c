"""Computes the scheduler's batches with a model in memory: threads, KV pool, forward pass, sampling."""

import logging
import math
import platform
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import torch

import runtime
from runtime.bare_model import BareModel
from runtime.batch import Batch, IntArray, PackedBatch, ScoredPiece
from runtime.decoder_model import DecoderModel
from runtime.errors import ModelError
from runtime.fitting import Fitting
from runtime.gemm_rate import measured_step_tokens
from runtime.host import cpu_model, free_memory_bytes, num_cores
from runtime.knobs import EngineConfig, default_config
from runtime.linear import lay_out_linears
from runtime.loader import LoadedModel
from runtime.logprobs import PromptLogprob, TokenLogprobs, logprobs_of, prompt_logprobs_of
from runtime.paged_model import KVPools, PagedModel
from runtime.request import Request
from runtime.sampling import are_greedy, draw, tokens_of
from runtime.scoring import Scored
from runtime.step_model import StepModel
from runtime.step_weights import weights_of
from runtime.warm import WarmStates

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

LAID_OUT_SHARE = 0.3  # of free memory, for copies of weights that a CPU multiplies faster


class Executed(NamedTuple):
    """`tokens`: those drawn, row after row, None where the logits were not numbers; `logprobs` by place among them.

    `scores`: of the batch's scored piece, None where it has none or its logits were not numbers. `device_s`: by the
    device's own clock, None on a CPU. `graph_rows`: tokens of the CUDA graph that was replayed, if one was.
    """

    tokens: list[int | None]
    logprobs: dict[int, TokenLogprobs]
    forward_s: float
    threads: int
    scores: list[PromptLogprob] | None = None
    device_s: float | None = None
    graph_rows: int | None = None


class Launched(NamedTuple):
    """A step under way. `drawn`: as `draw` returns it, on the host once `read` has happened (None: it has).
    `requests`: by drawn token. `begun`: when the device came to it."""

    batch: Batch
    requests: list[Request]
    logits: torch.Tensor
    drawn: torch.Tensor
    read: torch.cuda.Event | None
    started: float
    threads: int
    begun: torch.cuda.Event | None = None
    graph_rows: int | None = None


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
        self._num_active = weights_of(loaded.model).num_active
        self._model = served(loaded, tiers)
        self._device = self._model.device
        self._threads = 0
        self._landed = 0.0  # when the last step did
        self._use_threads(config.threads_decode)
        if config.kv_dtype in self._model.kv_dtypes:
            self._model.kv_dtype = config.kv_dtype
        for name in ("kv_dtype", "linear_backend"):
            asked, why = config.values()[name], self._model.why_is_fixed(name)
            if asked != self._model.fixed_knobs.get(name, asked):
                log.warning("`%s` %s is not to be had: this model %s", name, asked, why)
        self._model.use_backend(config.linear_backend)
        lay_out_linears(self._model.model, int(LAID_OUT_SHARE * free_memory_bytes()))
        step_tokens = self._measured_step_tokens()
        # Launching larger ones is hidden behind what the device has to do.
        self._model.most_mixed_tokens = step_tokens or 0
        fitted = Fitting(self._model, loaded.max_model_len, self.execute).fit(
            config, kv_tokens, asked_kv_tokens
        )
        self.pool, self.fitted_kv_tokens, self.kv_tokens_possible, max_blocks, self.max_batched_tokens = (
            fitted
        )
        if step_tokens is not None and self.max_batched_tokens is not None:
            step_tokens = min(step_tokens, self.max_batched_tokens)
        self.fitted_mixed_step_tokens = step_tokens
        self.max_model_len = min(loaded.max_model_len, self.pool.num_tokens)
        self.warm = WarmStates(
            self._model, self.pool.block_tokens, self.free_bytes, self.max_model_len, max_blocks
        )
        self.warm.wake()
        self.eos_token_ids = loaded.eos_token_ids
        self.vocab_size: int = loaded.identity["vocab_size"]
        self._process = psutil.Process()

    @property
    def module(self) -> torch.nn.Module:
        """What computes, in the tier that serves."""
        return self._model.model

    @property
    def attention_cost(self) -> float:
        """Of one token that a prompt's token attends to, in tokens. A replay finds the same from the identity."""
        return StepModel.of_shape(self.identity()).attention_cost

    def execute(self, batch: Batch, packed: PackedBatch, config: EngineConfig) -> Executed:
        return self.land(self.launch(batch, packed, config))

    @torch.inference_mode()
    def launch(self, batch: Batch, packed: PackedBatch, config: EngineConfig) -> Launched:
        """Begins a step. On a GPU it computes while the host goes on; one more may be launched before it lands."""
        threads = config.threads_prefill if batch.num_prefill_rows else config.threads_decode
        self._use_threads(threads)
        started = time.perf_counter()
        self._model.use_backend(config.linear_backend)
        begun = _recorded() if self._device.type == "cuda" else None
        logits = self._model.forward(packed)
        graph_rows = self._model.graph_rows
        requests = batch.drawing_requests()
        drawn = self._draw(logits[: len(requests)], requests) if requests else _NOTHING
        self._model.drawn = drawn[0]
        if begun is None:
            return Launched(batch, requests, logits, drawn, None, started, threads)
        on_host = _NOTHING
        if requests:
            on_host = torch.empty(drawn.shape, dtype=drawn.dtype, pin_memory=True)
            on_host.copy_(drawn, non_blocking=True)
        return Launched(batch, requests, logits, on_host, _recorded(), started, threads, begun, graph_rows)

    def _draw(self, logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
        greedy = self._model.greedy
        return (
            greedy
            if greedy is not None and are_greedy(requests)
            else draw(logits, requests, self._model.kernels)
        )

    def land(self, launched: Launched) -> Executed:
        """Waits for a step and reads what it drew."""
        batch, logits, threads = launched.batch, launched.logits, launched.threads
        if launched.read is not None:
            launched.read.synchronize()
        tokens = tokens_of(launched.drawn)
        logprobs = logprobs_of(logits[: len(tokens)], tokens, launched.requests) if tokens else {}
        scores = None if batch.scored is None else _scores(batch, batch.scored, logits[len(tokens) :])
        ended = time.perf_counter()
        forward_s = ended - max(launched.started, self._landed)
        self._landed = ended
        device_s = None
        if launched.begun is not None and launched.read is not None:
            device_s = launched.begun.elapsed_time(launched.read) / 1e3
        return Executed(tokens, logprobs, forward_s, threads, scores, device_s, launched.graph_rows)

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
        self._model.use_backend(config.linear_backend)
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
        step_tokens = self.fitted_mixed_step_tokens
        mixed = {} if step_tokens is None else {"mixed_step_tokens": step_tokens}
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
                "transformers": version("transformers"),
                "runtime": runtime.__version__,
            },
            "tier": self._model.tier,
            "replaced_kernels": list(self._model.replaced_kernels),
            "fitted_knobs": {
                "weight_format": self.warm.loaded_format,
                "kv_tokens": self.fitted_kv_tokens,
                **mixed,
                **self._model.fixed_knobs,
            },
            "num_active_parameters": self._num_active,
            "kv_total_tokens": self._model.num_slots,
            "kv_tokens_possible": self.kv_tokens_possible,
            "kv_block_tokens": self.pool.block_tokens,
            "kv_bytes_per_token": self._model.kv_bytes_per_token,
        }

    def _measured_step_tokens(self) -> int | None:
        """The default of `mixed_step_tokens`, None where it stays off: on a CPU, whose steps are small by default.
        Before the KV pool takes what is free."""
        if self._device.type != "cuda":
            return None
        tokens = measured_step_tokens(
            self._model.model, self._num_active, self._loaded.identity["vocab_size"]
        )
        cap = default_config("cuda", num_cores()).max_batched_tokens
        return None if tokens is None else min(tokens, cap)

    def _use_threads(self, threads: int) -> None:
        if threads != self._threads:
            torch.set_num_threads(threads)
            self._threads = threads


def _recorded() -> torch.cuda.Event:
    """Of the stream in use. It keeps the time: two of them say how long the device took for what lies between."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def served(loaded: LoadedModel, tiers: str = "ABC") -> PagedModel:
    """The model in the first of these tiers that can serve it. Raises ModelError where none can."""
    model = loaded.model
    if isinstance(model, BareModel):
        try:
            if "A" in tiers:
                return DecoderModel(model, loaded.max_model_len)
        except torch.OutOfMemoryError as error:
            name = loaded.identity["name"]
            raise ModelError(f"{name} does not fit in the memory of {model.device}: {error}") from error
        except ModelError as error:
            log.warning("transformers' own model is loaded: %s", error)
        from runtime.pretrained import pretrained_of

        model, tiers = pretrained_of(model, Path(loaded.identity["path"])), tiers.replace("A", "")
    return servable(model, tiers, loaded.max_model_len)


def servable(model: "PreTrainedModel", tiers: str = "ABC", max_model_len: int | None = None) -> PagedModel:
    """The model in the first tier that can serve it: A, our own decoder, B, its own code over our cache, or C,
    one request at a time by `generate`.

    Raises:
        ModelError: it cannot be served, with the reason of each tier.
    """
    from runtime.hf_model import HFModel
    from runtime.plain_model import PlainModel

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
