"""What HTTP, JSON and scheduling cost: the engine alone, and the same answers streamed by `anymamba serve` to clients
in a process of their own. The second turn of a long session after a restart of the server is measured, too.

Where llama.cpp's `llama-server` is on the PATH, both servers answer the same clients in turns. It can be built from the
source package of llama-cpp-python: `cmake --build BUILD --target llama-server` in its folder vendor/llama.cpp.

    python -m benchmarks.serving [--clients 32] [--repeats 3]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError
from urllib.request import urlopen

import torch

from anymamba.data.tokenizer import ByteTokenizer
from anymamba.generation.engine import Engine
from anymamba.generation.requests import Event, NewToken, Request
from anymamba.models.inference import InferenceModel
from anymamba.models.presets import preset
from benchmarks.serving_engine import ANSWER, CLIENTS, GREEDY, PROMPT, TURN, WANTED_THROUGHPUT, finish
from benchmarks.timing import machine, table

WANTED_OVERHEAD = 0.05


def prompt_of(length: int, seed: int) -> list[int]:
    """Random bytes."""
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


class Serving(NamedTuple):
    """A server's process."""

    port: int
    pid: int

    def loop_seconds(self) -> float:
        """CPU time of the thread of the event loop so far; it is the process's first one."""
        return int(Path(f"/proc/{self.pid}/task/{self.pid}/schedstat").read_text().split()[0]) / 1e9


