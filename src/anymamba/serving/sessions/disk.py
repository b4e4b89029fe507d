"""Sessions in a folder, which several processes and machines may share.

A session is the file `OWNER/AB/NAME.session`, with digests for the owner and the name, and AB the first two digits of
NAME. It is written beside its place, flushed and renamed, so it is complete or not there, even after a power cut.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from anymamba.base.errors import InUseError
from anymamba.base.files import atomic_file, flush, own_file, sweep
from anymamba.generation.requests import KeptState
from anymamba.models.language_model import LanguageModel
from anymamba.serving.sessions.identity import ModelIdentity
from anymamba.serving.sessions.record import HEADER, decode, encode, header_length, info_of
from anymamba.serving.sessions.store import SessionInfo, StoreError, check_room, key_of, require_name

SUFFIX = ".session"
CLEAN_EVERY = 60.0
"""Seconds between two searches for expired sessions."""
COUNT_EVERY = 10.0
"""Seconds between two counts of an owner's bytes; other processes may have saved meanwhile."""


class DiskSessions:
    """A `SessionStore` in a folder.

    Args:
        folder: made if it does not exist.
        model: whose states are loaded and saved.
        identity: of the model.
        time_to_live: seconds after its last use when a session is deleted; None keeps it forever.
        quota: bytes that one owner's sessions may use; None sets no limit.
    Raises StoreError if the folder cannot be made.
    """

    def __init__(
        self,
        folder: str | Path,
        model: LanguageModel,
        identity: ModelIdentity,
        *,
        time_to_live: float | None = None,
        quota: int | None = None,
    ) -> None:
        self.folder, self._model, self._identity = Path(folder), model, identity
        self._time_to_live, self._quota = time_to_live, quota
        self._cleaned = -CLEAN_EVERY
        self._counts: dict[str, tuple[float, int]] = {}  # by owner: when the bytes were counted, and how many
        with self._reported():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
        self._clean()

    def load(self, owner: str, name: str) -> KeptState | None:
        """`SessionStore.load`."""
        path = self._path(owner, name)
        with self._reported():
            try:
                if self._over(path.stat().st_mtime):
                    return None
                data = path.read_bytes()
                os.utime(path)  # used now
            except FileNotFoundError:
                return None
        return decode(data, name, self._model, self._identity)

    def save(self, owner: str, name: str, kept: KeptState) -> None:
        """`SessionStore.save`."""
        path, now = self._path(owner, name), time.time()
        self.require_room(owner, name)
        old = self._info(path)
        data = encode(name, kept, self._model, self._identity, now if old is None else old.created)
        with self._reported():
            self._make(path.parent)
            with own_file(path):
                before = _size(path)
                with atomic_file(path) as temporary:
                    temporary.write_bytes(data)
                flush(path.parent)  # the new name, too
        self._count(owner, len(data) - before)
        self._clean()

    def require_room(self, owner: str, name: str) -> None:
        """`SessionStore.require_room`."""
        own = self._path(owner, name)
        if self._quota is not None:
            with self._reported():
                check_room(self._used(owner) - _size(own), self._quota)

    def list(self, owner: str) -> Sequence[SessionInfo]:
        """`SessionStore.list`. Damaged files are left out."""
        with self._reported():
            found = [self._info(path) for path in self._files(key_of(owner))]
        alive = [info for info in found if info is not None and not self._over(info.used)]
        return sorted(alive, key=lambda info: -info.used)

    def delete(self, owner: str, name: str) -> bool:
        """`SessionStore.delete`."""
        path = self._path(owner, name)
        with self._reported():
            if not path.exists():
                return False
            with own_file(path):
                self._count(owner, -_size(path))
                path.unlink(missing_ok=True)
                flush(path.parent)
        return True

    def close(self) -> None:
        """`SessionStore.close`; a folder holds nothing open."""

    def _used(self, owner: str) -> int:
        """Bytes of an owner's sessions."""
        when, used = self._counts.get(owner, (-COUNT_EVERY, 0))
        if time.monotonic() >= when + COUNT_EVERY:
            used = sum(map(_size, self._files(key_of(owner))))
            self._counts[owner] = (time.monotonic(), used)
        return used

    def _count(self, owner: str, change: int) -> None:
        """Note that an owner's sessions have grown or shrunk."""
        if owner in self._counts:
            when, used = self._counts[owner]
            self._counts[owner] = (when, used + change)

    def _path(self, owner: str, name: str) -> Path:
        require_name(name)
        key = key_of(name)
        return self.folder / key_of(owner) / key[:2] / (key + SUFFIX)

    def _files(self, owner: str = "*") -> Iterator[Path]:
        return self.folder.glob(f"{owner}/??/*{SUFFIX}")

    def _info(self, path: Path) -> SessionInfo | None:
        """What a list says of a file; None if it is damaged or not there."""
        try:
            with path.open("rb") as file:
                start = file.read(HEADER)
                start += file.read(header_length(start) - HEADER)
                status = os.fstat(file.fileno())
            return info_of(start, status.st_size, status.st_mtime)
        except FileNotFoundError:
            return None
        except StoreError as error:
            logging.getLogger(__name__).warning("%s: %s", path, error)
            return None

    def _over(self, used: float) -> bool:
        """Whether the time of a session that was last used then is over."""
        return self._time_to_live is not None and used + self._time_to_live < time.time()

    def _clean(self) -> None:
        """Delete expired sessions, if that was not done a short while ago."""
        if self._time_to_live is None or time.monotonic() < self._cleaned + CLEAN_EVERY:
            return
        self._cleaned = time.monotonic()
        for path in list(self._files()):
            with suppress(OSError, InUseError):
                if self._over(path.stat().st_mtime):
                    with own_file(path, wait=0):
                        if self._over(path.stat().st_mtime):  # nobody has saved it since
                            path.unlink()

    def _remove_leftovers(self) -> None:
        """Delete what killed processes have left."""
        for folder in self.folder.glob("*/??"):
            sweep(folder)

    def _make(self, folder: Path) -> None:
        """Make a folder below the store's, and flush its name in each folder above it."""
        if folder.is_dir():
            return
        folder.mkdir(parents=True, exist_ok=True)
        flush(folder.parent)
        flush(folder.parent.parent)

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Raise StoreError for what the file system refuses."""
        try:
            yield
        except (OSError, InUseError) as error:
            raise StoreError(
                f"sessions in {self.folder} cannot be read or written: {error}; see to that folder"
            ) from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
