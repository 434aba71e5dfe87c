import pytest

from store import decisions, queries
from store.database import Store
from store.metrics import CPU_UTIL_RATIO, LOAD_1M, TTFT_S
from store.queries import Point
from store.samples import save_forecasts, save_samples
from store.tables import Forecast, Note, RequestTiming, RuntimeEvent, Sample, Step
from tests.store.story import AA, HOLDBACK, NEW, OLD, PROBE, SNAPSHOT, T0, TEST, write_story


def test_an_empty_store_answers_every_read(store: Store) -> None:
    with store.journal() as journal, store.metrics() as metrics:
        assert queries.last_run(journal) is None
        assert queries.last_snapshot(journal) is None
        assert decisions.latest_champion(journal, "s") is None
        assert queries.latest_twin_fit(journal, "s") is None
        for found in (
            queries.champion_history(journal, "s"),
            queries.changes(journal),
            queries.studies(journal),
            queries.proposals_of_study(journal, 1),
            queries.experiments_of_study(journal, 1),
            queries.experiments(journal),
            decisions.study_trials(journal, 1),
            queries.slices_to_score(journal, 9e9),
            queries.slices_between(journal, 0, 9e9),
            queries.verdicts(journal),
            queries.anomalies(journal),
            queries.operator_actions(journal),
            queries.notes(journal),
            decisions.waiting_recommendations(journal),
            decisions.spends_of(journal, "s", "any"),
            queries.timings_between(metrics, 0, 9e9),
            queries.timings_of_slice(metrics, []),
            queries.steps_between(metrics, 0, 9e9),
            queries.events_between(metrics, 0, 9e9),
            queries.samples(metrics, TTFT_S, "p50", 0, 9e9),
            queries.binned_samples(metrics, TTFT_S, "p50", 0, 9e9, 60),
            queries.forecasts(metrics, TTFT_S, 0, 9e9),
        ):
            assert list(found) == []
        assert queries.drain_cursor(metrics, "b") is None
        assert queries.latest_samples(metrics) == {}
        assert queries.request_percentiles(metrics, 0, 9e9).num == 0


def test_the_history_is_told_newest_first(told: Store) -> None:
    with told.journal() as journal:
        run = queries.last_run(journal)
        snapshot = queries.last_snapshot(journal)
        champion = decisions.latest_champion(journal, SNAPSHOT)
        assert run is not None and run.run_id == "run-1"
        assert snapshot is not None and snapshot.snapshot_id == SNAPSHOT
        assert champion is not None and champion.config_id == NEW
        assert [row.config_id for row in queries.champion_history(journal, SNAPSHOT)] == [NEW, OLD]
        assert [row.kind for row in queries.changes(journal)] == ["promote", "start"]
        assert [row.kind for row in queries.changes(journal, SNAPSHOT, limit=1)] == ["promote"]
        assert list(queries.changes(journal, "another")) == []
        assert [row.experiment_id for row in queries.experiments(journal)] == [AA, HOLDBACK, TEST, PROBE]
        assert [row.experiment_id for row in queries.experiments_of_study(journal, 1)] == [PROBE, TEST]
        assert [row.outcome for row in queries.verdicts(journal)] == ["PROMOTE"]
        assert [row.origin for row in queries.proposals_of_study(journal, 1)] == ["search"]
        assert [row.value for row in decisions.study_trials(journal, 1)] == [-0.25]
        assert [row.test_index for row in decisions.spends_of(journal, SNAPSHOT, "any")] == [1]
        assert [row.rule for row in queries.anomalies(journal)] == ["forecast", "slo_burn"]
        assert [row.rule for row in queries.anomalies(journal, only_open=True)] == ["forecast"]


def test_the_twin_of_another_configuration_is_not_taken(told: Store) -> None:
    with told.journal() as journal:
        assert queries.latest_twin_fit(journal, SNAPSHOT) is not None
        assert queries.latest_twin_fit(journal, SNAPSHOT, OLD) is not None
        assert queries.latest_twin_fit(journal, SNAPSHOT, NEW) is None


