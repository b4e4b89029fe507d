"""The HTTP application: its routes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route, Router
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from anymamba.serving.answering import Answering
from anymamba.serving.gate import ENDPOINTS, Gate
from anymamba.serving.limits import Limits
from anymamba.serving.metrics import CONTENT_TYPE, Metrics
from anymamba.serving.model import ServedModel, Task, session_call
from anymamba.serving.page import FOLDER
from anymamba.serving.protocol.bodies import read_json
from anymamba.serving.protocol.chat import read_chat, read_messages
from anymamba.serving.protocol.completions import read_completion, read_ids
from anymamba.serving.protocol.errors import ApiError
from anymamba.serving.protocol.events import encode_in_pieces
from anymamba.serving.protocol.fields import read_fields
from anymamba.serving.protocol.openapi import description
from anymamba.serving.protocol.tables import DETOKENIZE, TOKENIZE
from anymamba.serving.security import Guard


class Application:
    """The server's ASGI application. It answers 503 until it has a model.

    Args:
        guard: decides who may ask.
        limits: on what they may ask.
    """

    def __init__(self, guard: Guard, limits: Limits) -> None:
        self.limits, self.metrics = limits, Metrics()
        self.served: ServedModel | None = None
        self.stopping = False
        self._guard = guard
        self._gate = Gate(self._router(), guard, self.metrics)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        await self._gate(scope, receive, send)

    def serve(self, served: ServedModel) -> None:
        """Begin to serve a model."""
        self.served = served
        self.metrics.watch(lambda: served.worker.engine.statistics)

    def _router(self) -> Router:
        return Router(
            [
                Route("/health", self.health),
                Route("/metrics", self.figures),
                Route("/openapi.json", self.openapi),
                Route("/v1/models", self.models),
                Route("/v1/models/{name:path}", self.one_model),
                Route("/v1/models/{name:path}", _Nowhere("GET")),
                Route("/v1/completions", _Posted(self, self._completion), methods=["POST"]),
                Route("/v1/chat/completions", _Posted(self, self._chat), methods=["POST"]),
                Route("/v1/sessions", self.sessions),
                Route("/v1/sessions/{name:path}", self.one_session, methods=["GET", "DELETE"]),
                Route("/v1/sessions/{name:path}", _Nowhere("GET or DELETE")),
                Route("/tokenize", self.tokenize, methods=["POST"]),
                Route("/detokenize", self.detokenize, methods=["POST"]),
                Route("/tokenizer_info", self.tokenizer_info),
                *(Route(path, _Nowhere(method)) for path, method in ENDPOINTS.items()),
                Route("/v1/{rest:path}", _Nowhere()),
                Mount("/", StaticFiles(directory=FOLDER, html=True, check_dir=False)),
            ],
            redirect_slashes=False,
            default=_Nowhere(),
        )

    # ------------------------------------------------------------------------------------ the state of the server

    async def health(self, request: Request) -> Response:
        """Whether the server can answer."""
        status, body = self.state()
        return Response(body, status, media_type="application/json")

    def state(self) -> tuple[int, bytes]:
        """Status and body of /health."""
        state = "stopping" if self.stopping else "ok" if self.served else "loading"
        return 200 if state == "ok" else 503, json.dumps({"status": state}).encode()

    def health_alone(self, headers: Mapping[str, str]) -> tuple[int, bytes] | None:
        """`state` for a request with these headers; None if it is refused. It may be called in any thread."""
        try:
            self._guard.require_own_site(headers)
        except ApiError:
            return None
        status, body = self.state()
        self.metrics.requests.labels("/health", str(status)).inc()
        return status, body

    async def figures(self, request: Request) -> Response:
        """Figures for Prometheus."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE)

    async def openapi(self, request: Request) -> Response:
        """The API's description."""
        return JSONResponse(description())

    def ready(self) -> ServedModel:
        """The model. Raises ApiError if it is not there yet, or the server is about to end."""
        if self.served is None or self.stopping:
            state = "stopping" if self.stopping else "loading its model"
            raise ApiError(503, f"the server is {state}; try again", code="unavailable", retry_after=5)
        return self.served

    # ------------------------------------------------------------------------------------ models

    async def models(self, request: Request) -> Response:
        """The list of models, which is one."""
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def one_model(self, request: Request) -> Response:
        """What is known of a model."""
        self.ready().require_served(request.path_params["name"])
        return JSONResponse(self._described())

    def _described(self) -> dict[str, Any]:
        served = self.ready()
        return {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "anymamba",
            "max_model_len": self.limits.max_prompt + self.limits.max_new_tokens,
            "has_chat_template": served.template is not None,
            "has_sessions": served.sessions is not None,
        }

    # ------------------------------------------------------------------------------------ answers

    async def _completion(self, served: ServedModel, body: Any, owner: str) -> Task:
        return await served.completion(read_completion(body), owner)

    async def _chat(self, served: ServedModel, body: Any, owner: str) -> Task:
        return await served.chat(read_chat(body), owner)

    def require_room(self, n_rows: int, served: ServedModel) -> None:
        """Raise ApiError if too many answers are on their way."""
        most = served.worker.engine.max_rows + self.limits.max_queued
        if served.worker.n_rows + n_rows > most and served.worker.n_rows:
            raise ApiError(
                429,
                f"{served.worker.n_rows} answers are on their way, of at most {most}; try again",
                code="too_many_requests",
                retry_after=1,
            )

    # ------------------------------------------------------------------------------------ sessions

    async def sessions(self, request: Request) -> Response:
        """The sessions of whoever asks."""
        store = self.ready().require_sessions()
        found = await session_call(store.list, request.scope["owner"])
        data = [
            {
                "id": info.name,
                "object": "session",
                "model": info.model,
                "n_tokens": info.n_tokens,
                "bytes": info.n_bytes,
                "created": int(info.created),
                "used": int(info.used),
            }
            for info in found
        ]
        return JSONResponse({"object": "list", "data": data})

    async def one_session(self, request: Request) -> Response:
        """The text of a session, or its end."""
        served, owner, name = self.ready(), request.scope["owner"], request.path_params["name"]
        store = served.require_sessions()
        if request.method == "DELETE":
            if not await session_call(store.delete, owner, name):
                raise _no_session(name)
            return JSONResponse({"id": name, "object": "session.deleted", "deleted": True})
        kept = await session_call(store.load, owner, name)
        if kept is None:
            raise _no_session(name)
        text = await asyncio.to_thread(served.tokenizer.decode, kept.tokens)
        return JSONResponse({"id": name, "object": "session", "n_tokens": len(kept.tokens), "text": text})

    # ------------------------------------------------------------------------------------ tokens

    async def tokenize(self, request: Request) -> Response:
        """The ids of a text or a conversation, as vLLM has it."""
        served = self.ready()
        values = read_fields(TOKENIZE, await read_json(request, self.limits))
        served.require_served(values["model"])
        if (values["prompt"] is None) == (values["messages"] is None):
            raise ApiError(400, "give either prompt or messages", param="prompt")
        body = await asyncio.to_thread(self._tokenized, served, values)  # templates, texts and lists may be long
        return Response(body, media_type="application/json")

    def _tokenized(self, served: ServedModel, values: Mapping[str, Any]) -> str:
        """The answer of `tokenize` as JSON."""
        text = values["prompt"]
        if text is None:
            messages = read_messages(values["messages"])
            text = served.require_template().render(messages, add_generation_prompt=values["add_generation_prompt"])
        ids = served.encode(text)
        texts = [served.texts.text(token) for token in ids] if values["return_token_strs"] else None
        most = self.limits.max_prompt + self.limits.max_new_tokens
        return encode_in_pieces({"count": len(ids), "max_model_len": most, "tokens": ids, "token_strs": texts})

    async def detokenize(self, request: Request) -> Response:
        """The text of ids, as vLLM has it."""
        served = self.ready()
        values = read_fields(DETOKENIZE, await read_json(request, self.limits))
        served.require_served(values["model"])
        text = await asyncio.to_thread(lambda: served.decode(read_ids(values["tokens"], "tokens")))
        return JSONResponse({"prompt": text})

    async def tokenizer_info(self, request: Request) -> Response:
        """What lm-eval's remote tokenizer asks for."""
        served = self.ready()
        eos_id = served.tokenizer.eos_id
        eos = None if eos_id is None else served.texts.text(eos_id)
        return JSONResponse(
            {
                "tokenizer_class": served.tokenizer.name,
                "vocab_size": served.tokenizer.vocab_size,
                "eos_token": eos,
                "eos_token_id": eos_id,
                "bos_token": None,
                "pad_token": None,
                "chat_template": None if served.template is None else served.template.source,
            }
        )


class _Nowhere:
    """Paths of the API that do not exist, and methods that its paths do not take.

    Args:
        taken: the methods that the path takes; "" if it does not exist.
    """

    def __init__(self, taken: str = "") -> None:
        self._taken = taken

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if not self._taken:
            raise HTTPException(404)
        told = f"{scope['path'][:100]} takes {self._taken}, got {scope['method']}"
        raise HTTPException(405, told, {"Allow": self._taken.replace(" or ", ", ")})


class _Posted:
    """An endpoint that generates: an ASGI application, because it needs to see that its client leaves."""

    def __init__(self, application: Application, make_task: Callable[[ServedModel, Any, str], Awaitable[Task]]) -> None:
        self._application, self._make_task = application, make_task

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        application = self._application
        served = application.ready()
        body = await read_json(Request(scope, receive), application.limits)
        task = await self._make_task(served, body, scope["owner"])
        application.require_room(sum(request.n_rows for request in task.requests), served)
        await Answering(served, task, application.metrics, receive, send).run()


def _no_session(name: str) -> ApiError:
    return ApiError(404, f"there is no session {name[:80]!r}", param="session", code="session_not_found")
