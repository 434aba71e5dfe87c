"""What the pages of history, experiments and recommendations show, read from the store. No Streamlit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from dashboard.data import (
    Marker,
    Points,
    differences_of,
    markers_of,
)
from store import decisions, listings, queries
from store.database import Session, StoreReader
from store.errors import UnknownRow
from store.explain import ExperimentRecord, changed_knobs, experiment_record
from store.export import FORMATS, Proof, export_as, proof_of_champion
from store.metrics import METRICS
from store.tables import (
    AlphaSpend,
    Anomaly,
    Champion,
    Change,
    Config,
    Experiment,
    OperatorAction,
    QualityCheck,
    Recommendation,
    Slice,
    Snapshot,
    Study,
    Trial,
    Verdict,
)

MAX_POINTS = 300
MAX_EXPERIMENTS = 500
MAX_LABELS = 6
OVERALL = ("all", "")  # labels that stand for the whole, where there are also parts
PREFERRED = ("p50", "p95", "p99")


# --- history --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MetricHistory:
    """One metric over a range: points and the band of lowest and highest by label, and its forecast."""

    metric: str
    width_s: float
    points: Mapping[str, Points]
    bands: Mapping[str, Sequence[tuple[float, float, float]]]
    forecast: Sequence[tuple[float, float, float, float]]


@dataclass(frozen=True)
class History:
    t0: float
    t1: float
    metrics: Sequence[MetricHistory]
    markers: Sequence[Marker]
    anomalies: Sequence[Anomaly]
    changes: Sequence[tuple[Change, Mapping[str, tuple[object, object]], str]]  # the change, knobs, by whom
    actions: Sequence[OperatorAction]


def history(reader: StoreReader, metrics: Sequence[str], t0: float, t1: float) -> History:
    """Raises ValueError where the range is empty."""
    with reader.journal() as session:
        changes = listings.changes_between(session, t0, t1)
        told = [(change, knobs_of(session, change), actor_of(session, change)) for change in changes]
        anomalies = listings.anomalies_between(session, t0, t1)
        actions = [row for row in queries.operator_actions(session, 1000) if t0 <= row.requested_at < t1]
    with reader.metrics() as session:
        found = [metric_history(session, metric, t0, t1) for metric in metrics]
    return History(t0, t1, found, markers_of(changes, t0, t1), anomalies, told, actions)


def metric_history(session: Session, metric: str, t0: float, t1: float) -> MetricHistory:
    points: dict[str, Points] = {}
    bands: dict[str, list[tuple[float, float, float]]] = {}
    width_s = 0.0
    for label in chart_labels(metric, queries.labels_of(session, metric)):
        found = queries.series(session, metric, label, t0, t1, MAX_POINTS)
        if not found.bins:
            continue
        width_s = found.width_s
        points[label] = Points((bin.at, bin.mean) for bin in found.bins)
        bands[label] = [(bin.at, bin.low, bin.high) for bin in found.bins]
    forecast = [
        (row.at, row.expected, row.low, row.high) for row in queries.forecasts(session, metric, t0, t1)
    ]
    step = max(1, len(forecast) // MAX_POINTS)
    return MetricHistory(metric, width_s, points, bands, forecast[::step])


def chart_labels(metric: str, labels: Sequence[str]) -> list[str]:
    """Few enough lines to be read: percentiles of a latency, the whole of a machine, else the first labels."""
    if metric not in METRICS:
        return []
    preferred = [label for label in PREFERRED if label in labels]
    overall = [label for label in OVERALL if label in labels]
    return (preferred or overall or list(labels))[:MAX_LABELS]


def recorded_range(reader: StoreReader) -> tuple[float, float] | None:
    """From the first run's start to the newest sample; None for an empty store."""
    with reader.journal() as session:
        snapshot = queries.last_snapshot(session)
        runs = queries.last_run(session)
    started = [row.created_at for row in (snapshot,) if row is not None]
    started += [row.started_at for row in (runs,) if row is not None]
    with reader.metrics() as session:
        newest = listings.newest_sample_at(session, "cpu_util_ratio", "all")
    return (min(started), newest) if started and newest is not None else None


def knobs_of(session: Session, change: Change) -> dict[str, tuple[object, object]]:
    before = session.get(Config, change.from_config_id) if change.from_config_id is not None else None
    after = session.get(Config, change.to_config_id)
    return changed_knobs(before, after) if before is not None and after is not None else {}


