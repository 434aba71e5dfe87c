"""An hour of the real engine against itself: `tuner bench hour --data var/bench-hour`.

    record  the demo model under demo traffic, the shipped default alone; 20 live A/A experiments back to back
            through the real ExperimentStage: plans, coins, scoring, verdicts
    coins   5,000 coin sequences over the same hour's requests, through the real scoring and judge, with the
            challenger's slices shifted by 0, 5, 10 and 20 %: with the twin, with covariates, and raw

Everything lies in the data folder: requests, coins, slices and verdicts in its store, what was asked and what
came of it in `hour.json` and `hour_result.json`. A recording that was cut off goes on where it stopped, a whole one is
used again, and a coin table that is whole for the same question is not computed twice.
"""

import argparse
import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from runtime.clock import Clock
from runtime.knobs import EngineConfig
from store import decisions, evidence, queries
from store.database import Store, StoreReader
from store.interval import Rate
from store.tables import Experiment, TwinFit
from tuner import covariates
from tuner.bench.coins import GAINS, CutPair, Predict, cut_pairs, run_coins
from tuner.collect import Collector
from tuner.experiment import HARM_PREFIX, Decided, ExperimentStage
from tuner.guardrail import Watchman
from tuner.hardware import HostProbe
from tuner.judging.harm import HarmRule
from tuner.judging.objective import Metric
from tuner.pairs import ExperimentRules, timing_of
from tuner.planning import slicing
from tuner.planning_stage import window_pair_sd
from tuner.promote import PromoteStage
from tuner.run import signals_set, traffic
from tuner.settings import Settings
from tuner.snapshot import end_run, initial_config, record_run, record_snapshot
from tuner.supervisor import RuntimeSupervisor
from tuner.twin import TwinParameters, predict_pair
from tuner.twin_stage import AFTER_PAIR_S, TwinStage, served_by_champion

METRIC: Metric = "e2e_s"
LEVEL = 0.05
PAIRS_LIVE, LOOK_EVERY = 10, 5
MIN_LEARN_S, MAX_LEARN_S, LEARN_SHARE = 60.0, 180.0, 0.05
BURN_IN_SHARE = 0.2
BETWEEN_PAIRS_S, AT_THE_END_S = 1.2, 8.0  # of one experiment: plans and ticks; the last requests
WARM_UP_S = 5.0  # of the load, before anything is recorded
LAST_REQUESTS_S = 15.0
HOUR_FILE, RESULT_FILE = "hour.json", "hour_result.json"


@dataclass
class Hour:
    """What is recorded, and how it is cut. `spans`: stretches of served traffic, epoch s; experiments by id."""

    minutes: float
    num_experiments: int
    utilisation: float
    learn_s: float
    slice_s: float
    burn_in_s: float
    min_requests: int
    spans: list[tuple[float, float]] = field(default_factory=list)
    learned_until_at: float | None = None  # what the first fits were made of ends here
    twin_fit_id: int | None = None
    rules: dict[str, Any] = field(default_factory=dict)

    @property
    def recorded_s(self) -> float:
        return sum(end_at - start_at for start_at, end_at in self.spans)

    @property
    def left_s(self) -> float:
        return 60.0 * self.minutes - self.recorded_s

    @classmethod
    def planned(cls, args: argparse.Namespace) -> "Hour":
        """Slices as long as the minutes allow for that many experiments."""
        minutes, num_experiments = args.minutes, args.experiments
        learn_s = min(MAX_LEARN_S, max(MIN_LEARN_S, LEARN_SHARE * 60.0 * minutes))
        each_s = (60.0 * minutes - learn_s) / max(1, num_experiments) - AT_THE_END_S
        slice_s = (each_s / PAIRS_LIVE - BETWEEN_PAIRS_S) / 2.0
        if slice_s < 2.0:
            raise SystemExit(
                f"{num_experiments} experiments of {PAIRS_LIVE} pairs need slices of at least 2 s, but {minutes:g} "
                f"minutes leave {slice_s:.1f} s. Give more `--minutes` or fewer `--experiments`."
            )
        burn_in_s = round(BURN_IN_SHARE * slice_s, 2)
        cut = (learn_s, round(slice_s, 2), burn_in_s, args.min_requests)
        return cls(minutes, num_experiments, args.utilisation, *cut)

    @classmethod
    def read(cls, data: Path) -> "Hour | None":
        path = data / HOUR_FILE
        if not path.exists():
            return None
        kept = json.loads(path.read_text())
        return cls(**{**kept, "spans": [tuple(span) for span in kept["spans"]]})

    def write(self, data: Path) -> None:
        beside = data / (HOUR_FILE + ".new")
        beside.write_text(json.dumps(asdict(self)))
        beside.replace(data / HOUR_FILE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=60.0, help="how much traffic is recorded")
    parser.add_argument("--experiments", type=int, default=20, help="live A/A experiments in it")
    parser.add_argument(
        "--sequences", type=int, default=5000, help="coin sequences over the recorded traffic"
    )
    parser.add_argument("--max-pairs", type=int, default=30, help="pairs of one experiment of the coin part")
    parser.add_argument(
        "--utilisation", type=float, default=0.5, help="of what the shipped default can serve"
    )
    parser.add_argument("--min-requests", type=int, default=5, help="judged requests that a slice needs")
    parser.add_argument("--data", type=Path, default=Path("var/bench-hour"), help="folder of the recording")


