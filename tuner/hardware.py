"""What the host and our processes are doing, through psutil and /proc; the GPUs are in `tuner.nvml`.

Rates come from counters and monotonic time, so a probe's first sample has none.
"""

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from store import metrics
from tuner.nvml import NvmlProbe
from tuner.readings import Probe, Reader, Readings

__all__ = ["HostProbe", "NvmlProbe", "Probe", "ProcessProbe", "Readings", "hardware_identity"]


@dataclass
class HostProbe:
    """Cores, memory, disks and network of the machine. `ps` is psutil; `proc` is where procfs is mounted."""

    data_dir: Path
    ps: Any = psutil
    proc: Path = Path("/proc")
    reader: Reader = field(default_factory=lambda: Reader("host"))
    clocks: Callable[[], "Clocks"] = lambda: Clocks.read()
    _core_times: dict[str, tuple[float, float]] = field(default_factory=dict)
    _stolen: tuple[float, float] | None = None
    _clocks: "Clocks | None" = None

    def sample(self, monotonic_s: float) -> Readings:
        readings: Readings = {}
        self._sample_cores(readings)
        self._sample_clocks(readings)
        gauge, ps = self.reader.gauge, self.ps
        gauge(readings, metrics.LOAD_1M, "", lambda: ps.getloadavg()[0])
        gauge(readings, metrics.RUN_QUEUE, "", lambda: procfs_value(self.proc / "stat", "procs_running"))
        gauge(readings, metrics.SWAP_USED_BYTES, "", lambda: ps.swap_memory().used)
        gauge(readings, metrics.DISK_USED_RATIO, "", lambda: ps.disk_usage(str(self.data_dir)).percent / 100)
        memory = self.reader.read("memory", "", ps.virtual_memory)
        if memory is not None:
            readings[metrics.MEMORY_USED_BYTES, ""] = float(memory.total - memory.available)
            readings[metrics.MEMORY_TOTAL_BYTES, ""] = float(memory.total)
        self._sample_rates(readings, monotonic_s)
        return readings

    def _sample_rates(self, into: Readings, now_s: float) -> None:
        rate, ps = self.reader.rate, self.ps
        rate(into, metrics.DISK_READ_BYTES_PER_S, "", now_s, lambda: ps.disk_io_counters().read_bytes)
        rate(into, metrics.DISK_WRITE_BYTES_PER_S, "", now_s, lambda: ps.disk_io_counters().write_bytes)
        rate(into, metrics.NET_SENT_BYTES_PER_S, "", now_s, lambda: ps.net_io_counters().bytes_sent)
        rate(into, metrics.NET_RECEIVED_BYTES_PER_S, "", now_s, lambda: ps.net_io_counters().bytes_recv)
        rate(into, metrics.NET_RETRANSMITS_PER_S, "", now_s, tcp_retransmits, self.proc / "net/snmp")

    def _sample_cores(self, into: Readings) -> None:
        # Not psutil.cpu_percent: its first answer is a 0 that means nothing.
        cores = self.reader.read(metrics.CPU_UTIL_RATIO, "", lambda: self.ps.cpu_times(percpu=True))
        if cores is None:
            return
        now = {str(index): busy_and_total_s(times) for index, times in enumerate(cores)}
        now["all"] = (sum(busy for busy, _ in now.values()), sum(total for _, total in now.values()))
        self._sample_steal(into, sum(getattr(times, "steal", 0.0) for times in cores), now["all"][1])
        for label, (busy, total) in now.items():
            before = self._core_times.get(label)
            if before is not None and total > before[1]:
                busy_ratio = (busy - before[0]) / (total - before[1])
                into[metrics.CPU_UTIL_RATIO, label] = min(1.0, max(0.0, busy_ratio))
        self._core_times = now

    def _sample_steal(self, into: Readings, stolen_s: float, total_s: float) -> None:
        before, self._stolen = self._stolen, (stolen_s, total_s)
        if before is not None and total_s > before[1]:
            ratio = (stolen_s - before[0]) / (total_s - before[1])
            into[metrics.CPU_STEAL_RATIO, ""] = min(1.0, max(0.0, ratio))

    def _sample_clocks(self, into: Readings) -> None:
        now = self.reader.read("clocks", "", self.clocks)
        before, self._clocks = self._clocks, now
        if now is None or before is None:
            return
        into[metrics.CLOCK_STEP_S, ""] = (now.wall_s - before.wall_s) - (now.boot_s - before.boot_s)
        awake_s = now.monotonic_s - before.monotonic_s
        into[metrics.SUSPENDED_S, ""] = max(0.0, (now.boot_s - before.boot_s) - awake_s)


