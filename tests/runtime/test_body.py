"""What is counted in the bytes of a body, held to a walk through what JSON's parser makes of them."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.body import MAX_DEPTH, MAX_DIGITS, MAX_FRACTIONS, MAX_TEXTS, MAX_VALUES, parse_object
from runtime.errors import InvalidRequest

# Texts of what JSON is written with, so that a text is never taken for structure.
TEXTS = st.text(st.sampled_from('"\\,:[]{}/n0é\n\ud83e'), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=20,
)
OBJECTS = st.dictionaries(TEXTS, VALUES, max_size=4)


def walk(value: Any) -> Iterator[Any]:
    yield value
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        yield from walk(child)


def depth(value: Any) -> int:
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(depth, value.values() if isinstance(value, dict) else value), default=0)


@given(OBJECTS, st.booleans())
def test_a_body_is_counted_as_a_walk_counts_it(value: dict[str, Any], with_escapes: bool) -> None:
    try:
        body = json.dumps(value, ensure_ascii=with_escapes).encode()
    except UnicodeEncodeError:  # half of a surrogate pair has no UTF-8
        body = json.dumps(value).encode()
    items = list(walk(value))
    # A root is no item of anything, and an empty list or object counts as if it held something.
    num_values = len(items) - 1 + sum(item in ([], {}) for item in items)
    assert json.dumps(parse_object(body, num_values)) == json.dumps(value)
    if num_values:
        with pytest.raises(InvalidRequest, match=rf"at most {num_values - 1} values, but got {num_values}\."):
            parse_object(body, num_values - 1)


@given(VALUES, st.integers(min_value=0, max_value=MAX_DEPTH))
def test_the_depth_is_that_of_a_walk(value: Any, more: int) -> None:
    for _ in range(more):
        value = [value]
    body = json.dumps({"x": value}).encode()
    if depth(value) < MAX_DEPTH:
        parse_object(body)
    else:
        with pytest.raises(InvalidRequest, match=f"at most {MAX_DEPTH} levels"):
            parse_object(body)


@pytest.mark.parametrize(
    ("fits", "breaks", "rule"),
    [
        ({"x": [1] * (MAX_VALUES - 1)}, {"x": [1] * MAX_VALUES}, f"at most {MAX_VALUES} values"),
        ({"x": ["a"] * (MAX_TEXTS - 1)}, {"x": ["a"] * MAX_TEXTS}, f"at most {MAX_TEXTS} texts"),
        ({"x": [1.5] * MAX_FRACTIONS}, {"x": [1.5] * (MAX_FRACTIONS + 1)}, f"at most {MAX_FRACTIONS} points"),
        ({"x": [1e99, True, False] * MAX_FRACTIONS}, {"x": [1e99] * (MAX_FRACTIONS + 1)}, "exponents"),
        ({"x": 10 ** (MAX_DIGITS - 1)}, {"x": 10**MAX_DIGITS}, f"at most {MAX_DIGITS} digits"),
    ],
)
def test_each_cap_is_exact_and_named(fits: dict[str, Any], breaks: dict[str, Any], rule: str) -> None:
    assert parse_object(json.dumps(fits).encode()) == fits
    with pytest.raises(InvalidRequest, match=rule):
        parse_object(json.dumps(breaks).encode())


def test_a_text_may_be_full_of_what_json_is_written_with() -> None:
    code = {"prompt": 'x = {"a": [1, 2]}, "\\\\", ' * 20_000 + "[" * 1000 + "7" * 1000}
    assert parse_object(json.dumps(code).encode()) == code
