"""What `tuner run` waits for before it shows anything."""

import os
import sys
import threading
import time
from pathlib import Path

import pytest

from tuner.errors import Unavailable
from tuner.run import told_by

WRITES = "import os; print('warming up'); print('{\"requests_per_s\": %s}' % os.environ['RATE'])"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_the_last_line_of_a_command_is_what_it_found() -> None:
    assert told_by(python(WRITES), 60.0, os.environ | {"RATE": "2.5"}, threading.Event()) == {
        "requests_per_s": 2.5
    }


def test_a_command_that_fails_says_why() -> None:
    fails = "import sys; sys.exit('warm\\nno server answers')"
    with pytest.raises(Unavailable, match=r"could not be measured: no server answers$"):
        told_by(python(fails), 60.0, os.environ, threading.Event())


def test_a_command_that_does_not_end_is_ended() -> None:
    with pytest.raises(Unavailable, match=r"it did not end within 0\.2 s$"):
        told_by(python("import time; time.sleep(600)"), 0.2, os.environ, threading.Event())


def test_a_command_is_ended_when_we_are_to_stop(tmp_path: Path) -> None:
    begun, stop = tmp_path / "pid", threading.Event()
    waits = f"import os, time, pathlib; pathlib.Path({str(begun)!r}).write_text(str(os.getpid())); time.sleep(600)"

    def stop_when_begun() -> None:
        while not begun.exists() or not begun.read_text():
            time.sleep(0.01)
        stop.set()

    stopper = threading.Thread(target=stop_when_begun)
    stopper.start()
    assert told_by(python(waits), 60.0, os.environ, stop) is None
    stopper.join()
    pid = int(begun.read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
