"""Opens a store whose files may be damaged: what is broken is set aside, and serving goes on.

journal  ▶ newest good backup, else a fresh one        metrics  ▶ a fresh file
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from store.backups import newest_good, put_back
from store.connection import make_private_dir
from store.database import FILE_NAMES, Store, set_aside
from store.errors import DamagedStore, ForeignStore
from store.last_good import LAST_GOOD_FILE
from store.lock import DataDirLock
from store.tables import Which

log = logging.getLogger(__name__)

MAX_TRIES = 6  # two files, a backup that breaks on its way, and the open itself


@dataclass(frozen=True)
class Recovered:
    """What was done about one damaged file. `restored_from` is None where a fresh one was started."""

    which: Which
    why: str
    aside: Path
    restored_from: Path | None

    @property
    def told(self) -> str:
        name = FILE_NAMES[self.which]
        now = f"restored from {self.restored_from.name}" if self.restored_from else "started afresh"
        lost = {
            "journal": "Decisions since then are lost; what was last confirmed goes on serving.",
            "metrics": "What was measured before is lost; no decision is.",
        }[self.which]
        return f"{name} could not be used ({self.why}). It was kept as {self.aside.name} and {now}. {lost}"


def open_store(data_dir: Path, now: float) -> tuple[Store, list[Recovered]]:
    """`Store.open`, which survives damage. Returns what had to be done, in order; usually nothing.

    Raises:
        StoreLocked, NewerStore, ForeignStore, UnsafeFilesystem, StoreUnavailable: as `Store.open`.
    """
    make_private_dir(data_dir)
    recovered: list[Recovered] = []
    if _was_emptied(data_dir):
        why = "it is empty, although decisions were made here before"
        recovered.append(_recover(data_dir, "journal", why, now, recovered))
    for _ in range(MAX_TRIES):
        try:
            return Store.open(data_dir), recovered
        except ForeignStore:
            raise  # a folder of somebody else: nothing of it is touched
        except DamagedStore as error:
            which: Which = "journal" if Path(error.path).name == FILE_NAMES["journal"] else "metrics"
            recovered.append(_recover(data_dir, which, error.what, now + len(recovered), recovered))
    raise DamagedStore(
        f"{data_dir} stays damaged, whatever is put in its place. Is the disk failing?", str(data_dir)
    )


def _recover(data_dir: Path, which: Which, why: str, now: float, earlier: Sequence[Recovered]) -> Recovered:
    lock = DataDirLock(data_dir)
    lock.acquire()  # `Store.open` has given it back, and another may have come meanwhile
    try:
        aside = set_aside(data_dir, which, now)
        tried = [one.restored_from for one in earlier if one.restored_from is not None]
        backup = newest_good(data_dir, without=tried) if which == "journal" else None
        if backup is not None:
            put_back(data_dir, backup)
    finally:
        lock.release()
    found = Recovered(which, why, aside, backup)
    log.error(found.told)
    return found


def _was_emptied(data_dir: Path) -> bool:
    """A journal cut to nothing would pass for a new one. A folder without a journal is one: somebody removed it."""
    journal = data_dir / FILE_NAMES["journal"]
    is_empty = journal.exists() and journal.stat().st_size == 0
    wal = journal.with_name(journal.name + "-wal")
    if not is_empty or (wal.exists() and wal.stat().st_size):
        return False
    return (data_dir / LAST_GOOD_FILE).exists() or newest_good(data_dir) is not None
