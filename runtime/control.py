"""The routes of the daemon, on a listener and with a key of their own: what the engine is, does, and shall do.

Nothing is public: the key is checked before a route is looked for, so a route that is added is closed too.
"""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from runtime import __version__
from runtime.body import read_object
from runtime.engine_group import EngineGroup
from runtime.envelope import Envelope
from runtime.errors import (
    EngineNotReady,
    InvalidKnob,
    InvalidPlan,
    InvalidRequest,
    NoPlan,
    PrepareFailed,
    RequestFailed,
    RequestTimedOut,
    RequestTooLarge,
    RuntimeFault,
    StaleVersion,
)
from runtime.front_end import FrontEnd
from runtime.key_guard import KeyGuard
from runtime.score_routes import Encode, add_score_routes

MAX_DRAINED = 20_000
CALL_LIMIT_S = 10.0
RECONFIGURE_LIMIT_S = 300.0  # preparing may load or compile

_STATUS: dict[type[RuntimeFault], tuple[int, str]] = {
    InvalidKnob: (400, "invalid_knob"),
    InvalidPlan: (400, "invalid_plan"),
    InvalidRequest: (400, "invalid_request"),
    NoPlan: (404, "no_plan"),
    StaleVersion: (409, "stale_version"),
    PrepareFailed: (409, "prepare_failed"),
    RequestTooLarge: (413, "body_too_large"),
    RequestTimedOut: (408, "timeout"),
    EngineNotReady: (503, "engine_not_ready"),
    RequestFailed: (500, "engine_error"),
}


@dataclass(frozen=True)
class Boot:
    """This start of the runtime. `boot_id` numbers records and is never seen twice."""

    boot_id: str
    pid: int
    started_at: float
    api_url: str
    control_url: str


