"""Has the engine make a challenger ready beside serving, before its first slice, without holding up the tick.

    asked ──thread──▶ READY | FAILED (PrepareFailed, InvalidKnob: the challenger cannot be) | asked again (no answer)

What the answer was holds for one start of the engine: another has prepared nothing. A switch may cost the prefix
cache what it holds, and which arm pays decides whether a comparison is fair:

- `weight_format`: what other weights computed is never found, so each arm has its own prefixes in one pool and
  finds them again at its next slice, as far as they were not evicted.
- `prefix_cache`: the arm without it neither looks up nor registers; the other arm's prefixes stay, as far as free
  blocks allow, until a champion without the cache is committed.
- `kv_tokens`, `kv_block`, `kv_dtype`: cached prefixes that nobody holds stay behind at every switch, for both arms
  alike. The burn-in of each slice covers the re-warming, and the journal says so.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from runtime.errors import InvalidKnob, PrepareFailed, RuntimeFault
from runtime.knobs import ApplyMode, EngineConfig, knob_named

logger = logging.getLogger(__name__)

RETRY_S = 5.0
POOL_KNOBS = {"kv_tokens", "kv_block", "kv_dtype"}
NEEDS_PREPARING = (ApplyMode.WARM, ApplyMode.COLD)

Answer = dict[str, Any]
Start = Callable[[Callable[[], Answer]], "Future[Answer]"]


class PreparingControl(Protocol):
    def prepare(self, values: Mapping[str, Any]) -> Answer: ...


@dataclass(frozen=True)
class Readiness:
    """`words`: what is to be told of it, once."""

    state: Literal["ready", "waiting", "failed"]
    words: str = ""


def in_thread(work: Callable[[], Answer]) -> "Future[Answer]":
    """Runs it in a thread that does not keep the daemon from ending."""
    answer: Future[Answer] = Future()

    def run() -> None:
        try:
            answer.set_result(work())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, name="prepare-challenger", daemon=True).start()
    return answer


def warm_changes(challenger: EngineConfig, champion: EngineConfig) -> list[str]:
    """The knobs between the two that need preparing."""
    return [name for name in challenger.changes_from(champion) if knob_named(name).apply in NEEDS_PREPARING]


def told_prepared(answer: Answer, changed: list[str]) -> str:
    mebibytes = answer["extra_bytes"] / 2**20
    words = f"Prepared beside serving in {answer['prepare_s']:.2f} s; it holds {mebibytes:.1f} MiB more."
    if not POOL_KNOBS.isdisjoint(changed):
        words += (
            " Each switch of the pool drops idle cached prefixes in both arms: the burn-in covers re-warming."
        )
    return words


class Preparation:
    """The one challenger that is being made ready."""

    def __init__(self, control: PreparingControl, start: Start = in_thread) -> None:
        self._control, self._start = control, start
        self._key: tuple[str, str, int] | None = None
        self._answer: Future[Answer] | None = None
        self._is_ready = False
        self._retry_at = 0.0

    def look(
        self, challenger: EngineConfig, champion: EngineConfig, state: Mapping[str, Any], now: float
    ) -> Readiness:
        """Where it stands now; asks the engine at the first look and after an answer that never came."""
        changed = warm_changes(challenger, champion)
        if not changed:
            return Readiness("ready")
        key = (challenger.config_id, state["boot_id"], state["num_engine_restarts"])
        if key != self._key:
            self._key, self._answer, self._is_ready, self._retry_at = key, None, False, 0.0
        if self._is_ready:
            return Readiness("ready")
        if self._answer is None:
            if now < self._retry_at:
                return Readiness("waiting")
            values = challenger.values()
            self._answer = self._start(lambda: self._control.prepare(values))
            if not self._answer.done():
                return Readiness("waiting", f"Preparing {', '.join(changed)} beside serving.")
        if not self._answer.done():
            return Readiness("waiting")
        answer, self._answer = self._answer, None
        try:
            told = answer.result()
        except (PrepareFailed, InvalidKnob) as error:
            self._key = None
            return Readiness("failed", str(error))
        except RuntimeFault as error:
            logger.warning("The engine did not answer on preparing: %s", error)
            self._retry_at = now + RETRY_S
            return Readiness("waiting")
        self._is_ready = True
        return Readiness("ready", told_prepared(told, changed))

    def forget(self) -> None:
        """The engine says that it has not prepared it (any more)."""
        self._key = None
