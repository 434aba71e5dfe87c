"""Keeps the store small: old metrics become coarser and go, a slice a tick."""

from store.database import FILE_NAMES, Store
from store.retention import Retention, Upkeep
from tuner.rows import tell
from tuner.settings import KeepSettings


class KeepStage:
    """The last stage of a tick."""

    def __init__(self, store: Store, keep: KeepSettings) -> None:
        self._store = store
        retention = Retention(
            keep.raw_s, keep.minutes_s, keep.hours_s, keep.steps_s, keep.timings_s, keep.max_bytes
        )
        self._upkeep = Upkeep(store.metrics, retention, store.data_dir / FILE_NAMES["journal"])

    def step(self, now: float) -> None:
        told = self._upkeep.step(now)
        if told is not None:
            with self._store.journal() as session:
                tell(session, now, "keep", told)
