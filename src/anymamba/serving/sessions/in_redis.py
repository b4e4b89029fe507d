"""Sessions in Redis, for servers that share no folder.

A session is the hash `PREFIX:{OWNER}:NAME`. Its field `data` has the bytes of a session's file, `start` the beginning
of them, which is all that a list needs, `size` their number and `used` the time of the last use. The set
`PREFIX:{OWNER}` has the keys of an owner's sessions. OWNER and NAME are digests. The braces keep an owner's keys on one
node of a cluster.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from anymamba.generation.requests import KeptState
from anymamba.models.language_model import LanguageModel
from anymamba.serving.sessions.identity import ModelIdentity
from anymamba.serving.sessions.record import decode, encode, header_length, info_of
from anymamba.serving.sessions.store import SessionInfo, StoreError, check_room, key_of, require_name

TIMEOUT = 10.0
"""Seconds to wait for an answer of the server."""
TOUCH = """
if redis.call('EXISTS', KEYS[1]) == 1 then
  redis.call('HSET', KEYS[1], 'used', ARGV[1])
  if ARGV[2] ~= '' then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
end"""
"""Note a use of a session that still exists."""
FORGET = "if redis.call('EXISTS', KEYS[1]) == 0 then redis.call('SREM', KEYS[2], ARGV[1]) end"
"""Take the name of a session that has expired out of its owner's set."""


class RedisSessions:
    """A `SessionStore` in a Redis server. A session is as durable as the server's settings make a write.

    With `appendonly yes` and `appendfsync always` it is on the server's disk when `save` returns.

    Args:
        url: `redis://host:port/database`, or one with `rediss://` or `unix://`.
        model: whose states are loaded and saved.
        identity: of the model.
        time_to_live: seconds after its last use when a session is deleted; None keeps it forever.
        quota: bytes that one owner's sessions may use; None sets no limit.
        prefix: of all keys.
    Raises ImportError without the package redis, StoreError if the server cannot be reached.
    """

    def __init__(
        self,
        url: str,
        model: LanguageModel,
        identity: ModelIdentity,
        *,
        time_to_live: float | None = None,
        quota: int | None = None,
        prefix: str = "anymamba",
    ) -> None:
        redis = _redis()
        self._errors = (redis.RedisError, OSError)
        self._model, self._identity, self._prefix = model, identity, prefix
        self._lifetime, self._quota = "" if time_to_live is None else str(round(1000 * time_to_live)), quota
        with self._reported():
            self._server = redis.Redis.from_url(url, socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT)
            self._server.ping()

    def load(self, owner: str, name: str) -> KeptState | None:
        """`SessionStore.load`."""
        key = self._key(owner, name)
        with self._reported():
            data: Any = self._server.hget(key, "data")
            if data is None:
                return None
            self._server.eval(TOUCH, 1, key, repr(time.time()), self._lifetime)
        return decode(data, name, self._model, self._identity)

    def save(self, owner: str, name: str, kept: KeptState) -> None:
        """`SessionStore.save`."""
        key, now = self._key(owner, name), time.time()
        self.require_room(owner, name)
        old = self._infos([key])[0]
        data = encode(name, kept, self._model, self._identity, now if old is None else old.created)
        fields = {"data": data, "start": data[: header_length(data)], "size": len(data), "used": repr(now)}
        with self._reported(), self._server.pipeline(transaction=True) as pipe:
            pipe.hset(key, mapping=fields)
            if self._lifetime:
                pipe.pexpire(key, int(self._lifetime))
            else:
                pipe.persist(key)
            pipe.sadd(self._index(owner), key)
            pipe.execute()

    def require_room(self, owner: str, name: str) -> None:
        """`SessionStore.require_room`."""
        if self._quota is not None:
            own = self._key(owner, name)
            with self._reported(), self._server.pipeline(transaction=False) as pipe:
                for key in self._keys(owner):
                    if key != own:
                        pipe.hget(key, "size")
                check_room(sum(int(size or 0) for size in pipe.execute()), self._quota)

    def list(self, owner: str) -> Sequence[SessionInfo]:
        """`SessionStore.list`."""
        keys = self._keys(owner)
        infos = self._infos(keys)
        with self._reported():
            for key, info in zip(keys, infos, strict=True):
                if info is None:
                    self._server.eval(FORGET, 2, key, self._index(owner), key)
        return sorted((info for info in infos if info is not None), key=lambda info: -info.used)

    def delete(self, owner: str, name: str) -> bool:
        """`SessionStore.delete`."""
        key = self._key(owner, name)
        with self._reported(), self._server.pipeline(transaction=True) as pipe:
            pipe.delete(key)
            pipe.srem(self._index(owner), key)
            return bool(pipe.execute()[0])

    def close(self) -> None:
        """`SessionStore.close`: the connections."""
        self._server.close()

    def _index(self, owner: str) -> str:
        return f"{self._prefix}:{{{key_of(owner)}}}"

    def _key(self, owner: str, name: str) -> str:
        require_name(name)
        return f"{self._index(owner)}:{key_of(name)}"

    def _keys(self, owner: str) -> Sequence[str]:
        with self._reported():
            found: Any = self._server.smembers(self._index(owner))
        return sorted(key.decode() for key in found)

    def _infos(self, keys: Sequence[str]) -> Sequence[SessionInfo | None]:
        """What a list says of sessions; None for those that are gone."""
        with self._reported(), self._server.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.hmget(key, "start", "size", "used")
            found = pipe.execute()
        return [None if start is None else info_of(start, int(size), float(used)) for start, size, used in found]

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """Raise StoreError for what the server refuses."""
        try:
            yield
        except self._errors as error:
            raise StoreError(
                f"sessions in Redis cannot be read or written: {error}; see whether that server runs and has room"
            ) from error


def _redis() -> Any:
    try:
        import redis
    except ImportError as error:
        raise ImportError("sessions in Redis need the package redis: pip install 'anymamba[ray]'") from error
    return redis
