import pytest
import torch
from torch import nn

from runtime import linear
from runtime.linear import TIMED_ROWS, Multiply, pack_linears, packed_from, padded_rows, turning_point

needs_mkldnn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN"
)


def from_three(plain: Multiply, packed: Multiply, in_features: int) -> int | None:
    return 3


def always(plain: Multiply, packed: Multiply, in_features: int) -> int | None:
    return 1


@needs_mkldnn
@pytest.mark.parametrize("rows", [0, 1, 3, 35, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_layer_computes_what_the_plain_one_does(rows: int, bias: bool) -> None:
    layer = nn.Linear(24, 40, bias=bias)
    x = torch.randn(1, rows, 24)
    with torch.inference_mode():
        expected = layer(x)
        assert pack_linears(nn.Sequential(layer), 10**6, from_three) == 1
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@needs_mkldnn
def test_packs_only_as_much_as_memory_allows() -> None:
    layers = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    assert pack_linears(layers, 1500, always) == 1


def test_leaves_other_types_of_weights_alone() -> None:
    assert pack_linears(nn.Sequential(nn.Linear(16, 16, dtype=torch.float64)), 10**6) == 0


@needs_mkldnn
def test_keeps_the_plain_layer_when_the_packed_result_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "MAX_RELATIVE_ERROR", -1.0)
    assert pack_linears(nn.Sequential(nn.Linear(16, 16)), 10**6, always) == 0


def test_steps_of_any_size_compile_few_products() -> None:
    sizes = [padded_rows(num_rows) for num_rows in range(1, 2049)]
    assert len(set(sizes)) == 72
    assert all(rows <= size <= rows * 9 / 8 for rows, size in enumerate(sizes, 1))
    assert sizes[:17] == [*range(1, 17), 18]


def test_packs_from_where_it_pays() -> None:
    plain = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    assert turning_point(plain, [2.0, 3.0, 3.9, 4.0, 8.0, 16.0]) == 4
    assert turning_point(plain, [0.5] * 6) == 1
    assert turning_point(plain, [2 * one for one in plain]) is None
    assert turning_point(plain, [2.0, 1.9, 8.0, 4.0, 8.0, 16.0]) == 8, "one lucky timing decides nothing"


def test_a_layer_that_is_faster_plain_is_not_packed() -> None:
    def fast(x: torch.Tensor) -> torch.Tensor:
        return x

    def slow(x: torch.Tensor) -> torch.Tensor:
        for _ in range(200):
            x = x + 1.0
        return x

    assert packed_from(fast, slow, 16) is None
    assert packed_from(slow, fast, 16) == TIMED_ROWS[0]


@needs_mkldnn
def test_layers_that_are_not_worth_packing_take_no_memory() -> None:
    layers = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    assert pack_linears(layers, 10**6, lambda plain, packed, in_features: None) == 0
    assert "forward" not in vars(layers[0])
