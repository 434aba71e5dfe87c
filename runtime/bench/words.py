"""What the command lines of benchmarks say, as values."""

from collections.abc import Sequence

from runtime.knobs import KnobValue


def patches_of(words: Sequence[str]) -> list[dict[str, KnobValue]]:
    """ "a=1,b=on" -> {"a": 1, "b": "on"}, for each word. Raises ValueError for a part without "="."""
    return [dict(_assigned(part) for part in word.split(",") if part) for word in words]


def _assigned(text: str) -> tuple[str, KnobValue]:
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise ValueError(f"a value must be given as NAME=VALUE, but got {text!r}")
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value
