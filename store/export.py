"""The proven configuration as text, in the form that the next server reads, with why anybody should use it."""

from collections.abc import Callable

from store.errors import BadExport
from store.export_env import export_env
from store.export_json import export_json
from store.export_sglang import export_sglang
from store.export_vllm import export_vllm
from store.export_yaml import ExportedConfig as ExportedConfig
from store.export_yaml import export_yaml as export_yaml
from store.export_yaml import read_export as read_export
from store.proof import Proof as Proof
from store.proof import proof_of_champion as proof_of_champion
from store.proof_words import evidence as evidence

FORMATS: dict[str, Callable[[Proof, str], str]] = {
    "yaml": export_yaml,
    "json": export_json,
    "vllm": export_vllm,
    "sglang": export_sglang,
    "env": export_env,
}


def export_as(format: str, proof: Proof, tuner_version: str) -> str:
    """Raises BadExport for a format that is not one of `FORMATS`."""
    if format not in FORMATS:
        raise BadExport(f"An export is one of {', '.join(FORMATS)}, but got {format!r}.")
    return FORMATS[format](proof, tuner_version)
