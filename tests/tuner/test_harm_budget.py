"""What a day of experiments may cost, and what it did."""

import pytest

from store.evidence import RequestSeconds
from tuner.harm_budget import HarmLedger, day_budget_s, harm_done


def test_excess_is_what_the_challengers_requests_took_beyond_the_champions():
    assert harm_done(RequestSeconds(10, 10.0), RequestSeconds(20, 50.0)).excess_s == 30.0


def test_a_faster_challenger_costs_nothing():
    assert harm_done(RequestSeconds(10, 10.0), RequestSeconds(20, 5.0)).excess_s == 0.0


def test_a_challenger_stopped_before_the_champion_served_is_measured_against_the_past():
    assert harm_done(RequestSeconds(0, 0.0), RequestSeconds(4, 12.0), past_mean_s=1.0).excess_s == 8.0
    assert harm_done(RequestSeconds(0, 0.0), RequestSeconds(4, 12.0)).excess_s == 0.0


def test_budget_is_a_share_of_all_the_time_that_requests_spend():
    assert day_budget_s(0.02, request_seconds=300.0, span_s=100.0) == pytest.approx(0.02 * 3.0 * 86_400)


def test_ledger_is_spent_at_its_budget_and_never_without_one():
    assert HarmLedger(100.0, 100.0).is_spent and not HarmLedger(100.0, 99.0).is_spent
    assert not HarmLedger(0.0, 5.0).is_spent
    assert (
        HarmLedger(100.0, 25.0).words == "25% of the day's harm budget is spent (25 of 100 request-seconds)"
    )
