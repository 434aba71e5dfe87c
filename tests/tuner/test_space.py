from hypothesis import given
from hypothesis import strategies as st

from runtime.knobs import EngineConfig, default_config, knob_reports, presets
from tuner.space import (
    MAX_CHANGED_KNOBS,
    SearchSpace,
    clipped,
    is_allowed,
    keeping_promises,
    projected,
    search_space,
    trust_after,
    trust_region,
)

REPORTS = knob_reports(num_cores=4, max_num_seqs=64)
SPACE = search_space(REPORTS, None, (), {})
CHAMPION = EngineConfig.of({"max_num_seqs": 2, "batch_wait_ms": 50, "max_batched_tokens": 64})


def test_space_holds_what_the_engine_reports_as_searched():
    assert SPACE.names == (
        "max_num_seqs",
        "max_batched_tokens",
        "prefill_chunk",
        "policy",
        "batch_wait_ms",
        "threads_decode",
        "threads_prefill",
    )
    seqs = SPACE.dimensions[0]
    assert (seqs.low, seqs.high, seqs.log) == (1, 64, True)


def test_denied_knob_is_absent_and_allow_admits_an_unsearched_one():
    assert "policy" not in search_space(REPORTS, None, ("policy",), {}).names
    assert search_space(REPORTS, ("max_queued_requests",), (), {}).names == ("max_queued_requests",)


def test_a_promise_to_clients_is_neither_made_nor_broken_by_a_search():
    space = search_space(knob_reports(2, 256), None, (), {})
    policy = next(dimension for dimension in space.dimensions if dimension.name == "policy")
    assert "priority" not in policy.choices and "fcfs" in policy.choices
    assert "policy" not in keeping_promises(space, EngineConfig.of({"policy": "priority"})).names
    assert keeping_promises(space, EngineConfig()) == space


def test_bounds_narrow_numbers_and_choices():
    space = search_space(REPORTS, None, (), {"max_num_seqs": [4, 32], "policy": ["fcfs"]})
    assert "policy" not in space.names  # one choice is no choice
    assert (space.dimensions[0].low, space.dimensions[0].high) == (4, 32)


def test_trust_region_is_one_factor_of_two_around_the_champion():
    region = trust_region(SPACE, CHAMPION, 1)
    bounds = {d.name: (d.low, d.high) for d in region.dimensions}
    assert bounds["max_num_seqs"] == (1, 4)
    assert bounds["max_batched_tokens"] == (32, 128)
    assert bounds["batch_wait_ms"] == (25.0, 75.0)


def test_champion_outside_narrowed_bounds_keeps_a_valid_region():
    space = search_space(REPORTS, None, (), {"max_num_seqs": [8, 32]})
    seqs = trust_region(space, CHAMPION, 1).dimensions[0]
    assert seqs.low <= seqs.high


knob_values = st.fixed_dictionaries(
    {
        "max_num_seqs": st.integers(1, 64),
        "max_batched_tokens": st.integers(16, 32768),
        "prefill_chunk": st.integers(16, 16384),
        "policy": st.sampled_from(["fcfs", "shortest_prefill"]),
        "batch_wait_ms": st.floats(0, 200),
        "threads_decode": st.integers(1, 4),
        "threads_prefill": st.integers(1, 4),
    }
)


@given(knob_values)
def test_projection_changes_at_most_two_knobs_and_stays_allowed(asked):
    config = projected(asked, CHAMPION, SPACE)
    changes = config.changes_from(CHAMPION)
    assert len(changes) <= MAX_CHANGED_KNOBS
    assert all(asked[name] == after for name, (_, after) in changes.items())
    assert is_allowed(config, CHAMPION, SPACE) is None


@given(st.sampled_from(sorted(presets("cpu", 4))), st.booleans())
def test_clipped_presets_never_leave_the_space(name, narrow):
    bounds = {"max_num_seqs": [2, 8]} if narrow else {}
    space = search_space(REPORTS, None, ("policy",), bounds)
    config = clipped(presets("cpu", 4)[name], CHAMPION, space)
    assert is_allowed(config, CHAMPION, space) is None
    assert config.policy == CHAMPION.policy


def test_forbidden_move_names_the_rule():
    assert "may not move" in is_allowed(CHAMPION.patched({"max_queued_requests": 5}), CHAMPION, SPACE)
    assert "[1, 64]" in is_allowed(CHAMPION.patched({"max_num_seqs": 65}), CHAMPION, SPACE)


def test_space_survives_its_own_json():
    assert SearchSpace.from_dict(SPACE.to_dict()) == SPACE


def test_trust_grows_after_a_promotion_and_halves_after_a_reject():
    assert [trust_after(outcome, 2) for outcome in ("PROMOTE", "REJECT", "INCONCLUSIVE")] == [4, 1, 2]
    assert trust_after("PROMOTE", 4) == 4
    assert trust_after("REJECT", 1) == 1


def test_default_leaves_a_core_to_the_front_end():
    assert default_config("cpu", 8).threads_decode == 7
    assert default_config("cpu", 1).threads_decode == 1
