"""What the pages show, read from the store: one value a page, no Streamlit, nothing written.

Every read opens its own session for as long as it lasts. Instants are UTC epoch seconds of the store.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from store import decisions, listings, queries
from store.database import Session, StoreReader
from store.evidence import FalsePromotionRate, RealisedGain, false_promotion_rate, realised_gain
from store.explain import ExperimentRecord, changed_knobs, experiment_record
from store.latency import LatencySummary, RequestSummary, summarise
from store.metrics import METRICS
from store.tables import (
    Anomaly,
    Change,
    Config,
    Experiment,
    Note,
    Run,
    Snapshot,
    Study,
    Verdict,
)

MINUTE_S = 60.0
LIVE_S = 600.0  # what the overview's charts and sparklines hold
LIVE_POINTS = 121  # bins of 5 s
LATEST_S = 15.0  # a value older than this is not the present one
NUM_NOTES = 12
MAX_CHANGES = 200


class Points(list[tuple[float, float]]):
    """(instant, value) of one series, oldest first."""

    @property
    def values(self) -> list[float]:
        return [value for _, value in self]


@dataclass(frozen=True)
class Marker:
    """A change of the champion, as a line on every chart."""

    at: float
    kind: str
    words: str


@dataclass(frozen=True)
class Step:
    """One step on the champion's way: what was changed, why, and what the proof said."""

    change: Change
    changed: Mapping[str, tuple[object, object]]
    verdict: Verdict | None