def bench_hour(args: argparse.Namespace) -> dict[str, Any]:
    args.data.mkdir(parents=True, exist_ok=True)
    hour = Hour.read(args.data) or Hour.planned(args)
    if hour.left_s > 1.0:
        record(hour, args.data)
        if hour.left_s > 1.0:
            raise SystemExit(f"Cut off with {hour.left_s / 60:.1f} minutes to go; the same command goes on.")
    live = live_table(args.data)
    coins = coin_table(hour, args)
    document = {"hour": asdict(hour), "live": live, "coins": coins}
    (args.data / RESULT_FILE).write_text(json.dumps(document))
    return document


# --- record ---------------------------------------------------------------------------------------


def settings_of(hour: Hour, data: Path) -> Settings:
    return Settings.model_validate(
        {
            "data_dir": data,
            "mode": "auto",
            "server": {"port": 0, "drain_s": 5.0},
            "traffic": {"kind": "poisson", "utilisation": hour.utilisation},
        }
    )


def record(hour: Hour, data: Path) -> None:
    """Serves until the hour is full. Ctrl-C leaves what there is, and the next call goes on."""
    settings = settings_of(hour, data)
    assert settings.traffic is not None, "it is set above"
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(Store.open(data))
        stop = threading.Event()
        stack.enter_context(signals_set(stop))
        supervisor = RuntimeSupervisor(settings)
        stack.callback(supervisor.stop)
        stack.callback(supervisor.close)
        supervisor.attach_or_start({}, stop.is_set)
        control = supervisor.client()
        identity, clock = control.identity(), Clock(control.state()["now"], time.monotonic())
        champion = initial_config(settings, identity)
        snapshot_id = record_snapshot(store, identity, clock.now())
        stack.callback(end_run, store, record_run(store, settings, clock.now()), clock)
        stack.enter_context(traffic(settings, settings.traffic, supervisor, champion, stop, print))
        recorder = Recorder(hour, data, store, supervisor, identity, snapshot_id, champion, clock)
        stack.callback(recorder.close)
        recorder.run(stop)


