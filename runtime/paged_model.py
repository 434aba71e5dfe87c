"""What every model over the paged pool has in common: its pools, what a step does to them, and the proof of its logits.

A layer's pool is a pair of tensors `[heads, slots, values]`, keys and values where the model keeps them apart. Which
heads and values those are is the model's own affair; the pools are made, moved and copied by slots.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from runtime.batch import PackedBatch
from runtime.errors import ModelError
from runtime.kernels import PLAIN
from runtime.knobs import EngineConfig, KnobValue
from runtime.kv_cache import BLOCK_TOKENS, BlockIds, BlockPool
from runtime.request import Request
from runtime.retable import BlockMove, Retabled
from runtime.scheduler import Scheduler
from runtime.step_tensors import StepTensors
from runtime.transfer import sent
from runtime.weights import formats_from

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_TOKENS = 24
PROBE_DECODED = 2

IntArray = NDArray[np.int64]
LayerPool = tuple[Tensor, Tensor]  # keys, values: [kv_heads, slots, D]
KVPools = dict[int, LayerPool]  # by layer
LayerCopier = Callable[
    [int, LayerPool, LayerPool], None
]  # a layer, its pool, and the one that it is copied to


class KVShape(NamedTuple):
    """What one layer caches for one token."""

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return self.kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


class AttentionCall(NamedTuple):
    """How a layer calls attention. `is_special`: with a soft cap or sinks."""

    shape: KVShape
    scaling: float
    sliding_window: int | None
    is_special: bool


class PagedModel:
    """A causal LM ready for packed steps. `allocate` must come before the first `forward`."""

    tier: str
    # What this way of computing leaves one value, and in words, why. Cached values are rounded in tier A only, where
    # attention is our own, and has keys and values of its own.
    fixed_knobs: Mapping[str, KnobValue] = {"kv_dtype": "auto", "linear_backend": "auto"}
    why_fixed = "caches keys and values as its own code or its latents need them"
    kv_dtypes: Sequence[str] = ("auto",)  # what `kv_dtype` may be

    def __init__(self, model: nn.Module, device: torch.device, kv_shapes: dict[int, KVShape]) -> None:
        self.model, self.device, self.kv_shapes = model, device, kv_shapes
        self.pools: KVPools = {}  # in force; others that are assigned serve from the next step on
        self.drawn = torch.empty(0, dtype=torch.int64)  # tokens of the last step, where they were drawn
        self.kv_dtype = "auto"  # of the pools in force
        # The likeliest tokens of the step just computed, as `draw` returns them, where it has them already.
        self.greedy: Tensor | None = None
        # Tokens of the graph that computed it, padding among them; None where it was launched kernel by kernel.
        self.graph_rows: int | None = None
        self.most_mixed_tokens = 0  # of a step with prompts that may be captured
        self.kernels = PLAIN
        self.replaced_kernels: tuple[str, ...] = ()  # that failed their check; plain twins do their work
        # Names the weights in force, for what was prepared with them.
        self.weights_key = formats_from(next(model.parameters()).dtype)[0]

    def why_is_fixed(self, name: str) -> str:
        """One of `fixed_knobs`."""
        return "knows one way to multiply" if name == "linear_backend" else self.why_fixed

    def use_backend(self, linear_backend: str) -> None:
        """From the next step on. Without effect where there is nothing to choose from."""

    @property
    def kv_bytes_per_token(self) -> int:
        """In the pools in force."""
        return self.bytes_per_token(self.kv_dtype)

    def bytes_per_token(self, kv_dtype: str) -> int:
        return sum(shape.bytes_per_token for shape in self.shapes_of(kv_dtype).values())

    def shapes_of(self, kv_dtype: str) -> Mapping[int, KVShape]:
        """What each layer caches, where `kv_dtype` is one of `kv_dtypes`."""
        return self.kv_shapes

    @property
    def num_slots(self) -> int:
        """Tokens that the pools in force have room for, in blocks or not."""
        return next(iter(self.pools.values()))[0].shape[1]

    def allocate(self, num_blocks: int, block_tokens: int = BLOCK_TOKENS) -> None:
        """Makes the pools of all layers, `[kv_heads, slots, D]` each, in place of earlier ones.

        They start uninitialised, so that memory is taken as it is used: no slot is read before it is written.
        """
        self.release()
        self.pools = self.new_pools(num_blocks, block_tokens)

    def new_pools(
        self, num_blocks: int, block_tokens: int = BLOCK_TOKENS, kv_dtype: str | None = None
    ) -> KVPools:
        """Pools beside those of `allocate`, for a forward pass that must not touch them."""
        slots, shapes = num_blocks * block_tokens, self.shapes_of(kv_dtype or self.kv_dtype)
        return {layer: self.new_pool(shape, slots) for layer, shape in shapes.items()}

    def copier(self, move: Retabled, is_other_kind: bool) -> LayerCopier:
        """How a layer's keys and values come to a pool beside; `is_other_kind`: of another `kv_dtype`."""
        targets = move.move.targets
        is_run = self.device.type != "cpu" and len(targets) > 0 and bool((np.diff(targets) == 1).all())
        way = block_gatherer if is_run else block_copier
        copy = way(move.move, move.block_tokens, self.device)
        return lambda layer, source, target: copy(source, target)

    @torch.inference_mode()
    def wake_moves(self) -> None:
        """Launches what copies blocks from pool to pool, and within one, so that it is loaded before anybody waits."""
        shape = next(iter(self.kv_shapes.values()))
        source, target = (self.new_pool(shape, 4 * BLOCK_TOKENS) for _ in range(2))
        move = BlockMove(np.array([0, 2], np.int32), np.array([1, 2], np.int32))
        for way in (block_gatherer, block_rearranger):
            way(move, BLOCK_TOKENS, self.device)(source, target)

    def new_pool(self, shape: KVShape, slots: int) -> LayerPool:
        return (
            torch.empty(shape.kv_heads, slots, shape.key_dim, dtype=shape.dtype, device=self.device),
            torch.empty(shape.kv_heads, slots, shape.value_dim, dtype=shape.dtype, device=self.device),
        )

    def release(self) -> None:
        """Gives the pools' memory back, unless somebody else holds them too."""
        self.pools = {}

    def prepare_steps(
        self, max_num_seqs: int, block_tokens: int = BLOCK_TOKENS, only_largest: bool = False
    ) -> bool:
        """Makes ready what steps of up to so many rows need, where a model has such a thing. After `allocate`. False
        where memory did not suffice."""
        return True

    @property
    def captured_rows(self) -> Sequence[int]:
        """Of steps that are captured, where any are."""
        return ()

    def is_awake(self, kv_dtype: str, block_tokens: int) -> bool:
        """Whether a first step over such pools takes no longer than those after it."""
        return True

    def wake(self, kv_dtype: str, block_tokens: int) -> None:
        """Sees to that, in another thread than the steps', which go on meanwhile. Raises RuntimeError where there is no
        memory."""

    def waking_bytes(self, kv_dtype: str, block_tokens: int) -> int:
        """What that takes meanwhile, at most."""
        return 0

    def capture_ahead(
        self, pools: KVPools, kv_dtype: str, block_tokens: int, weights_key: str, linear_backend: str
    ) -> bool:
        """Captures a little of what steps over these pools will replay, by the weights that are installed. Between two
        steps. False where nothing of it is left, as in most tiers."""
        return False

    def forget(self, pools: KVPools | None = None, weights_key: str | None = None) -> None:
        """These pools or weights are about to go: what was made ready with them goes too."""

    def rest(self) -> None:
        """Nobody runs: what is held beside the pools for those who ran is given back. Nothing, in most tiers."""

    def give_back(self) -> None:
        """No step is under way: all that nobody needs any more goes now. Nothing, in most tiers."""

    @torch.inference_mode()
    def forward(self, packed: PackedBatch, pools: KVPools | None = None) -> Tensor:
        """Computes the step and caches its keys and values, in `pools` where given. Returns logits [last_tokens,
        vocab]."""
        if packed.copies is not None:
            copy = block_copier(packed.copies, packed.block_tokens, self.device)
            for pool in self.pools.values():
                copy(pool, pool)
        step = self.step_of(packed)
        if packed.has_pending:
            step.token_ids = known_tokens(step.token_ids, self.drawn)
        return self.compute(step, self.pools if pools is None else pools)

    def step_of(self, packed: PackedBatch) -> StepTensors:
        return StepTensors.of(packed, self.device)

    def compute(self, step: StepTensors, pools: KVPools) -> Tensor:
        """Returns logits [last_tokens, vocab]."""
        raise NotImplementedError

    def check_against(self, expected: Tensor, token_ids: list[int]) -> None:
        """Computes a probe prompt in two chunks, and beside it half of it with the next tokens decoded one by one; the
        logits must be those expected.

        expected: [PROBE_TOKENS, vocab]. Raises ModelError where they are not.
        """
        half, pool = PROBE_TOKENS // 2, BlockPool(2 * PROBE_TOKENS // BLOCK_TOKENS + 2)
        self.allocate(pool.num_blocks)
        config = EngineConfig.of({"prefill_chunk": 16, **self.fixed_knobs})
        scheduler = Scheduler(pool, config, PROBE_TOKENS + 2)
        scheduler.add(Request.of_tokens("whole", token_ids, 1, arrived_at=0.0))
        scheduler.add(Request.of_tokens("half", token_ids[:half], 1 + PROBE_DECODED, arrived_at=0.0))
        limit = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 0.15
        while (batch := scheduler.schedule(0.0)) is not None:
            logits, ends = self.forward(scheduler.pack(batch)), batch.contexts[batch.sampled]
            for row, end in zip(logits, ends, strict=True):
                error = relative_error(row, expected[end - 1])
                if not error <= limit:
                    raise ModelError(
                        f"its logits differ from those of transformers by {error:.2g} > {limit:g}"
                    )
            scheduler.finish_step(batch, [token_ids[end % PROBE_TOKENS] for end in ends], 0.0)
        self.release()


