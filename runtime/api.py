"""The routes that clients use: the OpenAI API, health, and metrics."""

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Path, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from runtime import __version__
from runtime.answers import ErrorAnswer, Kind, PromptLogprobs, error_answer, error_body
from runtime.api_document import Bodies
from runtime.body import MAX_VALUES, parse_object, read_parsed
from runtime.envelope import Envelope
from runtime.errors import InvalidRequest, RequestFailed, RuntimeFault, UnknownModel
from runtime.exchange import Exchange, Sampling, Wake, error_kind
from runtime.exposition import MAX_LABELS, Scrape, render
from runtime.front_end import FrontEnd
from runtime.generation import Answer, Choice, Echo
from runtime.key_guard import OPEN_TO_ALL, KeyGuard
from runtime.logprob_writer import LogprobWriter, prompt_logprobs
from runtime.model_folder import ModelFolder
from runtime.prompts import Prompts
from runtime.protocol import (
    DEFAULT_COMPLETION_TOKENS,
    INT64,
    MAX_PROMPT_LOGPROBS,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    parse_request,
    unknown_fields,
)
from runtime.request import SamplingParams

log = logging.getLogger(__name__)

INTERNAL_ERROR = "The server failed on this request."
MAX_IDS_CHECKED_AT_ONCE = 8192  # token ids of a call's prompts that the event loop looks at itself
NO_KEY = error_body(
    "This server asks for a key: send `Authorization: Bearer KEY`.",
    "authentication_error",
    None,
    "invalid_api_key",
)

AnyRequest = CompletionRequest | ChatRequest
Form = TypeVar("Form", bound=CompletionRequest | ChatRequest | TokenizeRequest | DetokenizeRequest)


@dataclass
class Service:
    """What the routes share. `prompts` is there once the tokenizer is loaded; requests wait for it."""

    front: FrontEnd
    folder: ModelFolder
    served_name: str
    context_cap: int | None  # the operator's; the engine may lower it further
    prompts: "asyncio.Future[Prompts]"
    tokenising: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "tokenise"))

    @property
    def max_model_len(self) -> int:
        told = self.front.engine.identity.get("model", {}).get("max_model_len")
        return min(cap for cap in (self.folder.context_tokens, self.context_cap, told) if cap is not None)

    async def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of plain texts, as a completion's prompt would have them. Raises InvalidRequest."""
        prompts, context = await asyncio.shield(self.prompts), self.max_model_len

        def encode_all() -> list[list[int]]:
            return [prompts.encode(text, context) for text in texts]

        return await asyncio.get_running_loop().run_in_executor(self.tokenising, encode_all)