@dataclass(frozen=True)
class Clocks:
    """One instant on three clocks: of the three only `wall_s` can be set, and `monotonic_s` stops in suspension."""

    wall_s: float
    boot_s: float
    monotonic_s: float

    @classmethod
    def read(cls) -> "Clocks":
        boottime = time.CLOCK_BOOTTIME if hasattr(time, "CLOCK_BOOTTIME") else time.CLOCK_MONOTONIC
        return cls(time.time(), time.clock_gettime(boottime), time.clock_gettime(time.CLOCK_MONOTONIC))


def busy_and_total_s(times: Any) -> tuple[float, float]:
    """Seconds a core was busy, and seconds in all. Guests are counted in `user` and `nice` already (man 5 proc)."""
    total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return total - times.idle - getattr(times, "iowait", 0.0), total


def procfs_value(path: Path, name: str) -> float:
    """The number in the line `name number` of a file like /proc/stat. Raises LookupError where it is not there."""
    for line in path.read_text().splitlines():
        if line.startswith(f"{name} "):
            return float(line.split()[1])
    raise LookupError(f"{path} has no line {name}")


def tcp_retransmits(path: Path) -> float:
    """RetransSegs of /proc/net/snmp, where one line names the columns and the next holds the values."""
    names, values = (line.split() for line in path.read_text().splitlines() if line.startswith("Tcp:"))
    return float(dict(zip(names, values, strict=True))["RetransSegs"])


# --- our processes --------------------------------------------------------------------------------


@dataclass
class ProcessProbe:
    """Processes by label. `pids` is asked at each sample: a restarted engine has another pid."""

    pids: Callable[[], Mapping[str, int]]
    ps: Any = psutil
    reader: Reader = field(default_factory=lambda: Reader("process"))
    _processes: dict[str, Any] = field(default_factory=dict)

    def sample(self, monotonic_s: float) -> Readings:
        readings: Readings = {}
        for label, pid in self.pids().items():
            process = self.reader.read("process", label, self._process, label, pid)
            if process is None:
                continue
            gauge = partial(self.reader.gauge, readings)
            gauge(metrics.PROCESS_RSS_BYTES, label, lambda process: process.memory_info().rss, process)
            gauge(metrics.PROCESS_THREADS, label, process.num_threads)
            self.reader.rate(readings, metrics.PROCESS_CPU_RATIO, label, monotonic_s, cpu_s, process)
        return readings

    def _process(self, label: str, pid: int) -> Any:
        known = self._processes.get(label)
        if known is None or known.pid != pid or not known.is_running():
            known = self._processes[label] = self.ps.Process(pid)
            self.reader.forget(metrics.PROCESS_CPU_RATIO, label)
        return known


def cpu_s(process: Any) -> float:
    """Seconds of CPU that a process has used, its children not counted."""
    times = process.cpu_times()
    return float(times.user + times.system)


def hardware_identity(nvml: NvmlProbe, proc: Path = Path("/proc")) -> dict[str, Any]:
    """The machine, as a Snapshot keeps it: equal on two machines of one kind, so without serial numbers."""
    # The cores that we may use, not those of the machine: a container may have fewer.
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu_model": cpu_model(proc / "cpuinfo"),
        "num_cores": num_cores,
        "memory_bytes": psutil.virtual_memory().total,
        "machine": platform.machine(),
        "system": platform.system(),
        **nvml.identity(),
    }


def cpu_model(path: Path) -> str:
    """The model name in /proc/cpuinfo; where it has none (Arm), what the platform calls the processor."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
