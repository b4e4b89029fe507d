"""`anymamba serve`: a server with OpenAI's protocol, sessions and a page."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from anymamba.base.sizes import require_at_least
from anymamba.console.flags import read_flags
from anymamba.console.output import printable, say, size
from anymamba.console.runtime import Runtime, load_model, open_model
from anymamba.console.signals import EXIT_CODES, Terminated
from anymamba.serving.limits import Limits

if TYPE_CHECKING:
    from anymamba.models.checkpoints import Checkpoint
    from anymamba.serving.loading import EngineOptions, SessionOptions
    from anymamba.serving.model import ServedModel
    from anymamba.serving.security import Guard
    from anymamba.serving.server import Server
    from anymamba.serving.templates import ChatTemplate

DAY = 24 * 3600.0
MEGABYTE = 1_000_000
SWITCH_SECONDS = 0.0005
"""How long a thread may keep others from running Python; by default it is 5 ms, too long for /health under load."""


@dataclass(frozen=True)
class ServeOptions:
    """Serve a model to any client of OpenAI's API, and a page for the browser.

    The server keeps the states of conversations, so a next turn reads only what is new. Ctrl-C and SIGTERM end it after
    running answers, or after --stop-seconds.
    """

    model: Path
    """Folder of a model (a run folder is one), a .gguf file, or a name on the Hugging Face hub."""
    host: str = "127.0.0.1"
    """Address to listen on. Other addresses than those of this machine need an API key."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    name: str | None = None
    """What clients call the model; defaults to the last part of --model."""
    chat_template: str | None = None
    """plain, chatml or a file with a Jinja template; defaults to the model's own."""
    api_key_file: Path | None = None
    """File with API keys, one a line. Each key has sessions and cached states of its own."""
    api_key: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """An API key; may be repeated. Other users of this machine can see it in the list of processes."""
    allowed_host: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Another name of this server that clients use; may be repeated."""
    allowed_origin: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A site whose pages may ask, such as https://example.org; may be repeated."""
    sessions: str | None = None
    """Folder for sessions, or the address of a Redis server; defaults to a folder of the user. "off" keeps none."""
    session_days: float = 30.0
    """Days after its last use when a session is deleted; 0 keeps them forever."""
    session_quota: int = 2000
    """Megabytes of sessions for each API key."""
    max_rows: int | None = None
    """Answers that are generated at once; defaults to what --memory holds, at most 64."""
    max_queued: int = Limits.max_queued
    """Answers that may wait; more requests get 429."""
    max_prompt: int = Limits.max_prompt
    """Tokens of a prompt, at most."""
    max_new_tokens: int = Limits.max_new_tokens
    """Tokens of an answer, at most."""
    max_body: int = Limits.max_body // MEGABYTE
    """Megabytes of a request, at most."""
    longest_wait: float = 50.0
    """Milliseconds that a running answer may wait for its next token while prompts are read."""
    slowdown: float = 2.5
    """How many times as long as without prompts it may wait, if that is shorter; more reads prompts sooner."""
    memory: int = 1000
    """Megabytes for the states of running answers."""
    cache_memory: int = 1000
    """Megabytes for states of earlier prompts and answers; 0 keeps none."""
    cache_folder: Path | None = None
    """A folder of its own for states that --cache-memory has no room for; defaults to dropping them."""
    cache_disk: int = 10_000
    """Megabytes for the states in --cache-folder."""
    share_cache: tyro.conf.FlagCreatePairsOff[bool] = False
    """All keys use each other's cached states. Then the time of an answer tells what others have asked."""
    stop_seconds: float = 10.0
    """How long running answers may go on after Ctrl-C or SIGTERM."""
    tokenizer: Path | None = None
    """A tokenizer.json, a folder or .gguf file that holds one, or a name on the hub; defaults to the model's own."""
    runtime: tyro.conf.OmitArgPrefixes[Runtime] = field(default_factory=Runtime)


def command(arguments: Sequence[str]) -> None:
    """Run `anymamba serve`."""
    options = read_flags(ServeOptions, "serve", arguments)
    from anymamba.serving.app import Application
    from anymamba.serving.server import Server, listen

    limits, engine, sessions = checked_options(options)
    guard = open_guard(options)
    checkpoint, tokenizer = open_model(options.model, options.tokenizer, options.runtime)
    template = open_template(options, checkpoint)
    listening = listen(options.host, options.port)
    address = url(options.host, listening)
    say(f"loading {options.model}; {address}/health answers 503 until then")

    def load(loop: asyncio.AbstractEventLoop) -> ServedModel:
        from anymamba.serving.loading import serve_model

        model = load_model(checkpoint, options.runtime)
        return serve_model(
            options.name or model_name(options.model),
            model,
            tokenizer,
            loop,
            checkpoint=checkpoint,
            template=template,
            limits=limits,
            engine=engine,
            sessions=sessions,
        )

    raise_file_limit()
    sys.setswitchinterval(SWITCH_SECONDS)
    server_of = partial(Server, listening=listening, load=load, stop_seconds=options.stop_seconds)
    ended = asyncio.run(
        run_until_signal(
            lambda: server_of(
                Application(guard, limits), on_ready=lambda served: announce(served, options, address, sessions)
            )
        )
    )
    if ended is not None:
        raise Terminated if ended == signal.SIGTERM else KeyboardInterrupt


