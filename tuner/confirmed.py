"""What the plain file `last_good.json` knows that the journal does not: the journal lost its end, or all of it."""

import logging
import os

from runtime.errors import InvalidKnob
from runtime.knobs import EngineConfig
from store import decisions
from store.database import Store
from store.errors import DamagedStore
from store.last_good import LAST_GOOD_FILE, LastGood, read_last_good

logger = logging.getLogger(__name__)

LOST_REASON = "The journal is older than the last confirmed configuration, which last_good.json names."


def confirmed_config(store: Store, snapshot_id: str) -> EngineConfig | None:
    """The configuration that was confirmed last on this snapshot, where the journal has another or none; else None.

    Every champion stands in the journal before it is written to the file, so a file that is ahead means loss.
    """
    last_good = last_good_or_none(store)
    if last_good is None or last_good.snapshot_id != snapshot_id:
        return None
    with store.journal() as session:
        champion = decisions.latest_champion(session, snapshot_id)
    if champion is not None and (
        champion.config_id == last_good.config_id or champion.since_at >= last_good.at
    ):
        return None
    try:
        return EngineConfig.of(last_good.values)
    except InvalidKnob as error:  # written by a version whose knobs were others
        logger.warning("The last confirmed configuration does not fit this version: %s", error)
        return None


def last_good_or_none(store: Store) -> LastGood | None:
    """As `read_last_good`; a damaged file is set aside, so that it is told once and serving starts all the same."""
    try:
        return read_last_good(store.data_dir)
    except DamagedStore as error:
        path = store.data_dir / LAST_GOOD_FILE
        logger.error("%s", error)
        os.replace(path, path.with_name(path.name + ".damaged"))
        return None