@dataclass(frozen=True)
class Running:
    """The experiment under way."""

    record: ExperimentRecord
    differences: Sequence[float]

    @property
    def experiment(self) -> Experiment:
        return self.record.experiment

    @property
    def max_pairs(self) -> int:
        return int(self.experiment.rules.get("max_pairs", 1))

    @property
    def seconds_a_pair(self) -> float | None:
        """From the start of one pair to the start of the next, pauses included; None before the second pair."""
        starts = sorted({row.pair_index: row.planned_start_at for row in self.record.slices}.items())
        if len(starts) < 2:
            return None
        (first, t0), (last, t1) = starts[0], starts[-1]
        return (t1 - t0) / (last - first)

    @property
    def pairs_to_next_look(self) -> int:
        every = int(self.experiment.rules.get("look_every", 1))
        n = len(self.differences)
        return min((n // every + 1) * every, self.max_pairs) - n


@dataclass(frozen=True)
class Gain:
    """What the promotions brought. before and after: requests outside of slices, at the start and lately."""

    proof: Verdict | None = None
    metric: str = "e2e_s"
    realised: RealisedGain | None = None
    false_promotions: FalsePromotionRate | None = None
    before: RequestSummary | None = None
    after: RequestSummary | None = None


@dataclass(frozen=True)
class Overview:
    now: float
    run: Run | None
    snapshot: Snapshot | None
    champion_id: str | None
    since_at: float | None
    values: Mapping[str, Any]
    start_values: Mapping[str, Any]
    steps: Sequence[Step]
    study: Study | None
    running: Running | None
    anomalies: Sequence[Anomaly]
    waiting: int
    notes: Sequence[Note]
    markers: Sequence[Marker]
    minute: RequestSummary
    series: Mapping[tuple[str, str], Points] = field(default_factory=dict)
    fits: Mapping[str, int] = field(default_factory=dict)  # state of a forecast's fit -> how many metrics

    def latest(self, metric: str, label: str = "") -> float | None:
        points = self.series.get((metric, label))
        return points[-1][1] if points and self.now - points[-1][0] <= LATEST_S else None


HOST_SERIES = (("cpu_util_ratio", "all"), ("memory_used_bytes", ""))
LIVE_SERIES = (
    ("requests_per_s", ""),
    ("output_tokens_per_s", ""),
    ("ttft_s", "p95"),
    ("tpot_s", "p95"),
    ("e2e_s", "p95"),
    ("e2e_s", "p50"),
    ("requests_running", ""),
    ("requests_waiting", ""),
    ("kv_used_ratio", ""),
    ("cpu_util_ratio", "all"),
    ("memory_used_bytes", ""),
    ("memory_total_bytes", ""),
    ("gpu_util_ratio", "0"),
    ("gpu_memory_used_bytes", "0"),
    ("gpu_memory_total_bytes", "0"),
    ("gpu_temperature_celsius", "0"),
    ("gpu_power_watts", "0"),
)


def freshness(reader: StoreReader) -> tuple[float | None, Sequence[Anomaly]]:
    """When the newest sample was taken, and what is open now. Host metrics come with every tick."""
    with reader.journal() as session:
        anomalies = queries.anomalies(session, only_open=True)
    with reader.metrics() as session:
        found = [listings.newest_sample_at(session, *key) for key in HOST_SERIES]
    return max((at for at in found if at is not None), default=None), anomalies


def overview(reader: StoreReader, now: float) -> Overview:
    with reader.journal() as session:
        journal = _overview_of_journal(session, now)
    with reader.metrics() as session:
        minute = queries.request_percentiles(session, now - MINUTE_S, now)
        series = {key: live_points(session, *key, now) for key in LIVE_SERIES}
        fits: dict[str, int] = {}
        for fit in listings.forecast_fits(session):
            fits[fit.state] = fits.get(fit.state, 0) + 1
    return Overview(now=now, **journal, minute=minute, series=series, fits=fits)


def _overview_of_journal(session: Session, now: float) -> dict[str, Any]:
    snapshot = queries.last_snapshot(session)
    champions = decisions.champions_of(session, snapshot.snapshot_id) if snapshot is not None else []
    champion = champions[-1] if champions else None
    running = decisions.running_experiments(session)
    studies = queries.studies(session, limit=1)
    return {
        "run": queries.last_run(session),
        "snapshot": snapshot,
        "champion_id": None if champion is None else champion.config_id,
        "since_at": None if champion is None else since(champions),
        "values": {} if champion is None else decisions.config_values(session, champion.config_id),
        "start_values": decisions.config_values(session, champions[0].config_id) if champions else {},
        "steps": steps_of(session, None if snapshot is None else snapshot.snapshot_id),
        "study": studies[0] if studies else None,
        "running": running_of(session, running[0].experiment_id) if running else None,
        "anomalies": queries.anomalies(session, only_open=True),
        "waiting": len(decisions.waiting_recommendations(session)),
        "notes": queries.notes(session, NUM_NOTES),
        "markers": markers_of(queries.changes(session, limit=MAX_CHANGES), now - LIVE_S, now),
    }


def since(champions: Sequence[Any]) -> float:
    """Since when the newest champion serves; putting it back in force after a restart does not count."""
    newest = champions[-1]
    at = newest.since_at
    for row in reversed(champions):
        if row.config_id != newest.config_id:
            break
        at = row.since_at
    return float(at)


def running_of(session: Session, experiment_id: str) -> Running:
    record = experiment_record(session, experiment_id)
    return Running(record, differences_of(record))


def differences_of(record: ExperimentRecord) -> list[float]:
    return [pair.difference for pair in record.pairs if pair.difference is not None]


def steps_of(session: Session, snapshot_id: str | None) -> list[Step]:
    """The applied changes that moved the champion, oldest first."""
    steps = []
    for change in reversed(queries.changes(session, snapshot_id, MAX_CHANGES)):
        if change.state != "APPLIED" or change.from_config_id == change.to_config_id:
            continue
        before = session.get(Config, change.from_config_id) if change.from_config_id is not None else None
        after = session.get(Config, change.to_config_id)
        assert after is not None, "a foreign key holds it"
        changed = changed_knobs(before, after) if before is not None else {}
        verdict = session.get(Verdict, change.verdict_id) if change.verdict_id is not None else None
        steps.append(Step(change, changed, verdict))
    return steps


def markers_of(changes: Iterable[Change], t0: float, t1: float) -> list[Marker]:
    return [
        Marker(change.applied_at, change.kind, change.reason)
        for change in changes
        if change.applied_at is not None
        and t0 <= change.applied_at < t1
        and change.from_config_id != change.to_config_id
    ]


def live_points(session: Session, metric: str, label: str, now: float) -> Points:
    """The last minutes in bins of a few seconds, which start at round instants: a refresh does not move them."""
    found = queries.series(session, metric, label, now - LIVE_S, now, LIVE_POINTS)
    return Points((bin.at, bin.mean) for bin in found.bins)


# --- gain -----------------------------------------------------------------------------------------


def gain(reader: StoreReader, now: float) -> Gain:
    """Proven by the last promotion, realised in holdbacks since, and the plain before and after. Slow: cache it."""
    with reader.journal() as session:
        snapshot = queries.last_snapshot(session)
        if snapshot is None:
            return Gain()
        champions = decisions.champions_of(session, snapshot.snapshot_id)
        steps = steps_of(session, snapshot.snapshot_id)
        checked = false_promotion_rate(session, snapshot.snapshot_id)
        if not champions or champions[0].config_id == champions[-1].config_id or not steps:
            return Gain(false_promotions=checked)
        last = steps[-1]
        tested = session.get(Experiment, last.verdict.experiment_id) if last.verdict is not None else None
        metric = "e2e_s" if tested is None else str(tested.rules.get("metric", "e2e_s"))
        realised = realised_gain(session, last.change.change_id) if last.change.kind == "promote" else None
        first_until = next(row.since_at for row in champions if row.config_id != champions[0].config_id)
        start_id, champion_id, since_at = champions[0].config_id, champions[-1].config_id, since(champions)
    with reader.metrics() as session:
        before = quiet(session, first_until - 10 * MINUTE_S, first_until, start_id)
        after = quiet(session, max(since_at + 5.0, now - 5 * MINUTE_S), now, champion_id)
    return Gain(last.verdict, metric, realised, checked, before, after)


def quiet(session: Session, t0: float, t1: float, config_id: str) -> RequestSummary | None:
    """Requests of one configuration outside of all slices; None where there were none."""
    rows = queries.timings_between(session, t0, t1, config_id)
    found = summarise(row for row in rows if row.arrival_slice is None)
    return found if found.num else None


def latency_of(summary: RequestSummary | None, metric: str) -> LatencySummary | None:
    if summary is None:
        return None
    found: LatencySummary | None = {
        "ttft_s": summary.ttft,
        "tpot_s": summary.tpot,
        "e2e_s": summary.e2e,
    }.get(metric)
    return found


def help_of(metric: str) -> str:
    """A metric's declaration as a tooltip: what it says, its unit, and which way is better."""
    declared = METRICS[metric]
    better = {"lower": " Lower is better.", "higher": " Higher is better."}.get(declared.better or "", "")
    label = "" if declared.label.values == ("",) else f" Label: {declared.label.meaning}."
    return f"{declared.help} Unit: {declared.unit}.{better}{label}"
