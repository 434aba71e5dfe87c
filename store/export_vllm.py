"""vLLM: the arguments of `vllm serve`.

Source: `SchedulerConfig`, `CacheConfig`, `ParallelConfig` and `ModelConfig` of vLLM, whose fields are its arguments.
"""

import json
from collections.abc import Sequence
from typing import Any

from store.export_flags import Target, Told, Values, export_flags, flag, nothing
from store.proof import Proof


def export_vllm(proof: Proof, tuner_version: str) -> str:
    return export_flags(VLLM, proof, tuner_version)


def _policy(value: Any, values: Values, model: Values) -> Told:
    if value in ("fcfs", "priority"):  # the lowest number first, there as here
        return flag("--scheduling-policy", value)
    return nothing("vLLM admits by arrival or by a priority that the client gives")


def _piece(value: Any, values: Values, model: Values) -> Told:
    """The longest piece of one prompt in a step, here and there. Long prompts have a second bound here."""
    return flag("--long-prefill-token-threshold", min(value, values.get("long_prompt_threshold", value)))


def _weights(value: Any, values: Values, model: Values) -> Told:
    if value in ("float32", "bfloat16", "float16"):
        return flag("--dtype", value)
    return nothing(
        "quantise the checkpoint for vLLM and name it with --quantization; its kernels round otherwise"
    )


def _kv(value: Any, values: Values, model: Values) -> Told:
    """vLLM takes bytes of one GPU."""
    if not model.get("kv_bytes_per_token"):
        return nothing(
            "vLLM sizes the cache in bytes (--kv-cache-memory-bytes), and a token's are not recorded"
        )
    return flag("--kv-cache-memory-bytes", int(value) * int(model["kv_bytes_per_token"]))


def _kv_dtype(value: Any, values: Values, model: Values) -> Told:
    if value == "auto":
        return flag("--kv-cache-dtype", value)
    return nothing(
        "vLLM's fp8 cache (--kv-cache-dtype fp8) has one scale for all tokens of a layer, so it rounds otherwise"
    )


def _queue(value: Any, values: Values, model: Values) -> Told:
    """vLLM counts requests that run too, and all replicas behind one server."""
    running = int(values.get("max_num_seqs", 0)) * int(values.get("replicas", 1))
    return flag("--max-num-queued-reqs", int(value) + running)


def _draft(value: Any, values: Values, model: Values) -> Told:
    """n-grams of two to four tokens, there as here; a request is not drafted shorter there when drafts are wrong."""
    if not value:
        return Told()
    told = {
        "method": "ngram", "num_speculative_tokens": value, "prompt_lookup_min": 2, "prompt_lookup_max": 4,
    }  # fmt: skip
    return flag("--speculative-config", json.dumps(told))


def _notes(values: Values) -> Sequence[str]:
    if values.get("max_batched_tokens", 0) < values.get("max_num_seqs", 0):
        return ["vLLM refuses fewer batched tokens than sequences: raise --max-num-batched-tokens."]
    return ()


VLLM = Target(
    name="vLLM",
    as_of="0.33",
    command=lambda model: ("vllm", "serve", model),
    context_flag="--max-model-len",
    knobs={
        "max_num_seqs": lambda value, values, model: flag("--max-num-seqs", value),
        "max_batched_tokens": lambda value, values, model: flag("--max-num-batched-tokens", value),
        "prefill_chunk": _piece,
        "policy": _policy,
        "batch_wait_ms": lambda value, values, model: nothing("vLLM starts a request at the next step"),
        "threads_decode": lambda value, values, model: nothing(
            "vLLM on a CPU binds its threads once (VLLM_CPU_OMP_THREADS_BIND), for every kind of step"
        ),
        "threads_prefill": lambda value, values, model: nothing(
            "vLLM on a CPU binds its threads once (VLLM_CPU_OMP_THREADS_BIND), for every kind of step"
        ),
        "max_queued_requests": _queue,
        "weight_format": _weights,
        "kv_tokens": _kv,
        "prefix_cache": lambda value, values, model: Told(
            ("--enable-prefix-caching",) if value == "on" else ("--no-enable-prefix-caching",)
        ),
        "replicas": lambda value, values, model: flag("--data-parallel-size", value),
        "long_prompt_threshold": lambda value, values, model: nothing(
            "vLLM bounds the piece of each prompt (--long-prefill-token-threshold, the smaller of this and "
            "prefill_chunk), not those of all long prompts together"
        ),
        # What running requests hold is no obstacle to the first one, there as here.
        "kv_watermark": lambda value, values, model: flag("--watermark", value),
        "mixed_step_tokens": lambda value, values, model: nothing(
            "vLLM fills a step up to --max-num-batched-tokens, whoever decodes in it; lower that where gaps between "
            "tokens matter more than a backlog"
        ),
        "overlap_depth": lambda value, values, model: nothing(
            "vLLM decides for itself whether steps overlap (--async-scheduling)"
        ),
        "stream_interval": lambda value, values, model: flag("--stream-interval", value),
        "kv_block": lambda value, values, model: flag("--block-size", value),
        "kv_dtype": _kv_dtype,
        "linear_backend": lambda value, values, model: nothing("vLLM chooses by itself who multiplies"),
        "speculation_length": _draft,
        "speculation_max_seqs": lambda value, values, model: nothing(
            "vLLM plans the length of a draft by batch size (num_speculative_tokens_per_batch_size in "
            "--speculative-config)"
        ),
    },
    notes=_notes,
)
