"""Runs a module as a child that dies with its parent: python -m runtime.child PARENT_PID MODULE ARGS...

The kernel is asked to kill this process when its parent ends (PR_SET_PDEATHSIG), before the module is loaded.
Done here and not between fork and exec, where a threaded parent must not run Python.
"""

import ctypes
import os
import runpy
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1  # Source: linux/prctl.h


def python_path() -> str:
    """PYTHONPATH for children, wherever they are started: this package first."""
    root = str(Path(__file__).resolve().parent.parent)
    return os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))


def main() -> None:
    parent_pid, module = int(sys.argv[1]), sys.argv[2]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it ended before the kernel was asked
        os._exit(1)
    sys.argv = sys.argv[2:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
