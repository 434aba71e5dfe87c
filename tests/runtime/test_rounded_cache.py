"""Keys and values in 8 bits: what rounding costs, and a pool of them beside one of whole values."""

from pathlib import Path
from typing import Any

import pytest
import torch

import runtime.fused_pass
from runtime.decoder import JointCache
from runtime.decoder_model import DecoderModel, cache_of
from runtime.errors import InvalidKnob
from runtime.executor import Executor
from runtime.fused_pass import FusedPass
from runtime.hf_model import HFModel
from runtime.kernels import PLAIN
from runtime.knobs import EngineConfig
from runtime.kv_cache import BLOCK_TOKENS
from runtime.loader import load_model
from runtime.paged_model import relative_error
from runtime.rounded_cache import RoundedCache, restored, rounded
from runtime.step_tensors import PaddedRows, Row, StepTensors
from tests.runtime.test_fused_pass import decoder, mixed_steps, written_out
from tests.runtime.test_warm import Here, prompts, serve_all, values
from tests.runtime.tiny_models import save_tiny_model, tiny_model


class Half(Here):
    dtype = torch.bfloat16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("qwen2", tmp_path_factory.mktemp("model") / "tiny")


# -- rounding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 1e4, 1e30])
def test_a_value_is_off_by_a_sixteenth_at_most_whatever_its_range(scale: float) -> None:
    x = torch.randn(50, 3, 64, generator=torch.Generator().manual_seed(0)) * scale
    found = restored(*rounded(x), torch.float32)
    largest = x.abs().amax(-1, True)
    assert bool(((found - x).abs() <= x.abs() / 16 + largest * 2.0**-17).all())


def test_a_scale_is_a_power_of_two_so_that_rounding_again_changes_nothing() -> None:
    x = torch.randn(50, 3, 64, generator=torch.Generator().manual_seed(1))
    bits, scales = rounded(x)
    assert bool((scales.float().log2() == scales.float().log2().round()).all())
    again, same = rounded(restored(bits, scales, torch.bfloat16))
    assert torch.equal(restored(again, same, torch.float32), restored(bits, scales, torch.float32))


def test_zeros_stay_zeros_and_what_is_no_number_spoils_its_own_head_only() -> None:
    x = torch.ones(2, 2, 8)
    x[0, 0] = 0.0
    x[1, 1, 3] = float("nan")
    found = restored(*rounded(x), torch.float32)
    assert bool((found[0, 0] == 0).all()) and bool(found[1, 1].isnan().any())
    assert torch.equal(found[[0, 1], [1, 0]], torch.ones(2, 8))


def test_rows_are_read_as_from_a_cache_of_what_rounding_left() -> None:
    kv_heads, dim, slots = 2, 8, 48
    pool = (
        torch.zeros(1, slots, 2 * kv_heads * dim, dtype=torch.uint8),
        torch.zeros(1, slots, 4 * kv_heads).byte(),
    )
    cache = RoundedCache.of(pool, torch.float64)
    new = torch.randn(40, 2 * kv_heads * dim, dtype=torch.float64)
    where = torch.randperm(slots)[:40]
    cache.write(where, new)
    whole = JointCache.of(torch.zeros(slots, 2 * kv_heads * dim, dtype=torch.float64), kv_heads)
    left = restored(*rounded(new.unflatten(1, (2 * kv_heads, dim))), torch.float64).flatten(1)
    whole.write(where, left)
    assert torch.equal(cache.read(where), left) and torch.equal(whole.read(where), left)
    for place in (slice(3, 20), where[:17]):
        row = Row(0, 5, 17, place)
        for got, expected in zip(cache.of_row(row), whole.of_row(row), strict=True):
            assert torch.equal(got, expected)
    padded = PaddedRows(0, 2, where[:32], torch.tensor([16, 9]), 16)
    for got, expected in zip(cache.of_padded(padded), whole.of_padded(padded), strict=True):
        assert torch.equal(got, expected)


