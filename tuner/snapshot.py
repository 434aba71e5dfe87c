"""Who runs on what: the rows that every later decision refers to."""

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from runtime.clock import Clock
from runtime.knobs import KNOB_SCHEMA_VERSION, KNOBS, EngineConfig, default_config
from store.database import Store
from store.tables import Run, Snapshot
from tuner import __version__
from tuner.settings import Settings


def initial_config(settings: Settings, identity: Mapping[str, Any]) -> EngineConfig:
    hardware = identity["hardware"]
    default = default_config(hardware["device"], hardware["num_cores"], identity.get("fitted_knobs"))
    return default.patched(settings.knobs.start)


def record_snapshot(store: Store, identity: Mapping[str, Any], now: float) -> str:
    """Model, hardware and versions by their hash: a champion proven on others is not inherited."""
    parts = {key: identity[key] for key in ("model", "hardware", "versions")}
    parts["model"] = {
        key: value for key, value in parts["model"].items() if key != "path"
    }  # a moved folder is the same model
    text = json.dumps([KNOB_SCHEMA_VERSION, parts], sort_keys=True)
    snapshot_id = hashlib.sha256(text.encode()).hexdigest()[:16]
    with store.journal() as session:
        if session.get(Snapshot, snapshot_id) is None:
            session.add(
                Snapshot(
                    snapshot_id,
                    now,
                    dict(identity["model"]),
                    dict(identity["hardware"]),
                    dict(identity["versions"]),
                    KNOB_SCHEMA_VERSION,
                    [
                        asdict(knob) for knob in KNOBS
                    ],  # unit, help and apply mode: what readers explain knobs by
                )
            )
    return snapshot_id


def record_run(store: Store, settings: Settings, now: float) -> str:
    run_id = secrets.token_hex(8)
    with store.journal() as session:
        session.add(
            Run(run_id, now, os.getpid(), __version__, settings.model_dump(mode="json"), settings.mode)
        )
    return run_id


def end_run(store: Store, run_id: str, clock: Clock) -> None:
    with store.journal() as session:
        row = session.get(Run, run_id)
        assert row is not None, "the run was recorded at its start"
        row.ended_at, row.end_reason = clock.now(), "asked to stop"
