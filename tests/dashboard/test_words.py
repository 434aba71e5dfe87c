import json
import re
from datetime import UTC
from types import SimpleNamespace
from zoneinfo import ZoneInfo

import pytest

from dashboard.words import (
    escaped,
    told_at,
    told_duration,
    told_effect,
    told_interval,
    told_odds,
    told_percent,
    told_share,
    told_utc,
    told_value,
    told_verdict,
)


@pytest.mark.parametrize(
    "text",
    [
        "<b>x</b>",
        "[a](http://b)",
        "![a](b)",
        ":red[a]",
        ":material/home:",
        "$x$",
        "`x`",
        "# x",
        "a\n\n- b",
        "~~x~~",
        "a|b",
    ],
)
def test_every_character_that_markdown_acts_on_is_escaped(text):
    shown = escaped(text)
    for index, character in enumerate(shown):
        if character in "<>[]()!:$`#~|*_{}":
            assert shown[index - 1] == "\\", shown
    bare = shown.replace("\\", "").replace("\u2060", "")
    assert "\n" not in shown and bare == " ".join(text.split())


@pytest.mark.parametrize(
    "text", ["see http://evil.example", "HTTPS://evil.example", "www.evil.example", "a@evil.example"]
)
def test_addresses_do_not_become_links(text):
    """As remark-gfm finds them in text whose escapes are gone."""
    bare = escaped(text).replace("\\", "")
    assert re.search(r"https?://|www(?=\.)|[-.\w+]+@[-\w]", bare, re.IGNORECASE) is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-1, "0 s"), (40, "40 s"), (720, "12 min"), (11_100, "3 h 5 min"), (187_200, "2 d 4 h")],
)
def test_durations_are_told_in_the_unit_that_fits(seconds, words):
    assert told_duration(seconds) == words


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [
        (None, "s", "–"),
        (0.0123, "s", "12.3 ms"),
        (2.5, "s", "2.50 s"),
        (0.5, "ratio", "50 %"),
        (0.0, "ratio", "0 %"),
        (0.004, "ratio", "0.4 %"),
        (3 * 2**30, "bytes", "3.0 GiB"),
        (5.0, "requests", "5 requests"),
    ],
)
def test_values_carry_their_unit_and_an_absent_one_is_not_zero(value, unit, words):
    assert told_value(value, unit) == words


def test_effects_say_the_direction_in_words():
    assert told_effect("e2e_s", -0.22) == "e2e_s fell by 22.0 %."
    assert told_effect("e2e_s", 0.22) == "e2e_s rose by 22.0 %."
    assert told_effect("e2e_s", 0.0) == "e2e_s stayed the same."
    assert told_percent(-0.2) == "−20.0 %" and told_interval(None, 1.0) == "no interval yet: too few pairs"
    assert told_odds(0.0025) == "1 in 400" and told_share(None) == "–"


def test_times_are_local_with_the_date_only_where_it_is_another_day():
    at = 1_790_000_000.0
    assert told_at(at, ZoneInfo("Asia/Tokyo"), at) == "23:13:20" and told_at(at, UTC, at) == "14:13:20"
    assert told_at(at, UTC, at + 86400) == "2026-09-21 14:13:20"
    assert told_utc(at) == "2026-09-21 14:13:20 UTC" and told_at(None, UTC) == "–"


def verdict(outcome, **changed):
    told = {
        "effect_ratio": -0.2,
        "interval_low_ratio": -0.3,
        "interval_high_ratio": -0.1,
        "num_pairs": 10,
        "level": 0.0025,
    }
    return SimpleNamespace(outcome=outcome, **{**told, **changed})


def test_verdict_explains_chance_only_where_something_was_proven():
    words = " ".join(told_verdict(verdict("PROMOTE"), "e2e_s"))
    assert "Proven better" in words and "1 in 400" in words and "−30.0 % to −10.0 %" in words
    words = " ".join(told_verdict(verdict("INCONCLUSIVE", interval_low_ratio=None), "e2e_s"))
    assert "not a proof of no difference" in words and "1 in" not in words
    assert json.dumps(words)  # plain text, no markup objects