# -- the passes over it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2_window", "qwen3"])
@pytest.mark.parametrize("packs_pieces", [False, True])
def test_both_passes_round_alike_and_stay_near_the_whole_values(
    family: str, packs_pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of prompts behind nothing cached are attended to whole where they are packed, so those differ a little."""
    monkeypatch.setattr(runtime.fused_pass, "attend_pieces", written_out)
    model = decoder(family)
    fused = FusedPass(model.decoder, PLAIN, BLOCK_TOKENS, 200, num_sms=4)
    scheduler, _ = mixed_steps(40)
    model.allocate(40)
    here, there = (model.new_pools(40, kv_dtype="fp8") for _ in range(2))
    parts = [layer.attention for layer in model.decoder.layers]
    caches = [cache_of(part, pool) for part, pool in zip(parts, here.values(), strict=True)]
    near = 0.35  # of weights that are random and large; what a trained model loses, its quality check says
    limit = near if packs_pieces else 1e-9
    while (batch := scheduler.schedule(0.0)) is not None:
        packed = scheduler.pack(batch)
        step = StepTensors.of(packed, model.device, has_kernel=True, packs_pieces=packs_pieces)
        whole = model.forward(packed)
        with torch.inference_mode():
            expected = model.forward(packed, there)
            assert relative_error(fused.forward(step, caches), expected) <= limit
        assert 1e-6 < relative_error(expected, whole) < near or int(packed.contexts.max()) == 1
        scheduler.finish_step(batch, whole.argmax(-1).tolist(), 0.0)


def test_a_token_takes_its_bytes_and_a_scale_for_each_head() -> None:
    model = decoder("qwen3", torch.bfloat16)
    part = model.decoder.layers[0].attention
    whole, less = model.bytes_per_token("auto"), model.bytes_per_token("fp8")
    assert whole == len(model.decoder.layers) * 2 * part.kv_heads * part.dim * 2
    assert less == len(model.decoder.layers) * 2 * part.kv_heads * (part.dim + 2)


# -- the knob ------------------------------------------------------------------------------------------------------


def test_streams_live_through_a_rounded_pool_and_back(folder: Path) -> None:
    here = Here(folder, kv_tokens=4096, max_num_seqs=32)
    dtypes = ["fp8", "auto", "fp8"]

    def disturb(step: int) -> None:
        if step % 5 == 2 and dtypes:
            dtype = dtypes.pop(0)
            done = here.call("reconfigure", patch={"kv_dtype": dtype})["value"]
            assert here.state().kv_dtype == dtype == done["config"]["kv_dtype"]

    serve_all(here, disturb)
    assert not dtypes and here.scheduler.num_preemptions == 0


def test_what_moves_between_pools_is_rounded_once_and_found_by_none_of_the_other_kind(folder: Path) -> None:
    here = Here(folder, kv_tokens=1024, prefix_cache="on")
    model, prompt = here.executor._model, prompts(1, 40)[0]
    here.submit("a", prompt, 30)
    here.engine.step()
    before = model._caches_of(model.pools)
    table = here.scheduler._seats.blocks_of(0).tolist()
    wanted = [cache.read(slots_of(table, 40)).clone() for cache in before]
    here.call("reconfigure", patch={"kv_dtype": "fp8"})
    table = here.scheduler._seats.blocks_of(0).tolist()
    for cache, whole in zip(model._caches_of(model.pools), wanted, strict=True):
        expected = restored(*rounded(whole.unflatten(1, (cache.scales.shape[1], -1))), torch.float32).flatten(
            1
        )
        assert torch.equal(cache.read(slots_of(table, 40)), expected)
    here.submit("b", prompt, 3)
    here.run()
    assert here.scheduler.num_hit_tokens == 0
    here.submit("c", prompt, 3)
    here.run()
    assert here.scheduler.num_hit_tokens == 32, "what was computed with rounded values is found by the same"


def slots_of(table: list[int], num_tokens: int) -> torch.Tensor:
    slots = [block * BLOCK_TOKENS + at for block in table for at in range(BLOCK_TOKENS)]
    return torch.tensor(slots[:num_tokens])


def test_without_room_for_both_a_pool_is_rounded_and_restored_layer_by_layer(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Half(folder, kv_tokens=4096)
    for i, prompt in enumerate(prompts(4)):
        here.submit(str(i), prompt, 12)
    here.engine.step()
    layer_bytes = 4096 * here.executor._model.bytes_per_token("fp8") // 2
    monkeypatch.setattr(here.executor.warm, "_free_bytes", lambda: int(1.3 * layer_bytes))
    assert here.call("prepare", values=values(here, kv_dtype="fp8"))["error"]["kind"] == "prepare_failed"
    assert "value" in here.call("reconfigure", patch={"kv_dtype": "fp8"})
    assert here.state().kv_dtype == "fp8" and here.state().kv_tokens == 4096
    whole_bytes = 4096 * here.executor._model.bytes_per_token("auto")
    monkeypatch.setattr(here.executor.warm, "_free_bytes", lambda: int(1.2 * whole_bytes))
    here.engine.step()
    assert here.call("prepare", values=values(here, kv_dtype="auto"))["error"]["kind"] == "prepare_failed"
    assert "value" in here.call("reconfigure", patch={"kv_dtype": "auto"})
    assert here.state().kv_dtype == "auto" and here.scheduler.has_requests
    here.run()
    assert sorted(here.ends()) == ["0", "1", "2", "3"]


def test_scores_tell_what_a_rounded_cache_costs_before_it_serves(folder: Path) -> None:
    here = Here(folder)
    text = [prompts(1, 60)[0]]

    def nll(**knobs: Any) -> list[float]:
        number = here.num_calls + 1
        here.num_calls = number
        args = {"sequences": text, "values": knobs, "piece_tokens": 16}
        here.engine.control({"op": "control", "call": number, "name": "score", "args": args})
        while not (found := [f for f in here.frames if f["op"] == "reply" and f["call"] == number]):
            here.engine.score()
        scored: list[float] = found[0]["value"]["nll"][0]
        return scored

    whole, less = nll(), nll(kv_dtype="fp8")
    assert 0 < max(abs(here - there) for here, there in zip(whole, less, strict=True)) < 0.5
    assert nll() == whole and here.state().kv_dtype == "auto"


def test_an_engine_starts_on_a_rounded_pool_of_more_tokens(folder: Path) -> None:
    loaded = load_model(folder, torch.device("cpu"), torch.float32)
    config = EngineConfig.of({"kv_dtype": "fp8"})
    here = Executor(loaded, 1024, config)
    assert here.warm.in_force(config).kv_dtype == "fp8"
    assert here.identity()["kv_bytes_per_token"] == here._model.bytes_per_token("fp8")
    assert here.warm._most_blocks("fp8") > here.warm._most_blocks("auto")


def test_models_whose_attention_is_not_ours_or_latent_keep_whole_values(tmp_path: Path) -> None:
    plain = HFModel(tiny_model("llama", torch.float32))
    assert plain.fixed_knobs == {"kv_dtype": "auto", "linear_backend": "auto"} == HFModel.fixed_knobs
    assert DecoderModel(plain, 200).fixed_knobs == {"linear_backend": "auto"}
    folder = save_tiny_model("deepseek_v3", tmp_path / "latent")
    here = Here(folder, kv_tokens=1024, kv_dtype="fp8")
    assert here.state().kv_dtype == "auto" and here.executor.identity()["fitted_knobs"]["kv_dtype"] == "auto"
    with pytest.raises(InvalidKnob, match="`kv_dtype` must be auto for this model, which caches"):
        here.executor.warm.check(here.state().patched({"kv_dtype": "fp8"}))
    with pytest.raises(InvalidKnob, match="`linear_backend` must be auto for this model, which knows one way to"):
        here.executor.warm.check(here.state().patched({"linear_backend": "triton"}))
