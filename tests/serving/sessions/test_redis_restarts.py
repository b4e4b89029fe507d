"""A Redis server is killed and comes back: acknowledged sessions are there, and stores go on with it."""

from __future__ import annotations

import pytest
from own_redis import redis_server

from anymamba.serving.sessions import ModelIdentity, RedisSessions, StoreError


def test_a_killed_redis_server(model, keep, tmp_path):
    with redis_server(tmp_path) as (url, server):
        store = RedisSessions(url, model, ModelIdentity("m", "1"))
        store.save("", "chat", keep([1, 2]))
        server.kill()
        server.wait(10)
        with pytest.raises(StoreError, match="see whether that server runs"):
            store.load("", "chat")
    (tmp_path / "s").unlink()
    with redis_server(tmp_path):
        assert store.load("", "chat").tokens == (1, 2)
    store.close()
