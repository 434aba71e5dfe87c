"""What the experiments taught about the tuner itself, counted from the rows."""

import math
from statistics import fmean

import pytest

from store import evidence
from store.database import Store
from store.interval import Rate, anytime_interval
from store.tables import Experiment, Slice, Verdict
from tests.store.story import AA, HOLDBACK, NEW, OLD, SNAPSHOT, T0, TEST


def add_holdback(store: Store, number: int, difference: float) -> None:
    """One pair: the former champion's response lies `difference` above the promoted one's."""
    at, name = T0 + 1000.0 + 100.0 * number, f"h-{number}"
    with store.journal() as session:
        session.add(
            Experiment(name, "holdback", SNAPSHOT, None, NEW, OLD, at, "DECIDED", {}, number, reason="scored")
        )
        session.flush()
        for position, (arm, config_id) in enumerate((("champion", NEW), ("challenger", OLD))):
            row = Slice(
                f"{name}-{arm}",
                name,
                0,
                position,
                arm,
                config_id,
                0,
                "hash",
                at + position,
                at + 2,
                0.0,
                "SCORED",
            )
            row.response = difference if arm == "challenger" else 0.0
            session.add(row)


def add_aa(store: Store, number: int, outcome: str, reason: str, hour: int, state: str = "DECIDED") -> None:
    name = f"a-{number}"
    with store.journal() as session:
        session.add(
            Experiment(
                name, "aa", SNAPSHOT, None, NEW, NEW, 3600.0 * hour, state, {"level": 0.05}, 1, reason=reason
            )
        )
        session.flush()
        session.add(Verdict(name, 3600.0 * hour, outcome, reason, None, None, None, 10, None, 0.05, {}))


def test_realised_gain_is_what_the_holdback_pairs_say_beside_what_the_verdict_promised(told: Store) -> None:
    with told.journal() as session:
        gain = evidence.realised_gain(session)
    assert gain is not None and gain.num_pairs == 1
    assert gain.gain_ratio == pytest.approx(1 - math.exp(-0.25))
    assert gain.promised_ratio == pytest.approx(0.2212, abs=1e-4)
    assert gain.low_ratio is None and gain.high_ratio is None


def test_realised_gain_has_an_interval_once_there_are_pairs(told: Store) -> None:
    differences = [0.25, *(0.2 + 0.02 * number for number in range(9))]
    for number, difference in enumerate(differences[1:]):
        add_holdback(told, number, difference)
    with told.journal() as session:
        gain = evidence.realised_gain(session)
    interval = anytime_interval(differences, 0.05)
    assert gain is not None and interval is not None and gain.num_pairs == 10
    assert gain.gain_ratio == pytest.approx(1 - math.exp(-fmean(differences)))
    assert gain.low_ratio == pytest.approx(1 - math.exp(-interval.low))
    assert gain.high_ratio == pytest.approx(1 - math.exp(-interval.high))


def test_there_is_no_gain_without_a_promotion(store: Store) -> None:
    with store.journal() as session:
        assert evidence.realised_gain(session) is None


def test_newest_holdback_pair_is_known(told: Store) -> None:
    with told.journal() as session:
        change = session.get(evidence.Change, 2)
        assert change is not None
        assert evidence.last_holdback_at(session, change) == session.get(Experiment, HOLDBACK).created_at


def test_false_promotions_are_counted_over_experiments_that_were_judged(told: Store) -> None:
    add_aa(told, 1, "REJECT", "Not worth a change.", hour=3)
    add_aa(told, 2, "PROMOTE", "The challenger is faster.", hour=4)
    add_aa(told, 3, "REJECT", "harm: twice as slow", hour=4, state="STOPPED")
    add_aa(told, 4, "INCONCLUSIVE", "interrupted: the daemon was stopped", hour=5, state="STOPPED")
    add_aa(told, 5, "INCONCLUSIVE", "5 pairs were void", hour=6, state="STOPPED")
    with told.journal() as session:
        seen = evidence.false_promotion_rate(session, SNAPSHOT)
        assert evidence.false_promotion_rate(session, "another").rate.total == 0
        assert evidence.false_promotion_rate(session, since_at=3.5 * 3600).rate.total == 2
    assert (seen.rate.num, seen.rate.total, seen.num_stopped, seen.num_hours) == (1, 3, 1, 2)
    assert seen.level == 0.05 and seen.rate.low < 1 / 3 < seen.rate.high


def test_a_promotion_by_test_is_no_false_alarm(told: Store) -> None:
    with told.journal() as session:
        assert session.get(Experiment, TEST) is not None and session.get(Experiment, AA) is not None
        assert evidence.false_promotion_rate(session).rate == Rate(0, 0, 0.0, 1.0)


def test_harm_of_the_day_is_summed_over_experiments_that_ended_in_it(told: Store) -> None:
    with told.journal() as session:
        for name, ended_at, excess_s in ((TEST, T0 + 300.0, 7.0), (HOLDBACK, T0 + 950.0, 5.0)):
            row = session.get(Experiment, name)
            assert row is not None
            row.ended_at, row.planning = ended_at, {"harm": {"excess_s": excess_s}}
    with told.journal() as session:
        assert evidence.harm_spent_s(session, T0) == 12.0
        assert evidence.harm_spent_s(session, T0 + 500.0) == 5.0


def test_request_seconds_are_those_of_the_slices_named(told: Store) -> None:
    with told.metrics() as session:
        champion = evidence.request_seconds_of(session, ["t1-0-champion"])
        nothing = evidence.request_seconds_of(session, [])
        everything = evidence.request_seconds_between(session, 0.0, 9e9)
    assert champion.num == 9 and champion.total_s == pytest.approx(9 * 2.0 + 0.1 * 36 + 100.0)
    assert nothing == (0, 0.0) and everything.num == 90
