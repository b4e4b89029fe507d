"""Runs a task and sends its answer, whole or as a stream, until its client leaves."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterable
from typing import Any

from starlette.types import Receive, Send

from anymamba.generation.requests import Event, Failed, Finished, NewToken, PromptRead
from anymamba.serving.metrics import Metrics
from anymamba.serving.model import ServedModel, Task
from anymamba.serving.protocol.answers import Answer
from anymamba.serving.protocol.errors import ApiError
from anymamba.serving.worker import EventStream, Numbered

PIECE = 200
"""Entries of a list that are encoded at once."""
DONE = b"data: [DONE]\n\n"
_STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
_encode_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


class ClientLeft(Exception):
    """The client has closed its connection, or does not read its answer."""


class Answering:
    """One answer on its way.

    Args:
        served: the model.
        task: what to do.
        metrics: takes note of times.
        receive, send: of the ASGI request, whose body has been read.
    """

    def __init__(self, served: ServedModel, task: Task, metrics: Metrics, receive: Receive, send: Send) -> None:
        self._served, self._task, self._metrics = served, task, metrics
        self._receive, self._send = receive, send
        self._begun, self._is_open, self._has_token = time.perf_counter(), False, False

    async def run(self) -> None:
        """Generate and send the answer. Errors are raised before the first byte, and are the last event after it."""
        try:
            async with self._served.worker.stream(self._task.requests) as events:
                watch = asyncio.create_task(self._watch(events))
                try:
                    await (self._stream(events) if self._task.options.stream else self._whole(events))
                finally:
                    watch.cancel()
        except ClientLeft:
            self._metrics.cancelled.inc()
        except Exception as error:
            if not self._is_open:
                raise
            told = error if isinstance(error, ApiError) else _api_error(error)
            assert isinstance(told, ApiError), "a client that has left is dealt with above"
            await self._put(_event(told.body()), more=False)
        else:
            self._metrics.answer.observe(time.perf_counter() - self._begun)

    async def _watch(self, events: EventStream) -> None:
        """Wait until the client leaves."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        events.fail(ClientLeft())

    # ------------------------------------------------------------------------------------ two ways to answer

    async def _whole(self, events: EventStream) -> None:
        while numbered := await events.next():
            await self._take(numbered)
        body = await asyncio.to_thread(_whole_json, self._task.answer)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._put(body, more=False)

    async def _stream(self, events: EventStream) -> None:
        answer = self._task.answer
        pieces = answer.first_pieces()
        while numbered := await events.next():
            pieces += await self._take(numbered)
            if pieces:
                await self._open()
                await self._put(b"".join(map(_event, pieces)))
            pieces = []
        if answer.heading.include_usage:
            await self._put(_event(answer.usage_chunk()))
        await self._put(DONE, more=False)

    async def _take(self, numbered: Iterable[Numbered]) -> list[dict[str, Any]]:
        """Give events to the answer. Returns the pieces of a stream."""
        return [piece for number, event in numbered for piece in await self._take_one(number, event)]

    async def _take_one(self, number: int, event: Event) -> list[dict[str, Any]]:
        answer = self._task.answer
        if isinstance(event, NewToken):
            if not self._has_token:
                self._has_token = True
                self._metrics.first_token.observe(time.perf_counter() - self._begun)
            return answer.token(number, event)
        if isinstance(event, PromptRead):
            return answer.prompt_read(number, event)
        if isinstance(event, Failed):
            raise _api_error(event.error)
        await self._save(event)
        return answer.finished(number, event)

    async def _save(self, event: Finished) -> None:
        """Store a session's state before its answer ends."""
        name = self._task.options.session
        if name is not None and event.state is not None:
            await self._served.save_session(self._task.owner, name, event.state)
            self._metrics.sessions_saved.inc()

    # ------------------------------------------------------------------------------------ sending

    async def _open(self) -> None:
        if not self._is_open:
            self._is_open = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})

    async def _put(self, data: bytes, more: bool = True) -> None:
        try:
            async with asyncio.timeout(self._served.limits.send_seconds):
                await self._send({"type": "http.response.body", "body": data, "more_body": more})
        except TimeoutError:
            raise ClientLeft from None


def _event(piece: dict[str, Any]) -> bytes:
    return f"data: {_encode_json(piece)}\n\n".encode("utf-8", "replace")


def _whole_json(answer: Answer) -> bytes:
    """The JSON of an answer."""
    return encode_in_pieces(answer.whole()).encode("utf-8", "replace")


def encode_in_pieces(value: Any) -> str:
    """JSON of a value, a few entries of its lists at a time: other threads wait while one piece is encoded."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{_encode_json(key)}:{encode_in_pieces(inner)}" for key, inner in value.items()) + "}"
    if not isinstance(value, list) or len(value) <= PIECE:
        return _encode_json(value) if not _has_objects(value) else f"[{','.join(map(encode_in_pieces, value))}]"
    starts = range(0, len(value), PIECE)
    return "[" + ",".join(_encode_json(value[start : start + PIECE])[1:-1] for start in starts) + "]"


def _has_objects(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(entry, dict) for entry in value)


def _api_error(error: Exception) -> Exception:
    """What a client is told of an error in the engine. A new object: its traceback holds the event with the old one."""
    if isinstance(error, ClientLeft):
        return ClientLeft()
    if isinstance(error, ApiError):
        return ApiError(error.status, error.message, param=error.param, code=error.code)
    logging.getLogger(__name__).error("a request failed: %r", error, exc_info=error)
    return ApiError(500, f"the answer could not be generated: {str(error)[:300]}", code="generation_failed")
