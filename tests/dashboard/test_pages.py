"""Every page in every state: empty, learning, live, stale, stopped, frozen, locked, newer, damaged, missing."""

import re
import sqlite3
import time

import pytest

from store.connection import sqlite_library
from tests.dashboard.conftest import PAGES, text_of
from tests.dashboard.stories import HOSTILE, add_gpu, add_running, add_samples, add_trouble, add_waiting
from tests.store.story import NEW, OLD, TEST


def asked_for(app, name):
    """A value of the page's address."""
    value = app.query_params[name]
    return value[0] if isinstance(value, list) else value


every_page = pytest.mark.parametrize("page", PAGES)


# --- states that every page has -------------------------------------------------------------------


@every_page
def test_missing_store_is_told_with_the_command_that_makes_one(opened, data_dir, page):
    app = opened(page)
    assert "Nothing has been recorded here yet" in text_of(app)
    assert f"tuner run --data-dir {data_dir}" in [one.value for one in app.code]


@every_page
def test_empty_store_is_a_designed_page(opened, empty, page):
    said = {
        "overview": "No configuration serves yet",
        "history": "No samples in this range",
        "experiments": "No experiment yet",
        "recommendations": "Nothing waits for you",
    }
    assert said[page] in text_of(opened(page))


@every_page
def test_stopped_daemon_and_stale_data_are_told_with_their_age_and_the_command(opened, told, data_dir, page):
    add_samples(told, time.time() - 7200)
    text = text_of(opened(page))
    assert "daemon stopped" in text and "stale: the newest sample is 2 h 0 min old" in text
    assert f"tuner run --data-dir {data_dir}" in text


@every_page
def test_live_daemon_is_told_with_mode_engine_and_age(opened, told, served, page):
    served()
    add_samples(told, time.time())
    text = text_of(opened(page))
    assert "daemon running, mode approve" in text and "engine ready" in text and "live, " in text
    assert "stopped" not in text


@every_page
@pytest.mark.parametrize(
    ("version", "title"), [(99, "newer version"), (1, "older version")], ids=["newer", "older"]
)
def test_store_of_another_version_is_told_and_not_read(opened, told, data_dir, page, version, title):
    told.close()
    for name in ("journal.db", "metrics.db"):
        with sqlite3.connect(data_dir / name) as file:
            file.execute(f"PRAGMA user_version = {version}")
        file.close()
    assert f"written by an {title}" in (text := text_of(opened(page))).replace("a newer", "an newer"), text


@every_page
def test_damaged_store_is_told(opened, told, data_dir, page):
    told.close()
    (data_dir / "journal.db-wal").unlink(missing_ok=True)
    (data_dir / "journal.db").write_bytes(b"not a database at all, " * 500)
    assert "damaged" in text_of(opened(page))


@every_page
def test_locked_store_is_told_and_tried_again(opened, told, data_dir, page, monkeypatch):
    told.close()
    monkeypatch.setattr("store.connection.BUSY_TIMEOUT_S", 0.1)
    with sqlite_library().module.connect(data_dir / "journal.db") as holder:
        holder.execute("PRAGMA locking_mode = EXCLUSIVE")
        holder.execute("BEGIN EXCLUSIVE")
        text = text_of(opened(page))
        holder.rollback()
    holder.close()
    assert "locked by another process" in text and "tries again" in text


@every_page
def test_defect_is_a_sentence_and_not_a_traceback(opened, told, page, monkeypatch):
    def broken(*_):
        raise KeyError("secret detail")

    for name in ("data.overview", "records.history", "records.experiment_list", "records.recommendations"):
        monkeypatch.setattr(f"dashboard.{name}", broken)
    app = opened(page)
    assert "could not be drawn (KeyError)" in text_of(app) and "secret detail" not in text_of(app)


@every_page
def test_text_of_the_store_is_shown_as_text(opened, told, served, page):
    served(doing=HOSTILE)
    now = time.time()
    add_samples(told, now)
    add_trouble(told, now)
    app = opened(page)
    raw = "\n".join(
        str(one.value) for kind in ("markdown", "caption", "warning", "info") for one in getattr(app, kind)
    )
    assert re.search(r"(?<!\\)(<script|\]\(http|!\[|:red\[|\$x)", raw) is None
    assert "1 fault open: tuning is frozen" in text_of(app) and "2 conditions open" in text_of(app)


# --- overview -------------------------------------------------------------------------------------


