"""Any Hugging Face causal LM over the paged pool: rows packed as one sequence, attention replaced by ours.

transformers calls the attention function that we register; because its name has no mask function, no mask
is built. The cache is ours, so `use_cache` is off. Whether a model can be served so is found by trying.
"""

import inspect

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from runtime.attention import PagedAttention, attend_plain, registered_attention
from runtime.errors import ModelError
from runtime.paged_model import (
    AttentionCall,
    KVPools,
    KVShape,
    PagedModel,
    architecture,
    probe_tokens,
    told,
)
from runtime.step_tensors import StepTensors, allowed_positions

ATTENTION_NAME = "tuner_paged"
PAGED_LAYERS = {"full_attention", "sliding_attention", "attention"}

AttentionInterface.register(ATTENTION_NAME, registered_attention)


class ShapeProbe:
    """Stands in for `PagedAttention` during one forward pass without a pool, and notes what each layer asks for."""

    def __init__(self) -> None:
        self.calls: dict[int, AttentionCall] = {}

    @property
    def shapes(self) -> dict[int, KVShape]:
        return {layer: call.shape for layer, call in self.calls.items()}

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
        scaling = scaling or dim**-0.5
        shape = KVShape(kv_heads, dim, value.shape[-1], key.dtype)
        is_special = softcap is not None or s_aux is not None
        self.calls[module.layer_idx] = AttentionCall(shape, scaling, sliding_window, is_special)
        grouped = query[0].unflatten(0, (kv_heads, -1))
        allowed = allowed_positions(num_tokens, num_tokens, sliding_window, query.device)
        out = attend_plain(grouped, key[0], value[0], allowed, scaling, softcap, s_aux)
        return out.permute(2, 0, 1, 3).flatten(1, 2)[None]


class HFModel(PagedModel):
    """Tier B: the model's own code, but for attention."""

    tier = "B"

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises ModelError if the architecture cannot be served this way."""
        super().__init__(model.eval().requires_grad_(False), model.device, {})
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._attention = PagedAttention()
        self.expected = torch.empty(
            0
        )  # logits of the probe prompt, [PROBE_TOKENS, vocab], until they are forgotten
        try:
            self.attention_calls = self._probe(model)
        except Exception as error:  # foreign code: whatever a model raises that was not made for this
            self.release()
            raise ModelError(
                f"{architecture(model)} cannot be served with a paged cache: {told(error)}. Models can whose attention "
                "goes through transformers' AttentionInterface (Llama, Qwen, Mistral, DeepSeek and most others)."
            ) from error

    def forget_probe(self) -> None:
        """Gives the memory of the probe's logits back."""
        self.expected = torch.empty(0)

    def compute(self, step: StepTensors, pools: KVPools) -> Tensor:
        self._attention.step, self._attention.pools = step, pools
        try:
            return self._call(step.token_ids, step.positions, step.last_tokens)
        finally:
            self._attention.step, self._attention.pools = None, {}

    def _call(self, token_ids: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
        if self._keeps_logits:
            out = self.model(
                input_ids=token_ids, position_ids=positions, use_cache=False, logits_to_keep=keep
            )
            kept: Tensor = out.logits[0]
            return kept
        logits: Tensor = self.model(input_ids=token_ids, position_ids=positions, use_cache=False).logits
        return logits[0, keep]

    # -- finding out whether the model can be served ---------------------------------------------------------

    @torch.inference_mode()
    def _probe(self, model: PreTrainedModel) -> dict[int, AttentionCall]:
        """Runs a short prompt as transformers would and as we do; returns how each layer calls attention."""
        check_layers(model)
        token_ids = probe_tokens(model.config.get_text_config().vocab_size, self.device)
        positions = torch.arange(token_ids.shape[1], device=self.device)[None]
        self.expected = expected_logits(model, token_ids)
        probe = ShapeProbe()
        model.set_attn_implementation(ATTENTION_NAME)
        self._attach(probe)
        self._call(token_ids, positions, positions[0, -1:])
        if not probe.calls:
            raise ModelError("no layer calls the registered attention function")
        self.kv_shapes = probe.shapes
        self._attach(self._attention)
        self.check_against(self.expected, token_ids[0].tolist())
        return probe.calls

    def _attach(self, attention: PagedAttention | ShapeProbe) -> None:
        for module in self.model.modules():
            if hasattr(module, "layer_idx"):
                object.__setattr__(module, "paged_attention", attention)


def check_layers(model: PreTrainedModel) -> None:
    """Raises ModelError where a layer needs more than the keys and values of a window, as far as the model tells.

    A short probe may miss it: a state that has hardly begun, chunks and indices longer than the prompt.
    """
    layer_types = getattr(model.config.get_text_config(), "layer_types", None) or ()
    if others := sorted(set(layer_types) - PAGED_LAYERS):
        raise ModelError(f"it has layers of {', '.join(others)}")
    if getattr(model, "_is_stateful", False):
        raise ModelError("it keeps a state beside keys and values")


@torch.inference_mode()
def expected_logits(model: PreTrainedModel, token_ids: Tensor) -> Tensor:
    """What transformers computes. token_ids: [1, T]. Returns [T, vocab]."""
    model.set_attn_implementation("eager")  # complete; "sdpa" leaves out soft caps and sinks
    logits: Tensor = model(input_ids=token_ids, use_cache=False).logits
    return logits[0]
