import pytest

from tuner.promote import describe, rollback_target


@pytest.mark.parametrize(
    ("history", "to", "target"),
    [
        ([], "previous", None),
        (["a"], "previous", None),
        (["a", "b"], "previous", "a"),
        (["a", "b", "c"], "previous", "b"),
        (["a", "b", "c", "b"], "previous", "a"),  # c was rolled back: once more walks further back
        (["a", "b", "a"], "previous", None),
        (["a", "b", "b"], "previous", "a"),  # put back in force after a restart
        (["a", "b", "c"], "initial", "a"),
        (["a", "b", "a"], "initial", None),
    ],
)
def test_rollback_walks_back_and_never_to_and_fro(history, to, target):
    assert rollback_target(history, to) == target


def test_difference_names_the_knobs_that_moved():
    assert describe({"a": 2, "b": 1}, {"a": 1, "b": 1}) == "a 1 -> 2"
    assert describe({"a": 1}, {"a": 1}) == "no difference"
