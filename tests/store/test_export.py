from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from store.database import Store
from store.errors import BadExport, UnknownRow
from store.export import Proof, export_yaml, proof_of_champion, read_export
from store.tables import Champion, Change, Config, RequestTiming, Snapshot
from tests.store.story import NEW, NEW_VALUES, OLD, OLD_VALUES, SNAPSHOT, T0
from tuner.settings import load_settings
from tuner.settings_file import read_settings_file

GOLDEN = Path(__file__).parent / "golden" / "export.yaml"


def proof_in(store: Store) -> Proof:
    with store.journal() as journal, store.metrics() as metrics:
        return proof_of_champion(journal, metrics)


def test_the_story_is_exported_as_in_the_golden_file(told: Store) -> None:
    """To change the format: write the text below into the golden file, and read the difference."""
    text = export_yaml(proof_in(told), "0.1.0")
    assert text == GOLDEN.read_text(), text


def test_the_same_rows_give_the_same_text_whatever_the_order_of_their_keys(told: Store) -> None:
    before = export_yaml(proof_in(told), "0.1.0")
    with told.journal() as session:
        for row in session.query(Config):
            row.values = dict(reversed(row.values.items()))
        snapshot = session.query(Snapshot).one()
        snapshot.hardware, snapshot.model = (
            dict(reversed(snapshot.hardware.items())),
            dict(reversed(snapshot.model.items())),
        )
    assert export_yaml(proof_in(told), "0.1.0") == before


def test_the_burn_in_is_not_in_the_percentiles(told: Store) -> None:
    proof = proof_in(told)
    assert proof.before is not None and proof.after is not None and proof.before.e2e is not None
    assert proof.before.num == proof.after.num == 35
    assert proof.before.e2e.p99 < 3.0, "each slice began with two requests of 50 s"


def test_where_the_model_lay_is_not_told(told: Store) -> None:
    with told.journal() as session:
        row = session.query(Snapshot).one()
        row.model = row.model | {"path": "/home/ada/models/demo"}
    assert "ada/models" not in export_yaml(proof_in(told), "0.1.0")


def test_without_the_metrics_file_the_percentiles_are_absent(told: Store) -> None:
    with told.journal() as journal:
        found = read_export(export_yaml(proof_of_champion(journal, None), "0.1.0"))
    assert "requests" not in found.evidence
    assert found.evidence["proven"] is True
    with told.metrics() as session:
        session.query(RequestTiming).delete()
    assert "requests" not in read_export(export_yaml(proof_in(told), "0.1.0")).evidence


def test_a_champion_that_nothing_proved_says_so(told: Store) -> None:
    with told.journal() as session:
        session.add(Config("cccc", T0, 1, OLD_VALUES))
        session.add(
            Change(
                SNAPSHOT, "person", NEW, "cccc", T0 + 500, "Asked for by ada.", "APPLIED", applied_at=T0 + 500
            )
        )
        session.flush()
        session.add(Champion(SNAPSHOT, "cccc", T0 + 500, change_id=3))
    text = export_yaml(proof_in(told), "0.1.0")
    found = read_export(text)
    assert "# Not proven.\n# Provisional: no experiment on live traffic" in text
    assert (found.config_id, found.evidence["proven"]) == ("cccc", False)
    assert found.evidence["change"] == {
        "kind": "person",
        "from_config_id": NEW,
        "reason": "Asked for by ada.",
    }
    assert {"verdict", "requests", "holdback"}.isdisjoint(found.evidence)


def test_a_rollback_to_a_proven_configuration_keeps_its_proof(told: Store) -> None:
    with told.journal() as session:
        session.add(
            Change(
                SNAPSHOT, "rollback", "cccc", NEW, T0 + 600, "p95 breached.", "APPLIED", applied_at=T0 + 600
            )
        )
        session.add(Config("cccc", T0, 1, OLD_VALUES))
        session.add(Champion(SNAPSHOT, NEW, T0 + 600, change_id=3))
    proof = proof_in(told)
    assert proof.is_proven and proof.change is not None and proof.change.kind == "promote"


def test_an_empty_store_has_nothing_to_export(store: Store) -> None:
    with pytest.raises(UnknownRow, match="There is no champion to export yet"):
        proof_in(store)


def test_a_champion_of_another_model_is_exported_when_it_is_named(told: Store) -> None:
    with told.journal() as session:
        session.add(Snapshot("snap-2", T0 + 900, {"name": "other"}, {}, {}, 1, []))
        session.add(Champion("snap-2", OLD, T0 + 900))
    with told.journal() as journal:
        assert proof_of_champion(journal, None).config.config_id == OLD
        assert proof_of_champion(journal, None, SNAPSHOT).config.config_id == NEW


# --- reading back ---------------------------------------------------------------------------------

names = st.text(
    st.characters(min_codepoint=33, max_codepoint=0x2FFF, exclude_categories=["C", "Z"]),
    min_size=1,
    max_size=12,
)
knob_values = st.one_of(
    st.integers(-(2**62), 2**62),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.sampled_from(
        ["on", "off", "null", "1e3", "0x10", "2024-01-01", "~", "a: b", "# x", "*a", "&b", "line\nbreak", ""]
    ),
    names,
)


def unproven(values: dict[str, Any]) -> Proof:
    snapshot = Snapshot("s", T0, {"name": "m"}, {}, {}, 1, [])
    return Proof(Config("c", T0, 1, values), snapshot, None, None, None, None, ())


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(names, knob_values, max_size=8))
def test_every_value_of_every_knob_is_read_back_as_it_was(tmp_path: Path, values: dict[str, Any]) -> None:
    text = export_yaml(unproven(values), "0.1.0")
    found = read_export(text)
    assert found.values == values
    assert {name: type(value) for name, value in found.values.items()} == {
        name: type(value) for name, value in values.items()
    }
    path = tmp_path / "exported.yaml"
    path.write_text(text, encoding="utf-8")
    assert read_settings_file(path)["knobs"]["start"] == values, (
        "the reader of settings is stricter than YAML"
    )


def test_the_exported_file_is_one_to_start_with(told: Store, tmp_path: Path) -> None:
    path = tmp_path / "exported.yaml"
    path.write_text(export_yaml(proof_in(told), "0.1.0"), encoding="utf-8")
    settings = load_settings(path, environ={})
    assert settings.knobs.start == NEW_VALUES
    assert settings.evidence is not None and settings.evidence["config_id"] == NEW


def test_numbers_that_repeat_are_written_out(told: Store) -> None:
    shared = [0.5, 0.5]
    assert "*" not in export_yaml(unproven({"a": shared, "b": shared}), "0.1.0")


def test_the_knobs_of_the_story_are_read_back(told: Store) -> None:
    found = read_export(export_yaml(proof_in(told), "0.1.0"))
    assert (found.values, found.config_id, found.knob_schema_version) == (NEW_VALUES, NEW, 1)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "knobs: {}", "knobs: {start: {}}", "knobs: {start: 3}\nevidence: {}", "a: b: c", "\x00"],
)
def test_a_text_that_is_something_else_is_refused(text: str) -> None:
    with pytest.raises(BadExport, match=r"holds `knobs.start` and `evidence`, but got"):
        read_export(text)


def test_a_newer_export_is_refused() -> None:
    body = yaml.safe_load(export_yaml(unproven({}), "0.1.0"))
    body["evidence"]["schema_version"] = 2
    with pytest.raises(BadExport, match="has schema 2, but this version reads up to 1"):
        read_export(yaml.safe_dump(body))
