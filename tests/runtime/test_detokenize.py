from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.detokenize import BytewiseDecode, Detokenizer, StopMatcher
from runtime.model_folder import ModelFolder
from runtime.prompts import Prompts
from tests.servers import DEMO_MODEL


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    return Prompts.load(ModelFolder.read(DEMO_MODEL))


def decode_bytes(tokens: Sequence[int]) -> str:
    """The simplest byte-level tokenizer: a token is a byte."""
    return bytes(tokens).decode("utf-8", errors="replace")


def decode_fallback(tokens: Sequence[int]) -> str:
    """As sentencepiece with byte fallback: each byte of a broken run is a mark, a leading space is stripped."""
    try:
        text = bytes(tokens).decode("utf-8")
    except UnicodeDecodeError:
        text = "".join(chr(token) if token < 128 else "\ufffd" for token in tokens)
    return text.removeprefix(" ")


def pieces(decode: object, tokens: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(decode)  # type: ignore[arg-type]
    return [*(detokenizer.push(token) for token in tokens), detokenizer.flush()]


@given(st.text(max_size=40))
def test_pieces_put_together_are_the_text(text: str) -> None:
    assert (
        "".join(pieces(decode_bytes, text.encode("utf-8", errors="replace")))
        == text.encode("utf-8", errors="replace").decode()
    )


@given(st.lists(st.integers(0, 255), max_size=200))
def test_garbage_comes_out_as_the_decoder_writes_it(tokens: list[int]) -> None:
    assert "".join(pieces(decode_bytes, tokens)) == decode_bytes(tokens)


@given(st.lists(st.integers(0, 255) | st.sampled_from(list("aé€🙂\ufffd".encode())), max_size=100))
def test_looking_whole_tokens_up_gives_the_same_pieces_as_decoding_them(tokens: list[int]) -> None:
    plain, looked_up = pieces(decode_bytes, tokens), pieces(BytewiseDecode(decode_bytes), tokens)
    assert looked_up == plain and "".join(plain) == decode_bytes(tokens)


def test_endless_garbage_is_cut_and_still_whole() -> None:
    tokens = [0xFF] * 1000 + list("é".encode())
    assert "".join(pieces(decode_bytes, tokens)) == "\ufffd" * 1000 + "é"


@pytest.mark.parametrize("decode", [decode_bytes, decode_fallback])
def test_an_unfinished_character_is_held_back(decode: object) -> None:
    euro = "a€".encode()
    assert pieces(decode, euro) == ["a", "", "", "€", ""]
    assert pieces(decode, euro[:-1])[:3] == ["a", "", ""]
    assert "\ufffd" in pieces(decode, euro[:-1])[-1]


def test_spaces_between_words_survive_a_decoder_that_strips_the_first() -> None:
    assert "".join(pieces(decode_fallback, b"a b c")) == "a b c"


@given(st.lists(st.integers(0, 4095), max_size=60))
def test_the_demo_models_tokens_stream_as_they_decode(prompts: Prompts, tokens: list[int]) -> None:
    assert isinstance(prompts.decode, BytewiseDecode)
    assert "".join(pieces(prompts.decode, tokens)) == prompts.decode(tokens)


def told(stops: list[str], texts: list[str]) -> tuple[str, bool]:
    matcher, out = StopMatcher(stops), ""
    for text in texts:
        matched = matcher.push(text)
        out += matched.text
        if matched.stopped:
            return out, True
    return out + matcher.flush(), False


def test_a_stop_string_cut_in_pieces_is_found_and_left_out() -> None:
    assert told(["END"], ["abcE", "N", "Dxyz"]) == ("abc", True)


def test_what_may_become_a_stop_string_is_held_back_until_it_does_not() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("abEN") == ("ab", False)
    assert matcher.push("EN") == ("EN", False)
    assert matcher.flush() == "EN"


def test_the_earliest_of_several_stop_strings_wins() -> None:
    assert told(["zz", "b"], ["abzz"]) == ("a", True)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.data())
def test_streaming_stops_where_the_whole_text_would(text: str, stops: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    out, stopped = told(stops, parts)
    first_ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    assert stopped == bool(first_ends)
    if not stops or not first_ends:
        assert out == text
    else:
        assert text.startswith(out)
        assert not any(stop in out for stop in stops)