class Recorder:
    """Ticks once a second: collects, drives the experiment under way, opens the next one."""

    def __init__(
        self,
        hour: Hour,
        data: Path,
        store: Store,
        supervisor: RuntimeSupervisor,
        identity: Mapping[str, Any],
        snapshot_id: str,
        champion: EngineConfig,
        clock: Clock,
    ) -> None:
        self.hour, self.data, self.store, self.clock = hour, data, store, clock
        self.snapshot_id, self.champion = snapshot_id, champion
        self.watchman = Watchman(supervisor.client(), HarmRule(), clock.now)
        max_error_ratio = Settings().guardrail.max_error_ratio
        self.experiments = ExperimentStage(
            store, supervisor.client(), self.watchman, max_error_ratio, clock.now
        )
        self.collector = Collector(supervisor.client(), store, [HostProbe(data)])
        self.twins = TwinStage(store, snapshot_id, identity)
        PromoteStage(store, supervisor.client(), snapshot_id).apply(
            "start", champion, "The shipped default, for the benchmark.", clock.now()
        )
        self._span_from = clock.now() + WARM_UP_S

    def run(self, stop: threading.Event) -> None:
        before = list(self.hour.spans)
        self.experiments.interrupt(self.clock.now(), "interrupted: the recording goes on")
        self.watchman.start()
        while not stop.is_set():
            now = self.clock.now()
            self.tick(now)
            self.hour.spans = [*before, (self._span_from, max(now, self._span_from))]
            self.hour.write(self.data)
            if self.hour.left_s <= 0.0 and not self._is_running():
                break
            stop.wait(max(0.05, 1.0 - (self.clock.now() - now)))
        self._collect_last(stop)

    def tick(self, now: float) -> None:
        state = self.collector.collect(now).state
        if state is None or state["engine"] != "ready":
            return
        decided = self.experiments.step(now, state, partial(self.twins.predict, METRIC))
        if decided is not None:
            self._say(now, decided)
        if self._is_running() or not self._has_learned(now):
            return
        one_s = PAIRS_LIVE * (2 * self.hour.slice_s + BETWEEN_PAIRS_S)
        num_done = len(live_experiments(self.store))
        if num_done < self.hour.num_experiments and self.hour.left_s > (one_s / 2 if num_done else 0.0):
            rules = self._rules()
            self.hour.rules = asdict(rules)
            self.experiments.open(
                "aa",
                self.snapshot_id,
                self.champion,
                self.champion,
                rules,
                now,
                None,
                self.twins.fit_id_in_use,
            )

    def close(self) -> None:
        self.watchman.close()
        self.experiments.interrupt(self.clock.now(), "interrupted: the recording ended")

    def _has_learned(self, now: float) -> bool:
        if self.twins.fit is not None:
            return True
        if now < self._span_from + self.hour.learn_s:
            return False
        if self.hour.twin_fit_id is None:
            self._lengthen_slices(now)
        fit = self.twins.prepare(self.champion, self._span_from, now, self.hour.slice_s, METRIC)
        if fit is not None and self.hour.twin_fit_id is None:
            self.hour.twin_fit_id, self.hour.learned_until_at = fit.twin_fit_id, now
        return fit is not None

    def _lengthen_slices(self, now: float) -> None:
        """Where the machine serves too few requests for the slices that were planned: fewer experiments then."""
        with self.store.metrics() as session:
            seen = evidence.request_seconds_between(session, self._span_from, now)
        rate_per_s = seen.num / (now - self._span_from)
        cut = slicing(self.hour.slice_s, self.hour.burn_in_s, self.hour.min_requests, rate_per_s)
        if cut.slice_s > self.hour.slice_s:
            print(
                f"{rate_per_s:.1f} requests/s need slices of {cut.slice_s:.1f} s instead of {self.hour.slice_s:g} s; "
                "fewer experiments will fit.",
                file=sys.stderr,
                flush=True,
            )
            self.hour.slice_s = round(cut.slice_s, 2)

    def _is_running(self) -> bool:
        with self.store.journal() as session:
            return bool(decisions.running_experiments(session))

    def _rules(self) -> ExperimentRules:
        settings = Settings()
        windows = self.twins.windows
        return ExperimentRules(
            metric=METRIC,
            level=LEVEL,
            max_pairs=PAIRS_LIVE,
            look_every=LOOK_EVERY,
            min_effect=settings.objective.min_effect,
            slice_s=self.hour.slice_s,
            burn_in_s=self.hour.burn_in_s,
            settle_s=settings.experiment.settle_s,
            lease_s=settings.experiment.lease_s,
            min_requests=self.hour.min_requests,
            slos=[],
            max_error_ratio=settings.guardrail.max_error_ratio,
            error_min_requests=settings.guardrail.min_requests,
            pair_sd=max(0.05, window_pair_sd(windows.means, self.twins.noise_share)),
            champion_means=windows.means,
            champion_slowest_s=windows.slowest_s,
            adjustment=self.twins.adjustment,
        )

    def _collect_last(self, stop: threading.Event) -> None:
        """The last requests of the hour are still under way."""
        until_at = self.clock.now() + LAST_REQUESTS_S
        while self.clock.now() < until_at and not stop.is_set():
            self.collector.collect(self.clock.now())
            stop.wait(1.0)

    def _say(self, now: float, decided: Decided) -> None:
        verdict = decided.verdict
        told = "no verdict" if verdict is None else f"{verdict.outcome} after {verdict.num_pairs} pairs"
        done = len(live_experiments(self.store))
        print(
            f"{self.hour.recorded_s / 60:5.1f} min  A/A {done} of {self.hour.num_experiments}: {told}",
            file=sys.stderr,
            flush=True,
        )


