"""Our decoder over the paged pool: tier A. On a GPU with Triton by kernels, and steps of one token a row as graphs."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from runtime.attention import StepTensors
from runtime.bare_model import BareModel
from runtime.batch import PackedBatch
from runtime.decode_graph import Decoded, DecodeGraphs
from runtime.decoder import Attention, Decoder
from runtime.fused_pass import DecodeInputs, fused_pass
from runtime.knobs import EngineConfig
from runtime.kv_cache import BLOCK_TOKENS, BlockPool
from runtime.paged_model import PROBE_TOKENS, KVPools, KVShape, PagedModel, probe_tokens, slots_in
from runtime.request import Request, SamplingParams
from runtime.retable import Retabled
from runtime.rounded_cache import STORED
from runtime.scheduler import Scheduler

if TYPE_CHECKING:
    from runtime.hf_model import HFModel

CONVERTED_TOKENS = 65_536  # of a pool that is rounded or restored, at a time


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
        if heads := {
            index: part.rounded_shape for index, part in enumerate(parts) if isinstance(part, Attention)
        }:
            self._rounded_shapes, self.kv_dtypes, self.fixed_knobs = heads, ("auto", "fp8"), {}
        self._caches: tuple[KVPools, list[Any]] = ({}, [])
        self._fused = fused_pass(self.decoder, self.device, max_model_len)
        if self._fused is not None:
            self.replaced_kernels = self._fused.replaced_kernels
        self._graphs: DecodeGraphs | None = None
        self._max_blocks = -(-max_model_len // BLOCK_TOKENS)
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

    def copy_pool(
        self, layer: int, source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor], move: Retabled
    ) -> None:
        if source[0].dtype == target[0].dtype:
            super().copy_pool(layer, source, target, move)
            return
        part = self.decoder.layers[layer].attention
        taken, given = cache_of(part, source), cache_of(part, target)
        sources, targets = (slots_in(blocks, move.block_tokens).to(self.device) for blocks in move.move)
        for old, new in zip(sources.split(CONVERTED_TOKENS), targets.split(CONVERTED_TOKENS), strict=True):
            given.write(new, taken.read(old))

    @torch.inference_mode()
    def forward(self, packed: PackedBatch, pools: KVPools | None = None) -> Tensor:
        graphs = self._graphs
        if self._fused is not None:
            self._fused.use_blocks(packed.block_tokens)
        if graphs is not None and pools is None and packed.copies is None and graphs.takes(packed):
            decoded = graphs.replay(packed, id(self.pools), self.weights_key, self._decode, self.drawn)
            if decoded is not None:
                logits, self.greedy = decoded
                return logits
        self.greedy = None
        return super().forward(packed, pools)

    def step_of(self, packed: PackedBatch) -> StepTensors:
        has_kernel = self._fused is not None
        is_half = self.decoder.embedding.dtype in (torch.bfloat16, torch.float16)
        return StepTensors.of(packed, self.device, has_kernel, packs_pieces=has_kernel and is_half)

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
        self._graphs = self._graphs or DecodeGraphs(self.device, self._max_blocks)
        return self._graphs.prepare(
            max_num_seqs, id(self.pools), self.weights_key, block_tokens, self._decode, only_largest
        )

    def forget(self, pools: KVPools | None = None, weights_key: str | None = None) -> None:
        if pools is not None and self._caches[0] is pools:
            self._caches = (
                {},
                [],
            )  # its views would keep a pool in memory that has to make room for the next
        if self._graphs is not None:
            self._graphs.forget(None if pools is None else id(pools), weights_key)

    def release(self) -> None:
        self.forget(self.pools)
        super().release()

    def _decode(self, inputs: DecodeInputs) -> Decoded:
        assert self._fused is not None
        logits = self._fused.decode(inputs, self._caches_of(self.pools))
        return Decoded(logits, self._fused.greedy(logits))

    def _caches_of(self, pools: KVPools) -> list[Any]:
        if self._caches[0] is not pools:
            parts = [layer.attention for layer in self.decoder.layers]
            caches = [cache_of(part, pool) for part, pool in zip(parts, pools.values(), strict=True)]
            self._caches = (pools, caches)
        return self._caches[1]


def cache_of(part: Any, pool: tuple[Tensor, Tensor]) -> Any:
    """One layer's pool as its attention reads and writes it."""
    return part.rounded_cache_of(pool) if pool[0].dtype == STORED else part.cache_of(pool[0][0])
