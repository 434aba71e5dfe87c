"""Clients against a live server process with the fake engine, which repeats each prompt token by token."""

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from runtime.body import MAX_VALUES
from runtime.protocol import MAX_PROMPTS
from tests.servers import LiveServer, live_server, wait_until


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("server")) as live:
        yield live


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with server.openai() as client:
        yield client


@pytest.fixture(scope="module")
def http(server: LiveServer) -> Iterator[httpx.Client]:
    with server.http() as http:
        yield http


def post(http: httpx.Client, body: Any, path: str = "/v1/completions") -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return http.post(path, content=content, headers={"content-type": "application/json"})


def refused(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    """Returns the error of an OpenAI error body, after looking for what must never be in one."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text and "/runtime/" not in answer.text and "0x" not in answer.text
    assert answer.headers["x-request-id"]
    return dict(error)


def test_models_lists_the_one_served(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("demo_model", "model", "tuner")
    assert model.model_extra == {"root": "demo_model", "parent": None, "max_model_len": 2048}
    assert client.models.retrieve("demo_model").id == "demo_model"


def test_completion_returns_text_and_usage(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo_model", prompt="hello world", max_tokens=3)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("hello world", "length")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        3,
        3,
        6,
    )
    assert answer.id.startswith("cmpl-") and answer.object == "text_completion"


def test_completion_makes_16_tokens_unless_told_otherwise(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo_model", prompt="hello world")
    assert answer.usage is not None and answer.usage.completion_tokens == 16


def test_a_cache_salt_is_known_to_both_routes_and_an_empty_one_to_neither(http: httpx.Client) -> None:
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    for path, body in (
        ("/v1/completions", {"prompt": "hello", "max_tokens": 2}),
        ("/v1/chat/completions", chat),
    ):
        for cache_salt in ("ada", None):
            assert post(http, {**body, "cache_salt": cache_salt}, path).status_code == 200
        error = refused(post(http, {**body, "cache_salt": ""}, path))
        assert error["param"] == "cache_salt" and "must be text of 1 to 1024 characters" in error["message"]
    assert 'tuner_unknown_fields_total{field="cache_salt"' not in http.get("/metrics").text


def test_prompts_may_be_token_ids_and_several(client: openai.OpenAI) -> None:
    ids = client.completions.create(model="demo_model", prompt=[[2, 300], [301, 302]], max_tokens=2)
    assert [choice.index for choice in ids.choices] == [0, 1]
    assert ids.usage is not None and (ids.usage.prompt_tokens, ids.usage.completion_tokens) == (4, 4)
    texts = client.completions.create(model="demo_model", prompt=["abc def", "ghi"], max_tokens=8)
    assert [choice.text[:3] for choice in texts.choices] == ["abc", "ghi"]
    single = client.completions.create(model="demo_model", prompt=[300, 301], max_tokens=2)
    assert len(single.choices) == 1


def test_several_prompts_stream_side_by_side(client: openai.OpenAI) -> None:
    chunks = client.completions.create(
        model="demo_model", prompt=["abc def", "ghi"], max_tokens=12, stream=True
    )
    texts, ends = {0: "", 1: ""}, {}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    whole = client.completions.create(model="demo_model", prompt=["abc def", "ghi"], max_tokens=12)
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert ends == {0: "length", 1: "length"}


def test_chat_uses_the_models_template_and_the_rest_of_the_context(client: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    answer = client.chat.completions.create(model="demo_model", messages=messages, max_completion_tokens=20)
    assert "Be brief. hi" in (answer.choices[0].message.content or "")
    assert answer.choices[0].message.role == "assistant"
    rest = client.chat.completions.create(model="demo_model", messages=messages)
    assert rest.usage is not None and rest.usage.total_tokens == 2048


def test_a_stream_is_the_whole_answer_in_pieces(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "naïve 你好 🤗 text"}]
    asked: Any = {"model": "demo_model", "messages": messages, "max_tokens": 40}
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    whole = client.chat.completions.create(**asked)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["length"]


def test_usage_is_left_out_of_a_stream_that_did_not_ask(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(model="demo_model", prompt="hi you", max_tokens=2, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_a_stop_string_ends_the_answer_before_it(client: openai.OpenAI, server: LiveServer) -> None:
    asked: Any = {
        "model": "demo_model",
        "prompt": "one two three four",
        "max_tokens": 2000,
        "stop": ["three", "zzz"],
    }
    answer = client.completions.create(**asked)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("one two ", "stop")
    chunks = client.completions.create(**asked, stream=True)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == "one two "
    server.wait_idle()


def test_an_echoed_prompt_stands_in_front_of_each_answer(client: openai.OpenAI) -> None:
    asked: Any = {"model": "demo_model", "prompt": ["abc def", "ghi "], "n": 2, "max_tokens": 4, "echo": True}
    alone = client.completions.create(**{**asked, "echo": False})
    told = client.completions.create(**asked)
    expected = [
        prompt + alone.choices[index].text for index, prompt in enumerate(["abc def"] * 2 + ["ghi "] * 2)
    ]
    assert [choice.text for choice in told.choices] == expected and told.usage == alone.usage
    texts, firsts = dict.fromkeys(range(4), ""), {}
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            firsts.setdefault(choice.index, choice.text)
    assert list(texts.values()) == expected
    assert all(firsts[index].startswith(["abc def", "ghi "][index // 2]) for index in range(4))


def test_an_echo_alone_has_no_tokens_of_its_own(client: openai.OpenAI, http: httpx.Client) -> None:
    ids = [2, 300, 301, 1]  # with special tokens, the last of which would end an answer
    text = http.post("/detokenize", json={"tokens": ids}).json()["prompt"]
    asked: Any = {"model": "demo_model", "prompt": ids, "max_tokens": 0, "echo": True, "stop": ["e"]}
    told = client.completions.create(**asked)
    assert (told.choices[0].text, told.choices[0].finish_reason) == (text, "length")
    assert told.usage is not None and (told.usage.completion_tokens, told.usage.total_tokens) == (0, 4)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert [choice.text for chunk in chunks for choice in chunk.choices] == [text]
    assert chunks[-1].usage == told.usage


def test_a_stop_string_is_not_looked_for_in_an_echo(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="demo_model", prompt="one two three", max_tokens=20, stop="two", echo=True
    )
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("one two threeone ", "stop")


def test_an_end_token_ends_the_answer_unless_it_is_ignored(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="demo_model", prompt=[300, 301, 1], max_tokens=9)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.completion_tokens == 3
    on = client.completions.create(
        model="demo_model", prompt=[300, 301, 1], max_tokens=9, extra_body={"ignore_eos": True}
    )
    assert on.usage is not None and (on.choices[0].finish_reason, on.usage.completion_tokens) == ("length", 9)


def test_unknown_fields_are_ignored_counted_and_warned_of_once(
    http: httpx.Client, server: LiveServer
) -> None:
    body = {"prompt": "hi", "max_tokens": 1, "zebra_mode": True, "min_p": 0.1, "stream": True,
            "stream_options": {"continuous_usage_stats": True}}  # fmt: skip
    assert post(http, body).status_code == 200
    assert post(http, body).status_code == 200
    assert server.log().count("zebra_mode") == 1
    metrics = http.get("/metrics").text
    assert 'tuner_unknown_fields_total{field="zebra_mode",model_name="demo_model"} 2.0' in metrics
    assert 'field="stream_options.continuous_usage_stats"' in metrics


def test_metrics_carry_our_names_and_those_of_vllm_dashboards(http: httpx.Client) -> None:
    assert post(http, {"prompt": "hi you there", "max_tokens": 4}).status_code == 200
    page = http.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    assert len({family.name for family in text_string_to_metric_families(page.text)}) > 20
    for name in (
        "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
        "vllm:prompt_tokens_total",
        "vllm:time_to_first_token_seconds_bucket", "vllm:inter_token_latency_seconds_count", "tuner_engine_ready",
        "vllm:e2e_request_latency_seconds_sum", "vllm:generation_tokens_total", "vllm:request_success_total",
        "tuner_e2e_request_latency_seconds_bucket", "tuner_generation_tokens_total", "tuner_config_in_force",
    ):  # fmt: skip
        assert f"\n{name}{{" in page.text, name


def test_small_routes_answer(http: httpx.Client) -> None:
    for path in ("/health", "/ready", "/ping"):
        assert (http.get(path).status_code, http.get(path).json()) == (200, {"status": "ready"})
    assert set(http.get("/version").json()) == {"version"}
    assert http.get("/load").json() == {"server_load": 0, "num_queued": 0}
    assert http.get("/docs").status_code == 200


def test_every_reference_of_the_openapi_document_leads_somewhere(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()

    def references(part: Any) -> Iterator[str]:
        if isinstance(part, dict):
            if isinstance(part.get("$ref"), str):
                yield part["$ref"]
            yield from references(list(part.values()))
        elif isinstance(part, list):
            for item in part:
                yield from references(item)

    found = set(references(document))
    assert {name.rpartition("/")[2] for name in found} >= {
        "CompletionRequest", "ChatRequest", "TokenizeRequest", "DetokenizeRequest", "Message", "TextPart",
        "StreamOptions",
    }  # fmt: skip
    for reference in found:
        target = document
        for word in reference.removeprefix("#/").split("/"):
            target = target[word]
        assert target["type"] == "object", reference


def test_the_openapi_document_tells_every_shape_of_a_field(http: httpx.Client) -> None:
    schemas = http.get("/openapi.json").json()["components"]["schemas"]

    def shapes(form: str, field: str) -> list[str]:
        told = schemas[form]["properties"][field]["anyOf"]
        return [
            shape["type"] + (f" of {inner(shape['items'])}" if "items" in shape else "") for shape in told
        ]

    def inner(item: dict[str, Any]) -> str:
        if "items" in item:
            return f"{item['type']} of {inner(item['items'])}"
        return item["$ref"].rpartition("/")[2] if "$ref" in item else item["type"]

    assert shapes("CompletionRequest", "prompt") == [
        "string", "array of string", "array of integer", "array of array of integer",
    ]  # fmt: skip
    assert shapes("ChatRequest", "stop") == ["string", "array of string", "null"]
    assert shapes("ChatRequest", "logit_bias") == ["object", "null"]
    assert shapes("Message", "content") == ["string", "array of TextPart", "null"]


def test_a_request_id_is_given_back_only_if_it_is_a_plain_word(http: httpx.Client) -> None:
    assert http.get("/version", headers={"x-request-id": "abc-1.2"}).headers["x-request-id"] == "abc-1.2"
    assert (
        http.get("/version", headers={"x-request-id": "a b<script>"}).headers["x-request-id"] != "a b<script>"
    )


def test_an_unknown_model_is_not_found(client: openai.OpenAI, http: httpx.Client) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="gpt-9", prompt="hi")
    assert error.value.code == "model_not_found" and error.value.param == "model"
    refused(http.get("/v1/models/gpt-9"), 404)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": -1}, "top_p"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**18}, "max_tokens"),
        ({"max_tokens": 1e18}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"seed": 2**70}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["x"] * 10_000}, "stop"),
        ({"stop": "x" * 65}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": 5}, "stop"),
        ({"n": 0}, "n"),
        ({"n": 10**9}, "n"),
        ({"n": 64, "prompt": ["a"] * 64}, "n"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 5e-324}, "repetition_penalty"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"4096": 1}}, "logit_bias"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"cache_salt": 5}, "cache_salt"),
        ({"cache_salt": "half \ud800 pair"}, "cache_salt"),
        ({"cache_salt": "x" * 1025}, "cache_salt"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [4096]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "a\u0000b"}, "prompt"),
        ({"prompt": "half \ud800 pair"}, "prompt"),
        ({"echo": 1}, "echo"),
        ({"echo": True, "max_tokens": -1}, "max_tokens"),
        ({"echo": False, "max_tokens": 0}, "max_tokens"),
        ({"echo": True, "max_tokens": 0, "min_tokens": 1}, "min_tokens"),
        ({"echo": True, "logprobs": 21}, "logprobs"),
        ({"prompt": [[300] * 1000] * 64, "echo": True, "logprobs": 4}, "logprobs"),
        ({"prompt": [300] * 1000, "n": 64, "prompt_logprobs": 4}, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": True}, "prompt_logprobs"),
        ({"prompt_logprobs": 1.0}, "prompt_logprobs"),
        ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
        ({"best_of": 1000}, "best_of"),
        ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
    ],
)
def test_a_field_that_breaks_its_rule_is_refused_by_name(
    http: httpx.Client, change: dict[str, Any], param: str
) -> None:
    error = refused(post(http, {"prompt": "hello", **change}))
    assert error["param"] == param
    assert f"`{param}`" in error["message"] or "oken" in error["message"]


def test_the_message_says_what_was_got_but_never_repeats_text(http: httpx.Client) -> None:
    assert "got 2.5" in refused(post(http, {"prompt": "hello", "temperature": 2.5}))["message"]
    assert "secret" not in refused(post(http, {"prompt": {"a": "secret"}}))["message"]
    assert "secret" not in refused(post(http, {"prompt": "hello", "temperature": "secret"}))["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}] * 257}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": "hi"}, "messages"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"echo": True}, "echo"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)  # fmt: skip
def test_a_chat_that_breaks_a_rule_is_refused_by_name(
    http: httpx.Client, change: dict[str, Any], param: str
) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], **change}
    assert refused(post(http, body, "/v1/chat/completions"))["param"] == param


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"nonsense", b"[]", b"5", b"null", b'{"prompt": "a"} trailing', b"\xff\xfe{}", b'{"prompt": "\xff"}',
        b'\xef\xbb\xbf{"prompt": "a"}', b'{"prompt": "a\x00"}', b"{\x00}", b'{"prompt": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a", "x": ' + b"[" * 33 + b"]" * 33 + b"}", b"[" * 10_000, b'{"a":' * 10_000,
    ],
)  # fmt: skip
def test_a_body_that_is_no_shallow_json_object_is_refused(http: httpx.Client, body: bytes) -> None:
    assert refused(post(http, body))["type"] == "invalid_request_error"


def test_nesting_up_to_the_cap_is_taken(http: httpx.Client) -> None:
    body = b'{"prompt": "a", "max_tokens": 1, "x": ' + b"[" * 31 + b"]" * 31 + b"}"
    assert post(http, body).status_code == 200


def test_a_body_over_the_cap_is_refused_before_it_is_read(server: LiveServer) -> None:
    host, port = server.api_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100000000\r\n\r\n")
        assert sock.recv(4096).startswith(b"HTTP/1.1 413")


def test_a_body_that_grows_over_the_cap_is_refused(server: LiveServer) -> None:
    host, port = server.api_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        piece = b"10000\r\n" + b"a" * 0x10000 + b"\r\n"
        for _ in range(33):
            sock.sendall(piece)
        assert sock.recv(4096).startswith(b"HTTP/1.1 413")


def test_a_header_without_end_closes_the_connection(server: LiveServer) -> None:
    host, port = server.api_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as sock:
        sock.sendall(b"GET /version HTTP/1.1\r\n")
        try:
            for _ in range(64):
                sock.sendall(b"x-filler: " + b"a" * 4000 + b"\r\n")
            assert sock.recv(1) == b""
        except (ConnectionResetError, BrokenPipeError):
            pass


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenised(http: httpx.Client) -> None:
    message = refused(post(http, {"prompt": "a" * 1_000_000}))["message"]
    assert "2048" in message and "1000000 bytes" in message


def test_token_ids_are_counted_before_they_are_parsed(http: httpx.Client) -> None:
    room = MAX_VALUES + 2048  # the demo model's context comes on top
    message = refused(post(http, {"prompt": [5] * room}))["message"]
    assert f"at most {room} values" in message
    message = refused(post(http, {"prompt": [5] * (room - 10)}))["message"]
    assert "context of this model is 2048 tokens" in message


def test_as_many_prompts_as_a_call_may_hold_each_fill_the_context(http: httpx.Client) -> None:
    answer = post(http, {"prompt": [[300] * 2047] * MAX_PROMPTS, "max_tokens": 1})
    assert answer.json()["usage"]["prompt_tokens"] == 2047 * MAX_PROMPTS


def test_context_limits_are_exact(http: httpx.Client) -> None:
    def ask(prompt_tokens: int, **more: Any) -> httpx.Response:
        return post(http, {"prompt": [300] * prompt_tokens, **more})

    fits = ask(2047).json()
    assert fits["usage"] == {"prompt_tokens": 2047, "completion_tokens": 1, "total_tokens": 2048}
    assert ask(2040, max_tokens=8).status_code == 200
    for too_long in (ask(2048), ask(2049)):
        message = refused(too_long)["message"]
        assert "2048" in message
    message = refused(ask(2040, max_tokens=9))["message"]
    assert "2040" in message and "2049" in message and "at most 8" in message


def test_routes_that_do_not_exist_and_wrong_methods_get_the_same_error_body(http: httpx.Client) -> None:
    refused(http.get("/v2/nothing"), 404)
    refused(http.get("/v1/completions"), 405)
    refused(http.get("/control/state"), 404)


def test_a_client_that_leaves_a_stream_frees_its_request(server: LiveServer) -> None:
    body = {"prompt": "one two three", "max_tokens": 2000, "stream": True, "ignore_eos": True}
    with server.http() as http, http.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    server.wait_idle()
    assert finish_reasons(server).count("abort") >= 1


def test_a_client_that_leaves_before_its_answer_frees_its_request(server: LiveServer) -> None:
    host, port = server.api_url.removeprefix("http://").split(":")
    before = finish_reasons(server).count("abort")
    body = json.dumps({"prompt": "one two three", "max_tokens": 2000, "ignore_eos": True}).encode()
    with server.http() as http, socket.create_connection((host, int(port)), timeout=60) as sock:
        sock.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        )
        wait_until(lambda: http.get("/load").json()["server_load"] == 1, "the request is live")
    server.wait_idle()
    assert finish_reasons(server).count("abort") == before + 1


def finish_reasons(server: LiveServer) -> list[str]:
    with server.control() as control:
        records = control.drain(None, 0, 20_000)["records"]
    return [record["finish_reason"] for record in records if record["kind"] == "request"]


def test_prompts_and_answers_are_never_logged(server: LiveServer, client: openai.OpenAI) -> None:
    client.completions.create(model="demo_model", prompt="xylophone secret", max_tokens=4)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="demo_model", prompt="xylophone secret", max_tokens=40_000)
    assert "xylophone" not in server.log()


def test_a_full_queue_answers_429_with_retry_after(tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    hold.touch()
    config = json.dumps({"max_queued_requests": 2})
    with (
        live_server(tmp_path / "run", "--config", config, env={"FAKE_HOLD_FILE": str(hold)}) as server,
        server.http() as http,
    ):
        statuses: list[int] = []

        def ask() -> None:
            with server.http() as own:
                statuses.append(post(own, {"prompt": "hi", "max_tokens": 1}).status_code)

        waiting = [threading.Thread(target=ask) for _ in range(2)]
        for thread in waiting:
            thread.start()
        wait_until(lambda: http.get("/load").json()["num_queued"] == 2, "both wait")
        answer = post(http, {"prompt": "hi", "max_tokens": 1})
        assert refused(answer, 429)["code"] == "queue_full"
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        hold.unlink()
        for thread in waiting:
            thread.join()
        assert statuses == [200, 200]
        assert post(http, {"prompt": "hi", "max_tokens": 1}).status_code == 200
        assert sorted(finish_reasons(server)) == ["length", "length", "length", "rejected"]


def test_a_request_past_its_deadline_ends_with_504_or_an_error_event(tmp_path: Path) -> None:
    with (
        live_server(tmp_path, "--request-timeout-s", "0.5", env={"FAKE_STEP_S": "0.1"}) as server,
        server.http() as http,
    ):
        body = {"prompt": "one two three", "max_tokens": 2000, "ignore_eos": True}
        assert refused(post(http, body), 504)["code"] == "timeout"
        events = post(http, {**body, "stream": True})
        assert events.status_code == 200
        last = [line for line in events.text.splitlines() if line.startswith("data: {")][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
        assert finish_reasons(server) == ["timeout", "timeout"]
