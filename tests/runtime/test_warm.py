"""WARM knobs in an engine of this process: prepared beside serving, swapped between two steps, nothing lost."""

import threading
import time
from collections.abc import Callable
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import runtime.prepare
from runtime.clock import Clock
from runtime.decoder_model import DecoderModel
from runtime.engine import Engine
from runtime.executor import Executor
from runtime.kernels import PLAIN
from runtime.knobs import EngineConfig
from runtime.kv_cache import BLOCK_TOKENS
from runtime.link import Frame
from runtime.loader import load_model
from runtime.mixed_graph import padded_rows, padded_tokens
from runtime.paged_model import KVPools
from runtime.plan import PlannedSlice, PlanRunner, SlicePlan
from runtime.weights import linear_layers, wanted_bytes
from tests.runtime.tiny_models import save_tiny_model

DEMO = Path(__file__).parents[2] / "runtime" / "demo_model"
LIMIT_S = 60.0


class Here:
    """An engine, the frames that it sent, and control calls that wait for their answer."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(
        self, folder: Path, kv_tokens: int = 1024, max_model_len: int | None = None, **knobs: Any
    ) -> None:
        loaded = load_model(folder, self.device, self.dtype, max_model_len)
        config = EngineConfig.of(knobs)
        self.executor = Executor(loaded, kv_tokens, config)
        self.frames: list[Frame] = []
        self.clock = Clock.started_now()
        self.runner = PlanRunner(self.executor.warm.in_force(config), fits=self.executor.warm.check)
        self.engine = Engine(self.executor, self.runner, self.clock, self.frames.append)
        self.num_calls = 0

    @property
    def scheduler(self) -> Any:
        return self.engine.scheduler

    def submit(self, id: str, prompt: list[int], max_tokens: int) -> None:
        self.engine.submit({
            "op": "submit", "id": id, "token_ids": prompt, "max_tokens": max_tokens, "ignore_eos": True,
            "arrived_at": self.clock.now(),
        })  # fmt: skip

    def call(self, name: str, **args: Any) -> Frame:
        """Steps on until the call is answered."""
        self.num_calls += 1
        self.engine.control({"op": "control", "call": self.num_calls, "name": name, "args": args})
        until = time.monotonic() + LIMIT_S
        while time.monotonic() < until:
            for frame in reversed(self.frames):
                if frame["op"] == "reply" and frame["call"] == self.num_calls:
                    return frame
            if not self.engine.step():
                time.sleep(0.001)
        raise TimeoutError(f"{name} was not answered")

    def run(self, between: Callable[[int], None] = lambda step: None) -> None:
        step = 0
        while self.scheduler.has_requests:
            between(step)
            self.engine.step()
            step += 1

    def texts(self) -> dict[str, list[int]]:
        told: dict[str, list[int]] = {}
        for frame in self.frames:
            for item in frame["items"] if frame["op"] == "tokens" else ():
                told.setdefault(item[0], []).append(item[1])
        return told

    def ends(self) -> list[str]:
        items = [item for frame in self.frames if frame["op"] == "tokens" for item in frame["items"]]
        return [item[0] for item in items if item[2] is not None]

    def state(self) -> EngineConfig:
        """The configuration in force, read back from what computes and not from what was asked."""
        return self.executor.warm.in_force(self.engine.tick.config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("qwen2", tmp_path_factory.mktemp("model") / "tiny")


def prompts(num: int, length: int = 20) -> list[list[int]]:
    return [[5 + (7 * i + k * k) % 80 for k in range(length + i % 5)] for i in range(num)]


def values(here: Here, **patch: Any) -> dict[str, Any]:
    return here.runner.champion.patched(patch).values()


def plan_of(here: Here, config: EngineConfig, slice_s: float = 60.0) -> dict[str, Any]:
    now = here.clock.now()
    planned = PlannedSlice("s1", "challenger", config.config_id, now, now + slice_s, burn_in_s=0.0)
    return SlicePlan(
        "p1", "e1", here.runner.version, {config.config_id: config.values()}, (planned,), 5.0
    ).to_dict()


# -- preparing -----------------------------------------------------------------------------------------------


def test_prepares_beside_serving_and_tells_what_it_took(folder: Path) -> None:
    here = Here(folder)
    wanted = values(here, weight_format="int8", kv_tokens=2048)
    told = here.call("prepare", values=wanted)["value"]
    weight_bytes = wanted_bytes(here.executor._model.model, "int8")
    pool_bytes = 2048 * here.executor.identity()["kv_bytes_per_token"]
    assert told["config_id"] == EngineConfig.of(wanted).config_id and told["prepare_s"] > 0
    assert pool_bytes < told["extra_bytes"] <= pool_bytes + weight_bytes
    assert here.state() == here.runner.champion, "nothing is in force before it is committed"
    again = here.call("prepare", values=wanted)["value"]
    assert again == {**told, "prepare_s": 0.0}


def test_what_steps_will_replay_is_captured_between_them_before_it_counts_as_prepared(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Here(folder)
    module = next(linear_layers(here.executor._model.model))
    loaded, asked = module.forward, []

    def capture_ahead(pools: KVPools, *names: Any) -> bool:
        assert module.forward != loaded and pools is not here.executor._model.pools
        asked.append((len([frame for frame in here.frames if frame["op"] == "step"]), names))
        return len(asked) < 4

    step, ids = here.engine.step, count()

    def keep_busy() -> bool:
        if not here.scheduler.has_requests:
            here.submit(str(next(ids)), prompts(1)[0], 100)
        return step()

    monkeypatch.setattr(here.executor._model, "capture_ahead", capture_ahead)
    monkeypatch.setattr(here.engine, "step", keep_busy)
    wanted = values(here, weight_format="int8", kv_tokens=2048)
    assert here.call("prepare", values=wanted)["value"]["prepare_s"] > 0 and module.forward == loaded
    at_steps = [at for at, _ in asked]
    assert len(at_steps) == 4 and all(later == one + 1 for one, later in pairwise(at_steps)), "beside serving"
    assert {names for _, names in asked} == {("auto", BLOCK_TOKENS, "int8", "auto")}
    here.call("prepare", values=wanted)
    assert len(asked) == 4
    assert "value" in here.call("reconfigure", patch={"weight_format": "int8", "kv_tokens": 2048})
    assert len(asked) == 4 and here.state() == EngineConfig.of(wanted)


def test_who_asks_while_steps_are_captured_waits_for_them_too_and_a_defect_there_ends_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here = Here(folder)
    asked: list[int] = []

    def capture_ahead(*names: Any) -> bool:
        asked.append(len([frame for frame in here.frames if frame["op"] == "reply"]))
        if len(asked) == 1:
            here.engine.control({"op": "control", "call": -1, "name": "prepare", "args": {"values": wanted}})
        if len(asked) == 6:
            raise AssertionError("a defect")
        return True

    monkeypatch.setattr(here.executor._model, "capture_ahead", capture_ahead)
    wanted = values(here, weight_format="int8")
    first = here.call("prepare", values=wanted)["value"]
    (second,) = (frame["value"] for frame in here.frames if frame["op"] == "reply" and frame["call"] == -1)
    assert asked == [0] * 6 and first == second and "a defect" in caplog.text

    monkeypatch.setattr(runtime.prepare, "MOST_CAPTURES", 3)
    monkeypatch.setattr(here.executor._model, "capture_ahead", lambda *names: asked.append(0) or True)
    here.call("prepare", values=values(here, kv_tokens=2048))
    assert len(asked) == 6 + 3, "sizes that steps go on to meet are not waited for"
    monkeypatch.setattr(here.executor.warm, "_free_bytes", lambda: here.executor.warm._bytes_for_steps - 1)
    assert not here.executor.warm.capture_ahead(EngineConfig.of(wanted)) and len(asked) == 9


def test_who_waits_is_answered_too_where_the_next_one_is_refused_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Here(folder)

    def ask(call: int, **patch: Any) -> None:
        args = {"values": values(here, **patch)}
        here.engine.control({"op": "control", "call": call, "name": "prepare", "args": args})

    ask(1, kv_tokens=2048)
    thread = here.engine._preparer._thread
    assert thread is not None
    thread.join()
    monkeypatch.setattr(here.executor.warm, "_free_bytes", lambda: 0)
    ask(2, kv_tokens=4096)
    here.engine.step()
    replies = {frame["call"]: frame for frame in here.frames if frame["op"] == "reply"}
    assert "value" in replies[1] and replies[2]["error"]["kind"] == "prepare_failed"


def test_what_goes_anyway_makes_room_before_a_preparation_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Here(folder)
    warm, free_bytes = here.executor.warm, [0]
    monkeypatch.setattr(warm, "_free_bytes", lambda: free_bytes[0])
    monkeypatch.setattr(warm, "_give_back", lambda: free_bytes.__setitem__(0, 10**12))
    assert here.call("prepare", values=values(here, kv_tokens=4096))["value"]["extra_bytes"] > 0


def test_what_differs_in_live_knobs_only_needs_no_preparation(folder: Path) -> None:
    here = Here(folder)
    told = here.call("prepare", values=values(here, max_num_seqs=3, prefix_cache="on"))["value"]
    assert (told["prepare_s"], told["extra_bytes"]) == (0.0, 0)


def test_a_plan_with_an_unprepared_configuration_is_refused_until_it_is_prepared(folder: Path) -> None:
    here = Here(folder)
    challenger = here.runner.champion.patched({"weight_format": "bfloat16"})
    error = here.call("plan", **plan_of(here, challenger))["error"]
    assert error["kind"] == "invalid_plan" and "not prepared; call prepare first" in error["message"]
    here.call("prepare", values=challenger.values())
    assert here.call("plan", **plan_of(here, challenger))["value"]["accepted"]
    here.engine.step()
    assert here.state().weight_format == "bfloat16"
    here.call("abort", plan_id="p1", reason="test")
    assert here.state() == here.runner.champion


def test_no_memory_fails_the_preparation_with_the_numbers_and_leaves_the_champion(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Here(folder)
    before = here.runner.champion
    monkeypatch.setattr(here.executor.warm, "_free_bytes", lambda: 1000)
    for name, args in (
        ("prepare", {"values": values(here, kv_tokens=4096)}),
        ("reconfigure", {"patch": {"weight_format": "int8"}}),
    ):
        error = here.call(name, **args)["error"]
        assert error["kind"] == "prepare_failed" and "800 may be taken" in error["message"]
    assert here.runner.champion == before == here.state() and here.runner.version == 0
    here.submit("a", prompts(1)[0], 4)
    here.run()
    assert here.ends() == ["a"]


def test_a_build_that_fails_is_told_and_leaves_the_champion(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Here(folder)

    def fail(*_: Any) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 5 bytes")

    monkeypatch.setattr("runtime.warm.prepared", fail)
    error = here.call("reconfigure", patch={"weight_format": "int8"})["error"]
    assert error["kind"] == "prepare_failed" and "can't allocate memory" in error["message"]
    assert here.state().weight_format == "float32" and here.runner.version == 0


@pytest.mark.parametrize(
    ("patch", "rule"),
    [
        ({"weight_format": "float64"}, "float32, bfloat16, int8"),
        ({"kv_tokens": 64}, r"must be in \[256,"),
        ({"kv_tokens": 2**34}, "must be in"),
    ],
)
def test_what_this_machine_can_never_run_is_no_knob(folder: Path, patch: dict[str, Any], rule: str) -> None:
    here = Here(folder)
    for name, args in (("prepare", {"values": values(here, **patch)}), ("reconfigure", {"patch": patch})):
        error = here.call(name, **args)["error"]
        assert error["kind"] == "invalid_knob"
        with pytest.raises(AssertionError, match=rule):
            raise AssertionError(error["message"])


def test_another_block_needs_nothing_prepared_and_starts_an_engine_too(folder: Path) -> None:
    here = Here(folder, kv_block="64")
    assert here.scheduler.pool.block_tokens == 64 == here.executor.identity()["kv_block_tokens"]
    told = here.call("prepare", values=values(here, kv_block="128"))["value"]
    assert (told["prepare_s"], told["extra_bytes"]) == (0.0, 0)
    assert here.state() == here.runner.champion
    done = here.call("reconfigure", patch={"kv_block": 128})["value"]
    assert done["config"]["kv_block"] == "128" == here.state().kv_block and done["commit_us"] > 0


def test_weights_are_prepared_with_the_kernels_of_the_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, threads = Here(folder), []

    def noting(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        threads.append(threading.current_thread().name)
        return PLAIN.int8_levels(x)

    monkeypatch.setattr("runtime.weights._packed_int8", lambda weight: None)
    here.executor._model.kernels = PLAIN._replace(int8_levels=noting)
    here.executor.warm._wake()
    assert threads
    threads.clear()
    assert "value" in here.call("prepare", values=values(here, weight_format="int8"))
    assert threads and threading.current_thread().name not in threads


def test_over_other_blocks_what_steps_launch_is_launched_before_they_count_as_ready(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where it is compiled then."""
    awake, threads = {("auto", 16)}, set()

    def wake(model: DecoderModel, *steps: Any) -> None:
        threads.add(threading.current_thread())
        awake.add(steps)

    here = Here(folder, kv_tokens=1024)
    monkeypatch.setattr(DecoderModel, "is_awake", lambda model, *steps: steps in awake)
    monkeypatch.setattr(DecoderModel, "wake", wake)
    for format in ("bfloat16", "int8"):
        assert "value" in here.call("prepare", values=values(here, weight_format=format))
    for size in ("32", "16", "32"):
        assert here.call("reconfigure", patch={"kv_block": size})["value"]["config"]["kv_block"] == size
        assert here.state().kv_block == size
    assert awake == {("auto", 16), ("auto", 32)}
    assert threads and threading.current_thread() not in threads
    for format in ("bfloat16", "int8"):
        spare = EngineConfig.of({"weight_format": format})
        assert here.executor.warm.has_weights(spare), "nothing was needed for which it had to go"


