"""Runs a task and sends its answer, whole or as a stream, until its client leaves."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from typing import Any

from starlette.types import Receive, Send

from anymamba.generation.requests import Failed, Finished, NewToken, PromptRead
from anymamba.serving.metrics import Metrics
from anymamba.serving.model import ServedModel, Task
from anymamba.serving.protocol.answers import Answer, Piece
from anymamba.serving.protocol.errors import ApiError
from anymamba.serving.protocol.events import DONE, encode_in_pieces, event
from anymamba.serving.worker import EventStream, Numbered

SHORT = 10_000
"""Tokens of an answer and its prompts up to which its JSON is made in the thread of the event loop."""
SHORT_SCORED = 100
"""The same for an answer with log-probabilities."""
_STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]


class ClientLeft(Exception):
    """The client has closed its connection, or does not read its answer."""


class Patience:
    """Cancels a task whose client does not read its answer. Only one timer runs, not one for each piece.

    Args:
        task: what to cancel.
        seconds: how long it may wait for its client.
    """

    def __init__(self, task: asyncio.Task[Any], seconds: float) -> None:
        self._task, self._seconds, self._loop = task, seconds, asyncio.get_running_loop()
        self.waits_since: float | None = None
        """When the task began to wait for its client, by the clock of the event loop."""
        self.is_over = False
        self._timer = self._loop.call_later(seconds, self._look)

    def _look(self) -> None:
        now = self._loop.time()
        until = (now if self.waits_since is None else self.waits_since) + self._seconds
        self.is_over = until <= now
        if self.is_over:
            self._task.cancel()
        else:
            self._timer = self._loop.call_at(until, self._look)

    def end(self) -> None:
        """Look no more."""
        self._timer.cancel()


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
        self._loop, sender = asyncio.get_running_loop(), asyncio.current_task()
        assert sender is not None, "an answer is sent by a task"
        self._sender, self._patience = sender, Patience(sender, served.limits.send_seconds)

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
            await self._put(event(told.body()), more=False)
        else:
            self._metrics.answer.observe(time.perf_counter() - self._begun)
        finally:
            self._patience.end()

    async def _watch(self, events: EventStream) -> None:
        """Wait until the client leaves."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        events.fail(ClientLeft())

    # ------------------------------------------------------------------------------------ two ways to answer

    async def _whole(self, events: EventStream) -> None:
        while numbered := await events.next():
            await self._take(numbered)
        answer = self._task.answer
        is_short = answer.usage()["total_tokens"] <= (SHORT if answer.n_top is None else SHORT_SCORED)
        body = _whole_json(answer) if is_short else await asyncio.to_thread(_whole_json, answer)
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
                await self._put(b"".join(map(event, pieces)))
            pieces = []
        if answer.heading.include_usage:
            await self._put(event(answer.usage_chunk()))
        await self._put(DONE, more=False)

    async def _take(self, numbered: Iterable[Numbered]) -> list[Piece]:
        """Give events to the answer. Returns the pieces of a stream."""
        pieces: list[Piece] = []
        for number, happened in numbered:
            if isinstance(happened, NewToken):
                self._note_token()
                pieces += self._task.answer.token(number, happened)
            elif isinstance(happened, PromptRead):
                pieces += self._task.answer.prompt_read(number, happened)
            elif isinstance(happened, Failed):
                raise _api_error(happened.error)
            else:
                await self._save(happened)
                pieces += self._task.answer.finished(number, happened)
        return pieces

    def _note_token(self) -> None:
        if not self._has_token:
            self._has_token = True
            self._metrics.first_token.observe(time.perf_counter() - self._begun)

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
        self._patience.waits_since = self._loop.time()
        try:
            await self._send({"type": "http.response.body", "body": data, "more_body": more})
        except asyncio.CancelledError:
            if not self._patience.is_over:
                raise
            self._sender.uncancel()
            raise ClientLeft from None
        finally:
            self._patience.waits_since = None


def _whole_json(answer: Answer) -> bytes:
    """The JSON of an answer."""
    return encode_in_pieces(answer.whole()).encode("utf-8", "replace")


def _api_error(error: Exception) -> Exception:
    """What a client is told of an error in the engine. A new object: its traceback holds the event with the old one."""
    if isinstance(error, ClientLeft):
        return ClientLeft()
    if isinstance(error, ApiError):
        return ApiError(error.status, error.message, param=error.param, code=error.code)
    logging.getLogger(__name__).error("a request failed: %r", error, exc_info=error)
    return ApiError(500, f"the answer could not be generated: {str(error)[:300]}", code="generation_failed")