def live_experiments(store: StoreReader | Store) -> list[Experiment]:
    """Those that count, as the rate of false promotions counts them: judged, or stopped for harm."""
    with store.journal() as session:
        found = [row for row in decisions.all_experiments(session) if row.kind == "aa"]
    return [row for row in found if row.state == "DECIDED" or (row.reason or "").startswith(HARM_PREFIX)]


def live_table(data: Path) -> dict[str, Any]:
    reader = StoreReader(data)
    with reader.journal() as session:
        seen = evidence.false_promotion_rate(session)
        rows = [
            {
                "experiment_id": row.experiment_id,
                "outcome": verdict.outcome,
                "num_pairs": verdict.num_pairs,
                "effect_ratio": verdict.effect_ratio,
                "p_value": verdict.p_value,
                "reason": row.reason,
                "adjustment": row.rules["adjustment"],
                "pair_sd": verdict.evidence["judgement"]["pair_sd"],
                "raw_pair_sd": verdict.evidence["judgement"]["raw_pair_sd"],
            }
            for row in live_experiments(reader)
            if (verdict := decisions.verdict_of(session, row.experiment_id)) is not None
        ]
    print(f"Live: {len(rows)} experiments of the champion against itself at a level of {LEVEL:.0%}")
    for row in rows:
        effect = "-" if row["effect_ratio"] is None else f"{row['effect_ratio']:+.1%}"
        p_value = "-" if row["p_value"] is None else f"{row['p_value']:.3f}"
        print(
            f"  {row['experiment_id']:<24}{row['outcome']:<14}{row['num_pairs']:>3} pairs  {effect:>8}  p {p_value}"
        )
    print(f"  promoted: {told_rate(seen.rate)}")
    return {"promoted": {**seen.rate._asdict(), "ratio": seen.rate.ratio}, "experiments": rows}


# --- coins ----------------------------------------------------------------------------------------


