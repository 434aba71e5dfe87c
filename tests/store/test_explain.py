import pytest

from store.database import Store
from store.errors import UnknownRow
from store.explain import Pair, experiment_record, explain
from store.tables import Slice
from tests.store.story import HOLDBACK, NEW, NEW_VALUES, OLD, PROBE, T0, TEST


def test_a_promotion_is_explained_from_its_cause_to_its_application(told: Store) -> None:
    with told.journal() as journal:
        why = explain(journal, change_id=2)
    assert why.change is not None and why.change.kind == "promote"
    assert why.recommendation is not None and why.recommendation.decided_by == "ada"
    assert why.verdict is not None and why.verdict.outcome == "PROMOTE"
    assert why.record is not None and why.record.experiment.experiment_id == TEST
    assert why.record.spend is not None and why.record.spend.level == 0.0025
    assert why.record.twin_fit is not None and why.record.twin_fit.is_used
    assert why.trial is not None and why.trial.trial_id == 1
    assert why.probe is not None and why.probe.experiment.experiment_id == PROBE
    assert why.proposal is not None and why.proposal.origin == "search"
    assert why.study is not None and why.study.seed == 7
    assert why.cause == "p95 of e2e_s breached its SLO"
    assert why.changed_knobs == {"prefill_chunk": (256, 64), "policy": ("fcfs", "shortest_prefill")}
    assert why.snapshot.model["name"] == "demo"


def test_an_experiment_leads_to_the_same_explanation_as_its_change(told: Store) -> None:
    with told.journal() as journal:
        assert explain(journal, experiment_id=TEST) == explain(journal, change_id=2)


def test_a_start_has_a_reason_and_no_verdict(told: Store) -> None:
    with told.journal() as journal:
        why = explain(journal, change_id=1)
    assert (why.record, why.trial, why.study, why.verdict, why.from_config) == (None, None, None, None, None)
    assert why.cause == "First start."
    assert set(why.changed_knobs) == set(NEW_VALUES)


def test_an_experiment_without_a_verdict_and_a_study_is_explained_as_far_as_it_goes(told: Store) -> None:
    with told.journal() as journal:
        holdback, probe = explain(journal, experiment_id=HOLDBACK), explain(journal, experiment_id=PROBE)
    assert (holdback.change, holdback.study, holdback.trial, holdback.cause) == (None, None, None, "")
    assert (holdback.to_config.config_id, holdback.record is not None) == (OLD, True)
    assert probe.trial is not None and probe.probe is None, "the record itself is the probe"
    assert probe.to_config.config_id == NEW


def test_pairs_keep_the_order_in_which_they_were_served(told: Store) -> None:
    with told.journal() as journal:
        record = experiment_record(journal, TEST)
    assert [pair.index for pair in record.pairs] == [0, 1, 2, 3, 4]
    assert [pair.slices[0].arm for pair in record.pairs] == ["champion", "challenger"] * 2 + ["champion"]
    assert [pair.difference for pair in record.pairs] == pytest.approx([-0.25] * 5)
    assert record.changed_knobs == {"prefill_chunk": (256, 64), "policy": ("fcfs", "shortest_prefill")}


def test_a_pair_that_is_not_scored_on_both_sides_has_no_difference(told: Store) -> None:
    def row(arm: str, state: str, response: float | None) -> Slice:
        return Slice(arm, TEST, 0, 0, arm, NEW, 0, "h", T0, T0 + 1, 0.0, state, response=response)

    scored = row("champion", "SCORED", 0.1)
    assert Pair(0, (scored,)).difference is None
    assert Pair(0, (scored, row("challenger", "VOID", None))).difference is None
    assert Pair(0, (row("champion", "VOID", 0.1), row("challenger", "VOID", 0.1))).difference is None
    assert Pair(0, (scored, row("challenger", "SCORED", 0.3))).difference == pytest.approx(0.2)


def test_an_unknown_id_is_named(told: Store) -> None:
    with told.journal() as journal:
        with pytest.raises(UnknownRow, match=r"No change has the id 99. `tuner history` lists"):
            explain(journal, change_id=99)
        with pytest.raises(UnknownRow, match="No experiment has the id 'nope'"):
            explain(journal, experiment_id="nope")
        with pytest.raises(ValueError, match="one of the two, but got None and None"):
            explain(journal)
