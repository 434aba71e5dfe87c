"""The whole runtime as it is shipped: front end, real engine, demo model, official client. On the CPU."""

import json
import math
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from runtime.knobs import EngineConfig
from runtime.timings import RequestTiming, StepRecord
from tests.servers import DEMO_MODEL, LiveServer, live_server, wait_until

PROMPT = "import os\n\ndef read_lines(path):\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    run_dir = tmp_path_factory.mktemp("end_to_end")
    arguments = ("--device", "cpu", "--kv-tokens", "8192")
    with live_server(run_dir, *arguments, engine_module="runtime.engine") as live:
        yield live


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with server.openai() as client:
        yield client


def complete(client: openai.OpenAI, **changed: Any) -> Any:
    asked: dict[str, Any] = {"model": "demo_model", "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    return client.completions.create(**{**asked, **changed})


def test_greedy_answers_repeat_and_stream_alike(client: openai.OpenAI) -> None:
    whole = complete(client)
    assert whole.choices[0].text and whole.usage.completion_tokens == 24
    chunks = complete(client, stream=True)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == whole.choices[0].text


def test_the_coldest_draw_is_greedy(client: openai.OpenAI) -> None:
    greedy = complete(client, temperature=0).choices[0].text
    assert complete(client, temperature=5e-324).choices[0].text == greedy  # 0 in float32
    assert complete(client, temperature=1e-4).choices[0].text == greedy


def test_equal_seeds_draw_equal_answers_in_any_batch(client: openai.OpenAI) -> None:
    alone = complete(client, temperature=0.9, seed=7).choices[0].text
    batched = complete(client, temperature=0.9, seed=7, prompt=[PROMPT, "class Store:\n", PROMPT])
    assert [batched.choices[0].text, batched.choices[2].text] == [alone, alone]


def test_several_answers_to_one_prompt_differ_and_repeat_with_their_seed(client: openai.OpenAI) -> None:
    asked = {"prompt": [PROMPT, "class Store:\n"], "n": 3, "temperature": 1.0}
    first = complete(client, seed=7, **asked)
    assert [choice.index for choice in first.choices] == list(range(6))
    texts = [choice.text for choice in first.choices]
    assert len(set(texts)) == 6
    assert texts[0] == complete(client, seed=7, temperature=1.0).choices[0].text
    assert texts[1] == complete(client, seed=8, temperature=1.0).choices[0].text
    one = complete(client, prompt=asked["prompt"])
    assert first.usage.prompt_tokens == one.usage.prompt_tokens  # each prompt counts once
    assert first.usage.completion_tokens == 6 * 24
    unseeded = complete(client, **asked)
    assert {choice.text for choice in unseeded.choices}.isdisjoint(texts)


def test_logits_are_shaped_as_asked(client: openai.OpenAI, server: LiveServer) -> None:
    with server.http() as http:
        told = http.post("/tokenize", json={"prompt": " class", "add_special_tokens": False}).json()
        (token,) = told["tokens"]
        assert (told["count"], told["max_model_len"]) == (1, 2048)
        assert http.post("/detokenize", json={"tokens": [token]}).json() == {"prompt": " class"}
        chat = http.post("/tokenize", json={"messages": [{"role": "user", "content": "Hi"}]}).json()
        text = http.post("/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"]
        assert "Hi" in text and chat["count"] == len(chat["tokens"]) > 1
    assert complete(client, max_tokens=3, logit_bias={str(token): 100}).choices[0].text == " class" * 3
    once = complete(client, max_tokens=3, logit_bias={str(token): 100}, presence_penalty=2.0,
                    extra_body={"repetition_penalty": 100.0})  # fmt: skip
    assert once.choices[0].text.count(" class") == 1
    assert complete(client, temperature=1.5, extra_body={"top_k": 1}).choices[0].text == (
        complete(client).choices[0].text
    )


def test_logprobs_are_those_of_the_model_streamed_and_whole(client: openai.OpenAI) -> None:
    whole = complete(client, logprobs=3).choices[0]
    told = whole.logprobs
    assert "".join(told.tokens) == whole.text and len(told.token_logprobs) == 24
    assert told.text_offset == [sum(map(len, told.tokens[:i])) for i in range(24)]
    for token, logprob, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert len(top) == 3 and top[token] == logprob == max(top.values())  # greedy takes the likeliest
        assert sum(math.exp(value) for value in top.values()) <= 1.0 + 1e-6
    chunks = [choice for chunk in complete(client, logprobs=3, stream=True) for choice in chunk.choices]
    assert [token for one in chunks if one.logprobs for token in one.logprobs.tokens] == told.tokens
    drawn = complete(client, logprobs=0, temperature=1.5, seed=3, extra_body={"top_k": 5}).choices[0].logprobs
    assert all(
        list(top.values()) == [log] for top, log in zip(drawn.top_logprobs, drawn.token_logprobs, strict=True)
    )
    assert complete(client).choices[0].logprobs is None


@pytest.fixture(scope="module")
def plain_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(
        DEMO_MODEL, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.inference_mode()
def logs_of(model: Any, token_ids: list[int]) -> torch.Tensor:
    """[tokens, vocab] what transformers says of the token after each."""
    return torch.log_softmax(model(torch.tensor([token_ids])).logits[0].double(), -1)


def tokens_of(server: LiveServer, **body: Any) -> list[int]:
    with server.http() as http:
        return list(http.post("/tokenize", json=body).json()["tokens"])


@pytest.mark.parametrize("max_tokens", [0, 5])
def test_an_echo_scores_texts_and_tokens_as_a_forward_pass_does(
    server: LiveServer, client: openai.OpenAI, plain_model: Any, max_tokens: int
) -> None:
    with server.control() as control:
        control.reconfigure({"prefill_chunk": 32}, None)
    texts = [PROMPT * 12, "class Store:\n    pass\n", PROMPT]
    ids = [tokens_of(server, prompt=text) for text in texts]
    by_text = complete(client, prompt=texts, echo=True, logprobs=2, max_tokens=max_tokens)
    by_ids = complete(client, prompt=ids, echo=True, logprobs=2, max_tokens=max_tokens)
    for text, prompt, told, again in zip(texts, ids, by_text.choices, by_ids.choices, strict=True):
        assert told.text.startswith(text)
        scores, num = told.logprobs, len(prompt)
        assert len(scores.tokens) == num + max_tokens and "".join(scores.tokens) == told.text
        assert scores.text_offset == [len("".join(scores.tokens[:at])) for at in range(num + max_tokens)]
        assert scores.token_logprobs[0] is None and scores.top_logprobs[0] is None
        logs = logs_of(plain_model, prompt)
        expected = [float(logs[at, token]) for at, token in enumerate(prompt[1:])]
        assert scores.token_logprobs[1:num] == pytest.approx(expected, abs=2e-3)
        is_greedy = [logs[at].argmax() == token for at, token in enumerate(prompt[1:])]
        found = [log == max(top.values()) for log, top in zip(
            scores.token_logprobs[1:num], scores.top_logprobs[1:num], strict=True)]  # fmt: skip
        assert found == is_greedy  # what lm-evaluation-harness reads
        assert again.logprobs.token_logprobs[1:] == pytest.approx(scores.token_logprobs[1:], abs=2e-3)
    assert by_text.usage.completion_tokens == 3 * max_tokens


def test_an_echo_streams_alike_and_begins_every_answer(client: openai.OpenAI) -> None:
    asked = {"echo": True, "logprobs": 1, "n": 2, "temperature": 1.0, "seed": 5, "max_tokens": 6}
    whole = complete(client, **asked).choices
    texts: dict[int, str] = {0: "", 1: ""}
    tokens: dict[int, list[str]] = {0: [], 1: []}
    offsets: dict[int, list[int]] = {0: [], 1: []}
    for chunk in complete(client, **asked, stream=True):
        for choice in chunk.choices:
            assert texts[choice.index] or choice.text.startswith(PROMPT)
            texts[choice.index] += choice.text
            if choice.logprobs:
                tokens[choice.index] += choice.logprobs.tokens
                offsets[choice.index] += choice.logprobs.text_offset
    for one in whole:
        assert (texts[one.index], tokens[one.index]) == (one.text, one.logprobs.tokens)
        assert offsets[one.index] == one.logprobs.text_offset
    assert whole[0].text != whole[1].text


def test_logprobs_of_prompts_are_those_of_a_forward_pass_with_ranks(
    server: LiveServer, client: openai.OpenAI, plain_model: Any
) -> None:
    asked = {"max_tokens": 2, "extra_body": {"prompt_logprobs": 3}}
    first, second = (
        choice.model_extra["prompt_logprobs"] for choice in complete(client, n=2, **asked).choices
    )
    assert len(first) == len(second) and first[0] is None
    prompt = tokens_of(server, prompt=PROMPT)
    assert_ranked(first, prompt, logs_of(plain_model, prompt), 3)
    messages: Any = [{"role": "user", "content": "What does `copytree` do?"}]
    chat = client.chat.completions.create(model="demo_model", messages=messages, **asked)
    prompt = tokens_of(server, messages=messages)
    assert_ranked(chat.model_extra["prompt_logprobs"], prompt, logs_of(plain_model, prompt), 3)
    assert "prompt_logprobs" not in complete(client).choices[0].model_extra
    few = complete(client, max_tokens=0, echo=True, logprobs=4, extra_body={"prompt_logprobs": 0}).choices[0]
    assert all(len(one) == 1 for one in few.model_extra["prompt_logprobs"][1:])
    assert all(len(top) in (4, 5) for top in few.logprobs.top_logprobs[1:])


def assert_ranked(told: list[Any], prompt: list[int], logs: torch.Tensor, num: int) -> None:
    assert len(told) == len(prompt) and told[0] is None
    for at, (token, entry) in enumerate(zip(prompt[1:], told[1:], strict=True)):
        own = entry[str(token)]
        assert own["logprob"] == pytest.approx(float(logs[at, token]), abs=2e-3)
        near = logs[at] - logs[at, token]
        assert (near > 4e-3).sum() < own["rank"] <= (near > -4e-3).sum()
        others = sorted(one["rank"] for one in entry.values())
        assert others[:num] == list(range(1, num + 1)) and len(others) in (num, num + 1)


def test_a_chat_tells_logprobs_with_bytes(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "What does `copytree` do?"}]
    answer = client.chat.completions.create(
        model="demo_model", messages=messages, max_tokens=20, temperature=0, logprobs=True, top_logprobs=2
    ).choices[0]
    assert answer.logprobs is not None and answer.logprobs.content
    told = b"".join(bytes(one.bytes or []) for one in answer.logprobs.content)
    assert answer.message.content and told.decode().startswith(answer.message.content)
    assert all(len(one.top_logprobs) == 2 for one in answer.logprobs.content)


def test_min_tokens_holds_back_ends_and_stop_strings(client: openai.OpenAI) -> None:
    text = complete(client).choices[0].text
    stop = text[2:5]
    assert complete(client, stop=[stop]).choices[0].text == text[: text.index(stop)]
    late = complete(client, stop=[stop], extra_body={"min_tokens": 24})
    assert (late.choices[0].text, late.choices[0].finish_reason) == (text, "length")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}), ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}),
        ("/tokenize", {"prompt": 5}), ("/detokenize", {"tokens": [-1]}), ("/detokenize", {"tokens": [10**9]}),
        ("/detokenize", {"tokens": "a"}), ("/detokenize", {}),
    ],
)  # fmt: skip
def test_bad_calls_for_tokens_are_refused(server: LiveServer, path: str, body: dict[str, Any]) -> None:
    with server.http() as http:
        answer = http.post(path, json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] in ("prompt", "tokens")


