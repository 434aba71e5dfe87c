"""The last configuration that was confirmed, as a plain file: what serving starts with when the journal is lost."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from store.errors import DamagedStore

LAST_GOOD_FILE = "last_good.json"


@dataclass(frozen=True)
class LastGood:
    """values: every knob. version: the engine's configuration version. at: UTC epoch seconds."""

    values: dict[str, Any]
    config_id: str
    snapshot_id: str
    version: int
    at: float


def write_last_good(data_dir: Path, last_good: LastGood) -> None:
    """Replaces the file in one step: after a power cut it holds the old content or the new."""
    target = data_dir / LAST_GOOD_FILE
    beside = target.with_suffix(".tmp")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(asdict(last_good), file, indent=2, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, target)
    folder = os.open(data_dir, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def read_last_good(data_dir: Path) -> LastGood | None:
    """Returns None where nothing was confirmed yet.

    Raises:
        DamagedStore: the file cannot be understood.
    """
    path = data_dir / LAST_GOOD_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        told = f"{path} cannot be read ({error}). Remove it to start from the default knobs."
        raise DamagedStore(told, str(path)) from error
    try:
        data = json.loads(text)
        return LastGood(
            dict(data["values"]),
            str(data["config_id"]),
            str(data["snapshot_id"]),
            int(data["version"]),
            float(data["at"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        told = (
            f"{path} is not a last good configuration ({error!r}). Remove it to start from the default knobs."
        )
        raise DamagedStore(told, str(path)) from error
