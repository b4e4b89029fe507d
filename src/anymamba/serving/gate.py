"""What every request passes: the checks of host, origin and key, and the form of errors."""

from __future__ import annotations

import logging

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anymamba.serving.metrics import Metrics
from anymamba.serving.protocol.errors import ApiError
from anymamba.serving.security import HEADERS, PAGE_POLICY, Guard

ENDPOINTS = {
    "/v1/completions": "POST",
    "/v1/chat/completions": "POST",
    "/v1/models": "GET",
    "/v1/sessions": "GET",
    "/tokenize": "POST",
    "/detokenize": "POST",
    "/tokenizer_info": "GET",
    "/health": "GET",
    "/metrics": "GET",
    "/openapi.json": "GET",
}
"""The paths and their methods. Metrics count all other paths as one."""
OTHER = "other"
_METHODS = "GET, POST, DELETE, OPTIONS"
_CORS_HEADERS = "Authorization, Content-Type"


class Gate:
    """Wraps the routes.

    Args:
        routes: the application behind it.
        guard: decides who may ask.
        metrics: counts requests.
    """

    def __init__(self, routes: ASGIApp, guard: Guard, metrics: Metrics) -> None:
        self._routes, self._guard, self._metrics = routes, guard, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] != "http":
            await self._routes(scope, receive, send)
            return
        headers, status = Headers(scope=scope), 0
        origin = headers.get("origin")

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._add_headers(MutableHeaders(scope=message), origin)
            await send(message)

        try:
            response = await self._answer(scope, headers, receive, send_with_headers)
        except ApiError as error:
            response = error_response(error)
        except HTTPException as error:
            response = error_response(ApiError(error.status_code, _http_message(error, scope["path"])), error.headers)
        except Exception:
            logging.getLogger(__name__).exception("%s %s failed", scope["method"], scope["path"])
            response = error_response(ApiError(500, "the server failed; its log says why"))
        if response is not None and not status:
            await response(scope, receive, send_with_headers)
        self._metrics.requests.labels(_endpoint(scope["path"]), str(status)).inc()

    async def _answer(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> Response | None:
        self._guard.require_own_site(headers)
        if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            return Response(status_code=204)  # the browser's question; without CORS headers the answer means no
        scope["owner"] = "" if is_open(scope["path"]) else self._guard.owner(headers)
        await self._routes(scope, receive, send)
        return None

    def _add_headers(self, headers: MutableHeaders, origin: str | None) -> None:
        for name, value in HEADERS.items():
            headers.setdefault(name, value)
        if headers.get("content-type", "").startswith("text/html"):
            headers["Content-Security-Policy"] = PAGE_POLICY
        if origin is not None and self._guard.is_allowed_origin(origin):
            headers["Access-Control-Allow-Origin"] = origin
            headers["Access-Control-Allow-Methods"] = _METHODS
            headers["Access-Control-Allow-Headers"] = _CORS_HEADERS
            headers["Vary"] = "Origin"


def is_open(path: str) -> bool:
    """Whether a path needs no key: /health, which tells nothing about users, and the files of the page."""
    return path == "/health" or (_endpoint(path) == OTHER and not path.startswith("/v1"))


def error_response(error: ApiError, headers: object = None) -> Response:
    """An error in OpenAI's form."""
    more = {str(key): str(value) for key, value in dict(headers or {}).items()}  # type: ignore[call-overload]
    if error.status in (408, 413):
        more["Connection"] = "close"  # the rest of the body is not read
    if error.status == 401:
        more["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers={**error.headers(), **more})


def _http_message(error: HTTPException, path: str) -> str:
    if error.status_code == 404:
        known = ", ".join(list(ENDPOINTS)[:4])
        return f"there is no {path[:100]!r} here; the endpoints are {known} and those of /openapi.json"
    return str(error.detail)


def _endpoint(path: str) -> str:
    return next((known for known in ENDPOINTS if path == known or path.startswith(known + "/")), OTHER)
