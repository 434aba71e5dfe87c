"""The engine in this process, with a tiny model; and the engine process over a real socket."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.clock import Clock
from runtime.engine import MODEL_ERROR_EXIT_CODE, Engine, error_kind
from runtime.errors import StaleVersion
from runtime.executor import Executor
from runtime.knobs import EngineConfig
from runtime.link import Frame, FrameReader, encode
from runtime.loader import load_model
from runtime.plan import PlannedSlice, PlanRunner, SlicePlan
from tests.runtime.tiny_models import EOS, VOCAB, generate, save_tiny_model, tiny_model

ROOT = Path(__file__).parents[2]
PROMPT = [5, 9, 30, 12, 7, 44, 81]
LIMIT_S = 60.0  # far more than needed: a test that hangs must fail


def submission(id: str, prompt: list[int] = PROMPT, max_tokens: int = 8, **fields: Any) -> Frame:
    frame = {
        "op": "submit", "id": id, "token_ids": prompt, "max_tokens": max_tokens, "sampling": {},
        "stop_token_ids": [], "ignore_eos": True, "arrived_at": time.time(),
    }  # fmt: skip
    return frame | fields


def tokens_of(frames: list[Frame], id: str) -> list[int]:
    return [
        item[1] for frame in frames if frame["op"] == "tokens" for item in frame["items"] if item[0] == id
    ]


def ends_of(frames: list[Frame]) -> dict[str, str]:
    return {
        item[0]: item[2] for frame in frames if frame["op"] == "tokens" for item in frame["items"] if item[2]
    }


# -- in this process ----------------------------------------------------------------------------------------------


class InProcess:
    """An engine, and the frames that it sent."""

    def __init__(
        self,
        folder: Path,
        spoil: Callable[[torch.nn.Module], None] = lambda model: None,
        pool_tokens: int = 512,
        **knobs: Any,
    ) -> None:
        loaded = load_model(folder, torch.device("cpu"), torch.float64)
        config = EngineConfig.of(knobs)
        self.executor = Executor(loaded, kv_tokens=pool_tokens, config=config)
        config = self.executor.warm.in_force(config)
        spoil(loaded.model)
        self.frames: list[Frame] = []
        self.clock = Clock.started_now()
        self.runner = PlanRunner(config)
        self.engine = Engine(self.executor, self.runner, self.clock, self.frames.append)

    def run(self) -> None:
        while self.engine.step():
            pass


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model("qwen2", tmp_path / "tiny")


def test_each_step_sends_its_tokens_in_one_frame_and_one_record(folder: Path) -> None:
    here = InProcess(folder, prefill_chunk=16)
    here.engine.submit(submission("a", max_tokens=3))
    here.engine.submit(submission("b", prompt=PROMPT * 4, max_tokens=2))
    here.run()
    frames = [frame for frame in here.frames if frame["op"] == "tokens"]
    assert [sorted(item[0] for item in frame["items"]) for frame in frames] == [["a"], ["a", "b"], ["a", "b"]]
    assert ends_of(here.frames) == {"a": "length", "b": "length"}
    first = frames[0]["items"][0]
    assert first[3] is not None and first[4] == 0 and frames[1]["items"][0][3] is None
    assert {frame["config_id"] for frame in frames} == {here.runner.champion.config_id}
    assert {frame["stream_interval"] for frame in frames} == {1}
    records = [frame["record"] for frame in here.frames if frame["op"] == "step"]
    rows = [(r["num_decode"], r["num_prefill_rows"], r["num_prefill_tokens"]) for r in records]
    assert rows == [(0, 2, 23), (1, 1, 12), (2, 0, 0)]
    assert records[2]["context_tokens"] == records[2]["attention_pairs"] == 9 + 29
    assert all(r["device_s"] is r["graph_rows"] is None for r in records), "there is no such thing on a CPU"
    assert all(0 < r["forward_s"] < r["step_s"] for r in records) and records[2]["kv_used_tokens"] == 0


def test_tokens_are_those_of_generate(folder: Path) -> None:
    here = InProcess(folder)
    here.engine.submit(submission("a", max_tokens=12))
    here.run()
    reference = tiny_model("qwen2", torch.float32).double()
    assert tokens_of(here.frames, "a") == generate(reference, PROMPT, 12)


def test_a_text_ends_at_a_stop_token_and_at_the_end_token_unless_ignored(folder: Path) -> None:
    def always_end(model: torch.nn.Module) -> None:
        model.lm_head.weight.zero_()
        bias = model.lm_head.weight[:, 0].index_fill(0, torch.tensor([EOS]), 1.0)
        model.lm_head.bias = torch.nn.Parameter(bias)

    here = InProcess(folder, always_end)
    here.engine.submit(submission("ends", ignore_eos=False))
    here.engine.submit(submission("goes on", ignore_eos=True))
    here.engine.submit(submission("stops", ignore_eos=True, stop_token_ids=[EOS]))
    here.run()
    assert ends_of(here.frames) == {"ends": "stop", "goes on": "length", "stops": "stop"}
    assert tokens_of(here.frames, "ends") == [EOS] and len(tokens_of(here.frames, "goes on")) == 8


def test_a_request_whose_logits_are_not_numbers_fails_alone(folder: Path) -> None:
    def spoil_token_50(model: torch.nn.Module) -> None:
        model.get_input_embeddings().weight[50] = torch.nan

    here = InProcess(folder, spoil_token_50)
    here.engine.submit(submission("good"))
    here.engine.submit(submission("bad", prompt=[3, 50, 4]))
    here.run()
    failed = [frame for frame in here.frames if frame["op"] == "failed"]
    assert [(frame["id"], frame["kind"]) for frame in failed] == [("bad", "nan_logits")]
    assert len(tokens_of(here.frames, "good")) == 8 and here.engine.scheduler.pool.num_held == 0


def test_a_seeded_request_draws_the_same_tokens_in_any_company(folder: Path) -> None:
    drawn = {"temperature": 1.0, "top_p": 0.9}
    seeded = submission("seeded", max_tokens=20, sampling={**drawn, "seed": 7})
    alone, busy = InProcess(folder), InProcess(folder, max_num_seqs=3)
    alone.engine.submit(seeded)
    for i in range(6):
        busy.engine.submit(submission(f"other {i}", sampling={**drawn, "seed": i}, max_tokens=5 + 3 * i))
    busy.engine.submit(seeded)
    for here in (alone, busy):
        here.run()
    assert tokens_of(alone.frames, "seeded") == tokens_of(busy.frames, "seeded")
    assert tokens_of(busy.frames, "other 5")[:20] != tokens_of(busy.frames, "seeded")


def test_only_requests_of_one_salt_find_each_others_prompts(folder: Path) -> None:
    here, prompt = InProcess(folder, prefix_cache="on"), PROMPT * 6
    hits = []
    for number, fields in enumerate([{}, {"cache_salt": "ada"}, {"cache_salt": "ada"}, {"cache_salt": None}]):
        here.engine.submit(submission(str(number), prompt, **fields))
        here.run()
        hits.append(here.engine.scheduler.num_hit_tokens)
    assert hits == [0, 0, 32, 64]
    assert len({tuple(tokens_of(here.frames, str(number))) for number in range(4)}) == 1


def test_a_request_that_does_not_fit_fails_with_the_reason(folder: Path) -> None:
    here = InProcess(folder)
    here.engine.submit(submission("big", max_tokens=1000))
    assert [(f["op"], f["id"], f["kind"]) for f in here.frames] == [("failed", "big", "invalid_request")]
    assert "must fit in 256 tokens" in here.frames[0]["message"]


@pytest.mark.parametrize("token", [-1, VOCAB, 2**40])
def test_a_prompt_with_tokens_that_the_model_does_not_know_fails_with_the_reason(
    folder: Path, token: int
) -> None:
    here = InProcess(folder)
    here.engine.submit(submission("odd", prompt=[5, token]))
    assert [(f["op"], f["kind"]) for f in here.frames] == [("failed", "invalid_request")]
    assert "must be in [0, 96]" in here.frames[0]["message"]


def test_an_idle_engine_waits_for_its_next_gauge_at_most(folder: Path) -> None:
    here = InProcess(folder)
    assert here.engine.idle_s() == 0.0
    here.engine.send_gauge_if_due()
    assert 0.0 < here.engine.idle_s() <= 0.25
    gauge = here.frames[-1]
    assert gauge["op"] == "gauge" and gauge["kv_total_tokens"] == 512 and gauge["rss_bytes"] > 0
    assert "device_memory_bytes" not in gauge
    here.engine.submit(submission("a"))
    here.engine.step()
    assert here.engine.idle_s() == 0.0


def test_a_pool_that_memory_cannot_hold_becomes_a_smaller_one(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loaded = load_model(folder, torch.device("cpu"), torch.float32)
    executor = Executor(loaded, kv_tokens=10**12, config=EngineConfig())
    assert executor.pool.num_tokens < 10**12 and "was asked for" in caplog.text


def test_error_kinds_are_the_names_of_the_errors() -> None:
    assert error_kind(StaleVersion()) == "stale_version"


# -- the process ----------------------------------------------------------------------------------------------------


class EngineChild:
    """`python -m runtime.engine` at the other end of a socket."""

    def __init__(self, folder: Path, run_dir: Path, *options: str) -> None:
        path = str(run_dir / "e.sock")
        self.clock = Clock.started_now()
        self.frames: list[Frame] = []
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(path)
            listener.listen(1)
            listener.settimeout(LIMIT_S)
            self.process = subprocess.Popen(
                [sys.executable, "-m", "runtime.engine", "--socket", path, "--model", str(folder), "--device", "cpu",
                 "--kv-tokens", "2048", *options],
                cwd=ROOT, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            self.link, _ = listener.accept()
        self.reader = FrameReader(self.link)

    def send(self, frame: Frame) -> None:
        self.link.sendall(encode(frame))

    def hello(self, **config: Any) -> Frame:
        self.send({"op": "hello", **vars(self.clock), "config": config, "version": 3})
        return self.wait_for(lambda frame: frame["op"] == "ready")

    def wait_for(self, wanted: Callable[[Frame], bool]) -> Frame:
        """The first frame, from here on, that is wanted."""
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            arrived = self.reader.poll(0.5)
            self.frames += arrived
            for frame in arrived:
                if wanted(frame):
                    return frame
        raise TimeoutError(f"not seen; the last frames were {self.frames[-3:]}")

    def call(self, name: str, **args: Any) -> Frame:
        self.send({"op": "control", "call": len(self.frames), "name": name, "args": args})
        return self.wait_for(lambda frame: frame["op"] == "reply")

    def wait_for_end(self, id: str) -> None:
        self.wait_for(
            lambda frame: frame["op"] == "tokens" and any(i[0] == id and i[2] for i in frame["items"])
        )

    def close(self) -> None:
        self.link.close()
        if self.process.poll() is None:
            self.process.terminate()
        self.process.communicate(timeout=LIMIT_S)


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model("qwen2", tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def child(shared_folder: Path, tmp_path: Path) -> Iterator[EngineChild]:
    child = EngineChild(shared_folder, tmp_path)
    yield child
    child.close()


def plan_of(config: EngineConfig, now: float, lease_s: float, slice_s: float) -> dict[str, Any]:
    challenger = PlannedSlice("s1", "challenger", config.config_id, now, now + slice_s, burn_in_s=0.0)
    return SlicePlan("p1", "e1", 4, {config.config_id: config.values()}, (challenger,), lease_s).to_dict()


def test_serves_streams_cancels_reconfigures_and_reverts_when_the_lease_lapses(child: EngineChild) -> None:
    ready = child.hello(max_num_seqs=4, threads_decode=1, threads_prefill=1)
    assert ready["version"] == 3 and ready["config"]["max_num_seqs"] == 4 and ready["identity"]["tier"] == "A"
    assert ready["identity"]["model"]["max_model_len"] == 256 and ready["identity"]["kv_total_tokens"] == 2048
    reports = {knob["name"]: knob for knob in ready["knobs"]}
    assert set(reports) == set(EngineConfig().values())
    assert reports["long_prompt_threshold"]["high"] == 256, "no prompt is longer"
    assert ready["config"]["long_prompt_threshold"] == 1_048_576, "off is off on every machine"

    # Serving, and cancelling while it streams.
    child.send(submission("cancelled", max_tokens=240))
    child.wait_for(lambda frame: bool(tokens_of([frame], "cancelled")))
    child.send({"op": "cancel", "id": "cancelled"})
    child.send(submission("a", max_tokens=5))
    child.wait_for_end("a")
    gauge = child.wait_for(lambda frame: frame["op"] == "gauge" and frame["num_running"] == 0)
    assert len(tokens_of(child.frames, "a")) == 5 and gauge["kv_used_tokens"] == 0
    assert 0 < len(tokens_of(child.frames, "cancelled")) < 240

    # A live reconfiguration loses no request and is tagged on the tokens that follow.
    child.send(submission("b", max_tokens=200))
    child.wait_for(lambda frame: bool(tokens_of([frame], "b")))
    done = child.call("reconfigure", patch={"max_num_seqs": 2}, expected_version=3)["value"]
    assert done["version"] == 4 and done["config"]["max_num_seqs"] == 2
    child.wait_for_end("b")
    served_by = [frame["config_id"] for frame in child.frames if tokens_of([frame], "b")]
    assert done["config_id"] == served_by[-1] != served_by[0] and len(served_by) == 200
    assert child.call("reconfigure", patch={}, expected_version=3)["error"]["kind"] == "stale_version"
    assert child.call("reconfigure", patch={"max_num_seqs": 0})["error"]["kind"] == "invalid_knob"
    assert child.call("lease", plan_id="no", lease_s=1.0)["error"]["kind"] == "no_plan"
    assert child.call("nonsense")["error"]["kind"] == "invalid_call"

    # A challenger serves while its lease is renewed; when it lapses the champion is back without being told.
    challenger = EngineConfig.of(done["config"] | {"max_num_seqs": 3})
    plan = plan_of(challenger, child.clock.now(), lease_s=2.0, slice_s=60.0)
    assert child.call("plan", **plan)["value"] == {"plan_id": "p1", "accepted": True}
    assert child.call("plan", **plan)["value"]["accepted"], "the same plan again changes nothing"
    child.send(submission("c", max_tokens=5))
    child.wait_for_end("c")
    tagged = [frame for frame in child.frames if tokens_of([frame], "c")]
    assert {(frame["slice_id"], frame["config_id"]) for frame in tagged} == {("s1", challenger.config_id)}
    assert child.call("lease", plan_id="p1", lease_s=0.3)["value"]["slice_id"] == "s1"
    child.wait_for(lambda frame: frame["op"] == "event" and frame["kind"] == "lease_lapsed")
    child.send(submission("d", max_tokens=5))
    child.wait_for_end("d")
    last = [frame for frame in child.frames if tokens_of([frame], "d")][-1]
    assert last["slice_id"] is None and last["config_id"] == done["config_id"]
    kinds = [frame["kind"] for frame in child.frames if frame["op"] == "event"]
    assert kinds == ["config_committed", "plan_accepted", "slice_started", "slice_ended", "lease_lapsed"]

    child.send({"op": "stop"})
    assert child.process.wait(LIMIT_S) == 0


def test_ends_when_the_front_end_goes_away(child: EngineChild) -> None:
    child.hello()
    child.send(submission("a", max_tokens=240))
    child.wait_for(lambda frame: frame["op"] == "tokens")
    child.link.close()
    assert child.process.wait(LIMIT_S) == 0


def test_a_damaged_model_ends_the_process_with_its_own_exit_code(tmp_path: Path) -> None:
    folder = save_tiny_model("qwen2", tmp_path / "tiny")
    (folder / "model.safetensors").write_bytes(b"damaged")
    child = EngineChild(folder, tmp_path)
    child.send({"op": "hello", "boot_epoch": 0.0, "boot_monotonic": 0.0, "config": {}, "version": 0})
    _, errors = child.process.communicate(timeout=LIMIT_S)
    assert child.process.returncode == MODEL_ERROR_EXIT_CODE and "is damaged" in errors
    child.close()


def test_the_engine_module_does_not_load_torch_before_its_thread_environment_is_set() -> None:
    code = "import sys, runtime.engine; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=dict(os.environ), check=False).returncode
        == 0
    )


# -- steps that overlap ---------------------------------------------------------------------------------------------


def seen_tokens(here: InProcess) -> dict[str, list[int]]:
    return {id: tokens_of(here.frames, id) for id in "abcdefgh"}


@pytest.mark.parametrize("pool_tokens", [512, 80])
def test_overlapping_steps_give_the_same_tokens_and_ends(
    folder: Path, pool_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stop tokens, whose step is followed by one that is void; with draws; and where the pool is too small."""
    found = []
    for depth in (0, 1):
        here = InProcess(
            folder, overlap_depth=depth, max_num_seqs=4, prefill_chunk=16, pool_tokens=pool_tokens
        )
        most_under_way, launch = 0, here.executor.launch

        def noted(*args: Any, here: InProcess = here, launch: Any = launch) -> Any:
            nonlocal most_under_way
            most_under_way = max(most_under_way, 1 + (here.engine._under_way is not None))
            return launch(*args)

        monkeypatch.setattr(here.executor, "launch", noted)
        for at, id in enumerate("abcdefgh"):
            prompt = [(7 * at + 3 * k) % 90 + 2 for k in range(5 + 2 * at)]
            sampling = {"temperature": 0.9, "seed": at} if at % 3 == 2 else {}
            here.engine.submit(
                submission(
                    id,
                    prompt=prompt,
                    max_tokens=14 + 2 * at,
                    stop_token_ids=list(range(0, 97, 16)),
                    sampling=sampling,
                )
            )
        here.run()
        assert most_under_way == 1 + depth, "the test must reach what it claims"
        assert here.engine.scheduler.pool.num_held == 0 and not here.engine.scheduler.has_requests
        found.append((seen_tokens(here), ends_of(here.frames)))
        preemptions = here.engine.scheduler.num_preemptions
        assert bool(preemptions) == (pool_tokens == 80), "the test must reach what it claims"
    assert found[0] == found[1]
    assert set(found[0][1].values()) == {"stop", "length"}


