"""How large the KV pool becomes, and that what does not fit becomes smaller and serves."""

from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.batch import PackedBatch
from runtime.decoder_model import DecoderModel
from runtime.errors import ModelError
from runtime.executor import Executor
from runtime.fitting import Fitting
from runtime.knobs import EngineConfig, default_config
from runtime.kv_size import CUDA_RESERVE, Room
from runtime.loader import load_model
from runtime.scheduler import Scheduler
from runtime.warm_up import largest_blocks, largest_requests, warm_up_requests
from tests.runtime.tiny_models import save_tiny_model

CPU = torch.device("cpu")
GPU = 139 * 2**30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("qwen2", tmp_path_factory.mktemp("model") / "tiny")


def executor(folder: Path, kv_tokens: int | None = 1024, device: str = "cpu", **knobs: Any) -> Executor:
    loaded = load_model(folder, torch.device(device), torch.float32)
    return Executor(loaded, kv_tokens, EngineConfig.of(knobs))


def test_the_default_takes_all_but_the_reserve_in_whole_blocks() -> None:
    num_blocks = Room.on_cuda(GPU).blocks(None, 10**9, 16, 131_072)
    possible = (1 - CUDA_RESERVE) * GPU / 131_072
    assert possible - 16 < 16 * num_blocks <= possible


def test_no_more_than_can_ever_be_used_is_taken() -> None:
    assert Room.on_cuda(GPU).blocks(None, 4096, 16, 1000) == 256


def test_a_size_that_is_asked_for_may_go_into_the_reserve_but_not_beyond_memory() -> None:
    room = Room.on_cuda(1_000_000)
    assert room.blocks(900, 64, 16, 1000) == 56
    assert room.blocks(10_000, 64, 16, 1000) == 950 // 16


def test_without_room_for_two_blocks_the_numbers_are_told() -> None:
    with pytest.raises(ModelError, match=r"at least 32 tokens, but got 28 \(1000 bytes a token, 28500 bytes"):
        Room.on_cuda(30_000).blocks(1000, 64, 16, 1000)
    with pytest.raises(ModelError, match="but got 0"):
        Room.on_cuda(-5).blocks(None, 64, 16, 1000)


@pytest.mark.parametrize(
    "knobs",
    [
        {"max_num_seqs": 8, "max_batched_tokens": 300},
        {"max_num_seqs": 64, "max_batched_tokens": 32},
        {"max_num_seqs": 1, "max_batched_tokens": 64, "prefill_chunk": 64},
    ],
)
def test_the_largest_step_fills_rows_and_tokens_at_once(knobs: dict[str, int]) -> None:
    from runtime.kv_cache import BlockPool

    config = EngineConfig.of(knobs)
    scheduler = Scheduler(BlockPool(largest_blocks(config)), config, 4096)
    for request in largest_requests(config, 4096):
        scheduler.add(request)
    batch = scheduler.schedule(0.0)
    assert batch is not None and bool(batch.sampled.all())
    assert len(batch.requests) == min(config.max_num_seqs, config.max_batched_tokens)
    assert config.max_batched_tokens - len(batch.requests) < batch.num_tokens <= config.max_batched_tokens


