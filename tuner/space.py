"""Which knobs may move, how far, and how a proposal is held inside the trust region. Pure.

The space is made from what the engine reports, narrowed by the settings (allow, deny, bounds) and then
by the trust region around the champion: at most MAX_CHANGED_KNOBS knobs differ, each by at most
`trust_steps` steps. One step is a factor of two on a logarithmic knob and an eighth of the range on a
linear one; a choice is one step from any other choice. A choice that needs another knob's value is proposed only
together with it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from runtime.knobs import EngineConfig, KnobValue, knob_named, unmet_needs

MAX_CHANGED_KNOBS = 2
LINEAR_STEPS = 8
MAX_TRUST_STEPS = 4


@dataclass(frozen=True)
class Dimension:
    """One knob that may move, with the bounds in force: inclusive, in the knob's unit; a choice knob has none.

    `off_at`: where a knob that can be off has no effect on this engine any more; all values from there on are one.
    """

    name: str
    kind: str  # int, float, choice
    low: float = 0.0
    high: float = 0.0
    choices: tuple[str, ...] | None = None
    log: bool = False
    off_at: float | None = None

    def known(self, value: Any) -> Any:
        """The value, or for one that is off the lowest that is."""
        return value if self.off_at is None else min(value, type(value)(self.off_at))

    def proposed(self, value: Any) -> Any:
        """The value, or for one that is off the one that says so on every engine."""
        return value if self.off_at is None or value < self.off_at else knob_named(self.name).high


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
            report["high"]
            if report.get("is_off_at_high")
            else None,  # an earlier version does not tell of it
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


def meeting_needs(space: SearchSpace, champion: EngineConfig) -> SearchSpace:
    """Without the choices that need what neither the champion has nor the space can give them, and without knobs that
    mean nothing beside it."""
    values = champion.values()
    given = {(one.name, choice) for one in space.dimensions for choice in one.choices or ()}

    def is_idle(name: str, choice: str) -> bool:
        needs = [need for need in knob_named(name).needs if need.choice == choice != values[name]]
        return any(values[need.knob] != need.value and (need.knob, need.value) not in given for need in needs)

    dimensions = []
    for one in space.dimensions:
        other = knob_named(one.name).only_with
        if other is not None and not values[other] and other not in space.names:
            continue
        if one.choices is not None:
            one = replace(one, choices=tuple(c for c in one.choices if not is_idle(one.name, c)))
        if one.choices is None or len(one.choices) > 1:
            dimensions.append(one)
    return SearchSpace(tuple(dimensions))


def trust_region(space: SearchSpace, champion: EngineConfig, trust_steps: int) -> SearchSpace:
    """The space within `trust_steps` of the champion's value on every knob. Choices stay whole."""
    values = champion.values()
    return SearchSpace(
        tuple(around(dimension, values[dimension.name], trust_steps) for dimension in space.dimensions)
    )


def around(dimension: Dimension, value: KnobValue, trust_steps: int) -> Dimension:
    if dimension.choices is not None:
        return dimension
    center = float(dimension.known(value))
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
    known = {name: by_name[name].known(values[name]) for name in asked}
    moves = {
        name: distance(by_name[name], known[name], value)
        for name, value in asked.items()
        if value != known[name]
    }
    kept = sorted(moves, key=lambda name: -moves[name])[:MAX_CHANGED_KNOBS]
    return _moved(champion, {name: by_name[name].proposed(asked[name]) for name in kept})


def _moved(champion: EngineConfig, patch: Mapping[str, KnobValue]) -> EngineConfig:
    """The champion with these moves, but without those that leave a choice without what it needs."""
    for name, need in unmet_needs(champion.patched(patch)).items():
        patch = {moved: value for moved, value in patch.items() if moved not in (name, need.knob)}
    return champion.patched(patch)


def distance(dimension: Dimension, before: KnobValue, after: KnobValue) -> float:
    """How far a move goes, as a share of the knob's range (of its logarithm where it is logarithmic)."""
    if dimension.choices is not None:
        return 0.5
    span = dimension.high - dimension.low
    if dimension.log:
        return abs(math.log(float(after) / float(before))) / math.log(dimension.high / dimension.low)
    return abs(float(after) - float(before)) / span


def is_allowed(config: EngineConfig, champion: EngineConfig, space: SearchSpace) -> str | None:
    """None where every changed knob is in the space, inside its bounds, and has what it needs; else the rule that
    forbids it."""
    by_name = {dimension.name: dimension for dimension in space.dimensions}
    changes = config.changes_from(champion)
    for name, (_, value) in changes.items():
        dimension = by_name.get(name)
        if dimension is None:
            return f"`{name}` may not move here: the engine or the settings exclude it."
        if dimension.choices is not None and value not in dimension.choices:
            return f"`{name}` must be one of {', '.join(dimension.choices)}, but got {value}."
        if dimension.choices is None and not dimension.low <= float(dimension.known(value)) <= dimension.high:
            bounds = f"[{dimension.low:g}, {dimension.high:g}] {knob_named(name).unit}"
            return f"`{name}` must be in {bounds}, but got {value}."
    for name, need in unmet_needs(config).items():
        if name in changes or need.knob in changes:
            got = config.values()[need.knob]
            return f"`{name}` {need.choice} needs `{need.knob}` to be {need.value}, but got {got}."
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
            inside = dimension.proposed(min(max(float(value), dimension.low), dimension.high))
            patch[name] = int(inside) if dimension.kind == "int" else inside
        else:
            patch[name] = value
    return _moved(champion, patch)


def trust_after(outcome: str, trust_steps: int) -> int:
    """The region grows after a promotion and halves after a reject; an inconclusive test leaves it."""
    if outcome == "PROMOTE":
        return min(MAX_TRUST_STEPS, trust_steps * 2)
    if outcome == "REJECT":
        return max(1, trust_steps // 2)
    return trust_steps
