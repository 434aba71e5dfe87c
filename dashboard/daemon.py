"""The dashboard's view of the daemon: its status, and a person's wishes, over the daemon's own API on loopback.

Address and key stand in the data folder. With the operator's key a person may act; with the viewer's only look.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx

Role = Literal["viewer", "operator"]

ADDRESS_FILE = "daemon.json"
KEY_FILES: dict[Role, str] = {"operator": "daemon.key", "viewer": "viewer.key"}
ROLE_VARIABLE = "TUNER_DASHBOARD_ROLE"
LOOPBACK = re.compile(r"http://127\.0\.0\.1:\d{1,5}")  # the key is sent nowhere else, whatever the file says
STATUS_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 35.0  # the daemon itself gives up after 30


@dataclass(frozen=True)
class DaemonStatus:
    """What the daemon said of itself, or why it said nothing."""

    is_running: bool
    why_not: str = ""
    role: Role | None = None
    doing: str = ""
    mode: str = ""
    engine: str = "unknown"
    model: str = ""
    api_url: str = ""
    is_paused: bool = False
    failures: Mapping[str, int] = field(default_factory=dict)

    @property
    def why_not_act(self) -> str:
        """Why nobody may act here; empty where one may."""
        if not self.is_running:
            return "The daemon is not running, and only the daemon acts. Start it with `tuner run`."
        if self.role != "operator":
            return (
                "This dashboard was started as a viewer: it may look and not act. Start it with "
                "`tuner dashboard` from an account that can read daemon.key."
            )
        return ""


@dataclass(frozen=True)
class Answer:
    """What became of a wish. `text` is the daemon's own answer."""

    is_done: bool
    text: str


def key_of(data_dir: Path, role_wanted: str | None = None) -> tuple[Role, str] | None:
    """The best key that can be read: the operator's, unless only the viewer's is wanted or readable."""
    wanted = role_wanted or os.environ.get(ROLE_VARIABLE, "operator")
    roles: tuple[Role, ...] = ("viewer",) if wanted == "viewer" else ("operator", "viewer")
    for role in roles:
        try:
            if key := (data_dir / KEY_FILES[role]).read_text().strip():
                return role, key
        except OSError:
            continue
    return None


def status_of(data_dir: Path) -> DaemonStatus:
    """Never raises: a daemon that does not answer is a state to be shown."""
    try:
        told = _call(data_dir, "GET", "/status", None, STATUS_TIMEOUT_S)
    except NotAnswered as error:
        return DaemonStatus(False, str(error))
    return DaemonStatus(
        True,
        role="operator" if told.get("role") == "operator" else "viewer",
        doing=str(told.get("doing", "")),
        mode=str(told.get("mode", "")),
        engine=str(told.get("engine", "unknown")),
        model=str(told.get("model", "")),
        api_url=str(told.get("api_url", "")),
        is_paused=bool(told.get("is_paused", False)),
        failures={str(name): int(num) for name, num in dict(told.get("num_failures", {})).items()},
    )


def act(data_dir: Path, action: str, arguments: Mapping[str, Any], actor: str) -> Answer:
    """Asks the daemon; waits for its next tick. Never raises: a refusal is an answer too."""
    try:
        body = {**arguments, "actor": actor}
        answer = str(_call(data_dir, "POST", f"/actions/{action}", body, ANSWER_TIMEOUT_S).get("answer", ""))
    except NotAnswered as error:
        return Answer(False, str(error))
    return Answer(not answer.startswith("Refused"), answer)


class NotAnswered(Exception):
    """Raised when the daemon is not there, or does not do what it is asked."""


def _call(
    data_dir: Path, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float
) -> dict[str, Any]:
    try:
        url = str(json.loads((data_dir / ADDRESS_FILE).read_text())["url"])
    except (OSError, ValueError, KeyError, TypeError):
        raise NotAnswered("No daemon runs for this data folder.") from None
    found = key_of(data_dir)
    if found is None:
        raise NotAnswered("Neither daemon.key nor viewer.key of the data folder can be read by this account.")
    if LOOPBACK.fullmatch(url) is None:
        raise NotAnswered("daemon.json names an address that is not on this machine.")
    headers = {"authorization": f"Bearer {found[1]}"}
    try:
        answer = httpx.request(
            method, url + path, json=body, headers=headers, timeout=timeout_s, trust_env=False
        )
        told = answer.json()
    except httpx.HTTPError as error:
        raise NotAnswered(f"The daemon does not answer ({type(error).__name__}).") from None
    except ValueError:
        raise NotAnswered("What answers at the daemon's address is not the daemon.") from None
    if answer.status_code != 200:
        raise NotAnswered(str(told.get("detail", f"The daemon answered {answer.status_code}.")))
    return dict(told)