@pytest.mark.parametrize("size", [16, 64, 256])
def test_first_steps_are_computed_over_blocks_of_the_size_that_will_serve(
    folder: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels are compiled for a size of blocks: one that is new would be compiled while somebody waits."""
    forward, seen = DecoderModel.forward, []

    def noted(self: DecoderModel, packed: PackedBatch, *given: Any) -> torch.Tensor:
        seen.append(packed.block_tokens)
        return forward(self, packed, *given)

    monkeypatch.setattr(DecoderModel, "forward", noted)
    executor(folder, 4096, kv_block=str(size))
    assert set(seen[-5:]) == {size}


@pytest.mark.parametrize("size", [16, 64])
def test_a_request_of_the_full_length_fits_whatever_blocks_are(folder: Path, size: int) -> None:
    loaded = load_model(folder, CPU, torch.float32, 200)  # no multiple of a block
    here = Executor(loaded, None, EngineConfig.of({"max_num_seqs": 1, "kv_block": str(size)}))
    assert here.max_model_len == 200


def test_a_pool_whose_memory_is_refused_becomes_a_smaller_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    allocate = DecoderModel.allocate

    def refuse(self: DecoderModel, num_blocks: int, *given: Any) -> None:
        if num_blocks > 200:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        allocate(self, num_blocks, *given)

    monkeypatch.setattr(DecoderModel, "allocate", refuse)
    here = executor(folder, 16 * 256)
    assert 190 <= here.pool.num_blocks <= 200 and here.fitted_kv_tokens == here.pool.num_tokens
    assert "leaves no room" in caplog.text and here.warm.pool.num_blocks == here.pool.num_blocks


def test_a_pool_that_leaves_nothing_for_graphs_or_the_largest_step_becomes_a_smaller_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def has_room(self: DecoderModel, *_: Any) -> bool:
        return self.pools[0][0].shape[1] <= 16 * 240

    monkeypatch.setattr(DecoderModel, "prepare_steps", has_room)
    assert 228 <= executor(folder, 16 * 256).pool.num_blocks <= 240

    def lacking(self: Fitting) -> int:  # as much as 56 blocks too many take
        return (self._model.pools[0][0].shape[1] - 16 * 200) * self._model.kv_bytes_per_token

    monkeypatch.setattr(Fitting, "_short_bytes", lacking)
    monkeypatch.setattr(DecoderModel, "prepare_steps", lambda *_: True)
    assert executor(folder, 16 * 256).pool.num_blocks == 200


def test_what_can_never_be_captured_serves_without_graphs_from_half_the_pool(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DecoderModel, "prepare_steps", lambda *_: False)
    assert 38 <= executor(folder, 16 * 80).pool.num_blocks <= 40


def test_a_step_too_large_for_memory_bounds_the_knob(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = executor(folder)
    here = Fitting(one._model, one.max_model_len, one.execute)
    compute = Fitting._compute

    def refuse(self: Fitting, config: EngineConfig, *given: Any) -> None:
        if config.max_batched_tokens > 100:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        compute(self, config, *given)

    monkeypatch.setattr(Fitting, "_compute", refuse)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    config = EngineConfig.of({"max_batched_tokens": 256})
    here._compute_largest(config, largest_blocks(config))
    assert here.max_batched_tokens == 64 and "does not fit in memory" in caplog.text


@pytest.mark.gpu
def test_the_default_pool_is_within_3_percent_of_what_the_bytes_allow(folder: Path) -> None:
    loaded = load_model(folder, torch.device("cuda"), torch.bfloat16)
    here = Executor(loaded, None, default_config("cuda", 8))
    most = 1024 * here.max_model_len  # no more can ever be used
    wished = min(most, here.kv_tokens_possible)
    assert 0.97 * wished < here.pool.num_tokens <= 1.03 * wished


@pytest.mark.gpu
def test_a_pool_of_all_memory_and_more_starts_smaller_and_leaves_room_for_the_largest_step(
    folder: Path,
) -> None:
    loaded = load_model(folder, torch.device("cuda"), torch.bfloat16)
    config = default_config("cuda", 8)
    here = Executor(loaded, 2**40, config)
    assert here.pool.num_tokens < 2**40
    again = Fitting(here._model, here.max_model_len, here.execute)
    num_blocks = min(here.pool.num_blocks, largest_blocks(config))
    again._compute_largest(config, num_blocks)
    assert again.max_batched_tokens is None


def test_steps_are_made_ready_for_the_weights_that_serve(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[str] = []
    monkeypatch.setattr(
        DecoderModel, "prepare_steps", lambda model, *_, **__: keys.append(model.weights_key) or True
    )
    here = executor(folder)
    assert keys == [here.warm.loaded_format] == [here._model.weights_key]


@pytest.mark.gpu
def test_first_steps_ask_the_driver_for_no_memory(folder: Path) -> None:
    loaded = load_model(folder, torch.device("cuda"), torch.bfloat16)
    config = default_config("cuda", 8)
    here = Executor(loaded, None, config)
    steps = Fitting(here._model, here.max_model_len, here.execute)
    asked = torch.cuda.memory_stats()["segment.large_pool.allocated"]
    steps._compute(config, here.pool.num_blocks, warm_up_requests(1, here.max_model_len - 2))
    steps._compute(config, here.pool.num_blocks, largest_requests(config, here.max_model_len))
    assert torch.cuda.memory_stats()["segment.large_pool.allocated"] == asked
