"""The reading of requests' bodies within limits."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from anymamba.serving.limits import Limits
from anymamba.serving.protocol.errors import ApiError

DEEPEST = 100
"""Most objects and lists inside each other."""
LARGE = 1 << 16
"""Bodies above this many bytes are read as JSON in another thread."""
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


async def read_json(request: Request, limits: Limits) -> Any:
    """The body of a request as JSON.

    Raises ApiError for another content type, a body that is too large or too slow, and for what is not JSON.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"Content-Type must be application/json, got {kind[:80] or 'none'}", code="content_type")
    try:
        async with asyncio.timeout(limits.body_seconds):
            body = await _read(request, limits.max_body)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {limits.body_seconds:g} seconds") from None
    except ClientDisconnect:
        raise ApiError(400, "the connection was closed before the end of the body") from None
    return await asyncio.to_thread(parse_json, body) if len(body) > LARGE else parse_json(body)


async def _read(request: Request, most: int) -> bytes:
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared[:20]) > most:
        _refuse_size(most)
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > most:
            _refuse_size(most)
    return bytes(body)


def _refuse_size(most: int) -> NoReturn:
    raise ApiError(413, f"the body must have at most {most:,} bytes; send a shorter one", code="body_too_large")


def parse_json(body: bytes) -> Any:
    """Read strict JSON. Raises ApiError for anything else, and for JSON that is too deep or is not Unicode."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
        if body.count(b"[") + body.count(b"{") > DEEPEST:
            _require_shallow(value)
        if _SURROGATE.search(body):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        _refuse_depth()
    except UnicodeEncodeError:
        raise ApiError(400, "the body has half a surrogate pair, which is no character", code="invalid_json") from None
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 at byte {error.start}", code="invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}", code="invalid_json") from None
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _require_shallow(value: Any) -> None:
    """Raise ApiError for JSON that is deeper than `DEEPEST`."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEEPEST):
        inside = (inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer))
        level = [inner for inner in inside if isinstance(inner, dict | list)]
    if level:
        _refuse_depth()


def _refuse_depth() -> NoReturn:
    raise ApiError(400, f"the body must have at most {DEEPEST} levels of objects and lists", code="invalid_json")
