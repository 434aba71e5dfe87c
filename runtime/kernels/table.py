"""The kernels as a table that a decoder is given, and the check of each against its plain twin."""

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from runtime.expert_choice import Chosen, Rule
from runtime.kernels import plain, plain_experts
from runtime.kernels.expert_trials import ExpertShape, Trial, expert_trials, latent_trials
from runtime.kernels.launch import compiled_ahead, has_large_tiles
from runtime.kernels.plain_experts import Layout
from runtime.kernels.splits import MAX_TILE_SPLITS, QUERY_TILE, tiles_of
from runtime.rounded_cache import rounded

log = logging.getLogger(__name__)

# Largest difference over the largest value expected: rounding of inputs and weights, with a margin.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}
MANY_ROWS = 68  # of decode attention; few tokens each, since the twin holds those of all rows at once
OF_OWN_HEADS = ("paged_decode", "paged_prefill", "rope_and_cache")  # and not of latents


class Kernels(NamedTuple):
    """Functions of one contract: `runtime.kernels.plain` describes each."""

    # (query, rows, block_tables, contexts, block_tokens, scaling, window, num_splits)
    paged_decode: Callable[[Tensor, Tensor, Tensor, Tensor, int, float, int | None, int], Tensor]
    # (query, rows, block_tables, contexts, first_row, edges, tiles, num_splits, block_tokens, scaling, window)
    paged_prefill: Callable[
        [Tensor, Tensor, Tensor, Tensor, int, Tensor, Tensor, int, int, float, int | None], Tensor
    ]
    # (query, rows, block_tables, contexts, block_tokens, scaling, value_dim, num_splits)
    paged_latent_decode: Callable[[Tensor, Tensor, Tensor, Tensor, int, float, int, int], Tensor]
    # (qkv, table, positions, rows, slots, kv_heads, norm_weight, eps)
    rope_and_cache: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, Tensor | None, float], None]
    add_norm: Callable[[Tensor, Tensor | None, Tensor, float], Tensor]  # (x, delta, weight, eps)
    silu_mul: Callable[[Tensor], Tensor]
    skinny_linear: Callable[[Tensor, Tensor], Tensor]  # (x of at most 256 rows, weight)
    skinny_gated: Callable[[Tensor, Tensor], Tensor]
    skinny_parts: Callable[[Tensor, Tensor], Tensor]
    greedy: Callable[[Tensor], Tensor]
    embed: Callable[[Tensor, Tensor, Tensor], Tensor]  # (token_ids, drawn, table)
    # (target, turn, new, table, positions, rows, slots, norm_weight, eps, is_interleaved)
    latent_rope_and_cache: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float, bool], None
    ]
    route: Callable[[Tensor, Tensor, Rule], Chosen]  # (x, router, rule)
    lay_out: Callable[[Tensor, int, int], Layout]  # (index, num_experts, block_rows)
    # (x, weight, shared weight, index, layout)
    expert_gate_up: Callable[[Tensor, Tensor, Tensor | None, Tensor, Layout | None], Tensor]
    # (x, weight, shared weight, index, weights of the choice, layout)
    expert_down: Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor, Layout | None], Tensor]
    weigh: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # (found, weights, places, shared)
    # (query, new, key_up, table, positions, rows, slots, norm_weight, eps, is_interleaved)
    absorb_and_cache: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float, bool], Tensor
    ]
    # (query, rows, block_tables, contexts, block_tokens, scaling, value_up, num_splits)
    latent_values: Callable[[Tensor, Tensor, Tensor, Tensor, int, float, Tensor, int], Tensor]
    # The same over a cache of 8 bits, whose scales come behind `rows`.
    paged_decode_fp8: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, float, int | None, int], Tensor]
    rope_and_cache_fp8: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, Tensor | None, float], None
    ]
    round_rows: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor], None
    ]  # (into, scales, rows, sources, targets)
    restore_rows: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor], None
    ]  # (into, rows, scales, sources, targets)
    int8_levels: Callable[[Tensor], tuple[Tensor, Tensor]]
    # (product, steps, scale, bias, dtype)
    int8_scaled: Callable[[Tensor, Tensor, Tensor, Tensor | None, torch.dtype], Tensor]
    sample: Callable[[Tensor, Tensor, bool, bool], Tensor]  # (logits, params, has_top_k, has_top_p)


