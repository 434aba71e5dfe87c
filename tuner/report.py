"""What the reading commands print: status, history, explain, export. Reads the store only.

Every report is a value with two forms: lines for a person, one JSON document for a machine.
"""

import json
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from store import decisions, queries
from store.database import StoreReader
from store.errors import UnknownRow
from store.explain import ExperimentRecord, Explanation, explain
from tuner.against_itself import false_alarm_words
from tuner.api import DaemonClient
from tuner.errors import DaemonNotRunning


@dataclass(frozen=True)
class Report:
    lines: tuple[str, ...]
    document: Any

    def to_text(self) -> str:
        return "\n".join(self.lines)

    def to_json(self) -> str:
        return json.dumps(self.document, indent=2, default=str)


@dataclass(frozen=True)
class StoryReport(Report):
    """`is_complete`: every link from the change back to its cause is there, with the coins and the scores."""

    is_complete: bool = False


def clock_time(at: float | None) -> str:
    return "–" if at is None else datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S")


def percent(ratio: float | None) -> str:
    return "–" if ratio is None else f"{100 * ratio:+.1f} %"


# --- status ---------------------------------------------------------------------------------------


def status_report(data_dir: Path) -> Report:
    reader = StoreReader(data_dir)
    with reader.journal() as session:
        snapshot = queries.last_snapshot(session)
        champion = decisions.latest_champion(session, snapshot.snapshot_id) if snapshot is not None else None
        values = decisions.config_values(session, champion.config_id) if champion is not None else {}
        running = decisions.running_experiments(session)
        waiting = [
            (row, session.get(queries.Verdict, row.verdict_id))
            for row in decisions.waiting_recommendations(session)
        ]
        gain = queries.realised_gain(session)
        alarms = queries.false_promotion_rate(session)
    now = time.time()
    with reader.metrics() as session:
        minute = queries.request_percentiles(session, now - 60.0, now)
    daemon = daemon_status(data_dir)
    document = {
        "daemon": daemon,
        "snapshot_id": None if snapshot is None else snapshot.snapshot_id,
        "champion": None
        if champion is None
        else {"config_id": champion.config_id, "since_at": champion.since_at, "values": values},
        "experiments": [{"experiment_id": row.experiment_id, "kind": row.kind} for row in running],
        "recommendations": [
            {
                "recommendation_id": row.recommendation_id,
                "config_id": row.config_id,
                "reason": verdict.reason if verdict else "",
            }
            for row, verdict in waiting
        ],
        "realised_gain": None if gain is None else gain._asdict(),
        "false_promotions": {**alarms._asdict(), "rate": alarms.rate._asdict()},
        "trust": [*gain_words(gain), false_alarm_words(alarms)],
        "last_minute": {
            "num": minute.num,
            "success_ratio": minute.success_ratio,
            "ttft": summary(minute.ttft),
            "tpot": summary(minute.tpot),
            "e2e": summary(minute.e2e),
        },
    }
    return Report(tuple(status_lines(document, snapshot)), document)


def status_lines(document: dict[str, Any], snapshot: Any) -> list[str]:
    daemon = document["daemon"]
    lines = [
        "daemon      "
        + (
            f"{daemon['doing']} (mode {daemon['mode']})"
            if daemon
            else "not running; the engine may still serve"
        )
    ]
    if snapshot is not None:
        lines.append(
            f"model       {snapshot.model['name']} on {snapshot.hardware['device']} ({snapshot.hardware['cpu_model']})"
        )
    champion = document["champion"]
    if champion is not None:
        knobs = ", ".join(f"{name} {value}" for name, value in champion["values"].items())
        lines.append(f"champion    {champion['config_id']} since {clock_time(champion['since_at'])}: {knobs}")
    minute = document["last_minute"]
    lines.append(
        f"last minute {minute['num']} requests"
        + "".join(
            f", {name} p50 {minute[name]['p50_s']:.3f} s p95 {minute[name]['p95_s']:.3f} s"
            for name in ("ttft", "tpot", "e2e")
            if minute[name]
        )
    )
    lines += [f"experiment  {row['kind']} {row['experiment_id']}" for row in document["experiments"]]
    lines += [f"trust       {words}" for words in document["trust"]]
    lines += [
        f"waiting     recommendation {row['recommendation_id']}: {row['reason']} "
        f"(tuner approve {row['recommendation_id']})"
        for row in document["recommendations"]
    ]
    return lines


