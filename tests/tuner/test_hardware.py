"""Probes: what cannot be read is absent, and said once."""

import logging
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from store import metrics
from store.metrics import metrics_of
from tests.fakes_tuner import LOST, NOT_SUPPORTED, CpuTimes, FakeNvml, FakePs
from tuner.hardware import HostProbe, NvmlProbe, ProcessProbe, hardware_identity

SNMP = "Ip: Forwarding\nIp: 2\nTcp: RtoAlgorithm RetransSegs\nTcp: 1 {}\nUdp: InDatagrams\nUdp: 7\n"


def host_probe(tmp_path: Path, ps: FakePs, retransmits: int = 5) -> HostProbe:
    (tmp_path / "net").mkdir(exist_ok=True)
    (tmp_path / "net" / "snmp").write_text(SNMP.format(retransmits))
    (tmp_path / "stat").write_text("cpu 1 2\nprocs_running 3\nprocs_blocked 0\n")
    return HostProbe(tmp_path, ps=ps, proc=tmp_path)


def test_every_declared_gpu_metric_is_read_in_its_unit() -> None:
    nvml = FakeNvml()
    probe = NvmlProbe(nvml)
    first = probe.sample(10.0)
    assert (metrics.GPU_NVLINK_TX_BYTES_PER_S, "0") not in first
    nvml.counters = {138: 12, 139: 20}
    readings = probe.sample(12.0)
    assert {metric for metric, _ in readings} == set(metrics_of("hardware"))
    assert {label for _, label in readings} == {"0", "1"}
    assert readings[metrics.GPU_UTIL_RATIO, "1"] == 0.4
    assert readings[metrics.GPU_POWER_WATTS, "0"] == 350.0
    assert readings[metrics.GPU_CLOCK_SM_HZ, "0"] == 1.98e9
    assert readings[metrics.GPU_PCIE_TX_BYTES_PER_S, "1"] == 500_000.0
    assert readings[metrics.GPU_NVLINK_TX_BYTES_PER_S, "0"] == 1024.0
    assert readings[metrics.GPU_NVLINK_RX_BYTES_PER_S, "0"] == 0.0


def test_reading_that_blocks_is_taken_of_one_gpu_a_sample() -> None:
    probe = NvmlProbe(FakeNvml())
    samples = [probe.sample(float(at)) for at in range(7)]
    taken = [
        [label for metric, label in some if metric == metrics.GPU_PCIE_RX_BYTES_PER_S] for some in samples
    ]
    assert taken == [["0"], ["1"], [], [], [], ["0"], ["1"]]


def test_reading_that_fails_is_absent_and_logged_once_until_it_works_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    nvml = FakeNvml({"nvmlDeviceGetPowerUsage": NOT_SUPPORTED, 138: NOT_SUPPORTED})
    probe = NvmlProbe(nvml)
    for monotonic_s in (1.0, 2.0, 3.0):
        readings = probe.sample(monotonic_s)
        assert (metrics.GPU_POWER_WATTS, "0") not in readings
        assert (metrics.GPU_NVLINK_TX_BYTES_PER_S, "0") not in readings
        assert readings[metrics.GPU_TEMPERATURE_CELSIUS, "0"] == 55
    assert [record.message for record in caplog.records if "gpu_power_watts[0]" in record.message] == [
        "NVML: gpu_power_watts[0] cannot be read and is left out: NVMLError(3)"
    ]
    assert len(caplog.records) == 4  # two metrics of two GPUs
    del nvml.broken["nvmlDeviceGetPowerUsage"]
    assert probe.sample(4.0)[metrics.GPU_POWER_WATTS, "0"] == 350.0
    assert caplog.records[-1].message == "NVML: gpu_power_watts[1] can be read again."
    nvml.broken["nvmlDeviceGetPowerUsage"] = LOST
    probe.sample(5.0)
    assert caplog.records[-1].message.startswith("NVML: gpu_power_watts[1] cannot be read")


def test_binding_without_a_function_leaves_its_metric_out() -> None:
    nvml = FakeNvml()
    nvml.nvmlDeviceGetTotalEccErrors = None  # as in a binding that lacks it: the call fails
    readings = NvmlProbe(nvml).sample(1.0)
    assert (metrics.GPU_ECC_CORRECTED_TOTAL, "0") not in readings
    assert (metrics.GPU_UTIL_RATIO, "0") in readings