PLAIN = Kernels(
    plain.paged_decode,
    plain.paged_prefill,
    plain.paged_latent_decode,
    plain.rope_and_cache,
    plain.add_norm,
    plain.silu_mul,
    plain.skinny_linear,
    plain.skinny_gated,
    plain.skinny_parts,
    plain.greedy,
    plain.embed,
    plain.latent_rope_and_cache,
    plain_experts.route,
    plain_experts.lay_out,
    plain_experts.expert_gate_up,
    plain_experts.expert_down,
    plain_experts.weigh,
    plain.absorb_and_cache,
    plain.latent_values,
    plain.paged_decode_fp8,
    plain.rope_and_cache_fp8,
    plain.round_rows,
    plain.restore_rows,
    plain.int8_levels,
    plain.int8_scaled,
    plain.sample,
)


def _triton_kernels() -> Kernels:
    """Raises ImportError where Triton is missing or does not load."""
    from runtime.kernels.add_norm import add_norm
    from runtime.kernels.embed import embed
    from runtime.kernels.expert_linear import expert_down, expert_gate_up
    from runtime.kernels.greedy import greedy
    from runtime.kernels.int8_rows import int8_levels, int8_scaled
    from runtime.kernels.latent_few import absorb_and_cache, latent_values
    from runtime.kernels.latent_rope import latent_rope_and_cache
    from runtime.kernels.lay_out import lay_out
    from runtime.kernels.move_rows import restore_rows, round_rows
    from runtime.kernels.paged_decode import paged_decode, paged_decode_fp8, paged_latent_decode
    from runtime.kernels.paged_prefill import paged_prefill
    from runtime.kernels.rope_and_cache import rope_and_cache, rope_and_cache_fp8
    from runtime.kernels.route import route
    from runtime.kernels.sample import sample
    from runtime.kernels.silu_mul import silu_mul
    from runtime.kernels.skinny_linear import skinny_gated, skinny_linear, skinny_parts
    from runtime.kernels.weigh import weigh

    return Kernels(
        paged_decode, paged_prefill, paged_latent_decode, rope_and_cache, add_norm, silu_mul, skinny_linear,
        skinny_gated, skinny_parts, greedy, embed, latent_rope_and_cache, route, lay_out, expert_gate_up, expert_down,
        weigh, absorb_and_cache, latent_values, paged_decode_fp8, rope_and_cache_fp8,
        round_rows, restore_rows, int8_levels, int8_scaled, sample,
    )  # fmt: skip


TRITON: Kernels | None = None
WHY_NO_TRITON: str | None = None
try:
    TRITON = _triton_kernels()
except ImportError as error:
    WHY_NO_TRITON = str(error)


class Shape(NamedTuple):
    """What of a model its kernels see."""

    num_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    block_tokens: int = 16
    window: int | None = None
    has_qk_norm: bool = False
    latent_dim: int | None = (
        None  # MLA: values of a cached row, of which the first `latent_value_dim` are the value
    )
    latent_value_dim: int = 512
    has_own_heads: bool = True  # whether any layer has keys and values of its heads, and not latents
    experts: ExpertShape | None = None


_checking = threading.Lock()
_failed: dict[tuple[Kernels, torch.device, torch.dtype, Shape], list[str]] = {}


def checked(
    kernels: Kernels, device: torch.device, dtype: torch.dtype, shape: Shape
) -> tuple[Kernels, list[str]]:
    """The kernels, with the plain twin in place of each that fails, and the names of those. Checked once in a process,
    by whoever comes first; others wait."""
    key = (kernels, device, dtype, shape)
    with _checking:
        if key not in _failed:
            _failed[key] = self_check(device, dtype, shape, kernels)
            for name in _failed[key]:
                log.warning(
                    "the kernel %s differs from its plain twin on %s; the twin is used instead", name, device
                )
        failed = _failed[key]
    return kernels._replace(**{name: getattr(PLAIN, name) for name in failed}), failed


