"""A/A experiments: when they are due, and what is said of them."""

import math
from collections import Counter
from statistics import fmean

import pytest

from store.evidence import FalsePromotionRate
from store.interval import Rate
from tuner.against_itself import due_at, false_alarm_words


def test_takes_its_share_of_the_time_over_all_hours():
    at, hours, gaps = 0.0, Counter(), []
    for _ in range(2000):
        due = due_at(at, duration_s=300.0, share=0.02)
        gaps.append(due - at)
        hours[int(due // 3600) % 24] += 1
        at = due + 300.0
    assert fmean(gaps) == pytest.approx(300.0 / 0.02, rel=0.03)
    assert len(hours) == 24 and min(hours.values()) > 0.5 * 2000 / 24


def test_is_the_same_instant_after_a_restart():
    assert due_at(1234.5, 300.0, 0.02) == due_at(1234.5, 300.0, 0.02)


def test_share_of_nothing_is_never():
    assert due_at(0.0, 300.0, 0.0) == math.inf


def test_rate_is_told_with_its_interval():
    seen = FalsePromotionRate(Rate.of(1, 23), 0.05, 0, 14)
    assert false_alarm_words(seen) == (
        "A/A so far: 1 of 23 promoted, 4.3% (95 % interval 0.1% to 21.9%), allowed 5%; 14 of 24 hours seen."
    )
    assert false_alarm_words(FalsePromotionRate(Rate.of(0, 0), None, 0, 0)) == "A/A so far: none."