@contextmanager
def server(model: Path, sessions: Path) -> Iterator[Serving]:
    """`anymamba serve` as a process."""
    command = [sys.executable, "-m", "anymamba", "serve", "--model", str(model), "--port", "0"]
    command += ["--sessions", str(sessions), "--max-rows", "64", "--tokenizer", str(model)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                found = re.search(r"the page is http://127\.0\.0\.1:(\d+)", line)
                if found:
                    yield Serving(int(found[1]), process.pid)
                    break
            else:
                raise RuntimeError(f"the server did not start: {' '.join(command)}")
        finally:
            process.send_signal(signal.SIGTERM)


@contextmanager
def llama_server(program: str, model: Path, n_clients: int) -> Iterator[int]:
    """llama.cpp's server as a process, with a slot for each client; gives its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = str(torch.get_num_threads())
    command = [program, "-m", str(model), "--port", str(port), "-np", str(n_clients), "-t", threads, "-tb", threads]
    command += ["-c", str(n_clients * 2 * (PROMPT + ANSWER))]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while not _answers(port):
                if process.poll() is not None:
                    raise RuntimeError(f"the server did not start: {' '.join(command)}")
                time.sleep(0.2)
            yield port
        finally:
            process.terminate()


def _answers(port: int) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}/health") as answer:
            return answer.status == 200
    except (URLError, ConnectionError):
        return False


async def ask(port: int, body: dict[str, Any]) -> tuple[int, float, float]:
    """Stream one answer; gives its pieces, the seconds to the first, and to the last."""
    data = json.dumps({"stream": True, "temperature": 0, "ignore_eos": True, **body}).encode()
    start, first, n = time.perf_counter(), 0.0, 0
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
    async for line in reader:
        if line.startswith(b"data: {"):
            first, n = first or time.perf_counter() - start, n + 1
        if line.startswith(b"HTTP/1.1") and b" 200 " not in line:
            raise RuntimeError(f"the server answered {line.decode().strip()}")
    writer.close()
    return n, first, time.perf_counter() - start


async def ask_all(port: int, n_clients: int, seed: int) -> float:
    """Seconds until so many clients have their answers."""
    start = time.perf_counter()
    bodies = [{"prompt": prompt_of(PROMPT, seed + i), "max_tokens": ANSWER} for i in range(n_clients)]
    await asyncio.gather(*(ask(port, body) for body in bodies))
    return time.perf_counter() - start


def engine_seconds(model: InferenceModel, n_clients: int, seed: int) -> float:
    """The same by the engine alone."""
    engine = Engine(model, ByteTokenizer(), max_rows=64)
    events: list[Event] = []
    start = time.perf_counter()
    for i in range(n_clients):
        request = Request(prompt=prompt_of(PROMPT, seed + i), max_new_tokens=ANSWER, sampling=GREEDY)
        engine.submit(request, events.append)
    finish(engine)
    assert sum(isinstance(event, NewToken) for event in events) == n_clients * ANSWER
    return time.perf_counter() - start


def client(arguments: argparse.Namespace) -> None:
    """The process of the clients: prints seconds as JSON."""
    if arguments.session:
        body = {"prompt": json.loads(arguments.session), "max_tokens": 1, "session": "long"}
        print(json.dumps(asyncio.run(ask(arguments.port, body))))
    else:
        print(json.dumps(asyncio.run(ask_all(arguments.port, arguments.clients, arguments.seed))))


def in_process(port: int, *options: str) -> Any:
    """Run `client` in a process."""
    command = [sys.executable, "-m", "benchmarks.serving", "--port", str(port), *options]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def overhead(model: InferenceModel, path: Path, folder: Path, n_clients: int, repeats: int) -> str:
    """A table of the engine alone and through HTTP, in turns, and one of the event loop's own time."""
    alone, served, loop = [], [], []
    with server(path, folder / "sessions") as running:
        for seed in range(0, 1000 * repeats, 1000):
            alone.append(engine_seconds(model, n_clients, seed))
            before = running.loop_seconds()
            served.append(in_process(running.port, "--clients", str(n_clients), "--seed", str(seed)))
            loop.append(running.loop_seconds() - before)
    rates = [n_clients * ANSWER / statistics.median(seconds) for seconds in (alone, served)]
    share = rates[0] / rates[1] - 1
    row = [str(n_clients), *(f"{rate:,.0f}" for rate in rates), f"{share:.1%} ({WANTED_OVERHEAD:.0%})"]
    whole = table(["clients", "tokens/s, engine", "through HTTP", "overhead (wanted)"], [row])
    each, step = statistics.median(loop) / (n_clients * ANSWER), n_clients / rates[0]
    row = [str(n_clients), f"{each * 1e6:.0f} us", f"{step * 1e3:.1f} ms"]
    row.append(f"{n_clients * each / step:.1%} ({WANTED_OVERHEAD:.0%})")
    own = table(["clients", "event loop's CPU time for a token", "step", "share of the step (wanted)"], [row])
    return f"{whole}\n\nWithout the work of the clients, which run on the same cores:\n\n{own}"


def beside_llama_server(program: str, path: Path, folder: Path, gguf: Path, repeats: int) -> str:
    """A table of both servers, in turns, with a row for each number of clients."""
    rows, alone = [], 0.0
    with server(path, folder / "peer") as ours:
        for n_clients in CLIENTS:
            seconds: tuple[list[float], list[float]] = ([], [])
            with llama_server(program, gguf, n_clients) as theirs:
                for seed in range(0, 1000 * repeats, 1000):
                    for port, found in zip((ours.port, theirs), seconds, strict=True):
                        found.append(in_process(port, "--clients", str(n_clients), "--seed", str(seed + n_clients)))
            mine, llama = (n_clients * ANSWER / min(found) for found in seconds)
            alone = alone or mine
            ratio = f"{mine / llama:.2f} ({WANTED_THROUGHPUT})"
            rows.append([str(n_clients), f"{mine:,.0f}", f"{llama:,.0f}", ratio, f"{mine / alone:.1f}"])
    return table(["clients", "tokens/s", "llama-server", "ratio (wanted)", "against 1 client"], rows)


def restart(path: Path, folder: Path) -> str:
    """The first token of a long session, and of its next turn by another server."""
    prompt = prompt_of(TURN, 5)
    with server(path, folder / "turns") as running:
        _, cold, _ = in_process(running.port, "--session", json.dumps(prompt))
    with server(path, folder / "turns") as running:
        _, warm, _ = in_process(running.port, "--session", json.dumps([*prompt, *prompt_of(20, 6)]))
    row = [f"{cold:.2f} s", f"{warm * 1e3:.0f} ms", f"{warm / cold:.2%}"]
    return table([f"first token after {TURN:,} tokens", "20 more tokens, after a restart", "share"], [row])


def run(n_clients: int, repeats: int) -> str:
    """Measure and return the Markdown of the results."""
    torch.manual_seed(0)
    model = InferenceModel.random(preset("mamba-130m"), "int8")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder / "model", ByteTokenizer(), format="anymamba")
        parts = [overhead(model, folder / "model", folder, n_clients, repeats), restart(folder / "model", folder)]
        program = shutil.which("llama-server")
        if program is not None:
            model.save_pretrained(folder / "model.gguf", ByteTokenizer(), format="gguf")
            parts.append(beside_llama_server(program, folder / "model", folder, folder / "model.gguf", repeats))
    return "\n\n".join([machine(), "A model of 130m parameters in int8 with random weights.", *parts])


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--session", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.port is not None:
        client(arguments)
    else:
        print(run(arguments.clients, arguments.repeats))


if __name__ == "__main__":
    main()
