"""Lock files that name their holder and that are free again when the holder's process ends, however it ends.

The operating system locks the file for the holder: flock, or one locked byte on Windows. The file names the holder, and
the holder removes it when it is done. If a process is killed, its lock file stays, but nobody holds it: the next holder
takes it over.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shlex
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from anymamba.base.errors import InUseError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
_LOCKED_BYTE = 1 << 30  # Windows: others cannot read a locked byte, so it is far beyond the record
_LOG_AFTER = 1.0  # seconds of waiting


@dataclass(frozen=True)
class Holder:
    """Who holds a lock."""

    pid: int
    host: str
    command: str
    since: str
    """Local time, with its offset from UTC."""

    def __str__(self) -> str:
        return f"`{self.command}` (process {self.pid} on {self.host}, since {self.since})"

    @classmethod
    def this_process(cls) -> Holder:
        """The record of this process, with the current time."""
        program = Path(sys.argv[0] if sys.argv else "python")
        name = program.parent.name if program.name == "__main__.py" else program.name
        command = shlex.join([name, *sys.argv[1:]])
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        return cls(os.getpid(), socket.gethostname(), command if len(command) < 200 else command[:197] + "...", since)

    def has_ended(self) -> bool:
        """Whether the process is known to have ended. This is never known for a process on another machine."""
        return self.host == socket.gethostname() and not is_alive(self.pid)

    def is_this_process(self) -> bool:
        """Whether it is this process, or an ended one that had the same number."""
        return self.host == socket.gethostname() and self.pid == os.getpid()


@dataclass
class _Held:
    descriptor: int | None
    thread: int
    depth: int = 1


_held: dict[str, _Held] = {}  # by path, of this process
_guard = threading.RLock()


class Lock:
    """A lock file at a path. Its folder must exist when the lock is taken."""

    def __init__(self, path: Path) -> None:
        self.path = Path(os.path.realpath(path))

    def try_acquire(self, *, again: bool = True) -> bool:
        """Take the lock if no other process or thread holds it, and return whether it was taken.

        Args:
            again: whether a thread that holds the lock may take it again; it then releases it as often.
        Raises OSError if the file cannot be opened or written, FileNotFoundError if its folder does not exist. The lock
        is not held then.
        """
        with _guard:
            held = _held.get(str(self.path))
            if held is not None:
                if not again or held.thread != threading.get_ident():
                    return False
                held.depth += 1
                return True
            descriptor = _open_locked(self.path)
            if descriptor is None:
                return False
            _held[str(self.path)] = _Held(descriptor, threading.get_ident())
            try:
                _write_record(descriptor)
            except BaseException:  # the disk is full, say
                self.release()
                raise
            return True

    def acquire(self, what: Path, wait: float | None = 0.0) -> None:
        """Take the lock; wait for another holder if necessary.

        Args:
            what: the file or folder that the lock protects, for messages.
            wait: how many seconds to wait at most; None waits without a limit.
        Raises InUseError, naming the holder, if the lock is still held then.
        """
        start, pause, told = time.monotonic(), 0.01, False
        while not self.try_acquire():
            waited = time.monotonic() - start
            if wait is not None and waited >= wait:
                raise InUseError(_in_use(what, self.holder()))
            if waited >= _LOG_AFTER and not told:
                told = True
                logging.getLogger(__name__).warning("waiting for %s, in use by %s", what, self.holder())
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    def release(self) -> None:
        """Release the lock and remove its file. Does nothing in a forked child: the lock is the parent's."""
        with _guard:
            held = _held.get(str(self.path))
            if held is None:
                return
            held.depth -= 1
            if held.depth == 0:
                self.remove_file()
                del _held[str(self.path)]
                if held.descriptor is not None:
                    os.close(held.descriptor)

    def remove_file(self) -> None:
        """Remove the file of a lock that this process holds, so that its folder can be removed.

        On Windows, where an open file cannot be removed, this ends the lock.
        """
        held = _held.get(str(self.path))
        if held is None or held.descriptor is None:
            return
        if sys.platform == "win32":
            os.close(held.descriptor)
            held.descriptor = None
            with suppress(OSError):  # another process has opened it
                self.path.unlink()
        else:
            with suppress(OSError):
                if _is_open_file(held.descriptor, self.path):
                    self.path.unlink()

    def remove_abandoned(self) -> None:
        """Remove the file if it was left by a process that was killed. Lock files of other programs are not touched."""
        with suppress(OSError):
            if _read_record(self.path) is not None and self.try_acquire(again=False):
                self.release()

    def holder(self) -> Holder | None:
        """The holder that the file names; None if it names no living one within 0.2 s."""
        for _ in range(20):
            found = _read_record(self.path)
            if found is not None and not found.has_ended():
                return found
            time.sleep(0.01)  # a new holder has yet to replace the record of a killed one
        return None


def is_alive(pid: int) -> bool:
    """Whether a process of this machine is running. Always true on Windows, where os.kill(pid, 0) is a Ctrl-C."""
    if sys.platform == "win32":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _in_use(what: Path, holder: Holder | None) -> str:
    if holder is None:
        return f"{what} is in use by another process; wait until it ends, or choose another path"
    if holder.is_this_process():
        return f"{what} is in use by another thread of this process; wait until it ends, or choose another path"
    return (
        f"{what} is in use by {holder}; wait until it ends, stop it (kill {holder.pid} on {holder.host}), or choose "
        "another path"
    )


def _open_locked(path: Path) -> int | None:
    """Open and lock a file, which is made if it does not exist. Returns None if someone else has locked it."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        except PermissionError:
            if sys.platform == "win32" and path.parent.is_dir():
                return None  # the holder is removing it
            raise
        try:
            locked = _lock(descriptor, path)
            removed = locked and sys.platform != "win32" and not _is_open_file(descriptor, path)
        except BaseException:
            os.close(descriptor)
            raise
        if locked and not removed:
            return descriptor
        os.close(descriptor)
        if not removed:
            return None
        # The last holder removed the file before this process locked it: try again with a new one.


def _lock(descriptor: int, path: Path) -> bool:
    """Lock an open file, and return whether that succeeded."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        holder = _read_record(path)  # this file system has no locks: trust the record
        return holder is None or holder.has_ended() or holder.is_this_process()
    return True


def _is_open_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _write_record(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    record = json.dumps(asdict(Holder.this_process())).encode("utf-8", "replace")
    while record:  # a disk that is nearly full takes a part of it
        record = record[os.write(descriptor, record) :]


def _read_record(path: Path) -> Holder | None:
    try:
        return Holder(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _forget_in_child() -> None:
    """Close the parent's lock files in a forked child: it would keep them locked after the parent's death."""
    global _guard
    _guard = threading.RLock()
    for held in _held.values():
        if held.descriptor is not None:
            os.close(held.descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
