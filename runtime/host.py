"""What this machine has: cores, and memory that is free. No torch."""

import contextlib
import os
import platform
from pathlib import Path

import psutil


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    if (info := Path("/proc/cpuinfo")).is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def free_memory_bytes() -> int:
    """Memory that can still be taken here: what the system has, or the control group's limit allows."""
    free: int = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    with contextlib.suppress(OSError, ValueError):  # no control group, or its limit is "max"
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return max(0, free)
