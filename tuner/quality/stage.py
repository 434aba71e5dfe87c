"""Watches what the model says: no knob that may change it moves without proof, and a loss is noticed.

Writes QualityCheck rows and the anomaly that a failed one is. Everything is compared with one reference, the first
champion of the snapshot, so that many small losses cannot add up unseen. Scoring takes seconds: it runs in a thread,
one job at a time, and a tick only looks whether the job is done.

    reference (once a snapshot) ──▶ periodic (the champion, every `every_s`)
                                └─▶ challenger (prepared and scored before its first slice)
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any

from runtime.errors import EngineNotReady, InvalidKnob, RuntimeFault, RuntimeUnreachable
from runtime.knobs import KNOBS, EngineConfig
from store import decisions
from store.database import Store
from store.quality import (
    latest_quality_check,
    open_anomaly_of,
    quality_checks_since,
    quality_reference,
)
from store.tables import QualityCheck
from tuner.promote import describe
from tuner.quality.canary import canary_set
from tuner.quality.comparison import Comparison, QualityLimits, Scores, compare
from tuner.quality.read import Read, ScoringControl, Tokens, in_thread, read_canary
from tuner.quality.rows import RULE, Kind, check_row, drop_of
from tuner.rows import ensure_config, tell
from tuner.settings_quality import QualitySettings

logger = logging.getLogger(__name__)

HOLDS_S = 3600.0  # how long a challenger's check holds: weights that are prepared anew could be wrong anew
MAX_ATTEMPTS = 3
FIRST_RETRY_S = 5.0
MAX_RETRY_S = 300.0


@dataclass(frozen=True)
class Passed:
    reason: str


@dataclass(frozen=True)
class Failed:
    """`slack`: by how much a limit is missed, as a share of it."""

    reason: str
    slack: float = 1.0


@dataclass(frozen=True)
class NotYet:
    reason: str


Verdict = Passed | Failed | NotYet


@dataclass(frozen=True)
class Reference:
    config_id: str
    token_ids: Tokens
    scores: Scores


@dataclass(frozen=True)
class Job:
    kind: Kind
    config: EngineConfig
    result: "Future[Read]"


def outputs_of(config: EngineConfig) -> dict[str, Any]:
    """The knobs on which the model's answers depend."""
    values = config.values()
    return {knob.name: values[knob.name] for knob in KNOBS if knob.changes_outputs}


