"""Record what a step does as a CUDA graph."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

EXACT = 64
"""Up to so many rows buckets are powers of two; above, multiples of this."""


def bucket_of(rows: int) -> int:
    """The number of rows of the graph that serves so many rows; the rest of its rows are padding."""
    if rows > EXACT:
        return -(-rows // EXACT) * EXACT
    return 1 << (rows - 1).bit_length()


class Graphs:
    """Captures the graphs of one model, which share memory, and orders their replays.

    Args:
        device: a GPU. On a CPU nothing is recorded: what would be a graph runs each time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._lock = threading.Lock()
        self._last: torch.cuda.Stream | None = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """A context for what uses the memory of the graphs: one thread at a time, and after what other streams have
        queued."""
        with self._lock:
            if self._device.type != "cuda":
                yield
                return
            with torch.cuda.device(self._device):
                stream = torch.cuda.current_stream()
                if self._last is not None and self._last != stream:
                    stream.wait_stream(self._last)
                self._last = stream
                yield

    def capture(self, run: Callable[[], object], rows: int) -> Callable[[], object]:
        """What does the work of `run` each time it is called, with the same memory.

        Args:
            run: queues kernels and waits for nothing. It is called once before, to compile and to allocate.
            rows: for the error's message.
        Raises torch.OutOfMemoryError if the GPU has too little memory.
        """
        if self._device.type != "cuda":
            run()
            return run
        current = torch.cuda.current_stream()
        try:
            side = torch.cuda.Stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                run()
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                run()
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"the GPU has too little memory to record a step of {rows} rows: {error}; step fewer rows at once, or "
                'take weights="int8" or "int4"'
            ) from error
        finally:
            torch.cuda.set_stream(current)  # a capture that fails leaves its own stream
        return graph.replay
