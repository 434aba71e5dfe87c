"""The benchmark of experts counts what routers choose, and runs where there is no accelerator."""

import json

import pytest
import torch

from runtime.bench.experts import ROWS, experts_touched, main, tilings
from runtime.bench.shapes import random_model
from runtime.fused_experts import BLOCK_ROWS


def test_experts_touched_are_those_that_some_token_goes_to() -> None:
    model = random_model("tiny-moe", torch.device("cpu"), torch.float32).model
    few, many = experts_touched(model, 1), experts_touched(model, 64)
    assert few == 2 and many is not None and 6 < many <= 8
    assert model.config._attn_implementation != "eager"


def test_a_dense_model_has_no_experts_to_touch() -> None:
    assert experts_touched(random_model("tiny", torch.device("cpu"), torch.float32).model, 4) is None


def test_each_number_of_rows_is_timed_part_by_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--shape", "tiny-moe", "--rows", "1", "40", "--device", "cpu", "--dtype", "float32"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [timing["num_rows"] for timing in told["timings"]] == [1, 40]
    assert all(timing["gate_up_us"] > 0 and timing["touched"] <= 8 for timing in told["timings"])


@pytest.mark.parametrize("rows", BLOCK_ROWS)
def test_every_size_of_block_has_tilings_to_try(rows: int) -> None:
    found = list(tilings(rows))
    assert 6 <= len(found) == len(set(found)) <= 20
    assert max(ROWS) == 4096
