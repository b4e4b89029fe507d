"""What every store of sessions does, and the errors that it raises."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from anymamba.generation.requests import KeptState

LONGEST_NAME = 256
"""Characters of a session's name, at most."""


class SessionError(RuntimeError):
    """A session cannot be used as asked."""


class OtherModelError(SessionError):
    """The session was made by another model."""


class QuotaError(SessionError):
    """The owner's sessions use all the bytes that an owner may use."""


class StoreError(SessionError):
    """The store cannot be reached, is full, or holds a damaged session."""


@dataclass(frozen=True)
class SessionInfo:
    """What a list says of one session."""

    name: str
    model: str
    """The name of the model that made it."""
    n_tokens: int
    n_bytes: int
    created: float
    """Seconds since 1970, as are the other times."""
    used: float
    """When it was last loaded or saved."""


class SessionStore(Protocol):
    """Sessions by owner and name. All methods may be called from several threads, processes and machines at once.

    They raise ValueError for a name that `require_name` refuses, and StoreError if the store fails.
    """

    def load(self, owner: str, name: str) -> KeptState | None:
        """The state of a session on the model's device, or None if there is no such session.

        Raises OtherModelError if another model made it, StoreError if it is damaged.
        """
        ...

    def save(self, owner: str, name: str, kept: KeptState) -> None:
        """Keep a state. It replaces an older one, and is on disk when the call returns.

        Raises ValueError if the state is not one of the store's model, QuotaError as `require_room`.
        """
        ...

    def require_room(self, owner: str, name: str) -> None:
        """Raise QuotaError if the owner's other sessions already use the owner's quota."""
        ...

    def list(self, owner: str) -> Sequence[SessionInfo]:
        """The owner's sessions, the last used first."""
        ...

    def delete(self, owner: str, name: str) -> bool:
        """Delete a session and return whether there was one."""
        ...

    def close(self) -> None:
        """Give back what the store holds open."""
        ...


def require_name(name: str) -> None:
    """Raise ValueError unless a name has 1 to 256 characters that can be printed."""
    if not isinstance(name, str) or not 1 <= len(name) <= LONGEST_NAME or not name.isprintable():
        shown = repr(name if not isinstance(name, str) or len(name) < 50 else name[:50] + "...")
        raise ValueError(f"a session's name must be 1 to {LONGEST_NAME} printable characters, got {shown}")


def key_of(text: str) -> str:
    """The name under which a store keeps an owner or a session: a digest, so that no text becomes a path or a key."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def check_room(used: int, quota: int) -> None:
    """Raise QuotaError if the bytes of an owner's other sessions reach the quota."""
    if used >= quota:
        raise QuotaError(
            f"your other sessions use {used / 1e6:,.1f} MB of the {quota / 1e6:,.1f} MB that one API key may use; "
            "delete some of them"
        )