def gain_words(gain: queries.RealisedGain | None) -> list[str]:
    """What the last promotion was worth when the former champion was asked again; nothing before the first pair."""
    if gain is None or gain.gain_ratio is None:
        return []
    known = gain.low_ratio is not None and gain.high_ratio is not None
    interval = (
        f"95 % interval {gain.low_ratio:.1%} to {gain.high_ratio:.1%}" if known else "too few for an interval"
    )
    promised = "" if gain.promised_ratio is None else f", {gain.promised_ratio:.1%} at its verdict"
    seen = f"{interval}, {gain.num_pairs} holdback pairs"
    return [f"Change {gain.change_id} keeps a gain of {gain.gain_ratio:.1%} ({seen}){promised}."]


def summary(latencies: Any) -> dict[str, float] | None:
    return (
        None
        if latencies is None
        else {
            "p50_s": latencies.p50,
            "p95_s": latencies.p95,
            "p99_s": latencies.p99,
            "mean_s": latencies.mean,
        }
    )


def daemon_status(data_dir: Path) -> dict[str, Any] | None:
    try:
        return DaemonClient(data_dir).status()
    except DaemonNotRunning:
        return None


# --- history --------------------------------------------------------------------------------------


def history_report(data_dir: Path, limit: int) -> Report:
    with StoreReader(data_dir).journal() as session:
        notes = queries.notes(session, limit)
    lines = tuple(f"{clock_time(note.at)}  {note.stage:<10}  {note.text}" for note in notes)
    document = [
        {"at": note.at, "stage": note.stage, "text": note.text, "details": note.details} for note in notes
    ]
    return Report(lines or ("Nothing has happened yet.",), document)


# --- explain --------------------------------------------------------------------------------------


def explain_report(data_dir: Path, what: str | None) -> StoryReport:
    """The story of a change (a number), of an experiment (its id), or of the last promotion (None)."""
    with StoreReader(data_dir).journal() as session:
        if what is None:
            promotions = [change for change in queries.changes(session) if change.kind == "promote"]
            if not promotions:
                raise UnknownRow("Nothing has been promoted yet; `tuner history` tells what was tried.")
            what = str(promotions[0].change_id)
        story = (
            explain(session, change_id=int(what))
            if what.isdecimal()
            else explain(session, experiment_id=what)
        )
    return StoryReport(tuple(story_lines(story)), story_document(story), is_complete(story))


def is_complete(story: Explanation) -> bool:
    record = story.record
    if record is None or story.verdict is None or story.change is None or record.spend is None:
        return False
    links = (story.study, story.proposal, story.trial, story.probe)
    scored = [row for row in record.slices if row.state == "SCORED"]
    return (
        all(link is not None for link in links)
        and len(scored) == 2 * story.verdict.num_pairs > 0
        and all(row.coin_hash and row.stats.get("coin_salt") and row.response is not None for row in scored)
        and record.spend.is_rejection is True
        and story.change.state == "APPLIED"
    )


