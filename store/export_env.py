"""Environment: the knobs as variables that `tuner run` reads, for containers and service managers."""

import shlex

from store.proof import Proof
from store.proof_words import comments


def export_env(proof: Proof, tuner_version: str) -> str:
    """`NAME=value` lines, as a shell, `docker run --env-file` and systemd's EnvironmentFile read them."""
    lines = [
        f"TUNER_KNOBS__START__{name.upper()}={shlex.quote(str(value))}"
        for name, value in sorted(proof.config.values.items())
    ]
    return comments(proof, tuner_version) + "".join(f"{line}\n" for line in lines)
