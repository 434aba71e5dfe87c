"""Logprobs of prompts out of the engine beside a plain forward pass of transformers, in float64: however they are cut,
in whatever company, and preempted."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import runtime.scheduler
from runtime.batch import Batch, PackedBatch
from runtime.clock import Clock
from runtime.engine import Engine
from runtime.executor import Executor
from runtime.knobs import EngineConfig
from runtime.link import Frame
from runtime.loader import load_model
from runtime.logprobs import prompt_logprobs_of
from runtime.plan import PlanRunner
from tests.runtime.tiny_models import VOCAB, generate, save_tiny_model

FAMILIES = ("qwen2", "gemma2", "mistral")  # whole attention, soft caps, windows
MAX_ERROR = 1e-5  # norms and rotations are computed in float32 whatever the type of the model


class Scored:
    """An engine of this process on a pool of `kv_tokens`, and what it sent of each request."""

    def __init__(self, folder: Path, kv_tokens: int = 512, **knobs: Any) -> None:
        loaded = load_model(folder, torch.device("cpu"), torch.float64)
        config = EngineConfig.of({"max_num_seqs": 8, "prefill_chunk": 64, **knobs})
        executor = Executor(loaded, kv_tokens, config)
        self.model, self.frames = loaded.model, list[Frame]()
        self.batches: list[Batch] = []
        self.packed: list[PackedBatch] = []
        launch = executor.launch

        def seen(batch: Batch, packed: PackedBatch, config: EngineConfig) -> Any:
            self.batches.append(batch)
            self.packed.append(packed)
            return launch(batch, packed, config)

        executor.launch = seen  # type: ignore[method-assign]
        runner = PlanRunner(executor.warm.in_force(config))
        self.engine = Engine(executor, runner, Clock.started_now(), self.frames.append)

    def submit(self, id: str, prompt: list[int], num: int | None = None, max_tokens: int = 1) -> None:
        sampling = {} if num is None else {"num_prompt_logprobs": num}
        self.engine.submit({
            "op": "submit", "id": id, "token_ids": prompt, "max_tokens": max_tokens, "sampling": sampling,
            "stop_token_ids": [], "ignore_eos": True, "arrived_at": 0.0,
        })  # fmt: skip

    def run(self, num_steps: int = 10_000) -> None:
        while num_steps and self.engine.step():
            num_steps -= 1

    def tokens_of(self, id: str) -> list[int]:
        items = [item for frame in self.frames if frame["op"] == "tokens" for item in frame["items"]]
        return [item[1] for item in items if item[0] == id]

    def pieces_of(self, id: str) -> list[Frame]:
        return [frame for frame in self.frames if frame["op"] == "prompt_logprobs" and frame["id"] == id]

    def scores_of(self, id: str) -> list[Any]:
        """Put together, after a look that they follow one another without gap or overlap."""
        scores: list[Any] = []
        for piece in self.pieces_of(id):
            assert piece["start"] == len(scores)
            scores += piece["logprobs"]
        return scores


def prompts(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, VOCAB, length).tolist() for length in lengths]


@torch.inference_mode()
def assert_as_a_forward_pass(model: Any, prompt: list[int], scores: list[Any], num: int) -> None:
    logs = torch.log_softmax(model(torch.tensor([prompt])).logits[0].double(), -1)
    assert len(scores) == len(prompt) - 1
    for at, (logprob, rank, top) in enumerate(scores):
        true = float(logs[at, prompt[at + 1]])
        assert logprob == pytest.approx(true, abs=MAX_ERROR)
        assert (logs[at] > true + MAX_ERROR).sum() < rank <= (logs[at] >= true - MAX_ERROR).sum()
        values, ids = logs[at].topk(num)
        assert [token for token, _ in top] == ids.tolist()
        assert [value for _, value in top] == pytest.approx(values.tolist(), abs=MAX_ERROR)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    model.generation_config.eos_token_id = None
    return model


def test_a_prompt_read_at_once_has_the_logprobs_of_a_forward_pass(folder: Path, reference: Any) -> None:
    here, (prompt,) = Scored(folder), prompts(60)
    here.submit("a", prompt, num=4)
    here.run()
    assert len(here.pieces_of("a")) == 1
    assert_as_a_forward_pass(reference, prompt, here.scores_of("a"), 4)


def test_cut_mixed_and_preempted_prompts_have_them_too(
    folder: Path, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime.scheduler, "SCORED_PIECE_TOKENS", 3)
    here = Scored(folder, kv_tokens=288, max_batched_tokens=40, prefill_chunk=16)
    decoded, asked = prompts(20, 23, 26, 29), prompts(80, 40, 2, 1, 33)
    for index, prompt in enumerate(decoded):
        here.submit(f"decodes {index}", prompt, max_tokens=40)
    here.run(4)
    for index, prompt in enumerate(asked):
        here.submit(f"scored {index}", prompt, num=index)
    here.run()
    for index, prompt in enumerate(decoded):
        assert here.tokens_of(f"decodes {index}") == generate(reference, prompt, 40)
    for index, prompt in enumerate(asked):
        assert_as_a_forward_pass(reference, prompt, here.scores_of(f"scored {index}"), index)
        assert here.tokens_of(f"scored {index}") == generate(reference, prompt, 1)
    scored = [batch for batch in here.batches if batch.scored is not None]
    preempted = [batch for batch in scored if batch.requests[batch.scored.row].num_preemptions]
    assert preempted and any(batch.num_decode for batch in scored), "the test must reach what it claims"
    assert max(len(packed.last_tokens) - batch.sampled.sum() for packed, batch in zip(
        here.packed, here.batches, strict=True)) == 3  # fmt: skip


@pytest.mark.parametrize("num", [0, 3])
def test_a_cached_prefix_is_scored_nevertheless_and_found_by_others(
    folder: Path, reference: Any, num: int
) -> None:
    here, (prompt,) = Scored(folder, prefix_cache="on"), prompts(60)
    here.submit("first", prompt, num)
    here.run()
    here.submit("again", prompt, num)
    here.run()
    assert here.engine.scheduler.num_hit_tokens == here.engine.scheduler.num_looked_up_tokens == 0
    here.submit("reads", prompt)
    here.run()
    assert here.engine.scheduler.num_hit_tokens == 48
    for id in ("first", "again"):
        assert_as_a_forward_pass(reference, prompt, here.scores_of(id), num)
    assert here.tokens_of("reads") == here.tokens_of("again") == generate(reference, prompt, 1)


def test_a_prompt_whose_logits_are_not_numbers_fails_alone(tmp_path: Path) -> None:
    here = Scored(save_tiny_model("qwen2", tmp_path))
    with torch.no_grad():
        here.model.get_input_embeddings().weight[50] = torch.nan
    here.submit("good", [3, 4, 5], num=1)
    here.submit("bad", [3, 50, 4], num=1)
    here.submit("ends badly", [3, 4, 50], num=1)
    here.run()
    failed = [(frame["id"], frame["kind"]) for frame in here.frames if frame["op"] == "failed"]
    assert failed == [("bad", "nan_logits"), ("ends badly", "nan_logits")]
    assert len(here.scores_of("good")) == 2 and len(here.tokens_of("good")) == 1
    assert here.engine.scheduler.pool.num_held == 0 and not here.engine.scheduler.has_requests


def test_nobody_who_asks_for_nothing_gets_more_logits(tmp_path: Path) -> None:
    here = Scored(save_tiny_model("qwen2", tmp_path))
    for index, prompt in enumerate(prompts(60, 5)):
        here.submit(str(index), prompt, max_tokens=3)
    here.run()
    assert [len(packed.last_tokens) for packed in here.packed[-3:]] == [2, 2, 2]
    assert all(batch.scored is None for batch in here.batches)
    assert not [frame for frame in here.frames if frame["op"] == "prompt_logprobs"]


def test_a_rank_counts_the_tokens_that_are_as_likely() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, float("-inf")]])
    first, second = ranked(logits, [1, 3])
    assert (first.rank, second.rank, second.logprob) == (2, 4, float("-inf"))
    assert [one.rank for one in ranked(logits[[0, 0]], [3, 0])] == [3, 4]
    assert prompt_logprobs_of(torch.full((1, 4), torch.nan), [0], 1) is None


def ranked(logits: torch.Tensor, targets: Iterable[int]) -> list[Any]:
    return prompt_logprobs_of(logits, list(targets), 0) or []
