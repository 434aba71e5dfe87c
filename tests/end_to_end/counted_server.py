"""The serving process, which says on SIGUSR1 how many tasks its event loop has.

    python -m tests.end_to_end.counted_server --model ...

The arguments are those of `runtime.server`; the answer goes into `tasks.json` in the folder that COUNTED_IN names.
"""

import asyncio
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from types import FrameType

from runtime.server import main


def tell(number: int, frame: FrameType | None) -> None:
    """Runs in the thread of the loop, between two of its callbacks."""
    names = Counter(str(getattr(task.get_coro(), "__qualname__", task)) for task in asyncio.all_tasks())
    folder = Path(os.environ["COUNTED_IN"])
    (folder / "tasks.new").write_text(json.dumps(names))
    (folder / "tasks.new").rename(folder / "tasks.json")


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, tell)
    sys.exit(main())
