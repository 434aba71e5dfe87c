"""The forms in which logprobs of prompts are told, on the demo model's tokens."""

import pytest

from runtime.logprob_writer import LOWEST, LogprobWriter, prompt_logprobs
from runtime.model_folder import ModelFolder
from runtime.prompts import load_tokenizer
from runtime.token_text import TokenText
from tests.servers import DEMO_MODEL

TOKENIZER = load_tokenizer(ModelFolder.read(DEMO_MODEL).path)
TEXTS = TokenText(TOKENIZER)
TEXT = "def gr\u00f6\u00dfe(x):"


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def told(token_ids: list[int]) -> list[list[object]]:
    """Of every token but the first, as the engine sends them; the likeliest two are 40 and 41."""
    return [[-3.0 - at, 7, [[40, -0.5], [41, -1.5]]] for at in range(len(token_ids) - 1)]


def test_an_echo_has_a_place_in_the_text_for_every_token_and_no_logprob_for_the_first() -> None:
    writer, tokens = LogprobWriter("completion", TEXTS), ids(TEXT)
    written = writer.write_echo(TEXT, tokens, told(tokens), 1)
    assert (written[0]["token_logprobs"], written[0]["top_logprobs"]) == (None, None)
    assert [one["token_logprobs"] for one in written[1:]] == [-3.0 - at for at in range(len(tokens) - 1)]
    assert set(written[1]["top_logprobs"]) == {TEXTS.text_of(40), TEXTS.text_of(tokens[1])}
    assert "\ufffd" in "".join(one["tokens"] for one in written)  # characters of several tokens
    for one in written:
        assert "\ufffd" in one["tokens"] or TEXT.startswith(one["tokens"], one["text_offset"])
    assert writer.write(40, (-1.0, []))["text_offset"] == len(TEXT)


def test_a_token_for_the_beginning_takes_no_place_in_the_text() -> None:
    beginning = TOKENIZER.all_special_ids[0]
    writer, tokens = LogprobWriter("completion", TEXTS), [beginning, *ids("def f")]
    written = writer.write_echo("def f", tokens, told(tokens), 0)
    assert [one["text_offset"] for one in written[:2]] == [0, 0]
    own = TEXTS.text_of(beginning) + "def f"
    written = LogprobWriter("completion", TEXTS).write_echo(own, tokens, told(tokens), 0)
    assert written[1]["text_offset"] == len(TEXTS.text_of(beginning))


def test_logprobs_of_a_prompt_are_by_token_id_with_its_own_token_first() -> None:
    first, second = prompt_logprobs(TEXTS, [5, 9], [[-3.0, 7, [[40, -0.5], [41, -1.5]]]], 1)
    assert first is None and second is not None and list(second) == ["9", "40"]
    assert second["9"] == {"logprob": -3.0, "rank": 7, "decoded_token": TEXTS.text_of(9)}
    assert second["40"] == {"logprob": -0.5, "rank": 1, "decoded_token": TEXTS.text_of(40)}


def test_a_token_that_is_among_the_likeliest_is_told_once_at_its_place() -> None:
    _, second = prompt_logprobs(TEXTS, [5, 41], [[-0.5, 2, [[40, -0.5], [41, -0.5]]]], 2)
    assert second is not None and [(token, one["rank"]) for token, one in second.items()] == [
        ("41", 2),
        ("40", 1),
    ]


def test_a_token_that_is_out_of_the_question_has_a_number_that_json_knows() -> None:
    _, second = prompt_logprobs(TEXTS, [5, 9], [[float("-inf"), 7, []]], 0)
    assert second is not None and second["9"]["logprob"] == LOWEST


def test_logprobs_that_are_missing_are_not_passed_over() -> None:
    with pytest.raises(ValueError, match="zip"):
        prompt_logprobs(TEXTS, [5, 9, 3], [[-1.0, 1, []]], 0)
