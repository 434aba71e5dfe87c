"""Rows that several stages write in the same words: configurations and the story."""

from typing import Any, Protocol

from runtime.knobs import KNOB_SCHEMA_VERSION, EngineConfig
from store.tables import Config, Note


class Session(Protocol):
    """What a stage needs of a session besides the named queries."""

    def add(self, row: Any) -> None: ...
    def get(self, table: Any, key: Any) -> Any: ...
    def merge(self, row: Any) -> Any: ...


def ensure_config(session: Session, config: EngineConfig, now: float) -> None:
    """A configuration's row stands before anything refers to it, and names every knob.

    One that an earlier version wrote lacks the later knobs. Its id says that they are at their defaults.
    """
    row, values = session.get(Config, config.config_id), config.values()
    if row is None:
        session.add(Config(config.config_id, now, KNOB_SCHEMA_VERSION, values))
    elif row.values.keys() < values.keys():
        row.values = values


def tell(session: Session, now: float, stage: str, text: str, details: dict[str, Any] | None = None) -> None:
    """Adds a line to the story that `tuner history` and the live view show."""
    session.add(Note(now, stage, text, details or {}))
