"""A server in a thread of the test's process, with a small model."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from anymamba.models.checkpoints import find_tokenizer, load_pretrained, open_checkpoint
from anymamba.serving.app import Application
from anymamba.serving.limits import Limits
from anymamba.serving.loading import EngineOptions, SessionOptions, serve_model
from anymamba.serving.model import ServedModel
from anymamba.serving.security import Guard
from anymamba.serving.server import Server, listen
from anymamba.serving.templates import load_template

SECONDS = 60


@dataclass
class Live:
    """A running server."""

    url: str
    served: ServedModel
    application: Application
    client: httpx.Client

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def good(self, path: str, body: Any) -> dict[str, Any]:
        answer = self.post(path, body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def refused(self, status: int, path: str, body: Any) -> dict[str, Any]:
        answer = self.post(path, body)
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error

    def events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The pieces of a stream, which must end in [DONE]."""
        answer = self.post(path, {**body, "stream": True})
        assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
        lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        assert lines[-1] == "[DONE]", lines
        return [json.loads(line) for line in lines[:-1]]


@contextmanager
def live(
    folder: Path,
    *,
    template: str | None = "chatml",
    limits: Limits | None = None,
    engine: EngineOptions | None = None,
    guard: Guard | None = None,
    sessions: Path | None = None,
    stop_seconds: float = 5.0,
    packed: bool = False,
    port: int = 0,
) -> Iterator[Live]:
    """Serve a model folder while the body runs."""
    checkpoint = open_checkpoint(folder)
    limits, listening = limits or Limits(), listen("127.0.0.1", port)
    ready: list[Any] = []
    is_ready = threading.Event()

    def load(loop: asyncio.AbstractEventLoop) -> ServedModel:
        model = load_pretrained(checkpoint).eval()
        return serve_model(
            "nano",
            model.for_inference() if packed else model,
            find_tokenizer(checkpoint),
            loop,
            checkpoint=checkpoint,
            template=load_template(template, checkpoint),
            limits=limits,
            engine=engine,
            sessions=None if sessions is None else SessionOptions(str(sessions)),
        )

    def run() -> None:
        async def serve() -> None:
            application = Application(guard or Guard(), limits)
            server = Server(
                application,
                listening,
                load,
                stop_seconds=stop_seconds,
                on_ready=lambda served: (ready.extend((served, application)), is_ready.set()),
            )
            ready.append((server, asyncio.get_running_loop()))
            try:
                await server.run()
            finally:
                is_ready.set()

        asyncio.run(serve())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert is_ready.wait(SECONDS) and len(ready) == 3, "the server did not start"
    (server, loop), served, application = ready
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    with httpx.Client(base_url=url, timeout=SECONDS) as client:
        yield Live(url, served, application, client)
    loop.call_soon_threadsafe(server.stop)
    thread.join(SECONDS)
    assert not thread.is_alive(), "the server did not stop"
