"""Where the knobs start and how far the search may move them, checked against `runtime.knobs`."""

from contextlib import suppress
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from runtime.errors import InvalidKnob
from runtime.knobs import EngineConfig, Knob, KnobValue, knob_named
from tuner.settings_section import Section


class KnobSettings(Section):
    """Where the knobs start and which of them the search may move."""

    start: dict[str, KnobValue] = Field(default_factory=dict)
    """Values at the first start; a knob that is not named starts at its shipped default."""
    allow: tuple[str, ...] | None = None
    """The only knobs the search may move; all that are searched by default if not given."""
    deny: tuple[str, ...] = ()
    """Knobs that the search must leave alone."""
    bounds: dict[str, tuple[KnobValue, ...]] = Field(default_factory=dict)
    """Narrower ranges: `[low, high]` of a number, the permitted ones of a choice."""

    @field_validator("start")
    @classmethod
    def _check_start(cls, start: dict[str, KnobValue]) -> dict[str, KnobValue]:
        return {name: _checked_knob(name, value) for name, value in start.items()}

    @field_validator("allow", "deny")
    @classmethod
    def _check_names(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in names or ():
            _known_knob(name)
        return names

    @field_validator("bounds")
    @classmethod
    def _check_bounds(cls, bounds: dict[str, tuple[KnobValue, ...]]) -> dict[str, tuple[KnobValue, ...]]:
        return {name: _checked_bounds(name, values) for name, values in bounds.items()}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if both := sorted(set(self.allow or ()) & set(self.deny)):
            raise ValueError(
                f"`knobs.deny` must not name what `knobs.allow` names, but both name {', '.join(both)}."
            )
        for name, value in self.start.items():
            if name in self.bounds and not _is_inside(name, value, self.bounds[name]):
                raise ValueError(
                    f"`knobs.start.{name}` must lie inside `knobs.bounds.{name}` {list(self.bounds[name])}, "
                    f"but got {value!r}. Widen the bounds or start inside them."
                )
        return self


def _known_knob(name: str) -> Knob:
    try:
        return knob_named(name)
    except InvalidKnob as error:
        raise ValueError(str(error)) from error


def _checked_knob(name: str, value: Any) -> KnobValue:
    if isinstance(value, str) and _known_knob(name).choices is None:
        # The environment knows only text, and YAML 1.1 takes 1e3 for text.
        with suppress(ValueError):
            value = float(value)
    try:
        return EngineConfig.of({name: value}).values()[name]
    except InvalidKnob as error:
        raise ValueError(str(error)) from error


def _checked_bounds(name: str, values: tuple[KnobValue, ...]) -> tuple[KnobValue, ...]:
    checked = tuple(_checked_knob(name, value) for value in values)
    if _known_knob(name).choices is not None:
        if not checked:
            raise ValueError(f"`knobs.bounds.{name}` must name at least one choice, but got none.")
        return checked
    if len(checked) != 2:
        raise ValueError(f"`knobs.bounds.{name}` must be [low, high], but got {list(values)}.")
    if checked[0] > checked[1]:  # type: ignore[operator]  # both are numbers here
        raise ValueError(f"`knobs.bounds.{name}` must be [low, high], but got {list(values)}. Swap the two.")
    return checked


def _is_inside(name: str, value: Any, bounds: tuple[Any, ...]) -> bool:
    return value in bounds if knob_named(name).choices is not None else bounds[0] <= value <= bounds[1]