def test_notes_are_the_newest_in_the_order_in_which_they_were_told(store: Store) -> None:
    with store.journal() as session:
        session.add_all(Note(float(number), "sample", str(number)) for number in range(10))
    with store.journal() as session:
        assert [note.text for note in queries.notes(session, limit=3)] == ["7", "8", "9"]
        assert [note.text for note in queries.notes(session, after_id=8)] == ["8", "9"]
        assert list(queries.notes(session, after_id=10)) == []


def test_only_slices_that_are_over_and_undecided_are_to_be_scored(told: Store) -> None:
    with told.journal() as journal:
        rows = queries.slices_between(journal, T0 + 200, T0 + 248)
        assert [row.slice_id for row in rows] == [
            "t1-0-champion",
            "t1-0-challenger",
            "t1-1-challenger",
            "t1-1-champion",
        ]
        rows[0].state = rows[3].state = "PLANNED"
    with told.journal() as journal:
        assert [row.slice_id for row in queries.slices_to_score(journal, T0 + 212)] == ["t1-0-champion"]
        assert len(queries.slices_to_score(journal, T0 + 9999)) == 2


def test_timings_are_those_that_arrived_in_the_interval(told: Store) -> None:
    with told.metrics() as metrics:
        rows = queries.timings_between(metrics, T0 + 201, T0 + 203)
        assert [row.request_id for row in rows] == ["r1", "r2"], (
            "half-open: a request is in one interval, never in two"
        )
        assert len(queries.timings_between(metrics, T0, T0 + 999)) == 90
        assert len(queries.timings_between(metrics, T0, T0 + 999, config_id=NEW)) == 45
        assert len(queries.timings_between(metrics, T0, T0 + 999, slice_id="t1-0-champion")) == 9
        assert {row.arrival_slice for row in queries.timings_of_slice(metrics, "t1-0-champion")} == {
            "t1-0-champion"
        }
        assert len(queries.timings_of_slice(metrics, ["t1-0-champion", "t1-2-challenger", "absent"])) == 18


def test_percentiles_may_leave_slices_out_or_take_only_some(told: Store) -> None:
    with told.metrics() as metrics:

        def num(**chosen: object) -> int:
            return queries.request_percentiles(metrics, T0, T0 + 999, **chosen).num  # type: ignore[arg-type]

        assert num() == 90
        assert num(exclude_slices={"t1-0-champion"}) == 81
        assert num(slice_ids={"t1-0-champion", "t1-0-challenger"}) == 18
        assert num(slice_ids={"t1-0-champion", "t1-0-challenger"}, exclude_slices={"t1-0-champion"}) == 9
        assert num(config_id=OLD, slice_ids=set()) == 0
        metrics.add(RequestTiming("b", 1, "outside", T0, T0 + 1.0, 1, 1, "stop"))
        assert num(exclude_slices={"t1-0-champion"}) == 82, (
            "a request outside all slices is not excluded with one"
        )


def test_steps_and_events_come_in_order(store: Store) -> None:
    def step(seq: int, at: float, config_id: str = "c") -> Step:
        return Step("b", seq, at, 0.1, 0.1, 1, 0, 0, 1, 1, 1, 0, 1, 1, config_id)

    with store.metrics() as session:
        session.add_all([step(2, 20.0), step(1, 10.0), step(3, 30.0, "d"), step(4, 40.0)])
        session.add_all(
            [RuntimeEvent("b", 6, 20.0, "later", {}), RuntimeEvent("b", 5, 10.0, "first", {"a": 1})]
        )
    with store.metrics() as session:
        assert [row.seq for row in queries.steps_between(session, 10.0, 40.0)] == [1, 2, 3]
        assert [row.seq for row in queries.steps_between(session, 0.0, 99.0, "c")] == [1, 2, 4]
        assert [row.seq for row in queries.steps_between(session, 0.0, 99.0, limit=2)] == [3, 4]
        assert [row.kind for row in queries.events_between(session, 0.0, 99.0)] == ["first", "later"]


