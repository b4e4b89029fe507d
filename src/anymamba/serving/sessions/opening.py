"""The store for a place that a user names: a folder, or the address of a Redis server."""

from __future__ import annotations

from anymamba.models.language_model import LanguageModel
from anymamba.serving.sessions.disk import DiskSessions
from anymamba.serving.sessions.identity import ModelIdentity
from anymamba.serving.sessions.in_redis import RedisSessions
from anymamba.serving.sessions.store import SessionStore

SCHEMES = ("redis://", "rediss://", "unix://")


def open_sessions(
    place: str,
    model: LanguageModel,
    identity: ModelIdentity,
    *,
    time_to_live: float | None = None,
    quota: int | None = None,
) -> SessionStore:
    """A store in a folder, or in a Redis server if `place` is an address such as `redis://host:6379/0`.

    Args: as for `DiskSessions`.
    """
    kind = RedisSessions if place.startswith(SCHEMES) else DiskSessions
    return kind(place, model, identity, time_to_live=time_to_live, quota=quota)