@torch.inference_mode()
def self_check(
    device: torch.device, dtype: torch.dtype, shape: Shape, kernels: Kernels | None = TRITON
) -> list[str]:
    """Runs each kernel beside its twin on small random input, and returns the names of those that raise or differ."""
    if kernels is None:
        return []
    failed = []
    trials = list(_trials(device, dtype, shape))
    if not shape.has_own_heads:
        trials = [one for one in trials if one[0] not in OF_OWN_HEADS]
    if device.type == "cuda":
        with compiled_ahead():
            for name, run in trials:
                run(_both(getattr(kernels, name), getattr(PLAIN, name)))
    for name, run in trials:
        expected = run(getattr(PLAIN, name))
        try:
            actual = run(getattr(kernels, name))
            errors = [difference(*pair) for pair in zip(actual, expected, strict=True)]
        except Exception:  # of a compiler or a driver: anything; the twin takes over
            log.warning("the kernel %s could not be run on %s", name, device, exc_info=True)
            failed.append(name)
            continue
        if not all(error <= TOLERANCE[dtype] for error in errors):  # NaN is not
            log.warning("the kernel %s is off by %s of the largest value on %s", name, errors, device)
            failed.append(name)
    return list(dict.fromkeys(failed))


def _both(kernel: Callable[..., Any], twin: Callable[..., Any]) -> Callable[..., Any]:
    """Calls both, and returns what the second one does: while kernels are only compiled, the first gives nothing."""

    def call(*given: Any) -> Any:
        kernel(*given)
        return twin(*given)

    return call


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value expected; NaN where one of both is none."""
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


def _trials(device: torch.device, dtype: torch.dtype, shape: Shape) -> Iterator[tuple[str, Trial]]:
    """Name of a kernel, and a function that runs it, or its twin, on copies of the same input and returns all that it
    changed or returned."""
    random = torch.Generator(device=device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, device=device).to(dtype)

    num_heads, kv_heads, dim, hidden = shape[:4]
    size, longest = shape.block_tokens, max(300, 2 * shape.block_tokens)  # several tiles
    qkv = normal(4, (num_heads + 2 * kv_heads) * dim)
    query = qkv[:, : num_heads * dim].unflatten(1, (kv_heads, -1, dim))

    def cached(size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows in blocks of so many tokens, which blocks four sequences have, and how long these are."""
        num = -(-longest // size)
        tables = torch.randperm(4 * num, generator=random, device=device).view(4, num).int()
        contexts = torch.tensor([0, 1, 2 * size, longest], device=device)
        return normal(4 * num * size, 2 * kv_heads * dim), tables, contexts

    rows, tables, contexts = cached(size)
    for splits in (1, 3):
        yield (
            "paged_decode",
            _returned(query, rows, tables, contexts, size, dim**-0.5, shape.window, splits),
        )
    if device.type == "cuda":  # the size of blocks by default there, where many rows have a form of their own
        pool, *of_rows = cached(QUERY_TILE)
        for copies, splits, most in ((MANY_ROWS // 4, 1, QUERY_TILE + 1), (1, 1, longest), (1, 3, longest)):
            table, context = (one.repeat_interleave(copies, 0) for one in of_rows)
            given = query.repeat(copies, 1, 1, 1), pool, table, context.clamp(max=most)
            yield "paged_decode", _returned(*given, QUERY_TILE, dim**-0.5, shape.window, splits)
    # A tile of keys lies in one block or not. On a GPU all numbers of splits are compiled here.
    yield "paged_prefill", _pieces_trial(normal, device, size, 1, 0, shape)
    for splits in (1, 2, 4, MAX_TILE_SPLITS) if device.type == "cuda" else (4,):
        yield "paged_prefill", _pieces_trial(normal, device, QUERY_TILE, splits, 1, shape)
    if shape.latent_dim is not None:
        latents, asked = normal(len(rows), shape.latent_dim), normal(4, num_heads, shape.latent_dim)
        scaling = shape.latent_dim**-0.5
        for splits in (1, 3):
            yield (
                "paged_latent_decode",
                _returned(asked, latents, tables, contexts, size, scaling, shape.latent_value_dim, splits),
            )
        up = normal(num_heads, shape.latent_value_dim, dim) * shape.latent_value_dim**-0.5
        yield "latent_values", _returned(asked, latents, tables, contexts, size, scaling, up, 3)

    angles = torch.rand(64, dim // 2, generator=random, device=device) * 6.28
    sin = angles.sin()
    table = torch.stack((torch.cat((angles.cos(),) * 2, 1), torch.cat((-sin, sin), 1)), 1).to(dtype)
    positions, slots = torch.tensor([0, 5, 63, 1], device=device), torch.tensor([3, -1, 0, 17], device=device)
    weight = normal(num_heads + kv_heads, dim) if shape.has_qk_norm else None

    def turned(kernel: Callable[..., Tensor | None]) -> list[Tensor]:
        new, cache = qkv.clone(), rows.clone()
        kernel(new, table, positions, cache, slots, kv_heads, weight, 1e-6)
        return [new, cache]

    yield "rope_and_cache", turned
    bits, scales = rounded(rows.unflatten(1, (2 * kv_heads, dim)))
    bits = bits.flatten(1)
    for splits in (1, 3):
        yield (
            "paged_decode_fp8",
            _returned(query, bits, scales, tables, contexts, size, dim**-0.5, shape.window, splits),
        )

    # Turned by nothing, so that both round the same values: one on the edge would go to either side.
    still = torch.stack((torch.ones_like(table[:, 0]), torch.zeros_like(table[:, 0])), 1)

    def turned_and_rounded(kernel: Callable[..., Tensor | None]) -> list[Tensor]:
        new, cached, steps = qkv.clone(), bits.clone(), scales.clone()
        kernel(new, still, positions, cached, steps, slots, kv_heads, None, 0.0)
        return [new, cached, steps]

    yield "rope_and_cache_fp8", turned_and_rounded
    sources, targets = torch.tensor([5, 0, 17], device=device), torch.tensor([1, 16, 2], device=device)

    def rounded_rows(kernel: Callable[..., Tensor | None]) -> list[Tensor]:
        cached, steps = bits.clone(), scales.clone()
        kernel(cached, steps, rows, sources, targets)
        return [cached, steps]

    def restored_rows(kernel: Callable[..., Tensor | None]) -> list[Tensor]:
        cache = rows.clone()
        kernel(cache, bits, scales, sources, targets)
        return [cache]

    yield "round_rows", rounded_rows
    yield "restore_rows", restored_rows
    yield from _int8_trials(device, dtype, hidden, random)
    x, delta, scale_of = normal(4, hidden), normal(4, hidden), normal(hidden)

    def added(kernel: Callable[..., Tensor | None]) -> list[Tensor]:
        whole = x.clone()
        return [_given(kernel(whole, delta, scale_of, 1e-6)), whole]

    yield "add_norm", added
    parts = torch.randn(3, 4, hidden, generator=random, device=device)

    def added_parts(kernel: Callable[..., Tensor | None]) -> list[Tensor]:
        whole = x.clone()
        return [_given(kernel(whole, parts, scale_of, 1e-6)), whole]

    yield "add_norm", added_parts
    yield "silu_mul", _returned(normal(4, 2 * shape.intermediate))
    matrix = normal(shape.intermediate, hidden) * hidden**-0.5

    logits = normal(4, 5000)

    def likeliest(kernel: Callable[..., Tensor | None]) -> list[Tensor]:
        tokens, may_be_taken = _given(kernel(logits))
        return [(tokens[:, None] == torch.arange(5000, device=device)).float(), may_be_taken]

    yield "greedy", likeliest
    # Without, with one and with both cuts, of each of which a GPU has kernels of its own.
    asked = torch.tensor(
        [[0.0, 1.0, 0.7, 2.0], [0.0, 0.0, 0.02, 0.0], [1.0, 0.9, 0.5, 1.0], [0.0, 40.0, 0.0, 3.0],
         [0.5, 0.1, 0.9, 0.6]],
        dtype=torch.float64, device=device,
    )  # fmt: skip
    for has_top_k, has_top_p in ((False, False), (True, False), (False, True), (True, True)):
        params = asked.clone()
        params[2] = asked[2] if has_top_p else 1.0
        params[3] = asked[3] if has_top_k else 0.0

        def sampled(
            kernel: Callable[..., Tensor | None],
            given: tuple[Tensor, bool, bool] = (params, has_top_k, has_top_p),
        ) -> list[Tensor]:
            tokens, may_be_taken = _given(kernel(logits, *given))
            return [(tokens[:, None] == torch.arange(5000, device=device)).float(), may_be_taken]

        yield "sample", sampled
    yield (
        "embed",
        _returned(*(torch.tensor(one, device=device) for one in ([3, -1, 0, -3], [1, 0, 2])), matrix),
    )
    gates = torch.cat((matrix, matrix.flip(0)))
    for num_rows in (4, 64, 160) if has_large_tiles(device) else (4, 64):
        some = normal(num_rows, hidden)
        yield "skinny_linear", _returned(some, matrix)
        yield "skinny_gated", _returned(some, gates)
        yield "skinny_parts", _added_up(some, matrix)
    if shape.latent_dim is not None:
        yield from latent_trials(normal, device, num_heads, dim, shape.latent_dim, shape.latent_value_dim)
    if shape.experts is not None:
        yield from expert_trials(normal, device, hidden, shape.experts)


def _int8_trials(
    device: torch.device, dtype: torch.dtype, size: int, random: torch.Generator
) -> Iterator[tuple[str, Trial]]:
    """Rows of whole levels, so that both round the same values: one on the edge would go to either side."""

    def whole(low: int, high: int, num_rows: int) -> Tensor:
        return torch.randint(low, high, (num_rows, size), generator=random, device=device)

    x = whole(-120, 121, 4)
    x[:, 0] = 127
    widths = 2.0 ** torch.arange(-2, 2, device=device)[:, None]

    def found(kernel: Callable[..., Any]) -> list[Tensor]:
        levels, steps = kernel((x * widths).to(dtype))
        return [levels, steps]

    yield "int8_levels", found
    scale, bias = torch.rand(2, size, generator=random, device=device).unbind()
    product = whole(-100, 101, 32).int()
    for added in (None, bias):
        yield "int8_scaled", _returned(product, widths, scale, added, dtype)


def _pieces_trial(
    normal: Callable[..., Tensor], device: torch.device, size: int, splits: int, first_row: int, shape: Shape
) -> Trial:
    """Three pieces in the rows from `first_row` on: new altogether, a token behind others, the end of a long one."""
    new, contexts = np.array([65, 1, 130]), np.array([65, 2 * size, 300])
    blocks = -(-int(contexts.max()) // size)
    tables = torch.arange(4 * blocks, device=device).flip(0).view(4, blocks).int()
    rows = normal(4 * blocks * size, 2 * shape.kv_heads * shape.head_dim)
    edges = torch.tensor([0, *np.cumsum(new)], dtype=torch.int32, device=device)
    tiles = torch.from_numpy(tiles_of(new, contexts)).to(device)
    width = shape.num_heads * shape.head_dim
    query = normal(first_row + int(new.sum()), 2 * width)[:, :width]
    run = _returned(
        query.unflatten(1, (shape.kv_heads, -1, shape.head_dim)), rows, tables,
        torch.tensor([*[1] * first_row, *contexts], device=device), first_row, edges, tiles, splits, size,
        shape.head_dim**-0.5, shape.window,
    )  # fmt: skip
    return lambda kernel: [found[first_row:] for found in run(kernel)]


def _returned(*given: object) -> Trial:
    return lambda kernel: [_given(kernel(*given))]


def _added_up(x: Tensor, weight: Tensor) -> Trial:
    return lambda kernel: [_given(kernel(x, weight)).sum(0).to(x.dtype)]


def _given(result: Tensor | None) -> Tensor:
    assert result is not None, "a kernel returned nothing"
    return result
