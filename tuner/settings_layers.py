"""How file, environment and flags become one validated value, and what is said when they do not.

A layer is a nested mapping and the place it came from. Later layers win key by key; lists are replaced
whole. An error names the place of the layer that won, so that the reader knows which line to edit.
"""

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from tuner.errors import SettingsError
from tuner.settings_file import describe, read_settings_file

PREFIX = "TUNER_"
SEPARATOR = "__"

M = TypeVar("M", bound=BaseModel)


class Layer(NamedTuple):
    place: str
    values: Mapping[str, Any]


class Layered(NamedTuple, Generic[M]):
    """The value, and for each dotted key that is not at its default the place it came from."""

    value: M
    origins: dict[str, str]


def layered(model: type[M], layers: Sequence[Layer]) -> Layered[M]:
    """Validates the layers as one, the later over the earlier.

    Raises:
        SettingsError: one line a problem.
    """
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for layer in layers:
        _merge(merged, layer.values, layer.place, origins, "")
    try:
        return Layered(model.model_validate(merged), origins)
    except ValidationError as error:
        problems = [_explain(model, dict(details), origins) for details in error.errors(include_url=False)]
        raise SettingsError(*dict.fromkeys(problems)) from error


def file_layer(path: Path) -> Layer:
    return Layer(str(path), read_settings_file(path))


def flag_layer(flags: Mapping[str, Any]) -> Layer:
    """`flags` by dotted key: {"experiment.slice_s": 10}."""
    return Layer("command line", _nested({tuple(key.split(".")): value for key, value in flags.items()}))


def environment_layers(model: type[BaseModel], environ: Mapping[str, str] | None = None) -> list[Layer]:
    """One layer for each TUNER_SECTION__KEY; an empty variable counts as not given.

    Names without `__` that are no key are left alone unless they look like a slip of one: Kubernetes
    gives every container TUNER_PORT and TUNER_SERVICE_HOST when a service is called `tuner`.

    Raises:
        SettingsError: a slip, or a list or mapping that is not JSON.
    """
    layers = []
    for name, text in sorted((os.environ if environ is None else environ).items()):
        if not name.startswith(PREFIX) or not text:
            continue
        path = tuple(name.removeprefix(PREFIX).lower().split(SEPARATOR))
        if len(path) == 1 and path[0] not in model.model_fields:
            if near := difflib.get_close_matches(path[0], model.model_fields, n=1, cutoff=0.75):
                raise SettingsError(f"{name}: is unknown. Did you mean {PREFIX}{near[0].upper()}?")
            continue
        layers.append(Layer(name, _nested({path: _from_text(name, text)})))
    return layers


def _from_text(name: str, text: str) -> Any:
    """Lists and mappings are written as JSON; a scalar stays text, which the model converts."""
    if text.strip().lower() in ("null", "none"):
        return None
    if text.strip()[:1] not in ("[", "{"):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(
            f"{name}: must be a list or mapping written as JSON, but got {describe(text)}."
        ) from error


def _nested(by_path: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for path, value in by_path.items():
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return root


def _merge(
    into: dict[str, Any], values: Mapping[str, Any], place: str, origins: dict[str, str], path: str
) -> None:
    for key, value in values.items():
        dotted = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping):
            if not isinstance(into.get(key), dict):
                into[key] = {}
                origins.pop(dotted, None)
            _merge(into[key], value, place, origins, dotted)
            continue
        for below in [known for known in origins if known.startswith(f"{dotted}.")]:
            del origins[below]
        into[key] = value
        origins[dotted] = place


# --- errors ---------------------------------------------------------------------------------------

_RULES = {
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "finite_number": "must be a finite number",
    "int_from_float": "must be a whole number",
    "string_type": "must be text (put it in quotes)",
    "path_type": "must be a path",
    "string_too_short": "must not be empty",
    "missing": "must be given",
}
_RULES |= dict.fromkeys(("int_type", "int_parsing", "int_parsing_size"), "must be a whole number")
_RULES |= dict.fromkeys(("float_type", "float_parsing"), "must be a number")
_RULES |= dict.fromkeys(("bool_type", "bool_parsing"), "must be true or false")
_RULES |= dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "must be a mapping")
_RULES |= dict.fromkeys(("tuple_type", "list_type"), "must be a list")


def _explain(model: type[BaseModel], details: dict[str, Any], origins: Mapping[str, str]) -> str:
    location = tuple(str(part) for part in details["loc"])
    dotted = ".".join(location)
    kind, context = details["type"], details.get("ctx", {})
    if kind == "value_error":
        told = str(context["error"])
        dotted, told = _placed(model, dotted, told)
        return f"{_place(dotted, origins)}: {told}"
    if kind in ("extra_forbidden", "invalid_key"):
        known = list(_fields_at(model, location[:-1]))
        told = f"`{dotted}` is unknown.{_hint(location[-1], known)} Known here: {', '.join(known)}."
        return f"{_place(dotted, origins)}: {told}"
    got = "nothing" if kind == "missing" else describe(details["input"])
    if kind == "literal_error":
        choices = [choice.strip(" '") for choice in context["expected"].replace(" or ", ",").split(",")]
        told = f"`{dotted}` must be one of {', '.join(choices)}, but got {got}.{_hint(str(details['input']), choices)}"
        return f"{_place(dotted, origins)}: {told}"
    bounds = {name: f"{value:g}" for name, value in context.items() if isinstance(value, int | float)}
    rule = _RULES[kind].format(**bounds) if kind in _RULES else details["msg"]
    fix = _keys(model, location) if kind in ("model_type", "missing") else _default(model, location)
    return f"{_place(dotted, origins)}: `{dotted}` {rule}, but got {got}.{fix}"


def _placed(model: type[BaseModel], dotted: str, told: str) -> tuple[str, str]:
    """A check of ours may name its own key (`experiment.burn_in_s` must ...); else the key goes before it."""
    own = told.split("`")[1] if told.startswith("`") else ""
    if own.split(".")[0] in model.model_fields:
        return own, told
    if told.startswith("must"):
        return dotted, f"`{dotted}` {told}."
    return dotted, f"`{dotted}`: {told}"


def _place(dotted: str, origins: Mapping[str, str]) -> str:
    """Where the key came from: its own layer, else that of the nearest key around or beside it."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        around = ".".join(parts[:length])
        if around in origins:
            return origins[around]
        inside = [place for key, place in origins.items() if key.startswith(f"{around}.")]
        if inside:
            return inside[0]
    return "settings"


def _hint(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean `{near[0]}`?" if near else ""


def _default(model: type[BaseModel], location: Sequence[str]) -> str:
    field = _fields_at(model, location[:-1]).get(location[-1])
    if field is None or field.is_required() or not isinstance(field.default, int | float | str):
        return ""
    return f" The default is {field.default}."


def _keys(model: type[BaseModel], location: Sequence[str]) -> str:
    keys = _fields_at(model, location)
    return f" Its keys are: {', '.join(keys)}." if keys else ""


def _fields_at(model: type[BaseModel], location: Sequence[str]) -> Mapping[str, Any]:
    """The fields of the section at a place; through `Section | None` and tuples of sections too."""
    for part in location:
        if part.isdigit():
            continue
        section = _section_in(model.model_fields[part].annotation) if part in model.model_fields else None
        if section is None:
            return {}
        model = section
    return model.model_fields


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _section_in(inner)) is not None), None)
