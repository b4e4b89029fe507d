"""Runs an application with uvicorn: the socket, slow clients, loading while it answers, and a graceful end."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import logging
import socket
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

from anymamba.serving.app import Application
from anymamba.serving.front import Front
from anymamba.serving.limits import Limits
from anymamba.serving.model import ServedModel
from anymamba.serving.protocol.errors import ApiError

try:
    import h11
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    raise ImportError(f'uvicorn is needed here ({error}); pip install "anymamba[serve]"') from error

KEEP_ALIVE = 30
"""Seconds that a connection may wait between two requests."""
COLLECTIONS = (2000, 50, 10_000)
"""Thresholds of the garbage collector. A collection stops all threads. Those of young objects are small, so that they
take a few milliseconds, and what lives as long as a request is mostly collected before it counts as old. That of old
objects takes 100 ms with 1,000 clients, and is left to idle moments."""
COLLECT_EVERY = 60
"""Seconds between collections of old objects while there is no idle moment."""
BACKLOG = 2048
LARGEST_HEADERS = 64 << 10
_LEAVING = 5
"""Seconds for the last bytes of answers after all of them have ended."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises OSError that names the address and the way out if it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host.strip("[]"), port))
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        way_out = (
            "give another --port, or end the program that uses it"
            if error.errno == errno.EADDRINUSE
            else ("give another --host or --port")
        )
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror or error}; {way_out}") from None
    return listening


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP, with a limit on the time for a request's headers, so that idle clients do not fill the server."""

    header_seconds = Limits.header_seconds

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock of the first request."""
        super().connection_made(transport)
        self._begin_headers()

    def data_received(self, data: bytes) -> None:
        """Between two requests, the first bytes of the next one start its clock."""
        if self._clock is None and (self.cycle is None or self.cycle.response_complete):
            self._begin_headers()
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._end_headers()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, in OpenAI's form."""
        body = json.dumps(ApiError(400, "the request is not valid HTTP/1.1").body()).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock, and let go of what holds this object, so that no garbage collection is needed."""
        self._end_headers()
        super().connection_lost(exc)
        self.cycle = None  # type: ignore[assignment]

    _clock: asyncio.TimerHandle | None = None

    def _begin_headers(self) -> None:
        self._clock = self.loop.call_later(self.header_seconds, self.transport.close)

    def _end_headers(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None


class Server:
    """Serves an application on a socket until `stop` is called.

    Args:
        application: what to serve; it answers 503 until the model is loaded.
        listening: the socket.
        load: loads the model; called with the event loop in a thread of its own.
        stop_seconds: how long running answers may go on after `stop`.
        on_ready: called when the model is loaded; an error of it ends the server.
    """

    def __init__(
        self,
        application: Application,
        listening: socket.socket,
        load: Callable[[asyncio.AbstractEventLoop], ServedModel],
        *,
        stop_seconds: float = 10.0,
        on_ready: Callable[[ServedModel], None] = lambda served: None,
    ) -> None:
        self._application, self._listening, self._load = application, listening, load
        self._stop_seconds, self._on_ready = stop_seconds, on_ready
        protocol = type("Protocol", (PatientProtocol,), {"header_seconds": application.limits.header_seconds})
        config: dict[str, Any] = {
            "http": protocol,
            "ws": "none",
            "lifespan": "off",
            "log_config": None,
            "access_log": False,
            "server_header": False,
            "timeout_keep_alive": KEEP_ALIVE,
            "timeout_graceful_shutdown": _LEAVING,
            "h11_max_incomplete_event_size": LARGEST_HEADERS,
        }
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # a request that is not HTTP is no news
        self._config = uvicorn.Config(application, **config)
        self._uvicorn = _Uvicorn(self._config)
        self._stopped = asyncio.Event()
        self._error: Exception | None = None

    def stop(self) -> None:
        """End the server; called in the thread of the event loop."""
        self._application.stopping = True
        self._stopped.set()

    async def run(self) -> None:
        """Load the model and serve. Raises what loading raises."""
        thresholds = gc.get_threshold()
        front = self._make_front(asyncio.get_running_loop())
        front.start()
        serving = asyncio.create_task(self._uvicorn.serve(sockets=[]))
        loading = asyncio.create_task(self._load_model())
        stopping, collecting = asyncio.create_task(self._stopped.wait()), asyncio.create_task(self._collect_when_idle())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        await self._finish_answers()
        await asyncio.to_thread(front.stop)
        self._uvicorn.should_exit = True
        await serving
        served = self._application.served
        if served is not None:
            await asyncio.to_thread(served.worker.stop)
            if served.sessions is not None:
                served.sessions.close()
        loading.cancel()
        collecting.cancel()
        self._application.served = None  # the model goes before the interpreter does
        gc.unfreeze()
        gc.set_threshold(*thresholds)
        if self._error is not None:
            raise self._error

    def _make_front(self, loop: asyncio.AbstractEventLoop) -> Front:
        """The thread that accepts connections and gives them to uvicorn's protocol."""
        opening = set[asyncio.Task[Any]]()
        self._config.load()

        def protocol() -> asyncio.Protocol:
            return self._config.http_protocol_class(  # type: ignore[call-arg]
                config=self._config, server_state=self._uvicorn.server_state, app_state={}, _loop=loop
            )

        def open_(connection: socket.socket) -> None:
            task = loop.create_task(loop.connect_accepted_socket(protocol, connection))
            opening.add(task)
            task.add_done_callback(opening.discard)

        def hand_over(connection: socket.socket) -> None:
            loop.call_soon_threadsafe(open_, connection)

        application = self._application
        seconds = application.limits.header_seconds, KEEP_ALIVE
        return Front(self._listening, application.health_alone, hand_over, *seconds)

    async def _load_model(self) -> None:
        try:
            served = await _in_daemon_thread(self._load)
            gc.collect()
            gc.freeze()
            gc.set_threshold(*COLLECTIONS)
            served.worker.start()
            self._application.serve(served)
            self._on_ready(served)
        except Exception as error:
            self._error = error
            self.stop()

    async def _collect_when_idle(self) -> None:
        """Collect old garbage in the first second without work after each time of it, and once a minute during work."""
        n_collected, n_before, waited = 0, 0, 0
        while True:
            await asyncio.sleep(1)
            served, waited = self._application.served, waited + 1
            if served is None or served.worker.n_streams == n_collected:
                continue
            n_now = served.worker.n_streams
            is_idle = n_now == n_before and not served.worker.open_streams
            n_before = n_now
            if is_idle or waited >= COLLECT_EVERY:
                n_collected, waited = n_now, 0
                gc.collect()

    async def _finish_answers(self) -> None:
        """Let running answers end, those that take too long by an error."""
        served = self._application.served
        if served is None:
            return
        worker, deadline = served.worker, asyncio.get_running_loop().time() + self._stop_seconds
        while worker.open_streams and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        if worker.open_streams:
            logging.getLogger(__name__).warning("%d answers are cut off by the end", len(worker.open_streams))
            worker.fail_all(ApiError(503, "the server is stopping", code="unavailable"))
            await asyncio.sleep(0.1)


async def _in_daemon_thread(load: Callable[[asyncio.AbstractEventLoop], ServedModel]) -> ServedModel:
    """Call in a thread that the process does not wait for at its end."""
    loop = asyncio.get_running_loop()
    loaded: asyncio.Future[ServedModel] = loop.create_future()

    def set_unless_done(value: ServedModel | None, error: Exception | None) -> None:
        if loaded.done():
            return
        if error is not None:
            loaded.set_exception(error)
        elif value is not None:
            loaded.set_result(value)

    def run() -> None:
        value, error = None, None
        try:
            value = load(loop)
        except Exception as raised:
            error = raised
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(set_unless_done, value, error)

    threading.Thread(target=run, name="anymamba-loading", daemon=True).start()
    return await loaded


class _Uvicorn(uvicorn.Server):
    """Leaves signals to the command line."""

    def capture_signals(self) -> Any:
        """Nothing is captured."""
        return nullcontext()
