"""The daemon's routes for quality checks: texts to tokens, and what a configuration makes of those tokens."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from runtime.body import read_object
from runtime.errors import InvalidRequest
from runtime.scoring import MAX_LIMIT_S, MAX_SEQUENCES

ANSWER_MARGIN_S = 5.0  # the engine gives a call up first, and says so

Encode = Callable[[Sequence[str]], Awaitable[list[list[int]]]]
CallEngine = Callable[[str, dict[str, Any], float], Awaitable[dict[str, Any]]]


def add_score_routes(app: FastAPI, call: CallEngine, encode: Encode) -> None:
    @app.post("/control/tokenize")
    async def tokenize(request: Request) -> Response:
        texts = (await read_object(request)).get("texts")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InvalidRequest("`texts` must be a list of texts.")
        if not 1 <= len(texts) <= MAX_SEQUENCES:
            raise InvalidRequest(f"`texts` must hold 1 to {MAX_SEQUENCES} texts, but got {len(texts)}.")
        return JSONResponse({"token_ids": await encode(texts)})

    @app.post("/control/score")
    async def score(request: Request) -> Response:
        body = await read_object(request)
        if not isinstance(body.get("values"), dict):
            raise InvalidRequest("`values` must be an object of knobs and values.")
        limit_s = body.get("limit_s", MAX_LIMIT_S)
        if (
            isinstance(limit_s, bool)
            or not isinstance(limit_s, int | float)
            or not 0 < limit_s <= MAX_LIMIT_S
        ):
            raise InvalidRequest(f"`limit_s` must be in (0, {MAX_LIMIT_S:g}] s, but got {limit_s!r}.")
        piece_tokens = body.get("piece_tokens")
        if piece_tokens is not None and type(piece_tokens) is not int:
            raise InvalidRequest("`piece_tokens` must be a whole number or null.")
        args = {
            "values": body["values"], "sequences": body.get("sequences"), "piece_tokens": piece_tokens,
            "limit_s": limit_s,
        }  # fmt: skip
        return JSONResponse(await call("score", args, limit_s + ANSWER_MARGIN_S))