def test_overview_tells_champion_gain_traffic_and_reason(opened, told, served):
    served(doing="Learning how the champion serves this traffic, 30 s more.")
    add_samples(told, time.time())
    app = opened("overview")
    text = text_of(app)
    assert f"Champion `{NEW}`" in text and "Learning how the champion serves" in text
    assert "Proven, e2e_s −22.1 %" in text and "−30.0 % to −15.0 %, 5 pairs" in text
    assert "Realised since −22.1 %" in text and "1 holdback pairs" in text
    assert "Requests 3" in text and "2 running, 1 waiting" in "".join(one.delta for one in app.metric)
    assert "no GPU" in text and "CPU" in text
    assert all(one.help for one in app.metric), "every figure says what it is"
    assert "promoted after a proof. prefill_chunk 256 → 64, policy fcfs → shortest_prefill" in text


def test_overview_counts_pairs_and_foretells_the_decision(opened, told, served):
    served()
    now = time.time()
    add_samples(told, now)
    add_running(told, now, 12)
    text = text_of(opened("overview"))
    assert "Test: 12 of at most 30 pairs" in text
    assert "Next look at the evidence in 3 pairs: needs about 72 s more" in text
    assert "Finds gains from 12 % on; needs about 8 more minutes." in text


def test_overview_shows_gpus_where_there_are_some(opened, told):
    now = time.time()
    add_samples(told, now)
    add_gpu(told, now)
    text = text_of(opened("overview"))
    assert (
        "GPU 40 %" in text and "Temperature 55 °C" in text and "Power 350 W" in text and "no GPU" not in text
    )


def test_overview_says_so_before_anything_was_promoted(opened, told):
    with told.journal() as session:
        from store.tables import Champion

        session.delete(session.query(Champion).order_by(Champion.champion_id.desc()).first())
    assert "Nothing has been promoted yet" in text_of(opened("overview"))


def test_overview_points_to_what_waits(opened, told, served):
    served()
    add_waiting(told, time.time())
    assert "Waiting for a person: 1 recommendation" in text_of(opened("overview"))


# --- history --------------------------------------------------------------------------------------


def test_history_takes_metrics_and_range_from_the_address_and_keeps_them_there(opened, told):
    add_samples(told, time.time())
    app = opened("history", metrics="e2e_s,no_such_metric,kv_used_ratio", range="15m")
    assert app.multiselect[0].value == ["e2e_s", "kv_used_ratio"]
    assert len(app.get("vega_lite_chart")) == 2
    assert asked_for(app, "range") == "15m" and asked_for(app, "metrics") == "e2e_s,kv_used_ratio"
    app.multiselect[0].set_value(["ttft_s"]).run()
    assert asked_for(app, "metrics") == "ttft_s"


@pytest.mark.parametrize("wanted", ["<script>", "", "9999y"])
def test_history_ignores_nonsense_in_the_address(opened, told, wanted):
    add_samples(told, time.time())
    app = opened("history", range=wanted, metrics=wanted)
    assert asked_for(app, "range") == "1h"


def test_history_lists_changes_and_anomalies_with_who_what_when_and_why(opened, told):
    add_trouble(told, time.time())
    add_samples(told, time.time())
    app = opened("history", range="all")
    anomalies, changes = (one.value for one in app.dataframe[-2:])
    assert set(anomalies["rule"]) >= {"clock_step", "slo_burn"}
    promoted = changes[changes["what"] == "promote"].iloc[0]
    assert promoted["who"] == "ada" and "prefill_chunk 256 → 64" in promoted["knobs"]
    assert promoted["why"] == "Approved by ada." and promoted["applied UTC"].endswith("UTC")
    assert len(app.get("download_button")) == 2


# --- experiments ----------------------------------------------------------------------------------


def test_experiments_show_the_newest_test_with_verdict_guardrails_and_curves(opened, told):
    app = opened("experiments")
    text = text_of(app)
    assert "Proven better. e2e_s fell by 22.1 %." in text
    assert "A change that does nothing is promoted in at most 1 in 20 such tests" in text
    assert "a coin chose which side went first" in text
    charts = [one.proto.id for one in app.get("vega_lite_chart")]
    assert len(charts) == 6
    assert asked_for(app, "experiment") == TEST
    assert "errors" in set(app.dataframe[1].value["guardrail"])


def test_experiment_under_way_has_no_verdict_and_says_what_is_missing(opened, told):
    experiment_id = add_running(told, time.time(), 12)
    app = opened("experiments")
    text = text_of(app)
    assert asked_for(app, "experiment") == experiment_id
    assert "No verdict yet: 12 of at most 30 pairs." in text and "This is not a decision" in text
    assert "gains from about 12 % on" in text and "about 8 min, 18 pairs" in text