def create_api(service: Service, api_key: str | None = None) -> ASGIApp:
    """With a key, every route but those of health asks for it."""
    app = FastAPI(title="Tuner runtime", version=__version__, redoc_url=None)
    bodies = Bodies([CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest], service.served_name)
    bodies.describe_parts(app)
    front = service.front

    @app.post("/v1/completions", openapi_extra=bodies.of(CompletionRequest))
    async def completions(request: Request) -> Response:
        return await _answer(service, request, "completion", CompletionRequest)

    @app.post("/v1/chat/completions", openapi_extra=bodies.of(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        return await _answer(service, request, "chat", ChatRequest)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(
        name: Annotated[str, Path(json_schema_extra={"enum": [service.served_name]})],
    ) -> dict[str, Any]:
        _check_model(service, name)
        return _model_card(service)

    @app.get("/health")
    @app.get("/ready")
    @app.get("/ping")
    async def health() -> Response:
        phase = "draining" if front.draining else front.engine.phase
        return JSONResponse({"status": phase}, 200 if front.is_ready else 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/load")
    async def load() -> dict[str, int]:
        return {"server_load": len(front.live), "num_queued": front.num_queued}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(render(_scrape(service)), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post("/tokenize", openapi_extra=bodies.of(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        return await _tokenize(service, request)

    @app.post("/detokenize", openapi_extra=bodies.of(DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        asked = await _read(service, request, DetokenizeRequest)
        prompts, loop = await asyncio.shield(service.prompts), asyncio.get_running_loop()
        text = await loop.run_in_executor(service.tokenising, prompts.text_of, asked.tokens)
        return JSONResponse({"prompt": text})

    _handle_errors(app)
    guarded = app if api_key is None else KeyGuard(app, api_key, NO_KEY, OPEN_TO_ALL)
    return Envelope(guarded, error_body(INTERNAL_ERROR, "server_error", None, "internal_error"))


async def _answer(service: Service, request: Request, kind: Kind, form: type[AnyRequest]) -> Response:
    """Reads, admits, tokenises and submits one call; the answer then sends itself."""
    front = service.front
    arrived_at = front.clock.now()
    try:
        asked = await _read(service, request, form)
    except RuntimeFault as error:
        front.meter.errors_by_kind[error_kind(error)] += 1
        raise
    num_choices = (len(asked.prompt) if isinstance(asked, CompletionRequest) else 1) * (asked.n or 1)
    wake = Wake()
    exchanges = front.open(num_choices, arrived_at, bool(asked.stream), wake)
    for exchange in exchanges:
        exchange.gathers = bool(asked.stream) and not asked.stop
    try:
        prompts = await asyncio.shield(service.prompts)
        echoes = await _submit_all(service, prompts, asked, exchanges)
    except BaseException as error:
        refusal = (
            error if isinstance(error, RuntimeFault) else RequestFailed(INTERNAL_ERROR, "internal_error")
        )
        for exchange in exchanges:
            front.refuse(exchange, refusal)
        raise
    choices = [
        Choice(
            index, one, prompts.decode, asked.stop, front.stop, asked.min_tokens or 0,
            LogprobWriter(kind, prompts.token_text), echo,
        )
        for index, (one, echo) in enumerate(zip(exchanges, echoes, strict=True))
    ]  # fmt: skip
    return Answer(
        front=front, kind=kind, request_id=exchanges[0].id, created=int(arrived_at), model=service.served_name,
        choices=choices,
        num_answers_a_prompt=asked.n or 1,
        wake=wake, streamed=bool(asked.stream), include_usage=asked.include_usage,
        tell_prompt=_prompt_teller(prompts, asked.prompt_logprobs),
    )  # fmt: skip


def _prompt_teller(prompts: Prompts, num_top: int | None) -> Callable[[Exchange], PromptLogprobs] | None:
    if num_top is None:
        return None
    return lambda one: prompt_logprobs(prompts.token_text, one.prompt_ids or [], one.prompt_logprobs, num_top)


async def _tokenize(service: Service, request: Request) -> Response:
    asked = await _read(service, request, TokenizeRequest)
    if (asked.prompt is None) == (asked.messages is None):
        raise InvalidRequest("Exactly one of `prompt` and `messages` must be given.", "prompt")
    prompts, context = await asyncio.shield(service.prompts), service.max_model_len

    def encode() -> list[int]:
        if asked.messages is not None:
            return prompts.encode_chat([message.for_template() for message in asked.messages], context)
        return prompts.encode(asked.prompt or "", context, asked.add_special_tokens)

    tokens = await asyncio.get_running_loop().run_in_executor(service.tokenising, encode)
    return JSONResponse({"count": len(tokens), "max_model_len": context, "tokens": tokens})


async def _read(service: Service, request: Request, form: type[Form]) -> Form:
    def parse(body: bytes) -> tuple[Form, list[str]]:
        fields = parse_object(body, MAX_VALUES + service.max_model_len)
        asked: Form = parse_request(form, fields)
        return asked, unknown_fields(asked, fields)

    asked, unknown = await read_parsed(request, parse)
    if asked.model is not None:
        _check_model(service, asked.model)
    _count_unknown(service, unknown)
    return asked


async def _submit_all(
    service: Service, prompts: Prompts, asked: AnyRequest, exchanges: list[Exchange]
) -> list[Echo | None]:
    """All prompts are checked before the first is submitted. Returns what each answer begins with."""
    context = service.max_model_len
    loop = asyncio.get_running_loop()
    if _is_short_ids(asked):  # going to a thread and back takes longer than to look at them here
        prompt_ids = _tokenise(prompts, asked, context)
    else:
        prompt_ids = await loop.run_in_executor(service.tokenising, _tokenise, prompts, asked, context)
    for ids in prompt_ids:
        _check_context(asked, len(ids), context)
    _check_tokens_named(asked, prompts)
    _check_prompt_logprobs(asked, sum(map(len, prompt_ids)))
    num_answers = asked.n or 1
    echoes: list[Echo | None] = [None] * len(prompt_ids)
    if isinstance(asked, CompletionRequest) and asked.echo:
        echoes = await loop.run_in_executor(service.tokenising, _echoes, prompts, asked)
    for number, exchange in enumerate(exchanges):  # all answers to the first prompt come first, as OpenAI's
        ids = prompt_ids[number // num_answers]
        service.front.submit(
            exchange, ids, _sampling(asked, prompts, len(ids), context, number % num_answers)
        )
    return [echo for echo in echoes for _ in range(num_answers)]


def _is_short_ids(asked: AnyRequest) -> bool:
    """Whether the prompts are token ids, and few enough to be checked within some 0.1 ms."""
    if isinstance(asked, ChatRequest) or any(isinstance(prompt, str) for prompt in asked.prompt):
        return False
    return sum(map(len, asked.prompt)) <= MAX_IDS_CHECKED_AT_ONCE


def _echoes(prompts: Prompts, asked: CompletionRequest) -> list[Echo | None]:
    """One a prompt: the text as it was given, or that of all its tokens."""
    texts = [prompt if isinstance(prompt, str) else prompts.text_of(prompt) for prompt in asked.prompt]
    return [Echo(text, asked.logprobs, asked.asked_tokens == 0) for text in texts]


def _tokenise(prompts: Prompts, asked: AnyRequest, context: int) -> list[list[int]]:
    if isinstance(asked, ChatRequest):
        return [prompts.encode_chat([message.for_template() for message in asked.messages], context)]
    prompt_ids = []
    for prompt in asked.prompt:
        if isinstance(prompt, str):
            prompt_ids.append(prompts.encode(prompt, context))
        else:
            _check_context(asked, len(prompt), context)  # before each of them is looked at
            prompts.check_ids(prompt)
            prompt_ids.append(prompt)
    return prompt_ids


def _check_context(asked: AnyRequest, prompt_tokens: int, context: int) -> None:
    param = "messages" if isinstance(asked, ChatRequest) else "prompt"
    if prompt_tokens == 0:
        raise InvalidRequest("The prompt must have at least 1 token, but got 0.", param)
    if prompt_tokens >= context:
        raise InvalidRequest(
            f"The context of this model is {context} tokens, of which at least 1 is for the answer, "
            f"but the prompt has {prompt_tokens}. Shorten the prompt.", param,
        )  # fmt: skip
    if asked.asked_tokens is not None and prompt_tokens + asked.asked_tokens > context:
        raise InvalidRequest(
            f"The context of this model is {context} tokens, but {prompt_tokens} of the prompt and "
            f"{asked.asked_tokens} of the answer are {prompt_tokens + asked.asked_tokens}. "
            f"Shorten the prompt or ask for at most {context - prompt_tokens}.", "max_tokens",
        )  # fmt: skip


def _check_tokens_named(asked: AnyRequest, prompts: Prompts) -> None:
    last = prompts.vocab_size - 1
    outside = [token for token in asked.logit_bias if token > last]
    if outside:
        raise InvalidRequest(
            f"`logit_bias` must name tokens in [0, {last}], but got {outside[0]}.", "logit_bias"
        )


def _check_prompt_logprobs(asked: AnyRequest, prompt_tokens: int) -> None:
    if asked.num_prompt_logprobs is None:
        return
    num = prompt_tokens * (asked.n or 1) * (1 + asked.num_prompt_logprobs)
    if num > MAX_PROMPT_LOGPROBS:
        name = "logprobs" if asked.prompt_logprobs is None else "prompt_logprobs"
        raise InvalidRequest(
            f"`{name}` must be at most {MAX_PROMPT_LOGPROBS} of all prompts of a call (tokens times `n` times "
            f"1 + the likeliest ones), but got {num}. Send fewer prompts at a time or ask for fewer of each.", name,
        )  # fmt: skip


def _sampling(asked: AnyRequest, prompts: Prompts, prompt_tokens: int, context: int, answer: int) -> Sampling:
    """`answer`: the number of this one among those to the same prompt; each is drawn with a seed of its own."""
    room = context - prompt_tokens
    default = room if isinstance(asked, ChatRequest) else min(room, DEFAULT_COMPLETION_TOKENS)
    max_tokens = asked.asked_tokens if asked.asked_tokens is not None else default
    if asked.min_tokens is not None and asked.min_tokens > max_tokens:
        raise InvalidRequest(
            f"`min_tokens` must be at most `max_tokens`, which is {max_tokens} here, but got {asked.min_tokens}.",
            "min_tokens",
        )
    is_drawn_in_vain = max_tokens == 0  # only to be echoed: the engine knows no request without a token
    ignore_eos = bool(asked.ignore_eos) or is_drawn_in_vain
    ends = () if ignore_eos else prompts.end_token_ids
    seed = secrets.randbits(63) if asked.seed is None else asked.seed + answer
    return Sampling(
        max_tokens=max(1, max_tokens),
        params=SamplingParams(
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            seed=seed if seed < INT64 else seed - 2 * INT64,
            top_k=min(asked.top_k or 0, prompts.vocab_size),
            min_p=asked.min_p or 0.0,
            presence_penalty=asked.presence_penalty or 0.0,
            frequency_penalty=asked.frequency_penalty or 0.0,
            repetition_penalty=1.0 if asked.repetition_penalty is None else asked.repetition_penalty,
            logit_bias=tuple(asked.logit_bias.items()),
            min_tokens=asked.min_tokens or 0,
            num_logprobs=None if is_drawn_in_vain else asked.num_logprobs,
            num_prompt_logprobs=asked.num_prompt_logprobs,
        ),
        stop_token_ids=() if is_drawn_in_vain else (*ends, *(asked.stop_token_ids or ())),
        ignore_eos=ignore_eos,
        priority=asked.priority or 0,
        cache_salt=asked.cache_salt,
    )


def _check_model(service: Service, name: str) -> None:
    if name != service.served_name:
        shown = name if name.isprintable() and len(name) <= 100 else "(unprintable)"
        raise UnknownModel(f"The model `{shown}` is not served here; `{service.served_name}` is.")


def _count_unknown(service: Service, names: list[str]) -> None:
    for name in names[:MAX_LABELS]:
        if service.front.meter.unknown_field(name):
            shown = name if name.isidentifier() and len(name) <= 64 else "(other)"
            log.warning("request field %s is not known and was ignored; further ones are counted only", shown)


def _model_card(service: Service) -> dict[str, Any]:
    return {
        "id": service.served_name, "object": "model", "created": service.folder.created_at, "owned_by": "tuner",
        "root": service.folder.name, "parent": None, "max_model_len": service.max_model_len,
    }  # fmt: skip


def _scrape(service: Service) -> Scrape:
    front, gauges = service.front, service.front.engine.gauges
    used, total = gauges.get("kv_used_tokens"), gauges.get("kv_total_tokens")
    return Scrape(
        model_name=service.served_name, meter=front.meter, num_running=gauges.get("num_running", 0),
        num_waiting=max(0, len(front.live) - gauges.get("num_running", 0)),
        kv_used_ratio=used / total if used is not None and total else None,
        engine_ready=front.engine.phase == "ready", replicas=front.engine.replicas,
        num_restarts=front.engine.num_restarts,
        version=front.engine.version, config_id=front.engine.config_id,
        num_preemptions=gauges.get("num_preemptions_total"), records_dropped=front.records.dropped,
        num_looked_up_tokens=gauges.get("prefix_looked_up_tokens_total"),
        num_hit_tokens=gauges.get("prefix_hit_tokens_total"),
        num_drafted_tokens=gauges.get("drafted_tokens_total"),
        num_right_tokens=gauges.get("draft_right_tokens_total"),
        replaced_kernels=front.engine.identity.get("replaced_kernels", ()),
    )  # fmt: skip


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(RuntimeFault)
    async def fault(request: Request, error: RuntimeFault) -> Response:
        return _response(error_answer(error))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = {404: "There is no such route.", 405: "This route does not take that method."}.get(
            error.status_code, "The request cannot be served."
        )
        body = error_body(
            message, "invalid_request_error", None, "not_found" if error.status_code == 404 else None
        )
        return _response(ErrorAnswer(error.status_code, body, dict(error.headers or {})))

    @app.exception_handler(Exception)  # logged by the envelope
    async def our_own(request: Request, error: Exception) -> Response:
        return JSONResponse(error_body(INTERNAL_ERROR, "server_error", None, "internal_error"), 500)


def _response(answer: ErrorAnswer) -> Response:
    return JSONResponse(answer.body, answer.status, answer.headers)
