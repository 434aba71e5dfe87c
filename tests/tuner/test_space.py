from hypothesis import given
from hypothesis import strategies as st

from runtime.knobs import EngineConfig, default_config, knob_reports, presets, unmet_needs
from tuner.propose import past_trials
from tuner.space import (
    MAX_CHANGED_KNOBS,
    SearchSpace,
    clipped,
    is_allowed,
    keeping_promises,
    meeting_needs,
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
        "long_prompt_threshold",
        "kv_watermark",
        "speculation_max_seqs",
        "mixed_step_tokens",
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
        "policy": st.sampled_from(["fcfs", "shortest_prefill", "longest_prefix"]),
        "prefix_cache": st.sampled_from(["off", "on"]),
        "long_prompt_threshold": st.integers(16, 2048),
        "kv_watermark": st.floats(0, 0.5),
        "mixed_step_tokens": st.integers(16, 32768),
        "batch_wait_ms": st.floats(0, 200),
        "threads_decode": st.integers(1, 4),
        "threads_prefill": st.integers(1, 4),
    }
)


# As a real engine tells of its knobs, with the prefix cache to move.
WIDE = search_space(knob_reports(4, 64, max_model_len=2048), [*SPACE.names, "prefix_cache"], (), {})
CACHING = CHAMPION.patched({"policy": "longest_prefix", "prefix_cache": "on", "long_prompt_threshold": 64})


@given(knob_values, st.sampled_from([CHAMPION, CACHING]))
def test_projection_changes_at_most_two_knobs_and_stays_allowed(asked, champion):
    config = projected(asked, champion, WIDE)
    changes = config.changes_from(champion)
    assert len(changes) <= MAX_CHANGED_KNOBS
    by_name = {dimension.name: dimension for dimension in WIDE.dimensions}
    assert all(asked[name] == by_name[name].known(after) for name, (_, after) in changes.items())
    assert is_allowed(config, champion, WIDE) is None
    assert unmet_needs(config) == {}


def choices_of(space, name):
    return next((one.choices for one in space.dimensions if one.name == name), None)


def test_a_choice_is_searched_only_where_what_it_needs_is_there_or_may_come():
    assert choices_of(meeting_needs(SPACE, CHAMPION), "policy") == ("fcfs", "shortest_prefill")
    for space, champion in (
        (SPACE, CACHING),
        (SPACE, CHAMPION.patched({"prefix_cache": "on"})),
        (WIDE, CHAMPION),
    ):
        assert "longest_prefix" in choices_of(meeting_needs(space, champion), "policy")
    own = CHAMPION.patched({"policy": "longest_prefix"})  # somebody put it there: it is a value to come from
    assert "longest_prefix" in choices_of(meeting_needs(SPACE, own), "policy")
    narrow = search_space(REPORTS, None, (), {"policy": ["fcfs", "longest_prefix"]})
    assert choices_of(meeting_needs(narrow, CHAMPION), "policy") is None  # one choice is no choice


def test_the_limit_of_speculation_is_searched_where_there_is_any():
    """So the tuner learns above how many requests drafts cost more than they bring."""
    assert "speculation_max_seqs" in SPACE.names and "speculation_length" not in SPACE.names
    assert "speculation_max_seqs" not in meeting_needs(SPACE, CHAMPION).names
    drafting = CHAMPION.patched({"speculation_length": 4, "speculation_max_seqs": 8})
    found = meeting_needs(SPACE, drafting)
    assert "speculation_max_seqs" in found.names
    region = next(
        one for one in trust_region(found, drafting, 1).dimensions if one.name == "speculation_max_seqs"
    )
    assert (region.low, region.high) == (4, 16)
    moved = projected({"speculation_max_seqs": 16}, drafting, found)
    assert (
        moved == drafting.patched({"speculation_max_seqs": 16}) and is_allowed(moved, drafting, found) is None
    )
    named = search_space(REPORTS, ["speculation_length", "speculation_max_seqs"], (), {})
    assert meeting_needs(named, CHAMPION).names == named.names, "both may move"


def test_a_choice_without_what_it_needs_is_never_proposed():
    both = {"policy": "longest_prefix", "prefix_cache": "on"}
    assert projected(both, CHAMPION, WIDE) == CHAMPION.patched(both)
    assert projected({**both, "prefix_cache": "off"}, CHAMPION, WIDE) == CHAMPION
    assert projected({**both, "prefix_cache": "off"}, CACHING, WIDE) == CACHING
    alone = CHAMPION.patched({"policy": "longest_prefix"})
    assert is_allowed(alone, CHAMPION, WIDE) == (
        "`policy` longest_prefix needs `prefix_cache` to be on, but got off."
    )
    assert is_allowed(alone.patched({"max_num_seqs": 3}), alone, WIDE) is None  # it was so before
    held = search_space(REPORTS, [*SPACE.names, "prefix_cache"], ("policy",), {})
    assert clipped(EngineConfig(), CACHING, held).prefix_cache == "on"


def test_off_is_where_no_prompt_is_long_and_the_search_starts_there():
    region = trust_region(WIDE, CHAMPION, 2)
    threshold = next(one for one in region.dimensions if one.name == "long_prompt_threshold")
    assert (threshold.low, threshold.high) == (512, 2048)
    assert SearchSpace.from_dict(region.to_dict()) == region
    past = [{"values": CHAMPION.values(), "value": 0.0, "constraints": {}}]
    assert past_trials(region, past)[0].params["long_prompt_threshold"] == 2048
    assert projected({"long_prompt_threshold": 2048}, CHAMPION, WIDE) == CHAMPION
    again = projected({"long_prompt_threshold": 2048}, CACHING, WIDE)
    assert again.long_prompt_threshold == CHAMPION.long_prompt_threshold == 1_048_576
    assert is_allowed(again, CACHING, WIDE) is None
    assert clipped(CHAMPION, CACHING, WIDE).long_prompt_threshold == 1_048_576


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