def actor_of(session: Session, change: Change) -> str:
    """Who caused a change: the person who approved it, else the tuner."""
    if change.verdict_id is not None:
        for row in listings.recommendations(session):
            if row.verdict_id == change.verdict_id and row.state == "APPROVED" and row.decided_by:
                return row.decided_by
    if change.reason.startswith("Asked for by "):
        return change.reason.removeprefix("Asked for by ").rstrip(".")
    return "tuner"


# --- experiments ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ListedExperiment:
    """A line of the list."""

    experiment: Experiment
    changed: Mapping[str, tuple[object, object]]
    verdict: Verdict | None
    trial: Trial | None
    num_pairs: int


@dataclass(frozen=True)
class ShownExperiment:
    """Everything about one experiment."""

    record: ExperimentRecord
    study: Study | None
    siblings: Sequence[ListedExperiment]  # the others of its study: probes, tests
    foretold: Mapping[str, float | None]  # experiment_id of a probe -> predicted log ratio
    spends: Sequence[tuple[AlphaSpend, Experiment, Verdict | None]]
    quality: Sequence[QualityCheck]

    @property
    def differences(self) -> list[float]:
        return differences_of(self.record)

    @property
    def raw_differences(self) -> list[float | None]:
        """Of the same pairs, without the twin."""
        return [raw_difference(champion, challenger) for champion, challenger in self.scored]

    @property
    def scored(self) -> list[tuple[Slice, Slice]]:
        """(champion, challenger) of each pair that counts."""
        found = []
        for pair in self.record.pairs:
            champion, challenger = pair.of("champion"), pair.of("challenger")
            if pair.difference is not None and champion is not None and challenger is not None:
                found.append((champion, challenger))
        return found

    @property
    def uses_twin(self) -> bool:
        return any(row.predicted is not None for pair in self.scored for row in pair)


def raw_difference(champion: Slice, challenger: Slice) -> float | None:
    if champion.measured is None or challenger.measured is None:
        return None
    return challenger.measured - champion.measured


def experiment_list(reader: StoreReader) -> list[ListedExperiment]:
    """Newest first."""
    with reader.journal() as session:
        return listed(session, queries.experiments(session, MAX_EXPERIMENTS))


def listed(session: Session, rows: Sequence[Experiment]) -> list[ListedExperiment]:
    ids = [row.experiment_id for row in rows]
    verdicts, trials = (
        listings.verdicts_by_experiment(session, ids),
        listings.trials_by_experiment(session, ids),
    )
    pairs = listings.scored_pairs_by_experiment(session, ids)
    return [
        ListedExperiment(
            row,
            changed_between(session, row.champion_config_id, row.challenger_config_id),
            verdicts.get(row.experiment_id),
            trials.get(row.experiment_id),
            pairs.get(row.experiment_id, 0),
        )
        for row in rows
    ]


def changed_between(session: Session, before_id: str, after_id: str) -> dict[str, tuple[object, object]]:
    before, after = session.get(Config, before_id), session.get(Config, after_id)
    return changed_knobs(before, after) if before is not None and after is not None else {}


def shown_experiment(reader: StoreReader, experiment_id: str) -> ShownExperiment:
    """Raises UnknownRow where there is none."""
    with reader.journal() as session:
        record = experiment_record(session, experiment_id)
        one = record.experiment
        siblings, foretold, study = [], {}, None
        if one.study_id is not None:
            study = session.get(Study, one.study_id)
            siblings = listed(session, queries.experiments_of_study(session, one.study_id))
            foretold = foretold_by(session, siblings)
        spends = listings.alpha_spends(session, one.snapshot_id)
        verdicts = listings.verdicts_by_experiment(session, [spend.experiment_id for spend, _ in spends])
        quality = [
            check
            for check in listings.quality_checks(session, 200)
            if check.config_id == one.challenger_config_id
        ]
    told = [(spend, tested, verdicts.get(spend.experiment_id)) for spend, tested in spends]
    return ShownExperiment(record, study, siblings, foretold, told, quality)


def foretold_by(session: Session, probes: Sequence[ListedExperiment]) -> dict[str, float | None]:
    proposals = {
        row.experiment.experiment_id: row.trial.proposal_id for row in probes if row.trial is not None
    }
    predicted = decisions.predictions_of(session, list(proposals.values()))
    return {experiment_id: predicted.get(proposal) for experiment_id, proposal in proposals.items()}


# --- recommendations ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """A recommendation with what a person needs to decide."""

    recommendation: Recommendation
    verdict: Verdict | None
    record: ExperimentRecord | None
    changed: Mapping[str, tuple[object, object]]
    knobs: Mapping[str, Mapping[str, Any]]  # name -> its declaration, as the snapshot recorded it
    cause: str
    quality: Sequence[QualityCheck]


