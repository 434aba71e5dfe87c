"""JSON: the same as the YAML, for programs."""

import json

from store.proof import Proof
from store.proof_words import body


def export_json(proof: Proof, tuner_version: str) -> str:
    """One document: `knobs.start` and `evidence`. JSON is YAML, so `tuner run --config` reads it too."""
    return json.dumps(body(proof, tuner_version), indent=2, ensure_ascii=False) + "\n"
