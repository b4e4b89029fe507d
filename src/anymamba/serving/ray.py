"""Replicas of the server under Ray Serve, on one machine or many.

    serve run anymamba.serving.ray:app model=runs/demo sessions=/shared/sessions replicas=2

`Front` takes the calls and hands each to a `Replica`, which is the whole server of `anymamba serve` without its socket.
Calls of one session go to the same replica, which has its state in memory. When that replica is gone they go to another
one, which loads the state from the store that all replicas share.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from anymamba.base.schema import config_from_dict
from anymamba.models.checkpoints import find_tokenizer, load_pretrained, open_checkpoint
from anymamba.models.inference import InferenceModel
from anymamba.serving.app import Application
from anymamba.serving.gate import error_response
from anymamba.serving.limits import Limits
from anymamba.serving.loading import EngineOptions, SessionOptions, serve_model
from anymamba.serving.protocol.errors import ApiError
from anymamba.serving.security import Guard, is_loopback
from anymamba.serving.templates import load_template

if TYPE_CHECKING:
    from ray.serve import Application as RayApplication
    from ray.serve.handle import DeploymentHandle

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
MOST_CALLS = 10_000
"""Calls that Ray hands to a replica at once. Our own limits, which are lower, answer 429."""
REPLICA = b"x-replica"
"""The header of answers that names the replica."""
GONE = ApiError(503, "the replica that ran this request is gone; try again", code="replica_gone", retry_after=1)


@dataclass(frozen=True)
class RayOptions:
    """What replicas serve and what each of them may use."""

    model: str
    """Folder of a model, a .gguf file, or a name on the Hugging Face hub; each machine must find it."""
    name: str | None = None
    """What clients call the model; defaults to the last part of `model`."""
    sessions: str | None = None
    """A folder that all machines share, or the address of a Redis server; None keeps no sessions."""
    session_days: float = 30.0
    """Days after its last use when a session is deleted."""
    session_quota: int = 2000
    """Megabytes of sessions for each API key."""
    api_key_file: str | None = None
    """File with API keys, one a line. Without it only clients on the machine of the front are served."""
    allowed_hosts: str = ""
    """Names of the server that clients use, with commas between them."""
    chat_template: str | None = None
    """plain, chatml or a file with a Jinja template; defaults to the model's own."""
    weights: Literal["float32", "bfloat16", "int8", "int4"] | None = None
    """Pack the weights in this format; None takes them as they are saved."""
    device: str | None = None
    """Defaults to a GPU if the replica has one, else the CPU."""
    replicas: int = 1
    cpus: float = 1.0
    """CPUs of a replica."""
    gpus: float = 0.0
    """GPUs of a replica."""


class Call(NamedTuple):
    """An HTTP request on its way to a replica."""

    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Start(NamedTuple):
    """The beginning of a replica's answer; pieces of the body follow."""

    status: int
    headers: list[tuple[bytes, bytes]]


def app(arguments: Mapping[str, Any]) -> RayApplication:
    """The application for `serve run`, `serve deploy` and `ray.serve.run`.

    Args:
        arguments: fields of `RayOptions`. Numbers may be strings, as `serve run` gives them.
    Raises ValueError or TypeError for unknown fields and wrong values, ImportError without the extra `ray`.
    """
    try:
        from ray import serve
        from ray.serve.config import RequestRouterConfig
    except ImportError as error:
        raise ImportError(f'Ray Serve is needed here ({error}); pip install "anymamba[ray]"') from error
    kinds = {"session_days": float, "session_quota": int, "replicas": int, "cpus": float, "gpus": float}
    values = {key: kinds[key](value) if key in kinds else value for key, value in arguments.items()}
    options = config_from_dict(RayOptions, values)
    replica = serve.deployment(Replica).options(
        num_replicas=options.replicas,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        max_ongoing_requests=MOST_CALLS,
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
    )
    front = serve.deployment(Front).options(max_ongoing_requests=MOST_CALLS, ray_actor_options={"num_cpus": 0})
    return front.bind(replica.bind(options), options.api_key_file is not None)


# -------------------------------------------------------------------------------------------------------- the front


