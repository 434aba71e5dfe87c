"""Every metric that is sampled, declared once: name, unit, better direction, what its label says.

A `Metric` is its own name, so it goes into `Sample.metric` as it stands. What is sampled is declared here
and what is declared here is sampled; a test beside the collector holds both to it.
"""

import difflib
from dataclasses import dataclass
from typing import Any, Literal, Self

from store.errors import UnknownMetric

Better = Literal["lower", "higher"]
Source = Literal["hardware", "host", "runtime"]
Summary = Literal["mean", "max"]


@dataclass(frozen=True)
class Label:
    """What the label of a sample says. `values` lists all that may occur; None where machines or faults differ."""

    meaning: str
    values: tuple[str, ...] | None = None

    def allows(self, value: str) -> bool:
        return value in self.values if self.values is not None else bool(value)


UNLABELLED = Label("none", ("",))
GPU_INDEX = Label("index of the GPU, as NVML counts")
CORE = Label("`all`, or the index of a core")
PROCESS = Label("process", ("front_end", "engine", "daemon"))
STATISTIC = Label("statistic over the requests or steps of the last interval", ("p50", "p95", "p99", "mean"))
STEP_STATISTIC = Label("statistic over the steps of the last interval", ("p50", "p95", "p99"))
LENGTH_STATISTIC = Label("statistic over the requests of the last interval", ("mean", "p95"))
ERROR_KIND = Label("kind of the error, as the runtime names it")


class Metric(str):
    """A declared metric; the string is its name, whose ending is its unit.

    better: which direction an operator wants, None where neither.
    summary: how values of one interval become one, when old samples are thinned.
    """

    unit: str
    better: Better | None
    label: Label
    help: str
    source: Source
    summary: Summary

    def __new__(
        cls,
        name: str,
        *,
        unit: str,
        better: Better | None,
        label: Label,
        help: str,
        source: Source,
        summary: Summary,
    ) -> Self:
        metric = super().__new__(cls, name)
        metric.unit, metric.better, metric.label = unit, better, label
        metric.help, metric.source, metric.summary = help, source, summary
        return metric

    def __reduce__(self) -> tuple[Any, ...]:
        return metric_named, (str(self),)  # a copy in another process is the declared one

    def check_label(self, label: str) -> str:
        """Returns the label.

        Raises:
            UnknownMetric: this metric does not carry such a label.
        """
        if not self.label.allows(label):
            known = ", ".join(repr(value) for value in self.label.values or ()) or "any text"
            raise UnknownMetric(f"The label of `{self}` is {self.label.meaning}: {known}; but got {label!r}.")
        return label


METRICS: dict[str, Metric] = {}


def metric_named(name: str) -> Metric:
    """Raises UnknownMetric for a name that is not declared, with the nearest that is."""
    if name in METRICS:
        return METRICS[name]
    near = difflib.get_close_matches(name, METRICS, n=1)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    raise UnknownMetric(f"Unknown metric `{name}`.{hint} The metrics are: {', '.join(METRICS)}.")


def metrics_of(source: Source) -> tuple[Metric, ...]:
    return tuple(metric for metric in METRICS.values() if metric.source == source)


def _declare(
    source: Source,
    name: str,
    unit: str,
    better: Better | None,
    help: str,
    label: Label = UNLABELLED,
    summary: Summary = "mean",
) -> Metric:
    METRICS[name] = Metric(
        name, unit=unit, better=better, label=label, help=help, source=source, summary=summary
    )
    return METRICS[name]


def _gpu(name: str, unit: str, better: Better | None, help: str, summary: Summary = "mean") -> Metric:
    return _declare("hardware", name, unit, better, help, GPU_INDEX, summary)


def _host(name: str, unit: str, better: Better | None, help: str, label: Label = UNLABELLED) -> Metric:
    return _declare("host", name, unit, better, help, label)


def _runtime(
    name: str,
    unit: str,
    better: Better | None,
    help: str,
    label: Label = UNLABELLED,
    summary: Summary = "mean",
) -> Metric:
    return _declare("runtime", name, unit, better, help, label, summary)


# --- hardware: GPUs, through NVML -----------------------------------------------------------------