@dataclass(frozen=True)
class Recommendations:
    champion_id: str | None
    previous_id: str | None
    initial_id: str | None
    changes_back: Mapping[
        str, Mapping[str, tuple[object, object]]
    ]  # previous, initial -> knobs that would change
    waiting: Sequence[Card]
    decided: Sequence[Card]
    actions: Sequence[OperatorAction]
    running: Experiment | None


def recommendations(reader: StoreReader) -> Recommendations:
    with reader.journal() as session:
        snapshot = queries.last_snapshot(session)
        history = list(decisions.champions_of(session, snapshot.snapshot_id)) if snapshot is not None else []
        cards = [card(session, row, snapshot) for row in listings.recommendations(session, 50)]
        champion = history[-1].config_id if history else None
        back = {"previous": previous_of(history), "initial": initial_of(history)}
        running = decisions.running_experiments(session)
        return Recommendations(
            champion,
            back["previous"],
            back["initial"],
            {
                name: changed_between(session, champion, target)
                for name, target in back.items()
                if champion is not None and target is not None
            },
            [one for one in cards if one.recommendation.state == "OPEN"],
            [one for one in cards if one.recommendation.state != "OPEN"],
            queries.operator_actions(session, 200),
            running[0] if running else None,
        )


def card(session: Session, row: Recommendation, snapshot: Snapshot | None) -> Card:
    verdict = session.get(Verdict, row.verdict_id)
    record = experiment_record(session, verdict.experiment_id) if verdict is not None else None
    study_id = record.experiment.study_id if record is not None else None
    study = session.get(Study, study_id) if study_id is not None else None
    knobs = {str(told.get("name")): told for told in (snapshot.knobs if snapshot is not None else [])}
    quality = [check for check in listings.quality_checks(session, 200) if check.config_id == row.config_id]
    return Card(
        row,
        verdict,
        record,
        record.changed_knobs if record is not None else {},
        knobs,
        study.cause if study is not None else "",
        quality,
    )


def initial_of(history: Sequence[Champion]) -> str | None:
    """The first champion, where another serves now."""
    return history[0].config_id if history and history[0].config_id != history[-1].config_id else None


def previous_of(history: Sequence[Champion]) -> str | None:
    """Where a rollback would lead, as the daemon walks back: a rollback takes its own steps off the trail."""
    trail: list[str] = []
    for row in history:
        if row.config_id in trail:
            del trail[trail.index(row.config_id) :]
        trail.append(row.config_id)
    return trail[-2] if len(trail) > 1 else None


# --- exports --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExportFile:
    """A champion as a file to download."""

    label: str
    name: str
    text: str
    help: str


@dataclass(frozen=True)
class Exported:
    """`why_not` says why there is none."""

    files: Sequence[ExportFile]
    why_not: str = ""


LABELS = {"vllm": "vLLM", "sglang": "SGLang"}
EXTENSIONS = {"yaml": "yaml", "json": "json", "vllm": "vllm.sh", "sglang": "sglang.sh", "env": "env"}
READERS = {
    "yaml": "`tuner run --config FILE` reads it back.",
    "json": "The same as one JSON document.",
    "vllm": "Arguments of vLLM; what does not map is listed in it.",
    "sglang": "Arguments of SGLang; what does not map is listed in it.",
    "env": "Environment variables of `tuner run`.",
}


def exported(reader: StoreReader) -> Exported:
    """Every format that the store can write, named by model and day."""
    try:
        with reader.journal() as journal, reader.metrics() as metrics:
            proof = proof_of_champion(journal, metrics)
            run = queries.last_run(journal)
    except UnknownRow as error:
        return Exported([], str(error))
    version = run.tuner_version if run is not None else "unknown"
    stem = file_stem(proof)
    return Exported(
        [
            ExportFile(
                LABELS.get(name, name.upper()),
                f"{stem}.{EXTENSIONS.get(name, name)}",
                export_as(name, proof, version),
                READERS.get(name, ""),
            )
            for name in FORMATS
        ]
    )


def file_stem(proof: Proof) -> str:
    """`tuner-demo-2026-09-21`: whose configuration, and since when it serves."""
    model = "".join(
        c if c.isalnum() or c in "-._" else "-" for c in str(proof.snapshot.model.get("name", "model"))
    )
    change = proof.change
    day = (
        ""
        if change is None
        else f"{datetime.fromtimestamp(change.applied_at or change.created_at, UTC):%Y-%m-%d}"
    )
    return "-".join(part for part in ("tuner", model, day) if part)
