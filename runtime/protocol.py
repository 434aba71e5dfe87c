"""The requests of the OpenAI API that are understood here, field by field, and the rules they must keep.

Fields that take several shapes are checked by functions of our own. What they take is declared beside them, for the
OpenAPI document: pydantic would try every item of a list once for each shape.
"""

from typing import Annotated, Any, Literal, LiteralString, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
)
from pydantic_core import PydanticCustomError

from runtime.errors import InvalidRequest

MAX_STOPS = 8
MAX_STOP_CHARS = 64
MAX_PROMPTS = 64
MAX_MESSAGES = 256
MAX_N = 64  # answers to one prompt
MAX_CHOICES = 256  # answers of one call
MAX_BIASES = 1024
MAX_SALT_CHARS = 1024
MIN_TEMPERATURE = 1e-5  # what is colder is greedy, as in vLLM: in float32 a draw would divide 0 by 0
MAX_LOGPROBS = 20  # as OpenAI and vLLM
MAX_PROMPT_LOGPROBS = 2**17  # of all prompts of a call: some 10 MB of an answer
DEFAULT_COMPLETION_TOKENS = 16  # as OpenAI
INT64 = 2**63

# Fields that would change the answer and are not served, with the values that ask for nothing. `echo` is served for
# completions; a chat has no text to repeat.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "echo": (None, False), "best_of": (None, 1), "suffix": (None, ""), "tools": (None, []), "functions": (None, []),
    "response_format": (None, {"type": "text"}), "chat_template": (None,), "chat_template_kwargs": (None, {}),
    "guided_json": (None,), "guided_regex": (None,), "structured_outputs": (None,), "prompt_embeds": (None,),
}  # fmt: skip


def _stops(value: Any) -> list[str]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    fits = isinstance(stops, list) and len(stops) <= MAX_STOPS
    if not fits or not all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise _rule(
            f"must be a string or a list of at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters"
        )
    return list(stops)


def _prompts(value: Any) -> list[str | list[int]]:
    """One entry a prompt: text, or token ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if _are_ids(value):
            return [value]
        if len(value) > MAX_PROMPTS:
            raise _rule(f"must hold at most {MAX_PROMPTS} prompts")
        texts = all(isinstance(item, str) for item in value)
        if texts or all(isinstance(item, list) and _are_ids(item) for item in value):
            return list(value)
    raise _rule(
        "must be a string, a list of strings, a list of token ids, or a list of lists of token ids; none empty"
    )


def _are_ids(value: list[Any]) -> bool:
    """Whole numbers, at least one. The set of types is there in a third of the time that a look at each one takes."""
    return set(map(type, value)) == {int}


def _content(value: Any) -> str:
    """A message's text: given as a string, or as parts of type text."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(map(_is_text_part, value)):
        raise _rule("must be a string or a list of parts of type text; other parts are not served")
    return "".join(part["text"] for part in value)


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _rule(text: LiteralString) -> PydanticCustomError:
    return PydanticCustomError("rule", text)


def _biases(value: Any) -> dict[int, float]:
    """Token ids, which JSON can only have as text, to what is added to their logits."""
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_BIASES or not all(map(_is_bias, value.items())):
        raise _rule(f"must map at most {MAX_BIASES} token ids to numbers in [-100, 100]")
    return {int(token): float(bias) for token, bias in value.items()}


def _is_bias(item: tuple[Any, Any]) -> bool:
    token, bias = item
    is_number = isinstance(bias, int | float) and not isinstance(bias, bool)
    return token.isascii() and token.isdecimal() and len(token) < 10 and is_number and -100 <= bias <= 100


def _temperature(value: float) -> float:
    return 0.0 if value < MIN_TEMPERATURE else value


def _no_false(value: Any) -> Any:
    """Clients that ask for nothing say so with `false` too."""
    return None if value is False else value


def _top_k(value: int | None) -> int | None:
    """-1, as vLLM has it, is 0 and so "all"."""
    return 0 if value == -1 else value


def _salt(value: str | None) -> str | None:
    """An empty one, which somebody may take for a secret, is refused as by vLLM. Half a pair of UTF-16 has no bytes."""
    if value is None or (
        0 < len(value) <= MAX_SALT_CHARS and not any("\ud800" <= c <= "\udfff" for c in value)
    ):
        return value
    raise _rule(f"must be text of 1 to {MAX_SALT_CHARS} characters")


