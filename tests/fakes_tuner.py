"""Hand-written doubles of what the tuner talks to: NVML, psutil, and a runtime's control address."""

from collections import namedtuple
from types import SimpleNamespace
from typing import Any

from runtime.errors import RuntimeUnreachable

NOT_SUPPORTED, LOST = 3, 15


class FakeNvml:
    """The part of pynvml that is read, over two GPUs. `broken` maps a function or field name to an error code."""

    class NVMLError(Exception):
        pass

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2
    NVML_TEMPERATURE_THRESHOLD_SLOWDOWN = 1
    NVML_MEMORY_ERROR_TYPE_CORRECTED, NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 0, 1, 0
    NVML_VALUE_TYPE_DOUBLE, NVML_VALUE_TYPE_UNSIGNED_INT, NVML_VALUE_TYPE_UNSIGNED_LONG = 0, 1, 2
    NVML_VALUE_TYPE_UNSIGNED_LONG_LONG, NVML_VALUE_TYPE_SIGNED_LONG_LONG = 3, 4
    NVML_PCIE_UTIL_TX_BYTES, NVML_PCIE_UTIL_RX_BYTES = 0, 1
    NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX = 138, 139

    def __init__(self, broken: dict[Any, int] | None = None) -> None:
        self.broken = broken if broken is not None else {}
        self.counters = {138: 10, 139: 20}

    def _check(self, name: Any) -> None:
        if name in self.broken:
            raise self.NVMLError(self.broken[name])

    def __getattr__(self, name: str) -> Any:
        answers = {
            "nvmlInit": None,
            "nvmlDeviceGetCount": 2,
            "nvmlSystemGetDriverVersion": "580.1",
            "nvmlDeviceGetName": b"NVIDIA H200",
            "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=40, memory=10),
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=30, free=70, total=100),
            "nvmlDeviceGetTemperature": 55,
            "nvmlDeviceGetTemperatureThreshold": 90,
            "nvmlDeviceGetPowerUsage": 350_000,
            "nvmlDeviceGetEnforcedPowerLimit": 700_000,
            "nvmlDeviceGetClockInfo": 1980,
            "nvmlDeviceGetCurrentClocksEventReasons": 4,
            "nvmlDeviceGetTotalEccErrors": 0,
            "nvmlDeviceGetPcieThroughput": 500,
        }
        if name not in answers:
            raise AttributeError(name)

        def call(*args: Any) -> Any:
            self._check(name)
            return answers[name]

        return call

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        self._check(("handle", index))
        return index

    def nvmlDeviceGetFieldValues(self, gpu: int, fields: list[tuple[int, int]]) -> list[Any]:
        ((field, _scope),) = fields
        value = SimpleNamespace(ullVal=self.counters[field])
        return [SimpleNamespace(nvmlReturn=self.broken.get(field, 0), valueType=3, value=value)]


CpuTimes = namedtuple("CpuTimes", "user nice system idle iowait irq softirq steal guest guest_nice")


class FakePs:
    """The part of psutil that is read of the host."""

    def __init__(self) -> None:
        self.cores = [CpuTimes(10, 0, 5, 80, 5, 0, 0, 0, 2, 0), CpuTimes(0, 0, 0, 100, 0, 0, 0, 0, 0, 0)]
        self.disk: Any = SimpleNamespace(read_bytes=100, write_bytes=200)
        self.net = SimpleNamespace(bytes_sent=10, bytes_recv=20)

    def cpu_times(self, percpu: bool) -> list[CpuTimes]:
        return self.cores

    def getloadavg(self) -> tuple[float, float, float]:
        return (1.5, 1.0, 0.5)

    def virtual_memory(self) -> Any:
        return SimpleNamespace(total=1000, available=600)

    def swap_memory(self) -> Any:
        return SimpleNamespace(used=0)

    def disk_usage(self, path: str) -> Any:
        return SimpleNamespace(percent=25.0)

    def disk_io_counters(self) -> Any:
        return self.disk

    def net_io_counters(self) -> Any:
        return self.net