GPU_UTIL_RATIO = _gpu("gpu_util_ratio", "ratio", None, "Share of the time in which a kernel ran.")
GPU_MEMORY_USED_BYTES = _gpu(
    "gpu_memory_used_bytes", "bytes", None, "Device memory in use, by all processes."
)
GPU_MEMORY_TOTAL_BYTES = _gpu("gpu_memory_total_bytes", "bytes", None, "Device memory of the GPU.")
GPU_TEMPERATURE_CELSIUS = _gpu("gpu_temperature_celsius", "celsius", "lower", "Temperature of the GPU.")
GPU_TEMPERATURE_LIMIT_CELSIUS = _gpu(
    "gpu_temperature_limit_celsius", "celsius", None, "Temperature at which the GPU slows itself down."
)
GPU_POWER_WATTS = _gpu("gpu_power_watts", "watts", "lower", "Power drawn.")
GPU_POWER_LIMIT_WATTS = _gpu("gpu_power_limit_watts", "watts", None, "Power limit that is enforced.")
GPU_CLOCK_SM_HZ = _gpu("gpu_clock_sm_hz", "hertz", "higher", "Clock of the streaming multiprocessors.")
GPU_CLOCK_MEMORY_HZ = _gpu("gpu_clock_memory_hz", "hertz", "higher", "Clock of the device memory.")
GPU_THROTTLE_REASONS = _gpu(
    "gpu_throttle_reasons",
    "bit mask",
    "lower",
    "Why clocks are held down: NVML's clock event reasons as a bit mask.",
    "max",
)
GPU_PCIE_TX_BYTES_PER_S = _gpu("gpu_pcie_tx_bytes_per_s", "bytes/s", None, "Sent by the GPU over PCIe.")
GPU_PCIE_RX_BYTES_PER_S = _gpu("gpu_pcie_rx_bytes_per_s", "bytes/s", None, "Received by the GPU over PCIe.")
GPU_NVLINK_TX_BYTES_PER_S = _gpu("gpu_nvlink_tx_bytes_per_s", "bytes/s", None, "Sent by the GPU over NVLink.")
GPU_NVLINK_RX_BYTES_PER_S = _gpu(
    "gpu_nvlink_rx_bytes_per_s", "bytes/s", None, "Received by the GPU over NVLink."
)
GPU_ECC_UNCORRECTED_TOTAL = _gpu(
    "gpu_ecc_uncorrected_total",
    "errors",
    "lower",
    "Memory errors that could not be corrected, since the driver was loaded.",
    "max",
)
GPU_ECC_CORRECTED_TOTAL = _gpu(
    "gpu_ecc_corrected_total",
    "errors",
    "lower",
    "Memory errors that were corrected, since the driver was loaded.",
    "max",
)

# --- host: the machine and our processes, through psutil ------------------------------------------

CPU_UTIL_RATIO = _host(
    "cpu_util_ratio", "ratio", None, "Share of the time in which the cores were busy.", CORE
)
CPU_STEAL_RATIO = _host(
    "cpu_steal_ratio", "ratio", "lower", "Share of the time in which the hypervisor gave our cores to others."
)
CLOCK_STEP_S = _host(
    "clock_step_s",
    "s",
    None,
    "How far the system clock was set since the last sample; about 0 if it was not.",
)
SUSPENDED_S = _host(
    "suspended_s", "s", "lower", "Time since the last sample in which the host was suspended."
)
LOAD_1M = _host("load_1m", "threads", "lower", "Load average over one minute.")
RUN_QUEUE = _host("run_queue", "threads", "lower", "Threads that run or wait for a core.")
MEMORY_USED_BYTES = _host(
    "memory_used_bytes", "bytes", "lower", "Host memory that is not available for new work."
)
MEMORY_TOTAL_BYTES = _host("memory_total_bytes", "bytes", None, "Host memory.")
SWAP_USED_BYTES = _host("swap_used_bytes", "bytes", "lower", "Swap in use.")
DISK_USED_RATIO = _host(
    "disk_used_ratio", "ratio", "lower", "Share of the disk of the data folder that is used."
)
DISK_READ_BYTES_PER_S = _host("disk_read_bytes_per_s", "bytes/s", None, "Read from all disks.")
DISK_WRITE_BYTES_PER_S = _host("disk_write_bytes_per_s", "bytes/s", None, "Written to all disks.")
NET_SENT_BYTES_PER_S = _host("net_sent_bytes_per_s", "bytes/s", None, "Sent over all network interfaces.")
NET_RECEIVED_BYTES_PER_S = _host(
    "net_received_bytes_per_s", "bytes/s", None, "Received over all network interfaces."
)
NET_RETRANSMITS_PER_S = _host(
    "net_retransmits_per_s", "segments/s", "lower", "TCP segments that were sent again."
)
PROCESS_RSS_BYTES = _host(
    "process_rss_bytes", "bytes", "lower", "Memory of a process that lies in RAM.", PROCESS
)
PROCESS_THREADS = _host("process_threads", "threads", None, "Threads of a process.", PROCESS)
PROCESS_CPU_RATIO = _host(
    "process_cpu_ratio", "ratio", "lower", "Cores that a process keeps busy; 2 is two cores.", PROCESS
)

