"""Asks Optuna for the next configuration to probe. Reads trials, writes nothing; the only file that imports Optuna.

A study is rebuilt in memory from the store's rows at every ask, in a spawned child: a Gaussian process
ask takes seconds on two busy cores, and Optuna's GPSampler calls `torch.set_num_threads(1)` in its own
process. The child reads one JSON request on standard input and answers with one JSON line.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tuner.errors import ProposalFailed
from tuner.space import Dimension, SearchSpace

ASK_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class PastTrial:
    """What a sampler may learn from: knob values, log ratio to the champion, named constraints (<= 0 is feasible)."""

    params: dict[str, Any]
    value: float
    constraints: dict[str, float]


@dataclass(frozen=True)
class AskRequest:
    region: SearchSpace  # where the answer must lie
    past: Sequence[PastTrial]
    sampler: str  # gp, tpe, random
    seed: int

    def to_json(self) -> str:
        return json.dumps(
            {
                "region": self.region.to_dict(),
                "past": [asdict(p) for p in self.past],
                "sampler": self.sampler,
                "seed": self.seed,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> "AskRequest":
        data = json.loads(text)
        return cls(
            SearchSpace.from_dict(data["region"]),
            [PastTrial(**past) for past in data["past"]],
            data["sampler"],
            data["seed"],
        )


class AskProcess:
    """One ask under way in a child. `poll` never blocks; a child that overruns its time is killed."""

    def __init__(self, request: AskRequest, now: float) -> None:
        self.started_at = now
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        self._child = subprocess.Popen(
            [sys.executable, "-m", "tuner.propose"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self._child.stdin is not None
        self._child.stdin.write(request.to_json())
        self._child.stdin.close()

    def poll(self, now: float) -> dict[str, Any] | None:
        """The asked knob values, or None while the child works.

        Raises:
            ProposalFailed: the child died, overran its time or answered nonsense.
        """
        if self._child.poll() is None:
            if now - self.started_at > ASK_TIMEOUT_S:
                self.stop()
                raise ProposalFailed(f"The search did not answer within {ASK_TIMEOUT_S:g} s and was stopped.")
            return None
        assert self._child.stdout is not None and self._child.stderr is not None
        with self._child.stdout, self._child.stderr:
            answer, complaint = self._child.stdout.read(), self._child.stderr.read().strip()
        if self._child.returncode != 0:
            last = complaint.splitlines()[-1] if complaint else "no message"
            raise ProposalFailed(f"The search process ended with code {self._child.returncode}: {last}")
        return dict(json.loads(answer))

    def stop(self) -> None:
        if self._child.poll() is None:
            self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdout, self._child.stderr):
            if pipe is not None:
                pipe.close()


def ask(request: AskRequest) -> dict[str, Any]:
    """Knob values inside the region. Imports Optuna: call it in a child only."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="minimize", sampler=make_sampler(request))
    region = distributions(request.region)
    for past in request.past:
        study.add_trial(
            optuna.trial.create_trial(
                params={name: past.params[name] for name in region},
                distributions=region,
                value=past.value,
                constraints=past.constraints,
            )
        )
    return dict(study.ask(region).params)


def make_sampler(request: AskRequest) -> Any:
    import optuna

    # Champion, default and presets stand in for the random start-up trials that Optuna would draw
    # over the whole space, which on live traffic is not safe.
    num_startup = min(3, len(request.past))
    if request.sampler == "gp":
        return optuna.samplers.GPSampler(
            seed=request.seed, n_startup_trials=num_startup, deterministic_objective=False
        )
    if request.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=request.seed, n_startup_trials=num_startup)
    return optuna.samplers.RandomSampler(seed=request.seed)


def distributions(space: SearchSpace) -> dict[str, Any]:
    return {dimension.name: distribution(dimension) for dimension in space.dimensions}


def distribution(dimension: Dimension) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if dimension.choices is not None:
        return CategoricalDistribution(dimension.choices)
    if dimension.kind == "int":
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def past_trials(region: SearchSpace, rows: Sequence[Mapping[str, Any]]) -> list[PastTrial]:
    """The rows (values, value, constraints) that lie inside the region, each with the same constraint names.

    Optuna's relative samplers use a parameter only where every trial has the same distribution, so a
    trial outside the trust region cannot be told as it was, and moving it to the border would be a lie.
    A Gaussian process study refuses trials whose constraints differ in number: a missing one is feasible (0).
    """
    inside = [
        row
        for row in rows
        if all(contains(dimension, row["values"][dimension.name]) for dimension in region.dimensions)
    ]
    names = sorted({name for row in inside for name in row["constraints"]})
    return [
        PastTrial(
            {one.name: one.known(row["values"][one.name]) for one in region.dimensions},
            float(row["value"]),
            {name: float(row["constraints"].get(name, 0.0)) for name in names},
        )
        for row in inside
    ]


def contains(dimension: Dimension, value: Any) -> bool:
    if dimension.choices is not None:
        return value in dimension.choices
    return bool(dimension.low <= dimension.known(value) <= dimension.high)


def main() -> None:
    os.nice(10)
    answer = ask(AskRequest.from_json(sys.stdin.read()))
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