async def run_until_signal(make_server: Callable[[], Server]) -> signal.Signals | None:
    """Run a server until Ctrl-C or SIGTERM, which is returned. A second signal ends the process at once."""
    server, loop, received = make_server(), asyncio.get_running_loop(), list[signal.Signals]()

    def receive(number: signal.Signals) -> None:
        if received:
            os._exit(EXIT_CODES[number])
        received.append(number)
        server.stop()
        say("stopping: running answers are finished first")

    before = {
        number: signal.signal(number, lambda number, _: loop.call_soon_threadsafe(receive, signal.Signals(number)))
        for number in EXIT_CODES
    }
    try:
        await server.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return received[0] if received else None


# ------------------------------------------------------------------------------------ options


def checked_options(options: ServeOptions) -> tuple[Limits, EngineOptions, SessionOptions | None]:
    """The options of the server's parts. Raises ValueError for a flag that is out of range."""
    from anymamba.serving.loading import EngineOptions, SessionOptions

    for name in ("max_rows", "max_prompt", "max_new_tokens", "max_body", "memory"):
        if getattr(options, name) is not None:
            require_at_least("--" + name.replace("_", "-"), getattr(options, name), 1)
    for name in ("port", "max_queued", "cache_memory", "cache_disk", "session_quota"):
        require_at_least("--" + name.replace("_", "-"), getattr(options, name), 0)
    if options.port > 65535:
        raise ValueError(f"--port must be at most 65535, got {options.port}")
    for flag, value in (("--stop-seconds", options.stop_seconds), ("--session-days", options.session_days)):
        if not math.isfinite(value) or value < 0:
            raise ValueError(f"{flag} must be a number of at least 0, got {value}")
    for flag, value, least in (("--longest-wait", options.longest_wait, 0), ("--slowdown", options.slowdown, 1)):
        if not math.isfinite(value) or value < least:
            raise ValueError(f"{flag} must be a number of at least {least}, got {value}")
    if options.cache_folder is not None and not options.cache_memory:
        raise ValueError("--cache-folder takes what --cache-memory has no room for, and that is 0; leave one out")
    limits = Limits(
        max_body=options.max_body * MEGABYTE,
        max_prompt=options.max_prompt,
        max_new_tokens=options.max_new_tokens,
        chat_tokens=min(Limits.chat_tokens, options.max_new_tokens),
        max_queued=options.max_queued,
    )
    engine = EngineOptions(
        max_rows=options.max_rows,
        memory=options.memory * MEGABYTE,
        cache_memory=options.cache_memory * MEGABYTE,
        cache_folder=options.cache_folder,
        cache_disk=options.cache_disk * MEGABYTE,
        share_cache=options.share_cache,
        longest_wait=options.longest_wait / 1000,
        slowdown=options.slowdown,
    )
    if options.sessions == "off":
        return limits, engine, None
    place = options.sessions or str(sessions_folder())
    seconds = options.session_days * DAY or None
    return limits, engine, SessionOptions(place, seconds, options.session_quota * MEGABYTE)


def sessions_folder() -> Path:
    """Where a user's sessions are kept by default."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "anymamba" / "sessions"


def open_guard(options: ServeOptions) -> Guard:
    """Who may ask. Raises ValueError without a key on an address that others can reach."""
    from anymamba.serving.security import Guard

    keys = list(options.api_key)
    if options.api_key_file is not None:
        lines = options.api_key_file.read_text(encoding="utf-8").splitlines()
        keys += [line.strip() for line in lines if line.strip()]
        if not keys:
            raise ValueError(f"{options.api_key_file} holds no API key; write one on each line")
    return Guard(keys, options.host, options.allowed_host, options.allowed_origin)


def open_template(options: ServeOptions, checkpoint: Checkpoint) -> ChatTemplate | None:
    """The chat template of the flag or the model."""
    from anymamba.serving.templates import load_template

    return load_template(options.chat_template, checkpoint)


def model_name(model: Path) -> str:
    """What clients call a model by default: the last part of a path, or the whole name on the hub."""
    return model.resolve().name if model.exists() else str(model)


def raise_file_limit() -> None:
    """Let the process have as many connections as the system allows it."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


# ------------------------------------------------------------------------------------ what is printed


def url(host: str, listening: socket.socket) -> str:
    """The address of the page."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{shown}:{listening.getsockname()[1]}"


def announce(served: ServedModel, options: ServeOptions, address: str, sessions: SessionOptions | None) -> None:
    """Print where the server is, and how many users it has room for."""
    from anymamba.parts.state import state_bytes

    one = state_bytes(served.model.init_state(1)) + 4 * served.model.config.vocab_size
    n_users = options.cache_memory * MEGABYTE // one
    lines = [
        f"{served.name}: the page is {address}, the API {address}/v1",
        f"room: {served.worker.engine.max_rows} answers at once; the states of {n_users:,} users, "
        f"{size(one)} each, fit into {options.cache_memory:,} MB",
        f"sessions: {sessions.place}" if sessions is not None else "sessions: off",
    ]
    if served.template is None:
        lines.append("chat: the model has no chat template; give --chat-template for /v1/chat/completions")
    if not options.api_key and options.api_key_file is None:
        lines.append("API key: none, so every program on this machine may ask; give --api-key-file to ask for one")
    print_or_lose(lines)


def print_or_lose(lines: Sequence[str]) -> None:
    """Print lines to stdout. Where it is closed or full, they are lost, and the server goes on."""
    if sys.stdout is None:
        return
    try:
        print(*(printable(line, sys.stdout) for line in lines), sep="\n", flush=True)
    except OSError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(
                nowhere.fileno(), sys.stdout.fileno()
            )  # what is still buffered would fail at the end of the process
