import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import InvalidKnob
from runtime.knobs import (
    KNOBS,
    EngineConfig,
    Need,
    config_id_of,
    default_config,
    knob_named,
    knob_reports,
    presets,
    unmet_needs,
)

NAMES = (
    "max_num_seqs",
    "max_batched_tokens",
    "prefill_chunk",
    "policy",
    "batch_wait_ms",
    "threads_decode",
    "threads_prefill",
    "max_queued_requests",
    "weight_format",
    "kv_tokens",
    "prefix_cache",
    "replicas",
    "long_prompt_threshold",
    "kv_watermark",
    "overlap_depth",
    "stream_interval",
    "speculation_length",
    "speculation_max_seqs",
    "kv_block",
    "kv_dtype",
    "mixed_step_tokens",
    "linear_backend",
)


def test_declared_knobs_are_these():
    assert tuple(knob.name for knob in KNOBS) == NAMES


def test_every_default_passes_its_own_check():
    assert EngineConfig.of(EngineConfig().values()) == EngineConfig()


def other_than_default(knob):
    if knob.choices:
        return knob.choices[1]
    return knob.low if knob.default == knob.high else knob.high


def test_config_id_depends_on_every_knob_and_on_nothing_else():
    base = EngineConfig()
    others = {base.patched({knob.name: other_than_default(knob)}).config_id for knob in KNOBS}
    assert len(others | {base.config_id}) == len(KNOBS) + 1
    assert EngineConfig.of(dict(reversed(list(base.values().items())))).config_id == base.config_id


@pytest.mark.parametrize(
    ("config", "config_id"),  # a change here orphans every stored configuration
    [
        (EngineConfig(), "25596f452fe2"),
        (EngineConfig.of({"max_num_seqs": 2, "batch_wait_ms": 50, "max_batched_tokens": 64}), "c1468b266aa1"),
        (
            EngineConfig.of(
                {"policy": "shortest_prefill", "prefix_cache": "on", "kv_tokens": 8192, "replicas": 2}
            ),
            "05d21cc88dd3",
        ),
        (default_config("cuda", 8).patched({"max_num_seqs": 256}), "8d842a2d7fca"),
    ],
)
def test_config_id_is_a_stable_name(config, config_id):
    assert config.config_id == config_id


def test_what_was_stored_before_a_knob_was_declared_is_the_configuration_with_its_default():
    later = [knob for knob in KNOBS if knob.is_later]
    values = EngineConfig.of({"max_num_seqs": 2}).values()
    stored = {name: value for name, value in values.items() if name not in {knob.name for knob in later}}
    assert len(later) == len(values) - len(stored) > 0
    assert EngineConfig.of(stored).values() == values
    assert EngineConfig.of(stored).config_id == config_id_of(stored) == config_id_of(values)
    assert {knob.name for knob in later}.isdisjoint(NAMES[:12])  # those that the first ids were made of


def test_a_choice_says_what_it_needs():
    assert unmet_needs(EngineConfig()) == {}
    bare = EngineConfig.of({"policy": "longest_prefix"})
    assert unmet_needs(bare) == {"policy": Need("longest_prefix", "prefix_cache", "on")}
    assert unmet_needs(bare.patched({"prefix_cache": "on"})) == {}
    for knob in KNOBS:
        for need in knob.needs:
            assert need.choice in knob.choices and knob_named(need.knob).check(need.value) == need.value


@pytest.mark.parametrize("value", [0, 1025, 2.5, "8", True, math.nan, math.inf, None])
def test_bad_max_num_seqs_is_refused_with_rule_and_value(value):
    with pytest.raises(InvalidKnob, match="`max_num_seqs` must be"):
        EngineConfig.of({"max_num_seqs": value})


def test_unknown_knob_gets_a_suggestion():
    with pytest.raises(InvalidKnob, match="Did you mean `max_num_seqs`"):
        EngineConfig.of({"max_num_seq": 4})


def test_whole_floats_become_ints():
    assert isinstance(EngineConfig.of({"max_num_seqs": 8.0}).max_num_seqs, int)


@given(st.data())
def test_config_round_trips_through_its_values(data):
    values = {
        knob.name: data.draw(
            st.sampled_from(knob.choices)
            if knob.choices
            else st.integers(int(knob.low), int(knob.high))
            if knob.kind == "int"
            else st.floats(knob.low, knob.high)
        )
        for knob in KNOBS
    }
    config = EngineConfig.of(values)
    assert EngineConfig.of(config.values()).config_id == config.config_id


def test_reports_lower_ceilings_to_the_machine():
    reports = {report["name"]: report for report in knob_reports(num_cores=2, max_num_seqs=32)}
    assert (reports["threads_decode"]["high"], reports["max_num_seqs"]["high"]) == (2, 32)
    assert knob_named("threads_decode").high == 256
    assert reports["long_prompt_threshold"]["high"] == 1_048_576


def test_no_prompt_is_long_beyond_what_the_model_can_read():
    reports = {report["name"]: report for report in knob_reports(2, 32, max_model_len=2048)}
    told = reports["long_prompt_threshold"]
    assert (told["high"], told["default"], told["is_off_at_high"]) == (2048, 1_048_576, True)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_presets_include_the_default_and_are_distinct(device):
    points = presets(device, 4)
    assert points["default"] == default_config(device, 4)
    assert len({config.config_id for config in points.values()}) == len(points)


def test_smooth_decode_lowers_the_budget_of_mixed_steps_where_one_was_fitted():
    default = default_config("cuda", 4, {"mixed_step_tokens": 1536})
    smooth = presets("cuda", 4, {"mixed_step_tokens": 1536})["smooth decode"]
    assert smooth.changes_from(default) == {"mixed_step_tokens": (1536, 768)}
    off = presets("cuda", 4)["smooth decode"]
    assert off.changes_from(default_config("cuda", 4)) == {"prefill_chunk": (2048, 512)}


def test_the_budget_of_mixed_steps_is_off_at_its_highest_also_where_memory_bounds_steps():
    assert (
        EngineConfig().mixed_tokens == math.inf
        and EngineConfig.of({"mixed_step_tokens": 512}).mixed_tokens == 512
    )
    fitted = {"mixed_step_tokens": 1536}
    free = {report["name"]: report for report in knob_reports(2, 32, fitted)}["mixed_step_tokens"]
    assert (free["high"], free["default"], free["is_off_at_high"]) == (32768, 1536, True)
    tight = {report["name"]: report for report in knob_reports(2, 32, fitted, max_batched_tokens=4096)}
    assert (tight["mixed_step_tokens"]["high"], tight["max_batched_tokens"]["high"]) == (32768, 4096)
