"""The generated parts of README.md, each between its two markers: `python -m tuner.docs` writes them anew.

    <!-- knobs -->
    ...
    <!-- end of knobs -->

Tables derive from where a thing is declared: knobs, metrics, exit codes, and the first line of every file.
"""

import ast
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from runtime.knobs import KNOBS, Knob, default_config
from store.metrics import METRICS
from tuner import errors
from tuner.notice.rules import RULES

ROOT = Path(__file__).parents[1]
PACKAGES = ("runtime", "store", "tuner", "dashboard")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def knob_table() -> str:
    on_gpu = default_config("cuda", 1).values()
    rows = [
        [
            f"`{knob.name}`",
            f"{told_range(knob)} {knob.unit}".strip(),
            str(knob.default),
            str(on_gpu[knob.name]),
            knob.apply.value,
            f"with `{knob.only_with}`" if knob.searched and knob.only_with else "yes" if knob.searched else "no",
            knob.help,
        ]
        for knob in KNOBS
    ]
    header = ["knob", "range", "default", "on a GPU", "applied", "searched", "what it does"]
    return table(header, rows)


def told_range(knob: Knob) -> str:
    if knob.choices is not None:
        return ", ".join(knob.choices)
    return f"{knob.low:g} to {knob.high:g}"


def metric_table() -> str:
    rows = [
        [f"`{metric}`", metric.unit, metric.better or "–", metric.label.meaning, metric.source, metric.help]
        for metric in METRICS.values()
    ]
    return table(["metric", "unit", "better", "label", "source", "what it says"], rows)


def rule_table() -> str:
    rows = []
    for rule in RULES:
        band, word = rule.band, "over" if rule.band.rises else "under"
        told = "{:.0%}" if rule.unit == "ratio" else "{:g}"
        follows = ["voids the pair"] if rule.voids_pair else ["starts a study"] if rule.starts_study else []
        rows.append(
            [
                f"`{rule.name}`",
                rule.sees,
                f"{word} {told.format(band.trigger)}",
                f"{band.hold_s:g} s",
                told.format(band.clear),
                f"{band.clear_s:g} s",
                rule.kind,
                rule.severity,
                *(follows or ["–"]),
            ]
        )
    header = [
        "rule",
        "what it sees",
        "fires",
        "held for",
        "over at",
        "held for",
        "kind",
        "severity",
        "follows",
    ]
    return table(header, rows)


def exit_code_table() -> str:
    """Codes and their meanings from the tree that tuner/errors.py draws, with every error that ends in them."""
    meanings = dict(re.findall(r"(\d+)  +(\S.*)", errors.__doc__ or ""))
    kinds: dict[str, list[str]] = {}
    for kind in subtypes(errors.TunerError):
        kinds.setdefault(str(kind.exit_code), []).append(f"`{kind.__name__}`")
    rows = [[code, ", ".join(names), meanings[code]] for code, names in sorted(kinds.items())]
    return table(["code", "error", "meaning"], [["0", "", "success"], *rows])


def subtypes(kind: type[errors.TunerError]) -> list[type[errors.TunerError]]:
    """The kind and all below it that tuner/errors.py declares, the highest first."""
    found = [kind]
    for below in kind.__subclasses__():
        if below.__module__ == errors.__name__:
            found += subtypes(below)
    return found


def file_map() -> str:
    """Every file of the four packages with the first line of its docstring."""
    parts = []
    for package in PACKAGES:
        files = sorted(path for path in (ROOT / package).rglob("*.py") if "versions" not in path.parts)
        rows = [
            [f"`{path.relative_to(ROOT).as_posix()}`", first_line(path)]
            for path in files
            if path.stat().st_size
        ]
        parts.append(table([f"`{package}/`", ""], rows))
    return "\n\n".join(parts)


def first_line(path: Path) -> str:
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return doc.splitlines()[0].strip() if doc else ""


SECTIONS: dict[str, Callable[[], str]] = {
    "knobs": knob_table,
    "metrics": metric_table,
    "rules": rule_table,
    "exit codes": exit_code_table,
    "files": file_map,
}


def regenerated(text: str) -> str:
    """The text with every generated part as it should be now.

    Raises:
        ValueError: a marker is missing.
    """
    for name, generate in SECTIONS.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, found_begin, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not (found_begin and found_end):
            raise ValueError(f"README.md must hold the markers `{begin.strip()}` and `{end}`.")
        text = f"{before}{begin}\n{generate()}\n\n{end}{after}"
    return text


def main() -> int:
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = regenerated(old)
    path.write_text(new, encoding="utf-8")
    print("README.md was " + ("up to date." if new == old else "written anew."))
    return 0


if __name__ == "__main__":
    sys.exit(main())
