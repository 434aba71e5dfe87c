"""The page at /metrics, of values that a running server does not show."""

from runtime.exposition import Meter, Scrape, render


def page(**values: object) -> str:
    known = dict.fromkeys(
        ("kv_used_ratio", "config_id", "num_preemptions", "num_looked_up_tokens", "num_hit_tokens",
         "num_drafted_tokens", "num_right_tokens")
    )  # fmt: skip
    counts = {"num_running": 0, "num_waiting": 0, "num_restarts": 0, "version": 1, "records_dropped": 0}
    scrape = Scrape(
        model_name="m", meter=Meter(), engine_ready=True, replicas=(), **{**known, **counts, **values}
    )  # type: ignore[arg-type]
    return render(scrape).decode()


def test_a_kernel_that_failed_its_check_is_named() -> None:
    assert "tuner_kernel_replaced" not in page()
    assert 'tuner_kernel_replaced{kernel="paged_decode",model_name="m"} 1.0' in page(
        replaced_kernels=["paged_decode"]
    )
