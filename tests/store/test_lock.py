import subprocess
import sys
from pathlib import Path

import pytest

from store.errors import StoreLocked
from store.lock import DataDirLock, holder_pid

HOLD = """
import sys, time
from pathlib import Path
from store.lock import DataDirLock
DataDirLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_a_lock_is_free_again_after_its_block(tmp_path: Path) -> None:
    with DataDirLock(tmp_path), pytest.raises(StoreLocked):
        DataDirLock(tmp_path).acquire()
    with DataDirLock(tmp_path):
        pass


def test_the_lock_of_a_killed_process_is_free_and_names_the_next_holder(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with pytest.raises(StoreLocked, match=f"is written by process {process.pid}; only one may") as caught:
            DataDirLock(tmp_path).acquire()
        assert caught.value.pid == process.pid == holder_pid(tmp_path)
    finally:
        process.kill()
        process.communicate()
    with DataDirLock(tmp_path):
        assert holder_pid(tmp_path) != process.pid


def test_nobody_holds_a_folder_without_a_lock_file(tmp_path: Path) -> None:
    assert holder_pid(tmp_path) is None
    (tmp_path / "daemon.lock").write_text("")
    assert holder_pid(tmp_path) is None
