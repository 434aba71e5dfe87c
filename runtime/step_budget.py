"""What prompts get of a step in which others decode, so that those are not held up. Pure.

    decode rows ──▶ what `mixed_step_tokens` leaves ──▶ prompts under way ──▶ prompts admitted
                    in token equivalents, 64 tokens at least, and never more than `max_batched_tokens`

A token equivalent is the time of one token's weights. A prompt token attends to all before it, which takes time too:
with p tokens before it, it costs 1 + attention_cost * p. So pieces of a long prompt get shorter from step to step.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.batch import IntArray
from runtime.knobs import EngineConfig

FEWEST_PROMPT_TOKENS = 64  # of a step, however many rows decode: prompts wait longer then, but never for ever
TILE_ROWS = 128  # of matrix products: rows beyond a multiple of it take as long as a whole tile of them
# Multiples of this are computed fastest. On an H200 a layer of llama-8b multiplies 1,024, 1,536 and 2,048 rows at 782,
# 735 and 719 TFLOP/s, and 896, 1,280, 1,664 and 1,792 at 733, 715, 685 and 673; pieces of 960 tokens, beside 64 rows
# that decode, make whole turns of attention. So a step that is near such a number has it: for up to MORE of what its
# prompts may cost, or with up to LESS of its last piece.
GOOD_ROWS = 512
MORE, LESS = 1 / 8, 1 / 6
# Waiting prompts, in steps of `mixed_step_tokens`, beyond which steps are as large as may be. Each request would wait
# for so many steps before its own: that is more than any single step can cost those who decode, and large steps end it
# sooner, since they read the weights less often.
OVERLOAD_STEPS = 16


def cost_of(num_tokens: int, context: int, attention_cost: float) -> float:
    """Token equivalents of so many tokens of a prompt, with `context` tokens before the first of them."""
    return num_tokens + attention_cost * (context * num_tokens + num_tokens * (num_tokens - 1) / 2)


def most_tokens(cost: float, context: int, attention_cost: float) -> int:
    """The most tokens of a prompt that cost no more, with `context` tokens before the first of them."""
    if cost < 1:
        return 0
    # The larger root of attention_cost / 2 * n^2 + slope * n = cost, in the form whose divisor is 2 at least.
    slope = 1 + attention_cost * (context - 0.5)
    most = int(2 * cost / (slope + math.sqrt(slope * slope + 2 * attention_cost * cost)))
    while cost_of(most + 1, context, attention_cost) <= cost:  # what rounding took, or gave
        most += 1
    while cost_of(most, context, attention_cost) > cost:
        most -= 1
    return most


def shared_out(wanted: IntArray, budget: int) -> IntArray:
    """What each gets of the budget: all that it wants as long as there is any, in order."""
    return np.clip(budget - (np.cumsum(wanted) - wanted), 0, wanted)


@dataclass
class StepBudget:
    """What is left of a step, for as long as it is being filled. `num_tokens`: tokens of the hard cap. `cost`: token
    equivalents that prompts may still take, infinite where only the hard cap applies; `spare`: what they may take
    beyond, for a good number of rows. `num_rows`: tokens that the step holds, first those of the rows that decode."""

    num_tokens: int
    cost: float
    spare: float
    num_rows: int
    attention_cost: float
    num_prompt_tokens: int = 0

    @classmethod
    def of(
        cls, config: EngineConfig, num_decode: int, waiting_tokens: int, attention_cost: float
    ) -> "StepBudget":
        """Of a step with so many rows that decode, before anything is in it. Only the hard cap applies where none
        does, or where more than OVERLOAD_STEPS steps' worth of prompts waits. `waiting_tokens`: of prompts that are not
        admitted."""
        mixed = config.mixed_tokens
        is_free = not num_decode or waiting_tokens > OVERLOAD_STEPS * mixed
        cost = math.inf if is_free else max(0.0, mixed - num_decode)
        return cls(config.max_batched_tokens, cost, MORE * cost, num_decode, attention_cost)

    @property
    def has_room(self) -> bool:
        """Whether another prompt may get anything."""
        return self.num_tokens > 0 and (self.cost >= 1 or self.num_prompt_tokens < FEWEST_PROMPT_TOKENS)

    def leave_out_prompts(self) -> None:
        """Of those that wait, and of those under way."""
        self.num_tokens = min(self.num_tokens, self.num_rows)

    def share_out(self, wanted: IntArray, contexts: IntArray, is_decode: NDArray[np.bool_]) -> IntArray:
        """[rows] what running rows get, in order; `contexts`: tokens of each that are computed already."""
        if self.cost < math.inf:
            wanted = wanted.copy()
            # Of the hard cap, what is left behind the decode rows before each.
            left, taken = self.num_tokens - np.cumsum(np.where(is_decode, wanted, 0)), 0
            for row in np.flatnonzero(~is_decode & (wanted > 0)).tolist():
                most = max(0, int(left[row]) - taken)
                wanted[row] = self._piece(min(int(wanted[row]), most), int(contexts[row]))
                taken += int(wanted[row])
        granted = shared_out(wanted, self.num_tokens)
        self.num_tokens -= int(granted.sum())
        return granted

    def take(self, wanted: int, context: int) -> int:
        """What one more prompt gets: something, where there is room."""
        tokens = self._piece(min(wanted, self.num_tokens), context)
        self.num_tokens -= tokens
        return tokens

    def _piece(self, wanted: int, context: int) -> int:
        """As much of a piece as its cost allows. The last one is cut so that the step has a good number of rows."""
        if self.cost == math.inf:
            return wanted
        fewest = FEWEST_PROMPT_TOKENS - self.num_prompt_tokens
        if self.cost < 1 and fewest <= 0:
            return 0
        # One at least: a prompt that comes behind a long cached prefix has taken its seat already.
        tokens = max(1, fewest, most_tokens(self.cost, context, self.attention_cost))
        if tokens >= wanted:
            tokens = wanted
            self.cost -= cost_of(tokens, context, self.attention_cost)
        else:
            tokens = self._well_cut(tokens, wanted, max(1, fewest), context)
            self.cost = 0.0
        self.num_rows += tokens
        self.num_prompt_tokens += tokens
        return tokens

    def _well_cut(self, tokens: int, wanted: int, fewest: int, context: int) -> int:
        """About so many tokens of the `wanted` ones, and at least the `fewest`."""
        rows = self.num_rows + tokens
        more = -(-rows // GOOD_ROWS) * GOOD_ROWS - self.num_rows
        if more <= wanted and cost_of(more, context, self.attention_cost) <= self.cost + self.spare:
            return more
        for size, most in ((GOOD_ROWS, LESS * tokens), (TILE_ROWS, TILE_ROWS)):
            if (beyond := rows % size) <= most and tokens - beyond >= fewest:
                return tokens - beyond
        return tokens
