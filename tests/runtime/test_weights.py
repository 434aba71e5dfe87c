import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from runtime import weights
from runtime.kernels import PLAIN, TRITON
from runtime.weights import (
    WeightSet,
    formats_from,
    linear_bfloat16_plain,
    linear_int8_plain,
    prepared,
    quantised,
    wanted_bytes,
)

LIMITS = {"bfloat16": 0.02, "int8": 0.03}  # relative to the float32 result: what the format itself loses


def model(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40, bias=bias), nn.LayerNorm(40), nn.Linear(40, 16, bias=bias))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 3, 40])
@pytest.mark.parametrize("format", ["bfloat16", "int8"])
def test_a_prepared_layer_computes_what_its_specification_says(format: str, rows: int, bias: bool) -> None:
    layer = nn.Linear(24, 40, bias=bias)
    x = torch.randn(2, rows, 24)
    with torch.inference_mode():
        if format == "int8":
            expected = linear_int8_plain(x, *quantised(layer.weight), layer.bias)
        else:
            expected = linear_bfloat16_plain(x, layer.weight, layer.bias)
        exact = layer(x)
        prepared(nn.Sequential(layer), format).install()
        actual = layer(x)
    assert actual.shape == exact.shape and actual.dtype == exact.dtype
    scale = expected.abs().max() if rows else 1.0
    torch.testing.assert_close(actual / scale, expected / scale, rtol=0, atol=weights.MAX_ERROR[format])
    if rows:
        assert 0 < (actual - exact).norm() / exact.norm() < LIMITS[format]


def test_what_preparations_launch_is_launched_for_few_rows_and_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    m, tried = nn.Sequential(nn.Embedding(9, 24), nn.Linear(24, 400)), list[tuple[type, torch.Size]]()
    agrees, before = weights._agrees, m[1].weight.clone()

    def noting(form: weights.Form, module: nn.Linear, limit: float) -> bool:
        tried.append((type(form), module.weight.shape))
        assert agrees(form, module, limit)
        return True

    monkeypatch.setattr(weights, "_agrees", noting)
    weights.wake_preparations(m, formats_from(torch.float32)[1:])
    few = torch.Size((weights.FEW_ROWS, 24))
    assert tried == [(weights.BFloat16Form, few), (weights.Int8Form, few)]
    assert torch.equal(m[1].weight, before) and m[1].weight.requires_grad
    weights.wake_preparations(nn.Sequential(nn.Embedding(9, 24)), ["int8"])  # nothing to multiply


