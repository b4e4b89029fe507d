"""Puts a served model together: the engine with its prefix tree, the chat template and the sessions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from anymamba.data.tokenizer import Tokenizer
from anymamba.generation.engine import Engine, rows_within
from anymamba.generation.prefix_tree import PrefixTree
from anymamba.generation.requests import Event, Request
from anymamba.generation.state_folder import StateFolder
from anymamba.models.checkpoints import Checkpoint
from anymamba.models.language_model import LanguageModel
from anymamba.serving.limits import Limits
from anymamba.serving.model import ServedModel
from anymamba.serving.sessions import model_identity, open_sessions
from anymamba.serving.templates import ChatTemplate
from anymamba.serving.worker import EngineThread

MOST_ROWS = 64
"""Answers at once by default: the compiled step takes up to so many rows."""


@dataclass(frozen=True)
class EngineOptions:
    """How much the engine may use."""

    max_rows: int | None = None
    """Answers at once; None: as many as `memory` holds, at most `MOST_ROWS`."""
    memory: int = 1 << 30
    """Bytes for the states of running answers."""
    cache_memory: int = 1 << 30
    """Bytes for states of the prefix tree; 0: no tree."""
    cache_folder: Path | None = None
    """A folder of its own for states that the tree has no room for in memory; None drops them."""
    cache_disk: int = 10 << 30
    """Bytes for the states in that folder."""
    cache_every: int = 512
    """Tokens between two states of a long text."""
    share_cache: bool = False
    """Whether all keys find each other's states."""
    longest_wait: float = 0.05
    """Seconds that a running answer may wait for its next token while prompts are read."""
    slowdown: float = 2.5
    """How many times as long as without prompts it may wait at most, if that is shorter."""


@dataclass(frozen=True)
class SessionOptions:
    """Where sessions are kept, and for how long."""

    place: str
    """A folder, or the address of a Redis server."""
    time_to_live: float | None = None
    """Seconds after the last use; None keeps them forever."""
    quota: int | None = None
    """Bytes for each key."""


def make_engine(model: LanguageModel, tokenizer: Tokenizer, options: EngineOptions) -> Engine:
    """An engine for a model."""
    folder = None if options.cache_folder is None else StateFolder(options.cache_folder, model, options.cache_disk)
    tree = PrefixTree(options.cache_memory, every=options.cache_every, shared=options.share_cache, folder=folder)
    engine = Engine(
        model,
        tokenizer,
        max_rows=options.max_rows or min(MOST_ROWS, rows_within(model, options.memory)),
        longest_wait=options.longest_wait,
        slowdown=options.slowdown,
        prefix_tree=tree if options.cache_memory else None,
    )
    return engine


def warm(engine: Engine) -> None:
    """Run a short request, so that the first user does not wait for what is made at first use."""
    engine.submit(Request(prompt=[0, 0], max_new_tokens=2), _ignore)
    while engine.step():
        pass


def _ignore(event: Event) -> None:
    pass


def serve_model(
    name: str,
    model: LanguageModel,
    tokenizer: Tokenizer,
    loop: asyncio.AbstractEventLoop,
    *,
    checkpoint: Checkpoint | None = None,
    template: ChatTemplate | None = None,
    limits: Limits | None = None,
    engine: EngineOptions | None = None,
    sessions: SessionOptions | None = None,
) -> ServedModel:
    """Everything that an `Application` needs to serve a loaded model.

    Args:
        name: what clients call it.
        loop: the event loop of the server.
        checkpoint: where the model comes from; sessions need it to tell models apart.
        template: for chats; None: there are none.
        sessions: None: there are none.
    """
    make: Callable[[], Engine] = lambda: make_engine(model, tokenizer, engine or EngineOptions())  # noqa: E731
    worker = EngineThread(make, loop)
    warm(worker.engine)
    store = None
    if sessions is not None:
        if checkpoint is None:
            raise ValueError("sessions need the checkpoint, to tell models apart; give checkpoint")
        store = open_sessions(
            sessions.place,
            model,
            model_identity(name, checkpoint),
            time_to_live=sessions.time_to_live,
            quota=sessions.quota,
        )
    return ServedModel(
        name, model, tokenizer, worker, template, limits or Limits(), sessions=store, created=int(time.time())
    )
