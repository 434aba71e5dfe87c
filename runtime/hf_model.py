"""Any Hugging Face causal LM over the paged pool: rows packed as one sequence, attention replaced by ours.

transformers calls the attention function that we register; because its name has no mask function, no mask
is built. The cache is ours, so `use_cache` is off. Whether a model can be served so is found by trying.
"""

import inspect
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from runtime.attention import (
    PagedAttention,
    StepTensors,
    allowed_positions,
    attend_plain,
    registered_attention,
)
from runtime.errors import ModelError
from runtime.knobs import EngineConfig, KnobValue
from runtime.kv_cache import BLOCK_TOKENS, BlockPool
from runtime.request import Request
from runtime.scheduler import BlockMove, PackedBatch, Scheduler

ATTENTION_NAME = "tuner_paged"
PAGED_LAYERS = {"full_attention", "sliding_attention", "attention"}
PROBE_TOKENS = 24
PROBE_DECODED = 2

KVPools = dict[int, tuple[Tensor, Tensor]]  # layer -> keys, values: [kv_heads, slots, D]

AttentionInterface.register(ATTENTION_NAME, registered_attention)


class KVShape(NamedTuple):
    """What one layer caches for one token."""

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return self.kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


def copy_blocks(
    source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor], move: BlockMove, block_tokens: int
) -> None:
    """Copies one layer's keys and values, from one pool to another or within one, in the order of the move.

    On a CPU a run of blocks is one copy: three times faster than gathering and scattering.
    """
    device = source[0].device
    if device.type == "cpu":
        for taken, given, count in runs_of(move):
            for old, new in zip(source, target, strict=True):
                size = count * block_tokens
                new.narrow(1, given * block_tokens, size).copy_(old.narrow(1, taken * block_tokens, size))
        return
    taken_blocks, given_blocks = (torch.from_numpy(blocks.astype(np.int64)).to(device) for blocks in move)
    for old, new in zip(source, target, strict=True):
        blocks = old.unflatten(1, (-1, block_tokens)).index_select(1, taken_blocks)
        new.unflatten(1, (-1, block_tokens)).index_copy_(1, given_blocks, blocks)


def runs_of(move: BlockMove) -> list[tuple[int, int, int]]:
    """(first source, first target, number) of each run of blocks that follow one another on both sides."""
    if not len(move.sources):
        return []
    breaks = np.flatnonzero((np.diff(move.sources) != 1) | (np.diff(move.targets) != 1)) + 1
    starts, ends = [0, *breaks.tolist()], [*breaks.tolist(), len(move.sources)]
    return [
        (int(move.sources[start]), int(move.targets[start]), end - start)
        for start, end in zip(starts, ends, strict=True)
    ]


class ShapeProbe:
    """Stands in for `PagedAttention` during one forward pass without a pool, and notes what each layer caches."""

    def __init__(self) -> None:
        self.shapes: dict[int, KVShape] = {}

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
    ) -> Tensor:
        _, kv_heads, num_tokens, dim = key.shape
        self.shapes[module.layer_idx] = KVShape(kv_heads, dim, value.shape[-1], key.dtype)
        grouped = query[0].unflatten(0, (kv_heads, -1))
        allowed = allowed_positions(num_tokens, num_tokens, sliding_window, query.device)
        out = attend_plain(grouped, key[0], value[0], allowed, scaling or dim**-0.5, softcap, s_aux)
        return out.permute(2, 0, 1, 3).flatten(1, 2)[None]


