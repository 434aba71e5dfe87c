"""The pure parts of the benchmarks on an accelerator, and each part once on a CPU with a tiny model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime.bench import gpu
from runtime.bench.arrivals import (
    OWN_TOKENS,
    SHARED_TOKENS,
    mixed_arrivals,
    poisson_instants,
    scaled,
    shared_wishes,
)
from runtime.bench.ceilings import Ceilings
from runtime.bench.cells import Step, floor_s
from runtime.bench.serving import Answer, percentile_ms
from runtime.bench.shapes import random_model
from runtime.bench.start import start_of
from runtime.bench.step_log import itl_parts
from runtime.bench.traffic import Row
from runtime.bench.waterfall import Kernel, busy_of, kind_of
from runtime.bench.words import patches_of
from runtime.step_weights import Weights, weights_of

TINY = ["--shape", "tiny", "--device", "cpu"]


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    found: dict[str, object] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


# -- pure parts -----------------------------------------------------------------------------------------------------


def test_poisson_arrivals_keep_rate_and_spread_and_end_in_time() -> None:
    instants = np.array(poisson_instants(24.0, 500.0, rng()))
    gaps = np.diff(instants)
    assert len(instants) == pytest.approx(24.0 * 500.0, rel=0.03) and 0 <= instants[0] < instants[-1] < 500.0
    assert gaps.min() > 0 and gaps.std() == pytest.approx(gaps.mean(), rel=0.05), "exponential gaps"


def test_mixed_arrivals_have_the_lengths_of_mix300() -> None:
    lengths = np.array([len(one.wish.token_ids) for one in mixed_arrivals(24.0, 60.0, 50, 1.0, rng())])
    assert lengths.min() >= 16 and lengths.max() <= 4096
    shares = [np.mean(lengths < 512), np.mean((lengths >= 512) & (lengths < 2048)), np.mean(lengths >= 2048)]
    assert shares == pytest.approx([0.6, 0.3, 0.1], abs=0.03)


def test_shared_requests_begin_alike_and_end_apart() -> None:
    draw = shared_wishes(50, 0.1, rng())
    first, second = draw(), draw()
    shared = scaled(SHARED_TOKENS, 0.1)
    assert len(first.token_ids) == shared + scaled(OWN_TOKENS, 0.1)
    assert first.token_ids[:shared] == second.token_ids[:shared]
    assert first.token_ids[shared:] != second.token_ids[shared:]


def test_gaps_of_an_answer_are_those_that_end_in_the_window() -> None:
    answer = Answer(arrived_at=1.0, wanted=5, told_at=[2.0, 2.5, 4.0, 4.25], num_tokens=5)
    assert answer.ttft_s == 1.0 and answer.tpot_s == pytest.approx(2.25 / 4)
    assert answer.gaps_s() == [0.5, 1.5, 0.25] and answer.gaps_s(2.5, 4.0) == [1.5]
    assert percentile_ms(answer.gaps_s(), 100) == 1500.0 and percentile_ms([], 99) is None


def logged(num_decode: int, prompts: int, device_s: float, step_s: float) -> dict[str, Any]:
    return {
        "num_decode": num_decode, "num_prefill_rows": prompts, "context_tokens": 10 * num_decode, "step_s": step_s,
        "forward_s": step_s, "device_s": device_s,
    }  # fmt: skip


def test_the_time_between_two_tokens_is_told_apart() -> None:
    """Two steps of 2 rows and one of 4 that only decode, one of 3 beside a prompt, one without rows that decode."""
    steps = [logged(2, 0, 0.010, 0.011), logged(2, 0, 0.010, 0.011), logged(4, 0, 0.020, 0.021)]
    steps += [logged(3, 1, 0.050, 0.053), logged(0, 1, 0.300, 0.300)]
    weights = Weights(shared_bytes=200, routed_bytes=0, chosen_share=1.0, num_active=100)
    ceilings = Ceilings(copy_bytes_per_s=1e5, read_bytes_per_s=1.0, gemm_flop_per_s=1.0, gemm_held_flop_per_s=1.0)
    parts = itl_parts(steps, [0.040, 0.050], weights, 4, ceilings)
    assert parts is not None and parts.itl_ms == pytest.approx(45.0)
    assert parts.decode_ms == pytest.approx((2 * 10 + 2 * 10 + 4 * 20 + 3 * 15) / 11), (
        "15 ms lie between 2 and 4 rows"
    )
    assert parts.prompts_ms == pytest.approx(3 * 35 / 11) and parts.host_ms == pytest.approx(
        (2 + 2 + 4 + 9) / 11
    )
    assert parts.queue_ms == pytest.approx(45.0 - parts.decode_ms - parts.prompts_ms - parts.host_ms)
    assert parts.weights_floor_ms == pytest.approx(2.0)
    assert parts.kv_floor_ms == pytest.approx(1e3 * 4 * (2 * 20 + 2 * 20 + 4 * 40) / 8 / 1e5)
    assert itl_parts(steps[3:], [0.040], weights, 4, ceilings) is None, (
        "nothing says what decoding alone takes"
    )
    assert itl_parts(steps, [], weights, 4, ceilings) is None


def test_the_floor_is_the_longer_one_of_bytes_and_arithmetic_step_by_step() -> None:
    ceilings = Ceilings(
        copy_bytes_per_s=100.0, read_bytes_per_s=1.0, gemm_flop_per_s=1000.0, gemm_held_flop_per_s=1.0
    )
    dense = Weights(shared_bytes=200, routed_bytes=0, chosen_share=1.0, num_active=100)
    reading = Step(0.0, 1, 1, False, context_tokens=10, attention_pairs=10)
    computing = Step(0.0, 50, 1, True, context_tokens=50, attention_pairs=1250)
    assert floor_s([reading], dense, 4, 2, ceilings) == (200 + 4 * 10) / 100.0
    assert floor_s([computing], dense, 4, 2, ceilings) == (2 * 100 * 50 + 2 * 1250) / 1000.0
    assert floor_s([reading, computing], dense, 4, 2, ceilings) == pytest.approx(2.4 + 12.5)


def test_of_routed_experts_the_floor_reads_those_that_its_tokens_choose() -> None:
    weights = Weights(shared_bytes=100, routed_bytes=640, chosen_share=0.25, num_active=1)
    assert weights.read_bytes(1) == 100 + 160 and weights.read_bytes(2) == 100 + 640 * (1 - 0.75**2)
    assert weights.read_bytes(1000) == pytest.approx(740)


def test_weights_of_a_dense_model_are_all_read_but_for_an_embedding_of_its_own() -> None:
    loaded = random_model("tiny", torch.device("cpu"), torch.float32)  # its head is its embedding
    num = sum(parameter.numel() for parameter in loaded.model.parameters())
    assert weights_of(loaded.model) == Weights(4 * num, 0, 1.0, num)


def test_knobs_are_read_as_numbers_or_words() -> None:
    assert patches_of(["a=1,b=0.5", "c=on", ""]) == [{"a": 1, "b": 0.5}, {"c": "on"}, {}]
    with pytest.raises(ValueError, match="NAME=VALUE, but got 'prefill_chunk'"):
        patches_of(["prefill_chunk"])


def test_a_row_names_the_bars_that_it_misses() -> None:
    row = Row("shared", {}, 10, 74.0, 1.0, 1.0, 280.0, 1.0, 1.0, 0, 0.9, 0)
    assert row.missed() == ["requests_per_s"]
    assert row._replace(requests_per_s=76.0, ttft_p95_ms=None).missed() == ["ttft_p95_ms"]


def test_kernels_are_told_apart_by_their_names() -> None:
    kinds = {
        "nvjet_tst_64x8_64x16_4x1_v_bz_TNT": "weights", "_skinny": "weights", "aten::mm": "weights",
        "ampere_bf16_s16816gemm_bf16": "weights", "_decode": "kv", "_add_norm": "other",
        "flash_fwd_splitkv_kernel": "kv", "Memcpy HtoD (Pinned -> Device)": "other", "_silu_mul": "other",
        "_merge": "kv", "_down": "weights", "_rope_and_cache": "other",
    }  # fmt: skip
    assert {name: kind_of(name) for name in kinds} == kinds


def test_gaps_between_kernels_are_launching_or_waiting_for_the_host() -> None:
    kernels = [
        Kernel("gemm", 0.0, 10.0), Kernel("_decode", 12.0, 20.0), Kernel("add_norm", 15.0, 22.0),
        Kernel("gemm", 122.0, 130.0),
    ]  # fmt: skip
    busy = busy_of(kernels[::-1])
    assert busy.by_kind == {"weights": 18.0, "kv": 8.0, "other": 2.0}, (
        "one that starts early counts from there on"
    )
    assert (busy.launch_us, busy.host_us) == (2.0, 100.0) and busy.by_name["add_norm"] == 2.0


def test_parts_choose_their_cells() -> None:
    def cells(*words: str) -> dict[str, list[str]]:
        chosen = gpu.cells_of(gpu.parser_of().parse_args(list(words)))
        return {shape: list(names) for shape, names in chosen.items()}

    assert cells("--part", "dense")["qwen3-0.6b"] == ["b1", "b32", "b256", "mix300", "nano256"]
    assert list(cells("--part", "deepseek")) == ["deepseek-v2-lite"]
    assert cells("--shape", "tiny", "--workload", "b1") == {"tiny": ["b1"]}
    assert cells("--model", "folder", "--workload", "tiny") == {"": ["tiny"]}


# -- each part, small -----------------------------------------------------------------------------------------------


def test_cells_serve_weights_that_were_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "saved"
    assert gpu.main([*TINY, "--save-weights", str(folder)]) == 0
    assert (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()
    words = ["--model", str(folder), "--device", "cpu", "--workload", "tiny", "--runs", "1", "--waterfall"]
    assert gpu.main([*words, "--knob", "prefill_chunk=16", "weight_format=bfloat16"]) == 0
    found = last_line(capsys)
    assert [cell["shape"] for cell in found["cells"]] == ["saved"]  # type: ignore[attr-defined]
    (split,) = found["waterfalls"]  # type: ignore[misc]
    parts = [split[name] for name in ("weights_ms", "kv_ms", "other_ms", "launch_ms", "host_ms")]
    assert split["num_steps"] == 4 and split["weights_ms"] > 0
    assert sum(parts) == pytest.approx(split["step_ms"])
    config = found["config"]
    assert (config["prefill_chunk"], config["weight_format"]) == (16, "bfloat16")  # type: ignore[index]


def test_cells_are_drawn_as_asked_and_what_cannot_be_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--workload", "tiny", "--runs", "1", "--sampling", "temperature=0.8", "top_p=0.9", "top_k=5"]
    assert gpu.main([*TINY, *words]) == 0
    assert last_line(capsys)["sampling"] == {"temperature": 0.8, "top_p": 0.9, "top_k": 5}
    for word, told in {
        "seed=3": "--sampling takes temperature, min_p, top_p, top_k, but got 'seed'",
        "temperature=-1": "temperature must be a number in [0, 2], but got -1",
        "top_k=2.5": "top_k must be a whole number in [0, 1e+06], but got 2.5",
        "top_p": "NAME=VALUE, but got 'top_p'",
    }.items():
        with pytest.raises(SystemExit):
            gpu.main([*TINY, "--sampling", word])
        assert told in capsys.readouterr().err


def test_traffic_is_served_under_each_variant(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--part", "traffic", "--rate", "20", "--seconds", "0.5", "--at-once", "3", "--scale", "0.02"]
    variants = ["--variant", "prefill_chunk=64", "prefill_chunk=32,long_prompt_threshold=64"]
    assert gpu.main([*TINY, *words, *variants, "--knob", "max_num_seqs=8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    at = [number for number, line in enumerate(lines) if line.startswith("longest steps")]
    longest_ms = [[float(line.split()[0]) for line in lines[first + 1 : first + 5]] for first in at]
    assert len(at) == 8 and all(some == sorted(some, reverse=True) for some in longest_ms)
    rows = found["rows"]
    assert isinstance(rows, list)
    kinds = ("poisson", "shared", "long", "beside")
    assert [row["row"] for row in rows] == [kind for kind in kinds for _ in range(2)]
    assert [row["variant"]["prefill_chunk"] for row in rows] == [64, 32] * 4
    assert all(row["num_dropped"] == 0 and row["ttft_p95_ms"] > 0 for row in rows)
    assert rows[2]["hit_ratio"] > 0.5 and rows[0]["hit_ratio"] is None
    assert all(row["itl_p99_ms"] > 0 for row in rows[4:])
    logs = found["step_logs"]
    assert isinstance(logs, list) and [log["row"] for log in logs] == [row["row"] for row in rows]
    fitted = [log["step_model"] for log in logs if log["step_model"] is not None]
    assert fitted and all({"decode", "mixed"} & set(one["errors"]) for one in fitted)
    split = next(log["itl"] for log in logs if log["itl"] is not None)
    parts = [split[f"{name}_ms"] for name in ("decode", "prompts", "host", "queue")]
    assert sum(parts) == pytest.approx(split["itl_ms"]) and split["weights_floor_ms"] > 0
    config = found["config"]
    assert (config["max_num_seqs"], config["prefill_chunk"]) == (8, 256)  # type: ignore[index]


def test_a_prompt_that_the_model_cannot_take_is_told() -> None:
    with pytest.raises(RuntimeError, match="was refused: Prompt and output must fit in 8192 tokens"):
        gpu.main([*TINY, "--part", "traffic", "--rows", "long", "--at-once", "1", "--scale", "0.5"])


def test_a_start_says_where_its_seconds_went(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([*TINY, "--part", "start", "--runs", "1", "--knob", "max_num_seqs=4"]) == 0
    found = last_line(capsys)
    starts = found["starts"]
    assert isinstance(starts, list)
    (start,) = starts
    assert sum(start["stages_s"].values()) == pytest.approx(start["first_token_s"])
    assert all(seconds > 0 for seconds in start["stages_s"].values()) and start["tier"] == "A"


def test_stages_are_the_differences_of_their_ends() -> None:
    ended = {"python": 0.5, "imports": 3.0, "weights": 4.0, "engine": 7.0, "first_token": 7.25}
    start = start_of({"ended_s": ended, "longest_gap_s": 0.2, "last_gap_s": 0.1, "tier": "A"})
    assert start.stages_s == {
        "python": 0.5, "imports": 2.5, "weights": 1.0, "engine": 3.0, "first_token": 0.25,
    }  # fmt: skip
    assert start.first_token_s == 7.25
