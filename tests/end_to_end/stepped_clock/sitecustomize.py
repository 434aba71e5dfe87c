"""A system clock that tests can set: the folder on PYTHONPATH, a file of seconds in TUNER_TEST_CLOCK_FILE.

Every process started so reads its wall clock through here, and CLOCK_MONOTONIC as it is, as after `date --set`.
"""

import os
import time

_PATH = os.environ.get("TUNER_TEST_CLOCK_FILE", "")
_time = time.time


def _shift_s() -> float:
    try:
        with open(_PATH) as file:
            return float(file.read() or 0.0)
    except (OSError, ValueError):
        return 0.0


def _stepped() -> float:
    return _time() + _shift_s()


if _PATH:
    time.time = _stepped