def create_control(
    front: FrontEnd, engine: EngineGroup, boot: Boot, identity: Callable[[], dict[str, Any]],
    shutdown: Callable[[float], None], key: str, encode: Encode,
) -> ASGIApp:  # fmt: skip
    """`identity` tells of the model and hardware; `shutdown` begins draining for so many seconds and returns;
    `encode` makes tokens of texts."""
    app = FastAPI(title="Tuner control", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/control/identity")
    async def get_identity() -> Response:
        return JSONResponse({**identity(), "boot_id": boot.boot_id, "pid": boot.pid, "engine_pid": front.engine.pid,
                             "engine_pids": [one.pid for one in front.engine.replicas if one.pid is not None],
                             "started_at": boot.started_at, "api_url": boot.api_url})  # fmt: skip

    @app.get("/control/state")
    async def get_state() -> Response:
        return JSONResponse(_state(front, boot))

    @app.post("/control/reconfigure")
    async def reconfigure(request: Request) -> Response:
        body = await read_object(request)
        patch, expected = body.get("patch"), body.get("expected_version")
        if not isinstance(patch, dict):
            raise InvalidRequest("`patch` must be an object of knobs and values.")
        if expected is not None and type(expected) is not int:
            raise InvalidRequest("`expected_version` must be a whole number or null.")
        args = {"patch": patch, "expected_version": expected}
        value = await engine.call("reconfigure", args, RECONFIGURE_LIMIT_S)
        # The engine's event says the same a moment later; who reads the state after this answer must see it.
        if value["version"] > front.engine.version:
            front.engine.event({**value, "kind": "config_committed"})
        return JSONResponse(value)

    @app.post("/control/prepare")
    async def prepare(request: Request) -> Response:
        body = await read_object(request)
        values = body.get("values")
        if not isinstance(values, dict):
            raise InvalidRequest("`values` must be an object of knobs and values.")
        return JSONResponse(await engine.call("prepare", {"values": values}, RECONFIGURE_LIMIT_S))

    @app.post("/control/plan")
    async def plan(request: Request) -> Response:
        body = await read_object(request)
        value = await engine.call("plan", body, CALL_LIMIT_S)
        front.engine.accepted(value["plan_id"])
        return JSONResponse(value)

    @app.post("/control/lease")
    async def lease(request: Request) -> Response:
        body = await read_object(request)
        args = {"plan_id": _text(body, "plan_id"), "lease_s": _number(body, "lease_s")}
        value = await engine.call("lease", args, CALL_LIMIT_S)
        front.engine.lease_expires_at = value["lease_expires_at"]
        return JSONResponse(value)

    @app.post("/control/abort")
    async def abort(request: Request) -> Response:
        body = await read_object(request)
        args = {"plan_id": _text(body, "plan_id"), "reason": _text(body, "reason")}
        return JSONResponse(await engine.call("abort", args, CALL_LIMIT_S))

    @app.get("/control/drain")
    async def drain(request: Request) -> Response:
        asked = request.query_params
        limit = min(MAX_DRAINED, _count(asked.get("limit", "5000"), "limit"))
        after_seq = (
            _count(asked.get("after_seq", "0"), "after_seq") if asked.get("boot_id") == boot.boot_id else 0
        )
        drained = front.records.drain(after_seq, limit)
        front.records_read_at = front.clock.now()
        head = {"boot_id": boot.boot_id, "next_seq": drained.next_seq, "dropped": drained.dropped}
        body = json.dumps(head)[:-1].encode() + b', "records": ' + drained.records_json + b"}"
        return Response(body, media_type="application/json")

    @app.post("/control/shutdown")
    async def post_shutdown(request: Request) -> Response:
        body = await read_object(request)
        drain_s = _number(body, "drain_s")
        if not 0.0 <= drain_s <= 3600.0:
            raise InvalidRequest(f"`drain_s` must be in [0, 3600] s, but got {drain_s!r}.")
        asyncio.get_running_loop().call_soon(shutdown, drain_s)
        return JSONResponse({"draining": True, "drain_s": drain_s}, 202)

    add_score_routes(app, engine.call, encode)
    _handle_errors(app)
    refusal = _error("unauthorized", "Every control call needs `Authorization: Bearer KEY`.")
    return Envelope(KeyGuard(app, key, refusal), _error("internal_error", "The runtime failed on this call."))


def _state(front: FrontEnd, boot: Boot) -> dict[str, Any]:
    engine = front.engine
    return {
        "boot_id": boot.boot_id,
        "now": front.clock.now(),
        "engine": "draining" if front.draining else engine.phase,
        "num_engine_restarts": engine.num_restarts,
        "replicas": [replica.told() for replica in engine.replicas],
        "version": engine.version,
        "config_id": engine.config_id,
        "config": engine.config,
        "champion_config_id": engine.champion_id,
        "champion": engine.champion,
        "slice_id": engine.slice_id,
        "plan_id": engine.plan_id,
        "lease_expires_at": engine.lease_expires_at,
        "knobs": engine.knobs,
        "gauges": {**engine.gauges, "num_live": len(front.live), "num_queued": front.num_queued},
        "counters": front.meter.counters(),
        "slice_stats": front.slices.snapshot(front.clock.now()),
    }


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(RuntimeFault)
    async def fault(request: Request, error: RuntimeFault) -> Response:
        status, kind = _STATUS.get(type(error), (500, "internal_error"))
        return JSONResponse(_error(kind, str(error)), status)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        kind = {404: "no_such_route", 405: "wrong_method"}.get(error.status_code, "invalid_request")
        return JSONResponse(_error(kind, f"HTTP {error.status_code}."), error.status_code)

    @app.exception_handler(Exception)  # logged by the envelope
    async def our_own(request: Request, error: Exception) -> Response:
        return JSONResponse(_error("internal_error", "The runtime failed on this call."), 500)


def _error(kind: str, message: str) -> dict[str, Any]:
    return {"error": {"kind": kind, "message": message}}


def _text(body: dict[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not 0 < len(value) <= 500:
        raise InvalidRequest(f"`{name}` must be text of 1 to 500 characters.")
    return value


def _number(body: dict[str, Any], name: str) -> float:
    value = body.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"`{name}` must be a number of seconds.")
    return float(value)


def _count(text: str, name: str) -> int:
    if not text.isdecimal() or len(text) > 18:
        raise InvalidRequest(f"`{name}` must be a whole number, at least 0.")
    return int(text)
