"""Prepares configurations one after another, in a thread beside the steps.

The step thread asks and polls; only the building itself runs in the other thread, at a low priority where the
system has one for threads (Linux), so that a step never waits for it longer than for one layer. Behind it each poll
captures a little of what steps will replay: one size of rows alone, or a part of one with prompts.
"""

import contextlib
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from runtime.errors import PrepareFailed, RuntimeFault
from runtime.knobs import EngineConfig

if TYPE_CHECKING:  # torch is loaded later, once the engine has set its thread environment
    from runtime.warm import Wanted, WarmStates

log = logging.getLogger(__name__)

MOST_CAPTURES = 256  # of one preparation: sizes that steps go on to meet meanwhile are not waited for
NICENESS = 10
# For which a thread may keep the interpreter where another wants it. Steps give it up at each operation, and would wait
# as long each time for what prepares beside them: Python's own 5 ms.
SWITCH_S = 0.0002


class Prepared(NamedTuple):
    """`prepare_s`: how long this took, 0 where nothing was left to do. `extra_bytes`: what is held for it."""

    config: EngineConfig
    prepare_s: float
    extra_bytes: int


@dataclass(eq=False)
class Preparation:
    """One configuration on its way. `result` is there when it ended."""

    config: EngineConfig
    may_move_in_turn: bool = False
    result: Prepared | RuntimeFault | None = None
    started: float = field(default_factory=time.perf_counter)

    @property
    def is_done(self) -> bool:
        return self.result is not None

    def outcome(self) -> Prepared:
        """Raises PrepareFailed, or whatever else it ended with."""
        assert self.result is not None, "asked before the end"
        if isinstance(self.result, RuntimeFault):
            raise self.result
        return self.result


class Preparer:
    """`in_use`: the configurations whose warm state must not be dropped to make room."""

    def __init__(self, warm: "WarmStates", in_use: Callable[[], Iterable[EngineConfig]]) -> None:
        self._warm, self._in_use = warm, in_use
        self._queue: deque[Preparation] = deque()
        self._thread: threading.Thread | None = None
        self._wanted: Wanted | None = None
        self._is_built, self._num_captures = False, 0  # the first of the queue
        self._made: Any = None  # what `build` returned, or the error that it raised

    @property
    def is_busy(self) -> bool:
        return bool(self._queue)

    def ask(self, config: EngineConfig, may_move_in_turn: bool = False) -> Preparation:
        """Starts or joins the preparation; one for which nothing is missing is done at once.

        Raises:
            InvalidKnob: this machine can never run it.
        """
        self._warm.check(config)
        if self._is_built and self._queue[0].config == config:
            return self._queue[0]
        asked = Preparation(config, may_move_in_turn)
        if self._warm.is_ready(config, may_move_in_turn):
            asked.result = Prepared(config, 0.0, self._warm.extra_bytes(config))
            return asked
        for other in self._queue:
            if other.config == config and other.may_move_in_turn == may_move_in_turn:
                return other
        self._queue.append(asked)
        self.poll()
        return asked

    def poll(self) -> None:
        """Takes in what was built, captures a little for it, and starts what comes next."""
        while self._queue:
            if self._is_built:
                if self._capture_ahead(self._queue[0].config):
                    return
                self._is_built, self._num_captures = False, 0
                self._finish(self._queue.popleft())
            elif self._thread is None:
                if self._start(self._queue[0]):
                    return
                self._queue.popleft()
            elif self._thread.is_alive():
                return
            else:
                self._is_built = self._end(self._queue[0])
                if not self._is_built:
                    self._queue.popleft()

    def _start(self, asked: Preparation) -> bool:
        """False if it ended already: there is nothing left to do, or no room for it."""
        warm = self._warm
        try:
            if warm.is_ready(asked.config, asked.may_move_in_turn):
                self._finish(asked)
                return False
            in_use = [*self._in_use(), *(waiting.config for waiting in self._queue)]
            self._wanted = warm.make_room(warm.missing(asked.config), in_use, asked.may_move_in_turn)
        except PrepareFailed as error:
            asked.result = error
            return False
        self._thread = threading.Thread(target=self._build, args=(self._wanted,), name="prepare", daemon=True)
        self._thread.start()
        return True

    def _build(self, wanted: "Wanted") -> None:
        if sys.platform == "linux":
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        usual_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)
        try:
            self._made = self._warm.build(wanted)
        except RuntimeFault as error:
            self._made = error
        except Exception as error:  # a defect of ours must not leave the caller waiting
            log.exception("a preparation failed")
            self._made = PrepareFailed(f"The configuration could not be prepared: {error!r}.")
        finally:
            sys.setswitchinterval(usual_s)

    def _capture_ahead(self, config: EngineConfig) -> bool:
        """False if that was all."""
        self._num_captures += 1
        try:
            return self._num_captures <= MOST_CAPTURES and self._warm.capture_ahead(config)
        except Exception:  # a defect of ours must not end the steps, which can do without
            log.exception("what steps will replay is not captured for a preparation")
            return False

    def _end(self, asked: Preparation) -> bool:
        """False if it failed."""
        assert self._thread is not None and self._wanted is not None
        self._thread.join()
        made, wanted = self._made, self._wanted
        self._thread = self._wanted = self._made = None
        if isinstance(made, RuntimeFault):
            asked.result = made
            return False
        self._warm.add(wanted, *made)
        return True

    def _finish(self, asked: Preparation) -> None:
        took_s = time.perf_counter() - asked.started
        asked.result = Prepared(asked.config, took_s, self._warm.extra_bytes(asked.config))
        log.info("configuration %s is prepared in %.3f s", asked.config.config_id, took_s)
