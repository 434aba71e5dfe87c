"""Kernels beside their plain twins: on a GPU, under Triton's interpreter, and compiled for a GPU that is not there.

The interpreter and the compiler for an absent GPU each run in a process of their own, as Triton decides at its import.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from runtime.attention import attend_plain
from runtime.decode_graph import BUCKETS, COMPILED_BUCKETS
from runtime.decoder import Norm
from runtime.expert_choice import Rule
from runtime.kernels import PLAIN, WHY_NO_TRITON, Kernels, Shape, checked, linear_table, self_check
from runtime.kernels.expert_trials import ExpertShape
from runtime.kernels.launch import FEW_ROWS
from runtime.kernels.linear_table import TIMED_ROWS, Choice, LinearShape, LinearTable
from runtime.kernels.splits import (
    FEW_SPLITS,
    MAX_SPLITS,
    MAX_TILE_SPLITS,
    QUERY_TILE,
    are_uneven,
    choose_splits,
    choose_tile_splits,
    tiles_of,
    uneven_splits,
)
from tests.runtime.kernel_cases import CASES, interpreted_cases, kernels

CPU = torch.device("cpu")
SMALL = Shape(
    4, 2, 8, 16, 24, 4, has_qk_norm=True, latent_dim=12, latent_value_dim=8, experts=ExpertShape(6, 8, 1, Rule(2))
)  # fmt: skip
ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(
    WHY_NO_TRITON is not None, reason=f"Triton cannot be imported: {WHY_NO_TRITON}"
)


@cache
def child(*options: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.runtime.kernel_cases", *options],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)} | env, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def results(*options: str, **env: str) -> dict[str, str | None]:
    """What the cases came to in a process of their own: name -> error or None."""
    found = child(*options, **env)
    assert found.returncode == 0, found.stderr
    told: dict[str, str | None] = json.loads(found.stdout)
    return told


def interpreted() -> dict[str, str | None]:
    return results(TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.parametrize("name", interpreted_cases())
def test_interpreted_kernel_agrees_with_its_twin(name: str) -> None:
    error = interpreted()[name]
    assert error is None, error


@needs_triton
def test_every_kernel_compiles_for_a_hopper_gpu(tmp_path: Path) -> None:
    found = results("--compile", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert len(found) >= 15
    assert [error for error in found.values() if error is not None] == []


ASIDE = """
from triton.compiler import ASTSource
from runtime.kernels import aside
from runtime.kernels.aside import Child, compiled_aside
from tests.runtime.kernel_cases import compile_only, compiled_cases, told

def refuse(*given, **named):
    raise RuntimeError("compiled here")

def noting(self, job):
    assert not job.is_compiled()
    inner(self, job)
    assert job.is_compiled()

compile_only()
cases, make, inner, start = compiled_cases(), ASTSource.make_ir, Child.compile, Child.__init__
ASTSource.make_ir, Child.compile = refuse, noting
with compiled_aside():
    errors = [told(cases[name]) for name in ("rope", "norm", "weigh")]
assert errors == [None] * 3, errors
assert "compiled here" in told(cases["embed"]), "as the test assumes"
ASTSource.make_ir, aside.LIMIT_S = make, 0.0
with compiled_aside():
    assert told(cases["silu"]) is None and told(cases["greedy"]) is None, "compiled here"
Child.__init__ = refuse
with compiled_aside():
    assert told(cases["embed"]) is None
