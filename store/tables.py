"""Every recorded noun, one class and one table each.

The journal holds decisions and whatever is needed to replay them (coins, slice scores, twin parameters,
seeds); it is written before the engine is touched. The metrics file holds what was measured and may age
out. Rows are plain dataclasses once their session is closed: no relationships, no lazy loading.

Instants (`*_at`) are UTC epoch seconds; durations end in `_s`; columns of type `Json` hold JSON objects,
and change only when they are given a new one.
"""

from typing import Any, ClassVar, Literal, cast

from sqlalchemy import JSON, ForeignKey, Index, Integer, MetaData, String, Table
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column

Json = dict[str, Any]

Which = Literal["journal", "metrics"]  # of the two files
SCHEMA_VERSIONS: dict[Which, int] = {
    "journal": 2,
    "metrics": 3,
}  # newest Alembic revision, and the file's user_version

# Without names, later revisions could not drop or change a constraint.
NAMES = {
    "ix": "%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class JournalBase(MappedAsDataclass, DeclarativeBase):
    """Tables of journal.db (`synchronous=FULL`)."""

    metadata: ClassVar[MetaData] = MetaData(naming_convention=NAMES)
    type_annotation_map: ClassVar = {Json: JSON, list[Json]: JSON}


class MetricsBase(MappedAsDataclass, DeclarativeBase):
    """Tables of metrics.db (`synchronous=NORMAL`, batched)."""

    metadata: ClassVar[MetaData] = MetaData(naming_convention=NAMES)
    type_annotation_map: ClassVar = {Json: JSON}


def table_of(noun: type[JournalBase] | type[MetricsBase]) -> Table:
    """The table behind a noun, for statements that write many rows at once."""
    return cast(Table, noun.__table__)


# --- journal: who ran, on what --------------------------------------------------------------------


class Run(JournalBase):
    """One life of the daemon. `ended_at` stays empty when it was killed."""

    __tablename__ = "run"

    run_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    started_at: Mapped[float]
    pid: Mapped[int]
    tuner_version: Mapped[str]
    settings: Mapped[Json]
    mode: Mapped[str]
    ended_at: Mapped[float | None] = mapped_column(default=None)
    end_reason: Mapped[str | None] = mapped_column(default=None)


class Snapshot(JournalBase):
    """Model, hardware and versions: what a champion belongs to. `snapshot_id` hashes the three."""

    __tablename__ = "snapshot"

    snapshot_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    created_at: Mapped[float]
    model: Mapped[Json]
    hardware: Mapped[Json]
    versions: Mapped[Json]
    knob_schema_version: Mapped[int]
    knobs: Mapped[list[Json]]


class Config(JournalBase):
    """An EngineConfig by its content hash; written before anything refers to it."""

    __tablename__ = "config"

    config_id: Mapped[str] = mapped_column(String(16), primary_key=True)
    created_at: Mapped[float]
    knob_schema_version: Mapped[int]
    values: Mapped[Json]


class Champion(JournalBase):
    """The configuration that serves by default, one row each time it changed; the newest row counts."""

    __tablename__ = "champion"

    champion_id: Mapped[int] = mapped_column(Integer, primary_key=True, init=False)
    snapshot_id: Mapped[str] = mapped_column(ForeignKey("snapshot.snapshot_id"))
    config_id: Mapped[str] = mapped_column(ForeignKey("config.config_id"))
    since_at: Mapped[float]
    change_id: Mapped[int | None] = mapped_column(default=None)


# --- journal: search ------------------------------------------------------------------------------


class Study(JournalBase):
    """The search over one space for one objective, from one champion."""

    __tablename__ = "study"

    study_id: Mapped[int] = mapped_column(Integer, primary_key=True, init=False)
    snapshot_id: Mapped[str] = mapped_column(ForeignKey("snapshot.snapshot_id"))
    champion_config_id: Mapped[str] = mapped_column(ForeignKey("config.config_id"))
    created_at: Mapped[float]
    cause: Mapped[str]
    objective: Mapped[Json]
    space: Mapped[Json]
    seed: Mapped[int]
    trust_steps: Mapped[int]
    state: Mapped[str] = mapped_column(default="RUNNING")  # RUNNING, DONE, STOPPED
    ended_at: Mapped[float | None] = mapped_column(default=None)
    reason: Mapped[str | None] = mapped_column(default=None)
    anomaly_id: Mapped[int | None] = mapped_column(default=None)  # the condition that started it


class Proposal(JournalBase):
    """A configuration suggested for a stated cause, not yet measured."""

    __tablename__ = "proposal"

    proposal_id: Mapped[int] = mapped_column(Integer, primary_key=True, init=False)
    study_id: Mapped[int] = mapped_column(ForeignKey("study.study_id"))
    config_id: Mapped[str] = mapped_column(ForeignKey("config.config_id"))
    created_at: Mapped[float]
    origin: Mapped[str]  # champion, default, preset:<name>, search, person
    cause: Mapped[str]
    predicted_log_ratio: Mapped[float | None] = mapped_column(default=None)


class Trial(JournalBase):
    """A proposal that was screened and probed. `value` is its log ratio to the champion (negative: better)."""

    __tablename__ = "trial"

    trial_id: Mapped[int] = mapped_column(Integer, primary_key=True, init=False)
    study_id: Mapped[int] = mapped_column(ForeignKey("study.study_id"))
    proposal_id: Mapped[int] = mapped_column(ForeignKey("proposal.proposal_id"))
    config_id: Mapped[str] = mapped_column(ForeignKey("config.config_id"))
    state: Mapped[str]  # WAITING, RUNNING, COMPLETE, FAIL
    created_at: Mapped[float]
    value: Mapped[float | None] = mapped_column(default=None)
    constraints: Mapped[Json] = mapped_column(default_factory=dict)  # name -> signed slack, <= 0 is feasible
    experiment_id: Mapped[str | None] = mapped_column(default=None)
    ended_at: Mapped[float | None] = mapped_column(default=None)
    reason: Mapped[str | None] = mapped_column(default=None)


class TwinFit(JournalBase):
    """The champion twin's parameters, fitted before the experiment that uses them."""

    __tablename__ = "twin_fit"

    twin_fit_id: Mapped[int] = mapped_column(Integer, primary_key=True, init=False)
    snapshot_id: Mapped[str] = mapped_column(ForeignKey("snapshot.snapshot_id"))
    config_id: Mapped[str] = mapped_column(ForeignKey("config.config_id"))
    fitted_at: Mapped[float]
    parameters: Mapped[Json]
    num_steps: Mapped[int]
    step_error_ratio: Mapped[float]
    latency_error_ratio: Mapped[float | None]
    is_used: Mapped[bool]
    reason: Mapped[str]


# --- journal: experiments -------------------------------------------------------------------------


class Experiment(JournalBase):
    """Champion against challenger on live traffic. kind: probe (one pair), test, holdback, aa (against itself)."""

    __tablename__ = "experiment"

    experiment_id: Mapped[str] = mapped_column(String(40), primary_key=True)
    kind: Mapped[str]
    snapshot_id: Mapped[str] = mapped_column(ForeignKey("snapshot.snapshot_id"))
    study_id: Mapped[int | None] = mapped_column(ForeignKey("study.study_id"))
    champion_config_id: Mapped[str] = mapped_column(ForeignKey("config.config_id"))
    challenger_config_id: Mapped[str] = mapped_column(ForeignKey("config.config_id"))
    created_at: Mapped[float]
    state: Mapped[str]  # PLANNED, RUNNING, STOPPED, DECIDED
    rules: Mapped[Json]  # alpha, max_pairs, look_every, min_effect, slice_s, burn_in_s, metric, guardrails
    seed: Mapped[int]
    twin_fit_id: Mapped[int | None] = mapped_column(ForeignKey("twin_fit.twin_fit_id"), default=None)
    ended_at: Mapped[float | None] = mapped_column(default=None)
    reason: Mapped[str | None] = mapped_column(default=None)
    # What it can find and how long that takes, as known before its first pair; see `tuner.planning`.
    planning: Mapped[Json] = mapped_column(default_factory=dict, server_default="{}")


class Slice(JournalBase):
    """One interval served by one arm. Written with its coin before it starts; scored when it has settled."""

    __tablename__ = "slice"
    __table_args__ = (Index("slice_experiment", "experiment_id", "pair_index"), Index("slice_state", "state"))

    slice_id: Mapped[str] = mapped_column(String(48), primary_key=True)
    experiment_id: Mapped[str] = mapped_column(ForeignKey("experiment.experiment_id"))
    pair_index: Mapped[int]
    position: Mapped[int]  # 0 or 1 inside its pair
    arm: Mapped[str]
    config_id: Mapped[str] = mapped_column(ForeignKey("config.config_id"))
    coin: Mapped[int]
    coin_hash: Mapped[str]
    planned_start_at: Mapped[float]
    planned_end_at: Mapped[float]
    burn_in_s: Mapped[float]
    state: Mapped[str]  # PLANNED, SCORED, VOID
    boot_id: Mapped[str | None] = mapped_column(default=None)
    num_requests: Mapped[int | None] = mapped_column(default=None)
    num_errors: Mapped[int | None] = mapped_column(default=None)
    response: Mapped[float | None] = mapped_column(default=None)  # measured minus twin, log units
    measured: Mapped[float | None] = mapped_column(default=None)  # mean ln(metric)
    predicted: Mapped[float | None] = mapped_column(default=None)  # the twin's mean ln(metric)
    stats: Mapped[Json] = mapped_column(default_factory=dict)
    void_reason: Mapped[str | None] = mapped_column(default=None)


class AlphaSpend(JournalBase):
    """One test's level from the LORD++ wealth of a (model, hardware, context); voids and harm stops count too."""

    __tablename__ = "alpha_spend"

    alpha_spend_id: Mapped[int] = mapped_column(Integer, primary_key=True, init=False)
    snapshot_id: Mapped[str] = mapped_column(ForeignKey("snapshot.snapshot_id"))
    context_key: Mapped[str]
    experiment_id: Mapped[str] = mapped_column(ForeignKey("experiment.experiment_id"), unique=True)
    test_index: Mapped[int]  # 1, 2, ... within the stream
    level: Mapped[float]
    created_at: Mapped[float]
    is_rejection: Mapped[bool | None] = mapped_column(default=None)


class Verdict(JournalBase):
    """PROMOTE, REJECT or INCONCLUSIVE, with everything a newcomer asks next. Written once, never edited."""

    __tablename__ = "verdict"

    verdict_id: Mapped[int] = mapped_column(Integer, primary_key=True, init=False)
    experiment_id: Mapped[str] = mapped_column(ForeignKey("experiment.experiment_id"), unique=True)
    decided_at: Mapped[float]
    outcome: Mapped[str]
    reason: Mapped[str]
    effect_ratio: Mapped[float | None]  # exp(mean d) - 1; -0.62 is 62 % lower latency
    interval_low_ratio: Mapped[float | None]
    interval_high_ratio: Mapped[float | None]
    num_pairs: Mapped[int]
    p_value: Mapped[float | None]
    level: Mapped[float]
    evidence: Mapped[
        Json
    ]  # the judge's inputs and outputs: pairs, boundary, guardrails, ranges of load and length


class Recommendation(JournalBase):
    """A verdict waiting for a person (`approve` mode). state: OPEN, APPROVED, REJECTED, EXPIRED."""

    __tablename__ = "recommendation"

    recommendation_id: Mapped[int] = mapped_column(Integer, primary_key=True, init=False)
    verdict_id: Mapped[int] = mapped_column(ForeignKey("verdict.verdict_id"))
    config_id: Mapped[str] = mapped_column(ForeignKey("config.config_id"))
    created_at: Mapped[float]
    state: Mapped[str]
    decided_at: Mapped[float | None] = mapped_column(default=None)
    decided_by: Mapped[str | None] = mapped_column(default=None)


class Change(JournalBase):
    """A champion applied to the engine, with its cause.

    state: INTENDED (before the engine is touched), APPLIED, FAILED.
    """

    __tablename__ = "change"

    change_id: Mapped[int] = mapped_column(Integer, primary_key=True, init=False)
    snapshot_id: Mapped[str] = mapped_column(ForeignKey("snapshot.snapshot_id"))
    kind: Mapped[str]  # start, promote, rollback, restore (an edit from outside was undone)
    from_config_id: Mapped[str | None] = mapped_column(ForeignKey("config.config_id"))
    to_config_id: Mapped[str] = mapped_column(ForeignKey("config.config_id"))
    created_at: Mapped[float]
    reason: Mapped[str]
    state: Mapped[str]
    verdict_id: Mapped[int | None] = mapped_column(default=None)
    applied_at: Mapped[float | None] = mapped_column(default=None)
    version: Mapped[int | None] = mapped_column(default=None)
    prepare_s: Mapped[float | None] = mapped_column(default=None)
    commit_us: Mapped[float | None] = mapped_column(default=None)


class Anomaly(JournalBase):
    """A window outside its rule or forecast, from its first bad moment to its last.

    kind: fault (freezes tuning, voids slices) or condition (starts a study). layer: A (rule), B (statistics of
    the last hours) or C (forecast). severity: page or ticket. `change_id` is the change that came just before it.
    """

    __tablename__ = "anomaly"

    anomaly_id: Mapped[int] = mapped_column(Integer, primary_key=True, init=False)
    rule: Mapped[str]
    kind: Mapped[str]
    metric: Mapped[str]
    started_at: Mapped[float]
    observed: Mapped[float]
    limit: Mapped[float]
    reason: Mapped[str]
    ended_at: Mapped[float | None] = mapped_column(default=None)
    layer: Mapped[str] = mapped_column(String(1), default="A", server_default="A")
    severity: Mapped[str] = mapped_column(default="ticket", server_default="ticket")
    label: Mapped[str] = mapped_column(default="", server_default="")
    worst: Mapped[float | None] = mapped_column(default=None)  # the observed value furthest from the limit
    change_id: Mapped[int | None] = mapped_column(default=None)
    details: Mapped[Json] = mapped_column(default_factory=dict, server_default="{}")


class QualityCheck(JournalBase):
    """Known tokens through one configuration, teacher-forced, against another.

    kind: reference (the snapshot's first champion; its scores stand in `details`), periodic (the champion against
    it) or challenger (before its first slice).
    """

    __tablename__ = "quality_check"

    quality_check_id: Mapped[int] = mapped_column(Integer, primary_key=True, init=False)
    snapshot_id: Mapped[str] = mapped_column(ForeignKey("snapshot.snapshot_id"))
    kind: Mapped[str]
    config_id: Mapped[str] = mapped_column(ForeignKey("config.config_id"))
    reference_config_id: Mapped[str] = mapped_column(ForeignKey("config.config_id"))
    checked_at: Mapped[float]
    num_positions: Mapped[int]
    delta_nll: Mapped[float]  # mean over positions of NLL less the reference's, nats a token
    delta_nll_high: Mapped[float]  # upper end of its one-sided 95 % interval
    top1_agreement: Mapped[float]  # share of positions where both find the same token likeliest
    top1_low: Mapped[float]  # lower end of its one-sided 95 % interval
    is_passed: Mapped[bool]
    reason: Mapped[str]
    details: Mapped[Json] = mapped_column(default_factory=dict)


class OperatorAction(JournalBase):
    """What a person asked of the daemon: pause, resume, rollback, approve, reject."""

    __tablename__ = "operator_action"

    operator_action_id: Mapped[int] = mapped_column(Integer, primary_key=True, init=False)
    action: Mapped[str]
    arguments: Mapped[Json]
    actor: Mapped[str]
    requested_at: Mapped[float]
    state: Mapped[str]  # DONE, REFUSED
    answer: Mapped[str]
    role: Mapped[str] = mapped_column(default="operator", server_default="operator")  # viewer, operator


class Note(JournalBase):
    """One line of the story: what the daemon did and why, for `tuner history` and the live view."""

    __tablename__ = "note"

    note_id: Mapped[int] = mapped_column(Integer, primary_key=True, init=False)
    at: Mapped[float]
    stage: Mapped[str]
    text: Mapped[str]
    details: Mapped[Json] = mapped_column(default_factory=dict)


# --- metrics --------------------------------------------------------------------------------------


class Sample(MetricsBase):
    """One value of one metric at one time, under the configuration that served it."""

    __tablename__ = "sample"
    __table_args__ = ({"sqlite_with_rowid": False},)

    metric: Mapped[str] = mapped_column(String(64), primary_key=True)
    label: Mapped[str] = mapped_column(String(32), primary_key=True)  # "" or device / core / error kind
    at: Mapped[float] = mapped_column(primary_key=True)
    value: Mapped[float]
    config_id: Mapped[str | None] = mapped_column(default=None)


class SampleRollup(MetricsBase):
    """The samples of one metric in one bin of `bin_s` seconds (60 or 3600), which starts at `at`."""

    __tablename__ = "sample_rollup"
    __table_args__ = ({"sqlite_with_rowid": False},)

    metric: Mapped[str] = mapped_column(String(64), primary_key=True)
    label: Mapped[str] = mapped_column(String(32), primary_key=True)
    bin_s: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[float] = mapped_column(primary_key=True)
    num_samples: Mapped[int]
    mean: Mapped[float]
    low: Mapped[float]
    high: Mapped[float]
    config_id: Mapped[str | None] = mapped_column(default=None)  # None where more than one served


class RequestTiming(MetricsBase):
    """What happened to one request, as drained from the runtime; (boot_id, seq) makes a second drain harmless."""

    __tablename__ = "request_timing"
    __table_args__ = (
        Index("request_timing_arrived", "arrived_at"),
        Index("request_timing_slice", "arrival_slice"),
    )

    boot_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    request_id: Mapped[str]
    arrived_at: Mapped[float]
    finished_at: Mapped[float]
    prompt_tokens: Mapped[int]
    output_tokens: Mapped[int]
    finish_reason: Mapped[str]
    admitted_at: Mapped[float | None] = mapped_column(default=None)
    first_token_at: Mapped[float | None] = mapped_column(default=None)
    error_kind: Mapped[str | None] = mapped_column(default=None)
    config_id: Mapped[str | None] = mapped_column(default=None)
    arrival_slice: Mapped[str | None] = mapped_column(default=None)
    first_token_slice: Mapped[str | None] = mapped_column(default=None)
    slices: Mapped[Json] = mapped_column(
        default_factory=dict
    )  # slice_id -> [tokens, gaps, sum_gap_s, max_gap_s]
    gaps: Mapped[Json] = mapped_column(default_factory=dict)
    num_preemptions: Mapped[int] = mapped_column(default=0)


class Step(MetricsBase):
    """One step of the engine: what the step-time model is fitted on. The last two are of steps on a GPU alone."""

    __tablename__ = "step"
    __table_args__ = (Index("step_at", "at"),)

    boot_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[float]
    step_s: Mapped[float]
    forward_s: Mapped[float]
    num_decode: Mapped[int]
    num_prefill_rows: Mapped[int]
    num_prefill_tokens: Mapped[int]
    context_tokens: Mapped[int]
    attention_pairs: Mapped[int]
    num_running: Mapped[int]
    num_waiting: Mapped[int]
    kv_used_tokens: Mapped[int]
    threads: Mapped[int]
    config_id: Mapped[str]
    slice_id: Mapped[str | None] = mapped_column(default=None)
    device_s: Mapped[float | None] = mapped_column(default=None)
    graph_rows: Mapped[int | None] = mapped_column(default=None)


class RuntimeEvent(MetricsBase):
    """What the engine said of itself: slices entered, configurations committed, leases lapsed, restarts."""

    __tablename__ = "runtime_event"

    boot_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[float]
    kind: Mapped[str]
    details: Mapped[Json]


class DrainCursor(MetricsBase):
    """The last record of each boot that stands in this file; committed with the records themselves."""

    __tablename__ = "drain_cursor"

    boot_id: Mapped[str] = mapped_column(String(32), primary_key=True)
    after_seq: Mapped[int]
    num_dropped: Mapped[int]
    updated_at: Mapped[float]


class Forecast(MetricsBase):
    """The expected value of a metric with its band; bands are stored, models are not."""

    __tablename__ = "forecast"

    metric: Mapped[str] = mapped_column(String(64), primary_key=True)
    at: Mapped[float] = mapped_column(primary_key=True)
    fitted_at: Mapped[float]
    expected: Mapped[float]
    low: Mapped[float]
    high: Mapped[float]


class ForecastFit(MetricsBase):
    """The last fit of one metric's forecast. state: LEARNING, FITTED, FAILED; it is stale by its age."""

    __tablename__ = "forecast_fit"

    metric: Mapped[str] = mapped_column(String(64), primary_key=True)
    state: Mapped[str]
    tried_at: Mapped[float]
    reason: Mapped[str]
    fitted_at: Mapped[float | None] = mapped_column(default=None)
    num_points: Mapped[int] = mapped_column(default=0)
    history_s: Mapped[float] = mapped_column(default=0.0)
    residual_scale: Mapped[float | None] = mapped_column(
        default=None
    )  # in the fitted scale, log units if is_log
    is_log: Mapped[bool] = mapped_column(default=False)
    fit_s: Mapped[float] = mapped_column(default=0.0)
