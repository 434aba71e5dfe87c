from collections.abc import Callable

import pytest
import torch
from torch import nn

from runtime import linear
from runtime.linear import LaidOutLinear, Layout, fastest, lay_out_linears, padded_rows, timed_layout

needs_mkldnn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN"
)


def all_forms(layer: LaidOutLinear) -> Layout:
    return Layout(turned=True, packed_from=3)


def always_packed(layer: LaidOutLinear) -> Layout:
    return Layout(turned=False, packed_from=1)


def turned(layer: LaidOutLinear) -> Layout:
    return Layout(turned=True, packed_from=None)


@needs_mkldnn
@pytest.mark.parametrize("rows", [0, 1, 3, 35, 40])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("judge", [all_forms, always_packed, turned])
def test_a_layer_computes_the_same_in_every_layout(
    rows: int, bias: bool, judge: Callable[[LaidOutLinear], Layout]
) -> None:
    layer = nn.Linear(24, 40, bias=bias)
    x = torch.randn(1, rows, 24)
    with torch.inference_mode():
        expected = layer(x)
        assert lay_out_linears(nn.Sequential(layer), 10**6, judge) == 1
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@needs_mkldnn
def test_packs_only_as_much_as_memory_allows() -> None:
    layers = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    assert lay_out_linears(layers, 2500, all_forms) == 1


def test_leaves_other_types_of_weights_alone() -> None:
    assert lay_out_linears(nn.Sequential(nn.Linear(16, 16, dtype=torch.float64)), 10**6) == 0


@needs_mkldnn
def test_keeps_the_plain_layer_when_the_packed_result_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "MAX_RELATIVE_ERROR", -1.0)
    assert lay_out_linears(nn.Sequential(nn.Linear(16, 16)), 10**6, always_packed) == 0


def test_steps_of_any_size_compile_few_products() -> None:
    sizes = [padded_rows(num_rows) for num_rows in range(1, 2049)]
    assert len(set(sizes)) == 72
    assert all(rows <= size <= rows * 9 / 8 for rows, size in enumerate(sizes, 1))
    assert sizes[:17] == [*range(1, 17), 18]


def test_takes_the_form_that_loses_least_over_all_rows() -> None:
    plain = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    slow = [9.0 * one for one in plain]
    assert fastest(plain, slow, [2.0, 3.0, 3.9, 4.0, 8.0, 16.0]) == Layout(False, 4)
    assert fastest(plain, slow, [0.5] * 6) == Layout(False, 1)
    assert fastest(plain, slow, slow) == Layout(False, None)
    assert fastest(plain, slow, [2.0, 1.9, 8.0, 4.0, 8.0, 16.0]).packed_from == 8, (
        "one lucky timing decides nothing"
    )
    assert fastest(plain, [0.6, 1.5, 5.0, 9.0, 17.0, 33.0], [2.0, 2.5, 3.0, 4.0, 8.0, 16.0]) == Layout(
        True, 4
    )
    assert fastest(plain, [0.99, *plain[1:]], slow) == Layout(False, None), "not worth a copy"


def test_times_what_is_there() -> None:
    class Timed(LaidOutLinear):
        def plain(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(200):
                x = x + 1.0
            return x

        def turned(self, x: torch.Tensor) -> torch.Tensor:
            return x if len(x) == 1 else self.plain(x)

        def packed(self, x: torch.Tensor) -> torch.Tensor:
            return self.plain(x) if len(x) == 1 else x

    assert timed_layout(Timed(nn.Linear(16, 16))) == Layout(True, 2)


@needs_mkldnn
def test_layers_that_gain_nothing_take_no_memory() -> None:
    layers = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    assert lay_out_linears(layers, 10**6, lambda layer: Layout(False, None)) == 0
    assert "forward" not in vars(layers[0])