def test_a_chat_answers_in_the_models_words(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "What does `copytree` do?"}]
    answer = client.chat.completions.create(
        model="demo_model", messages=messages, max_tokens=40, temperature=0
    )
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_reconfiguring_under_load_loses_no_token_and_changes_no_answer(
    server: LiveServer, client: openai.OpenAI
) -> None:
    expected = complete(client, max_tokens=120).choices[0].text
    texts: list[str] = []

    def stream() -> None:
        chunks = complete(client, max_tokens=120, stream=True)
        texts.append("".join(choice.text for chunk in chunks for choice in chunk.choices))

    threads = [threading.Thread(target=stream) for _ in range(4)]
    for thread in threads:
        thread.start()
    with server.control() as control:
        for num_seqs in (1, 3, 16):
            done = control.reconfigure({"max_num_seqs": num_seqs, "prefill_chunk": 16 * num_seqs}, None)
            assert control.state()["config_id"] == EngineConfig.of(done["config"]).config_id
    for thread in threads:
        thread.join()
    assert texts == [expected] * 4


def test_drafts_change_no_answer_and_are_counted(server: LiveServer, client: openai.OpenAI) -> None:
    text = complete(client, max_tokens=120).choices[0].text
    shapes: list[dict[str, Any]] = [
        {}, {"stop": [text[60:64]]}, {"temperature": 0.4, "seed": 3}, {"logprobs": 2}, {"frequency_penalty": 0.1},
    ]  # fmt: skip

    def answers() -> list[Any]:
        found = [complete(client, max_tokens=120, **shape) for shape in shapes]
        return [
            (one.choices[0].text, one.choices[0].finish_reason, one.usage.completion_tokens) for one in found
        ]

    def num_right() -> float:
        with server.http() as http:
            lines = http.get("/metrics").text.splitlines()
        names = ("tuner_draft_right_tokens_total", "vllm:spec_decode_num_accepted_tokens_total")
        ours, theirs = (
            float(line.split()[-1]) for name in names for line in lines if line.startswith(name + "{")
        )
        assert ours == theirs
        return ours

    expected = answers()
    with server.control() as control:
        control.reconfigure({"speculation_length": 6}, None)
        assert answers() == expected
        chunks = complete(client, max_tokens=120, stream=True)
        assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == text
        wait_until(lambda: num_right() > 0, "the gauge tells of drafts that were right")
        control.reconfigure({"speculation_length": 0}, None)