def architecture(model: "PreTrainedModel") -> str:
    return str((model.config.architectures or [type(model).__name__])[0])


def told(error: Exception) -> str:
    """A reason of ours as it stands; what foreign code raised in one line."""
    if isinstance(error, ModelError):
        return str(error)
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def known_tokens(token_ids: Tensor, drawn: Tensor) -> Tensor:
    """Token ids in which -1 - k is the k-th of those that the last step drew."""
    return torch.where(token_ids < 0, drawn[(-1 - token_ids).clamp(min=0)], token_ids)


def probe_tokens(vocab_size: int, device: torch.device) -> Tensor:
    """[1, PROBE_TOKENS] token ids that differ as far as the vocabulary allows."""
    return torch.arange(PROBE_TOKENS, device=device)[None] % vocab_size


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of `expected` about its mean."""
    actual, expected = actual.double(), expected.double()
    spread = (expected - expected.mean()).square().mean()
    return float(((actual - expected).square().mean() / spread).sqrt())


def block_copier(
    move: BlockMove, block_tokens: int, device: torch.device
) -> Callable[[LayerPool, LayerPool], None]:
    """How keys and values of one layer are copied, from one pool to another or within one, in the order of the move.

    On a CPU a run of blocks is one copy: three times faster than gathering and scattering.
    """
    if device.type != "cpu":
        return block_rearranger(move, block_tokens, device)
    runs = runs_of(move)

    def copy(source: LayerPool, target: LayerPool) -> None:
        for taken, given, count in runs:
            for old, new in zip(source, target, strict=True):
                size = count * block_tokens
                new.narrow(1, given * block_tokens, size).copy_(old.narrow(1, taken * block_tokens, size))

    return copy


def block_rearranger(
    move: BlockMove, block_tokens: int, device: torch.device
) -> Callable[[LayerPool, LayerPool], None]:
    """The same, also within one pool whatever lies where: all is read before any is written."""
    taken, given = (sent(blocks.astype(np.int64), device) for blocks in move)

    def copy(source: LayerPool, target: LayerPool) -> None:
        for old, new in filled_of(source, target):
            blocks = in_blocks(old, block_tokens).index_select(1, taken)
            in_blocks(new, block_tokens).index_copy_(1, given, blocks)

    return copy


def block_gatherer(
    move: BlockMove, block_tokens: int, device: torch.device
) -> Callable[[LayerPool, LayerPool], None]:
    """The same between two pools, where the targets follow one another: each value is read and written once."""
    taken, first = sent(move.sources.astype(np.int64), device), int(move.targets[0])

    def copy(source: LayerPool, target: LayerPool) -> None:
        for old, new in filled_of(source, target):
            given = in_blocks(new, block_tokens).narrow(1, first, len(taken))
            torch.index_select(in_blocks(old, block_tokens), 1, taken, out=given)

    return copy


def filled_of(source: LayerPool, target: LayerPool) -> Iterator[tuple[Tensor, Tensor]]:
    """What is copied of one layer: where a token's keys and values lie in one piece, the second tensor has nothing."""
    return (pair for pair in zip(source, target, strict=True) if pair[0].shape[2])


def in_blocks(pool: Tensor, block_tokens: int) -> Tensor:
    """pool: [heads, slots, values]. Returns a view, [heads, blocks, block_tokens, values], of the whole blocks."""
    num_blocks = pool.shape[1] // block_tokens
    return pool.narrow(1, 0, num_blocks * block_tokens).unflatten(1, (num_blocks, block_tokens))


def slots_in(blocks: BlockIds, block_tokens: int) -> IntArray:
    """[blocks * block_tokens]"""
    return (blocks.astype(np.int64)[:, None] * block_tokens + np.arange(block_tokens)).ravel()


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
