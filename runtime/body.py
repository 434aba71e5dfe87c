"""Request bodies from strangers: read up to a cap and a time limit, parsed up to a size and a depth.

A body is counted before anything is made of it: two megabytes of numbers keep JSON's parser busy for a tenth of a
second, in which no other thread runs, and counting takes less than a tenth of that.
"""

import asyncio
import json
from collections.abc import Callable
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from runtime.errors import InvalidRequest, RequestTimedOut, RequestTooLarge

MAX_BODY_BYTES = 2 * 1024 * 1024
MAX_DEPTH = 32
MAX_VALUES = (
    131_072  # numbers, texts, lists and objects; where token ids are taken, the model's context comes on top
)
MAX_TEXTS = 32_768  # names of fields included
MAX_FRACTIONS = 16_384  # each takes as long as three whole numbers
MAX_DIGITS = 64  # of one number: reading it takes time that grows with the square
BODY_LIMIT_S = 30.0
PARSE_IN_THREAD_BYTES = 64 * 1024

Parsed = TypeVar("Parsed")

_BOM = b"\xef\xbb\xbf"
_BRACKETS = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_DIGITS_AS_0 = bytes.maketrans(b"123456789", b"0" * 9)


async def read_object(request: Request) -> dict[str, Any]:
    """Returns the JSON object in the request's body. Raises as `read_parsed` and `parse_object`."""
    return await read_parsed(request, parse_object)


async def read_parsed(request: Request, parse: Callable[[bytes], Parsed]) -> Parsed:
    """Returns what `parse` makes of the body; of a large one in a thread, so that others are served meanwhile.

    Raises:
        RequestTooLarge: over MAX_BODY_BYTES, announced or sent; the rest is not read.
        RequestTimedOut: it did not arrive within BODY_LIMIT_S.
        InvalidRequest: the client left.
    """
    body = await _read(request)
    if len(body) > PARSE_IN_THREAD_BYTES:
        return await asyncio.to_thread(parse, body)
    return parse(body)


async def _read(request: Request) -> bytes:
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > MAX_BODY_BYTES:
        raise _too_large(f"{announced} were announced")
    chunks, num_bytes = [], 0
    try:
        async with asyncio.timeout(BODY_LIMIT_S):
            async for chunk in request.stream():
                num_bytes += len(chunk)
                if num_bytes > MAX_BODY_BYTES:
                    raise _too_large("more were sent")
                chunks.append(chunk)
    except TimeoutError:
        raise RequestTimedOut(f"The request body must arrive within {BODY_LIMIT_S:g} s.") from None
    except ClientDisconnect:
        raise InvalidRequest("The client left before its request was whole.") from None
    return b"".join(chunks)


def _too_large(got: str) -> RequestTooLarge:
    return RequestTooLarge(f"A request body must be at most {MAX_BODY_BYTES} bytes, but {got}.")


def parse_object(body: bytes, max_values: int = MAX_VALUES) -> dict[str, Any]:
    """Returns the JSON object that the bytes hold. NaN and infinities pass here; the fields' rules refuse them.

    Raises:
        InvalidRequest: too many values or texts, not UTF-8, not JSON, nested too deeply, or no object.
    """
    if body.startswith(_BOM):
        raise InvalidRequest("The body must be JSON in UTF-8 without a byte order mark.")
    if b"\0" in body:
        raise InvalidRequest("The body must be JSON in UTF-8, but got a NUL byte.")
    outside = _outside_of_texts(body)
    _check_numbers(outside, max_values)
    try:
        value = json.loads(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The body must be UTF-8, but byte {error.start} is not.") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"The body must be JSON: {error.msg} at character {error.pos}.") from None
    except RecursionError:
        raise _too_deep() from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"The body must be a JSON object, but got {_json_type(value)}.")
    _check_depth(outside)
    return value


def _outside_of_texts(body: bytes) -> bytes:
    """Returns the body without its texts: once escapes are gone, every other piece between quotes is outside."""
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    _check_count(unescaped.count(b'"') // 2, MAX_TEXTS, "texts, names of fields included")
    return b"".join(unescaped.split(b'"')[::2])


def _check_numbers(outside: bytes, max_values: int) -> None:
    """A comma comes before each value but the first of its list or object, and that one has the bracket."""
    count = outside.count
    _check_count(count(b",") + count(b"[") + count(b"{"), max_values, "values")
    num_fractions = count(b".") + count(b"e") + count(b"E") - count(b"true") - count(b"false")
    _check_count(num_fractions, MAX_FRACTIONS, "points and exponents of numbers")
    if b"0" * (MAX_DIGITS + 1) in outside.translate(_DIGITS_AS_0):
        raise InvalidRequest(f"The body must be JSON with numbers of at most {MAX_DIGITS} digits.")


def _check_count(num: int, cap: int, of_what: str) -> None:
    if num > cap:
        raise InvalidRequest(
            f"The body must hold at most {cap} {of_what}, but got {num}. Send less in one request."
        )


def _check_depth(outside: bytes) -> None:
    """Takes the innermost pairs of brackets away, level by level. JSON's parser has seen that they are pairs."""
    brackets = outside.translate(_BRACKETS, _NO_BRACKETS)
    for _ in range(MAX_DEPTH):
        brackets = brackets.replace(b"[]", b"")
        if not brackets:
            return
    raise _too_deep()


def _too_deep() -> InvalidRequest:
    return InvalidRequest(f"The body must be nested at most {MAX_DEPTH} levels deep.")


def _json_type(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