@pytest.mark.parametrize("is_packed", [True, False])
def test_each_input_is_rounded_by_itself(is_packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_packed:
        monkeypatch.setattr(weights, "_packed_int8", lambda weight: None)
    layer = nn.Linear(24, 40)
    prepared(nn.Sequential(layer), "int8").install()
    with torch.inference_mode():
        for x in (torch.randn(3, 24), torch.randn(3, 24) * 50, torch.randn(3, 24)):
            expected = linear_int8_plain(x, *quantised(layer.weight), layer.bias)
            assert (layer(x) - expected).abs().max() <= weights.MAX_ERROR["int8"] * expected.abs().max()


def test_packed_and_other_layers_of_one_input_have_levels_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed = weights._packed_int8
    monkeypatch.setattr(weights, "_packed_int8", lambda weight: packed(weight) if len(weight) == 40 else None)
    layers, x = [nn.Linear(24, size) for size in (40, 48, 40)], torch.randn(3, 24)
    with torch.inference_mode():
        expected = [linear_int8_plain(x, *quantised(layer.weight), layer.bias) for layer in layers]
        prepared(nn.Sequential(*layers), "int8").install()
        for layer, wanted in zip(layers, expected, strict=True):
            assert (layer(x) - wanted).abs().max() <= weights.MAX_ERROR["int8"] * wanted.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_integers_give_numbers_of_the_type_of_the_input(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_packed_int8", lambda weight: None)
    layer, x = nn.Linear(24, 40).to(dtype), torch.randn(3, 24).to(dtype)
    prepared(nn.Sequential(layer), "int8").install()
    with torch.inference_mode():
        out = layer(x)
    expected = linear_int8_plain(x, *quantised(layer.weight), layer.bias)
    assert out.dtype == dtype and (out - expected).abs().max() <= 0.02 * expected.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [True, False])
def test_integers_are_multiplied_on_a_gpu(bias: bool, caplog: pytest.LogCaptureFixture) -> None:
    assert TRITON is not None
    layer = nn.Linear(1024, 3072, bias=bias, device="cuda", dtype=torch.bfloat16)
    prepared(nn.Sequential(layer), "int8", kernels=TRITON).install()
    assert caplog.records == [], "the plain form would serve"
    levels, scale = quantised(layer.weight)
    with torch.inference_mode():
        for rows in (1, 5, 17, 32, 33, 200):
            x = torch.randn(rows, 1024, device="cuda").bfloat16()
            expected = linear_int8_plain(x, levels, scale, layer.bias)
            assert (layer(x) - expected).abs().max() <= 0.01 * expected.abs().max()


@pytest.mark.parametrize("format", ["bfloat16", "int8"])
@pytest.mark.parametrize("wrong_rows", [1, 5])
def test_a_layer_that_differs_for_some_numbers_of_rows_is_served_by_its_specification(
    format: str, wrong_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = {"bfloat16": weights.BFloat16Form, "int8": weights.Int8Form}[format]
    forward, dropped = kind.forward, list[weights.Form]()
    monkeypatch.setattr(kind, "drop_fast", lambda form: dropped.append(form))
    monkeypatch.setattr(kind, "forward", lambda form, x: forward(form, x) + (len(x) == wrong_rows))
    prepared(model(), format)
    assert len(dropped) == 2


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_a_layer_that_cannot_be_computed_is_served_by_its_specification(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise error("not compiled")

    monkeypatch.setattr(weights, "_packed_int8", lambda weight: None)
    m, x = model(), torch.randn(1, 5, 24)
    made = prepared(m, "int8", kernels=PLAIN._replace(int8_levels=refuse))
    with torch.inference_mode():
        exact = m[0](x)
        made.install()
        assert 0 < (m[0](x) - exact).norm() / exact.norm() < LIMITS["int8"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 3, 40])
def test_integers_are_multiplied_alike_without_packed_weights(
    rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, by the twins of its kernels."""
    asked = list[tuple[int, int]]()

    def noting(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        asked.append((x.shape[0], x.shape[1]))
        return PLAIN.int8_levels(x)

    monkeypatch.setattr(weights, "_packed_int8", lambda weight: None)
    layer, same = nn.Linear(24, 40, bias=bias), nn.Linear(24, 40, bias=bias)
    made = prepared(nn.Sequential(layer, same), "int8", kernels=PLAIN._replace(int8_levels=noting))
    x = torch.randn(2, rows, 24)
    with torch.inference_mode():
        expected = linear_int8_plain(x, *quantised(layer.weight), layer.bias)
        made.install()
        asked.clear()
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
        same(x)
    assert asked == ([(2 * rows, 24)] if rows else []), "both layers share one rounding"


@pytest.mark.parametrize("values", [1, 100, 961])
def test_weights_are_widened_in_parts_to_the_same_bits(values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x, bias = torch.randn(40, 24).bfloat16(), torch.randn(3, 24).bfloat16(), torch.randn(40)
    levels, scale = quantised(weight)
    whole = linear_int8_plain(x, levels, scale, bias)
    assert scale.dtype == torch.float32 and levels.abs().amax(1).eq(127).all()
    monkeypatch.setattr(weights, "WIDENED_VALUES", values)
    assert all(part.numel() <= max(24, values) for part, _ in weights._in_parts(levels, scale))
    for part, expected in zip(quantised(weight), (levels, scale), strict=True):
        assert torch.equal(part, expected)
    torch.testing.assert_close(linear_int8_plain(x, levels, scale, bias), whole)


def test_int8_of_one_row_does_not_depend_on_its_company() -> None:
    layer = nn.Linear(64, 32, bias=False)
    prepared(nn.Sequential(layer), "int8").install()
    x = torch.randn(1, 9, 64)
    x[0, 1:] *= 1000
    with torch.inference_mode():
        torch.testing.assert_close(layer(x)[0, :1], layer(x[:, :1])[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("format", ["bfloat16", "int8"])
def test_installing_the_loaded_set_again_restores_every_bit(format: str) -> None:
    m, x = model(), torch.randn(1, 5, 24)
    with torch.inference_mode():
        before = m(x)
        loaded = WeightSet.of_installed(m, "float32")
        prepared(m, format).install()
        assert not torch.equal(m(x), before)
        loaded.install()
        assert torch.equal(m(x), before)


def test_preparing_changes_nothing_until_it_is_installed() -> None:
    m, x = model(), torch.randn(1, 5, 24)
    with torch.inference_mode():
        before = m(x)
        made = prepared(m, "int8")
        made.wake([1, 3, 40])
        assert torch.equal(m(x), before)


def test_weights_shared_by_two_layers_are_held_once() -> None:
    tied = nn.Linear(24, 24, bias=False)
    other = nn.Linear(24, 24, bias=False)
    other.weight = tied.weight
    assert prepared(nn.Sequential(tied, other), "int8").nbytes == 24 * 24 + 4 * 24


def test_the_bytes_are_known_before_and_never_more_after() -> None:
    m = model(bias=False)
    for format in ("bfloat16", "int8"):
        assert 0 < prepared(m, format).nbytes <= wanted_bytes(m, format)


@pytest.mark.parametrize("format", ["bfloat16", "int8"])
def test_a_layer_whose_fast_form_differs_is_served_by_its_specification(
    format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_agrees", lambda *_: False)
    m, x = model(), torch.randn(1, 5, 24)
    made = prepared(m, format)
    with torch.inference_mode():
        exact = linear(x, m[0].weight, m[0].bias)
        made.install()
        assert 0 < (m[0](x) - exact).norm() / exact.norm() < LIMITS[format]


def test_numbers_that_are_none_stay_none() -> None:
    m, x = model(), torch.randn(1, 3, 24)
    x[0, 1] = torch.nan
    for format in ("bfloat16", "int8"):
        prepared(m, format).install()
        with torch.inference_mode():
            out = m(x)
        assert out[0, 1].isnan().all() and out[0, [0, 2]].isfinite().all()


def test_only_formats_no_finer_than_the_loaded_one_are_offered() -> None:
    assert formats_from(torch.float32) == ("float32", "bfloat16", "int8")
    assert formats_from(torch.bfloat16) == ("bfloat16", "int8")
    assert formats_from(torch.float64) == ("float64",)
