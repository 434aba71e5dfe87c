"""A YAML file of settings as a plain mapping, or an error that says what to change.

Stricter than YAML where YAML surprises: a key given twice is an error (YAML keeps the last), and so are
aliases (a file of settings needs none, and nested ones grow without bound).
"""

from pathlib import Path
from typing import Any

import yaml

from tuner.errors import SettingsError


class _Refused(yaml.MarkedYAMLError):
    """A file that YAML would accept and we do not."""


class _StrictLoader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise _Refused(problem="aliases (`*name`) are not read. Write the value out", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first_lines: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in first_lines:
                told = f"`{key}` is given twice, first in line {first_lines[key]}. Remove one of the two"
                raise _Refused(problem=told, problem_mark=key_node.start_mark)
            first_lines[key] = line
        return super().construct_mapping(node, deep)


def read_settings_file(path: Path) -> dict[str, Any]:
    """Returns the mapping in the file; an empty file is an empty mapping.

    Raises:
        SettingsError: no such file, not UTF-8, not YAML, a key given twice, or not a mapping.
    """
    text = _read_text(path)
    try:
        content = yaml.load(text, Loader=_StrictLoader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}{_explain(error, text)}") from error
    except ValueError as error:  # e.g. 2024-02-31, which YAML takes for a date
        raise SettingsError(f"{path}: a value cannot be read ({error}). Put it in quotes.") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(
            f"{path}: must hold a mapping such as `mode: approve`, one key a line, but got {describe(content)}."
        )
    return content


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        known = (
            ", ".join(sorted(near.name for near in path.parent.glob("*.y*ml")))
            if path.parent.is_dir()
            else ""
        )
        told = f" The settings files in {path.parent} are: {known}." if known else ""
        raise SettingsError(f"{path}: no such file.{told}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(
            f"{path}: must be UTF-8 text, but byte {error.start} is {error.object[error.start]:#04x}. Save it as UTF-8."
        ) from error
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror}).") from error


def _explain(error: yaml.YAMLError, text: str) -> str:
    """`, line 3: ...` for an error with a place, `: ...` for one without."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f": is not YAML text ({' '.join(str(error).split())})."
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    if isinstance(error, _Refused):
        return f", line {mark.line + 1}: {error.problem}."
    if "\t" in line[: mark.column + 1]:
        return (
            f", line {mark.line + 1}: must be indented with spaces, but got a tab. Replace the tab by spaces."
        )
    told = f"is not YAML ({getattr(error, 'problem', error)}), near `{line.strip()[:60]}`"
    return f", line {mark.line + 1}: {told}. Check indentation, colons and quotes."


def describe(value: Any) -> str:
    """A value as it is named in an error: short, and `nothing` for an absent one."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return f"a mapping of {len(value)}" if value else "an empty mapping"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