def story_lines(story: Explanation) -> list[str]:
    change, verdict, record = story.change, story.verdict, story.record
    lines = []
    if change is not None:
        lines.append(
            f"change {change.change_id} ({change.kind}, {change.state}) at {clock_time(change.applied_at)}: "
            f"{change.reason}"
        )
    lines += [f"  {name}: {before} -> {after}" for name, (before, after) in story.changed_knobs.items()]
    if story.study is not None:
        lines.append(f"study {story.study.study_id}: caused by {story.cause}")
    if story.proposal is not None and story.trial is not None:
        value = "no value" if story.trial.value is None else f"log ratio {story.trial.value:+.3f}"
        lines.append(f"proposed as {story.proposal.origin}; probed once: {value}")
    if record is not None:
        lines += experiment_lines(record)
    if verdict is not None:
        lines.append(f"verdict {verdict.outcome}: {verdict.reason}")
        lines.append(
            f"  effect {percent(verdict.effect_ratio)} (interval {percent(verdict.interval_low_ratio)} to "
            f"{percent(verdict.interval_high_ratio)}), {verdict.num_pairs} pairs, "
            f"p {verdict.p_value:.2g} at level {verdict.level:.2g}"
            if verdict.p_value is not None
            else "  no pair was scored"
        )
    if change is not None and change.commit_us is not None:
        lines.append(f"applied in {change.commit_us:.0f} us as version {change.version}")
    return lines


def experiment_lines(record: ExperimentRecord) -> list[str]:
    experiment = record.experiment
    lines = [
        f"experiment {experiment.experiment_id} ({experiment.kind}, {experiment.state}): "
        f"slices of {experiment.rules['slice_s']:g} s"
    ]
    if record.twin_fit is not None:
        lines.append(f"  {record.twin_fit.reason}")
    lines.append(
        f"  {'pair':>4} {'order':>5} {'requests':>9} {'champion s':>11} {'challenger s':>13} {'log ratio':>10}"
    )
    for pair in record.pairs:
        champion, challenger = pair.of("champion"), pair.of("challenger")
        if pair.difference is None or champion is None or challenger is None:
            reason = next((row.void_reason for row in pair.slices if row.void_reason), "not scored")
            lines.append(f"  {pair.index:>4} void: {reason}")
            continue
        order = "AB" if pair.slices[0].arm == "champion" else "BA"
        lines.append(
            f"  {pair.index:>4} {order:>5} {(champion.num_requests or 0) + (challenger.num_requests or 0):>9} "
            f"{gmean(champion):>11} {gmean(challenger):>13} {pair.difference:>+10.3f}"
        )
    return lines


def gmean(row: Any) -> str:
    """The geometric mean of the metric in the slice, which is what the mean logarithm says."""
    return f"{2.718281828459045**row.measured:.3f}"


def story_document(story: Explanation) -> dict[str, Any]:
    def row(value: Any) -> dict[str, Any] | None:
        return (
            None
            if value is None
            else {key: item for key, item in vars(value).items() if not key.startswith("_")}
        )

    record = story.record
    return {
        "cause": story.cause,
        "changed_knobs": story.changed_knobs,
        "snapshot": row(story.snapshot),
        "change": row(story.change),
        "study": row(story.study),
        "proposal": row(story.proposal),
        "trial": row(story.trial),
        "verdict": row(story.verdict),
        "experiment": row(record.experiment) if record is not None else None,
        "slices": [row(one) for one in record.slices] if record is not None else [],
        "twin_fit": row(record.twin_fit) if record is not None else None,
        "alpha_spend": row(record.spend) if record is not None else None,
    }


# --- export ---------------------------------------------------------------------------------------


def export_text(data_dir: Path, format: str = "yaml") -> str:
    """The champion in one of `store.export.FORMATS`."""
    from store.export import export_as, proof_of_champion
    from tuner import __version__

    reader = StoreReader(data_dir)
    with reader.journal() as journal, reader.metrics() as metrics:
        return export_as(format, proof_of_champion(journal, metrics), __version__)


def evidence_text(data_dir: Path, experiment_id: str | None) -> str:
    """Everything behind one verdict, for `tuner verify`; behind the last promotion where none is named."""
    from store.export_evidence import export_evidence
    from tuner import __version__

    with StoreReader(data_dir).journal() as journal:
        return export_evidence(journal, experiment_id, __version__)
