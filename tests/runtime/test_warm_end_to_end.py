"""WARM knobs over HTTP on the runtime as it is shipped: 32 clients stream while weights, pool and cache change."""

import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from runtime.client import RuntimeClient
from runtime.errors import InvalidKnob, InvalidPlan
from runtime.knobs import EngineConfig
from runtime.plan import PlannedSlice, SlicePlan
from tests.servers import LiveServer, live_server, wait_until

TEXTS = [f"def read_{name}(path):\n    with open(path) as " for name in "abcdefgh"]
NUM_STREAMS, NUM_TOKENS = 32, 40


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    arguments = ("--device", "cpu", "--kv-tokens", "8192", "--max-model-len", "512")
    with live_server(tmp_path_factory.mktemp("warm"), *arguments, engine_module="runtime.engine") as live:
        yield live


def stream_all(server: LiveServer, during: Any = None) -> list[tuple[str, int]]:
    """Each stream's text and number of events, while `during` runs."""
    told: dict[int, tuple[str, int]] = {}

    def stream(index: int, client: openai.OpenAI) -> None:
        chunks = client.completions.create(
            model="demo_model", prompt=TEXTS[index % 8], max_tokens=NUM_TOKENS, temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        parts = [choice for chunk in chunks for choice in chunk.choices]
        assert parts[-1].finish_reason == "length"
        told[index] = ("".join(part.text for part in parts), len(parts))

    with server.openai() as client:
        threads = [threading.Thread(target=stream, args=(index, client)) for index in range(NUM_STREAMS)]
        for thread in threads:
            thread.start()
        if during is not None:
            during()
        for thread in threads:
            thread.join()
    assert len(told) == NUM_STREAMS, "no stream is dropped"
    return [told[index] for index in range(NUM_STREAMS)]


def put_in_force(control: RuntimeClient, **patch: Any) -> None:
    """Changes the champion and reads back what is in force."""
    done = control.reconfigure(patch, control.state()["version"])
    state = control.state()
    assert {name: state["config"][name] for name in patch} == patch
    assert state["config_id"] == done["config_id"] == EngineConfig.of(state["config"]).config_id
    if "kv_tokens" in patch:
        wait_until(
            lambda: control.state()["gauges"]["kv_total_tokens"] == patch["kv_tokens"], "the pool's size"
        )


def test_32_streams_are_answered_alike_through_pools_and_caches_and_go_on_through_weights(
    server: LiveServer,
) -> None:
    quiet = [text for text, _ in stream_all(server)]
    with server.control() as control:

        def pools_and_caches() -> None:
            put_in_force(control, kv_tokens=16_384)
            put_in_force(control, prefix_cache="on")
            put_in_force(control, kv_tokens=1024)
            put_in_force(control, prefix_cache="off", kv_tokens=8192)

        def weights() -> None:
            for name in ("int8", "bfloat16", "float32"):
                told = control.prepare(control.state()["champion"] | {"weight_format": name})
                assert (told["extra_bytes"] > 0) == (name != "float32")
                put_in_force(control, weight_format=name)

        assert [text for text, _ in stream_all(server, pools_and_caches)] == quiet
        assert all(num > 1 for _, num in stream_all(server, weights))
        assert [text for text, _ in stream_all(server)] == quiet, "the loaded weights are back, bit for bit"


def test_a_plan_waits_for_its_preparation_and_what_cannot_be_leaves_everything(server: LiveServer) -> None:
    with server.control() as control:
        before = control.state()
        challenger = EngineConfig.of(before["champion"]).patched({"kv_tokens": 4096})
        now = before["now"]
        planned = PlannedSlice("s1", "challenger", challenger.config_id, now, now + 3.0, 0.0)
        plan = SlicePlan(
            "p1", "e1", before["version"], {challenger.config_id: challenger.values()}, (planned,), 3.0
        )
        with pytest.raises(InvalidPlan, match="not prepared; call prepare first"):
            control.plan(plan)
        told = control.prepare(challenger.values())
        assert told["config_id"] == challenger.config_id and told["extra_bytes"] > 0
        control.plan(plan)
        wait_until(lambda: control.state()["gauges"]["kv_total_tokens"] == 4096, "the challenger's pool")
        wait_until(lambda: control.state()["gauges"]["kv_total_tokens"] == 8192, "the champion's pool")

        high = next(knob["high"] for knob in before["knobs"] if knob["name"] == "kv_tokens")
        with pytest.raises(InvalidKnob, match="must be at most"):
            control.prepare(before["champion"] | {"kv_tokens": high + 16})
        with pytest.raises(InvalidKnob, match="so that the longest request fits"):
            control.reconfigure({"kv_tokens": 256}, None)
        after = control.state()
        assert (after["champion"], after["version"]) == (before["champion"], before["version"])


def test_hits_of_the_prefix_cache_are_exported(server: LiveServer) -> None:
    with server.control() as control, server.openai() as client:
        put_in_force(control, prefix_cache="on")
        for _ in range(2):
            client.completions.create(model="demo_model", prompt=TEXTS[0] * 8, max_tokens=2, temperature=0)
        hits = 'tuner_prefix_cache_hits_total{model_name="demo_model"}'
        wait_until(lambda: control.metrics()[hits] >= 64, "hits")
        assert control.metrics()[hits.replace("tuner_", "vllm:")] == control.metrics()[hits]
        put_in_force(control, prefix_cache="off")
