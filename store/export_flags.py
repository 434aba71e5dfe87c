"""A command line for another server: the knobs that have an argument there, and a reason for each that has none.

Flags are never guessed: what does not mean the same is listed as a comment instead.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from store.proof import Proof
from store.proof_words import commented, comments

Values = Mapping[str, Any]


class Told(NamedTuple):
    """What becomes of one knob: arguments, or else why there are none."""

    arguments: tuple[str, ...] = ()
    reason: str | None = None


def flag(name: str, value: object) -> Told:
    return Told((name, str(value)))


def nothing(reason: str) -> Told:
    return Told(reason=reason)


# (value of the knob, all knobs, the snapshot's model) -> what it is there
Translation = Callable[[Any, Values, Values], Told]


@dataclass(frozen=True)
class Target:
    """Another server: how it is started, and what each of our knobs is called there.

    as_of: the release whose argument definitions were read.
    context_flag: takes the longest prompt plus output, in tokens.
    """

    name: str
    as_of: str
    command: Callable[[str], Sequence[str]]
    context_flag: str
    knobs: Mapping[str, Translation]
    notes: Callable[[Values], Sequence[str]] = lambda values: ()


def export_flags(target: Target, proof: Proof, tuner_version: str) -> str:
    """A shell command with the evidence above it and what did not map below it."""
    values, model = proof.config.values, proof.snapshot.model
    told = {name: translated(target, name, values, model) for name in sorted(values)}
    arguments = [one.arguments for one in told.values() if one.arguments]
    if model.get("max_model_len"):
        arguments.append((target.context_flag, str(model["max_model_len"])))
    start = " ".join(shlex.quote(word) for word in target.command(str(model.get("name", "MODEL"))))
    lines = [start, *("  " + " ".join(map(shlex.quote, words)) for words in arguments)]
    missing = [f"  {name} = {values[name]}: {one.reason}" for name, one in told.items() if one.reason]
    foot = [f"Has no argument in {target.name}:", *missing] if missing else []
    head = comments(proof, tuner_version) + commented(_caution(target, proof))
    return head + " \\\n".join(lines) + "\n\n" + commented([*target.notes(values), *foot])


def translated(target: Target, name: str, values: Values, model: Values) -> Told:
    if name not in target.knobs:
        return nothing("this version does not know what it is called there")
    return target.knobs[name](values[name], values, model)


def _caution(target: Target, proof: Proof) -> list[str]:
    runtime = proof.snapshot.versions.get("runtime")
    own = f"Tuner's own runtime {runtime}" if runtime else "Tuner's own runtime"
    return [
        f"Measured on {own}, not on {target.name}: a start to measure from, proven for the server above only.",
        f"Arguments of {target.name} {target.as_of}.",
    ]
