"""Quality of the demo model's weight formats, measured by the engine itself: sound ones pass, a wrong one does not."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import runtime.weights
from runtime.clock import Clock
from runtime.engine import Engine
from runtime.executor import Executor
from runtime.knobs import EngineConfig
from runtime.link import Frame
from runtime.loader import load_model
from runtime.model_folder import ModelFolder
from runtime.plan import PlanRunner
from runtime.prompts import Prompts
from tests.servers import DEMO_MODEL
from tuner.quality.canary import canary_set
from tuner.quality.comparison import Comparison, QualityLimits, Scores, compare
from tuner.settings_quality import QualitySettings

SHIPPED = QualitySettings()
LIMITS = QualityLimits(SHIPPED.max_delta_nll, SHIPPED.min_top1_agreement)


class Demo:
    """The demo model in this process, asked as the daemon asks."""

    def __init__(self) -> None:
        loaded = load_model(DEMO_MODEL, torch.device("cpu"), torch.float32)
        config = EngineConfig.of({"threads_prefill": 1, "threads_decode": 1, "kv_tokens": 4096})
        executor = Executor(loaded, kv_tokens=4096, config=config)
        self.frames: list[Frame] = []
        self.config = executor.warm.in_force(config)
        self.engine = Engine(executor, PlanRunner(self.config), Clock.started_now(), self.frames.append)
        prompts = Prompts.load(ModelFolder.read(DEMO_MODEL))
        self.token_ids = [prompts.encode(text, 2048) for text in canary_set().passages[::2]]
        self._num_calls = 0

    def ask(self, name: str, **args: Any) -> dict[str, Any]:
        self._num_calls += 1
        self.engine.control({"op": "control", "call": self._num_calls, "name": name, "args": args})
        while True:
            for frame in self.frames:
                if frame["op"] == "reply" and frame["call"] == self._num_calls:
                    return frame
            self.engine.step()
            self.engine.score()

    def scores(self, **knobs: Any) -> Scores:
        config = self.config.patched(knobs)
        assert "error" not in (reply := self.ask("prepare", values=config.values())), reply
        told = self.ask(
            "score", values=config.values(), sequences=self.token_ids, piece_tokens=SHIPPED.piece_tokens
        )
        return Scores(told["value"]["nll"], told["value"]["top1"])


@pytest.fixture(scope="module")
def demo() -> Iterator[Demo]:
    yield Demo()


@pytest.fixture(scope="module")
def reference(demo: Demo) -> Scores:
    return demo.scores()


def judged(reference: Scores, candidate: Scores) -> Comparison:
    found = compare(reference, candidate, LIMITS)
    print(found.reason)
    return found


def test_the_loaded_weights_equal_themselves_to_the_last_digit(demo: Demo, reference: Scores) -> None:
    found = judged(reference, demo.scores(max_num_seqs=3, batch_wait_ms=10))
    assert (found.delta_nll, found.top1_agreement) == (0.0, 1.0) and found.num_positions >= 400


@pytest.mark.parametrize("weight_format", ["bfloat16", "int8"])
def test_a_sound_format_differs_a_little_and_passes(
    demo: Demo, reference: Scores, weight_format: str
) -> None:
    found = judged(reference, demo.scores(weight_format=weight_format))
    assert found.is_passed and 0.0 < 1.0 - found.top1_agreement < 0.05
    after = demo.scores()
    assert after == reference, "scoring a prepared format leaves the weights in force as they were"


def test_a_wrong_quantisation_scale_is_refused(reference: Scores, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale that is 10 % off in every tenth output channel: fast, plausible to read, and wrong."""
    sound = runtime.weights.quantised

    def wrong(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        whole, scale = sound(weight)
        scale[::10] *= 1.1
        return whole, scale

    monkeypatch.setattr(runtime.weights, "quantised", wrong)
    found = judged(reference, Demo().scores(weight_format="int8"))
    assert not found.is_passed


def test_a_format_that_is_not_prepared_is_not_scored(demo: Demo) -> None:
    fresh = Demo()
    reply = fresh.ask("score", values={"weight_format": "int8"}, sequences=[[1, 2, 3]])
    assert reply["error"]["kind"] == "invalid_request" and "not prepared" in reply["error"]["message"]
