from __future__ import annotations

import pytest
import torch
from own_redis import redis_server

from anymamba.generation.prompts import read_prompts
from anymamba.generation.requests import KeptState
from anymamba.models.config import ModelConfig
from anymamba.models.language_model import LanguageModel
from anymamba.serving.sessions import DiskSessions, ModelIdentity, RedisSessions

IDENTITY = ModelIdentity("tiny", "1" * 64)


@pytest.fixture(scope="session")
def model() -> LanguageModel:
    torch.manual_seed(1)
    return LanguageModel(ModelConfig(d_model=24, n_layers=2, vocab_size=37)).eval()


@pytest.fixture(scope="session")
def keep(model):
    """Read tokens into a state to keep."""

    def read(tokens) -> KeptState:
        state = read_prompts(model, [tokens])
        return KeptState(tuple(tokens), state.model, state.logits)

    return read


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory):
    """A Redis server that tests share."""
    with redis_server(tmp_path_factory.mktemp("redis")) as (url, _):
        yield url


@pytest.fixture(params=["disk", "redis"])
def open_store(request, tmp_path, model):
    """Open the same store again and again, with other options or another model."""
    prefix = tmp_path.name
    url = request.getfixturevalue("redis_url") if request.param == "redis" else None
    opened = []

    def open(model=model, identity=IDENTITY, **options):
        if url is None:
            store = DiskSessions(tmp_path / "sessions", model, identity, **options)
        else:
            store = RedisSessions(url, model, identity, prefix=prefix, **options)
        opened.append(store)
        return store

    yield open
    for store in opened:
        store.close()
