"""The benchmark of the WARM knobs, once with the demo model for as little as it can do."""

import json
from pathlib import Path

import pytest
import torch

from runtime.bench import warm
from runtime.bench.shapes import save_random

DEMO_MODEL = Path(warm.__file__).parents[1] / "demo_model"


@pytest.fixture(autouse=True)
def one_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may set this once."""
    monkeypatch.setattr(torch, "set_num_interop_threads", lambda num: None)


def test_formats_pools_and_blocks_are_compared_with_the_loaded_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--model", str(DEMO_MODEL), "--device", "cpu", "--threads", "1", "--kv-tokens", "2048"]
    assert warm.main([*words, "--batches", "2", "--turns", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    formats = {one["weight_format"]: one for one in found["formats"]}
    assert list(formats) == ["float32", "bfloat16", "int8"]
    assert formats["float32"]["delta_nll"] == 0.0 and formats["float32"]["extra_bytes"] == 0
    assert 0.0 < formats["bfloat16"]["delta_nll"] < formats["int8"]["delta_nll"] < 0.2
    assert formats["bfloat16"]["extra_bytes"] > formats["int8"]["extra_bytes"] > 0


def test_a_folder_whose_tokenizer_knows_no_text_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_random("tiny", tmp_path, torch.device("cpu"), torch.float32)
    with pytest.raises(SystemExit):
        warm.main(["--model", str(tmp_path), "--device", "cpu", "--kv-tokens", "1024"])
    told = capsys.readouterr().err
    assert "makes fewer than two tokens" in told and "--text" in told
