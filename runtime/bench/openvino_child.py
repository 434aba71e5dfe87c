"""Serves loads with openvino-genai: python openvino_child.py FOLDER THREADS STEP_TOKENS. Runs where only that is.

FOLDER holds the model as OpenVINO's own format, with its tokenizer; STEP_TOKENS bounds the tokens of one step. One line
of JSON in, a load; one line out, its seconds and tokens. The first line out says that it is ready. This made both, on
Python 3.11, with openvino 2026.4.1, openvino-genai 2026.4.1, optimum-intel 2.2.0, transformers 5.5.4:

    python3.11 -m venv ov
    ov/bin/pip install torch==2.13.0  (a build for CPUs)
    ov/bin/pip install torch==2.13.0 openvino openvino-genai "optimum-intel[openvino]"
    ov/bin/pip uninstall --yes torchvision
    ov/bin/optimum-cli export openvino --model runtime/demo_model --task text-generation-with-past \\
        --weight-format fp32 ov-model
    python -m runtime.bench engine --openvino-python ov/bin/python --openvino-model ov-model

The torchvision that comes along is built for CUDA; beside a torch for CPUs it breaks the export, which needs none.
"""

import json
import sys
import time
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

KV_GB = 2  # more than any load of the benchmark fills with a small model


def main() -> None:
    folder, threads, step_tokens = sys.argv[1:]
    cache = genai.SchedulerConfig()
    cache.max_num_batched_tokens, cache.cache_size = int(step_tokens), KV_GB
    cache.enable_prefix_caching = False
    # It would take bfloat16 for its products and float16 for its cache where a CPU has them.
    properties: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": int(threads), "INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32",
    }  # fmt: skip
    print(json.dumps({"openvino": ov.__version__}), flush=True)
    pipelines: dict[int, Any] = {}
    for line in sys.stdin:
        load = json.loads(line)
        num_at_once = load["num_at_once"]
        if num_at_once not in pipelines:
            pipelines.clear()
            cache.max_num_seqs = num_at_once
            pipelines[num_at_once] = genai.ContinuousBatchingPipeline(folder, cache, "CPU", properties)
            brief = {**load, "output_tokens": [2] * len(load["prompts"])}
            serve(pipelines[num_at_once], brief)  # its first steps choose their kernels
        seconds, outputs = serve(pipelines[num_at_once], load)
        print(json.dumps({"seconds": seconds, "outputs": outputs}), flush=True)


def serve(pipeline: Any, load: dict[str, Any]) -> tuple[float, list[list[int]]]:
    ids = [ov.Tensor(np.array([prompt], np.int64)) for prompt in load["prompts"]]
    configs = [greedy(num) for num in load["output_tokens"]]
    started = time.perf_counter()
    found = pipeline.generate(ids, configs)
    return time.perf_counter() - started, [list(one.m_generation_ids[0]) for one in found]


def greedy(num_tokens: int) -> Any:
    config = genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = num_tokens
    config.ignore_eos = True
    config.do_sample = False
    return config


if __name__ == "__main__":
    main()
