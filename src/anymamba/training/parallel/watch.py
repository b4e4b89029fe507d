"""Watches the processes of a run, so that all of them end when one fails, with one line that says why.

Each rank keeps a connection to rank 0. The system closes it the moment a process dies, however it dies, so this needs
no heartbeat. It also works while the others wait inside a collective that will never finish: a thread ends them.
"""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import torch.distributed as dist

from anymamba.base.errors import one_line

SETTLE = 1.0
"""Seconds in which rank 0 waits for what else is reported: the death of a rank makes others fail, too."""
PATIENCE = 5.0
"""Seconds that a rank waits to be told to end, and that rank 0's main thread has to end by itself."""
HANDSHAKE = 10.0
"""Seconds that a new connection has for each byte of the word."""
KEEP_ALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
"""A machine that is gone closes no connection; the system notices it after 20 seconds."""
LONGEST = 4000
"""Bytes of a line that a rank says."""
END, BYE = b"end", b"bye"


_watched = False


def is_watched() -> bool:
    """Whether rank 0 is told of an error of this process."""
    return _watched


class OtherRankError(RuntimeError):
    """What another rank failed with, or that it has died."""


class Watch:
    """The connections of one rank. All ranks make one at the same time.

    Args:
        rank, world_size: of this process.
        host: a name or address of the machine of rank 0.
        way_out: ends the line about a rank that has died.
    """

    def __init__(self, rank: int, world_size: int, host: str, way_out: str) -> None:
        self.rank, self.way_out = rank, way_out
        self._deaths: list[str] = []
        self._errors: list[str] = []
        self._news, self._over = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        if rank == 0:
            self._connections = _accept(world_size)
            thread = threading.Thread(target=self._listen, daemon=True)
        else:
            self._connections = {0: _connect(rank, host)}
            thread = threading.Thread(target=self._wait_for_rank_0, daemon=True)
        thread.start()
        global _watched
        _watched = True

    @contextmanager
    def ending_together(self) -> Iterator[None]:
        """Run the body on every rank; if it fails on one, end them all.

        On rank 0 the error of the body is raised, or OtherRankError if another rank failed first. The others exit
        without a word.
        """
        try:
            yield
        except BaseException as error:
            self._fail(error)
        else:
            self._say(BYE)
            self._over.set()

    def _fail(self, error: BaseException) -> NoReturn:
        interrupted = isinstance(error, KeyboardInterrupt)
        if self.rank:
            if not interrupted:
                self._say(_line(error))
                self._over.wait(PATIENCE)
            self._say(BYE)
            self._over.set()
            raise SystemExit(130 if interrupted else 1) from None
        # a rank that died makes collectives fail here, and torchrun sends SIGTERM
        self._news.wait(SETTLE if interrupted or is_consequence(error) else 0)
        self._over.set()
        self._say(END)
        if self._news.is_set() and (interrupted or is_consequence(error)):
            raise OtherRankError(self._reason()) from error
        raise error

    # ---------------------------------------------------------------------------------------------------- threads

    def _listen(self) -> None:
        """Rank 0: wait for the first rank that fails or dies, then end the run."""
        with selectors.DefaultSelector() as selector:
            for rank, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            deadline = None
            while selector.get_map():
                for key, _ in selector.select(None if deadline is None else max(0.0, deadline - time.monotonic())):
                    if self._heard(key.data, _received(key.fileobj)):  # type: ignore[arg-type]
                        selector.unregister(key.fileobj)
                if deadline is None and (self._deaths or self._errors):
                    deadline = time.monotonic() + SETTLE
                if deadline is not None and time.monotonic() >= deadline:
                    break
        if not (self._deaths or self._errors) or self._over.is_set():
            return
        self._news.set()
        self._say(END)
        if not self._over.wait(PATIENCE):  # the main thread is inside a collective
            _end_process(self._reason())

    def _heard(self, rank: int, message: bytes) -> bool:
        """Note what a rank says; return whether it was its last word."""
        if message == BYE:
            return True
        if message:
            self._errors.append(f"rank {rank}: {message.decode('utf-8', 'replace')}")
        else:
            self._deaths.append(f"rank {rank} has died; {self.way_out}")
        return True

    def _reason(self) -> str:
        return (self._deaths + self._errors)[0]

    def _wait_for_rank_0(self) -> None:
        message = _received(self._connections[0])
        if self._over.is_set() or message == BYE:
            return
        if message == END:
            self._over.set()
            time.sleep(SETTLE)  # the main thread may be on its way out
            _end_process(None)
        _end_process(f"rank 0 has died; {self.way_out}" if self.rank == 1 else None)

    def _say(self, message: bytes) -> None:
        with self._lock:
            for connection in self._connections.values():
                with suppress(OSError):
                    connection.sendall(message + b"\n")


def is_consequence(error: BaseException) -> bool:
    """Whether an error may come from the failure of another rank: one of a collective."""
    words = str(error)
    return isinstance(error, dist.DistError) or any(word in words for word in ("gloo", "NCCL", "TCPStore", "c10d"))


def _line(error: BaseException) -> bytes:
    return one_line(error).encode()[:LONGEST]


def _end_process(line: str | None) -> NoReturn:
    """Leave at once: files are written atomically, and the next process sweeps what is left."""
    if line is not None:
        with suppress(OSError):
            os.write(2, f"error: {line}\n".encode())  # sys.stderr may be silenced on this rank
    os._exit(1)


# --------------------------------------------------------------------------------------------------------- connections


def _accept(world_size: int) -> dict[int, socket.socket]:
    """Rank 0: the connections of all other ranks, which prove themselves with a word that only they are told."""
    secret = secrets.token_hex(16)
    with socket.create_server(("", 0), backlog=world_size) as server:
        dist.broadcast_object_list([server.getsockname()[1], secret], 0)
        found: dict[int, socket.socket] = {}
        while len(found) < world_size - 1:
            connection, _ = server.accept()
            connection.settimeout(HANDSHAKE)
            word, _, rank = _received(connection).partition(b" ")
            if secrets.compare_digest(word, secret.encode()):
                found[int(rank)] = _kept_alive(connection)
            else:
                connection.close()
    return found


def _connect(rank: int, host: str) -> socket.socket:
    told: list = [None, None]
    dist.broadcast_object_list(told, 0)
    connection = socket.create_connection((host, told[0]), timeout=60)
    connection.sendall(f"{told[1]} {rank}\n".encode())
    return _kept_alive(connection)


def _kept_alive(connection: socket.socket) -> socket.socket:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEP_ALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def _received(connection: socket.socket) -> bytes:
    """The line that the other side says next; nothing, or its beginning, if it has closed the connection."""
    line = bytearray()
    with suppress(OSError):
        while len(line) < LONGEST and (byte := connection.recv(1)) not in (b"", b"\n"):
            line += byte
    return bytes(line)
