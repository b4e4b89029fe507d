"""Processes of torch.distributed with gloo, for tests: they start once and run one function after another."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = 300  # seconds


class Ranks:
    """A pool of processes. `run` calls a function on the first n of them, with their process group.

    Functions must be importable. After a failure the pool starts again, because ranks may wait for each other.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._pipes: list[Any] = []
        self._processes: list[Any] = []

    def run(self, n: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """function(group, *args) on each of n ranks; the results in the order of ranks.

        Raises AssertionError with the traceback of the first rank that failed.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes[:n]:
            pipe.send((n, function, args))
        results: list[Any] = [None] * n
        waiting = dict(zip(self._pipes[:n], range(n), strict=True))
        while waiting:
            ready: list[Any] = wait(list(waiting), PATIENCE)
            failure = None if ready else f"ranks {list(waiting.values())} gave no answer within {PATIENCE} s"
            for pipe in ready:
                message, results[waiting.pop(pipe)] = pipe.recv()
                failure = failure or message
            if failure is not None:
                self.close()
                raise AssertionError(failure)
        return results

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        for rank in range(self._size):
            here, there = context.Pipe()
            store = str(Path(self._folder.name) / "store")
            process = context.Process(target=_serve, args=(rank, self._size, store, there), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def close(self) -> None:
        if self._processes:
            for process in self._processes:
                process.kill()
                process.join()
            self._folder.cleanup()
        self._pipes, self._processes = [], []


def _serve(rank: int, size: int, store: str, pipe: Any) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", f"file://{store}", patience, rank=rank, world_size=size)
    groups = {n: dist.new_group(range(n), patience) for n in range(1, size + 1)}
    while True:
        n, function, args = pipe.recv()
        try:
            pipe.send((None, function(groups[n], *args)))
        except BaseException:
            pipe.send((f"rank {rank} of {n}:\n{traceback.format_exc()}", None))
