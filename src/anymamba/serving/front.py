"""Accepts connections, and answers /health in a thread of its own: it does not wait for other requests."""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

HEALTH = b"GET /health HTTP/1.1\r\n"
LARGEST = 8192
"""Bytes of a request for /health; longer ones go the usual way."""
_TICK = 0.5
"""Seconds between two looks for connections that say nothing."""
_OUT_OF_FILES = 0.05
"""Seconds to wait when the process may open no more files."""


class Front:
    """The thread. It looks at the first bytes of a connection: all but /health is handed over.

    Args:
        listening: the socket.
        health: answers a request with these headers: status and body, or None to hand it over, too.
        hand_over: takes a connection from which nothing has been read; called in the thread.
        patience: seconds that a new connection may say nothing.
        keep_alive: seconds that it may say nothing after an answer.
    """

    def __init__(
        self,
        listening: socket.socket,
        health: Callable[[Mapping[str, str]], tuple[int, bytes] | None],
        hand_over: Callable[[socket.socket], None],
        patience: float,
        keep_alive: float,
    ) -> None:
        self._listening, self._health, self._hand_over = listening, health, hand_over
        self._patience, self._keep_alive = patience, keep_alive
        self._selector = selectors.DefaultSelector()
        self._waiting: dict[socket.socket, float] = {}  # until when each connection may say nothing
        self._stopping = False
        self._waker, self._wakened = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="anymamba-front", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._listening.setblocking(False)
        for watched in (self._listening, self._wakened):
            self._selector.register(watched, selectors.EVENT_READ)
        self._thread.start()

    def stop(self) -> None:
        """Close the listening socket and all connections that were not handed over."""
        self._stopping = True
        self._waker.send(b"x")
        self._thread.join()
        for opened in (self._listening, self._waker, self._wakened, *self._waiting):
            opened.close()
        self._selector.close()

    def _run(self) -> None:
        until = time.monotonic()
        while not self._stopping:
            for key, _ in self._selector.select(_TICK):
                if key.fileobj is self._listening:
                    self._accept()
                elif isinstance(key.fileobj, socket.socket) and key.fileobj in self._waiting:
                    self._look(key.fileobj)
            if time.monotonic() >= until:
                until = time.monotonic() + _TICK
                self._close_silent()

    def _accept(self) -> None:
        try:
            connection, _ = self._listening.accept()
        except BlockingIOError:
            return
        except OSError:
            time.sleep(_OUT_OF_FILES)
            return
        connection.setblocking(False)
        self._waiting[connection] = time.monotonic() + self._patience
        self._selector.register(connection, selectors.EVENT_READ)

    def _look(self, connection: socket.socket) -> None:
        try:
            start = connection.recv(LARGEST, socket.MSG_PEEK)
            answer = self._answer(start) if start.startswith(HEALTH) else None
            if not start:
                self._forget(connection).close()
            elif answer is None:
                self._hand_over(self._forget(connection))
            else:
                connection.recv(start.index(b"\r\n\r\n") + 4)
                connection.send(answer)
                self._waiting[connection] = time.monotonic() + self._keep_alive
        except BlockingIOError:
            pass
        except OSError:
            if connection in self._waiting:
                self._forget(connection).close()

    def _answer(self, start: bytes) -> bytes | None:
        """The answer to a request for /health; None if it is not whole or has to go the usual way."""
        head, end, _ = start.partition(b"\r\n\r\n")
        if not end:
            return None
        lines = (line.partition(":") for line in head.decode("latin-1").split("\r\n")[1:])
        headers = {name.strip().lower(): value.strip() for name, _, value in lines}
        if {"content-length", "transfer-encoding", "upgrade", "expect"} & set(headers):
            return None
        if headers.get("connection", "keep-alive").lower() != "keep-alive":
            return None
        found = self._health(headers)
        if found is None:
            return None
        status, body = found
        reason = "OK" if status == 200 else "Service Unavailable"
        top = f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\nCache-Control: no-store\r\n"
        return f"{top}Content-Length: {len(body)}\r\n\r\n".encode() + body

    def _forget(self, connection: socket.socket) -> socket.socket:
        self._selector.unregister(connection)
        del self._waiting[connection]
        return connection

    def _close_silent(self) -> None:
        now = time.monotonic()
        for connection in [one for one, until in self._waiting.items() if until < now]:
            with suppress(OSError):
                self._forget(connection).close()