def test_a_request_that_needs_its_last_token_on_the_host_ends_the_overlap(folder: Path) -> None:
    here = InProcess(folder, overlap_depth=1, max_num_seqs=4)
    here.engine.submit(submission("a", max_tokens=20))
    for _ in range(3):
        here.engine.step()
    assert here.engine._under_way is not None
    here.engine.submit(submission("b", max_tokens=4, sampling={"repetition_penalty": 1.5}))
    here.engine.step()
    assert here.engine._under_way is None
    here.run()
    alone = InProcess(folder, overlap_depth=0)
    alone.engine.submit(submission("a", max_tokens=20))
    alone.engine.submit(submission("b", max_tokens=4, sampling={"repetition_penalty": 1.5}))
    alone.run()
    assert seen_tokens(here) == seen_tokens(alone)


def test_a_step_under_way_is_void_for_a_request_that_was_cancelled(folder: Path) -> None:
    here = InProcess(folder, overlap_depth=1, max_num_seqs=4)
    here.engine.submit(submission("a", max_tokens=20))
    here.engine.submit(submission("b", max_tokens=6))
    for _ in range(4):
        here.engine.step()
    told = len(tokens_of(here.frames, "a"))
    assert here.engine.scheduler.cancel("a")
    here.run()
    assert len(tokens_of(here.frames, "a")) == told and len(tokens_of(here.frames, "b")) == 6
    assert here.engine.scheduler.pool.num_held == 0
