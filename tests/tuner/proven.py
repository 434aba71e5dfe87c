"""Experiments with a verdict, made of the real coins, levels, pairs and judge, for tests that read evidence."""

import random
from dataclasses import asdict, replace

from runtime.knobs import EngineConfig
from store.database import Store
from store.tables import AlphaSpend, Anomaly, Champion, Change, Experiment, Slice, TwinFit, Verdict
from tests.simulated_runtime import IDENTITY
from tuner.experiment import HARM_PREFIX
from tuner.judging.coin import draw_coin
from tuner.judging.error_rate import Lord
from tuner.judging.judge import Outcome, judge
from tuner.pairs import ExperimentRules, guardrails, planned_pair, scored_pairs, verdict_row
from tuner.rows import ensure_config
from tuner.settings import load_settings
from tuner.snapshot import record_run, record_snapshot

T0 = 1_790_000_000.0
CHAMPION = EngineConfig.of({"prefill_chunk": 256})
CHALLENGER = EngineConfig.of({"prefill_chunk": 64, "policy": "shortest_prefill"})
FDR = 0.05
RULES = ExperimentRules(
    metric="e2e_s",
    level=FDR,
    max_pairs=30,
    look_every=5,
    min_effect=0.03,
    slice_s=12.0,
    burn_in_s=3.0,
    settle_s=4.0,
    lease_s=5.0,
    min_requests=5,
    slos=[{"metric": "e2e_s", "statistic": "p95", "limit": 4.0}],
    max_error_ratio=0.01,
    error_min_requests=20,
    pair_sd=0.2,
    champion_means=[0.7, 0.8, 0.75],
    champion_slowest_s=9.5,
)


def begin(store: Store) -> str:
    """A run on a snapshot with its champion. Returns the snapshot's id."""
    snapshot_id = record_snapshot(store, IDENTITY, T0)
    record_run(store, load_settings(flags={"experiment.fdr": FDR}, environ={}), T0)
    with store.journal() as session:
        for config in (CHAMPION, CHALLENGER):
            ensure_config(session, config, T0)
        session.flush()
        start = Change(snapshot_id, "start", None, CHAMPION.config_id, T0, "First.", "APPLIED", applied_at=T0)
        session.add(start)
        session.flush()
        session.add(Champion(snapshot_id, CHAMPION.config_id, T0, start.change_id))
        session.add(
            TwinFit(
                snapshot_id,
                CHAMPION.config_id,
                T0 + 60,
                {"a": 1e-12, "d": 0.004},
                500,
                0.04,
                0.07,
                True,
                "7 %",
            )
        )
    return snapshot_id


def add_test(
    store: Store,
    snapshot_id: str,
    name: str = "t1",
    shift: float = -0.25,
    seed: int = 1,
    stopped: str | None = None,
    void: tuple[int, ...] = (),
    fault: str | None = None,
    kind: str = "test",
) -> Verdict:
    """Runs a test to its end on drawn scores whose challenger differs by `shift` log units. A PROMOTE is applied."""
    rng = random.Random(seed)
    with store.journal() as session:
        stream = session.query(AlphaSpend).order_by(AlphaSpend.test_index).all()
        index, at = len(stream) + 1, T0 + 100 + 10_000 * (len(stream) + 1)
        promoted = [spend.test_index for spend in stream if spend.is_rejection]
        level = Lord(alpha=FDR, w0=FDR).level(index, promoted) if kind == "test" else FDR
        rules = replace(RULES, level=level)
        challenger = CHALLENGER if kind == "test" else CHAMPION
        experiment = Experiment(
            name, kind, snapshot_id, None, CHAMPION.config_id, challenger.config_id, at, "RUNNING", asdict(rules),
            rng.getrandbits(31), 1,
        )  # fmt: skip
        session.add(experiment)
        session.flush()
        if kind == "test":
            session.add(AlphaSpend(snapshot_id, rules.metric, name, index, level, at))
        if fault is not None:
            session.add(Anomaly("host_suspended", "fault", "steal", at, 1.0, 0.5, fault))
        slices: list[Slice] = []
        judgement = judge([], rules.judge_rules())
        for pair_index in range(rules.max_pairs + len(void)):
            coin = draw_coin(name, pair_index, rng.getrandbits)
            pair = planned_pair(experiment, rules, pair_index, coin, at + 30.5 + 30 * pair_index, "boot-1")
            for row in pair:
                score(row, rng, shift if row.arm == "challenger" else 0.0)
                if pair_index in void:
                    row.state, row.void_reason, row.response = "VOID", "The runtime was restarted.", None
            slices += pair
            pairs = scored_pairs(slices)
            faults = [fault] if fault is not None else []
            judgement = judge(
                pairs, rules.judge_rules(), guardrails(slices, rules, rules.max_error_ratio), faults
            )
            if judgement.outcome is not Outcome.CONTINUE or (stopped and len(pairs) == 3):
                break
        outcome, reason, state = judgement.outcome, judgement.reason, "DECIDED"
        if stopped is not None:
            judgement, reason, state = judge(scored_pairs(slices), rules.judge_rules()), stopped, "STOPPED"
            outcome = Outcome.REJECT if stopped.startswith(HARM_PREFIX) else Outcome.INCONCLUSIVE
        session.add_all(slices)
        verdict = verdict_row(
            experiment, outcome, reason, judgement, scored_pairs(slices), rules, at + 30 * len(slices)
        )
        session.add(verdict)
        experiment.state, experiment.reason, experiment.ended_at = state, reason, verdict.decided_at
        session.flush()
        for spend in session.query(AlphaSpend).filter_by(experiment_id=name):
            spend.is_rejection = outcome is Outcome.PROMOTE
        if outcome is Outcome.PROMOTE and kind == "test":
            apply_verdict(session, snapshot_id, verdict)
    return verdict


def apply_verdict(session, snapshot_id: str, verdict: Verdict) -> None:
    at = verdict.decided_at + 1
    change = Change(
        snapshot_id, "promote", CHAMPION.config_id, CHALLENGER.config_id, at, verdict.reason, "APPLIED",
        verdict_id=verdict.verdict_id, applied_at=at, version=2,
    )  # fmt: skip
    session.add(change)
    session.flush()
    session.add(Champion(snapshot_id, CHALLENGER.config_id, at, change.change_id))


def score(row: Slice, rng: random.Random, shift: float) -> None:
    row.state, row.num_requests, row.num_errors = "SCORED", 8 + rng.randrange(5), 0
    row.predicted = 0.8 + rng.gauss(0, 0.3)
    row.measured = row.predicted + shift + rng.gauss(0, 0.08)
    row.response = row.measured - row.predicted
    row.stats = {
        **row.stats,
        "rate_per_s": 1.0 + 0.1 * rng.random(),
        "prompt_tokens_mean": 100.0 + rng.random(),
        "output_tokens_mean": 40.0 + rng.random(),
        "p95_s": 3.0 + shift,
        "max_s": 3.5,
        "slos": {},
    }