Text = Annotated[str, Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
TokenId = Annotated[int, Field(ge=0)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
TokenName = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]

StopShapes = Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None
PromptShapes = (
    Text
    | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
    | TokenIds
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
)
BiasShapes = (
    Annotated[
        dict[TokenName, Bias],
        Field(max_length=MAX_BIASES, json_schema_extra={"additionalProperties": False}),
    ]
    | None
)


class _Fields(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, hide_input_in_errors=True)


class StreamOptions(_Fields):
    include_usage: bool | None = None


class TextPart(_Fields):
    type: Literal["text"]
    text: str


class Message(_Fields):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, PlainValidator(_content, json_schema_input_type=str | list[TextPart] | None)] = ""

    def for_template(self) -> dict[str, str]:
        """Templates know `system`, which `developer` replaced in OpenAI's API."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class _Generation(_Fields):
    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: (
        Annotated[float, Field(ge=0, le=2, allow_inf_nan=False), AfterValidator(_temperature)] | None
    ) = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    stop: Annotated[list[str], PlainValidator(_stops, json_schema_input_type=StopShapes)] = []
    stop_token_ids: Annotated[list[int], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: Annotated[StreamOptions | None, Field(description="Needs `stream` to be true.")] = None
    n: Annotated[
        Annotated[int, Field(ge=1, le=MAX_N)] | None,
        Field(description=f"At most {MAX_CHOICES} times all prompts of a call."),
    ] = None
    top_k: Annotated[int, Field(ge=-1, lt=INT64), AfterValidator(_top_k)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100, allow_inf_nan=False)] | None = None
    logit_bias: Annotated[dict[int, float], PlainValidator(_biases, json_schema_input_type=BiasShapes)] = {}
    min_tokens: Annotated[Annotated[int, Field(ge=0)] | None, Field(description="At most `max_tokens`.")] = (
        None
    )
    priority: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    prompt_logprobs: Annotated[
        Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None,
        BeforeValidator(
            _no_false,
            json_schema_input_type=Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | Literal[False] | None,
        ),
    ] = None
    cache_salt: Annotated[str | None, AfterValidator(_salt)] = None
    user: str | None = None

    @property
    def asked_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(_Generation):
    prompt: Annotated[list[str | list[int]], PlainValidator(_prompts, json_schema_input_type=PromptShapes)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None  # 0 only with `echo`
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None

    @property
    def num_logprobs(self) -> int | None:
        """Of the likeliest tokens at each position; None where not even the drawn one's is asked for."""
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        """The same of the prompt's tokens: those that are echoed, those of `prompt_logprobs`, or both."""
        asked = (self.prompt_logprobs, self.logprobs if self.echo else None)
        return max((num for num in asked if num is not None), default=None)


class ChatRequest(_Generation):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    logprobs: bool | None = None
    top_logprobs: Annotated[
        Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None, Field(description="Needs `logprobs` to be true.")
    ] = None

    @property
    def num_logprobs(self) -> int | None:
        """As of a completion."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def num_prompt_logprobs(self) -> int | None:
        return self.prompt_logprobs


class TokenizeRequest(_Fields):
    """Either a text or a conversation, as a completion or a chat would have it."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": [name], "properties": {name: {"not": {"type": "null"}}}}
                for name in ("prompt", "messages")
            ]
        }
    )

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(_Fields):
    model: str | None = None
    tokens: Annotated[list[int], Field(json_schema_extra={"items": {"type": "integer", "minimum": 0}})]


Kind = TypeVar("Kind", bound=_Fields)


def parse_request(kind: type[Kind], body: dict[str, Any]) -> Kind:
    """Returns the request; fields that nobody knows are left out.

    Raises:
        InvalidRequest: names the first field that breaks its rule, the rule, and what was got.
    """
    for name, neutral in UNSUPPORTED.items():
        if name not in body or name in kind.model_fields:
            continue
        if not any(body[name] is value or body[name] == value for value in neutral):
            raise InvalidRequest(f"`{name}` is not served by this server. Leave it out.", name)
    try:
        request = kind.model_validate(body)
    except ValidationError as error:
        raise _first_rule_broken(error) from None
    if isinstance(request, _Generation):
        _check_together(request)
    return request


def _check_together(request: _Generation) -> None:
    """Rules between fields."""
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("`stream_options` needs `stream` to be true.", "stream_options")
    if isinstance(request, ChatRequest) and request.top_logprobs and not request.logprobs:
        raise InvalidRequest("`top_logprobs` needs `logprobs` to be true.", "top_logprobs")
    if request.stream and request.prompt_logprobs is not None:
        raise InvalidRequest(
            "`prompt_logprobs` must be left out where `stream` is true, as in vLLM: a stream has no place for them.",
            "prompt_logprobs",
        )
    if isinstance(request, CompletionRequest) and request.max_tokens == 0 and not request.echo:
        raise InvalidRequest(
            "`max_tokens` must be at least 1 unless `echo` is true, but got 0: there would be no answer.",
            "max_tokens",
        )
    num_prompts = len(request.prompt) if isinstance(request, CompletionRequest) else 1
    if num_prompts * (request.n or 1) > MAX_CHOICES:
        rule = f"must be at most {MAX_CHOICES} times all prompts of a call"
        raise InvalidRequest(f"`n` {rule}, but got {request.n} for {num_prompts} prompts.", "n")


def unknown_fields(request: _Fields, body: dict[str, Any]) -> list[str]:
    """Names in the body that have no meaning here, those inside stream_options included."""
    known = type(request).model_fields.keys() | UNSUPPORTED.keys()
    names = [name for name in body if name not in known]
    inside = body.get("stream_options") or {}
    return names + [f"stream_options.{name}" for name in inside if name not in StreamOptions.model_fields]


def _first_rule_broken(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False, include_input=True)[0]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    if first["type"] == "missing":
        return InvalidRequest(f"`{name}` must be given.", name)
    rule = first["msg"].replace("Input should be", "must be", 1)
    if not rule.startswith("must"):  # "List should have at most 256 items after validation, not 300"
        rule = f"breaks a rule: {rule}"
    return InvalidRequest(f"`{name}` {rule}, but got {_shown(first['input'])}.", name)


def _shown(value: Any) -> str:
    """Numbers and short words as they are, nothing that may hold a prompt."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return (
            repr(value)
            if isinstance(value, float) or abs(value) < 10**24
            else "a number of more than 24 digits"
        )
    if isinstance(value, str):
        return f"text of {len(value)} characters"
    return f"a list of {len(value)}" if isinstance(value, list) else "an object"
