"""What the GPUs are doing, through NVML. 0.1 ms a GPU for all but the two readings of the bus (H200)."""

import importlib
import logging
from collections.abc import Callable
from typing import Any

from store import metrics
from store.metrics import Metric
from tuner.readings import FAILURES, Reader, Readings

log = logging.getLogger(__name__)


def _ecc_errors(nvml: Any, gpu: Any, kind: str) -> float:
    code = getattr(nvml, f"NVML_MEMORY_ERROR_TYPE_{kind}")
    return float(nvml.nvmlDeviceGetTotalEccErrors(gpu, code, nvml.NVML_VOLATILE_ECC))


def field_value(nvml: Any, gpu: Any, name: str, scope: int) -> float:
    """One NVML field, read by the type that the driver says it has.

    Raises:
        NVMLError: the driver does not know the field, or not on this GPU.
    """
    answer = nvml.nvmlDeviceGetFieldValues(gpu, [(getattr(nvml, name), scope)])[0]
    if answer.nvmlReturn != 0:
        raise nvml.NVMLError(answer.nvmlReturn)
    members = {
        nvml.NVML_VALUE_TYPE_DOUBLE: "dVal",
        nvml.NVML_VALUE_TYPE_UNSIGNED_INT: "uiVal",
        nvml.NVML_VALUE_TYPE_UNSIGNED_LONG: "ulVal",
        nvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG: "ullVal",
        nvml.NVML_VALUE_TYPE_SIGNED_LONG_LONG: "sllVal",
    }
    return float(getattr(answer.value, members[answer.valueType]))


_MILLI, _MEGA = 1e-3, 1e6
_GPU_SENSOR = 0  # NVML_TEMPERATURE_GPU
_ALL_LINKS = 0xFFFFFFFF  # scope of an NVLink field: the sum over the GPU's links

# nv is the module pynvml; it answers percent, bytes, milliwatts and megahertz.
GPU_GAUGES: dict[Metric, Callable[[Any, Any], float]] = {
    metrics.GPU_UTIL_RATIO: lambda nv, gpu: nv.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
    metrics.GPU_MEMORY_USED_BYTES: lambda nv, gpu: nv.nvmlDeviceGetMemoryInfo(gpu).used,
    metrics.GPU_MEMORY_TOTAL_BYTES: lambda nv, gpu: nv.nvmlDeviceGetMemoryInfo(gpu).total,
    metrics.GPU_TEMPERATURE_CELSIUS: lambda nv, gpu: nv.nvmlDeviceGetTemperature(gpu, _GPU_SENSOR),
    metrics.GPU_TEMPERATURE_LIMIT_CELSIUS: lambda nv, gpu: nv.nvmlDeviceGetTemperatureThreshold(
        gpu, nv.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
    ),
    metrics.GPU_POWER_WATTS: lambda nv, gpu: nv.nvmlDeviceGetPowerUsage(gpu) * _MILLI,
    metrics.GPU_POWER_LIMIT_WATTS: lambda nv, gpu: nv.nvmlDeviceGetEnforcedPowerLimit(gpu) * _MILLI,
    metrics.GPU_CLOCK_SM_HZ: lambda nv, gpu: nv.nvmlDeviceGetClockInfo(gpu, nv.NVML_CLOCK_SM) * _MEGA,
    metrics.GPU_CLOCK_MEMORY_HZ: lambda nv, gpu: nv.nvmlDeviceGetClockInfo(gpu, nv.NVML_CLOCK_MEM) * _MEGA,
    metrics.GPU_THROTTLE_REASONS: lambda nv, gpu: nv.nvmlDeviceGetCurrentClocksEventReasons(gpu),
    metrics.GPU_ECC_UNCORRECTED_TOTAL: lambda nv, gpu: _ecc_errors(nv, gpu, "UNCORRECTED"),
    metrics.GPU_ECC_CORRECTED_TOTAL: lambda nv, gpu: _ecc_errors(nv, gpu, "CORRECTED"),
}


