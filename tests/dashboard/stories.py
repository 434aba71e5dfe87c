"""More of the story for the dashboard: what is live, what runs, what waits. `now` is any instant."""

import math
import random

from store.database import Store
from store.tables import (
    Anomaly,
    Experiment,
    Forecast,
    Note,
    OperatorAction,
    Recommendation,
    Sample,
    Slice,
    Verdict,
)
from tests.store.story import NEW, OLD, SNAPSHOT

HOSTILE = "<script>alert(1)</script> [click](http://evil.example) ![x](http://evil.example/x.png) :red[red] $x$ `code`"
RULES = {
    "metric": "e2e_s",
    "level": 0.05,
    "max_pairs": 30,
    "look_every": 5,
    "min_effect": 0.03,
    "slice_s": 12.0,
    "burn_in_s": 3.0,
}


def add_samples(store: Store, now: float, seconds: int = 120) -> None:
    wanted = {
        ("requests_per_s", ""): 3.0,
        ("output_tokens_per_s", ""): 120.0,
        ("ttft_s", "p95"): 0.2,
        ("tpot_s", "p95"): 0.02,
        ("e2e_s", "p95"): 1.5,
        ("e2e_s", "p50"): 0.7,
        ("requests_running", ""): 2.0,
        ("requests_waiting", ""): 1.0,
        ("kv_used_ratio", ""): 0.1,
        ("cpu_util_ratio", "all"): 0.5,
        ("memory_used_bytes", ""): 2.0 * 2**30,
        ("memory_total_bytes", ""): 8.0 * 2**30,
    }
    with store.metrics() as session:
        for (metric, label), value in wanted.items():
            session.add_all(
                Sample(metric, label, now - second, value * (1 + 0.1 * math.sin(second)), NEW)
                for second in range(seconds)
            )


def add_gpu(store: Store, now: float) -> None:
    values = {
        "gpu_util_ratio": 0.4,
        "gpu_memory_used_bytes": 30.0 * 2**30,
        "gpu_memory_total_bytes": 80.0 * 2**30,
        "gpu_temperature_celsius": 55.0,
        "gpu_power_watts": 350.0,
    }
    with store.metrics() as session:
        session.add_all(Sample(metric, "0", now - 1.0, value) for metric, value in values.items())


def add_running(store: Store, now: float, num_pairs: int, seed: int = 3) -> str:
    """A test of which so many pairs are scored, one is void and one is under way."""
    experiment_id, drawn = "t-running", random.Random(seed)
    planning = {
        "mde_ratio": 0.12,
        "pairs_needed": 18,
        "minutes_needed": 8.0,
        "words": "Finds gains from 12 % on; needs about 8 more minutes.",
    }
    with store.journal() as session:
        session.add(
            Experiment(
                experiment_id,
                "test",
                SNAPSHOT,
                1,
                NEW,
                OLD,
                now - 24.0 * num_pairs,
                "RUNNING",
                RULES,
                5,
                planning=planning,
            )
        )
        for index in range(num_pairs + 2):
            state = "SCORED" if index < num_pairs else "VOID" if index == num_pairs else "PLANNED"
            for position, arm in enumerate(("champion", "challenger")):
                start = now - 24.0 * (num_pairs - index) + 12.0 * position
                config_id = NEW if position == 0 else OLD
                row = Slice(
                    f"{experiment_id}-{index}-{arm}", experiment_id, index, position, arm, config_id, 0, "hash",
                    start, start + 12.0, 3.0, state,
                )  # fmt: skip
                if state == "SCORED":
                    row.num_requests, row.num_errors = 9, 0
                    row.measured = drawn.gauss(0.0 if position == 0 else -0.3, 0.1)
                    row.predicted = 0.05 * position
                    row.response = row.measured - row.predicted
                elif state == "VOID":
                    row.void_reason = "clock step"
                session.add(row)
    return experiment_id


def add_waiting(store: Store, now: float) -> int:
    """A recommendation to go back to OLD, open."""
    with store.journal() as session:
        experiment = Experiment(
            "t2", "test", SNAPSHOT, 1, NEW, OLD, now - 60, "DECIDED", RULES, 5, ended_at=now
        )
        session.add(experiment)
        session.flush()
        verdict = Verdict(
            "t2", now, "PROMOTE", "Proven.", -0.2, -0.3, -0.1, 10, 0.001, 0.0025, {"judgement": {}}
        )
        session.add(verdict)
        session.flush()
        recommendation = Recommendation(verdict.verdict_id, OLD, now, "OPEN")
        session.add(recommendation)
        session.flush()
        return recommendation.recommendation_id


def add_trouble(store: Store, now: float) -> None:
    """An open fault, an open condition, a forecast, and rows that try to be markup."""
    with store.journal() as session:
        session.add(
            Anomaly("clock_step", "fault", "cpu_util_ratio", now - 60, 1.0, 0.5, "The clock stepped.")
        )
        session.add(Anomaly("slo_burn", "condition", "e2e_s", now - 60, 2.5, 2.0, HOSTILE))
        session.add(Note(now - 1.0, "person", HOSTILE))
        session.add(OperatorAction("pause", {"to": HOSTILE}, HOSTILE, now - 5.0, "DONE", HOSTILE, "operator"))
    with store.metrics() as session:
        session.add_all(Forecast("e2e_s", now - 10.0 * n, now - 600, 1.5, 1.2, 1.8) for n in range(6))
