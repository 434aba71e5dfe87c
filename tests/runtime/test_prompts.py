import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from runtime.errors import InvalidRequest, ModelError
from runtime.model_folder import ModelFolder
from runtime.prompts import Prompts
from tests.servers import DEMO_MODEL


@pytest.fixture(scope="module")
def prompts() -> Iterator[Prompts]:
    with contextlib.closing(Prompts.load(ModelFolder.read(DEMO_MODEL))) as loaded:
        yield loaded


def changed_model(tmp_path: Path, **tokenizer_config: Any) -> ModelFolder:
    """The demo model with other words in its tokenizer_config.json."""
    folder = tmp_path / "model"
    shutil.copytree(DEMO_MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors", "chat_template.jinja"))
    (folder / "model.safetensors").touch()
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **tokenizer_config}))
    return ModelFolder.read(folder)


def chat(prompts: Prompts, text: str = "hi") -> list[int]:
    return prompts.encode_chat([{"role": "user", "content": text}], 2048)


def test_text_becomes_ids_and_back(prompts: Prompts) -> None:
    text = "def read(path): # naïve 你好"
    assert prompts.decode(prompts.encode(text, 2048)) == text


def test_a_chat_ends_where_the_answer_begins(prompts: Prompts) -> None:
    ids = chat(prompts)
    assert (ids[0], ids[1], ids[-1]) == (0, 2, 3)


def test_end_tokens_are_those_of_the_model_and_in_its_vocabulary(prompts: Prompts) -> None:
    assert prompts.end_token_ids == [1]


def test_a_byte_cannot_be_more_than_the_longest_token_allows(prompts: Prompts) -> None:
    fits = "a" * (8 * prompts.longest_token_bytes)
    prompts.encode(fits, 8)
    with pytest.raises(InvalidRequest, match="at least 9 tokens"):
        prompts.encode(fits + "a", 8)


@pytest.mark.parametrize("wrong", [-1, 4096, 2**40])
def test_ids_outside_the_vocabulary_are_refused(prompts: Prompts, wrong: int) -> None:
    with pytest.raises(InvalidRequest, match=str(wrong)):
        prompts.check_ids([1, wrong])


def test_code_in_a_model_folder_is_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    folder = changed_model(
        tmp_path, auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, tokenizer_class="Evil"
    )
    (folder.path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    with contextlib.suppress(ModelError):  # refused or read without it: both are fine
        Prompts.load(folder)
    assert not marker.exists()


def test_text_is_cut_into_the_tokens_that_the_model_was_trained_on(prompts: Prompts) -> None:
    written = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    code = "def area(x):\n    return x * 1234567 + 89\n"
    assert prompts.encode(code, 512) == written.encode(code).ids


def test_a_template_that_reaches_for_python_is_refused(tmp_path: Path) -> None:
    template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    evil = Prompts.load(changed_model(tmp_path, chat_template=template))
    with contextlib.closing(evil), pytest.raises(InvalidRequest, match="refuses"):
        chat(evil)


def test_a_templates_own_complaint_reaches_the_client(tmp_path: Path) -> None:
    strict = Prompts.load(
        changed_model(tmp_path, chat_template="{{ raise_exception('roles must alternate') }}")
    )
    with contextlib.closing(strict), pytest.raises(InvalidRequest, match="roles must alternate"):
        chat(strict)


def test_a_model_without_a_template_points_to_completions(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="/v1/completions"):
        chat(Prompts.load(changed_model(tmp_path)))


def test_the_context_of_a_nested_configuration_is_found(tmp_path: Path) -> None:
    folder = changed_model(tmp_path).path
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"text_config": config, "eos_token_id": [7, 9]}))
    told = ModelFolder.read(folder)
    assert (told.context_tokens, told.vocab_size, told.end_token_ids) == (2048, 4096, (1, 7, 9))
