import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store.database import Store
from store.errors import UnknownRow
from store.export_evidence import EVIDENCE_SCHEMA_VERSION, export_evidence
from store.seal import canonical, differences, sealed
from tests.tuner.proven import add_test, begin
from tuner.errors import EvidenceUnreadable, SettingsError
from tuner.verify import Check, read_evidence, verify

STORIES: dict[str, dict[str, Any]] = {
    "promoted": {},
    "harmful": {"shift": 0.3, "seed": 2},
    "nothing": {"shift": 0.0, "seed": 3, "void": (1, 4)},
    "stopped": {"stopped": "harm: A request has been unfinished for 60 s."},
    "interrupted": {"stopped": "interrupted: the daemon was stopped"},
    "aa": {"kind": "aa", "shift": 0.0, "seed": 5},
    "promoted_again": {"seed": 9},
    "under_a_fault": {"seed": 9, "fault": "The host was suspended."},
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One stream of experiments, each exported: promoted, rejected, inconclusive, stopped, A/A."""
    with Store.open(tmp_path_factory.mktemp("evidence")) as store:
        snapshot_id = begin(store)
        for name, story in STORIES.items():
            add_test(store, snapshot_id, name, **story)
        with store.journal() as journal:
            return {name: export_evidence(journal, name, "0.1.0") for name in STORIES}


@pytest.fixture(scope="module")
def promoted(texts: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(texts["promoted"])
    return found


def failed(text: str) -> list[Check]:
    return [check for check in verify(text, json.loads(text)) if not check.passed]


@pytest.mark.parametrize("name", STORIES)
def test_a_verdict_is_derived_again_bit_for_bit(texts: dict[str, str], name: str) -> None:
    assert failed(texts[name]) == []


def test_the_stories_hold_every_outcome(texts: dict[str, str]) -> None:
    outcomes = {name: json.loads(text)["verdict"]["outcome"] for name, text in texts.items()}
    assert set(outcomes.values()) == {"PROMOTE", "REJECT", "INCONCLUSIVE"}
    assert outcomes["promoted"] == outcomes["promoted_again"] == "PROMOTE"
    assert outcomes["under_a_fault"] == "INCONCLUSIVE"


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        with Store.open(tmp_path / name) as store:
            add_test(store, begin(store))
            with store.journal() as journal:
                document = json.loads(export_evidence(journal, "t1", "0.1.0"))
        document.pop("seal")
        found.append(canonical(document))
    assert found[0] == found[1]


# --- any change is noticed ------------------------------------------------------------------------


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict | list) and value:
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, (*path, key))
    else:
        yield path


def changed(value: Any) -> Any:
    """Another value of the same kind, as near as can be."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value + max(abs(value), 1e-9) * 2**-50
    if isinstance(value, str):
        return ("b" if value[:1] == "a" else "a") + value[1:]
    return 0 if value is None else [0]


def with_change(document: dict[str, Any], path: tuple[Any, ...]) -> dict[str, Any]:
    copied = copy.deepcopy(document)
    part = copied
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = changed(part[path[-1]])
    return copied


def test_every_single_changed_field_is_detected_and_its_part_named(texts: dict[str, str]) -> None:
    document = json.loads(texts["stopped"])
    paths = list(leaves(document))
    assert len(paths) > 600
    for path in paths:
        found = differences(with_change(document, path))
        name = str(path[1 if path[0] == "seal" and len(path) > 2 else 0])
        assert found, path
        if path[0] not in ("seal",):
            assert any(name in line for line in found), (path, found)


FORGED = [
    ("slices", 3, "measured"), ("slices", 3, "response"), ("slices", 3, "predicted"), ("slices", 3, "coin"),
    ("slices", 3, "coin_hash"), ("slices", 3, "arm"), ("slices", 3, "position"), ("slices", 3, "config_id"),
    ("slices", 3, "state"), ("slices", 3, "pair_index"), ("slices", 3, "experiment_id"), ("slices", 3, "slice_id"),
    ("slices", 3, "num_requests"), ("slices", 3, "num_errors"), ("slices", 3, "stats", "coin_salt"),
    ("slices", 3, "stats", "rate_per_s"), ("slices", 3, "planned_start_at"),
    ("experiment", "experiment_id"), ("experiment", "champion_config_id"), ("experiment", "challenger_config_id"),
    ("experiment", "snapshot_id"), ("experiment", "reason"), ("experiment", "rules", "level"),
    ("experiment", "rules", "max_pairs"), ("experiment", "rules", "min_effect"), ("experiment", "rules", "look_every"),
    ("experiment", "rules", "slice_s"), ("experiment", "rules", "pair_sd"), ("experiment", "twin_fit_id"),
    ("champion", "values", "prefill_chunk"), ("challenger", "values", "policy"), ("challenger", "config_id"),
    ("challenger", "knob_schema_version"), ("snapshot", "model", "name"), ("snapshot", "hardware", "device"),
    ("snapshot", "snapshot_id"), ("stream", 0, "level"), ("stream", 0, "test_index"), ("stream", 0, "fdr"),
    ("stream", 0, "is_rejection"), ("stream", 0, "experiment_id"), ("verdict", "outcome"), ("verdict", "reason"),
    ("verdict", "effect_ratio"), ("verdict", "interval_low_ratio"), ("verdict", "interval_high_ratio"),
    ("verdict", "p_value"), ("verdict", "num_pairs"), ("verdict", "level"), ("verdict", "experiment_id"),
    ("verdict", "evidence", "judgement", "boundary"), ("verdict", "evidence", "judgement", "log_harm_e_value"),
    ("verdict", "evidence", "pairs", 2, "difference"), ("verdict", "evidence", "judgement", "looks", 0, "spent"),
    ("verdict", "evidence", "judgement", "guardrails", 0, "passed"), ("verdict", "evidence", "rules", "level"),
]  # fmt: skip


@pytest.mark.parametrize("path", FORGED, ids=lambda path: ".".join(map(str, path)))
def test_a_forged_field_is_detected_even_under_a_new_seal(
    promoted: dict[str, Any], path: tuple[Any, ...]
) -> None:
    found = failed(canonical(sealed(with_change(promoted, path))))
    assert found, path
    assert "text" not in {check.name for check in found} and "seal" not in {check.name for check in found}


def test_a_fault_that_was_left_out_is_missed(texts: dict[str, str]) -> None:
    document = json.loads(texts["under_a_fault"])
    document["verdict"]["evidence"]["judgement"]["open_faults"] = []
    assert [check.name for check in failed(canonical(sealed(document)))] == ["decision", "numbers"]


def test_a_pair_that_was_left_out_is_missed(promoted: dict[str, Any]) -> None:
    document = copy.deepcopy(promoted)
    document["slices"] = [row for row in document["slices"] if row["pair_index"] != 4]
    names = {check.name for check in failed(canonical(sealed(document)))}
    assert {"order", "numbers"} <= names


def test_an_earlier_promotion_cannot_be_made_up_for_a_higher_level(texts: dict[str, str]) -> None:
    document = json.loads(texts["nothing"])
    assert [spend["is_rejection"] for spend in document["stream"]] == [True, False, False]
    document["stream"][1]["is_rejection"] = True
    names = [check.name for check in failed(canonical(sealed(document)))]
    assert names == ["level"]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_changed_byte_is_detected(texts: dict[str, str], data: st.DataObject) -> None:
    raw = bytearray(texts["stopped"].encode())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    try:
        text = raw.decode()
        document = json.loads(text)
    except ValueError:
        return  # `read_evidence` refuses it
    if not isinstance(document, dict) or document.get("format") != "tuner-evidence":
        return  # it is foreign
    assert any(not check.passed for check in verify(text, document))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_part_of_another_kind_fails_its_checks_and_breaks_none(
    promoted: dict[str, Any], data: st.DataObject
) -> None:
    path = data.draw(st.sampled_from([p for p in leaves(promoted) if p[0] != "seal"]))
    depth = data.draw(st.integers(1, len(path)))
    junk: Any = data.draw(st.sampled_from([None, [], {}, "x", 1e308, -1, True, [[]], {"a": None}]))
    document = copy.deepcopy(promoted)
    part: Any = document
    for key in path[: depth - 1]:
        part = part[key]
    if part[path[depth - 1]] == junk:
        return
    part[path[depth - 1]] = junk
    checks = verify(canonical(document), document)
    assert any(not check.passed for check in checks)
    assert len(checks) == 11


def test_what_differs_is_told_with_both_values(promoted: dict[str, Any]) -> None:
    document = copy.deepcopy(promoted)
    document["verdict"]["p_value"] = 0.5
    told = {check.name: check.detail for check in failed(canonical(document))}
    assert told["seal"] == "`verdict.p_value` was changed"
    assert "`verdict.p_value` is 0.5, but 0.000" in told["numbers"]


def test_spaces_that_were_added_are_told_with_their_line(texts: dict[str, str]) -> None:
    lines = texts["promoted"].splitlines(keepends=True)
    found = failed("".join([*lines[:6], " ", *lines[6:]]))
    assert [(check.name, "from line 7 on" in check.detail) for check in found] == [("text", True)]


# --- files that are none ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"{" * 200_000, "is not JSON"),
        (b"[1, 2]", "is not evidence of a verdict"),
        (b"knobs:\n  start: {}\n", "is not JSON"),
        (b'{"knobs": {"start": {}}, "evidence": {}}', "is not evidence of a verdict"),
        (b'{"format": "tuner-evidence"}', "has no version"),
        (b'{"format": "tuner-evidence", "evidence_schema_version": "1"}', "has no version"),
        (b'{"format": "tuner-evidence", "evidence_schema_version": true}', "has no version"),
        (b'{"format": "tuner-evidence", "evidence_schema_version": 99}', "has form 99, but this version"),
    ],
)
def test_a_file_that_is_no_evidence_is_refused(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "evidence.json"
    path.write_bytes(content)
    with pytest.raises(EvidenceUnreadable, match=told) as caught:
        read_evidence(path)
    assert caught.value.exit_code == 65


def test_a_file_that_is_not_there_is_a_wrong_argument(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(SettingsError, match="cannot be read") as caught:
            read_evidence(path)
        assert caught.value.exit_code == 2


def test_a_document_with_nothing_in_it_fails_every_check() -> None:
    document = {"format": "tuner-evidence", "evidence_schema_version": EVIDENCE_SCHEMA_VERSION}
    text = canonical(document)
    assert [check.name for check in verify(text, document) if check.passed] == ["text"]


def test_without_a_verdict_there_is_nothing_to_export(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        begin(store)
        with (
            store.journal() as journal,
            pytest.raises(UnknownRow, match="No experiment has come to a verdict"),
        ):
            export_evidence(journal, None, "0.1.0")
        with store.journal() as journal, pytest.raises(UnknownRow, match="No experiment has the id 'x'"):
            export_evidence(journal, "x", "0.1.0")


def test_the_last_promotion_is_exported_unless_another_is_named(tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        snapshot_id = begin(store)
        add_test(store, snapshot_id, "t1")
        add_test(store, snapshot_id, "t2", shift=0.3, seed=2)
        with store.journal() as journal:
            newest = json.loads(export_evidence(journal, None, "0.1.0"))
    assert newest["experiment"]["experiment_id"] == "t1"