def test_records_of_requests_and_steps_are_as_declared(server: LiveServer, client: openai.OpenAI) -> None:
    complete(client, max_tokens=5)
    server.wait_idle()
    with server.control() as control:
        records = control.drain(None, 0, 20_000)["records"]
        identity = control.identity()
    timings = [RequestTiming.of(record) for record in records if record["kind"] == "request"]
    steps = [StepRecord.of(record) for record in records if record["kind"] == "step"]
    last = timings[-1]
    assert (last.output_tokens, last.gaps.num, last.finish_reason) == (5, 4, "length")
    assert last.admitted_at is not None and last.first_token_at is not None
    assert last.arrived_at <= last.admitted_at <= last.first_token_at <= last.finished_at
    assert all(0 < step.forward_s <= step.step_s for step in steps)
    assert sum(step.num_prefill_tokens for step in steps) >= sum(timing.prompt_tokens for timing in timings)
    assert identity["model"]["num_parameters"] > 1_000_000 and identity["tier"]


def test_a_client_that_leaves_gives_its_cache_back(server: LiveServer) -> None:
    body = {"prompt": PROMPT, "max_tokens": 1500, "stream": True, "ignore_eos": True}
    with server.http() as http, http.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    server.wait_idle()
    with server.control() as control:
        wait_until(lambda: control.state()["gauges"]["num_running"] == 0, "the engine is idle")


def test_a_killed_engine_serves_again_and_keeps_the_champion(
    server: LiveServer, client: openai.OpenAI
) -> None:
    with server.control() as control:
        champion = control.reconfigure({"max_num_seqs": 5}, None)
        expected = complete(client).choices[0].text
        os.kill(control.identity()["engine_pid"], signal.SIGKILL)
        assert complete(client).choices[0].text == expected
        state = control.state()
    assert (state["config_id"], state["version"]) == (champion["config_id"], champion["version"])
    assert state["num_engine_restarts"] == 1


def test_a_prompt_too_long_for_the_cache_is_refused_alone(server: LiveServer, client: openai.OpenAI) -> None:
    with server.http() as http:
        answer = http.post("/v1/completions", content=json.dumps({"prompt": [300] * 2048, "max_tokens": 1}))
        assert answer.status_code == 400
    assert complete(client).usage.completion_tokens == 24
