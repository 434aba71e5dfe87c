from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.errors import SettingsError
from tuner.load.arrivals import Arrival, arrivals, length_scale, read_trace
from tuner.settings import TrafficSettings

CUT = Path(__file__).parents[2] / "configs" / "traces" / "azure_code_cut.csv"


def drawn(
    settings: TrafficSettings, count: int = 4000, context_tokens: int = 2048, seed: int = 0
) -> list[Arrival]:
    return list(islice(arrivals(settings, np.random.default_rng(seed), context_tokens), count))


def per_second(found: list[Arrival], until_s: int) -> np.ndarray:
    return np.bincount([int(arrival.at_s) for arrival in found if arrival.at_s < until_s], minlength=until_s)


@pytest.mark.parametrize("kind", ["poisson", "constant", "bursts", "daily"])
def test_mean_rate_is_as_asked(kind: str) -> None:
    found = drawn(TrafficSettings(kind=kind, rate_per_s=8, day_s=100))
    whole_periods_s = 300  # of the 60 s burst and of the 100 s day
    assert per_second(found, whole_periods_s).mean() == pytest.approx(8, rel=0.05)


def test_poisson_gaps_vary_and_constant_gaps_do_not() -> None:
    def variation(kind: str) -> float:
        gaps = [
            later.at_s - earlier.at_s
            for earlier, later in pairwise(drawn(TrafficSettings(kind=kind, rate_per_s=8)))
        ]
        return float(np.std(gaps) / np.mean(gaps))

    assert variation("poisson") == pytest.approx(1.0, abs=0.05)
    assert variation("constant") == pytest.approx(0.0, abs=1e-6)


def test_bursts_are_as_dense_as_declared_and_the_start_is_calm() -> None:
    settings = TrafficSettings(
        kind="bursts", rate_per_s=10, burst={"every_s": 60, "duration_s": 10, "factor": 4}
    )
    counts = per_second(drawn(settings), 360).reshape(6, 60)
    assert counts[0, :10].mean() == pytest.approx(counts[:, 20:].mean(), rel=0.3)
    assert counts[1:, :10].mean() / counts[:, 10:].mean() == pytest.approx(4, rel=0.15)


def test_day_swings_between_quiet_start_and_noon() -> None:
    counts = per_second(drawn(TrafficSettings(kind="daily", rate_per_s=10, day_s=300)), 300)
    assert counts[140:160].mean() > 4 * counts[:20].mean()


@given(
    kind=st.sampled_from(["poisson", "constant", "bursts", "daily", "replay"]),
    seed=st.integers(0, 2**32 - 1),
    context_tokens=st.integers(16, 100_000),
)
def test_arrivals_are_ordered_fit_the_context_and_repeat_for_a_seed(
    kind: str, seed: int, context_tokens: int
) -> None:
    settings = TrafficSettings(kind=kind, rate_per_s=5, trace=CUT)
    found = drawn(settings, 50, context_tokens, seed)
    assert found == drawn(settings, 50, context_tokens, seed)
    assert all(later.at_s >= earlier.at_s for earlier, later in pairwise(found))
    for arrival in found:
        assert arrival.prompt_tokens >= 1
        assert arrival.output_tokens >= 1
        assert arrival.prompt_tokens + arrival.output_tokens <= context_tokens


def test_mix_holds_the_shares_before_scaling() -> None:
    classes = [arrival.length_class for arrival in drawn(TrafficSettings(rate_per_s=5))]
    shares = {name: classes.count(name) / len(classes) for name in ("short", "medium", "long")}
    assert shares == pytest.approx({"short": 0.6, "medium": 0.3, "long": 0.1}, abs=0.03)


def test_one_factor_scales_prompts_and_answers_to_the_context() -> None:
    settings = TrafficSettings(rate_per_s=5)
    assert length_scale(settings, 100_000) == 1.0
    assert length_scale(settings, 2176) == 0.5
    assert length_scale(settings.model_copy(update={"length_scale": 0.25}), 2176) == 0.25
    whole, half = drawn(settings, 100, 100_000), drawn(settings, 100, 2176)
    for full, scaled in zip(whole, half, strict=True):
        assert scaled.prompt_tokens == pytest.approx(full.prompt_tokens / 2, abs=1)
        assert scaled.output_tokens == pytest.approx(full.output_tokens / 2, abs=1)


def test_answers_have_the_asked_mean_and_never_exceed_their_cap() -> None:
    lengths = [
        arrival.output_tokens for arrival in drawn(TrafficSettings(rate_per_s=5), context_tokens=100_000)
    ]
    assert np.mean(lengths) == pytest.approx(96, rel=0.05)
    assert max(lengths) <= 256


def test_another_process_or_rate_leaves_the_lengths_as_they_are() -> None:
    slow, fast = (
        drawn(TrafficSettings(rate_per_s=2), 50),
        drawn(TrafficSettings(kind="bursts", rate_per_s=9), 50),
    )
    assert [arrival[1:] for arrival in slow] == [arrival[1:] for arrival in fast]


def test_shipped_trace_replays_at_its_own_pace_and_starts_over() -> None:
    rows = read_trace(CUT)
    found = drawn(TrafficSettings(kind="replay", trace=CUT), 2 * len(rows), 10_000)
    assert len(rows) == 600
    assert [arrival.at_s for arrival in found[:600]] == pytest.approx([row.at_s for row in rows])
    assert [arrival[1:] for arrival in found[:600]] == [arrival[1:] for arrival in found[600:]]
    assert found[600].at_s > found[599].at_s


def test_replay_is_stretched_to_the_asked_rate_and_keeps_its_shape() -> None:
    own = drawn(TrafficSettings(kind="replay", trace=CUT), 600)
    stretched = drawn(TrafficSettings(kind="replay", trace=CUT, rate_per_s=1), 1200)
    assert 1200 / stretched[-1].at_s == pytest.approx(1, rel=0.01)
    factor = stretched[599].at_s / own[599].at_s
    assert [arrival.at_s for arrival in stretched[:600]] == pytest.approx(
        [factor * arrival.at_s for arrival in own]
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("TIMESTAMP,ContextTokens\n1,2\n", "lacks GeneratedTokens"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "at least one request"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,2,3\n", "Request 1"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n1,2,3\n2,x,3\n", "Request 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n1,2\n", "Request 1"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\ninf,2,3\n", "finite"),
    ],
)
def test_refuses_a_damaged_trace_and_says_where(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(SettingsError, match=told):
        read_trace(path)


def test_reads_seconds_zones_unsorted_rows_and_a_single_row(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "\ufeffContextTokens,TIMESTAMP,GeneratedTokens,More\n7,12.5,1,x\n5,10,0,y\n\n", encoding="utf-8"
    )
    assert [tuple(row) for row in read_trace(path)] == [(0.0, 5, 1), (2.5, 7, 1)]
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-12 02:00:00+02:00,4,4\n2024-05-12 00:00:01+00:00,5,5\n"
    )
    assert [row.at_s for row in read_trace(path)] == [0.0, 1.0]
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n1,4,4\n")
    assert [arrival.at_s for arrival in drawn(TrafficSettings(kind="replay", trace=path), 3)] == [
        0.0,
        1.0,
        2.0,
    ]


def test_asks_for_the_capacity_where_only_a_utilisation_is_known() -> None:
    with pytest.raises(SettingsError, match="measure the capacity"):
        drawn(TrafficSettings(utilisation=0.7), 1)
