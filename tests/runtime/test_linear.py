import pytest
import torch
from torch import nn

from runtime import linear
from runtime.linear import pack_linears

needs_mkldnn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN"
)


@needs_mkldnn
@pytest.mark.parametrize("rows", [0, 1, 3, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_layer_computes_what_the_plain_one_does(rows: int, bias: bool) -> None:
    layer = nn.Linear(24, 40, bias=bias)
    x = torch.randn(1, rows, 24)
    with torch.inference_mode():
        expected = layer(x)
        assert pack_linears(nn.Sequential(layer), 10**6) == 1
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@needs_mkldnn
def test_packs_only_as_much_as_memory_allows() -> None:
    layers = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    assert pack_linears(layers, 1500) == 1


def test_leaves_other_types_of_weights_alone() -> None:
    assert pack_linears(nn.Sequential(nn.Linear(16, 16, dtype=torch.float64)), 10**6) == 0


@needs_mkldnn
def test_keeps_the_plain_layer_when_the_packed_result_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "MAX_RELATIVE_ERROR", -1.0)
    assert pack_linears(nn.Sequential(nn.Linear(16, 16)), 10**6) == 0
