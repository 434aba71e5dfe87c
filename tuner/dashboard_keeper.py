"""Keeps a dashboard beside the daemon: started, watched, started again when it died. Never a reason to fail."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from tuner.dashboard_process import DashboardProcess, start_or_adopt
from tuner.errors import PortInUse, Unavailable

logger = logging.getLogger(__name__)

MAX_DEATHS = 5
DEATH_WINDOW_S = 600.0
MAX_BACKOFF_S = 60.0


class DashboardKeeper:
    """`clock` is of monotonic seconds; `start` is how a dashboard comes to be."""

    def __init__(
        self,
        data_dir: Path,
        port: int,
        clock: Callable[[], float] = time.monotonic,
        start: Callable[[Path, int], DashboardProcess] = start_or_adopt,
    ) -> None:
        self._data_dir, self._port, self._clock, self._start_one = data_dir, port, clock, start
        self._process: DashboardProcess | None = None
        self._deaths_s: list[float] = []
        self._next_start_s: float | None = None  # None: it runs, or nobody tries any more

    @property
    def url(self) -> str | None:
        return self._process.url if self._process is not None else None

    def start(self) -> None:
        """Takes over the one that runs, or starts one; what keeps it from starting is logged."""
        self._next_start_s = None
        try:
            try:
                self._process = self._start_one(self._data_dir, self._port)
            except PortInUse:
                self._process = self._start_one(self._data_dir, 0)
        except (Unavailable, OSError) as error:
            logger.warning("No dashboard: %s", error)
            return
        self._port = urlsplit(self._process.url).port or self._port  # where people have it open
        logger.info("Dashboard at %s (process %d)", self._process.url, self._process.pid)

    def check(self) -> str | None:
        """Once a tick. Returns what happened, in words, if something did."""
        now_s = self._clock()
        if self._process is not None and not self._process.is_running:
            self._process = None
            self._deaths_s = [at_s for at_s in self._deaths_s if now_s - at_s < DEATH_WINDOW_S] + [now_s]
            num = len(self._deaths_s)
            if num > MAX_DEATHS:
                often = f"{num} times in {DEATH_WINDOW_S / 60:g} minutes"
                return f"The dashboard ended {often}; it is not started any more."
            backoff_s = min(MAX_BACKOFF_S, 2.0 ** (num - 1))
            self._next_start_s = now_s + backoff_s
            return f"The dashboard ended; it is started again in {backoff_s:g} s."
        if self._next_start_s is not None and now_s >= self._next_start_s:
            self.start()
            return f"The dashboard runs again at {self.url}." if self.url is not None else None
        return None

    def left_running(self) -> str:
        """For a person who ends the daemon without ceremony."""
        if self._process is None or not self._process.is_running:
            return ""
        return f"The dashboard (pid {self._process.pid}) goes on at {self._process.url}."

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop(self._data_dir)
