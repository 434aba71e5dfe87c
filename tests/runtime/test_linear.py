import pytest
import torch
from torch import nn

from runtime import linear
from runtime.linear import Judge, LaidOutLinear, Layout, fastest, lay_out_linears, padded_rows, timed_layouts

needs_mkldnn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN"
)


def every(layout: Layout) -> Judge:
    return lambda layers: {layer.shape: layout for layer in layers}


all_forms = every(Layout("turned", 3))
always_packed = every(Layout("plain", 1))
turned = every(Layout("turned", None))
parted = every(Layout("parted", None))


@needs_mkldnn
@pytest.mark.parametrize("rows", [0, 1, 3, 35, 40])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("judge", [all_forms, always_packed, turned, parted])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_layer_computes_the_same_in_every_layout(
    rows: int, bias: bool, judge: Judge, threads: int, request: pytest.FixtureRequest
) -> None:
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    torch.set_num_threads(threads)  # three do not divide the outputs
    layer = nn.Linear(24, 40, bias=bias)
    x = torch.randn(1, rows, 24)
    with torch.inference_mode():
        expected = layer(x)
        assert lay_out_linears(nn.Sequential(layer), 10**6, judge) == 1
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@needs_mkldnn
def test_lays_out_only_as_much_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    assert lay_out_linears(layers, 2 * 2048 - 1, all_forms) == 0, "all that is timed must fit"
    sampled = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(3)))
    monkeypatch.setattr(linear, "SAMPLED_BYTES", 1024)
    assert lay_out_linears(sampled, 5000, all_forms) == 2


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

    def chosen(parted: list[float], turned: list[float], packed: list[float]) -> Layout:
        return fastest({"plain": plain, "parted": parted, "turned": turned, "packed": packed})

    assert chosen(slow, slow, [2.0, 3.0, 3.9, 4.0, 8.0, 16.0]) == Layout("plain", 4)
    assert chosen(slow, slow, [0.5] * 6) == Layout("plain", 1)
    assert chosen(slow, slow, slow) == Layout("plain", None)
    assert chosen(slow, slow, [2.0, 1.9, 8.0, 4.0, 8.0, 16.0]).packed_from == 8, (
        "one lucky timing decides nothing"
    )
    few = [0.6, 1.5, 5.0, 9.0, 17.0, 33.0]
    assert chosen(slow, few, [2.0, 2.5, 3.0, 4.0, 8.0, 16.0]) == Layout("turned", 4)
    assert chosen(few, few, [2.0, 2.5, 3.0, 4.0, 8.0, 16.0]) == Layout("parted", 4), "no copy without a gain"
    assert chosen([0.99, *plain[1:]], slow, slow) == Layout("plain", None)


@needs_mkldnn
def test_times_every_shape_for_itself() -> None:
    class Timed(LaidOutLinear):
        """Small layers are quick turned at one row and packed at more; large ones as loaded."""

        def slow(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(200):
                x = x + 1.0
            return x

        def plain(self, x: torch.Tensor) -> torch.Tensor:
            return self.slow(x) if self.shape == (16, 16) else x

        def parted(self, x: torch.Tensor) -> torch.Tensor:
            return self.slow(x)

        def turned(self, x: torch.Tensor) -> torch.Tensor:
            return x if self.shape == (16, 16) and len(x) == 1 else self.slow(x)

        def packed(self, x: torch.Tensor) -> torch.Tensor:
            return x if self.shape == (16, 16) and len(x) > 1 else self.slow(x)

    layers = [Timed(nn.Linear(16, size)) for size in (16, 32, 16, 32)]
    assert timed_layouts(layers) == {(16, 16): Layout("turned", 2), (32, 16): Layout("plain", None)}


@needs_mkldnn
def test_layers_that_gain_nothing_take_no_memory() -> None:
    layers = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    assert lay_out_linears(layers, 10**6, every(Layout("plain", None))) == 0
    assert "forward" not in vars(layers[0])
