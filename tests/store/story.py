"""A small history of a tuner, from its start to a promotion and a holdback, for tests that read."""

from store.database import Store
from store.tables import (
    AlphaSpend,
    Anomaly,
    Champion,
    Change,
    Config,
    Experiment,
    ForecastFit,
    Note,
    OperatorAction,
    Proposal,
    QualityCheck,
    Recommendation,
    RequestTiming,
    Run,
    SampleRollup,
    Slice,
    Snapshot,
    Study,
    Trial,
    TwinFit,
    Verdict,
)

T0 = 1_790_000_000.0  # 2026-09-21
SNAPSHOT, OLD, NEW = "snap-1", "aaaaaaaaaaaa", "bbbbbbbbbbbb"
TEST, PROBE, HOLDBACK, AA = "t1", "p1", "h1", "a1"

OLD_VALUES = {"max_num_seqs": 16, "prefill_chunk": 256, "policy": "fcfs", "batch_wait_ms": 0.0}
NEW_VALUES = OLD_VALUES | {"prefill_chunk": 64, "policy": "shortest_prefill"}


def write_story(store: Store) -> None:
    with store.journal() as session:
        session.add_all(_who_ran())
        session.add_all(_search())
        for kind, experiment_id, num_pairs, at in (
            ("probe", PROBE, 1, T0 + 120),
            ("test", TEST, 5, T0 + 200),
            ("holdback", HOLDBACK, 1, T0 + 900),
        ):
            session.add(_experiment(kind, experiment_id, at))
            session.add_all(_slices(kind, experiment_id, num_pairs, at))
        session.add_all(_decision())
    with store.metrics() as session:
        session.add_all(_timings())
        session.add_all(_what_was_measured())


def _who_ran() -> list[object]:
    return [
        Run("run-1", T0 - 5.0, 4242, "0.1.0", {"mode": "approve"}, "approve"),
        Snapshot(
            SNAPSHOT,
            T0,
            {"name": "demo", "dtype": "float32", "num_parameters": 1_000_000},
            {"device": "cpu", "device_name": "Some CPU", "num_cores": 4},
            {"python": "3.11.7", "torch": "2.13.0"},
            1,
            [{"name": "prefill_chunk", "low": 16, "high": 16384}],
        ),
        Config(OLD, T0, 1, OLD_VALUES),
        Config(NEW, T0 + 100, 1, NEW_VALUES),
        Change(SNAPSHOT, "start", None, OLD, T0, "First start.", "APPLIED", applied_at=T0, version=1),
        Champion(SNAPSHOT, OLD, T0, change_id=1),
        Note(T0, "promote", "start: champion is now aaaaaaaaaaaa. First start."),
    ]


def _search() -> list[object]:
    return [
        Study(
            SNAPSHOT,
            OLD,
            T0 + 90,
            "p95 of e2e_s breached its SLO",
            {"metric": "e2e_s"},
            {"prefill_chunk": [16, 512]},
            seed=7,
            trust_steps=1,
            state="DONE",
            anomaly_id=1,
        ),
        Proposal(1, NEW, T0 + 100, "search", "p95 of e2e_s breached its SLO", predicted_log_ratio=-0.2),
        Trial(1, 1, NEW, "COMPLETE", T0 + 110, value=-0.25, experiment_id=PROBE, ended_at=T0 + 150),
        TwinFit(SNAPSHOT, OLD, T0 + 80, {"a": 1e-12}, 500, 0.04, 0.07, True, "The twin is off by 7 %."),
        Anomaly(
            "slo_burn",
            "condition",
            "e2e_s",
            T0 + 85,
            2.5,
            2.0,
            "p95 is 2.5 s, limit 2 s.",
            ended_at=T0 + 420,
            layer="A",
            severity="page",
            label="p95",
            worst=3.1,
            details={"burn": 14.4},
        ),
        Anomaly(
            "forecast", "condition", "requests_per_s", T0 + 500, 9.0, 4.0, "Outside the forecast.", layer="C"
        ),
        QualityCheck(
            SNAPSHOT,
            "challenger",
            NEW,
            OLD,
            T0 + 190,
            400,
            0.001,
            0.004,
            0.995,
            0.985,
            True,
            "Within 1 % of the champion.",
            {"num_sequences": 10},
        ),
    ]


