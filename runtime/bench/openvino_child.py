"""Serves loads with openvino-genai: python openvino_child.py FOLDER THREADS. Runs where only openvino-genai is.

FOLDER holds the model as OpenVINO's own format, as `optimum-cli export openvino` writes it. One line of JSON in, a
load; one line out, its seconds and tokens. The first line out says that it is ready.
"""

import json
import sys
import time
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai


def main() -> None:
    folder, threads = sys.argv[1:3]
    cache = genai.SchedulerConfig()
    cache.max_num_seqs, cache.cache_size = 256, 2
    cache.enable_prefix_caching = False
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