# Totals over the GPU's links, in KiB.
NVLINK_FIELDS: dict[Metric, str] = {
    metrics.GPU_NVLINK_TX_BYTES_PER_S: "NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX",
    metrics.GPU_NVLINK_RX_BYTES_PER_S: "NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX",
}

# NVML watches the bus for 20 ms and blocks as long, so one GPU a sample has its turn, and each every fifth
# sample at most. The counters NVML_FI_DEV_PCIE_COUNT_* do not block, but have 32 bits: a busy x16 link of
# generation 5 wraps them 13 times a second, and a rate from them is wrong without a sign of it (measured on an
# H200: 1.8 GB/s reported of 55; this call reports 59, protocol included).
PCIE_DIRECTIONS: dict[Metric, str] = {
    metrics.GPU_PCIE_TX_BYTES_PER_S: "NVML_PCIE_UTIL_TX_BYTES",
    metrics.GPU_PCIE_RX_BYTES_PER_S: "NVML_PCIE_UTIL_RX_BYTES",
}
PCIE_EVERY = 5


class NvmlProbe:
    """Every GPU that the driver shows; the label is its index. Without a driver there is none, said once."""

    def __init__(self, module: Any = None) -> None:
        """`module` is pynvml unless given."""
        # Imported here: a machine without GPUs need not load it to print help.
        self.nvml = nvml = importlib.import_module("pynvml") if module is None else module
        self.reader = Reader("NVML", (nvml.NVMLError, *FAILURES))
        self.handles: dict[str, Any] = {}
        self._num_samples = 0
        try:
            nvml.nvmlInit()
            num_gpus = nvml.nvmlDeviceGetCount()
        except (nvml.NVMLError, OSError) as error:
            log.info("GPUs are not sampled: no NVIDIA driver answers (%s).", error)
            return
        for index in range(num_gpus):
            handle = self.reader.read("gpu", str(index), nvml.nvmlDeviceGetHandleByIndex, index)
            if handle is not None:
                self.handles[str(index)] = handle

    def sample(self, monotonic_s: float) -> Readings:
        readings: Readings = {}
        for index, gpu in self.handles.items():
            for metric, reading in GPU_GAUGES.items():
                self.reader.gauge(readings, metric, index, reading, self.nvml, gpu)
            for metric, name in NVLINK_FIELDS.items():
                self.reader.rate(readings, metric, index, monotonic_s, self._linked_bytes, gpu, name)
        turn = self._num_samples % max(PCIE_EVERY, len(self.handles))
        for index, gpu in list(self.handles.items())[turn : turn + 1]:
            for metric, direction in PCIE_DIRECTIONS.items():
                self.reader.gauge(readings, metric, index, self._bus_bytes_per_s, gpu, direction)
        self._num_samples += 1
        return readings

    def _linked_bytes(self, gpu: Any, name: str) -> float:
        return 1024 * field_value(self.nvml, gpu, name, _ALL_LINKS)

    def _bus_bytes_per_s(self, gpu: Any, direction: str) -> float:
        """NVML answers kilobytes a second."""
        return 1000.0 * self.nvml.nvmlDeviceGetPcieThroughput(gpu, getattr(self.nvml, direction))

    def identity(self) -> dict[str, Any]:
        """GPUs and driver, as a Snapshot keeps them: what is equal on two machines of one kind."""
        nvml, read = self.nvml, self.reader.read
        gpus = []
        for index, gpu in self.handles.items():
            memory = read("memory", index, nvml.nvmlDeviceGetMemoryInfo, gpu)
            gpus.append(
                {
                    "name": _text(read("name", index, nvml.nvmlDeviceGetName, gpu)),
                    "memory_bytes": memory.total if memory is not None else None,
                }
            )
        driver = _text(read("driver", "", nvml.nvmlSystemGetDriverVersion)) if gpus else None
        return {"gpus": gpus, "driver": driver}


def _text(value: bytes | str | None) -> str | None:
    return value.decode() if isinstance(value, bytes) else value  # older bindings answer bytes