class Front:
    """Takes HTTP requests and hands them to replicas, those of one session to the same one.

    Args:
        replicas: the deployment of `Replica`.
        has_keys: whether the replicas check API keys; otherwise only clients of this machine are served.
    """

    def __init__(self, replicas: DeploymentHandle, has_keys: bool) -> None:
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        self._errors = (RayError, RayServeException)
        self._replicas, self._has_keys, self._limits = replicas, has_keys, Limits()

    async def __call__(self, request: Request) -> Response:
        """Answer one HTTP request."""
        try:
            self._require_allowed(request)
            call = await self._read(request)
        except ApiError as error:
            return error_response(error)
        handle = self._replicas.options(stream=True, session_id=session_of(call))
        answer = cast(AsyncIterator[Any], handle.answer.remote(call))
        try:
            start: Start = await anext(answer)
        except (*self._errors, StopAsyncIteration):
            return error_response(GONE)
        response = StreamingResponse(self._rest(answer, start), start.status)
        response.raw_headers = start.headers
        return response

    def _require_allowed(self, request: Request) -> None:
        if not self._has_keys and request.client is not None and not is_loopback(request.client.host):
            raise ApiError(403, "without API keys only clients on this machine are served; set api_key_file")

    async def _read(self, request: Request) -> Call:
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > self._limits.max_body:
                raise ApiError(413, f"a request's body must have at most {self._limits.max_body} bytes")
        return Call(request.method, request.url.path, request.url.query.encode(), request.headers.raw, bytes(body))

    async def _rest(self, answer: AsyncIterator[Any], start: Start) -> AsyncIterator[bytes]:
        """The body of an answer. A stream of events whose replica ends gets one event that says so."""
        try:
            async for piece in answer:
                yield piece
        except self._errors:
            if not dict(start.headers).get(b"content-type", b"").startswith(b"text/event-stream"):
                raise
            yield f"data: {json.dumps(GONE.body())}\n\n".encode()


def session_of(call: Call) -> str:
    """What decides about the replica: the session or the cache key that a call names, for each API key; "" is any."""
    try:
        fields = json.loads(call.body) if call.body else {}
        name = fields.get("session") or fields.get("prompt_cache_key")
    except (ValueError, AttributeError, RecursionError):
        return ""
    if not isinstance(name, str):
        return ""
    key = dict(call.headers).get(b"authorization", b"")
    return hashlib.sha256(key + b"\n" + name.encode("utf-8", "surrogatepass")).hexdigest()


# ----------------------------------------------------------------------------------------------------- the replicas


class Replica:
    """A model and the server's application, called without a socket.

    Args:
        options: what to serve.
    """

    async def __init__(self, options: RayOptions) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        keys = () if options.api_key_file is None else Path(options.api_key_file).read_text("utf-8").split()
        limits, hosts = Limits(), [host.strip() for host in options.allowed_hosts.split(",") if host.strip()]
        guard = Guard(keys, "0.0.0.0" if keys else "127.0.0.1", hosts)
        self._application = Application(guard, limits)
        loop = asyncio.get_running_loop()
        served = await asyncio.to_thread(_load, options, limits, loop)
        served.worker.start()
        from ray import serve

        self._id = serve.get_replica_context().replica_id.unique_id.encode()
        self._application.serve(served)

    async def answer(self, call: Call) -> AsyncIterator[Start | bytes]:
        """Run one call: first its `Start`, then the pieces of the body."""
        messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        left = asyncio.Event()
        task = asyncio.create_task(self._run(call, messages, left))
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start":
                    yield Start(message["status"], [*message["headers"], (REPLICA, self._id)])
                elif message["body"]:
                    yield message["body"]
            await task
        finally:
            left.set()  # the client is gone, if the application still runs
            if not task.done():
                await asyncio.wait({task}, timeout=5.0)
                task.cancel()

    async def _run(self, call: Call, messages: asyncio.Queue[dict[str, Any] | None], left: asyncio.Event) -> None:
        """Run the application."""
        given = False

        async def receive() -> dict[str, Any]:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": call.body, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if not left.is_set():
                await messages.put({"headers": [], "body": b"", **message})

        try:
            await self._application(_scope(call), receive, send)
        finally:
            if not left.is_set():
                await messages.put(None)


def _load(options: RayOptions, limits: Limits, loop: asyncio.AbstractEventLoop) -> Any:
    """Load the model and what belongs to it."""
    import torch

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = open_checkpoint(options.model)
    if options.weights is not None or checkpoint.in_blocks:
        model: Any = InferenceModel.from_pretrained(checkpoint, options.weights, device)
    else:
        model = load_pretrained(checkpoint, device).eval()
    tokenizer = find_tokenizer(checkpoint)
    sessions = None
    if options.sessions is not None:
        sessions = SessionOptions(options.sessions, 86_400 * options.session_days, 1_000_000 * options.session_quota)
    return serve_model(
        options.name or Path(options.model).name,
        model,
        tokenizer,
        loop,
        checkpoint=checkpoint,
        template=load_template(options.chat_template, checkpoint),
        limits=limits,
        engine=EngineOptions(),
        sessions=sessions,
    )


def _scope(call: Call) -> dict[str, Any]:
    """An ASGI scope."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": call.method,
        "scheme": "http",
        "path": call.path,
        "raw_path": call.path.encode(),
        "root_path": "",
        "query_string": call.query,
        "headers": call.headers,
        "client": None,
        "server": None,
    }
