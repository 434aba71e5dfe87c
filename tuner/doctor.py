"""`tuner doctor`: what would keep `tuner run` from working here, each with what to do about it."""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MIN_PYTHON = (3, 11)
MIN_FREE_BYTES = 1_000_000_000
OWN_PACKAGES = ("runtime", "store", "tuner")
DISTRIBUTIONS = (
    "torch",
    "transformers",
    "optuna",
    "sqlalchemy",
    "prophet",
    "streamlit",
    "nvidia-ml-py",
    "psutil",
)


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    detail: str


def examine(config: Path | None, data_dir: Path | None) -> list[Check]:
    """Runs every check; one that fails to run is a check that failed."""
    from tuner.settings import load_settings

    checks = [
        guarded("python", check_python),
        guarded("packages", check_packages),
        guarded("names", check_names),
    ]
    try:
        settings = load_settings(config, flags={} if data_dir is None else {"data_dir": data_dir})
    except Exception as error:
        return [*checks, Check("settings", False, str(error))]
    checks.append(
        Check("settings", True, f"{config or 'defaults'}; mode {settings.mode}, store in {settings.data_dir}")
    )
    checks += [
        guarded("model", lambda: check_model(Path(settings.model.location))),
        guarded("port", lambda: check_port(settings.server.host, settings.server.port)),
        guarded("disk", lambda: check_disk(settings.data_dir)),
        guarded("store", lambda: check_store(settings.data_dir)),
        guarded("gpu", check_gpu),
    ]
    return checks


def guarded(name: str, check: Callable[[], tuple[bool, str]]) -> Check:
    try:
        passed, detail = check()
    except Exception as error:  # a doctor must not die of the disease
        return Check(name, False, f"{type(error).__name__}: {error}")
    return Check(name, passed, detail)


def check_python() -> tuple[bool, str]:
    found = ".".join(map(str, sys.version_info[:3]))
    return sys.version_info >= MIN_PYTHON, f"Python {found} (3.11 or newer is needed)"


def check_packages() -> tuple[bool, str]:
    versions, missing = [], []
    for name in DISTRIBUTIONS:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return (
            False,
            f"missing: {', '.join(missing)}. Run `make setup`, or pip install -e . -c constraints.txt.",
        )
    return True, ", ".join(versions)


def check_names() -> tuple[bool, str]:
    """The four import names are common words: another distribution of that name would be imported instead."""
    home = Path(__file__).resolve().parent.parent
    for name in OWN_PACKAGES:
        found = importlib.util.find_spec(name)
        origin = Path(found.origin).resolve() if found is not None and found.origin else None
        if origin is None or home not in origin.parents:
            return (
                False,
                f"`import {name}` finds {origin}, not this project's. Use an environment of its own.",
            )
    return True, "runtime, store and tuner are this project's"


def check_model(folder: Path) -> tuple[bool, str]:
    if not folder.is_dir():
        return (
            False,
            f"{folder} is not a folder. Give `model.path` a folder with config.json and *.safetensors.",
        )
    config = folder / "config.json"
    if not config.exists():
        return False, f"{folder} has no config.json."
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        return False, f"{folder} has no *.safetensors file."
    architecture = json.loads(config.read_text()).get("architectures", ["unknown"])[0]
    size = sum(path.stat().st_size for path in weights)
    return True, f"{architecture}, {size / 1e6:.1f} MB in {len(weights)} file(s)"


def check_port(host: str, port: int) -> tuple[bool, str]:
    if port == 0:
        return True, "any free one"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return (
                False,
                f"{host}:{port} is in use ({error.strerror}); a running tuner, or choose another with --port.",
            )
    return True, f"{host}:{port} is free"


def check_disk(data_dir: Path) -> tuple[bool, str]:
    folder = data_dir
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        return False, f"{folder} cannot be written; choose another data_dir."
    free = shutil.disk_usage(folder).free
    return free > MIN_FREE_BYTES, f"{free / 1e9:.1f} GB free at {folder} (1 GB is wanted)"


def check_store(data_dir: Path) -> tuple[bool, str]:
    from store.connection import sqlite_library
    from store.database import StoreReader
    from store.errors import NoStore

    try:
        with StoreReader(data_dir).journal():
            pass
    except NoStore:
        return True, f"none yet in {data_dir}; {sqlite_library()}"
    return True, f"readable in {data_dir}; {sqlite_library()}"


def check_gpu() -> tuple[bool, str]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return True, f"none ({error}); the CPU serves"
    names = [
        str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(i)))
        for i in range(pynvml.nvmlDeviceGetCount())
    ]
    return True, ", ".join(names)
