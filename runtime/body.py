"""Request bodies from strangers: read up to a cap and a time limit, parsed up to a depth."""

import asyncio
import json
from collections.abc import Callable
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from runtime.errors import InvalidRequest, RequestTimedOut, RequestTooLarge

MAX_BODY_BYTES = 2 * 1024 * 1024
MAX_DEPTH = 32
BODY_LIMIT_S = 30.0
PARSE_IN_THREAD_BYTES = 64 * 1024

Parsed = TypeVar("Parsed")

_BOM = b"\xef\xbb\xbf"


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


def parse_object(body: bytes) -> dict[str, Any]:
    """Returns the JSON object that the bytes hold. NaN and infinities pass here; the fields' rules refuse them.

    Raises:
        InvalidRequest: not UTF-8, not JSON, nested too deeply, or no object.
    """
    if body.startswith(_BOM):
        raise InvalidRequest("The body must be JSON in UTF-8 without a byte order mark.")
    if b"\0" in body:
        raise InvalidRequest("The body must be JSON in UTF-8, but got a NUL byte.")
    try:
        value = json.loads(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"The body must be UTF-8, but byte {error.start} is not.") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"The body must be JSON: {error.msg} at character {error.pos}.") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError:  # a number with thousands of digits
        raise InvalidRequest("The body must be JSON with numbers of a sensible length.") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"The body must be a JSON object, but got {_json_type(value)}.")
    _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    """Walks level by level, so that the check itself cannot run out of stack."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> InvalidRequest:
    return InvalidRequest(f"The body must be nested at most {MAX_DEPTH} levels deep.")


def _json_type(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
