"""`tuner verify`: judges an exported verdict again, from its coins and scores, with the judge that made it.

    evidence.json ──read_evidence──▶ document ──verify──▶ one Check a claim; all must pass

Pure but for reading the file. What cannot be derived again (instants, reasons for void pairs) is held by the
seal alone: it finds accidents, not a forger who seals anew.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runtime.knobs import config_id_of
from store import seal
from store.export_evidence import EVIDENCE_FORMAT, EVIDENCE_SCHEMA_VERSION
from store.seal import Document
from store.tables import Experiment, Slice
from tuner.errors import EvidenceUnreadable, SettingsError
from tuner.experiment import HARM_PREFIX
from tuner.judging.coin import coin_hash
from tuner.judging.error_rate import Lord
from tuner.judging.judge import GuardrailResult, Outcome, PairScore, Verdict, judge
from tuner.pairs import ExperimentRules, guardrails, pairs_of, scored_pairs, verdict_row

MAX_BYTES = 64 * 1024 * 1024
MAX_TOLD = 3  # differences named in one check


@dataclass(frozen=True)
class Check:
    """One claim of the document. `detail` says what was found, or what differs."""

    name: str
    passed: bool
    detail: str


# --- reading --------------------------------------------------------------------------------------


def read_evidence(path: Path) -> tuple[str, Document]:
    """The text of an exported evidence and its document.

    Raises:
        SettingsError: there is no such file.
        EvidenceUnreadable: it is not evidence, or of a newer version.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise EvidenceUnreadable(f"{path} is larger than any evidence ({MAX_BYTES >> 20} MB at most).")
        text = path.read_bytes().decode("utf-8")
        document = json.loads(text)
    except OSError as error:
        told = f"{path} cannot be read: {error.strerror}. Give the file that `tuner export --evidence` wrote."
        raise SettingsError(told) from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise EvidenceUnreadable(f"{path} is not JSON: {error}. Export the evidence again.") from error
    if not isinstance(document, dict) or document.get("format") != EVIDENCE_FORMAT:
        raise EvidenceUnreadable(
            f"{path} is not evidence of a verdict. `tuner export --evidence FILE` writes one."
        )
    version = document.get("evidence_schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise EvidenceUnreadable(f"{path} has no version of its form that could be read: {version!r}.")
    if version > EVIDENCE_SCHEMA_VERSION:
        raise EvidenceUnreadable(
            f"{path} has form {version}, but this version of the tuner reads up to {EVIDENCE_SCHEMA_VERSION}. "
            "Verify it with the version that wrote it, or a newer one."
        )
    return text, document


# --- checking -------------------------------------------------------------------------------------


def verify(text: str, document: Document) -> list[Check]:
    """Every claim, in the order in which the evidence arose. Never raises: what cannot be read has failed."""
    checks: list[tuple[str, Callable[[Document], str]]] = [
        ("text", lambda found: check_text(text, found)),
        ("seal", check_seal),
        ("snapshot", check_snapshot),
        ("configurations", check_configs),
        ("coins", check_coins),
        ("order", check_order),
        ("scores", check_scores),
        ("twin", check_twin),
        ("level", check_level),
        ("decision", check_decision),
        ("numbers", check_numbers),
    ]
    return [_checked(name, check, document) for name, check in checks]


class _Differs(Exception):
    """A claim does not hold."""


def _checked(name: str, check: Callable[[Document], str], document: Document) -> Check:
    try:
        return Check(name, True, check(document))
    except _Differs as error:
        return Check(name, False, str(error))
    except (
        Exception
    ) as error:  # a foreign document may break any line; it must fail its check, not the command
        return Check(name, False, f"cannot be read: {type(error).__name__}: {error}")


def _hold(differences: Iterator[str]) -> None:
    """Raises _Differs with the first differences, where there are any."""
    found = list(differences)
    if found:
        more = f" ... and {len(found) - MAX_TOLD} more" if len(found) > MAX_TOLD else ""
        raise _Differs("; ".join(found[:MAX_TOLD]) + more)


def check_text(text: str, document: Document) -> str:
    expected = seal.canonical(document)
    if text != expected:
        lines = zip(text.splitlines(), expected.splitlines(), strict=False)
        line = next((number for number, (got, want) in enumerate(lines, 1) if got != want), None)
        where = f"from line {line} on" if line is not None else "at its end"
        raise _Differs(f"The file is not byte for byte as it was written, {where}.")
    return f"{len(text.encode())} bytes, as they were written"


def check_seal(document: Document) -> str:
    _hold(iter(seal.differences(document)))
    return f"{len(document['seal']['parts'])} parts are as they were sealed"


def check_snapshot(document: Document) -> str:
    snapshot = document["snapshot"]
    parts = {name: snapshot[name] for name in ("model", "hardware", "versions")}
    text = json.dumps([snapshot["knob_schema_version"], parts], sort_keys=True)
    found = hashlib.sha256(text.encode()).hexdigest()[:16]
    _hold(_differing("snapshot.snapshot_id", snapshot["snapshot_id"], found))
    _hold(_differing("experiment.snapshot_id", document["experiment"]["snapshot_id"], found))
    model, hardware = snapshot["model"].get("name"), snapshot["hardware"].get("device_name")
    return f"{found} is {model} on {hardware}"


def check_configs(document: Document) -> str:
    ids = {}
    for arm in ("champion", "challenger"):
        config = document[arm]
        ids[arm] = config_id_of(config["values"], config["knob_schema_version"])
        _hold(_differing(f"{arm}.config_id", config["config_id"], ids[arm]))
        _hold(_differing(f"experiment.{arm}_config_id", document["experiment"][f"{arm}_config_id"], ids[arm]))
    return f"champion {ids['champion']}, challenger {ids['challenger']}"


def check_coins(document: Document) -> str:
    """Each coin is what its commitment, written before the pair, said it would be."""
    experiment_id, rows = document["experiment"]["experiment_id"], document["slices"]

    def differences() -> Iterator[str]:
        for index, row in enumerate(rows):
            found = coin_hash(experiment_id, row["pair_index"], row["coin"], row["stats"]["coin_salt"])
            yield from _differing(f"slices[{index}].coin_hash", row["coin_hash"], found)
        for pair in pairs_of(_slices(document)):
            if len({(row.coin, row.coin_hash, row.stats["coin_salt"]) for row in pair}) != 1:
                yield f"pair {pair[0].pair_index} has two coins"

    _hold(differences())
    return f"{len({row['pair_index'] for row in rows})} coins match their commitments"


def check_order(document: Document) -> str:
    """The arms of each pair were served in the order that its coin chose, one after the other."""
    experiment, pairs = document["experiment"], pairs_of(_slices(document))
    slice_s = ExperimentRules(**experiment["rules"]).slice_s

    def differences() -> Iterator[str]:
        if [pair[0].pair_index for pair in pairs] != list(range(len(pairs))):
            yield "the pairs are not numbered 0, 1, 2, ... without a gap"
        for pair in pairs:
            index = pair[0].pair_index
            arms = ("challenger", "champion") if pair[0].coin else ("champion", "challenger")
            if [(row.position, row.arm) for row in pair] != list(enumerate(arms)):
                yield f"pair {index}: its coin says {arms[0]} first, but {pair[0].arm} was"
                continue
            for row in pair:
                path = f"slice {row.slice_id}"
                yield from _differing(f"{path}.config_id", row.config_id, experiment[f"{row.arm}_config_id"])
                yield from _differing(
                    f"{path}.slice_id", row.slice_id, f"{experiment['experiment_id']}-{index}-{row.arm}"
                )
                yield from _differing(f"{path}.experiment_id", row.experiment_id, experiment["experiment_id"])
            start_at = pair[0].planned_start_at
            planned = [instant for row in pair for instant in (row.planned_start_at, row.planned_end_at)]
            wanted = [start_at, start_at + slice_s, start_at + slice_s, start_at + 2 * slice_s]
            yield from _differing(f"the instants of pair {index}", planned, wanted)

    _hold(differences())
    num_ab = sum(pair[0].coin == 0 for pair in pairs)
    return f"{num_ab} pairs champion first, {len(pairs) - num_ab} challenger first, as the coins fell"


def check_scores(document: Document) -> str:
    """The response of a slice is what was measured less what was predicted; both slices of a pair count, or none."""
    pairs = pairs_of(_slices(document))

    def differences() -> Iterator[str]:
        for pair in pairs:
            if len({row.state for row in pair}) != 1 or pair[0].state not in ("SCORED", "VOID"):
                yield f"pair {pair[0].pair_index} is {' and '.join(row.state for row in pair)}"
                continue
            for row in pair if pair[0].state == "SCORED" else ():
                expected = None if row.measured is None else row.measured - (row.predicted or 0.0)
                yield from _differing(f"slice {row.slice_id}.response", row.response, expected)

    _hold(differences())
    reasons = [pair[0].void_reason for pair in pairs if pair[0].state == "VOID"]
    void = f"; {len(reasons)} void: {'; '.join(sorted(set(map(str, reasons))))}" if reasons else ""
    return f"{len(pairs) - len(reasons)} pairs scored{void}"


def check_twin(document: Document) -> str:
    """What was subtracted came from a fit that was made, and found good, before the experiment."""
    fit, experiment = document["twin_fit"], document["experiment"]
    is_subtracted = any(row["predicted"] is not None for row in document["slices"])
    if fit is None:
        _hold(_differing("experiment.twin_fit_id", experiment["twin_fit_id"], None))
        return "no twin was used" if not is_subtracted else "predictions without a twin: covariates stood in"
    _hold(_differing("experiment.twin_fit_id", experiment["twin_fit_id"], fit["twin_fit_id"]))
    if not fit["is_used"] or fit["fitted_at"] > experiment["created_at"]:
        raise _Differs("the twin was fitted after the experiment began, or was not good enough to be used")
    before_s = experiment["created_at"] - fit["fitted_at"]
    return f"fitted {before_s:.0f} s before the experiment on {fit['num_steps']} steps"


def check_level(document: Document) -> str:
    """The level is what LORD++ pays this test, given which tests of its stream promoted before."""
    experiment, stream, verdict = document["experiment"], document["stream"], document["verdict"]
    level = experiment["rules"]["level"]
    _hold(_differing("verdict.level", verdict["level"], level))
    if not stream:
        if experiment["kind"] == "test":
            raise _Differs("a test must have paid for its level, but the stream is empty")
        return f"{level:.4%}, fixed: a {experiment['kind']} promotes nothing and pays nothing"

    def differences() -> Iterator[str]:
        promoted: list[int] = []
        for index, spend in enumerate(stream, 1):
            yield from _differing(f"stream[{index - 1}].test_index", spend["test_index"], index)
            expected = Lord(alpha=spend["fdr"], w0=spend["fdr"]).level(index, promoted)
            yield from _differing(f"stream[{index - 1}].level", spend["level"], expected)
            promoted += [index] if spend["is_rejection"] else []
        own = stream[-1]
        yield from _differing("stream[-1].experiment_id", own["experiment_id"], experiment["experiment_id"])
        yield from _differing(
            "stream[-1].is_rejection", own["is_rejection"], verdict["outcome"] == Outcome.PROMOTE
        )
        yield from _differing("experiment.rules.level", level, own["level"])

    _hold(differences())
    num_promoted = sum(spend["is_rejection"] is True for spend in stream[:-1])
    return f"{level:.4%} for test {len(stream)} of its stream, after {num_promoted} promotions"


def check_decision(document: Document) -> str:
    """PROMOTE, REJECT or INCONCLUSIVE, and the reason in words, as the judge gives them on these pairs."""
    verdict, experiment = document["verdict"], document["experiment"]
    outcome, reason, judgement = _judged(document)
    if experiment["state"] != "STOPPED" and len(judgement.open_faults) < len(document["faults"]):
        raise _Differs(
            f"{len(document['faults'])} faults were open, but the verdict knew of {len(judgement.open_faults)}"
        )
    _hold(_differing("verdict.outcome", verdict["outcome"], str(outcome)))
    _hold(_differing("verdict.reason", verdict["reason"], reason))
    _hold(_differing("experiment.reason", experiment["reason"], reason))
    _hold(_differing("verdict.experiment_id", verdict["experiment_id"], experiment["experiment_id"]))
    return f"{outcome}: {reason}"


def check_numbers(document: Document) -> str:
    """Effect, interval, p-value and everything else that the judge computed, to the last bit."""
    recorded, experiment = document["verdict"], _experiment(document)
    outcome, reason, judgement = _judged(document)
    rules = ExperimentRules(**experiment.rules)
    row = verdict_row(experiment, outcome, reason, judgement, _pairs(document), rules, recorded["decided_at"])

    def differences() -> Iterator[str]:
        for name in recorded:
            if name not in ("verdict_id", "evidence"):
                yield from _differing(f"verdict.{name}", recorded[name], getattr(row, name))
        for name, derived in row.evidence.items():
            if name == "rules":  # older experiments lack rules that came later: those count as their default
                derived = {**derived, **experiment.rules}
            yield from _differing(f"verdict.evidence.{name}", recorded["evidence"].get(name), derived)

    _hold(differences())
    low, high = judgement.interval_low_ratio, judgement.interval_high_ratio
    interval = "unbounded" if low is None or high is None else f"{low:+.2%} to {high:+.2%}"
    effect = "none" if judgement.effect_ratio is None else f"{judgement.effect_ratio:+.2%}"
    return f"effect {effect} (interval {interval}), p = {judgement.p_value}, {judgement.num_pairs} pairs"


# --- the judge, again -----------------------------------------------------------------------------


def _judged(document: Document) -> tuple[Outcome, str, Verdict]:
    """What the judge says now. An experiment that was stopped is decided by why, and never in favour."""
    experiment, recorded = document["experiment"], document["verdict"]["evidence"]["judgement"]
    rules, pairs = ExperimentRules(**experiment["rules"]), _pairs(document)
    if experiment["state"] == "STOPPED":
        reason = str(experiment["reason"])
        outcome = Outcome.REJECT if reason.startswith(HARM_PREFIX) else Outcome.INCONCLUSIVE
        return outcome, reason, judge(pairs, rules.judge_rules())
    faults = list(recorded["open_faults"])  # in the words of that moment; how many there were is checked
    derived = guardrails(_slices(document), rules, rules.max_error_ratio)
    known = {result.name for result in derived}
    told = [GuardrailResult(**one) for one in recorded["guardrails"] if one["name"] not in known]
    judgement = judge(pairs, rules.judge_rules(), [*derived, *told], faults)
    return judgement.outcome, judgement.reason, judgement


def _slices(document: Document) -> list[Slice]:
    return [Slice(**row) for row in document["slices"]]


def _pairs(document: Document) -> list[PairScore]:
    return scored_pairs(_slices(document))


def _experiment(document: Document) -> Experiment:
    return Experiment(**document["experiment"])


def _differing(path: str, recorded: Any, derived: Any) -> Iterator[str]:
    """The paths at which two values differ, as JSON: a number must be the same to its last digit, and of its kind."""
    if isinstance(recorded, Mapping) and isinstance(derived, Mapping):
        for name in sorted({*recorded, *derived}):
            if (name in recorded) != (name in derived):
                yield f"`{path}.{name}` is {'not to be there' if name in recorded else 'missing'}"
            else:
                yield from _differing(f"{path}.{name}", recorded[name], derived[name])
    elif (
        isinstance(recorded, list | tuple)
        and isinstance(derived, list | tuple)
        and len(recorded) == len(derived)
    ):
        for index, (one, other) in enumerate(zip(recorded, derived, strict=True)):
            yield from _differing(f"{path}[{index}]", one, other)
    elif json.dumps(recorded, default=str) != json.dumps(derived, default=str):
        yield f"`{path}` is {_short(recorded)}, but {_short(derived)} follows"


def _short(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."


def as_dicts(checks: list[Check]) -> list[dict[str, Any]]:
    return [asdict(check) for check in checks]
