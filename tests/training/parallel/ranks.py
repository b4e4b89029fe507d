"""A pool of processes that act as the ranks of small process groups: started once, used by all tests of a module."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from contextlib import closing
from typing import Any

PRELOADED = ["tests.training.parallel.cases"]
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
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        try:
            dist.init_process_group("gloo")
            answer = True, function(*arguments)
        except BaseException:
            answer = False, traceback.format_exc()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        pipe.send(answer)
