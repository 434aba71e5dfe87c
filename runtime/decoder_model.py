"""Our decoder over the paged pool: tier A. On a GPU with Triton by kernels, and steps of one token a row as graphs."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from runtime.bare_model import BareModel
from runtime.batch import PackedBatch
from runtime.captures import NUM_PARTS, Pools
from runtime.decode_graph import COMPILED_BUCKETS, Decoded, DecodeGraphs, padding
from runtime.decoder import Attention, Decoder
from runtime.fused_pass import DecodeInputs, Midway, MixedInputs, fused_pass
from runtime.kernels.launch import compiled_ahead
from runtime.knobs import EngineConfig
from runtime.kv_cache import BLOCK_TOKENS, BlockPool
from runtime.mixed_graph import MixedGraphs
from runtime.paged_model import (
    PROBE_TOKENS,
    KVPools,
    KVShape,
    LayerCopier,
    LayerPool,
    PagedModel,
    probe_tokens,
    slots_in,
)  # fmt: skip
from runtime.request import Request, SamplingParams
from runtime.retable import Retabled
from runtime.rounded_cache import STORED
from runtime.scheduler import Scheduler
from runtime.step_tensors import StepTensors
from runtime.transfer import sent
from runtime.warm_up import woken_steps

if TYPE_CHECKING:
    from runtime.hf_model import HFModel

CONVERTED_TOKENS = 65_536  # of a pool that is rounded or restored, at a time
WOKEN_BYTES = 64 * 2**20  # of queries, outputs and tables of the steps that are computed for what they launch


class DecoderModel(PagedModel):
    """A decoder over the paged pool. The model that it is made from shares its weights."""

    tier = "A"

    def __init__(self, plain: "HFModel | BareModel", max_model_len: int | None = None) -> None:
        """`plain`: the same model, found to work in tier B, or without code. `max_model_len`: tokens of the longest
        request; what the model was made for if not given.

        Raises:
            ModelError: another architecture, or logits that differ.
        """
        model: Any = plain if isinstance(plain, BareModel) else plain.model
        max_model_len = max_model_len or int(model.config.max_position_embeddings)
        self.decoder = Decoder(model, plain.attention_calls)
        shapes = {index: layer.attention.kv_shape for index, layer in enumerate(self.decoder.layers)}
        super().__init__(self.decoder, plain.device, shapes)
        parts = [layer.attention for layer in self.decoder.layers]
        free: set[str] = set()
        if heads := {
            index: part.rounded_shape for index, part in enumerate(parts) if isinstance(part, Attention)
        }:
            self._rounded_shapes, self.kv_dtypes = heads, ("auto", "fp8")
            free.add("kv_dtype")
        # Heads of their own are read in one piece; with a window a row alone reads no more than that.
        self._pads_like = all(isinstance(part, Attention) and part.window is None for part in parts)
        self._is_half = self.decoder.embedding.dtype in (torch.bfloat16, torch.float16)
        self._caches: tuple[KVPools, list[Any]] = ({}, [])
        self._fused = fused_pass(self.decoder, self.device, max_model_len)
        if self._fused is not None:
            self.kernels, self.replaced_kernels = self._fused.kernels, self._fused.replaced_kernels
            free.add("linear_backend")
        self.fixed_knobs = {name: value for name, value in self.fixed_knobs.items() if name not in free}
        self._graphs: DecodeGraphs | None = None
        self._mixed_graphs: MixedGraphs | None = None
        self._max_model_len, self._max_blocks = max_model_len, -(-max_model_len // BLOCK_TOKENS)
        token_ids = probe_tokens(self.decoder.embedding.shape[0], self.device)[0].tolist()
        expected = self._in_one_piece(token_ids) if isinstance(plain, BareModel) else plain.expected
        self.check_against(expected, token_ids)

    @torch.inference_mode()
    def _in_one_piece(self, token_ids: list[int]) -> Tensor:
        """The logits of each token, by no kernel of ours and nothing cached before: [tokens, vocab]."""
        pool = BlockPool(PROBE_TOKENS // BLOCK_TOKENS + 2)
        scheduler = Scheduler(pool, EngineConfig.of(self.fixed_knobs), PROBE_TOKENS + 2)
        scored = SamplingParams(num_prompt_logprobs=0)
        scheduler.add(Request.of_tokens("probe", token_ids, 1, 0.0, scored))
        batch = scheduler.schedule(0.0)
        assert batch is not None and batch.scored is not None
        self.allocate(pool.num_blocks)
        step = StepTensors.of(scheduler.pack(batch), self.device)
        logits = self.decoder.forward(step, self._caches_of(self.pools))
        self.release()
        return torch.cat((logits[1:], logits[:1]))  # what is drawn from comes first

    def shapes_of(self, kv_dtype: str) -> Mapping[int, KVShape]:
        return self._rounded_shapes if kv_dtype == "fp8" else self.kv_shapes

    def copier(self, move: Retabled, is_other_kind: bool) -> LayerCopier:
        if not is_other_kind:
            return super().copier(move, is_other_kind)
        kernels = self.kernels
        sources, targets = (sent(slots_in(blocks, move.block_tokens), self.device) for blocks in move.move)

        def copy(layer: int, source: LayerPool, target: LayerPool) -> None:
            part = self.decoder.layers[layer].attention
            taken, given = cache_of(part, source), cache_of(part, target)
            for old, new in zip(
                sources.split(CONVERTED_TOKENS), targets.split(CONVERTED_TOKENS), strict=True
            ):
                if given.scales is not None:
                    kernels.round_rows(given.rows, given.scales, taken.rows, old, new)
                else:
                    kernels.restore_rows(given.rows, taken.rows, taken.scales, old, new)

        return copy

    @torch.inference_mode()
    def forward(self, packed: PackedBatch, pools: KVPools | None = None) -> Tensor:
        if self._fused is not None:
            self._fused.use_blocks(packed.block_tokens)
        self.greedy = self.graph_rows = None
        logits = None
        if pools is None and packed.copies is None and self._graphs is not None:
            logits = self._replayed(packed, self._graphs)
        if logits is None:
            logits = super().forward(packed, pools)
        captures = [graphs.captures for graphs in self._all_graphs]
        for one in captures:  # here, where the device has something to do
            one.capture_due()
        has_captured = any(one.has_captured for one in captures)
        for one in captures:
            one.end_step(may_destroy=not has_captured)
        return logits

    def _replayed(self, packed: PackedBatch, graphs: DecodeGraphs) -> Tensor | None:
        """None where no graph can compute the step."""
        pools, mixed = self._pools_in(packed.block_tokens), self._mixed_graphs
        if graphs.takes(packed):
            decoded = graphs.replay(packed, pools, self.weights_key, self._decode, self.drawn)
            if decoded is not None:
                logits, self.greedy = decoded
                self.graph_rows = graphs.replayed_rows
                return logits
        elif mixed is not None and mixed.takes(packed, self.kv_dtype):
            hidden = mixed.replay(packed, pools, self.weights_key, self._mixed, self.drawn)
            if hidden is not None:
                assert self._fused is not None
                self.graph_rows = mixed.replayed_tokens
                return self._fused.logits(hidden.index_select(0, sent(packed.last_tokens, self.device)))
        return None

    def use_backend(self, linear_backend: str) -> None:
        if self._fused is not None:
            self._fused.linears.backend = linear_backend
        for graphs in self._all_graphs:
            graphs.backend = linear_backend

    def step_of(self, packed: PackedBatch) -> StepTensors:
        has_kernel = self._fused is not None
        step = StepTensors.of(packed, self.device, has_kernel, has_kernel and self._is_half, self._pads_like)
        if self._fused is not None:
            step.are_uneven = self._fused.are_uneven(packed.contexts[: step.num_apart], step.num_apart)
        return step

    def compute(self, step: StepTensors, pools: KVPools) -> Tensor:
        caches = self._caches_of(pools)
        if self._fused is None:
            return self.decoder.forward(step, caches)
        return self._fused.forward(step, caches)

    @torch.inference_mode()
    def prepare_steps(
        self, max_num_seqs: int, block_tokens: int = BLOCK_TOKENS, only_largest: bool = False
    ) -> bool:
        """Captures what steps of up to so many rows will replay, over the pools in force."""
        if self._fused is None:
            return True
        self._fused.use_blocks(block_tokens)
        if self._graphs is None:
            parts = self._fused.parts(NUM_PARTS)
            self._graphs = DecodeGraphs(self.device, self._max_blocks, parts, self._fused.are_uneven)
            if self._fused.may_capture_pieces and self.most_mixed_tokens and self._is_half:
                table = self.decoder.embedding
                self._mixed_graphs = MixedGraphs(
                    self.device, self.most_mixed_tokens, self._max_blocks, table.shape[1], table.dtype, parts,
                    self._fused.are_uneven,
                )
            self.use_backend(self._fused.linears.backend)
            self._wake_draws()
        pools = self._pools_in(block_tokens)
        is_done = self._graphs.prepare(max_num_seqs, pools, self.weights_key, self._decode, only_largest)
        if self._mixed_graphs is not None and is_done and self.kv_dtype == "auto":
            is_done = self._mixed_graphs.prepare(pools, self.weights_key, self._mixed)
        return is_done

    @torch.inference_mode()
    def capture_ahead(
        self, pools: KVPools, kv_dtype: str, block_tokens: int, weights_key: str, linear_backend: str
    ) -> bool:
        if self._fused is None or self._graphs is None:
            return False
        self._fused.use_blocks(block_tokens)  # as the next step does, and the next launch with the backend
        self.use_backend(linear_backend)
        in_force, (self.pools, self.kv_dtype) = (self.pools, self.kv_dtype), (pools, kv_dtype)
        try:
            read, mixed = self._pools_in(block_tokens), self._mixed_graphs
            if self._graphs.capture_ahead(read, weights_key, self._decode):
                return True
            if mixed is None or kv_dtype != "auto":
                return False
            return mixed.capture_ahead(read, weights_key, self._mixed)
        finally:
            self.pools, self.kv_dtype = in_force

    def _wake_draws(self) -> None:
        """Compiles and loads what draws tokens: of logits as they are, and of those that a request has shaped."""
        if self.device.type != "cuda":
            return
        vocab_size = len(self.decoder.embedding)
        params = torch.zeros(5, 1, dtype=torch.float64, device=self.device)
        with compiled_ahead():
            for dtype in {self.decoder.embedding.dtype, torch.float32}:
                logits = torch.zeros(1, vocab_size, dtype=dtype, device=self.device)
                self.kernels.greedy(logits)
                for has_top_k, has_top_p in product((False, True), repeat=2):
                    self.kernels.sample(logits, params, has_top_k, has_top_p)

    @property
    def captured_rows(self) -> Sequence[int]:
        return () if self._graphs is None else self._graphs.launched_rows

    def is_awake(self, kv_dtype: str, block_tokens: int) -> bool:
        has_own = any(isinstance(layer.attention, Attention) for layer in self.decoder.layers)
        return self._graphs is None or not has_own or self._graphs.is_awake(kv_dtype, block_tokens)

    @torch.inference_mode()
    def wake(self, kv_dtype: str, block_tokens: int) -> None:
        """Not for latents: their kernels multiply weights too."""
        if self._fused is None or self._graphs is None:
            return
        fused, shapes = self._fused.over_blocks(block_tokens), self.shapes_of(kv_dtype)
        slots = self._woken_slots(block_tokens)
        caches = [
            (part, cache_of(part, self.new_pool(shapes[at], slots)))
            for at, part in self._woken_layers(kv_dtype)
        ]
        for rows in COMPILED_BUCKETS:
            for part, cache in caches:
                fused.attend_only(padding(rows, self._max_blocks, self.device), part, cache)
            for packed in woken_steps(rows, block_tokens, self._max_model_len)[1]:
                step = self.step_of(packed)
                for part, cache in caches:
                    fused.attend_only(step, part, cache)
        self._graphs.take_as_awake(kv_dtype, block_tokens)

    def waking_bytes(self, kv_dtype: str, block_tokens: int) -> int:
        if self._fused is None or self._graphs is None:
            return 0
        shapes, slots = self.shapes_of(kv_dtype), self._woken_slots(block_tokens)
        pools = sum(slots * shapes[at].bytes_per_token for at, _ in self._woken_layers(kv_dtype))
        return pools + WOKEN_BYTES

    def _woken_slots(self, block_tokens: int) -> int:
        return woken_steps(COMPILED_BUCKETS[-1], block_tokens, self._max_model_len)[0] * block_tokens

    def _woken_layers(self, kv_dtype: str) -> Sequence[tuple[int, Attention]]:
        """One of each kind that launches kernels of its own over the cache."""
        shapes, parts = self.shapes_of(kv_dtype), [layer.attention for layer in self.decoder.layers]
        own = [(at, part) for at, part in enumerate(parts) if isinstance(part, Attention)]
        return list({(part.window, shapes[at]): (at, part) for at, part in own}.values())

    def forget(self, pools: KVPools | None = None, weights_key: str | None = None) -> None:
        if pools is not None and self._caches[0] is pools:
            self._caches = (
                {},
                [],
            )  # its views would keep a pool in memory that has to make room for the next
        for graphs in self._all_graphs:
            graphs.forget(None if pools is None else id(pools), weights_key)

    def rest(self) -> None:
        for graphs in self._all_graphs:
            graphs.captures.rest()

    def give_back(self) -> None:
        for graphs in self._all_graphs:
            graphs.captures.give_back()

    def release(self) -> None:
        self.forget(self.pools)
        self.give_back()
        super().release()

    @property
    def _all_graphs(self) -> "list[DecodeGraphs | MixedGraphs]":
        return [graphs for graphs in (self._graphs, self._mixed_graphs) if graphs is not None]

    def _decode(
        self, inputs: DecodeInputs, part: range | None = None, midway: Midway | None = None
    ) -> Midway | Decoded:
        assert self._fused is not None
        num_layers = len(self.decoder.layers)
        part = part or range(num_layers)
        midway = self._fused.decode(inputs, self._caches_of(self.pools), part, midway)
        if part.stop < num_layers:
            return midway
        logits = self._fused.logits(midway.y)
        return Decoded(logits, self._fused.greedy(logits))

    def _mixed(self, inputs: MixedInputs, x: Tensor, y: Tensor, part: range) -> None:
        assert self._fused is not None
        self._fused.mixed(inputs, self._caches_of(self.pools), x, y, part)

    def _pools_in(self, block_tokens: int) -> Pools:
        return Pools(id(self.pools), self.kv_dtype, block_tokens)

    def _caches_of(self, pools: KVPools) -> list[Any]:
        if self._caches[0] is not pools:
            parts = [layer.attention for layer in self.decoder.layers]
            caches = [cache_of(part, pool) for part, pool in zip(parts, pools.values(), strict=True)]
            self._caches = (pools, caches)
        return self._caches[1]


def cache_of(part: Any, pool: tuple[Tensor, Tensor]) -> Any:
    """One layer's pool as its attention reads and writes it."""
    return part.rounded_cache_of(pool) if pool[0].dtype == STORED else part.cache_of(pool[0][0])
