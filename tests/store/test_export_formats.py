"""The forms of an export beside YAML, each with its golden file; YAML itself: `test_export`."""

import json
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime.knobs import KNOBS, EngineConfig
from store.database import Store
from store.errors import BadExport
from store.export import FORMATS, Proof, export_as, proof_of_champion
from store.export_flags import Target, translated
from store.export_sglang import SGLANG
from store.export_vllm import VLLM
from store.tables import Config, Snapshot
from tests.store.story import NEW, T0
from tuner.settings import load_settings

GOLDEN = Path(__file__).parent / "golden"
EVERY_KNOB = EngineConfig.of(
    {"prefill_chunk": 64, "policy": "shortest_prefill", "max_num_seqs": 32, "replicas": 2, "kv_tokens": 8192}
).values()
MODEL = {"name": "demo 5M", "dtype": "float32", "max_model_len": 2048, "kv_bytes_per_token": 4096}


def with_knobs(proof: Proof, **values: Any) -> Proof:
    config = Config(NEW, T0, 2, {**EVERY_KNOB, **values})
    snapshot = Snapshot(
        "snap-1", T0, MODEL, proof.snapshot.hardware, {"runtime": "0.1.0", "torch": "2.13.0"}, 2, []
    )
    return replace(proof, config=config, snapshot=snapshot)


@pytest.fixture
def proof(told: Store) -> Proof:
    with told.journal() as journal, told.metrics() as metrics:
        return with_knobs(proof_of_champion(journal, metrics))


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "yaml"])
def test_each_form_is_that_of_its_golden_file(proof: Proof, format: str) -> None:
    """To change a form: write the text below into the golden file, and read the difference."""
    text = export_as(format, proof, "0.1.0")
    assert text == (GOLDEN / f"export.{format}").read_text(), text


@pytest.mark.parametrize("format", FORMATS)
def test_each_form_carries_its_evidence(proof: Proof, format: str) -> None:
    text = export_as(format, proof, "0.1.0")
    for words in ("Some CPU", "demo 5M", "snap-1", "2.13.0", NEW):
        assert words in text
    assert "on probation, 1 of 10 pairs" in text
    assert ("-22.1 % (-30.0 % to -15.0 %)" in text) or ("-0.2212" in text and "-0.15" in text)


@pytest.mark.parametrize("target", [VLLM, SGLANG], ids=lambda target: target.name)
def test_every_knob_has_its_argument_or_a_reason(target: Target) -> None:
    assert set(target.knobs) == {knob.name for knob in KNOBS}
    for knob in KNOBS:
        for value in knob.choices or (knob.default,):
            told = translated(target, knob.name, {**EVERY_KNOB, knob.name: value}, MODEL)
            has_default_meaning = (knob.name, value) in (("prefix_cache", "on"), ("speculation_length", 0))
            assert bool(told.arguments) != bool(told.reason) or has_default_meaning, (knob.name, value)


def test_a_draft_is_told_in_the_words_of_vllm_and_not_to_sglang_whose_drafts_are_others() -> None:
    values = {**EVERY_KNOB, "speculation_length": 4}
    flag, told = translated(VLLM, "speculation_length", values, MODEL).arguments
    assert flag == "--speculative-config" and json.loads(told)["num_speculative_tokens"] == 4
    assert "NGRAM" in str(translated(SGLANG, "speculation_length", values, MODEL).reason)


@pytest.mark.parametrize("target", [VLLM, SGLANG], ids=lambda target: target.name)
def test_a_knob_of_another_version_is_listed_and_not_guessed(target: Target) -> None:
    assert translated(target, "warp_factor", {"warp_factor": 9}, {}).arguments == ()
    assert "does not know" in str(translated(target, "warp_factor", {"warp_factor": 9}, {}).reason)


