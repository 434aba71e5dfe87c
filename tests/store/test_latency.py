import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from store.latency import RequestSummary, percentile, summarise
from store.tables import RequestTiming

finite = st.floats(0.0, 1e6)


def timing(
    e2e_s: float, *, ttft_s: float | None = None, output_tokens: int = 11, finish_reason: str = "stop"
) -> RequestTiming:
    first = None if ttft_s is None else ttft_s
    return RequestTiming("b", 1, "r", 0.0, e2e_s, 10, output_tokens, finish_reason, first_token_at=first)


@given(st.lists(finite, min_size=1, max_size=50), st.floats(0.0, 1.0))
def test_a_percentile_is_that_of_numpy(values: list[float], share: float) -> None:
    assert percentile(sorted(values), share) == pytest.approx(
        float(np.quantile(values, share)), rel=1e-9, abs=1e-9
    )


def test_latencies_follow_their_definitions() -> None:
    summary = summarise([timing(3.0, ttft_s=1.0, output_tokens=5)])
    assert summary.e2e is not None and summary.ttft is not None and summary.tpot is not None
    assert (summary.e2e.p50, summary.ttft.p50, summary.tpot.p50) == (3.0, 1.0, 0.5)


def test_failures_count_against_success_and_not_into_latency() -> None:
    timings = [
        timing(1.0, ttft_s=0.5),
        *(timing(99.0, finish_reason=reason) for reason in ("error", "timeout", "rejected")),
    ]
    summary = summarise(timings)
    assert (summary.num, summary.num_succeeded, summary.success_ratio) == (4, 1, 0.25)
    assert summary.e2e is not None and (summary.e2e.num, summary.e2e.p99) == (1, 1.0)


def test_what_a_client_gave_up_is_neither_success_nor_failure() -> None:
    summary = summarise([timing(1.0), timing(0.1, finish_reason="abort")])
    assert (summary.num, summary.num_aborted, summary.success_ratio) == (1, 1, 1.0)


def test_one_token_has_no_time_per_output_token() -> None:
    summary = summarise([timing(1.0, ttft_s=1.0, output_tokens=1)])
    assert summary.tpot is None and summary.ttft is not None


def test_no_requests_have_no_latency_and_no_success() -> None:
    assert summarise([]) == RequestSummary(0, 0, 0, None, None, None)
    assert summarise([]).success_ratio is None


@given(st.lists(st.builds(timing, finite, ttft_s=st.just(0.0)), min_size=1))
def test_percentiles_are_ordered_and_lie_among_the_values(timings: list[RequestTiming]) -> None:
    found = summarise(timings).e2e
    assert found is not None
    values = [row.finished_at for row in timings]
    assert min(values) <= found.p50 <= found.p95 <= found.p99 <= max(values)
    assert found.mean == pytest.approx(math.fsum(values) / len(values))