class QualityStage:
    """One check at a time; the newest wish for a challenger's check comes before the periodic one."""

    def __init__(
        self, store: Store, control: ScoringControl, settings: QualitySettings, snapshot_id: str,
        start: "Callable[[Callable[[], Read]], Future[Read]]" = in_thread,
    ) -> None:  # fmt: skip
        self._store, self._control, self._settings, self._snapshot_id = store, control, settings, snapshot_id
        self._start = start
        self._job: Job | None = None
        self._wanted: EngineConfig | None = None
        self._reference: Reference | None = None
        self._refused: dict[str, Failed] = {}  # config_id -> could not be prepared or read
        self._attempts: dict[str, int] = {}
        self._retry_at = 0.0
        self._num_faults = 0
        self._trouble = "no reference has been scored yet"
        limits = QualityLimits(settings.max_delta_nll, settings.min_top1_agreement)
        self._limits = limits
        self._canary = f"{canary_set().digest}/{settings.piece_tokens}"

    # -- what others ask -----------------------------------------------------------------------------------

    @property
    def why_unavailable(self) -> str | None:
        """None where a challenger can be checked; otherwise why no knob that changes outputs may move."""
        if not self._settings.enabled:
            return "quality checks are off (`quality.enabled`)"
        return None if self._known_reference() is not None else self._trouble

    def verdict_for(self, config: EngineConfig, champion: EngineConfig, now: float) -> Verdict:
        """Whether this challenger may serve a slice. NotYet starts its check; ask again at the next tick."""
        if outputs_of(config) == outputs_of(champion):
            return Passed("It changes nothing that the model says.")
        why_not = self.why_unavailable
        if why_not is not None:
            return Failed(f"It changes what the model says, and {why_not}.")
        if config.config_id in self._refused:
            return self._refused[config.config_id]
        check = self._recent_check(config, now)
        if check is not None:
            return Passed(check.reason) if check.is_passed else Failed(check.reason, check.details["slack"])
        if self._job is None or self._job.config != config:
            self._wanted = config
        change = describe(config.values(), champion.values())
        return NotYet(f"Checking what the model says with {change}, before its first slice.")

    def step(self, now: float, champion: EngineConfig) -> str | None:
        """Takes what is done, starts what is due. Returns why the last promotion must be taken back, if it must."""
        if not self._settings.enabled:
            return None
        if self._job is not None:
            if not self._job.result.done():
                return None
            job, self._job = self._job, None
            return self._finish(job, champion, now)
        if now >= self._retry_at:
            self._begin_next(champion, now)
        return None

    # -- starting ------------------------------------------------------------------------------------------

    def _begin_next(self, champion: EngineConfig, now: float) -> None:
        if self._known_reference() is None:
            self._begin("reference", self._first_champion(champion), champion)
        elif self._wanted is not None:
            wanted, self._wanted = self._wanted, None
            self._begin("challenger", wanted, champion)
        elif self._is_due(champion, now):
            self._begin("periodic", champion, champion)

    def _begin(self, kind: Kind, config: EngineConfig, champion: EngineConfig) -> None:
        known = self._reference
        token_ids = known.token_ids if known is not None else None
        needs_prepare = outputs_of(config) != outputs_of(champion)
        piece_tokens = self._settings.piece_tokens

        def work() -> Read:
            return read_canary(self._control, config, token_ids, piece_tokens, needs_prepare)

        self._job = Job(kind, config, self._start(work))

    def _is_due(self, champion: EngineConfig, now: float) -> bool:
        with self._store.journal() as session:
            last = latest_quality_check(session, self._snapshot_id, "periodic")
        is_other = last is None or last.config_id != champion.config_id
        return is_other or last is None or now - last.checked_at >= self._settings.every_s

    # -- finishing -----------------------------------------------------------------------------------------

    def _finish(self, job: Job, champion: EngineConfig, now: float) -> str | None:
        try:
            read = job.result.result()
            if job.kind == "reference":
                self._keep_reference(job.config, read, now)
                return None
            assert self._reference is not None, "a job other than the reference starts only when there is one"
            comparison = compare(self._reference.scores, read.scores, self._limits)
        except (RuntimeFault, ValueError, KeyError) as error:
            self._failed(job, error, now)
            return None
        self._num_faults, self._attempts = 0, {}
        self._record(job, read, comparison, now)
        if job.kind == "periodic" and job.config.config_id == champion.config_id:
            return self._heed_periodic(comparison, now)
        return None

    def _failed(self, job: Job, error: Exception, now: float) -> None:
        """Not a verdict on quality: tried again later. A challenger that cannot be prepared or read is refused."""
        logger.warning("Quality check (%s) of %s failed: %s", job.kind, job.config.config_id, error)
        self._num_faults += 1
        self._retry_at = now + min(MAX_RETRY_S, FIRST_RETRY_S * 2 ** (self._num_faults - 1))
        if job.kind == "reference":
            self._trouble = f"the reference could not be scored ({error})"
        if job.kind != "challenger" or isinstance(error, EngineNotReady | RuntimeUnreachable):
            return
        key = job.config.config_id
        self._attempts[key] = self._attempts.get(key, 0) + 1
        if isinstance(error, InvalidKnob) or self._attempts[key] >= MAX_ATTEMPTS:
            self._refused[key] = Failed(f"It could not be prepared and read: {error}")
            self._retry_at = 0.0
        else:
            self._wanted = job.config

    def _keep_reference(self, config: EngineConfig, read: Read, now: float) -> None:
        scores = read.scores
        comparison = compare(
            scores, scores, self._limits
        )  # raises where the set is too small for this tokenizer
        details = {
            "canary": self._canary, "token_ids": read.token_ids, "nll": scores.nll, "top1": scores.top1,
            **read.timings,
        }  # fmt: skip
        with self._store.journal() as session:
            ensure_config(session, config, now)
            session.flush()
            check = check_row(
                self._snapshot_id, "reference", config, config.config_id, comparison, details, now
            )
            session.add(check)
            tell(
                session, now, "quality",
                f"The reference for quality is scored: {comparison.num_positions} positions in "
                f"{comparison.num_passages} passages.",
            )  # fmt: skip
        self._reference = Reference(config.config_id, read.token_ids, scores)
        self._num_faults = 0

    def _record(self, job: Job, read: Read, comparison: Comparison, now: float) -> None:
        assert self._reference is not None
        details = {
            "canary": self._canary, "limits": asdict(self._limits), "slack": comparison.slack, **read.timings,
        }  # fmt: skip
        with self._store.journal() as session:
            ensure_config(session, job.config, now)
            session.flush()
            reference_id = self._reference.config_id
            row = check_row(self._snapshot_id, job.kind, job.config, reference_id, comparison, details, now)
            session.add(row)
            if job.kind == "challenger":
                text = f"Quality of {job.config.config_id} before its first slice: {comparison.reason}"
                tell(session, now, "quality", text, {"config_id": job.config.config_id})

    def _heed_periodic(self, comparison: Comparison, now: float) -> str | None:
        with self._store.journal() as session:
            anomaly = open_anomaly_of(session, RULE)
            if comparison.is_passed:
                if anomaly is not None:
                    anomaly.ended_at = now
                    tell(session, now, "quality", f"The model's answers are as before: {comparison.reason}")
                return None
            change = decisions.last_applied_change(session, self._snapshot_id)
            blamed = self._blamed(session, now)
            if anomaly is None:
                session.add(
                    drop_of(comparison, self._limits, change.change_id if change and blamed else None, now)
                )
                tell(session, now, "quality", f"The model's answers got worse. {comparison.reason}")
            else:
                anomaly.worst = max(anomaly.worst or comparison.delta_nll_high, comparison.delta_nll_high)
        return f"The model's answers got worse: {comparison.reason}" if blamed else None

    def _blamed(self, session: Any, now: float) -> bool:
        """Whether the last promotion may be why: no check of the champion has passed since it was applied."""
        change = decisions.last_applied_change(session, self._snapshot_id)
        if change is None or change.kind != "promote" or change.applied_at is None:
            return False
        since = quality_checks_since(session, self._snapshot_id, "periodic", change.applied_at)
        return not any(check.is_passed and check.config_id == change.to_config_id for check in since)

    # -- rows ----------------------------------------------------------------------------------------------

    def _known_reference(self) -> Reference | None:
        if self._reference is None:
            with self._store.journal() as session:
                row = quality_reference(session, self._snapshot_id, self._canary)
            if row is not None:
                scores = Scores(row.details["nll"], row.details["top1"])
                self._reference = Reference(row.config_id, row.details["token_ids"], scores)
        return self._reference

    def _first_champion(self, champion: EngineConfig) -> EngineConfig:
        with self._store.journal() as session:
            history = decisions.champions_of(session, self._snapshot_id)
            if not history:
                return champion
            return EngineConfig.of(decisions.config_values(session, history[0].config_id))

    def _recent_check(self, config: EngineConfig, now: float) -> QualityCheck | None:
        """Of this configuration or of one that says the same, against the same reference and limits."""
        wanted = outputs_of(config)
        with self._store.journal() as session:
            for row in quality_checks_since(session, self._snapshot_id, "challenger", now - HOLDS_S):
                is_same = row.details["canary"] == self._canary and row.details["limits"] == asdict(
                    self._limits
                )
                values = decisions.config_values(session, row.config_id)
                if is_same and outputs_of(EngineConfig.of(values)) == wanted:
                    return row
        return None
