"""Sessions: states of conversations under names, kept on disk or in Redis, apart for each owner."""

from typing import TYPE_CHECKING

from anymamba.base import lazy_names

__all__ = [
    "DiskSessions",
    "ModelIdentity",
    "OtherModelError",
    "QuotaError",
    "RedisSessions",
    "SessionError",
    "SessionInfo",
    "SessionStore",
    "StoreError",
    "model_identity",
    "open_sessions",
]

_HOMES = {
    "DiskSessions": "anymamba.serving.sessions.disk",
    "ModelIdentity": "anymamba.serving.sessions.identity",
    "OtherModelError": "anymamba.serving.sessions.store",
    "QuotaError": "anymamba.serving.sessions.store",
    "RedisSessions": "anymamba.serving.sessions.in_redis",
    "SessionError": "anymamba.serving.sessions.store",
    "SessionInfo": "anymamba.serving.sessions.store",
    "SessionStore": "anymamba.serving.sessions.store",
    "StoreError": "anymamba.serving.sessions.store",
    "model_identity": "anymamba.serving.sessions.identity",
    "open_sessions": "anymamba.serving.sessions.opening",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)

if TYPE_CHECKING:
    from anymamba.serving.sessions.disk import DiskSessions
    from anymamba.serving.sessions.identity import ModelIdentity, model_identity
    from anymamba.serving.sessions.in_redis import RedisSessions
    from anymamba.serving.sessions.opening import open_sessions
    from anymamba.serving.sessions.store import (
        OtherModelError,
        QuotaError,
        SessionError,
        SessionInfo,
        SessionStore,
        StoreError,
    )
