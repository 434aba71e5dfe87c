"""Two people at the same desk: who decided on what they saw, and who was overtaken."""

import pytest

from runtime.knobs import EngineConfig
from store.database import Store
from store.tables import Experiment, OperatorAction, Recommendation, Verdict
from tests.simulated_runtime import IDENTITY, SimulatedRuntime
from tuner.promote import PromoteStage
from tuner.rows import ensure_config
from tuner.snapshot import record_snapshot
from tuner.wishes import Wish, WishDesk

START, FIRST, SECOND = (EngineConfig.of({"max_num_seqs": num}) for num in (2, 8, 16))


@pytest.fixture
def desk(tmp_path):
    with Store.open(tmp_path / "store") as store:
        snapshot_id = record_snapshot(store, IDENTITY, 0.0)
        promotion = PromoteStage(store, SimulatedRuntime(1.0), snapshot_id)
        promotion.apply("start", START, "The first configuration served here.", 1.0)
        ended = []
        one = WishDesk(store, promotion, lambda reason, now: ended.append(reason))
        one.snapshot_id, one.ended = snapshot_id, ended
        yield one


def recommend(desk, config):
    """A winning verdict for `config` against the present champion, waiting for a person."""
    with desk.store.journal() as session:
        ensure_config(session, config, 2.0)
        experiment_id = f"t-{config.config_id}"
        experiment = Experiment(
            experiment_id,
            "test",
            desk.snapshot_id,
            None,
            START.config_id,
            config.config_id,
            2.0,
            "DECIDED",
            {},
            1,
        )
        session.add(experiment)
        session.flush()
        verdict = Verdict(experiment_id, 3.0, "PROMOTE", "Faster.", -0.2, -0.3, -0.1, 10, 0.001, 0.0025, {})
        session.add(verdict)
        session.flush()
        row = Recommendation(verdict.verdict_id, config.config_id, 3.0, "OPEN")
        session.add(row)
        session.flush()
        return row.recommendation_id


def granted(desk, action, actor, **arguments):
    wish = Wish(action, arguments, actor)
    desk.grant(wish, 10.0)
    return wish.answer.result(timeout=0)


def actions(desk):
    with desk.store.journal() as session:
        return session.query(OperatorAction).order_by(OperatorAction.operator_action_id).all()


def test_of_two_operators_who_approve_at_once_the_first_counts_and_the_second_is_told(desk):
    number = recommend(desk, FIRST)
    seen = {"recommendation_id": number, "expected_champion": START.config_id}
    assert "is applied" in granted(desk, "approve", "ada", **seen)
    assert "was expected" in granted(desk, "approve", "grace", **seen)
    assert desk.promotion.champion() == FIRST
    assert [(row.actor, row.state, row.role) for row in actions(desk)] == [
        ("ada", "DONE", "operator"),
        ("grace", "REFUSED", "operator"),
    ]


def test_rollback_by_somebody_who_saw_another_champion_changes_nothing(desk):
    number = recommend(desk, FIRST)
    granted(desk, "approve", "ada", recommendation_id=number)
    answer = granted(desk, "rollback", "grace", to="previous", expected_champion=START.config_id)
    assert FIRST.config_id in answer and answer.startswith("Refused")
    assert desk.promotion.champion() == FIRST and len(desk.ended) == 1  # by the approval alone
    assert granted(desk, "rollback", "grace", to="previous", expected_champion=FIRST.config_id).startswith(
        "Rolled back"
    )
    assert desk.promotion.champion() == START


def test_one_approves_while_the_other_rejects_and_only_one_of_them_is_heard(desk):
    number = recommend(desk, FIRST)
    assert "is rejected" in granted(
        desk, "reject", "ada", recommendation_id=number, expected_champion=START.config_id
    )
    answer = granted(desk, "approve", "grace", recommendation_id=number, expected_champion=START.config_id)
    assert answer.startswith("Refused") and "REJECTED" in answer
    assert desk.promotion.champion() == START


def test_wish_without_an_expected_champion_is_granted_as_before(desk):
    number = recommend(desk, SECOND)
    assert "is applied" in granted(desk, "approve", "ada", recommendation_id=number)


def test_role_and_arguments_stand_in_the_audit_trail(desk):
    desk.grant(Wish("pause", {"expected_champion": START.config_id}, "ada", "operator"), 5.0)
    (row,) = actions(desk)
    assert (row.role, row.arguments, row.actor) == ("operator", {"expected_champion": START.config_id}, "ada")
