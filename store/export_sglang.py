"""SGLang: the arguments of `python -m sglang.launch_server`.

Source: `ServerArgs` of SGLang, whose fields are its arguments.
"""

from typing import Any

from store.export_flags import Target, Told, Values, export_flags, flag, nothing
from store.proof import Proof


def export_sglang(proof: Proof, tuner_version: str) -> str:
    return export_flags(SGLANG, proof, tuner_version)


def _policy(value: Any, values: Values, model: Values) -> Told:
    if value == "fcfs":
        return flag("--schedule-policy", "fcfs")
    if value == "longest_prefix":  # over 128 waiting requests SGLang goes back to the order of arrival
        return flag("--schedule-policy", "lpm")
    return nothing(
        "SGLang orders by arrival, by shared prefix (lpm, dfs-weight), by longest output (lof) or priority"
    )


def _weights(value: Any, values: Values, model: Values) -> Told:
    if value in ("float32", "bfloat16", "float16"):
        return flag("--dtype", value)
    return nothing(
        "quantise the checkpoint for SGLang and name it with --quantization; its kernels round otherwise"
    )


def _kv_dtype(value: Any, values: Values, model: Values) -> Told:
    if value == "auto":
        return flag("--kv-cache-dtype", value)
    return nothing(
        "SGLang's fp8 cache (--kv-cache-dtype fp8_e4m3) has one scale for all tokens of a layer, so it rounds otherwise"
    )


SGLANG = Target(
    name="SGLang",
    as_of="0.5.23",
    command=lambda model: ("python", "-m", "sglang.launch_server", "--model-path", model),
    context_flag="--context-length",
    knobs={
        "max_num_seqs": lambda value, values, model: flag("--max-running-requests", value),
        # Tokens of prompts that one step computes, beside the decodes that --enable-mixed-chunk lets into it.
        "max_batched_tokens": lambda value, values, model: Told(
            ("--chunked-prefill-size", str(value), "--enable-mixed-chunk")
        ),
        "prefill_chunk": lambda value, values, model: nothing(
            "SGLang bounds the prompt tokens of a step (--chunked-prefill-size), not those of one prompt"
        ),
        "policy": _policy,
        "batch_wait_ms": lambda value, values, model: nothing("SGLang starts a request at the next step"),
        "threads_decode": lambda value, values, model: nothing(
            "SGLang on a CPU binds its threads once (SGLANG_CPU_OMP_THREADS_BIND), for every kind of step"
        ),
        "threads_prefill": lambda value, values, model: nothing(
            "SGLang on a CPU binds its threads once (SGLANG_CPU_OMP_THREADS_BIND), for every kind of step"
        ),
        "max_queued_requests": lambda value, values, model: flag("--max-queued-requests", value),
        "weight_format": _weights,
        "kv_tokens": lambda value, values, model: flag("--max-total-tokens", value),
        "prefix_cache": lambda value, values, model: (
            Told(("--disable-radix-cache",)) if value == "off" else Told()
        ),
        "replicas": lambda value, values, model: flag("--data-parallel-size", value),
        "long_prompt_threshold": lambda value, values, model: nothing(
            "SGLang bounds the prompt tokens of a step (--chunked-prefill-size), not those of long prompts"
        ),
        "kv_watermark": lambda value, values, model: nothing(
            "SGLang keeps free what it guesses that running requests will write (--schedule-conservativeness)"
        ),
        "mixed_step_tokens": lambda value, values, model: nothing(
            "SGLang fills a step up to --chunked-prefill-size, whoever decodes in it; lower that where gaps between "
            "tokens matter more than a backlog"
        ),
        "overlap_depth": lambda value, values, model: nothing(
            "SGLang overlaps steps by itself (--disable-overlap-schedule)"
        ),
        "stream_interval": lambda value, values, model: flag("--stream-interval", value),
        "kv_block": lambda value, values, model: flag("--page-size", value),
        "kv_dtype": _kv_dtype,
        "linear_backend": lambda value, values, model: nothing("SGLang chooses by itself who multiplies"),
        "speculation_length": lambda value, values, model: (
            nothing("SGLang drafts trees from the texts of all requests (--speculative-algorithm NGRAM)")
            if value
            else Told()
        ),
        "speculation_max_seqs": lambda value, values, model: nothing(
            "SGLang drafts in every step or in none, whatever the number of requests"
        ),
    },
)