def test_no_driver_means_no_gpu_probe(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    probe = NvmlProbe(FakeNvml({"nvmlInit": 9}))
    assert probe.sample(1.0) == {}
    assert caplog.messages == ["GPUs are not sampled: no NVIDIA driver answers (9)."]


def test_lost_gpu_does_not_hide_the_other() -> None:
    assert set(NvmlProbe(FakeNvml({("handle", 0): LOST})).handles) == {"1"}


def test_counter_that_fell_gives_no_rate() -> None:
    nvml = FakeNvml()
    probe = NvmlProbe(nvml)
    probe.sample(1.0)
    nvml.counters[138] = 5
    assert (metrics.GPU_NVLINK_TX_BYTES_PER_S, "0") not in probe.sample(2.0)
    nvml.counters[138] = 25
    assert probe.sample(3.0)[metrics.GPU_NVLINK_TX_BYTES_PER_S, "0"] == 20 * 1024


def test_rate_after_an_outage_spans_no_more_than_what_was_seen() -> None:
    nvml = FakeNvml()
    probe = NvmlProbe(nvml)
    probe.sample(1.0)
    nvml.broken[138] = NOT_SUPPORTED
    probe.sample(2.0)
    del nvml.broken[138]
    nvml.counters[138] = 9000
    assert (metrics.GPU_NVLINK_TX_BYTES_PER_S, "0") not in probe.sample(3.0)


def test_host_rates_come_from_counters_and_monotonic_time(tmp_path: Path) -> None:
    ps = FakePs()
    probe = host_probe(tmp_path, ps)
    assert metrics.CPU_UTIL_RATIO not in {metric for metric, _ in probe.sample(10.0)}
    ps.cores = [CpuTimes(13, 0, 5, 81, 5, 0, 0, 0, 4, 0), CpuTimes(0, 0, 0, 102, 0, 0, 0, 0, 0, 0)]
    ps.disk = SimpleNamespace(read_bytes=300, write_bytes=200)
    host_probe(tmp_path, ps, retransmits=9)
    readings = probe.sample(12.0)
    processes = {metrics.PROCESS_RSS_BYTES, metrics.PROCESS_THREADS, metrics.PROCESS_CPU_RATIO}
    assert {metric for metric, _ in readings} == set(metrics_of("host")) - processes
    # `user` grew by three seconds; two of them are a guest's, counted in its own column a second time.
    assert readings[metrics.CPU_UTIL_RATIO, "0"] == 0.75
    assert readings[metrics.CPU_UTIL_RATIO, "1"] == 0.0
    assert readings[metrics.CPU_UTIL_RATIO, "all"] == 0.5
    assert readings[metrics.DISK_READ_BYTES_PER_S, ""] == 100.0
    assert readings[metrics.NET_RETRANSMITS_PER_S, ""] == 2.0
    assert readings[metrics.MEMORY_USED_BYTES, ""] == 400.0
    assert readings[metrics.RUN_QUEUE, ""] == 3.0
    assert readings[metrics.DISK_USED_RATIO, ""] == 0.25


def test_host_without_disk_counters_or_procfs_still_answers_the_rest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ps = FakePs()
    ps.disk = None  # psutil's answer in some containers
    probe = HostProbe(tmp_path, ps=ps, proc=tmp_path / "absent")
    probe.sample(1.0)
    readings = probe.sample(2.0)
    absent = {
        metrics.DISK_READ_BYTES_PER_S,
        metrics.DISK_WRITE_BYTES_PER_S,
        metrics.RUN_QUEUE,
        metrics.NET_RETRANSMITS_PER_S,
    }
    assert absent.isdisjoint({metric for metric, _ in readings})
    assert readings[metrics.LOAD_1M, ""] == 1.5
    assert len(caplog.records) == len(absent)


def test_own_process_is_read_and_a_dead_one_is_absent() -> None:
    pids = {"daemon": os.getpid(), "engine": 2**22 + 1}
    probe = ProcessProbe(lambda: pids)
    probe.sample(1.0)
    readings = probe.sample(2.0)
    assert {label for _, label in readings} == {"daemon"}
    assert readings[metrics.PROCESS_RSS_BYTES, "daemon"] > 1e6
    assert readings[metrics.PROCESS_THREADS, "daemon"] >= 1
    assert readings[metrics.PROCESS_CPU_RATIO, "daemon"] >= 0


def test_restarted_process_has_no_rate_against_its_predecessor() -> None:
    class Process:
        def __init__(self, pid: int) -> None:
            self.pid = pid

        def is_running(self) -> bool:
            return True

        def memory_info(self) -> SimpleNamespace:
            return SimpleNamespace(rss=100)

        def num_threads(self) -> int:
            return 3

        def cpu_times(self) -> SimpleNamespace:
            return (
                SimpleNamespace(user=9.0, system=1.0)
                if self.pid == 1
                else SimpleNamespace(user=20.0, system=0.1)
            )

    pids = {"engine": 1}
    probe = ProcessProbe(lambda: pids, ps=SimpleNamespace(Process=Process))
    probe.sample(1.0)
    assert probe.sample(2.0)[metrics.PROCESS_CPU_RATIO, "engine"] == 0.0
    pids["engine"] = 2
    assert (metrics.PROCESS_CPU_RATIO, "engine") not in probe.sample(3.0)
    assert probe.sample(4.0)[metrics.PROCESS_CPU_RATIO, "engine"] == 0.0


def test_identity_is_the_same_on_two_machines_of_a_kind() -> None:
    identity = hardware_identity(NvmlProbe(FakeNvml()))
    assert identity["gpus"] == [{"name": "NVIDIA H200", "memory_bytes": 100}] * 2
    assert identity["driver"] == "580.1"
    assert identity["num_cores"] >= 1 and identity["memory_bytes"] > 0 and identity["cpu_model"]
    assert hardware_identity(NvmlProbe(FakeNvml({"nvmlInit": 9})))["gpus"] == []
