"""Any Hugging Face causal LM that `generate` can continue, one request at a time: Mamba, Bloom, hybrids.

Nothing is asked of its attention or of its cache. `generate` runs in a thread of its own and is stopped at every token:

    step thread        forward ──token──▶                 forward returns, the sampler draws, forward ──token──▶
    generate's thread             cache, layers ──logits──▶ waits in the logits processor          cache, layers ...

The pool holds no keys and values but the known tokens, so a row always says which text it continues. Where that is not
the text being generated (another request, or the same one after it was preempted), `generate` starts anew: slow, and
right whatever the scheduler does.
"""

import contextlib
import inspect
import threading
from collections.abc import Mapping
from itertools import pairwise
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from runtime.batch import IntArray, PackedBatch
from runtime.errors import ModelError
from runtime.knobs import KnobValue
from runtime.paged_model import KVPools, KVShape, PagedModel, architecture, block_copier, probe_tokens, told

THREAD_NAME = "generate"


class PlainModel(PagedModel):
    """Tier C: `model.generate`, one request at a time."""

    model: PreTrainedModel
    tier = "C"
    why_fixed = "is computed one request at a time"
    # A prompt is computed whole, by `generate`, and no request finds what another one has computed.
    fixed_knobs: Mapping[str, KnobValue] = {
        "max_num_seqs": 1, "max_batched_tokens": 16384, "prefill_chunk": 16384, "prefix_cache": "off",
        "overlap_depth": 0, "speculation_length": 0, "kv_dtype": "auto", "linear_backend": "auto",
    }  # fmt: skip

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises ModelError if `generate` cannot continue texts with this model."""
        token_shape = KVShape(1, 1, 0, torch.int64)
        super().__init__(model.eval().requires_grad_(False), model.device, {0: token_shape})
        self._generation: Generation | None = None
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        # What a model folder suggests (penalties, beams, an end token) is for those who let transformers sample.
        model.generation_config = GenerationConfig()
        try:
            self._probe()
        except Exception as error:  # foreign code: whatever a model raises that was not made for this
            self.release()
            raise ModelError(
                f"{architecture(model)} cannot be served one request at a time: {told(error)}. Use a model that "
                "transformers' `generate` continues token by token with the logits of the whole text."
            ) from error

    def new_pool(self, shape: KVShape, slots: int) -> tuple[Tensor, Tensor]:
        """In host memory: tokens are compared there."""
        return (
            torch.zeros(shape.kv_heads, slots, shape.key_dim, dtype=shape.dtype),
            torch.zeros(shape.kv_heads, slots, shape.value_dim, dtype=shape.dtype),
        )

    def release(self) -> None:
        self.rest()
        super().release()

    def rest(self) -> None:
        """Ends what is being generated, with its thread and its cache."""
        if self._generation is not None:
            self._generation.end()
            self._generation = None

    def forward(self, packed: PackedBatch, pools: KVPools | None = None) -> Tensor:
        """Computes the last token of each row that is sampled, and the whole text where `pools` are given.

        Returns logits [sampled rows, vocab], float32 from `generate`, else of the model's type.
        """
        if packed.copies is not None:
            pool = self.pools[0]
            block_copier(packed.copies, packed.block_tokens, pool[0].device)(pool, pool)
        known = (self.pools if pools is None else pools)[0][0].view(-1).numpy()
        known[packed.slots] = packed.token_ids
        logits = []
        for row, (start, end) in enumerate(pairwise(packed.row_starts.tolist())):
            wanted = packed.last_tokens[(packed.last_tokens >= start) & (packed.last_tokens < end)]
            if not len(wanted):
                continue  # a piece of a prompt: `generate` takes it whole, with its last piece
            token_ids = known[slots_of(packed, row)]
            if pools is None:
                logits.append(self._next(token_ids, max_tokens=len(known)))
            else:
                logits.append(self._last(token_ids, end - start)[torch.from_numpy(wanted - start)])
        if not logits:
            return torch.empty(0, self.model.config.get_text_config().vocab_size, device=self.device)
        return torch.cat(logits)

    def _next(self, token_ids: IntArray, max_tokens: int) -> Tensor:
        """Logits [1, vocab] after a text, whose last token alone is computed if the rest was generated."""
        try:
            if self._generation is not None and self._generation.continues_to(token_ids):
                return self._generation.feed(int(token_ids[-1]))
            self.rest()
            self._generation = Generation(self.model, token_ids, max_tokens)
            return self._generation.logits()
        except BaseException:
            self.rest()
            raise

    @torch.inference_mode()
    def _last(self, token_ids: IntArray, num_tokens: int) -> Tensor:
        """Logits [num_tokens, vocab] of the last tokens of a text, all of which is computed, without a cache."""
        options = {"logits_to_keep": num_tokens} if self._keeps_logits else {}
        ids = torch.from_numpy(token_ids)[None].to(self.device)
        logits: Tensor = self.model(input_ids=ids, use_cache=False, **options).logits[0, -num_tokens:]
        return logits

    def _probe(self) -> None:
        self.model.set_attn_implementation("eager")  # complete; "sdpa" leaves out soft caps and sinks
        vocab_size = self.model.config.get_text_config().vocab_size
        token_ids = probe_tokens(vocab_size, self.device)[0].tolist()
        expected = self._last(np.array(token_ids), len(token_ids))
        self.check_against(expected, token_ids)


class Order(NamedTuple):
    """What the step thread tells `generate`. No token: end. `num_threads`: PyTorch counts them thread by thread."""

    token: int | None
    num_threads: int


class Generation(LogitsProcessor):
    """`generate` of one text, as the last logits processor of its own call. Used by one thread, the step thread."""

    def __init__(self, model: PreTrainedModel, token_ids: IntArray, max_tokens: int) -> None:
        """Starts at once. `max_tokens`: of prompt and output."""
        self._model, self._max_new_tokens = model, max_tokens - len(token_ids) + 1
        self._token_ids = np.zeros(max_tokens + 1, np.int64)
        self._num_tokens = len(token_ids)
        self._token_ids[: self._num_tokens] = token_ids
        self._orders: SimpleQueue[Order] = SimpleQueue()
        self._answers: SimpleQueue[Tensor | BaseException] = SimpleQueue()
        self._num_threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)
        self._thread.start()

    def continues_to(self, token_ids: IntArray) -> bool:
        """Whether the text is the one that was generated so far and one token more."""
        known = self._token_ids[: self._num_tokens]
        return len(token_ids) == len(known) + 1 and bool((token_ids[:-1] == known).all())

    def feed(self, token: int) -> Tensor:
        """Logits [1, vocab] after one token more."""
        self._token_ids[self._num_tokens] = token
        self._num_tokens += 1
        self._orders.put(Order(token, torch.get_num_threads()))
        return self.logits()

    def logits(self) -> Tensor:
        """Waits for those after the last token. Raises what `generate` raised."""
        answer = self._answers.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def end(self) -> None:
        """Returns when the thread has ended and let go of its cache."""
        self._orders.put(Order(None, 1))
        self._thread.join()

    # -- in the thread -----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._generate()
            raise RuntimeError("`generate` ended by itself")
        except _Ended:
            return
        except BaseException as error:
            self._answers.put(error)

    @torch.inference_mode()
    def _generate(self) -> None:
        device = self._model.device
        self._use_threads(self._num_threads)
        ids = torch.from_numpy(self._token_ids[None, : self._num_tokens]).to(device)
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self._model.generate(
                ids, max_new_tokens=self._max_new_tokens, logits_processor=LogitsProcessorList([self])
            )

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: [1, vocab]. Returns scores that leave no choice but the token that was drawn."""
        self._answers.put(scores)
        order = self._orders.get()
        if order.token is None:
            raise _Ended
        self._use_threads(order.num_threads)
        forced = torch.full_like(scores, -torch.inf)
        forced[0, order.token] = 0.0
        return forced

    def _use_threads(self, num_threads: int) -> None:
        if num_threads != torch.get_num_threads():
            torch.set_num_threads(num_threads)


class _Ended(Exception):
    """Unwinds `generate` from within."""


def slots_of(packed: PackedBatch, row: int) -> IntArray:
    """[context] where the row's tokens lie in the pool."""
    first = packed.block_tables[row].astype(np.int64)[:, None] * packed.block_tokens
    slots = (first + np.arange(packed.block_tokens)).reshape(-1)
    return slots[: packed.contexts[row]]