def _experiment(kind: str, experiment_id: str, at: float) -> Experiment:
    old, new = (OLD, NEW) if kind != "holdback" else (NEW, OLD)
    rules = {"metric": "e2e_s", "slice_s": 12.0, "burn_in_s": 3.0, "max_pairs": 5, "level": 0.05}
    return Experiment(
        experiment_id,
        kind,
        SNAPSHOT,
        1 if kind != "holdback" else None,
        old,
        new,
        at,
        "DECIDED",
        rules,
        11,
        twin_fit_id=1 if kind == "test" else None,
        ended_at=at + 150,
        planning={"mde_ratio": 0.12, "pairs_needed": 5, "minutes_needed": 2.0} if kind == "test" else {},
    )


def _slices(kind: str, experiment_id: str, num_pairs: int, at: float) -> list[Slice]:
    slices = []
    for index in range(num_pairs):
        arms = ("champion", "challenger") if index % 2 == 0 else ("challenger", "champion")
        for position, arm in enumerate(arms):
            start = at + 24.0 * index + 12.0 * position
            old = (arm == "champion") == (kind != "holdback")
            slices.append(
                Slice(
                    f"{experiment_id}-{index}-{arm}",
                    experiment_id,
                    index,
                    position,
                    arm,
                    OLD if old else NEW,
                    index % 2,
                    "hash",
                    start,
                    start + 12.0,
                    3.0,
                    "SCORED",
                    num_requests=8,
                    num_errors=0,
                    response=0.30 if old else 0.05,
                    measured=0.4,
                    predicted=0.1,
                )
            )
    return slices


def _decision() -> list[object]:
    evidence = {
        "judgement": {
            "seen": {
                "requests_per_s": [0.9, 1.4],
                "mean_prompt_tokens": [80.0, 130.5],
                "mean_output_tokens": None,
            },
            "guardrails": [
                {"name": "errors", "passed": True, "detail": "0.00% of requests failed, champion 0.00%"}
            ],
        }
    }
    return [
        AlphaSpend(SNAPSHOT, "any", TEST, 1, 0.0025, T0 + 200, is_rejection=True),
        Verdict(
            TEST,
            T0 + 330,
            "PROMOTE",
            "e2e_s fell by 22 %.",
            -0.22119921692859512,
            -0.3,
            -0.15,
            5,
            0.03125,
            0.05,
            evidence,
        ),
        Recommendation(1, NEW, T0 + 331, "APPROVED", T0 + 400, "ada"),
        OperatorAction(
            "approve", {"recommendation_id": 1}, "ada", T0 + 400, "DONE", "Applied.", role="operator"
        ),
        OperatorAction(
            "rollback", {"to": "previous"}, "bob", T0 + 600, "REFUSED", "Only look.", role="viewer"
        ),
        Experiment(
            AA, "aa", SNAPSHOT, None, NEW, NEW, T0 + 1000, "DECIDED", {"metric": "e2e_s", "slice_s": 12.0}, 13
        ),
        Change(
            SNAPSHOT,
            "promote",
            OLD,
            NEW,
            T0 + 400,
            "Approved by ada.",
            "APPLIED",
            verdict_id=1,
            applied_at=T0 + 401,
            version=2,
            prepare_s=0.001,
            commit_us=12.0,
        ),
        Champion(SNAPSHOT, NEW, T0 + 401, change_id=2),
        Note(
            T0 + 401, "promote", "promote: champion is now bbbbbbbbbbbb. Approved by ada.", {"change_id": 2}
        ),
    ]


def _timings() -> list[RequestTiming]:
    """In each slice of the test a request in the burn-in (slow) and eight after it; the new one is faster."""
    timings = []
    for row in _slices("test", TEST, 5, T0 + 200):
        for number in range(9):
            arrived_at = row.planned_start_at + 1.0 + number
            e2e_s = (2.0 if row.config_id == OLD else 1.5) + 0.1 * number + (50.0 if number < 2 else 0.0)
            seq = len(timings) + 1
            timings.append(
                RequestTiming(
                    "boot-1",
                    seq,
                    f"r{seq}",
                    arrived_at,
                    arrived_at + e2e_s,
                    100,
                    11,
                    "stop",
                    first_token_at=arrived_at + e2e_s / 2,
                    config_id=row.config_id,
                    arrival_slice=row.slice_id,
                )
            )
    return timings


def _what_was_measured() -> list[object]:
    return [
        SampleRollup("e2e_s", "p95", 60, T0, 60, 2.5, 1.9, 3.1, OLD),
        SampleRollup("e2e_s", "p95", 3600, T0, 3600, 2.2, 1.5, 3.1),
        ForecastFit(
            "requests_per_s",
            "FITTED",
            T0 + 450,
            "fitted on 7.5 min",
            T0 + 450,
            450,
            450.0,
            0.2,
            True,
            4.5,
        ),
    ]