"""


@needs_triton
def test_kernels_are_compiled_in_a_process_beside_and_here_where_that_fails(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('not where modules come from')")
    done = subprocess.run(
        [sys.executable, "-P", "-c", ASIDE], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "c")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda dtype: str(dtype)[6:]
)
@pytest.mark.parametrize("name", CASES)
def test_kernel_agrees_with_its_twin(name: str, dtype: torch.dtype) -> None:
    CASES[name](torch.device("cuda"), dtype)


@pytest.mark.gpu
@needs_triton
def test_graph_serves_contexts_that_grow_after_its_capture() -> None:
    """The grid must not follow from the contexts."""
    from runtime.kernels.paged_decode import paged_decode

    device = torch.device("cuda")
    query, rows = (torch.randn(*size, device=device) for size in ((2, 2, 4, 64), (64 * 16, 2 * 2 * 64)))
    tables = torch.randperm(64, device=device).int().view(2, 32)
    contexts = torch.tensor([1, 0], device=device)
    given = (query, rows, tables, contexts, 16, 0.125, None, 5)
    paged_decode(*given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_decode(*given)
    for new in ([1, 0], [17, 512], [500, 3]):
        contexts.copy_(torch.tensor(new))
        graph.replay()
        torch.testing.assert_close(out, PLAIN.paged_decode(*given), rtol=1e-4, atol=1e-4)


@needs_triton
@pytest.mark.parametrize("num_sms", [46, 108, 114, 132, 148, 160])
@pytest.mark.parametrize("kv_heads", [*range(1, 13), 16, 20, 32, 36, 40, 71])
def test_every_form_of_decode_attention_is_that_of_some_batch_for_which_it_is_compiled(
    kv_heads: int, num_sms: int
) -> None:
    from runtime.kernels.paged_decode import fetched_tokens

    def form(num_rows: int) -> tuple[int, int]:
        splits = choose_splits(num_rows, kv_heads, num_sms)
        return splits, fetched_tokens(64, num_rows, kv_heads, splits, num_sms, has_room=True)

    assert {form(num_rows) for num_rows in range(1, 1025)} == {
        form(num_rows) for num_rows in COMPILED_BUCKETS
    }


def test_twins_are_all_there_is_without_triton() -> None:
    script = (
        "import sys; sys.modules['triton'] = None; import runtime.kernels as found;"
        "print(found.TRITON, 'triton' in found.WHY_NO_TRITON,"
        " found.checked(found.PLAIN, found.table.torch.device('cpu'), found.table.torch.float32,"
        " found.Shape(2, 1, 8, 8, 8))[1])"
    )
    found = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert found.stdout.strip() == "None True []", found.stderr


# -- the check, and what it replaces ------------------------------------------------------------------------------


def test_check_finds_nothing_in_the_twins_themselves() -> None:
    assert self_check(CPU, torch.float32, SMALL, PLAIN) == []


@pytest.mark.parametrize("name", Kernels._fields)
@pytest.mark.parametrize("fault", ["raises", "differs", "gives NaN", "does nothing"])
def test_check_names_and_replaces_a_kernel_that(
    fault: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    twin = getattr(PLAIN, name)

    def faulty(*given: torch.Tensor) -> torch.Tensor | None:
        if fault == "raises":
            raise RuntimeError("out of shared memory")
        out = None if fault == "does nothing" else twin(*given)
        changed = given[0] if out is None else out[0] if isinstance(out, tuple) else out
        if fault == "differs":
            changed.view(-1)[-1] += 1
        if fault == "gives NaN":
            changed.view(-1)[0] = float("nan")
        return out

    kernels, failed = checked(PLAIN._replace(**{name: faulty}), CPU, torch.float32, SMALL)
    assert failed == [name]
    assert kernels == PLAIN
    assert f"the kernel {name} differs" in caplog.text


# -- the twins, beside what the decoder computes without them -----------------------------------------------------


@pytest.mark.parametrize("window", [None, 3])
def test_twin_of_decode_attends_as_the_specification_of_attention_does(window: int | None) -> None:
    torch.manual_seed(0)
    rows, query = (
        torch.randn(6 * 4, 2 * 2 * 8, dtype=torch.float64),
        torch.randn(2, 2, 3, 8, dtype=torch.float64),
    )
    tables, contexts = torch.tensor([[4, 1, 0], [2, 5, 3]], dtype=torch.int32), torch.tensor([9, 4])
    out = PLAIN.paged_decode(query, rows, tables, contexts, 4, 0.3, window, 1)
    for i, slots in enumerate(([16, 17, 18, 19, 4, 5, 6, 7, 0], [8, 9, 10, 11])):
        key, value = rows[slots].view(-1, 2, 2, 8).permute(1, 2, 0, 3)
        allowed = torch.arange(len(slots))[None] >= len(slots) - (window or 100)
        expected = attend_plain(query[i, :, :, None], key, value, allowed, 0.3)
        torch.testing.assert_close(out[i], expected.flatten())


def test_twin_of_latent_decode_is_attention_with_one_key_whose_first_part_is_the_value() -> None:
    torch.manual_seed(0)
    rows, query = torch.randn(16, 12, dtype=torch.float64), torch.randn(1, 5, 12, dtype=torch.float64)
    tables, contexts = torch.tensor([[3, 1]], dtype=torch.int32), torch.tensor([6])
    out = PLAIN.paged_latent_decode(query, rows, tables, contexts, 4, 0.3, 8, 1)
    found = rows[[12, 13, 14, 15, 4, 5]]
    weights = torch.softmax(query[0] @ found.T * 0.3, -1)
    torch.testing.assert_close(out[0], weights @ found[:, :8])


@pytest.mark.parametrize("has_norm", [False, True])
def test_twin_of_rope_does_what_a_layer_of_the_decoder_does(has_norm: bool) -> None:
    torch.manual_seed(0)
    num_heads, kv_heads, dim, slots = 4, 2, 8, torch.tensor([5, 0, 9])
    qkv, rows = torch.randn(3, (num_heads + 2 * kv_heads) * dim), torch.randn(12, 2 * kv_heads * dim)
    table, positions = torch.randn(16, 2, dim), torch.tensor([7, 0, 15])
    norm = Norm(torch.randn(num_heads + kv_heads, dim), 1e-6)
    expected, cached = qkv.clone(), rows.clone()
    turned = expected.unflatten(1, (-1, dim)).narrow(1, 0, num_heads + kv_heads)
    if has_norm:
        turned.copy_(norm(turned))
    cos, sin = table.index_select(0, positions).unsqueeze(1).unbind(2)
    torch.addcmul(turned * cos, turned.roll(dim // 2, -1), sin, out=turned)
    cached.index_copy_(0, slots, expected[:, num_heads * dim :])

    PLAIN.rope_and_cache(
        qkv, table, positions, rows, slots, kv_heads, norm.weight if has_norm else None, 1e-6
    )
    torch.testing.assert_close(qkv, expected)
    torch.testing.assert_close(rows, cached)


def test_twin_of_norm_does_what_the_norm_of_the_decoder_does() -> None:
    torch.manual_seed(0)
    x, delta, weight = torch.randn(3, 24), torch.randn(3, 24), torch.randn(24)
    expected = Norm(weight, 1e-5)(x + delta)
    torch.testing.assert_close(PLAIN.add_norm(x, delta, weight, 1e-5), expected)
    torch.testing.assert_close(PLAIN.add_norm(x, None, weight, 1e-5), expected)


# -- which linear layer -------------------------------------------------------------------------------------------


def test_table_goes_by_the_next_number_of_rows_that_was_timed_and_leaves_the_rest_to_cublas() -> None:
    layer, other = nn.Linear(4, 8, bias=False), nn.Linear(8, 4, bias=False)
    ours, cublas = Choice(5.0, 10.0), Choice(10.5, 10.0)
    table = LinearTable(
        PLAIN,
        {
            LinearShape("parts", 8, 4, rows, torch.float32): ours if rows in (16, 64, 256) else cublas
            for rows in TIMED_ROWS
        },
    )

    def is_in_parts(layer: nn.Linear, rows: int) -> bool:
        x = torch.randn(rows, layer.in_features, dtype=layer.weight.dtype)
        found = table.added(layer, x)
        whole = found if found.ndim == 2 else found.sum(0)
        torch.testing.assert_close(whole, layer(x))
        return found.ndim == 3

    chosen = {rows: is_in_parts(layer, rows) for rows in (1, 2, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257)}
    ours = {2, 16, 33, 64, 129, 256}
    assert chosen == {rows: rows in ours for rows in chosen}
    assert not is_in_parts(other, 16)
    table.choices[LinearShape("parts", 8, 4, 32, torch.float32)] = Choice(math.inf, 10.0)
    for backend, ours in {"cublas": set(), "triton": {1, 2, 16, 33, 64, 65, 128, 129, 256}}.items():
        table.backend = backend
        assert {rows for rows in chosen if is_in_parts(layer, rows)} == ours, (
            "where it was timed and could be run"
        )
    assert not is_in_parts(other, 16)
    assert table.whole(layer, torch.ones(16, 4)).ndim == 2, "measured for another use"
    assert table.added(layer, torch.ones(0, 4)).shape == (0, 8), "a step may have no logits"
    assert not is_in_parts(nn.Linear(4, 8), 16), "the parts have no bias"
    object.__setattr__(layer, "forward", lambda x: nn.functional.linear(x, layer.weight))
    assert not is_in_parts(layer, 16), "its weights are in another format"


@needs_triton
@pytest.mark.parametrize("size", [(1024, 2048), (1024, 3072), (4096, 4096), (4096, 14336), (151936, 1024)])
def test_every_layer_of_a_real_model_is_shared_out_among_all_sms(size: tuple[int, int]) -> None:
    from runtime.kernels.skinny_linear import split_tiles, whole_tiles

    tiles = split_tiles(*size)
    assert size[0] / tiles.block_n * tiles.split_k >= 128
    assert size[1] / tiles.split_k / tiles.block_k >= 2, "one tile must be loaded while another is multiplied"
    assert split_tiles(64, 128).split_k == 1
    assert size[0] / whole_tiles(size[0], 1).block_n >= 64
    used = [(1, split_tiles(*size, num_rows=rows)) for rows in TIMED_ROWS]
    used += [(num, whole_tiles(size[0], rows, num_weights=num)) for rows in TIMED_ROWS for num in (1, 2)]
    staged = [
        (num * tiles.block_n + tiles.block_m) * tiles.block_k * 2 * tiles.num_stages for num, tiles in used
    ]
    assert max(staged) <= 200_000, "shared memory of an SM"


@needs_triton
@pytest.mark.parametrize("size", [(1024, 2048), (1024, 3072), (4096, 4096), (4096, 14336), (151936, 1024)])
def test_tiles_of_few_rows_fit_on_consumer_gpus(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from runtime.kernels import skinny_linear
    from runtime.kernels.skinny_linear import fitting_stages, split_tiles, whole_tiles

    few = [rows for rows in TIMED_ROWS if rows <= FEW_ROWS]
    used = [(1, split_tiles(*size, num_rows=rows)) for rows in few]
    used += [(num, whole_tiles(size[0], rows, num_weights=num)) for rows in few for num in (1, 2)]
    assert all(fitting_stages(tiles, num, 2, CPU) == tiles.num_stages for num, tiles in used), "there is room"
    monkeypatch.setattr(skinny_linear, "has_large_tiles", lambda device: False)
    for num, tiles in used:
        stages = fitting_stages(tiles, num, 2, CPU)
        assert (num * tiles.block_n + tiles.block_m) * tiles.block_k * 2 * stages <= 98 * 1024 and stages >= 2


@needs_triton
@pytest.mark.parametrize("size", [(1024, 2048), (4096, 1024), (3072, 1024), (576, 2048)])
def test_tiles_of_layers_are_those_of_the_next_number_of_rows_that_was_timed(size: tuple[int, int]) -> None:
    """Or a step of another number would be compiled for while it is waited for."""
    from runtime.kernels.skinny_linear import MAX_ROWS, split_tiles, whole_tiles

    assert TIMED_ROWS[-1] == MAX_ROWS
    for rows in range(1, MAX_ROWS + 1):
        timed = next(timed for timed in TIMED_ROWS if timed >= rows)
        for num_weights in (1, 2):
            tiles = [whole_tiles(size[0], num, num_weights=num_weights) for num in (rows, timed)]
            assert tiles[0] == tiles[1], rows
        assert split_tiles(*size, num_rows=rows) == split_tiles(*size, num_rows=timed), rows


@needs_triton
def test_skinny_linear_refuses_more_rows_than_it_is_for() -> None:
    from runtime.kernels.skinny_linear import skinny_linear

    with pytest.raises(ValueError, match="at most 256 rows, but got 257"):
        skinny_linear(torch.empty(257, 16), torch.empty(8, 16))


def test_a_layer_whose_kernel_cannot_be_run_is_left_to_cublas(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def too_large(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of resource: shared memory")

    def first_us(calls: Sequence[Callable[[], object]]) -> float:
        calls[0]()
        return 7.0

    monkeypatch.setattr(linear_table, "graphed_us", first_us)
    table = LinearTable(PLAIN._replace(skinny_linear=too_large))
    layer = nn.Linear(4, 8, bias=False)
    for use in ("whole", "parts", "gated"):
        shape = LinearShape(use, 8, 4, 16, torch.float32)
        table.choices[shape] = table._timed(shape, [layer.weight.detach()])
        assert table.choices[shape] == Choice(math.inf if use == "whole" else 7.0, 7.0)
        assert not table.choices[shape].is_ours, "as fast is not faster"
    assert [record.getMessage() for record in caplog.records] == [
        "layers of 4 to 8 values are left to cuBLAS at 16 rows, since our kernel cannot be run: "
        "out of resource: shared memory"
    ]
    torch.testing.assert_close(table.whole(layer, torch.ones(3, 4)), layer(torch.ones(3, 4)))


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("cuts", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("spread", [0.3, 4.0])
def test_a_draw_is_the_same_again_and_in_any_company(cuts: tuple[bool, bool], spread: float) -> None:
    """Kernels start while the one before them ends, and read in turns what was written in turns."""
    device = torch.device("cuda")
    torch.manual_seed(0)
    logits = (spread * torch.randn(256, 128_256, device=device)).bfloat16()
    params = torch.rand(5, 256, dtype=torch.float64, device=device)
    params[0], params[1] = 0.5 + params[0], 0.01 * params[1]
    params[2] = 0.5 + params[2] if cuts[1] else 1.0
    params[3] = (100 * params[3]).ceil() if cuts[0] else 0.0
    sample, first = kernels().sample, kernels().sample(logits, params, *cuts)
    for _ in range(50):
        assert torch.equal(sample(logits, params, *cuts), first)
    for rows in (1, 3, 32):
        parts = [
            sample(logits[at : at + rows], params[:, at : at + rows], *cuts) for at in range(0, 64, rows)
        ]
        assert torch.equal(torch.cat(parts, 1)[:, :64], first[:, :64])
    expected = PLAIN.sample(logits[:64], params[:, :64], *cuts)
    assert (expected[0] != first[0, :64]).sum() <= 1, "a draw near to a border"


@pytest.mark.gpu
@needs_triton
def test_measured_table_multiplies_as_torch_does() -> None:
    layers = [nn.Linear(512, 1024, False, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    table = LinearTable(kernels())
    table.measure({"whole": layers, "gated": layers, "parts": layers})
    assert len(table.choices) == 3 * len(TIMED_ROWS)
    assert all(0 < choice.cublas_us < 1000 and choice.ours_us < 1000 for choice in table.choices.values())
    for rows in (1, 20, 64, 100, 256):
        x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
        for choice in (Choice(1.0, 9.0), Choice(9.0, 1.0)):
            table.choices = dict.fromkeys(table.choices, choice)
            found = table.added(layers[0], x)
            assert found.ndim == (3 if choice.is_ours else 2)
            whole = found if found.ndim == 2 else found.sum(0).bfloat16()
            torch.testing.assert_close(whole, layers[0](x), rtol=2e-2, atol=2e-2)
            torch.testing.assert_close(table.whole(layers[0], x), layers[0](x), rtol=2e-2, atol=2e-2)
            gated = PLAIN.silu_mul(layers[0](x))
            torch.testing.assert_close(table.gated(layers[0], x), gated, rtol=2e-2, atol=2e-2)


@needs_triton
def test_kernels_that_are_compiled_ahead_are_loaded_too_and_one_that_cannot_be_stops_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from runtime.kernels import launch as launching

    class Promise:
        num_results = num_loads = 0

        def result(self) -> "Promise":
            self.num_results += 1
            return self

        @property
        def run(self) -> None:
            self.num_loads += 1

    class Broken(Promise):
        def result(self) -> Promise:
            raise RuntimeError("cannot be compiled")

    class Kernel:
        def __init__(self, promise: Promise) -> None:
            self.promise, self.num_runs = promise, 0

        def warmup(self, *given: object, grid: object, **constants: object) -> Promise:
            return self.promise

        def __getitem__(self, grid: object) -> Callable[..., None]:
            self.num_runs += 1
            return lambda *given, **constants: None

    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    cpu, kernels = torch.device("cpu"), [Kernel(Broken()), Kernel(Promise())]
    with launching.compiled_ahead():
        for _ in range(3):
            for kernel in kernels:
                launching.launch(kernel, (1,), cpu)
    assert [(one.promise.num_results, one.promise.num_loads, one.num_runs) for one in kernels] == [
        (0, 0, 0),
        (1, 1, 0),
    ]
    launching.launch(kernels[1], (1,), cpu)
    assert kernels[1].num_runs == 1


# -- splits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [1, 2, 32, 256, 4096])
@pytest.mark.parametrize("kv_heads", [1, 8, 32])
def test_splits_keep_all_sms_busy_and_no_more(num_rows: int, kv_heads: int) -> None:
    splits = choose_splits(num_rows, kv_heads, 132)
    num_programs = splits * num_rows * kv_heads
    assert 1 <= splits <= MAX_SPLITS
    assert splits == MAX_SPLITS or 2 * num_programs > 132 or num_rows > 64
    assert splits == 1 or num_programs <= (264 if splits <= FEW_SPLITS else 132)
    assert splits >= FEW_SPLITS or 2 * num_programs > 264 or num_rows > 64, "an SM has room for another one"


@pytest.mark.parametrize(
    ("num_rows", "kv_heads", "splits"),
    [(1, 8, 16), (2, 8, 8), (4, 8, 8), (8, 8, 4), (16, 8, 2), (32, 8, 1), (32, 1, 8), (64, 1, 4), (65, 1, 1)],
)
def test_splits_of_an_h200_are_those_that_were_fastest(num_rows: int, kv_heads: int, splits: int) -> None:
    assert choose_splits(num_rows, kv_heads, 132) == splits


@pytest.mark.parametrize("num_sms", [48, 108, 132, 148])
def test_uneven_contexts_have_as_many_splits_as_few_rows_for_which_kernels_are_compiled(num_sms: int) -> None:
    for kv_heads in (1, 2, 3, 4, 5, 7, 8, 10, 16, 32, 40, 64, 128, 512):
        compiled = {choose_splits(rows, kv_heads, num_sms) for rows in COMPILED_BUCKETS}
        for num_rows in BUCKETS:
            splits = uneven_splits(num_rows, kv_heads, num_sms)
            assert splits in compiled and splits >= choose_splits(num_rows, kv_heads, num_sms)


@pytest.mark.parametrize(
    ("contexts", "num_rows", "expected"),
    [
        ([32_768] + [300] * 64, 96, True), ([32_768] * 65, 96, False), ([8_192] + [300] * 31, 32, True),
        ([1_000] + [300] * 64, 96, False), ([4_000] + [300] * 64, 96, True),
        ([32_768], 1, False), ([32_768] + [300] * 511, 512, True),
        ([6_000] + [300] * 511, 512, False), ([6_000] + [2_000] * 299, 320, False),
    ],
)  # fmt: skip
def test_contexts_are_uneven_where_more_splits_are_faster(
    contexts: list[int], num_rows: int, expected: bool
) -> None:
    assert are_uneven(np.array(contexts), num_rows, 8, 132) == expected


def test_tiles_hold_each_new_token_once_and_what_sees_most_comes_first() -> None:
    new, contexts = np.array([65, 1, 128, 200]), np.array([65, 900, 3000, 200])
    tiles = tiles_of(new, contexts)
    covered = [[] for _ in new]
    for piece, tile in tiles.tolist():
        covered[piece] += range(tile * QUERY_TILE, min((tile + 1) * QUERY_TILE, new[piece]))
    assert [sorted(one) for one in covered] == [list(range(num)) for num in new]
    seen = [contexts[piece] - max(0, new[piece] - (tile + 1) * QUERY_TILE) for piece, tile in tiles.tolist()]
    assert seen == sorted(seen, reverse=True) and tiles.dtype == np.int32


def test_tiles_are_split_where_the_last_of_them_would_leave_the_device_idle() -> None:
    assert choose_tile_splits(9, 32, 32_000, 132) == 4, "1.1 turns become 4.4 quarters"
    assert choose_tile_splits(8, 32, 32_000, 132) == 1, "nearly all of one turn"
    assert choose_tile_splits(1, 32, 32_000, 132) == MAX_TILE_SPLITS, "an eighth of a turn"
    assert choose_tile_splits(1, 32, 2000, 132) == 1, "too short to be worth it"
    assert choose_tile_splits(128, 32, 9000, 132) == 1, "many turns"
