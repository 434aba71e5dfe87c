"""YAML: what `tuner run --config` starts the next server with, and the evidence beside it.

knobs:
  start: {...}       every knob
evidence: {...}      what proved it, on which model, hardware and traffic; for people and for audits
"""

from dataclasses import dataclass
from typing import Any

import yaml

from store.errors import BadExport
from store.proof import Proof
from store.proof_words import EXPORT_SCHEMA_VERSION, body, comments


def export_yaml(proof: Proof, tuner_version: str) -> str:
    """The configuration with its evidence. An absent measurement is an absent key."""
    text = yaml.dump(
        body(proof, tuner_version), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110
    )
    return comments(proof, tuner_version) + text


class _Dumper(yaml.SafeDumper):
    """Writes repeated values out: settings are read without aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


# --- reading back ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExportedConfig:
    values: dict[str, Any]
    config_id: str
    knob_schema_version: int
    evidence: dict[str, Any]


def read_export(text: str) -> ExportedConfig:
    """Reads what `export_yaml` wrote.

    Raises:
        BadExport: not such a text, or of a newer schema.
    """
    try:
        body = yaml.safe_load(text)
        told = body["evidence"]
        exported = ExportedConfig(
            dict(body["knobs"]["start"]), str(told["config_id"]), int(told["knob_schema_version"]), dict(told)
        )
        schema_version = int(told["schema_version"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise BadExport(
            f"An exported configuration holds `knobs.start` and `evidence`, but got: {error!r}."
        ) from error
    if schema_version > EXPORT_SCHEMA_VERSION:
        raise BadExport(
            f"The export has schema {schema_version}, but this version reads up to {EXPORT_SCHEMA_VERSION}. "
            "Export it again with this version, or upgrade the tuner."
        )
    return exported
