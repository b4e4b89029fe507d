"""Atomic writes, and one writer at a time for a folder.

A file or folder is complete or not there, even if the process is killed or the disk is full. It is written in a
temporary folder `.NAME.PID-XXXXXX.tmp` and then renamed. The writer holds a lock in the temporary folder, so `sweep`
can tell what a killed process left from what is being written.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from anymamba.base.locks import Lock, is_alive

LOCK = ".lock"
"""The name of a folder's lock file."""
SHORT = 10.0
"""How many seconds the writer of a few files waits for another one."""
LOCK_FILE = re.compile(r"\.(?P<name>.+)\.lock")
TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)(-[0-9a-f]+)?\.tmp")


def require_utf8(path: Path) -> None:
    """Raise ValueError for a path that is not UTF-8, for libraries that open files by themselves and take no other."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"the name {str(path)!r} is not valid UTF-8, which is needed here; rename it") from None


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let errors of the operating system name this path, not a temporary one or a lock in it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


# ------------------------------------------------------------------------------------------------------------ owning


@contextmanager
def own_folder(folder: Path, *, wait: float | None = SHORT) -> Iterator[None]:
    """Be the only writer of a folder while the block runs, and delete what killed processes left in it.

    The folder is made if it does not exist. If the block leaves such a new folder empty, it is removed again. Calls of
    the same thread may be nested.

    Args:
        wait: how many seconds to wait for another owner: 0 for a long job, which should not start late. None waits
            without a limit.
    Raises InUseError, naming the owner, if there is another one; OSError if the folder cannot be written.
    """
    lock = Lock(folder / LOCK)
    with _naming(folder):
        made = _take(lock, folder, folder, wait)
    try:
        sweep(folder)
        sweep(folder.absolute().parent, folder.absolute().name)
        yield
    finally:
        lock.release()
        if made:
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def own_file(path: Path, *, wait: float | None = SHORT) -> Iterator[None]:
    """Be the only writer of a file, or of a folder that is replaced as a whole, while the block runs.

    Like `own_folder`, with the lock `.NAME.lock` beside it.
    """
    lock = Lock(path.with_name(f".{path.name}.lock"))
    _take(lock, path.parent, path, wait)
    try:
        sweep(path.parent, path.name)
        yield
    finally:
        lock.release()


def contents(folder: Path) -> list[Path]:
    """The entries of a folder, without its lock file."""
    return [path for path in folder.iterdir() if path.name != LOCK]


def _take(lock: Lock, folder: Path, what: Path, wait: float | None) -> bool:
    """Acquire a lock in a folder, which is made if it does not exist; return whether it was made. Others may remove the
    folder at any time until the lock is held."""
    made = False
    try:
        while True:
            made = _make(folder) or made
            with suppress(FileNotFoundError):  # the last owner has just removed it
                lock.acquire(what, wait)
                return made
    except BaseException:
        if made:
            with suppress(OSError):
                folder.rmdir()
        raise


def _make(folder: Path) -> bool:
    """Make a folder if it does not exist, and return whether it was made."""
    while True:
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if folder.is_dir():
                return False
            if os.path.lexists(folder):
                raise
        else:
            return True


# ------------------------------------------------------------------------------------------------------------ writing


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path with the same file name; it is flushed to disk and renamed to `path` if the block succeeds.

    The file gets the permissions of the umask, whatever the block gave it.
    """
    with _workplace(path) as (place, mode):
        temporary = place / path.name
        yield temporary
        _settle(temporary, mode)
        os.replace(temporary, path)


@contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Give a temporary path for a folder that the block makes; it is flushed and renamed to `path` on success.

    Raises OSError if `path` is a folder that is not empty, unless `replace` is set: then the old folder is deleted.
    """
    with _workplace(path) as (place, mode):
        temporary = place / path.name
        yield temporary
        for entry in [*temporary.rglob("*"), temporary]:
            _settle(entry, mode)
        if path.exists() and replace:
            os.replace(path, place / "replaced")
        elif path.exists():
            Lock(path / LOCK).remove_file()
            path.rmdir()
        os.replace(temporary, path)
        flush(path.parent)


def remove_folder(path: Path) -> None:
    """Delete a folder atomically: even if the process is killed, it is complete or not there."""
    with _workplace(path) as (place, _):
        os.replace(path, place / path.name)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, values: Any, indent: int | None = 2) -> None:
    """Write a JSON file atomically. Raises ValueError for NaN and infinity, which JSON does not have."""
    write_text(path, json.dumps(values, indent=indent, allow_nan=False) + "\n")


def flush(path: Path) -> None:
    """Flush a file or folder to disk. Windows has no flush for folders."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _settle(path: Path, mode: int) -> None:
    if not path.is_dir():
        path.chmod(mode)
    flush(path)


@contextmanager
def _workplace(path: Path) -> Iterator[tuple[Path, int]]:
    """Give a new temporary folder, deleted at the end, and the permissions that a new file gets in it."""
    sweep(path.parent, path.name)
    while True:
        place = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(3)}.tmp")
        with _naming(path.parent):
            place.mkdir()
        lock = Lock(place / LOCK)
        try:
            with _naming(path.parent):
                if lock.try_acquire(again=False):
                    break
        except FileNotFoundError:  # another process swept it before it was locked
            continue
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
    try:
        yield place, stat.S_IMODE(lock.path.stat().st_mode)
    finally:
        lock.release()
        shutil.rmtree(place, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------ sweeping


def sweep(folder: Path, name: str | None = None) -> None:
    """Delete what ended processes left in a folder, temporary files and folders and locks: for one name, or all."""
    with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        for path in folder.iterdir():
            match = TEMPORARY.fullmatch(path.name)
            if match is not None and name in (None, match["name"]):
                _remove_abandoned(path, int(match["pid"]))
            match = LOCK_FILE.fullmatch(path.name)
            if match is not None and name in (None, match["name"]):
                Lock(path).remove_abandoned()


def _remove_abandoned(path: Path, pid: int) -> None:
    if not path.is_dir():
        if not is_alive(pid):
            path.unlink(missing_ok=True)
        return
    lock = Lock(path / LOCK)
    with suppress(OSError):
        if lock.try_acquire(again=False):
            try:
                shutil.rmtree(path, ignore_errors=True)
            finally:
                lock.release()