def words_of(text: str) -> list[str]:
    """What a shell makes of the command; comments are gone."""
    printed = subprocess.run(
        ["sh", "-c", "vllm() { printf '%s\\n' vllm \"$@\"; }; python() { printf '%s\\n' python \"$@\"; }\n" + text],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert printed.stderr == ""
    return printed.stdout.splitlines()


@pytest.mark.parametrize("format", ["vllm", "sglang"])
def test_a_shell_reads_the_command_as_it_was_meant(proof: Proof, format: str) -> None:
    words = words_of(export_as(format, proof, "0.1.0"))
    assert "demo 5M" in words
    assert words[words.index("--max-model-len" if format == "vllm" else "--context-length") + 1] == "2048"
    assert "shortest_prefill" not in words


@pytest.mark.parametrize("format", ["vllm", "sglang", "env"])
def test_a_hostile_name_stays_a_name(proof: Proof, format: str) -> None:
    name = "x'; echo hacked >&2\necho hacked >&2 #$(echo hacked >&2)"
    bad = replace(
        proof, snapshot=Snapshot("s", T0, {"name": name}, {"device_name": name}, {"torch": name}, 2, [])
    )
    text = export_as(format, bad, "0.1.0")
    done = subprocess.run(
        ["sh", "-c", "vllm() { :; }; python() { :; }\n" + text], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_environment_starts_the_tuner_with_the_same_knobs(proof: Proof) -> None:
    lines = [line for line in export_as("env", proof, "0.1.0").splitlines() if not line.startswith("#")]
    environ = dict(shlex.split(line)[0].split("=", 1) for line in lines)
    assert EngineConfig.of(load_settings(environ=environ).knobs.start).values() == EVERY_KNOB


@pytest.mark.parametrize("format", ["json", "yaml"])
def test_a_file_starts_the_tuner_with_the_same_knobs(proof: Proof, tmp_path: Path, format: str) -> None:
    path = tmp_path / f"champion.{format}"
    path.write_text(export_as(format, proof, "0.1.0"))
    assert EngineConfig.of(load_settings(path, environ={}).knobs.start).values() == EVERY_KNOB


def test_json_is_one_document(proof: Proof) -> None:
    document = json.loads(export_as("json", proof, "0.1.0"))
    assert document["knobs"]["start"] == EVERY_KNOB
    assert document["evidence"]["provisional"] is True


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"weight_format": "int8"}, "weight_format = int8: quantise the checkpoint"),
        ({"policy": "fcfs"}, "--scheduling-policy fcfs"),
        ({"prefix_cache": "on"}, "--enable-prefix-caching"),
        ({"max_batched_tokens": 16}, "vLLM refuses fewer batched tokens than sequences"),
        ({"max_queued_requests": 100, "max_num_seqs": 10, "replicas": 3}, "--max-num-queued-reqs 130"),
        ({"kv_tokens": 100}, "--kv-cache-memory-bytes 409600"),
        ({"kv_watermark": 0.05}, "--watermark 0.05"),
        ({"kv_block": "64"}, "--block-size 64"),
        ({"kv_dtype": "auto"}, "--kv-cache-dtype auto"),
        ({"kv_dtype": "fp8"}, "kv_dtype = fp8: vLLM's fp8 cache"),
        ({"prefill_chunk": 64, "long_prompt_threshold": 48}, "--long-prefill-token-threshold 48"),
        ({"prefill_chunk": 64, "long_prompt_threshold": 4096}, "--long-prefill-token-threshold 64"),
        ({"policy": "longest_prefix"}, "policy = longest_prefix: vLLM admits by arrival"),
    ],
)
def test_vllm_is_told_what_its_arguments_mean(proof: Proof, values: dict[str, Any], wanted: str) -> None:
    assert wanted in export_as("vllm", with_knobs(proof, **values), "0.1.0")


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"policy": "longest_prefix", "prefix_cache": "on"}, "--schedule-policy lpm"),
        ({"kv_watermark": 0.05}, "kv_watermark = 0.05: SGLang keeps free what it guesses"),
        ({"kv_block": "64"}, "--page-size 64"),
        ({"kv_dtype": "fp8"}, "kv_dtype = fp8: SGLang's fp8 cache"),
    ],
)
def test_sglang_is_told_what_its_arguments_mean(proof: Proof, values: dict[str, Any], wanted: str) -> None:
    assert wanted in export_as("sglang", with_knobs(proof, **values), "0.1.0")


def test_bytes_that_are_not_recorded_are_not_guessed(proof: Proof) -> None:
    bad = replace(proof, snapshot=Snapshot("s", T0, {"name": "m"}, {}, {}, 2, []))
    assert "kv_tokens = 8192: vLLM sizes the cache in bytes" in export_as("vllm", bad, "0.1.0")


def test_an_unknown_form_names_those_there_are(proof: Proof) -> None:
    with pytest.raises(BadExport, match="one of yaml, json, vllm, sglang, env, but got 'toml'"):
        export_as("toml", proof, "0.1.0")
