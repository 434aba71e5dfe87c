import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import InvalidKnob
from runtime.knobs import KNOBS, EngineConfig, default_config, knob_named, knob_reports, presets

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
)


def test_declared_knobs_are_these():
    assert tuple(knob.name for knob in KNOBS) == NAMES


def test_every_default_passes_its_own_check():
    assert EngineConfig.of(EngineConfig().values()) == EngineConfig()


def test_config_id_depends_on_every_knob_and_on_nothing_else():
    base = EngineConfig()
    others = {
        base.patched({knob.name: knob.choices[1] if knob.choices else knob.high}).config_id for knob in KNOBS
    }
    assert len(others | {base.config_id}) == len(KNOBS) + 1
    assert EngineConfig.of(dict(reversed(list(base.values().items())))).config_id == base.config_id


def test_config_id_is_a_stable_name():
    assert EngineConfig().config_id == "25596f452fe2"  # a change here orphans every stored configuration


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


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_presets_include_the_default_and_are_distinct(device):
    points = presets(device, 4)
    assert points["default"] == default_config(device, 4)
    assert len({config.config_id for config in points.values()}) == len(points)
