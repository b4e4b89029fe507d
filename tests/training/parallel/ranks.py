"""A pool of processes that act as the ranks of small process groups: started once, used by all tests of a module."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

PRELOADED = ["tests.training.parallel.cases"]
PATIENCE = 15.0
"""Seconds that a rank has to notice by itself that another one has failed."""
LIMIT = 60.0
"""Seconds that a function may take."""


class Pool:
    """Processes that run a function together, each as one rank of a group with gloo."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._pipes, self._processes = [], []
        for _ in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the function returns on each rank. It raises AssertionError with a rank's traceback if one fails."""
        port = free_port()
        for rank, pipe in enumerate(self._pipes[:world_size]):
            pipe.send((rank, world_size, port, function, arguments))
        answers = []
        for rank, pipe in enumerate(self._pipes[:world_size]):
            assert pipe.poll(LIMIT), f"rank {rank} has not answered within {LIMIT:.0f} s"
            answers.append(pipe.recv())
        failed = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(answers) if not ok]
        assert not failed, "\n".join(failed)
        return [value for _, value in answers]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        return server.getsockname()[1]


def _serve(pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        rank, world_size, port, function, arguments = pipe.recv()
        _set_rank(rank, world_size, port)
        try:
            dist.init_process_group("gloo")
            answer = True, function(*arguments)
        except BaseException:
            answer = False, traceback.format_exc()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        pipe.send(answer)


class Job:
    """Processes that each run a function once, as torchrun would start them. What they print is in files.

    Args:
        folder: for those files.
        size: number of processes.
        function: returns the exit code.
    """

    def __init__(self, folder: Path, size: int, function: Callable[..., int], *arguments: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._outputs = [folder / f"rank-{rank}.txt" for rank in range(size)]
        port = free_port()
        self.processes = [
            context.Process(target=_run_once, args=(rank, size, port, self._outputs[rank], function, arguments))
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def codes(self, limit: float = LIMIT) -> list[int | None]:
        """The exit codes. As torchrun does, it ends the others when one has failed, but only after a while.

        Processes that have not ended within the limit are killed, and have None.
        """
        end, failed = time.monotonic() + limit, None
        while any(p.exitcode is None for p in self.processes) and time.monotonic() < end:
            time.sleep(0.02)
            if failed is None and any(p.exitcode for p in self.processes):
                failed = time.monotonic()
            if failed is not None and time.monotonic() > failed + PATIENCE:
                for process in self.processes:
                    process.terminate()
                failed = float("inf")
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return codes

    def text(self, rank: int) -> str:
        """What a rank has printed so far."""
        return self._outputs[rank].read_text() if self._outputs[rank].exists() else ""

    def errors(self) -> list[tuple[int, str]]:
        """The lines that say an error, with the rank that says it."""
        lines = [(rank, line) for rank in range(len(self.processes)) for line in self.text(rank).splitlines()]
        return [(rank, line) for rank, line in lines if line.startswith("error:") or "Traceback" in line]

    def wait_for(self, path: Path, limit: float = LIMIT) -> None:
        """Wait until a file exists."""
        end = time.monotonic() + limit
        while not path.exists():
            assert time.monotonic() < end, f"{path} was not written within {limit:.0f} s:\n{self.text(0)}"
            assert all(p.is_alive() for p in self.processes), self.text(0)
            time.sleep(0.02)


def _set_rank(rank: int, world_size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def _run_once(
    rank: int, size: int, port: int, output: Path, function: Callable[..., int], arguments: tuple[Any, ...]
) -> None:
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    _set_rank(rank, size, port)
    sys.exit(function(*arguments))
