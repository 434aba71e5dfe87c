"""Fits the champion twin before experiments and lets it predict their pairs. Writes TwinFit rows.

Where the twin predicts too badly, covariates stand in for it, if they help (`tuner.covariates`). Either is
fitted on a stretch in which the champion alone served, and never again until the champion or the daemon
changes: what an experiment subtracts was fixed before its first coin.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from statistics import fmean
from typing import Any, NamedTuple

from runtime.errors import RuntimeFault
from runtime.knobs import EngineConfig
from runtime.step_model import fit_step_model
from store import queries
from store.database import Store
from store.tables import TwinFit
from tuner.covariates import REACH_S, CovariateFit, fit_covariates, window_of
from tuner.covariates import predict_pair as predict_by_covariates
from tuner.judging.objective import Metric
from tuner.rows import tell
from tuner.twin import ServedRequest, TwinParameters, calibrate_twin, predict_pair

logger = logging.getLogger(__name__)

WINDOW_S = 6.0  # windows in which the twin's error is looked at: half a short slice
MAX_REPLAYED = 500  # requests in the replay that ranks candidates: about a second of the tick
MAX_STRETCH_S = 900.0  # older steps tell of another hour
AFTER_PAIR_S = 30.0  # arrivals after a pair that still keep the engine busy with its requests


class TwinStage:
    """Holds the parameters of the twin of the champion that serves now, or the reason why there is none."""

    def __init__(self, store: Store, snapshot_id: str, identity: Mapping[str, Any]) -> None:
        self._store, self._snapshot_id, self._identity = store, snapshot_id, identity
        self._parameters: TwinParameters | None = None
        self._fitted: TwinParameters | None = None  # also where it predicts too badly to be subtracted
        self._covariates: CovariateFit | None = None
        self._served: list[ServedRequest] = []
        self._champion_log: float | None = None
        self.fit: TwinFit | None = None
        self.windows = ChampionWindows((), 0.0)

    @property
    def raw_pair_sd(self) -> float | None:
        """The spread of a pair of the champion's own windows, log units; None where too few were seen."""
        return None if self.fit is None else self.fit.parameters["error"]["raw_sd"]

    @property
    def adjustment(self) -> str:
        """What is subtracted from a slice's response: `twin`, `covariates` or `none`."""
        if self._parameters is not None:
            return "twin"
        return "covariates" if self._covariates is not None and self._covariates.usable else "none"

    @property
    def fit_id_in_use(self) -> int | None:
        return None if self.fit is None or self.adjustment == "none" else self.fit.twin_fit_id

    @property
    def noise_share(self) -> float:
        """What the adjustment left of the sd of the champion's own pairs."""
        if self.fit is None or self.adjustment == "none":
            return 1.0
        if self.adjustment == "twin":
            error = self.fit.parameters["error"]
            return float(error["residual_sd"] / error["raw_sd"])
        fitted = self.fit.parameters["covariates"]
        return float(fitted["adjusted_sd"] / fitted["raw_sd"])

    def forget(self) -> None:
        """The champion changed: its twin is no longer the twin of anything."""
        self._covariates = None
        self._parameters, self._fitted, self._champion_log, self.fit = None, None, None, None
        self.windows = ChampionWindows((), 0.0)

    def prepare(
        self, champion: EngineConfig, since_at: float, now: float, slice_s: float, metric: Metric = "e2e_s"
    ) -> TwinFit | None:
        """Fits on the champion's own stretch [since_at, now]. None where too few steps were seen."""
        start_at = max(since_at, now - MAX_STRETCH_S)
        with self._store.metrics() as session:
            steps = [vars(step) for step in queries.steps_between(session, start_at, now, champion.config_id)]
            served = served_by_champion(queries.timings_between(session, start_at, now))
        self.windows = champion_windows(served, start_at, now, slice_s)
        try:
            fitted = fit_step_model(steps, self._identity)
        except RuntimeFault as too_few:
            logger.info("No twin: %s", too_few)
            return None
        # An engine of ours says what it fitted, so that the knob tells the pool's size; another tells its size once.
        is_knob = "fitted_knobs" in self._identity
        kv_tokens = champion.kv_tokens if is_knob else self._identity["kv_total_tokens"]
        block_tokens = champion.block_tokens if is_knob else self._identity["kv_block_tokens"]
        parameters = TwinParameters(
            champion,
            fitted.model,
            kv_tokens // block_tokens,
            block_tokens,
            self._identity["model"]["max_model_len"],
        )
        parameters, error = calibrate_twin(parameters, served, WINDOW_S)
        one_engine = champion.replicas == 1
        fitted_covariates = fit_covariates(metric, served, window_of(start_at, now, slice_s))
        is_used = error.usable and one_engine and metric != "tpot_s"
        is_used = is_used and error.noise_share <= fitted_covariates.noise_share  # what leaves less noise
        covariates = None if is_used else fitted_covariates
        kept = {} if covariates is None else {"covariates": covariates.to_dict()}
        several = f"The twin is not used: it replays one engine, and `replicas` is {champion.replicas}."
        told = error.reason if one_engine else several
        reason = told if covariates is None else f"{told} {covariates.reason}"
        self.fit = TwinFit(
            snapshot_id=self._snapshot_id,
            config_id=champion.config_id,
            fitted_at=now,
            parameters=parameters.to_dict() | {"error": asdict(error)} | kept,
            num_steps=fitted.num_steps,
            step_error_ratio=fitted.relative_error,
            latency_error_ratio=error.relative_error,
            is_used=is_used,
            reason=reason,
        )
        with self._store.journal() as session:
            session.add(self.fit)
            tell(
                session,
                now,
                "experiment",
                f"{reason} A step is predicted to {fitted.relative_error:.1%}.",
            )
        self._parameters = parameters if is_used else None
        self._covariates = covariates
        self._fitted, self._served, self._champion_log = parameters, served, None
        return self.fit

    def predicted_log_ratio(self, metric: Metric, challenger: EngineConfig) -> float | None:
        """What the replay of the champion's own arrivals makes of a configuration, against the champion's replay.

        A prior: it ranks candidates and never decides. It knows nothing of knobs that change a step's own
        speed (threads), and extrapolates from the batches that the champion formed. It replays one engine, so
        it says nothing of a configuration with several.
        """
        if (
            self._fitted is None
            or metric == "tpot_s"
            or max(self._fitted.config.replicas, challenger.replicas) > 1
        ):
            return None
        if self._champion_log is None:
            self._champion_log = self._replayed_log(metric, self._fitted.config)
        log = self._replayed_log(metric, challenger)
        return None if log is None or self._champion_log is None else log - self._champion_log

    def _replayed_log(self, metric: Metric, config: EngineConfig) -> float | None:
        assert self._fitted is not None, "asked only after a fit"
        served = self._served[-MAX_REPLAYED:]
        if not served:
            return None
        parameters, champion = replace(self._fitted, config=config), self._fitted.config
        if (config.kv_tokens, config.block_tokens) != (champion.kv_tokens, champion.block_tokens):
            size = parameters.block_tokens if config.kv_block == champion.kv_block else config.block_tokens
            parameters = replace(parameters, kv_blocks=config.kv_tokens // size, block_tokens=size)
        found = predict_pair(parameters, served, served[0].arrived_at, math.inf).values()
        return (
            fmean(seen.log_e2e if metric == "e2e_s" else seen.log_ttft for seen in found) if found else None
        )

    def predict(self, metric: Metric, start_at: float, end_at: float) -> dict[str, float] | None:
        """request_id -> ln(metric) under the champion, for the requests that arrived in a pair.

        The replay starts from the engine's real backlog at the pair's start: under "no effect" that backlog
        depends on no coin, so the sign-flip test stays exact, and the twin cannot drift away over pairs.
        Where covariates stand in, they predict the same requests. None where neither is in use.
        """
        if self._parameters is None:
            return self._predict_by_covariates(start_at, end_at)
        with self._store.metrics() as session:
            rows = queries.timings_in_system(session, start_at, end_at + AFTER_PAIR_S)
        found = predict_pair(self._parameters, served_by_champion(rows), start_at, end_at)
        return {id: seen.log_e2e if metric == "e2e_s" else seen.log_ttft for id, seen in found.items()}

    def _predict_by_covariates(self, start_at: float, end_at: float) -> dict[str, float] | None:
        if self._covariates is None or self._covariates.model is None or not self._covariates.usable:
            return None
        with self._store.metrics() as session:
            rows = queries.timings_in_system(session, start_at - REACH_S, end_at)
        return predict_by_covariates(self._covariates.model, served_by_champion(rows), start_at, end_at)


class ChampionWindows(NamedTuple):
    """What the champion's latency was like, window after window as long as a slice: the scale of harm."""

    means: tuple[float, ...]  # mean ln(e2e)
    slowest_s: float


def champion_windows(
    served: Sequence[ServedRequest], start_at: float, end_at: float, slice_s: float
) -> ChampionWindows:
    """Neighbouring windows by arrival, oldest first; an empty one starts the row anew: around it are no neighbours."""
    means: list[float] = []
    for index in range(int((end_at - start_at) // slice_s)):
        low = start_at + index * slice_s
        latencies = [
            one.finished_at - one.arrived_at for one in served if low <= one.arrived_at < low + slice_s
        ]
        if latencies:
            means.append(fmean(math.log(max(latency, 1e-6)) for latency in latencies))
        else:
            means.clear()
    return ChampionWindows(
        tuple(means), max((one.finished_at - one.arrived_at for one in served), default=0.0)
    )


def served_by_champion(rows: Sequence[Any]) -> list[ServedRequest]:
    """Finished requests with a first token, as the calibration wants them."""
    return [
        ServedRequest(
            row.request_id,
            row.arrived_at,
            row.prompt_tokens,
            row.output_tokens,
            row.first_token_at,
            row.finished_at,
        )
        for row in rows
        if row.first_token_at is not None and row.finish_reason in ("stop", "length")
    ]
