"""Models that `generate` continues one request at a time, behind the same engine as those with a paged cache."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime.engine import MODEL_ERROR_EXIT_CODE
from runtime.errors import InvalidKnob, ModelError
from runtime.executor import servable
from runtime.knobs import EngineConfig
from runtime.kv_cache import BlockPool
from runtime.plain_model import THREAD_NAME, PlainModel
from runtime.request import Request, SamplingParams
from runtime.sampling import sample
from runtime.scheduler import Scheduler
from tests.runtime.test_engine import LIMIT_S, EngineChild, InProcess, ends_of, submission, tokens_of
from tests.runtime.tiny_models import EOS, VOCAB, generate, save_tiny_model, tiny_model

FAMILIES = ("mamba", "bloom", "lfm2", "jamba")
LENGTHS = (7, 40, 1, 23)


def prompts(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, VOCAB, length).tolist() for length in lengths]


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]


def expected_tokens(family: str, asked: list[list[int]], max_tokens: int) -> list[list[int]]:
    """What transformers makes of the saved weights, which are float32."""
    reference = tiny_model(family, torch.float32).double()
    return [generate(reference, prompt, max_tokens) for prompt in asked]


def engine_of(family: str, tmp_path: Path, **knobs: Any) -> InProcess:
    return InProcess(save_tiny_model(family, tmp_path / family), **knobs)


def run(model: PlainModel, scheduler: Scheduler, requests: list[Request]) -> None:
    for request in requests:
        scheduler.add(request)
    while (batch := scheduler.schedule(0.0)) is not None:
        logits = model.forward(scheduler.pack(batch))
        tokens = sample(logits, batch.sampled_requests()) if len(logits) else []
        scheduler.finish_step(batch, [token for token in tokens if token is not None], 0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_queued_requests_get_the_tokens_of_generate(family: str, tmp_path: Path) -> None:
    asked = prompts(*LENGTHS)
    here = engine_of(family, tmp_path)
    for index, prompt in enumerate(asked):
        here.engine.submit(submission(str(index), prompt, max_tokens=12))
    here.run()
    assert [tokens_of(here.frames, str(index)) for index in range(4)] == expected_tokens(family, asked, 12)
    running = [frame["record"]["num_running"] for frame in here.frames if frame["op"] == "step"]
    assert max(running) == 1 and threads() == []


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_of_prompts_company_and_preemption_change_no_token(family: str) -> None:
    """More than the engine lets happen: requests that take turns, each computed anew at its turn."""
    reference = tiny_model(family)
    asked = prompts(*LENGTHS)
    expected = [generate(reference, prompt, 12) for prompt in asked]
    model, pool = PlainModel(reference), BlockPool(5)
    model.allocate(pool.num_blocks)
    config = EngineConfig.of({"max_num_seqs": 3, "max_batched_tokens": 20, "prefill_chunk": 16})
    scheduler = Scheduler(pool, config, 80)
    requests = [Request.of_tokens(str(i), prompt, 12, arrived_at=0.0) for i, prompt in enumerate(asked)]
    run(model, scheduler, requests)
    assert [request.output_ids.tolist() for request in requests] == expected
    assert scheduler.num_preemptions > 0, "the test must reach what it claims"
    model.release()
    assert threads() == []


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_on_a_gpu_are_those_of_generate(family: str) -> None:
    reference = tiny_model(family).to("cuda")
    asked = prompts(*LENGTHS)
    expected = [generate(reference, prompt, 12) for prompt in asked]
    model, pool = PlainModel(reference), BlockPool(16)
    model.allocate(pool.num_blocks)
    requests = [Request.of_tokens(str(i), prompt, 12, arrived_at=0.0) for i, prompt in enumerate(asked)]
    run(model, Scheduler(pool, EngineConfig.of(PlainModel.fixed_knobs), 150), requests)
    assert [request.output_ids.tolist() for request in requests] == expected
    model.release()
    assert threads() == []


@pytest.mark.parametrize("family", ["mamba", "bloom"])
def test_a_request_after_one_that_was_cancelled_in_the_middle_starts_anew(
    family: str, tmp_path: Path
) -> None:
    asked = prompts(20, 9)
    here = engine_of(family, tmp_path)
    here.engine.submit(submission("cancelled", asked[0], max_tokens=100))
    for _ in range(5):
        here.engine.step()
    assert 1 < len(tokens_of(here.frames, "cancelled")) <= 5 and len(threads()) == 1
    here.engine.scheduler.cancel("cancelled")
    here.engine.submit(submission("next", asked[1], max_tokens=8))
    here.run()
    assert tokens_of(here.frames, "next") == expected_tokens(family, asked[1:], 8)[0]
    assert len(tokens_of(here.frames, "cancelled")) <= 5 and threads() == []


def test_a_cancelled_request_leaves_no_thread_although_none_follows(tmp_path: Path) -> None:
    here = engine_of("mamba", tmp_path)
    here.engine.submit(submission("a", max_tokens=100))
    for _ in range(3):
        here.engine.step()
    assert len(threads()) == 1
    here.engine.scheduler.cancel("a")
    assert not here.engine.step() and threads() == []


def test_a_preempted_request_goes_on_where_it_was(tmp_path: Path) -> None:
    (prompt,) = prompts(20)
    here = engine_of("mamba", tmp_path)
    here.engine.submit(submission("a", prompt, max_tokens=12))
    for _ in range(5):
        here.engine.step()
    scheduler = here.engine.scheduler
    scheduler._preempt(scheduler.running[0])  # nothing that a client does gets there: it runs alone
    here.run()
    assert tokens_of(here.frames, "a") == expected_tokens("mamba", [prompt], 12)[0]
    assert scheduler.num_preemptions == 1


@pytest.mark.parametrize("family", ["mamba", "bloom"])
def test_scores_are_those_of_a_forward_pass_and_change_no_token_of_a_live_stream(
    family: str, tmp_path: Path
) -> None:
    texts = prompts(50, 2, 17)
    here = engine_of(family, tmp_path)
    here.engine.submit(submission("a", texts[0], max_tokens=12))
    here.engine.control(
        {"call": 1, "name": "score", "args": {"sequences": texts, "values": {}, "piece_tokens": 16}}
    )
    until = time.monotonic() + LIMIT_S
    while (here.engine.step() or here.engine.scorer.has_work) and time.monotonic() < until:
        here.engine.score()
    (value,) = [frame["value"] for frame in here.frames if frame["op"] == "reply"]
    reference = tiny_model(family, torch.float32).double()
    with torch.inference_mode():
        for text, nll, top1 in zip(texts, value["nll"], value["top1"], strict=True):
            logits = reference(torch.tensor([text])).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, torch.tensor(text[1:]), reduction="none")
            assert nll == pytest.approx(losses.tolist(), abs=2e-6)
            assert top1 == logits.argmax(dim=-1).tolist()
    assert tokens_of(here.frames, "a") == expected_tokens(family, texts[:1], 12)[0]


def test_tokens_are_drawn_by_our_sampler_from_shaped_logits(tmp_path: Path) -> None:
    (prompt,) = prompts(9)
    told = {"temperature": 1.5, "top_p": 0.9, "seed": 3, "repetition_penalty": 1.3, "logit_bias": [[50, 9.0]]}
    here = engine_of("mamba", tmp_path)
    here.engine.submit(submission("a", prompt, max_tokens=16, sampling=told))
    here.run()
    reference = tiny_model("mamba", torch.float32).double()
    request = Request.of_tokens("a", prompt, 16, 0.0, SamplingParams.of(told))
    with torch.inference_mode():
        while request.finish_reason is None:
            logits = reference(torch.tensor([request.token_ids[: request.num_tokens].tolist()])).logits[:, -1]
            request.append(sample(logits.float(), [request])[0], 0.0)
    drawn = tokens_of(here.frames, "a")
    assert drawn == request.output_ids.tolist() != expected_tokens("mamba", [prompt], 16)[0]
    assert 50 in drawn


def test_what_the_folder_suggests_to_generate_changes_no_token() -> None:
    (prompt,) = prompts(12)
    reference = tiny_model("bloom")
    expected = generate(reference, prompt, 12)
    assert len(set(expected)) < 12, "the penalty must have something to forbid"
    suggested = reference.generation_config
    suggested.repetition_penalty, suggested.num_beams, suggested.eos_token_id = 50.0, 3, [EOS, *expected[3:5]]
    assert generate(reference, prompt, 12) != expected
    model = PlainModel(reference)
    model.allocate(4)
    request = Request.of_tokens("a", prompt, 12, arrived_at=0.0)
    run(model, Scheduler(BlockPool(4), EngineConfig(), 60), [request])
    assert request.output_ids.tolist() == expected
    model.release()


def test_a_text_ends_at_its_end_token_and_the_next_one_is_served(tmp_path: Path) -> None:
    asked = prompts(20, 9)
    expected = expected_tokens("mamba", asked, 8)
    here = engine_of("mamba", tmp_path)
    here.engine.submit(submission("stops", asked[0], max_tokens=8, stop_token_ids=[expected[0][2]]))
    here.engine.submit(submission("next", asked[1], max_tokens=8))
    here.run()
    assert ends_of(here.frames) == {"stops": "stop", "next": "length"}
    assert tokens_of(here.frames, "stops") == expected[0][: expected[0].index(expected[0][2]) + 1]
    assert tokens_of(here.frames, "next") == expected[1]


def test_a_request_whose_logits_are_not_numbers_fails_alone(tmp_path: Path) -> None:
    def spoil_token_50(model: torch.nn.Module) -> None:
        model.get_input_embeddings().weight[50] = torch.nan

    here = InProcess(save_tiny_model("bloom", tmp_path / "bloom"), spoil_token_50)
    here.engine.submit(submission("bad", prompt=[3, 50, 4]))
    here.engine.submit(submission("good"))
    here.run()
    failed = [frame for frame in here.frames if frame["op"] == "failed"]
    assert [(frame["id"], frame["kind"]) for frame in failed] == [("bad", "nan_logits")]
    assert len(tokens_of(here.frames, "good")) == 8 and threads() == []


def test_an_error_of_the_model_reaches_the_step_and_leaves_no_thread() -> None:
    reference = tiny_model("mamba")
    model = PlainModel(reference)
    model.allocate(4)
    scheduler = Scheduler(BlockPool(4), EngineConfig(), 60)
    handle = reference.register_forward_pre_hook(raise_out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(model, scheduler, [Request.of_tokens("a", [5, 6, 7], 4, arrived_at=0.0)])
    assert threads() == []
    handle.remove()
    again = Request.of_tokens("b", [5, 6, 7], 4, arrived_at=0.0)
    run(model, Scheduler(BlockPool(4), EngineConfig(), 60), [again])
    assert again.output_ids.tolist() == generate(reference, [5, 6, 7], 4)
    model.release()


def raise_out_of_memory(module: torch.nn.Module, args: object) -> None:
    raise RuntimeError("out of memory")


def test_another_pool_and_other_weights_in_the_middle_end_no_request(tmp_path: Path) -> None:
    (prompt,) = prompts(20)
    here = engine_of("mamba", tmp_path)
    here.engine.submit(submission("a", prompt, max_tokens=60))
    for _ in range(5):
        here.engine.step()
    here.engine.control({"call": 1, "name": "reconfigure", "args": {"patch": {"kv_tokens": 256}}})
    here.run()
    (reply,) = [frame for frame in here.frames if frame["op"] == "reply"]
    assert reply["value"]["config"]["kv_tokens"] == 256 == here.engine.scheduler.pool.num_tokens
    assert tokens_of(here.frames, "a") == expected_tokens("mamba", [prompt], 60)[0]


def test_the_tier_is_reported_with_the_knobs_that_it_leaves_no_choice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here = engine_of("mamba", tmp_path, max_num_seqs=8, prefix_cache="on", prefill_chunk=64)
    identity = here.executor.identity()
    assert identity["tier"] == "C" and "MambaForCausalLM cannot be served with a paged cache" in caplog.text
    config = here.runner.champion
    assert config.max_num_seqs == 1 and config.prefix_cache == "off" and config.prefill_chunk == 16384
    assert identity["fitted_knobs"].items() >= PlainModel.fixed_knobs.items()
    here.executor.warm.check(config)
    for name, value in (("max_num_seqs", 2), ("prefix_cache", "on"), ("max_batched_tokens", 64)):
        with pytest.raises(InvalidKnob, match=f"`{name}` must be .* one request at a time, but got {value}"):
            here.executor.warm.check(config.patched({name: value}))


def test_the_process_serves_cancels_and_refuses_what_one_request_at_a_time_forbids(tmp_path: Path) -> None:
    child = EngineChild(save_tiny_model("mamba", tmp_path / "tiny"), tmp_path)
    try:
        ready = child.hello(max_num_seqs=4)
        assert ready["identity"]["tier"] == "C" and ready["config"]["max_num_seqs"] == 1
        reports = {report["name"]: report for report in ready["knobs"]}
        assert [reports["max_num_seqs"][part] for part in ("low", "high", "default")] == [1, 1, 1]
        assert list(reports["prefix_cache"]["choices"]) == ["off"]
        child.send(submission("cancelled", max_tokens=200))
        child.wait_for(lambda frame: bool(tokens_of([frame], "cancelled")))
        child.send({"op": "cancel", "id": "cancelled"})
        child.send(submission("a", max_tokens=5))
        child.wait_for_end("a")
        assert len(tokens_of(child.frames, "a")) == 5 and len(tokens_of(child.frames, "cancelled")) < 200
        refused = child.call("reconfigure", patch={"max_num_seqs": 2})["error"]
        assert refused["kind"] == "invalid_knob" and "one request at a time" in refused["message"]
        child.send(submission("unfinished", max_tokens=200))
        child.wait_for(lambda frame: bool(tokens_of([frame], "unfinished")))
        child.send({"op": "stop"})
        assert child.process.wait(LIMIT_S) == 0
    finally:
        child.close()


def test_refuses_a_model_whose_texts_cannot_be_continued_with_the_reason_of_each_tier() -> None:
    with pytest.raises(ModelError, match=r"with a paged cache: its logits differ .* one request at a time: "):
        servable(tiny_model("bert"))
    assert threads() == []


def test_a_model_that_no_tier_serves_ends_the_process_with_its_own_exit_code(tmp_path: Path) -> None:
    child = EngineChild(save_tiny_model("bert", tmp_path / "tiny"), tmp_path)
    child.send({"op": "hello", "boot_epoch": 0.0, "boot_monotonic": 0.0, "config": {}, "version": 0})
    _, errors = child.process.communicate(timeout=LIMIT_S)
    assert child.process.returncode == MODEL_ERROR_EXIT_CODE and "one request at a time" in errors
    child.close()