def coin_table(hour: Hour, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row an adjustment and gain; rows of an earlier call for the same question are taken over."""
    reader = StoreReader(args.data)
    earlier = kept_rows(args)
    print(
        f"Coins: {args.sequences} sequences of at most {args.max_pairs} pairs of {hour.slice_s:g} s over "
        f"{hour.recorded_s / 60:.1f} recorded minutes, level {LEVEL:.0%}"
    )
    print(
        f"  {'adjustment':<12}{'shift':>6}{'promoted (95 % interval)':>38}{'planned':>9}{'pairs':>7}"
        f"{'rejected':>10}{'undecided':>11}{'pair sd':>9}"
    )
    rows = []
    for adjustment, cut in cuts(hour, reader):
        max_pairs = min(args.max_pairs, len(cut) - len(cut) % LOOK_EVERY)
        if max_pairs < LOOK_EVERY:
            print(f"  {adjustment:<12}too few pairs were cut ({len(cut)})")
            continue
        for gain in GAINS:
            question = {
                "adjustment": adjustment,
                "gain": gain,
                "sequences": args.sequences,
                "seed": args.seed,
            }
            question |= {"max_pairs": max_pairs, "num_cut": len(cut), "recorded_s": hour.recorded_s}
            row = next((row for row in earlier if row["question"] == question), None)
            if row is None:
                rules = ExperimentRules(**{**hour.rules, "level": LEVEL, "max_pairs": max_pairs})
                found = run_coins(
                    cut, rules, gain, args.sequences, args.seed, adjustment, progress(args.sequences)
                )
                row = {"question": question, **found.to_dict()}
            rows.append(row)
            print(coin_line(row), flush=True)
    return rows


def coin_line(row: Mapping[str, Any]) -> str:
    rate = row["promoted"]
    share = told_rate(Rate(rate["num"], rate["total"], rate["low"], rate["high"]))
    pairs = "-" if row["num_pairs"] is None else f"{row['num_pairs']:.0f}"
    return (
        f"  {row['adjustment']:<12}{row['gain']:>6.0%}{share:>38}{row['planned_power']:>9.0%}{pairs:>7}"
        f"{row['num_rejected']:>10}{row['num_inconclusive']:>11}{row['pair_sd']:>9.3f}"
    )


def told_rate(rate: Rate) -> str:
    return f"{rate.num} of {rate.total}: {rate.ratio:.1%} ({rate.low:.1%} to {rate.high:.1%})"


def kept_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    path = args.data / RESULT_FILE
    return json.loads(path.read_text())["coins"] if path.exists() else []


def progress(total: int) -> Callable[[int], None]:
    def tell(done: int) -> None:
        if done % 500 == 0 or done == total:
            print(f"\r  {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return tell


def cuts(hour: Hour, reader: StoreReader) -> Iterator[tuple[str, Sequence[CutPair]]]:
    """The recorded traffic after what the adjustments were fitted on, cut raw, with the twin, and with covariates."""
    if not hour.rules:
        print("  no experiment was opened: too little was recorded", file=sys.stderr)
        return
    rules = ExperimentRules(**hour.rules)
    learned_at = hour.learned_until_at or 0.0
    spans = [(max(start_at, learned_at), end_at) for start_at, end_at in hour.spans if end_at > learned_at]
    with reader.metrics() as session:
        rows = queries.timings_between(session, hour.spans[0][0], hour.spans[-1][1])
    timings = [timing_of(row) for row in rows]
    for adjustment, predict in predictors(hour, reader):
        yield adjustment, cut_pairs(timings, spans, rules, predict)


def predictors(hour: Hour, reader: StoreReader) -> Iterator[tuple[str, Predict | None]]:
    """Twin and covariates as they were journalled, whether or not their rule let them be used live."""
    with reader.journal() as session:
        fit = session.get(TwinFit, hour.twin_fit_id) if hour.twin_fit_id is not None else None
    yield "none", None
    if fit is None:
        return
    kept = {key: value for key, value in fit.parameters.items() if key not in ("error", "covariates")}
    twin = TwinParameters.from_dict(kept)

    def by_twin(start_at: float, end_at: float) -> Mapping[str, float]:
        with reader.metrics() as session:
            rows = queries.timings_in_system(session, start_at, end_at + AFTER_PAIR_S)
        found = predict_pair(twin, served_by_champion(rows), start_at, end_at)
        return {id: seen.log_e2e for id, seen in found.items()}

    yield f"twin{'' if fit.is_used else ' (off)'}", by_twin
    model, is_used = covariates_of(hour, reader, fit.parameters)
    if model is None:
        return

    def by_covariates(start_at: float, end_at: float) -> Mapping[str, float]:
        with reader.metrics() as session:
            rows = queries.timings_in_system(session, start_at - covariates.REACH_S, end_at)
        return covariates.predict_pair(model, served_by_champion(rows), start_at, end_at)

    yield f"covariates{'' if is_used else ' (off)'}", by_covariates


def covariates_of(
    hour: Hour, reader: StoreReader, parameters: Mapping[str, Any]
) -> tuple[covariates.CovariateModel | None, bool]:
    """As journalled; where the twin was in use none were fitted, and they are now, on the same stretch."""
    kept = parameters.get("covariates")
    if kept is not None and kept["model"] is not None:
        return covariates.model_from(kept), bool(kept["is_used"])
    start_at, end_at = hour.spans[0][0], hour.learned_until_at or hour.spans[0][1]
    with reader.metrics() as session:
        served = served_by_champion(queries.timings_between(session, start_at, end_at))
    window_s = covariates.window_of(start_at, end_at, hour.slice_s)
    return covariates.fit_covariates(METRIC, served, window_s).model, False
