"""What the comparison with other engines rests on: equal work, equal tokens, ratios within a turn."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime.bench import speculation
from runtime.bench.engine import TRACE, compare
from runtime.bench.loads import (
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    SPREAD,
    Load,
    equal_load,
    ragged_load,
    trace_lengths,
)
from runtime.bench.peers import ContinuousBatching, Engine, Generate, OpenVino, Ours, Served
from runtime.executor import Executor
from runtime.knobs import EngineConfig
from runtime.loader import load_model
from tests.runtime.tiny_models import VOCAB, save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("qwen2", tmp_path_factory.mktemp("model") / "tiny")


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_ragged_requests_have_the_averages_of_equal_ones_and_the_spread_of_the_trace() -> None:
    load = ragged_load(32, VOCAB, 1.0, trace_lengths(TRACE), rng())
    prompts = np.array([len(prompt) for prompt in load.prompts])
    outputs = np.array(load.output_tokens)
    assert len(prompts) == 96 and load.num_tokens == outputs.sum()
    assert prompts.mean() == pytest.approx(PROMPT_TOKENS, rel=0.1)
    assert outputs.mean() == pytest.approx(OUTPUT_TOKENS, rel=0.25), "the longest are cut"
    assert outputs.max() == SPREAD * OUTPUT_TOKENS and outputs.std() > 0.8 * outputs.mean()
    assert set(equal_load(8, VOCAB, 0.5, rng()).output_tokens) == {OUTPUT_TOKENS // 2}


def test_every_engine_gives_each_request_the_tokens_of_generate(folder: Path) -> None:
    config = EngineConfig.of({"prefill_chunk": 16, "max_batched_tokens": 40})
    ours, generate = (load_model(folder, torch.device("cpu"), torch.float64) for _ in range(2))
    engines: list[Engine] = [Ours(ours, config, 1024), Generate(generate.model)]
    for load in (
        equal_load(3, VOCAB, 0.2, rng()),
        ragged_load(4, VOCAB, 0.2, trace_lengths(TRACE), rng()),
    ):
        rows = compare(engines, load, num_turns=1)
        assert [row.same_share for row in rows] == [1.0, 1.0]
        assert rows[1].products_share is None and 0.02 < (rows[0].products_share or 0.0) < 0.98
        assert [len(output) for output in engines[0].serve(load).outputs] == load.output_tokens


def test_a_text_that_stands_in_for_what_is_drawn_says_how_often_drafts_are_right(folder: Path) -> None:
    config = EngineConfig.of({})
    executor = Executor(load_model(folder, torch.device("cpu"), torch.float32), 2048, config)
    rows = {}
    for name in speculation.LOADS:
        script = speculation.script_of(name, 2, VOCAB, 0.2, rng())
        rows[name] = dict(zip((0, 4), speculation.compare(executor, config, script, [4], 1), strict=True))
    assert all(row[0].num_drafted == 0 and row[0].ratio == 1.0 for row in rows.values())
    copy, edit, random = (rows[name][4] for name in ("copy", "edit", "random"))
    assert copy.right_share is not None and edit.right_share is not None
    assert copy.right_share > edit.right_share > 0.3
    assert (
        copy.num_steps < 0.6 * rows["copy"][0].num_steps
        and random.num_steps > 0.8 * rows["random"][0].num_steps
    )


def test_continuous_batching_of_transformers_serves_the_same_load(folder: Path) -> None:
    plain, batching = (load_model(folder, torch.device("cpu"), torch.float32) for _ in range(2))
    load = ragged_load(2, VOCAB, 0.1, trace_lengths(TRACE), rng())
    served = ContinuousBatching(batching.model, EngineConfig()).serve(load)
    assert served.outputs == Generate(plain.model).serve(load).outputs


@pytest.mark.skipif(importlib.util.find_spec("openvino_genai") is not None, reason="it would start here")
def test_a_python_without_openvino_is_refused_before_anything_is_served(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="openvino-genai ended with 1"):
        OpenVino(Path(sys.executable), folder, 1, EngineConfig())


class Scripted:
    """Takes the seconds that it was told to."""

    def __init__(self, name: str, *seconds: float) -> None:
        self.name, self.left = name, list(seconds)

    def serve(self, load: Load) -> Served:
        return Served(self.left.pop(0), [[1], [2]])


def test_ratios_are_taken_within_a_turn_and_each_engine_begins_in_turn() -> None:
    load = Load("equal", 2, [[5], [6]], [1, 1])
    slow_turn = (1.0, 2.0, 30.0)  # the machine was busy in the last turn
    rows = compare(
        [Scripted("tuner", *(0.5 * s for s in slow_turn)), Scripted("generate", *slow_turn)], load, 3
    )
    assert rows[0].ratio_to_generate == rows[0].lowest_ratio == rows[0].highest_ratio == 2.0
    assert rows[0].tokens_per_s == 2.0 and rows[1].tokens_per_s == 1.0
