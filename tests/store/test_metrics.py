import copy
import pickle
import re

import pytest

from store import metrics
from store.errors import UnknownMetric
from store.metrics import METRICS, Metric, metric_named, metrics_of

# The names that dashboards, exports and stored samples rely on. A change here needs a migration of `sample`.
HARDWARE = [
    "gpu_util_ratio",
    "gpu_memory_used_bytes",
    "gpu_memory_total_bytes",
    "gpu_temperature_celsius",
    "gpu_temperature_limit_celsius",
    "gpu_power_watts",
    "gpu_power_limit_watts",
    "gpu_clock_sm_hz",
    "gpu_clock_memory_hz",
    "gpu_throttle_reasons",
    "gpu_pcie_tx_bytes_per_s",
    "gpu_pcie_rx_bytes_per_s",
    "gpu_nvlink_tx_bytes_per_s",
    "gpu_nvlink_rx_bytes_per_s",
    "gpu_ecc_uncorrected_total",
    "gpu_ecc_corrected_total",
]
HOST = [
    "cpu_util_ratio",
    "cpu_steal_ratio",
    "clock_step_s",
    "suspended_s",
    "load_1m",
    "run_queue",
    "memory_used_bytes",
    "memory_total_bytes",
    "swap_used_bytes",
    "disk_used_ratio",
    "disk_read_bytes_per_s",
    "disk_write_bytes_per_s",
    "net_sent_bytes_per_s",
    "net_received_bytes_per_s",
    "net_retransmits_per_s",
    "process_rss_bytes",
    "process_threads",
    "process_cpu_ratio",
]
RUNTIME = [
    "requests_running",
    "requests_waiting",
    "requests_per_s",
    "ttft_s",
    "tpot_s",
    "itl_s",
    "e2e_s",
    "output_tokens_per_s",
    "prompt_tokens_per_s",
    "prompt_tokens",
    "output_tokens",
    "kv_used_ratio",
    "kv_fragmentation_ratio",
    "prefix_hit_tokens_per_s",
    "prefix_hit_ratio",
    "drafted_tokens_per_s",
    "draft_right_ratio",
    "preemptions_total",
    "batch_size",
    "step_s",
    "errors_total",
    "engine_restarts_total",
    "records_dropped_total",
]


def test_the_declared_metrics_are_exactly_these() -> None:
    assert [str(metric) for metric in metrics_of("hardware")] == HARDWARE
    assert [str(metric) for metric in metrics_of("host")] == HOST
    assert [str(metric) for metric in metrics_of("runtime")] == RUNTIME
    assert list(METRICS) == HARDWARE + HOST + RUNTIME


def test_every_metric_is_a_constant_of_its_own_name() -> None:
    constants = {name: value for name, value in vars(metrics).items() if isinstance(value, Metric)}
    assert {name.lower() for name in constants} == set(METRICS)
    assert all(metric == name.lower() for name, metric in constants.items())


@pytest.mark.parametrize("metric", METRICS.values(), ids=str)
def test_a_metric_is_fully_declared_and_its_name_ends_in_its_unit(metric: Metric) -> None:
    assert metric.help.endswith(".")
    assert metric.better in ("lower", "higher", None)
    assert len(metric) <= 64  # the column's width
    endings = {
        "s": "_s",
        "bytes": "_bytes",
        "ratio": "_ratio",
        "watts": "_watts",
        "celsius": "_celsius",
        "hertz": "_hz",
        "bytes/s": "_bytes_per_s",
        "tokens/s": "_tokens_per_s",
    }
    if metric.unit in endings:
        assert metric.endswith(endings[metric.unit])
    if metric.endswith("_total"):
        assert metric.summary == "max", (
            "a counter that is averaged over a minute counts backwards at its edges"
        )
    if metric.label.values is not None:
        assert all(re.fullmatch(r"[a-z0-9_]{0,32}", value) for value in metric.label.values)


def test_a_copy_in_another_process_is_the_declared_metric() -> None:
    assert pickle.loads(pickle.dumps(metrics.TTFT_S)) is metrics.TTFT_S
    assert copy.deepcopy(metrics.TTFT_S) is metrics.TTFT_S


def test_an_unknown_name_is_answered_with_the_nearest_and_the_list() -> None:
    with pytest.raises(
        UnknownMetric, match=r"Unknown metric `ttft`. Did you mean `ttft_s`\? The metrics are: gpu_util"
    ):
        metric_named("ttft")


def test_a_label_that_a_metric_does_not_carry_is_refused() -> None:
    assert metrics.TTFT_S.check_label("p95") == "p95"
    assert metrics.GPU_POWER_WATTS.check_label("3") == "3"
    assert metrics.REQUESTS_RUNNING.check_label("") == ""
    with pytest.raises(UnknownMetric, match="'p50', 'p95', 'p99', 'mean'; but got 'p90'"):
        metrics.TTFT_S.check_label("p90")
    with pytest.raises(UnknownMetric):
        metrics.GPU_POWER_WATTS.check_label("")
    with pytest.raises(UnknownMetric):
        metrics.REQUESTS_RUNNING.check_label("engine")
