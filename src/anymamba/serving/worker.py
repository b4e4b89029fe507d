"""The engine's thread, and the bridge from its events to coroutines."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from anymamba.generation.engine import Engine
from anymamba.generation.requests import Event, Failed, Finished, Request
from anymamba.serving.protocol.errors import ApiError

IDLE = 0.5
"""Seconds between two looks at whether the thread is to end, while there is no work."""

LONG = 4096
"""Prompts above this many tokens are given to the engine in another thread, which checks them."""

Numbered = tuple[int, Event]
"""An event and the number of its request in a stream."""


class EventStream:
    """The events of the requests of one call. Use it in `async with`: on exit it cancels what still runs.

    Args:
        worker: whose engine runs the requests.
        requests: they run at once.
    Raises ApiError if the engine refuses a request.
    """

    def __init__(self, worker: EngineThread, requests: Sequence[Request]) -> None:
        self._worker, self._requests = worker, requests
        self._events: list[Numbered] = []
        self._reader: asyncio.Future[None] | None = None  # who waits for the next event
        self._is_closed = False
        self._left = sum(request.n for request in requests)
        self._searching = sum(request.n_rows - request.n for request in requests)  # rows of beams that are no answers
        self._ids: list[int] = []

    async def __aenter__(self) -> EventStream:
        self._worker.open_streams.add(self)
        self._worker.n_streams += 1
        try:
            for number, request in enumerate(self._requests):
                submit = partial(self._worker.submit, request, partial(self._worker.post, self, number))
                self._ids.append(await asyncio.to_thread(submit) if len(request.prompt) > LONG else submit())
        except (ValueError, TypeError) as error:
            await self.__aexit__()
            raise ApiError(400, str(error)) from None
        return self

    async def __aexit__(self, *_: object) -> None:
        self._worker.open_streams.discard(self)
        self._is_closed = True
        self._events.clear()
        if self._left:
            for request_id in self._ids:
                self._worker.cancel(request_id)

    def put(self, numbered: Numbered) -> None:
        """Add an event; called in the thread of the event loop."""
        if self._is_closed:
            return
        if isinstance(numbered[1], Finished | Failed):
            self._left -= 1
        self._events.append(numbered)
        self._wake()

    def fail(self, error: Exception) -> None:
        """Add an error that is not the engine's: the call ends, and its rows are cancelled."""
        if self._left and not self._is_closed:
            self._events.append((0, Failed(0, error)))
            self._wake()

    def forget(self) -> None:
        """There is nothing to cancel: the engine is gone."""
        self._ids.clear()

    async def next(self) -> list[Numbered]:
        """The next events: at least one, or none after the last one."""
        if not self._events:
            if not self._left:
                return []
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        found, self._events = self._events, []
        return found

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    @property
    def n_rows(self) -> int:
        """Rows of its requests that have not ended; those of a beam search stay until its end."""
        return self._left and self._left + self._searching


class EngineThread:
    """Runs an engine in a thread of its own.

    Args:
        make_engine: makes the engine, and a new one after an error of the engine itself.
        loop: where streams are read; defaults to the running one.
    """

    def __init__(self, make_engine: Callable[[], Engine], loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._make_engine, self._loop = make_engine, loop or asyncio.get_running_loop()
        self.engine = make_engine()
        self.open_streams: set[EventStream] = set()
        self.n_streams = 0
        """How many streams there have been."""
        self._posted: deque[tuple[EventStream, int, Event]] = deque()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="anymamba-engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its step and wait for it."""
        self._stopping = True
        self._thread.join()

    def stream(self, requests: Sequence[Request]) -> EventStream:
        """Run requests; see `EventStream`."""
        return EventStream(self, requests)

    def fail_all(self, error: Exception) -> None:
        """End all streams by an error; called in the thread of the event loop."""
        for stream in list(self.open_streams):
            stream.fail(error)

    @property
    def n_rows(self) -> int:
        """Rows of all streams that have not ended, the waiting ones included."""
        return sum(stream.n_rows for stream in self.open_streams)

    # ------------------------------------------------------------------------------------ for streams

    def submit(self, request: Request, sink: Callable[[Event], None]) -> int:
        """`Engine.submit`."""
        return self.engine.submit(request, sink)

    def cancel(self, request_id: int) -> None:
        """`Engine.cancel`."""
        self.engine.cancel(request_id)

    def post(self, stream: EventStream, number: int, event: Event) -> None:
        """Take an event of the engine. Streams get them after the step, all at once."""
        self._posted.append((stream, number, event))

    # ------------------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        while not self._stopping:
            try:
                busy = self.engine.step()
            except Exception as error:
                logging.getLogger(__name__).exception("the engine failed; a new one takes its place")
                self._loop.call_soon_threadsafe(self._replace_engine, error)
                return
            if self._posted:
                self._loop.call_soon_threadsafe(self._deliver)
            if not busy:
                self.engine.wait(IDLE)

    def _deliver(self) -> None:
        while self._posted:
            stream, number, event = self._posted.popleft()
            stream.put((number, event))

    def _replace_engine(self, error: Exception) -> None:
        """After an error of the engine: the requests end, and the next ones get a new engine."""
        self._posted.clear()
        for stream in self.open_streams:
            stream.forget()
        self.fail_all(error)
        self.engine = self._make_engine()
        self._thread = threading.Thread(target=self._run, name="anymamba-engine", daemon=True)
        self._thread.start()