def test_the_longest_request_must_fit_in_whole_blocks(folder: Path) -> None:
    here = Here(folder, max_model_len=250)
    error = here.call("reconfigure", patch={"kv_tokens": 251, "kv_block": "64"})["error"]
    assert error["kind"] == "invalid_knob" and "must be in [256," in error["message"]
    assert "value" in here.call("reconfigure", patch={"kv_tokens": 256, "kv_block": "64"})


def test_unused_states_are_kept_for_a_rollback_and_dropped_when_newer_ones_come(folder: Path) -> None:
    here = Here(folder)
    warm = here.executor.warm
    for tokens in (1040, 1056, 1072, 1088):
        here.call("prepare", values=values(here, kv_tokens=tokens))
    assert not warm.is_ready(EngineConfig.of(values(here, kv_tokens=1040)))
    assert warm.is_ready(EngineConfig.of(values(here, kv_tokens=1072)))
    done = here.call("reconfigure", patch={"kv_tokens": 1088})["value"]
    back = here.call("reconfigure", patch={"kv_tokens": 1024})["value"]
    assert done["version"] == 1 and back["version"] == 2 and back["prepare_s"] < 0.05


# -- swapping under load -------------------------------------------------------------------------------------


def serve_all(here: Here, between: Callable[[int], None]) -> dict[str, list[int]]:
    for i, prompt in enumerate(prompts(32)):
        here.submit(str(i), prompt, 24 + i % 7)
    here.run(between)
    assert sorted(here.ends(), key=int) == [str(i) for i in range(32)], "each stream ends once"
    texts = here.texts()
    assert {id: len(text) for id, text in texts.items()} == {str(i): 24 + i % 7 for i in range(32)}
    return texts