# --- runtime: the server and its engine -----------------------------------------------------------

REQUESTS_RUNNING = _runtime("requests_running", "requests", None, "Requests in prefill or decode.")
REQUESTS_WAITING = _runtime("requests_waiting", "requests", "lower", "Requests waiting for their first step.")
REQUESTS_PER_S = _runtime("requests_per_s", "requests/s", None, "Requests that arrived.")
TTFT_S = _runtime("ttft_s", "s", "lower", "Time from arrival to the first token.", STATISTIC)
TPOT_S = _runtime("tpot_s", "s", "lower", "Time per output token after the first.", STATISTIC)
ITL_S = _runtime("itl_s", "s", "lower", "Gap between two tokens of one request.", STATISTIC)
E2E_S = _runtime("e2e_s", "s", "lower", "Time from arrival to the last token.", STATISTIC)
OUTPUT_TOKENS_PER_S = _runtime("output_tokens_per_s", "tokens/s", "higher", "Tokens generated.")
PROMPT_TOKENS_PER_S = _runtime("prompt_tokens_per_s", "tokens/s", "higher", "Prompt tokens computed.")
PROMPT_TOKENS = _runtime("prompt_tokens", "tokens", None, "Length of a prompt.", LENGTH_STATISTIC)
OUTPUT_TOKENS = _runtime("output_tokens", "tokens", None, "Length of an answer.", LENGTH_STATISTIC)
KV_USED_RATIO = _runtime("kv_used_ratio", "ratio", None, "Share of the KV cache in use.")
KV_FRAGMENTATION_RATIO = _runtime(
    "kv_fragmentation_ratio",
    "ratio",
    "lower",
    "Share of the KV cache that lies in blocks which are held and not filled.",
)
PREFIX_HIT_TOKENS_PER_S = _runtime(
    "prefix_hit_tokens_per_s",
    "tokens/s",
    "higher",
    "Prompt tokens that the prefix cache spared from being computed.",
)
PREFIX_HIT_RATIO = _runtime(
    "prefix_hit_ratio",
    "ratio",
    "higher",
    "Share of the admitted requests' known tokens that the prefix cache held; absent while it is off.",
)
DRAFTED_TOKENS_PER_S = _runtime(
    "drafted_tokens_per_s", "tokens/s", None, "Tokens guessed from a request's own text and computed."
)
DRAFT_RIGHT_RATIO = _runtime(
    "draft_right_ratio",
    "ratio",
    "higher",
    "Share of the guessed tokens that the model drew itself; absent while nothing is guessed.",
)
PREEMPTIONS_TOTAL = _runtime(
    "preemptions_total",
    "preemptions",
    "lower",
    "Running requests pushed back to the queue, since boot.",
    summary="max",
)
BATCH_SIZE = _runtime("batch_size", "requests", None, "Mean number of requests that decode in one step.")
STEP_S = _runtime("step_s", "s", "lower", "Time of one step of the engine.", STEP_STATISTIC)
ERRORS_TOTAL = _runtime(
    "errors_total",
    "requests",
    "lower",
    "Requests that failed, since boot; timeouts and refusals are kinds.",
    ERROR_KIND,
    "max",
)
ENGINE_RESTARTS_TOTAL = _runtime(
    "engine_restarts_total",
    "restarts",
    "lower",
    "Times the engine process was started again, since boot.",
    summary="max",
)
RECORDS_DROPPED_TOTAL = _runtime(
    "records_dropped_total",
    "records",
    "lower",
    "Timings lost to the runtime's bounded buffer, since boot.",
    summary="max",
)