@pytest.mark.parametrize("pairs", [0, 1, 2])
def test_experiment_with_hardly_any_pair_is_drawn(opened, told, pairs):
    add_running(told, time.time(), pairs)
    text = text_of(opened("experiments"))
    assert ("No pair has been scored yet" in text) == (pairs == 0)


def test_experiments_are_filtered_by_kind_and_opened_by_address(opened, told):
    app = opened("experiments", kind="probe")
    assert set(app.dataframe[0].value["kind"]) == {"probe"}
    app = opened("experiments", experiment="h1")
    assert asked_for(app, "experiment") == "h1" and "Holdback" in text_of(app)
    assert "The champion against itself" in text_of(opened("experiments", kind="aa"))


# --- recommendations ------------------------------------------------------------------------------


def test_card_tells_knobs_effect_evidence_risk_and_reason(opened, told, served):
    served()
    number = add_waiting(told, time.time())
    app = opened("recommendations")
    text = text_of(app)
    assert f"Recommendation {number}" in text and "Effect on e2e_s −20.0 %" in text
    assert "−30.0 % to −10.0 %, 10 pairs" in text and "p95 of e2e_s breached its SLO" in text
    knobs = app.dataframe[0].value
    assert list(knobs["knob"]) == ["prefill_chunk", "policy"] and list(knobs["proposed"]) == ["256", "fcfs"]


def test_approval_needs_two_clicks_and_carries_who_and_which_champion(opened, told, served):
    asked = served("Recommendation 2 is applied as change 3.")
    number = add_waiting(told, time.time())
    app = opened("recommendations")
    assert asked == []
    app.text_input(key=f"actor-approve-{number}").set_value("grace")
    app.button(key=f"approve-{number}").click().run()
    wanted = {"recommendation_id": number, "expected_champion": NEW}
    assert asked == [("approve", wanted, "grace", "operator")]
    assert "is applied as change 3" in text_of(app)


def test_refusal_is_shown_as_the_daemon_said_it(opened, told, served):
    served("Refused: champion aaa was expected, but bbb serves by now.")
    app = opened("recommendations")
    app.button(key="rollback-initial").click().run()
    assert "bbb serves by now" in "".join(one.value for one in app.error).replace("\\", "")


@pytest.mark.parametrize("action", ["rollback-previous", "rollback-initial", "pause"])
def test_every_action_reaches_the_daemon(opened, told, served, action):
    asked = served()
    app = opened("recommendations")
    app.button(key=action).click().run()
    assert asked[0][0] == action.partition("-")[0]


def test_paused_tuner_offers_to_go_on(opened, told, served):
    asked = served(is_paused=True)
    app = opened("recommendations")
    app.button(key="resume").click().run()
    assert asked[0][0] == "resume"


def test_viewer_sees_disabled_buttons_with_the_reason(opened, told, served, data_dir):
    asked = served()
    (data_dir / "daemon.key").unlink()
    add_waiting(told, time.time())
    app = opened("recommendations")
    assert all(one.disabled for one in app.button) and app.button
    assert "started as a viewer" in text_of(app) and "viewer: look only" in text_of(app)
    assert asked == []


def test_viewer_is_refused_by_the_daemon_even_where_the_page_would_let_it(
    served, told, data_dir, monkeypatch
):
    from dashboard import daemon

    asked = served()
    monkeypatch.setenv("TUNER_DASHBOARD_ROLE", "viewer")
    answer = daemon.act(data_dir, "approve", {"recommendation_id": 1}, "mallory")
    assert not answer.is_done and "viewer" in answer.text and asked == []


def test_nothing_can_be_rolled_back_before_a_first_promotion(opened, told, served):
    served()
    with told.journal() as session:
        from store.tables import Champion

        session.delete(session.query(Champion).order_by(Champion.champion_id.desc()).first())
    app = opened("recommendations")
    assert app.button(key="rollback-previous").disabled and not app.button(key="pause").disabled


def test_audit_trail_names_who_asked_for_what_in_which_role(opened, told, served):
    add_trouble(told, time.time())
    rows = opened("recommendations").dataframe[-1].value
    assert (
        rows.iloc[0]["role"] == "operator" and rows.iloc[0]["who"] == HOSTILE
    )  # a cell is text, never markup


def test_downloads_carry_the_champion(opened, told):
    app = opened("recommendations")
    labels = [one.proto.label for one in app.get("download_button")]
    assert labels == ["YAML", "JSON", "vLLM", "SGLang", "ENV"]


def test_rollback_names_what_would_change(opened, told, served):
    served()
    text = text_of(opened("recommendations"))
    assert f"Back to {OLD}: prefill_chunk 64 → 256, policy shortest_prefill → fcfs" in text
