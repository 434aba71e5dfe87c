"""The knobs of the engine, each declared once: type, range, default, unit, how it is applied.

Validation, Optuna distributions, command-line keys, the README's table and the dashboard's labels all
derive from the fields of `EngineConfig`. A configuration assigns every knob and is known by its
`config_id`, a hash of its content and of KNOB_SCHEMA_VERSION.
"""

import difflib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from functools import cached_property
from typing import Any, Literal, NamedTuple

from runtime.errors import InvalidKnob

KNOB_SCHEMA_VERSION = 2  # raise it when a knob changes meaning: old config_ids then never match new ones

KnobValue = int | float | str | bool


class ApplyMode(StrEnum):
    LIVE = "live"  # at the next step
    WARM = "warm"  # prepared beside, then swapped at a step
    COLD = "cold"  # a new worker, overlapped


class Need(NamedTuple):
    """A choice that means nothing unless another knob has this value."""

    choice: str
    knob: str
    value: KnobValue


@dataclass(frozen=True)
class Knob:
    """One declared knob. `low`/`high` bound int and float knobs, `choices` lists those of a choice knob."""

    name: str
    kind: Literal["int", "float", "choice"]
    default: KnobValue
    unit: str
    help: str
    low: float = 0.0
    high: float = 0.0
    choices: tuple[str, ...] | None = None
    log: bool = False
    apply: ApplyMode = ApplyMode.LIVE
    changes_outputs: bool = False
    promises: tuple[
        str, ...
    ] = ()  # choices that keep a promise to clients: never searched, and never left by a search
    needs: tuple[Need, ...] = ()  # a search proposes such a choice only together with what it needs
    only_with: str | None = None  # a knob beside whose 0 this one means nothing, and is not searched
    searched: bool = True  # False: never moved by the search unless the settings allow it by name
    is_off_at_high: bool = (
        False  # the highest value is "off", and so is whatever an engine reports as its ceiling
    )
    is_later: bool = (
        False  # declared after configurations were stored: no part of their ids while at its default
    )

    def check(self, value: Any) -> KnobValue:
        """Returns the value in the knob's own type.

        Raises:
            InvalidKnob: wrong type, out of range, or not one of the choices.
        """
        if self.choices is not None:
            if str(value) not in self.choices:  # a number is one where choices are numbers: 64 is "64"
                raise InvalidKnob(
                    f"`{self.name}` must be one of {', '.join(self.choices)}, but got {value!r}."
                )
            return str(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InvalidKnob(f"`{self.name}` must be a number ({self.kind}), but got {value!r}.")
        if self.kind == "int" and not float(value).is_integer():
            raise InvalidKnob(f"`{self.name}` must be a whole number of {self.unit}, but got {value!r}.")
        if not self.low <= value <= self.high:  # NaN fails too
            raise InvalidKnob(
                f"`{self.name}` must be in [{self.low:g}, {self.high:g}] {self.unit}, but got {value!r}."
            )
        return int(value) if self.kind == "int" else float(value)


def knob(default: KnobValue, *, unit: str, help: str, **declared: Any) -> Any:
    return field(default=default, metadata={"default": default, "unit": unit, "help": help, **declared})


@dataclass(frozen=True)
class EngineConfig:
    """A full assignment of every knob. Built with `EngineConfig.of`, changed with `patched`; both validate."""

    max_num_seqs: int = knob(
        16,
        kind="int",
        low=1,
        high=1024,
        log=True,
        unit="requests",
        help="Requests that are in prefill or decode at the same time.",
    )
    max_batched_tokens: int = knob(
        512,
        kind="int",
        low=16,
        high=32768,
        log=True,
        unit="tokens",
        help="Tokens computed in one step, decode and prefill together.",
    )
    prefill_chunk: int = knob(
        256,
        kind="int",
        low=16,
        high=16384,
        log=True,
        unit="tokens",
        help="Longest piece of one prompt computed in one step.",
    )
    policy: str = knob(
        "fcfs",
        kind="choice",
        choices=("fcfs", "shortest_prefill", "longest_prefix", "priority"),
        promises=("priority",),
        needs=(Need("longest_prefix", "prefix_cache", "on"),),
        unit="",
        help="Which waiting request is admitted first; `longest_prefix`: the one with the most tokens in the prefix "
        "cache; `priority` keeps to what requests ask for and is not searched.",
    )
    batch_wait_ms: float = knob(
        0.0,
        kind="float",
        low=0.0,
        high=200.0,
        unit="ms",
        help="How long a waiting request may be held so that others join its batch.",
    )
    threads_decode: int = knob(
        1,
        kind="int",
        low=1,
        high=256,
        log=True,
        unit="threads",
        help="CPU threads of a step that only decodes.",
    )
    threads_prefill: int = knob(
        1,
        kind="int",
        low=1,
        high=256,
        log=True,
        unit="threads",
        help="CPU threads of a step that computes a piece of a prompt.",
    )
    max_queued_requests: int = knob(
        1024,
        kind="int",
        low=1,
        high=65536,
        log=True,
        unit="requests",
        searched=False,
        help="Requests waiting for their first token beyond which new ones are answered 429.",
    )
    weight_format: str = knob(
        "float32",
        kind="choice",
        choices=("float32", "bfloat16", "int8", "float16", "float64"),
        unit="",
        apply=ApplyMode.WARM,
        changes_outputs=True,  # so it moves only where quality checks say what a coarser format costs
        help="How the linear layers hold their weights; the default is as loaded, keys and values stay as they are.",
    )
    kv_tokens: int = knob(
        131_072,
        kind="int",
        low=32,
        high=2**34,
        log=True,
        unit="tokens",
        apply=ApplyMode.WARM,
        searched=False,  # more is never slower: memory decides, not latency
        help="Size of the KV pool, in whole blocks of 16; the default is what the engine fitted at its start.",
    )
    prefix_cache: str = knob(
        "off",
        kind="choice",
        choices=("off", "on"),
        unit="",
        apply=ApplyMode.WARM,
        searched=False,  # the replay that ranks candidates knows lengths only, so it foresees no hit
        help="Whether finished prompts stay cached in free blocks for requests that begin alike.",
    )
    replicas: int = knob(
        1,
        kind="int",
        low=1,
        high=8,
        unit="engines",
        apply=ApplyMode.WARM,
        searched=False,  # each takes the memory of a whole model
        help="Engine processes behind one front end; this many times the threads should not exceed the cores.",
    )
    long_prompt_threshold: int = knob(
        1_048_576,
        kind="int",
        low=16,
        high=1_048_576,
        log=True,
        unit="tokens",
        is_off_at_high=True,
        is_later=True,
        help="Prompts with more tokens left than this get together at most this many in one step, so that short ones "
        "pass; the highest value is off.",
    )
    kv_watermark: float = knob(
        0.0,
        kind="float",
        low=0.0,
        high=0.5,
        unit="of the pool",
        is_later=True,
        help="Share of the KV pool that must stay free when another request is admitted beside running ones.",
    )

    overlap_depth: int = knob(
        0,
        kind="int",
        low=0,
        high=1,
        unit="steps",
        searched=False,  # on a CPU there is nothing to overlap; on a GPU 1 was never slower (CHANGELOG)
        is_later=True,
        help="Steps that may be under way when the next one is launched; its tokens are read while that one computes.",
    )
    stream_interval: int = knob(
        1,
        kind="int",
        low=1,
        high=16,
        unit="tokens",
        searched=False,  # latencies are measured where tokens are made, so a search would see no harm in it
        is_later=True,
        help="Tokens that a stream gathers before they are sent, after the first, which is sent at once.",
    )
    speculation_length: int = knob(
        0,
        kind="int",
        low=0,
        high=8,
        unit="tokens",
        searched=False,  # the replay that ranks candidates knows lengths only, so it foresees no draft that is right
        is_later=True,
        help="Longest draft of a request's next tokens, looked up in its own text and checked in one step; 0 is off.",
    )
    speculation_max_seqs: int = knob(
        8,
        kind="int",
        low=1,
        high=64,
        log=True,
        unit="requests",
        only_with="speculation_length",
        is_later=True,
        help="Running requests above which nothing is drafted: the more they are, the less a step has to spare.",
    )

    kv_block: str = knob(
        "16",
        kind="choice",
        choices=("16", "32", "64", "128", "256"),
        unit="tokens",
        apply=ApplyMode.WARM,
        searched=False,  # on a CPU rows are read as runs of blocks; on a GPU 64 was never slower (CHANGELOG)
        is_later=True,
        help="Tokens of one block of the KV pool, the unit in which it is handed out and prefixes are cached; on a GPU "
        "64 by default.",
    )

    kv_dtype: str = knob(
        "auto",
        kind="choice",
        choices=("auto", "fp8"),
        unit="",
        apply=ApplyMode.WARM,
        changes_outputs=True,
        searched=False,  # a pool beside the one in force finds room only where that one is small
        is_later=True,
        help="How the KV pool holds keys and values: `auto` as the model computes them, `fp8` in 8 bits with a scale "
        "for each head of each token.",
    )

    mixed_step_tokens: int = knob(
        32768,
        kind="int",
        low=16,
        high=32768,
        log=True,
        unit="tokens",
        is_off_at_high=True,
        is_later=True,
        help="Tokens of a step in which somebody decodes, unless 16 times as many wait: prompts get what decode rows "
        "leave, at least 64, and an eighth more or a sixth less where the step then has a multiple of 512, which is "
        "computed faster; deep in a prompt a token counts for more. The highest value is off; on a GPU the default is "
        "what takes 39 ms.",
    )

    linear_backend: str = knob(
        "auto",
        kind="choice",
        choices=("auto", "cublas", "triton"),
        unit="",
        searched=False,  # `auto` is the faster one of each shape, by times taken when the model is loaded
        is_later=True,
        help="Who multiplies in linear layers of at most 256 rows, where our decoder runs on a GPU: `auto` who was "
        "faster for that shape when the model was loaded, `cublas` the library, `triton` our kernels wherever they "
        "were timed.",
    )

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "EngineConfig":
        """Every knob not named keeps its declared default.

        Raises:
            InvalidKnob: unknown name or bad value.
        """
        return cls().patched(values)

    def patched(self, patch: Mapping[str, Any]) -> "EngineConfig":
        checked: dict[str, Any] = {name: knob_named(name).check(value) for name, value in patch.items()}
        return replace(self, **checked)

    def values(self) -> dict[str, KnobValue]:
        return asdict(self)

    @property
    def block_tokens(self) -> int:
        """Tokens of one block, `kv_block` as a number."""
        return int(self.kv_block)

    @property
    def mixed_tokens(self) -> float:
        """`mixed_step_tokens`, infinite where it is off."""
        is_off = self.mixed_step_tokens >= knob_named("mixed_step_tokens").high
        return math.inf if is_off else self.mixed_step_tokens

    @cached_property
    def config_id(self) -> str:
        return config_id_of(self.values())

    def changes_from(self, other: "EngineConfig") -> dict[str, tuple[KnobValue, KnobValue]]:
        """Knobs that differ, as name -> (value in `other`, value here)."""
        before, after = other.values(), self.values()
        return {name: (before[name], after[name]) for name in after if before[name] != after[name]}


KNOBS: tuple[Knob, ...] = tuple(Knob(name=f.name, **f.metadata) for f in fields(EngineConfig))
_BY_NAME = {knob.name: knob for knob in KNOBS}


def knob_named(name: str) -> Knob:
    """Raises InvalidKnob for an unknown name, with the nearest known one."""
    if name in _BY_NAME:
        return _BY_NAME[name]
    near = difflib.get_close_matches(name, _BY_NAME, n=1)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    raise InvalidKnob(f"Unknown knob `{name}`.{hint} The knobs are: {', '.join(_BY_NAME)}.")


def config_id_of(values: Mapping[str, KnobValue], schema_version: int = KNOB_SCHEMA_VERSION) -> str:
    """A hash of the content. Knobs that were declared later are no part of it while at their defaults, so that ids
    from before them, and rows that lack them, stay what they are."""
    later = {one.name: one.default for one in KNOBS if one.is_later}
    named = {name: value for name, value in values.items() if name not in later or value != later[name]}
    text = json.dumps([schema_version, named], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def unmet_needs(config: EngineConfig) -> dict[str, Need]:
    """By knob, what its choice needs and this configuration does not have."""
    values = config.values()
    return {
        one.name: need
        for one in KNOBS
        for need in one.needs
        if values[one.name] == need.choice and values[need.knob] != need.value
    }


def default_config(
    device: Literal["cpu", "cuda"], num_cores: int, fitted: Mapping[str, KnobValue] | None = None
) -> EngineConfig:
    """The shipped default: one core is left to the front end, GPUs get larger batches.

    `fitted`: defaults that only the engine knows once the model is loaded (`weight_format`, `kv_tokens`,
    `mixed_step_tokens`), as its identity tells them.
    """
    spare = max(1, num_cores - 1)
    values: dict[str, KnobValue] = {"threads_decode": spare, "threads_prefill": spare}
    if device == "cuda":
        values = {"max_num_seqs": 512, "max_batched_tokens": 8192, "prefill_chunk": 2048,
                  "weight_format": "bfloat16", "overlap_depth": 1, "kv_block": "64"}  # fmt: skip
    return EngineConfig.of({**values, **(fitted or {})})


def presets(
    device: Literal["cpu", "cuda"], num_cores: int, fitted: Mapping[str, KnobValue] | None = None
) -> dict[str, EngineConfig]:
    """Points worth a probe before any model of the space exists. Named; the default is among them."""
    default = default_config(device, num_cores, fitted)
    wide = {"max_num_seqs": 2 * default.max_num_seqs, "max_batched_tokens": 2 * default.max_batched_tokens}
    smooth = {"prefill_chunk": max(16, default.prefill_chunk // 4)}
    if default.mixed_tokens < math.inf:  # it spares those who decode, and nobody else
        smooth = {"mixed_step_tokens": max(128, default.mixed_step_tokens // 2)}
    return {
        "default": default,
        "throughput": default.patched(wide),
        "smooth decode": default.patched(smooth),
        "short prompts first": default.patched({"policy": "shortest_prefill"}),
        "shared prefixes": default.patched({"prefix_cache": "on"}),
        "small weights": default.patched({"weight_format": "int8"}),
    }


def knob_reports(
    num_cores: int,
    max_num_seqs: int,
    fitted: Mapping[str, KnobValue] | None = None,
    max_kv_tokens: int | None = None,
    weight_formats: Sequence[str] | None = None,
    fixed: Mapping[str, KnobValue] | None = None,
    max_model_len: int | None = None,
    max_batched_tokens: int | None = None,
) -> list[dict[str, Any]]:
    """What the engine tells of its knobs: the declaration, with `high`, `choices` and `default` narrowed to this
    machine and model. `fitted` as in `default_config`; `fixed`: knobs that the model leaves one value.
    `max_batched_tokens`: where memory bounds it."""
    ceilings = {"threads_decode": num_cores, "threads_prefill": num_cores, "max_num_seqs": max_num_seqs}
    if max_kv_tokens is not None:
        ceilings["kv_tokens"] = max_kv_tokens
    if max_batched_tokens is not None:
        ceilings["max_batched_tokens"] = max_batched_tokens
    if max_model_len is not None:  # no prompt is longer
        ceilings["long_prompt_threshold"] = max_model_len
    reports = []
    for declared in KNOBS:
        report = asdict(declared)
        if declared.name in ceilings:
            report["high"] = min(declared.high, ceilings[declared.name])
        if declared.name == "weight_format" and weight_formats is not None:
            report["choices"] = tuple(weight_formats)
        if fixed is not None and declared.name in fixed:
            value = fixed[declared.name]
            report |= {"choices": (value,)} if declared.choices else {"low": value, "high": value}
        if fitted is not None and declared.name in fitted:
            report["default"] = fitted[declared.name]
        reports.append(report)
    return reports