class HFModel:
    """A causal LM ready for packed steps. `allocate` must come before the first `forward`."""

    tier = "B"
    fixed_knobs: Mapping[str, KnobValue] = {}  # that this way of computing leaves one value

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises ModelError if the architecture cannot be served this way."""
        self.model = model.eval().requires_grad_(False)
        self.device = model.device
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._attention = PagedAttention()
        try:
            self.kv_shapes = self._probe()
        except Exception as error:  # foreign code: whatever a model raises that was not made for this
            self.release()
            raise ModelError(
                f"{architecture(model)} cannot be served with a paged cache: {told(error)}. Models can whose attention "
                "goes through transformers' AttentionInterface (Llama, Qwen, Mistral, DeepSeek and most others)."
            ) from error

    @property
    def kv_bytes_per_token(self) -> int:
        return sum(shape.bytes_per_token for shape in self.kv_shapes.values())

    def allocate(self, num_blocks: int, block_tokens: int = BLOCK_TOKENS) -> None:
        """Makes the pools of all layers, `[kv_heads, slots, D]` each, in place of earlier ones.

        They start uninitialised, so that memory is taken as it is used: no slot is read before it is written.
        """
        self.release()
        self._attention.pools = self.new_pools(num_blocks, block_tokens)

    def new_pools(self, num_blocks: int, block_tokens: int = BLOCK_TOKENS) -> KVPools:
        """Pools beside those of `allocate`, for a forward pass that must not touch them."""
        slots = num_blocks * block_tokens
        return {layer: self.new_pool(shape, slots) for layer, shape in self.kv_shapes.items()}

    def new_pool(self, shape: KVShape, slots: int) -> tuple[Tensor, Tensor]:
        return (
            torch.empty(shape.kv_heads, slots, shape.key_dim, dtype=shape.dtype, device=self.device),
            torch.empty(shape.kv_heads, slots, shape.value_dim, dtype=shape.dtype, device=self.device),
        )

    @property
    def pools(self) -> KVPools:
        """The pools in force. Others that are assigned serve from the next step on."""
        return self._attention.pools

    @pools.setter
    def pools(self, pools: KVPools) -> None:
        self._attention.pools = pools

    def release(self) -> None:
        """Gives the pools' memory back, unless somebody else holds them too."""
        self._attention.pools = {}

    def rest(self) -> None:
        """Nobody runs. Nothing is held beside the pools."""

    @torch.inference_mode()
    def forward(self, packed: PackedBatch, pools: KVPools | None = None) -> Tensor:
        """Computes the step and caches its keys and values, in `pools` where given. Returns logits [sampled rows,
        vocab]."""
        own = self._attention.pools
        if packed.copies is not None:
            for pool in own.values():
                copy_blocks(pool, pool, packed.copies, packed.block_tokens)
        step = StepTensors.of(packed, self.device)
        self._attention.step, self._attention.pools = step, own if pools is None else pools
        try:
            return self._call(step.token_ids, step.positions, step.last_tokens)
        finally:
            self._attention.step, self._attention.pools = None, own

    def _call(self, token_ids: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
        if self._keeps_logits:
            out = self.model(
                input_ids=token_ids, position_ids=positions, use_cache=False, logits_to_keep=keep
            )
            return out.logits[0]
        return self.model(input_ids=token_ids, position_ids=positions, use_cache=False).logits[0, keep]

    # -- finding out whether the model can be served ---------------------------------------------------------

    @torch.inference_mode()
    def _probe(self) -> dict[int, KVShape]:
        """Runs a short prompt as transformers would and as we do; returns what each layer caches."""
        check_layers(self.model)
        token_ids = probe_tokens(self.model)
        positions = torch.arange(PROBE_TOKENS, device=self.device)[None]
        self.model.set_attn_implementation("eager")  # complete; "sdpa" leaves out soft caps and sinks
        expected = self.model(input_ids=token_ids, use_cache=False).logits[0]
        probe = ShapeProbe()
        self.model.set_attn_implementation(ATTENTION_NAME)
        self._attach(probe)
        self._call(token_ids, positions, positions[0, -1:])
        if not probe.shapes:
            raise ModelError("no layer calls the registered attention function")
        self.kv_shapes = probe.shapes
        self._attach(self._attention)
        check_logits(self, expected, token_ids[0].tolist())
        return probe.shapes

    def _attach(self, attention: PagedAttention | ShapeProbe) -> None:
        for module in self.model.modules():
            if hasattr(module, "layer_idx"):
                object.__setattr__(module, "paged_attention", attention)


class Probed(Protocol):
    """A model that shows in which tier it can be served."""

    fixed_knobs: Mapping[str, KnobValue]

    def allocate(self, num_blocks: int) -> None: ...

    def forward(self, packed: PackedBatch) -> Tensor: ...

    def release(self) -> None: ...


def architecture(model: PreTrainedModel) -> str:
    return str((model.config.architectures or [type(model).__name__])[0])


def told(error: Exception) -> str:
    """A reason of ours as it stands; what foreign code raised in one line."""
    if isinstance(error, ModelError):
        return str(error)
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def probe_tokens(model: PreTrainedModel) -> Tensor:
    """[1, PROBE_TOKENS] token ids that differ as far as the vocabulary allows."""
    ids = torch.arange(PROBE_TOKENS, device=model.device)[None]
    return ids % model.config.get_text_config().vocab_size


def check_layers(model: PreTrainedModel) -> None:
    """Raises ModelError where a layer needs more than the keys and values of a window, as far as the model tells.

    A short probe may miss it: a state that has hardly begun, chunks and indices longer than the prompt.
    """
    layer_types = getattr(model.config.get_text_config(), "layer_types", None) or ()
    if others := sorted(set(layer_types) - PAGED_LAYERS):
        raise ModelError(f"it has layers of {', '.join(others)}")
    if getattr(model, "_is_stateful", False):
        raise ModelError("it keeps a state beside keys and values")


def check_logits(served: Probed, expected: Tensor, token_ids: list[int]) -> None:
    """Computes the probe prompt in two chunks, and beside it half of it with the next tokens decoded one by one.

    expected: [PROBE_TOKENS, vocab]. Raises ModelError where the logits are others.
    """
    half, pool = PROBE_TOKENS // 2, BlockPool(2 * PROBE_TOKENS // BLOCK_TOKENS + 2)
    served.allocate(pool.num_blocks)
    config = EngineConfig.of({"prefill_chunk": 16, **served.fixed_knobs})
    scheduler = Scheduler(pool, config, PROBE_TOKENS + 2)
    scheduler.add(Request.of_tokens("whole", token_ids, 1, arrived_at=0.0))
    scheduler.add(Request.of_tokens("half", token_ids[:half], 1 + PROBE_DECODED, arrived_at=0.0))
    limit = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 0.15
    while (batch := scheduler.schedule(0.0)) is not None:
        logits, ends = served.forward(scheduler.pack(batch)), batch.contexts[batch.sampled]
        for row, end in zip(logits, ends, strict=True):
            error = relative_error(row, expected[end - 1])
            if not error <= limit:
                raise ModelError(f"its logits differ from those of transformers by {error:.2g} > {limit:g}")
        scheduler.finish_step(batch, [token_ids[end % PROBE_TOKENS] for end in ends], 0.0)
    served.release()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of `expected` about its mean."""
    actual, expected = actual.double(), expected.double()
    spread = (expected - expected.mean()).square().mean()
    return float(((actual - expected).square().mean() / spread).sqrt())