@pytest.fixture
def sampled(store: Store) -> Store:
    with store.metrics() as session:
        save_samples(
            session,
            (
                Sample(CPU_UTIL_RATIO, label, float(at), at / 100, "c")
                for label in ("0", "all")
                for at in range(50)
            ),
        )
        save_samples(session, [Sample(LOAD_1M, "", 3.0, 0.5)])
    return store


def test_samples_come_as_points_or_in_bins(sampled: Store) -> None:
    with sampled.metrics() as session:
        assert queries.samples(session, CPU_UTIL_RATIO, "all", 10.0, 12.0) == [
            Point(10.0, 0.10, "c"),
            Point(11.0, 0.11, "c"),
        ]
        bins = queries.binned_samples(session, CPU_UTIL_RATIO, "all", 5.0, 49.0, 20.0)
        assert [(found.at, found.num, found.low, found.high) for found in bins] == [
            (5, 20, 0.05, 0.24),
            (25, 20, 0.25, 0.44),
            (45, 4, 0.45, 0.48),
        ]
        assert bins[0].mean == pytest.approx(sum(range(5, 25)) / 2000)


def test_the_latest_of_every_series_is_found_with_its_labels(sampled: Store) -> None:
    with sampled.metrics() as session:
        assert queries.labels_of(session, CPU_UTIL_RATIO) == ["0", "all"]
        assert queries.labels_of(session, LOAD_1M) == [""]
        assert queries.labels_of(session, TTFT_S) == []
        assert queries.latest_samples(session) == {
            CPU_UTIL_RATIO: {"0": Point(49.0, 0.49, "c"), "all": Point(49.0, 0.49, "c")},
            LOAD_1M: {"": Point(3.0, 0.5, None)},
        }
        assert list(queries.latest_samples(session, since=40.0)) == [CPU_UTIL_RATIO]


def test_a_new_forecast_takes_the_place_of_the_old(store: Store) -> None:
    with store.metrics() as session:
        save_forecasts(
            session, [Forecast(TTFT_S, 60.0, 1.0, 0.5, 0.4, 0.6), Forecast(TTFT_S, 120.0, 1.0, 0.5, 0.4, 0.6)]
        )
        save_forecasts(session, [Forecast(TTFT_S, 60.0, 2.0, 0.7, 0.6, 0.8)])
    with store.metrics() as session:
        assert [(row.at, row.expected) for row in queries.forecasts(session, TTFT_S, 0.0, 999.0)] == [
            (60.0, 0.7),
            (120.0, 0.5),
        ]


def test_reads_of_slices_and_of_the_newest_use_an_index(told: Store) -> None:
    """What is asked at every tick must not grow with the history."""
    asked = {
        "SELECT * FROM slice WHERE state = 'PLANNED'": told.journal,
        "SELECT * FROM slice WHERE experiment_id = 'x' ORDER BY pair_index": told.journal,
        "SELECT * FROM request_timing WHERE arrival_slice IN ('x')": told.metrics,
        "SELECT * FROM request_timing WHERE arrived_at >= 1 AND arrived_at < 2 ORDER BY arrived_at": told.metrics,
        "SELECT * FROM step WHERE at >= 1 AND at < 2 ORDER BY at": told.metrics,
        "SELECT * FROM sample WHERE metric = 'x' AND label = '' ORDER BY at DESC LIMIT 1": told.metrics,
    }
    for statement, session_of in asked.items():
        with session_of() as session:
            plan = [row[3] for row in session.connection().exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}")]
        assert all(line.startswith("SEARCH") for line in plan), (statement, plan)


def test_a_story_can_be_told_to_two_stores(told: Store, tmp_path_factory: pytest.TempPathFactory) -> None:
    with Store.open(tmp_path_factory.mktemp("other") / "store") as other:
        write_story(other)
        with other.journal() as theirs, told.journal() as ours:
            assert decisions.latest_champion(theirs, SNAPSHOT) == decisions.latest_champion(ours, SNAPSHOT)