@pytest.mark.parametrize("depth", [0, 1])
def test_32_streams_keep_every_token_while_the_pool_grows_shrinks_and_prefixes_come_and_go(
    depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = serve_all(Here(DEMO, max_model_len=256, max_num_seqs=32), lambda step: None)
    here = Here(DEMO, max_model_len=256, max_num_seqs=32, overlap_depth=depth)
    move, under_way = here.executor.warm._move, list[bool]()

    def noted(*given: Any) -> None:
        under_way.append(here.engine._under_way is not None)
        move(*given)

    monkeypatch.setattr(here.executor.warm, "_move", noted)
    patches: list[dict[str, Any]] = [
        {"kv_tokens": 4096}, {"prefix_cache": "on"}, {"kv_tokens": 512}, {"kv_block": "64"}, {"prefix_cache": "off"},
        {"kv_tokens": 2048, "kv_block": "32"}, {"kv_block": "256"}, {"kv_block": "16"},
    ]  # fmt: skip
    swaps: list[float] = []

    def disturb(step: int) -> None:
        if step % 4 == 2 and patches:
            patch = patches.pop(0)
            done = here.call("reconfigure", patch=patch, expected_version=here.runner.version)["value"]
            assert (
                {name: here.state().values()[name] for name in patch}
                == patch
                == {name: done["config"][name] for name in patch}
            )
            assert here.scheduler.pool.num_tokens == here.state().kv_tokens
            assert here.scheduler.pool.block_tokens == here.state().block_tokens
            swaps.append(done["commit_us"])

    assert serve_all(here, disturb) == quiet
    assert not patches and all(us > 0 for us in swaps)
    assert here.scheduler.num_preemptions > 0, "512 tokens do not hold 32 streams"
    assert set(under_way) == {bool(depth)}, "a commit does not wait for the step on its way"


def test_what_a_step_drew_that_was_under_way_at_a_commit_is_told_with_what_it_was_launched_under(
    folder: Path,
) -> None:
    here = Here(folder, overlap_depth=1)
    patch = {"kv_tokens": 2048, "stream_interval": 3}
    here.call("prepare", values=values(here, **patch))
    here.submit("a", prompts(1)[0], 30)
    for _ in range(3):
        here.engine.step()
    before = here.runner.champion
    here.call("reconfigure", patch=patch)
    after = here.runner.champion
    assert here.state() == after != before and here.engine._under_way is not None
    here.frames.clear()
    for _ in range(2):
        here.engine.step()
    told = [
        (frame["config_id"], frame["stream_interval"]) for frame in here.frames if frame["op"] == "tokens"
    ]
    records = [frame["record"]["config_id"] for frame in here.frames if frame["op"] == "step"]
    assert told == [(before.config_id, 1), (after.config_id, 3)]
    assert records == [before.config_id, after.config_id]


def test_32_streams_go_on_through_swaps_of_their_weights(folder: Path) -> None:
    here = Here(folder, kv_tokens=4096, max_num_seqs=32)
    formats = ["int8", "bfloat16", "float32"]
    for format in formats[:2]:  # beforehand: the streams would end while a slow machine prepares
        here.call("prepare", values=here.runner.champion.patched({"weight_format": format}).values())

    def disturb(step: int) -> None:
        if step % 3 == 2 and formats:
            format = formats.pop(0)
            here.call("reconfigure", patch={"weight_format": format})
            assert here.state().weight_format == format

    serve_all(here, disturb)
    assert not formats and here.scheduler.num_preemptions == 0


def test_a_slice_of_other_weights_serves_with_them_and_goes_back(folder: Path) -> None:
    here = Here(folder)
    challenger = here.runner.champion.patched({"weight_format": "int8", "kv_tokens": 512})
    here.call("prepare", values=challenger.values())
    here.submit("a", prompts(1)[0], 30)
    here.engine.step()
    here.call("plan", **plan_of(here, challenger, slice_s=0.2))
    here.engine.step()
    assert here.state() == challenger
    started = next(frame for frame in here.frames if frame.get("kind") == "slice_started")
    assert started["commit_us"] > 0
    time.sleep(0.25)
    here.run()
    assert here.state() == here.runner.champion and here.ends() == ["a"]
    served_by = {frame["config_id"] for frame in here.frames if frame["op"] == "tokens"}
    assert served_by == {challenger.config_id, here.runner.champion.config_id}


@pytest.mark.parametrize("depth", [0, 1])
def test_a_shrink_without_room_for_both_pools_moves_layer_by_layer(
    folder: Path, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet, here = (Here(folder, kv_tokens=4096, overlap_depth=depth) for _ in range(2))
    move, under_way = here.executor.warm._move_tensors, list[bool]()

    def noted(*given: Any) -> None:
        under_way.append(here.engine._under_way is not None)
        move(*given)

    monkeypatch.setattr(here.executor.warm, "_move_tensors", noted)
    for one in (quiet, here):
        for i, prompt in enumerate(prompts(4)):
            one.submit(str(i), prompt, 12)
        one.engine.step()
    bytes_per_token = here.executor.identity()["kv_bytes_per_token"]
    monkeypatch.setattr(here.executor.warm, "_free_bytes", lambda: 2048 * bytes_per_token)
    given_back: list[int] = []
    monkeypatch.setattr(here.executor.warm, "_give_back", lambda: given_back.append(0))
    challenger = values(here, kv_tokens=2048)
    assert here.call("prepare", values=challenger)["error"]["kind"] == "prepare_failed", (
        "no room to swap to and fro"
    )
    assert given_back == [0], "all is tried before it is refused"
    assert here.call("reconfigure", patch={"kv_tokens": 2048})["value"]["commit_us"] > 0
    assert given_back == [0], "steps wait for that, so not where it is not needed"
    assert here.state().kv_tokens == 2048 == here.scheduler.pool.num_tokens
    assert under_way == [bool(depth)]
    for one in (quiet, here):
        one.run()
    assert here.texts() == quiet.texts()


def test_tokens_are_those_without_a_prefix_cache_and_most_of_a_shared_prompt_is_not_computed() -> None:
    texts, prefill = [], []
    shared = prompts(1, 96)[0]
    for cache in ("off", "on"):
        here = Here(DEMO, max_model_len=256, prefix_cache=cache)
        for i in range(8):
            here.submit(str(i), [*shared, 5 + i, 9], 12)
            here.engine.step()
        here.run()
        texts.append(here.texts())
        steps = [frame["record"] for frame in here.frames if frame["op"] == "step"]
        prefill.append(sum(record["num_prefill_tokens"] for record in steps))
    assert texts[0] == texts[1]
    assert prefill[1] < 0.4 * prefill[0]


def test_a_restarted_engine_starts_on_the_weights_and_the_pool_of_its_champion(folder: Path) -> None:
    from runtime.engine_start import with_weights

    loaded = load_model(folder, torch.device("cpu"), torch.float32)
    config = EngineConfig.of({"weight_format": "int8", "kv_tokens": 1500})
    executor = Executor(loaded, 4096, config, config.kv_tokens)
    config = with_weights(executor, config, "int8")
    assert config.values() | {"weight_format": "int8", "kv_tokens": 1500} == config.values()
    assert executor.pool.num_tokens == 1488 and executor.identity()["fitted_knobs"]["kv_tokens"] == 4096
    engine = Engine(executor, PlanRunner(config), Clock.started_now(), lambda frame: None)
    engine.step()
    assert executor.warm.in_force(config) == config and executor.warm.weight_format == "int8"


class OnGPU(Here):
    device, dtype = torch.device("cuda"), torch.bfloat16


class ExactOnGPU(Here):
    device, dtype = torch.device("cuda"), torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("patch", [{"weight_format": "int8"}, {"kv_block": "16"}])
def test_steps_behind_a_commit_on_a_gpu_replay_what_was_captured_beside_those_before_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, patch: dict[str, str]
) -> None:
    monkeypatch.setattr(Executor, "_measured_step_tokens", lambda self: 512)  # so small a model has none
    here = OnGPU(folder, kv_tokens=8192, max_num_seqs=32, overlap_depth=1)
    streams = count()

    def keep_busy() -> None:
        while len(here.scheduler.running) + len(here.scheduler.waiting) < 12:
            at = next(streams)
            here.submit(str(at), [5 + (7 * at + k * k) % 80 for k in range(32)], 24 + at % 9)

    def records(num_steps: int) -> list[Frame]:
        since = len(here.frames)
        for _ in range(num_steps):
            keep_busy()
            here.engine.step()
        return [frame["record"] for frame in here.frames[since:] if frame["op"] == "step"]

    records(300)
    with monkeypatch.context() as busy:
        step = here.engine.step
        busy.setattr(here.engine, "step", lambda: (keep_busy(), step())[1])
        assert "value" in here.call("reconfigure", patch=patch)
    config_id = here.runner.champion.config_id
    after = [one for one in records(40) if one["config_id"] == config_id]
    launched = [one for one in after if one["graph_rows"] is None]
    tokens = [one["num_decode"] + one["num_prefill_tokens"] for one in launched]
    sizes = {
        (padded_tokens(num), padded_rows(one["num_decode"], num))
        for one, num in zip(launched, tokens, strict=True)
    }
    assert len(after) > 30 and any(one["num_prefill_rows"] for one in after)
    assert len(sizes) <= 2 and len(launched) <= 6, "of sizes that were not met before"


@pytest.mark.gpu
@pytest.mark.parametrize("knob", ["kv_block", "kv_dtype"])
def test_32_streams_on_a_gpu_live_through_other_blocks_and_a_rounded_pool(folder: Path, knob: str) -> None:
    # In float32, since a step outside its graph is rounded otherwise, which decides between equals in bfloat16; and on
    # one engine, since each chooses its kernels by timing them.
    kind = {"kv_block": ExactOnGPU, "kv_dtype": OnGPU}[knob]
    here = kind(folder, kv_tokens=4096, max_num_seqs=32, overlap_depth=1)
    quiet = serve_all(here, lambda step: None)
    wanted = {"kv_block": ["64", "256", "32", "16"], "kv_dtype": ["fp8", "auto"]}[knob]
    for value in wanted:  # or the requests would be over before the first of them is compiled
        assert "value" in here.call("reconfigure", patch={knob: value})
    here.frames.clear()

    def disturb(step: int) -> None:
        if step % 5 == 2 and wanted:
            value = wanted.pop(0)
            assert "value" in here.call("reconfigure", patch={knob: value})
            assert here.state().values()[knob] == value

    texts = serve_all(here, disturb)
    assert not wanted
    assert knob == "kv_dtype" or texts == quiet, "blocks are where keys lie, not what they are"
