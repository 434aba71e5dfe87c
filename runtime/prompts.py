"""Prompts to token ids: the model's own tokenizer and chat template, and the limits checked before they run."""

import functools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime.chat_template import ChatTemplate
from runtime.detokenize import BytewiseDecode
from runtime.errors import InvalidRequest, ModelError
from runtime.model_folder import ModelFolder
from runtime.token_text import TokenText


@contextmanager
def without_torch() -> Iterator[None]:
    """Keeps transformers from importing torch, which the front end has no use for (180 MB and 3 s).

    transformers asks once whether torch is there and remembers the answer, so use it in a process that never
    runs a model.
    """
    if "torch" in sys.modules:
        yield
        return
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would say that torch is missing
    sys.modules["torch"] = None  # type: ignore[assignment]  # find_spec reports a None entry as not installed
    try:
        yield
    finally:
        del sys.modules["torch"]


class Prompts:
    """Encodes text and conversations, and decodes answers. Its methods may run in any thread."""

    def __init__(self, folder: ModelFolder, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._fast = getattr(tokenizer, "backend_tokenizer", None)
        self.vocab_size = folder.vocab_size
        ends = {*folder.end_token_ids, tokenizer.eos_token_id}
        self.end_token_ids = sorted(end for end in ends if end is not None and 0 <= end < folder.vocab_size)
        self.token_text = TokenText(tokenizer)
        self.longest_token_bytes = _longest_token_bytes(tokenizer)
        self._template = _chat_template(tokenizer)

    def start(self) -> None:
        """Lets what chats need load beside the engine, so that the first one does not wait for it."""
        if self._template is not None:
            self._template.start()

    def close(self) -> None:
        if self._template is not None:
            self._template.close()

    @classmethod
    def load(cls, folder: ModelFolder) -> "Prompts":
        """Local files only, and never code from the model folder.

        Raises:
            ModelError: the tokenizer is damaged or needs code of its own.
        """
        try:
            tokenizer = load_tokenizer(folder.path)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise ModelError(f"The tokenizer in {folder.path} cannot be loaded. {reason}") from error
        return cls(folder, tokenizer)

    def encode(self, text: str, max_tokens: int, add_special_tokens: bool = True) -> list[int]:
        """Returns the prompt's token ids; `max_tokens` is the context, which an answer shares.

        Raises:
            InvalidRequest: not text, or surely longer than the context.
        """
        check_text("prompt", text)
        self._check_bytes("prompt", len(text.encode()), max_tokens)
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def encode_chat(self, messages: Sequence[Mapping[str, str]], max_tokens: int) -> list[int]:
        """Renders the conversation with the model's own template and ends it where the answer begins.

        Raises:
            InvalidRequest: not text, too long, or the template refuses the conversation or overruns on it.
            RequestFailed: the template cannot be rendered here.
        """
        for message in messages:
            check_text("messages", message["content"])
        self._check_bytes(
            "messages", sum(len(message["content"].encode()) for message in messages), max_tokens
        )
        if self._template is None:
            raise InvalidRequest("This model has no chat template: use /v1/completions.", "messages")
        text = self._template.render(messages)
        check_text("messages", text)
        self._check_bytes("messages", len(text.encode()), max_tokens)  # what the template made of them
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def check_ids(self, token_ids: Sequence[int], param: str = "prompt") -> None:
        """Raises InvalidRequest where an id is not in the model's vocabulary."""
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < self.vocab_size):
            wrong = next(token for token in token_ids if not 0 <= token < self.vocab_size)
            raise InvalidRequest(f"Token ids must be in [0, {self.vocab_size - 1}], but got {wrong}.", param)

    @functools.cached_property
    def decode(self) -> Any:
        """Token ids -> text without special tokens. The tokenizer's own core where it has one: 4 times as fast."""
        if self._fast is not None:
            decode = functools.partial(self._fast.decode, skip_special_tokens=True)
            return BytewiseDecode(decode) if repr(self._fast.decoder).startswith("ByteLevel(") else decode
        return functools.partial(
            self._tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Token ids -> text, special tokens included. Raises InvalidRequest for an id that the model has not."""
        self.check_ids(token_ids, "tokens")
        return str(self._tokenizer.decode(token_ids, clean_up_tokenization_spaces=False))

    def _check_bytes(self, param: str, num_bytes: int, max_tokens: int) -> None:
        if num_bytes > max_tokens * self.longest_token_bytes:
            at_least = -(-num_bytes // self.longest_token_bytes)
            raise InvalidRequest(
                f"The context of this model is {max_tokens} tokens, but {num_bytes} bytes of `{param}` are at least "
                f"{at_least} tokens. Shorten the prompt.",
                param,
            )


def check_text(param: str, text: str) -> None:
    """Raises InvalidRequest for NUL and for halves of surrogate pairs, which no tokenizer takes."""
    if "\0" in text:
        raise InvalidRequest(f"`{param}` must be text, but got a NUL character.", param)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(
            f"`{param}` must be valid Unicode, but got half of a surrogate pair.", param
        ) from None


def _longest_token_bytes(tokenizer: Any) -> int:
    """An upper bound: byte-level vocabularies write one character a byte, others write UTF-8."""
    vocabulary = tokenizer.get_vocab()
    if not vocabulary:
        raise ModelError("The tokenizer has no vocabulary.")
    return max(len(token.encode()) for token in vocabulary)


def _chat_template(tokenizer: Any) -> ChatTemplate | None:
    """None where the model has none. Of several, the one that the model names as its default."""
    try:
        return ChatTemplate(tokenizer.get_chat_template(), tokenizer.special_tokens_map)
    except ValueError:
        return None


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a model folder, as its tokenizer.json says where it has one.

    The class that transformers would choose by architecture builds a pre-tokeniser of its own from the vocabulary
    alone: a model trained with another one then reads text cut into other tokens, and answers worse unnoticed.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    as_written = (path / "tokenizer.json").is_file()
    kind = transformers.PreTrainedTokenizerFast if as_written else transformers.AutoTokenizer
    return kind.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
