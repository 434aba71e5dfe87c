"""Small random input on which the kernels of latent attention and of experts are compared with their twins."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from runtime.expert_choice import Chosen, Rule
from runtime.kernels import plain_experts

Trial = Callable[[Callable[..., Any]], list[Tensor]]  # runs a kernel; returns all that it changed or returned
Normal = Callable[..., Tensor]  # random values of a size, where and as the model is
MAX_EXPERTS = 8  # of a trial: weights of all would take gigabytes
BLOCK_ROWS = (None, 16, 32, 64, 128)  # None: a block a pair


class ExpertShape(NamedTuple):
    """`size`: of one expert's MLP, of which the shared ones have `num_shared` times as much together. `is_biased`: the
    rule has a bias, which is not kept here."""

    num_experts: int
    size: int
    num_shared: int
    rule: Rule
    is_biased: bool = False


def latent_trials(
    normal: Normal, device: torch.device, num_heads: int, key_dim: int, dim: int, rank: int
) -> Iterator[tuple[str, Trial]]:
    """key_dim: of an expanded key; dim: of a cached row."""
    rope = dim - rank
    angles = normal(64, 2, rope).float()
    query, new, cache, weight = normal(4, num_heads, rope), normal(4, dim), normal(24, dim), normal(rank)
    positions, slots = torch.tensor([0, 5, 63, 1], device=device), torch.tensor([3, -1, 0, 17], device=device)

    def turned(is_interleaved: bool) -> Trial:
        def run(kernel: Callable[..., None]) -> list[Tensor]:
            target, rows = query.clone(), cache.clone()
            kernel(target, query, new, angles, positions, rows, slots, weight, 1e-6, is_interleaved)
            return [target, rows]

        return run

    whole, key_up = (
        normal(4, num_heads, max(key_dim, rope + 1)),
        normal(num_heads, max(key_dim - rope, 1), rank),
    )

    def absorbed(is_interleaved: bool) -> Trial:
        def run(kernel: Callable[..., Tensor | None]) -> list[Tensor]:
            rows = cache.clone()
            found = kernel(whole, new, key_up, angles, positions, rows, slots, weight, 1e-6, is_interleaved)
            assert found is not None, "a kernel returned nothing"
            return [found, rows]

        return run

    for is_interleaved in (True, False):
        yield "latent_rope_and_cache", turned(is_interleaved)
        yield "absorb_and_cache", absorbed(is_interleaved)


def expert_trials(
    normal: Normal, device: torch.device, hidden: int, shape: ExpertShape
) -> Iterator[tuple[str, Trial]]:
    num_experts, size, num_shared, rule, is_biased = shape
    if is_biased:
        rule = rule._replace(bias=normal(num_experts).float())
    router = normal(num_experts, hidden) * hidden**-0.5
    for num_tokens in (1, 40):
        x = normal(num_tokens, hidden)
        yield "route", _chosen(x, router, rule)
    few, top_k = min(num_experts, MAX_EXPERTS), min(rule.top_k, MAX_EXPERTS)
    gate_up, down = normal(few, 2 * size, hidden) * hidden**-0.5, normal(few, hidden, size) * size**-0.5
    shared = (
        normal(2 * num_shared * size, hidden) * hidden**-0.5,
        normal(hidden, num_shared * size) * size**-0.5,
    )
    own_up, own_down = shared if num_shared else (None, None)
    for block_rows in BLOCK_ROWS:
        num_tokens = 1 if block_rows is None else block_rows + 5
        index = normal(num_tokens, few).float().topk(top_k)[1].int()
        layout = None
        if block_rows is not None:
            layout = plain_experts.lay_out(index, few, block_rows)
            yield "lay_out", _laid_out(index, few, block_rows)
        x, inner = normal(num_tokens, hidden), normal(num_tokens, top_k + num_shared, size)
        yield "expert_gate_up", _returned(x, gate_up, own_up, index, layout)
        weights = normal(num_tokens, top_k).float()
        yield "expert_down", _returned(inner, down, own_down, index, weights, layout)
    found, places = normal(5 * top_k, hidden), torch.randperm(5 * top_k, device=device).int()
    yield "weigh", _returned(found, normal(5, top_k).float(), places, normal(5, hidden))


def by_expert(chosen: Chosen, num_experts: int) -> Tensor:
    """The weight of each expert, 0 of those not chosen, whatever the order of the choice: [T, experts]."""
    weights, index = chosen
    return torch.zeros(len(weights), num_experts, device=weights.device).scatter_(
        1, index.long(), weights.float()
    )


def _chosen(x: Tensor, router: Tensor, rule: Rule) -> Trial:
    return lambda kernel: [by_expert(kernel(x, router, rule), len(router))]


def _laid_out(index: Tensor, num_experts: int, block_rows: int) -> Trial:
    """Neighbouring numbers are made to differ by much: the comparison is relative to the largest."""
    return lambda kernel: [
        (part.long() * 37 % 101).float() for part in kernel(index, num_experts, block_rows)
    ]


def _returned(*given: object) -> Trial:
    def run(kernel: Callable[..., Tensor | None]) -> list[Tensor]:
        found = kernel(*given)
        assert found is not None, "a kernel returned nothing"
        return [found]

    return run
