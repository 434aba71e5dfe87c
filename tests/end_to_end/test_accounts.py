"""The book-keeping of the kill matrix itself: it must not overlook what it is there to find."""

from tests.end_to_end.accounts import Kill, settle

KILL = Kill(at=100.0, pid=1, recovered_s=5.0)


def sent(n, at=100.0):
    return {"n": n, "sent_at": at, "streamed": False, "asked": 4, "prompt": "p"}


def ended(n, outcome="ok", at=100.0, done_at=101.0, **told):
    return {**sent(n, at), "outcome": outcome, "id": f"cmpl-{n}", "text": "t", "done_at": done_at, **told}


def accounts(*lines, stored=(), excuses=()):
    return settle(lines, stored, frozenset(excuses), [KILL], slack_s=2.0)


def test_request_without_an_end_is_lost():
    assert accounts(sent(1), sent(2), ended(2), stored=["2"]).lost == [1]


def test_answer_without_a_row_is_missing_and_two_rows_are_doubled():
    found = accounts(sent(1), ended(1), sent(2), ended(2), stored=["2", "2"])
    assert (found.missing, found.doubled, found.num_ok) == (["1"], ["2"], 2)


def test_failure_is_excused_by_its_kind_and_only_around_a_kill():
    kinds = ("stream error engine_restarted",)
    near = ended(1, "stream error", detail="engine_restarted")
    far = ended(2, "stream error", at=120.0, done_at=121.0, detail="engine_restarted")
    before = ended(3, "stream error", at=90.0, done_at=91.0, detail="engine_restarted")
    other = ended(4, "refused", status=500, detail="internal_error")
    found = accounts(near, far, before, other, excuses=kinds)
    assert [line["n"] for line in found.not_allowed] == [2, 3, 4]
    assert found.failed == {"stream error engine_restarted": 3, "refused 500 internal_error": 1}


def test_answer_in_other_words_is_counted():
    assert accounts(ended(1), ended(2), ended(3, text="u"), stored=["1", "2", "3"]).other_words == 1


def test_row_that_nobody_asked_for_is_counted():
    assert accounts(ended(1), stored=["1", "9"]).unknown_rows == 1