STEP = {
    "step_s": 0.02,
    "forward_s": 0.018,
    "num_decode": 4,
    "num_prefill_rows": 0,
    "num_prefill_tokens": 0,
    "context_tokens": 400,
    "attention_pairs": 400,
    "num_running": 4,
    "num_waiting": 1,
    "kv_used_tokens": 404,
    "config_id": "c1",
    "slice_id": None,
    "threads": 1,
}


def step(seq: int, at: float, **changed: Any) -> dict[str, Any]:
    """A step as it is drained."""
    return {"seq": seq, "kind": "step", "at": at, **STEP, **changed}


def request(
    seq: int, arrived_at: float, ttft_s: float = 0.1, tpot_s: float = 0.02, **changed: Any
) -> dict[str, Any]:
    """A finished request as it is drained: 11 tokens unless told otherwise."""
    num_gaps = changed.get("output_tokens", 11) - 1
    return {
        "seq": seq,
        "kind": "request",
        "request_id": f"r{seq}",
        "arrived_at": arrived_at,
        "prompt_tokens": 100,
        "output_tokens": num_gaps + 1,
        "max_tokens": 64,
        "admitted_at": arrived_at + ttft_s / 2,
        "first_token_at": arrived_at + ttft_s,
        "finished_at": arrived_at + ttft_s + tpot_s * num_gaps,
        "finish_reason": "stop",
        "error_kind": None,
        "config_id": "c1",
        "arrival_slice": None,
        "first_token_slice": None,
        "slices": {},
        "gaps": {"num": num_gaps, "sum_s": tpot_s * num_gaps, "max_s": tpot_s, "p99_s": tpot_s},
        "num_preemptions": 0,
        "streamed": True,
        **changed,
    }


def event(seq: int, at: float, kind: str, **details: Any) -> dict[str, Any]:
    return {"seq": seq, "kind": "event", "at": at, "event": kind, **details}


def runtime_state(boot_id: str = "b1", **changed: Any) -> dict[str, Any]:
    """The answer of /control/state, as far as the collector reads it."""
    return {
        "boot_id": boot_id,
        "engine": "ready",
        "num_engine_restarts": 1,
        "version": 0,
        "config_id": "c1",
        "gauges": {
            "num_running": 4,
            "num_waiting": 1,
            "kv_used_tokens": 404,
            "kv_total_tokens": 4040,
            "num_preemptions_total": 3,
            "prefix_looked_up_tokens_total": 100,
            "prefix_hit_tokens_total": 20,
            "drafted_tokens_total": 40,
            "draft_right_tokens_total": 10,
        },
        "counters": {"requests_total": 0, "tokens_total": 0, "errors_by_kind": {}},
        "slice_stats": {},
        **changed,
    }


class FakeClient:
    """A runtime's control address in memory. Acknowledged records are freed, as the runtime frees them."""

    def __init__(self, boot_id: str = "b1") -> None:
        self.boot_id = boot_id
        self.records: list[dict[str, Any]] = []
        self.dropped = 0
        self.is_reachable = True
        self.drains: list[tuple[str | None, int]] = []
        self.changed: dict[str, Any] = {}  # of the state

    def _answer(self) -> None:
        if not self.is_reachable:
            raise RuntimeUnreachable("The runtime at http://127.0.0.1:1 does not answer (ConnectError).")

    def state(self) -> dict[str, Any]:
        self._answer()
        return runtime_state(self.boot_id, **self.changed)

    def drain(self, boot_id: str | None, after_seq: int, limit: int = 5000) -> dict[str, Any]:
        self._answer()
        self.drains.append((boot_id, after_seq))
        if boot_id != self.boot_id:
            after_seq = 0
        self.records = [record for record in self.records if record["seq"] > after_seq]
        taken = self.records[:limit]
        next_seq = taken[-1]["seq"] if taken else after_seq
        return {"boot_id": self.boot_id, "next_seq": next_seq, "dropped": self.dropped, "records": taken}
