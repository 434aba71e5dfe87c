"""Which knobs may move, how far, and how a proposal is held inside the trust region. Pure.

The space is made from what the engine reports, narrowed by the settings (allow, deny, bounds) and then
by the trust region around the champion: at most MAX_CHANGED_KNOBS knobs differ, each by at most
`trust_steps` steps. One step is a factor of two on a logarithmic knob and an eighth of the range on a
linear one; a choice is one step from any other choice.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from runtime.knobs import EngineConfig, KnobValue, knob_named

MAX_CHANGED_KNOBS = 2
LINEAR_STEPS = 8
MAX_TRUST_STEPS = 4


@dataclass(frozen=True)
class Dimension:
    """One knob that may move, with the bounds in force: inclusive, in the knob's unit; a choice knob has none."""

    name: str
    kind: str  # int, float, choice
    low: float = 0.0
    high: float = 0.0
    choices: tuple[str, ...] | None = None
    log: bool = False


@dataclass(frozen=True)
class SearchSpace:
    dimensions: tuple[Dimension, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"dimensions": [asdict(dimension) for dimension in self.dimensions]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "SearchSpace":
        return cls(
            tuple(
                Dimension(**{**d, "choices": tuple(d["choices"]) if d["choices"] is not None else None})
                for d in data["dimensions"]
            )
        )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(dimension.name for dimension in self.dimensions)


def search_space(
    reports: Sequence[Mapping[str, Any]],
    allow: Sequence[str] | None,
    deny: Sequence[str],
    bounds: Mapping[str, Sequence[Any]],
    has_quality: bool = False,
) -> SearchSpace:
    """The knobs that the engine reports as searchable, inside the settings' bounds.

    `allow` names the only knobs that may move (and admits those that are not searched by default). Knobs that
    change the model's outputs are among them only where every challenger's quality is checked (`has_quality`).
    """
    dimensions = []
    for report in reports:
        name = report["name"]
        wanted = name in allow if allow is not None else report["searched"]
        is_unwatched = report["changes_outputs"] and not has_quality
        if not wanted or name in deny or report["apply"] == "cold" or is_unwatched:
            continue
        dimension = Dimension(
            name,
            report["kind"],
            0.0 if report["low"] is None else report["low"],
            0.0 if report["high"] is None else report["high"],
            tuple(report["choices"]) if report["choices"] else None,
            report["log"],
        )
        if dimension.choices is not None:  # a runtime of an earlier version does not tell of promises
            left = (choice for choice in dimension.choices if choice not in report.get("promises", ()))
            dimension = replace(dimension, choices=tuple(left))
        if name in bounds:
            dimension = narrowed(dimension, bounds[name])
        if dimension.choices is not None and len(dimension.choices) < 2:
            continue
        if dimension.choices is None and dimension.low >= dimension.high:
            continue
        dimensions.append(dimension)
    return SearchSpace(tuple(dimensions))


def narrowed(dimension: Dimension, bound: Sequence[Any]) -> Dimension:
    if dimension.choices is not None:
        return replace(dimension, choices=tuple(choice for choice in dimension.choices if choice in bound))
    return replace(dimension, low=max(dimension.low, bound[0]), high=min(dimension.high, bound[1]))


def keeping_promises(space: SearchSpace, champion: EngineConfig) -> SearchSpace:
    """Without the choice knobs whose value is none that may be searched: they stay where somebody put them."""
    values = champion.values()
    movable = (one for one in space.dimensions if one.choices is None or values[one.name] in one.choices)
    return SearchSpace(tuple(movable))


def trust_region(space: SearchSpace, champion: EngineConfig, trust_steps: int) -> SearchSpace:
    """The space within `trust_steps` of the champion's value on every knob. Choices stay whole."""
    values = champion.values()
    return SearchSpace(
        tuple(around(dimension, values[dimension.name], trust_steps) for dimension in space.dimensions)
    )


def around(dimension: Dimension, value: KnobValue, trust_steps: int) -> Dimension:
    if dimension.choices is not None:
        return dimension
    center = float(value)
    if dimension.log:
        low, high = center / 2**trust_steps, center * 2**trust_steps
    else:
        step = (dimension.high - dimension.low) / LINEAR_STEPS
        low, high = center - trust_steps * step, center + trust_steps * step
    if dimension.kind == "int":
        low, high = math.ceil(low), math.floor(high)
    low, high = max(dimension.low, low), min(dimension.high, high)
    return replace(dimension, low=min(low, high), high=max(low, high))


def projected(asked: Mapping[str, KnobValue], champion: EngineConfig, space: SearchSpace) -> EngineConfig:
    """The champion with the MAX_CHANGED_KNOBS largest of the asked moves; the others are taken back."""
    by_name = {dimension.name: dimension for dimension in space.dimensions}
    values = champion.values()
    moves = {
        name: distance(by_name[name], values[name], value)
        for name, value in asked.items()
        if value != values[name]
    }
    kept = sorted(moves, key=lambda name: -moves[name])[:MAX_CHANGED_KNOBS]
    return champion.patched({name: asked[name] for name in kept})


def distance(dimension: Dimension, before: KnobValue, after: KnobValue) -> float:
    """How far a move goes, as a share of the knob's range (of its logarithm where it is logarithmic)."""
    if dimension.choices is not None:
        return 0.5
    span = dimension.high - dimension.low
    if dimension.log:
        return abs(math.log(float(after) / float(before))) / math.log(dimension.high / dimension.low)
    return abs(float(after) - float(before)) / span


def is_allowed(config: EngineConfig, champion: EngineConfig, space: SearchSpace) -> str | None:
    """None where every changed knob is in the space and inside its bounds, else the rule that forbids it."""
    by_name = {dimension.name: dimension for dimension in space.dimensions}
    for name, (_, value) in config.changes_from(champion).items():
        dimension = by_name.get(name)
        if dimension is None:
            return f"`{name}` may not move here: the engine or the settings exclude it."
        if dimension.choices is not None and value not in dimension.choices:
            return f"`{name}` must be one of {', '.join(dimension.choices)}, but got {value}."
        if dimension.choices is None and not dimension.low <= float(value) <= dimension.high:
            bounds = f"[{dimension.low:g}, {dimension.high:g}] {knob_named(name).unit}"
            return f"`{name}` must be in {bounds}, but got {value}."
    return None


def clipped(config: EngineConfig, champion: EngineConfig, space: SearchSpace) -> EngineConfig:
    """A preset as far as this space admits it: excluded knobs keep the champion's value, others move into bounds."""
    by_name = {dimension.name: dimension for dimension in space.dimensions}
    patch: dict[str, KnobValue] = {}
    for name, (_, value) in config.changes_from(champion).items():
        dimension = by_name.get(name)
        if dimension is None or (dimension.choices is not None and value not in dimension.choices):
            continue
        if dimension.choices is None:
            inside = min(max(float(value), dimension.low), dimension.high)
            patch[name] = int(inside) if dimension.kind == "int" else inside
        else:
            patch[name] = value
    return champion.patched(patch)


def trust_after(outcome: str, trust_steps: int) -> int:
    """The region grows after a promotion and halves after a reject; an inconclusive test leaves it."""
    if outcome == "PROMOTE":
        return min(MAX_TRUST_STEPS, trust_steps * 2)
    if outcome == "REJECT":
        return max(1, trust_steps // 2)
    return trust_steps
