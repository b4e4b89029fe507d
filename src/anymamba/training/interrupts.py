"""Ctrl-C and SIGTERM during training take effect after the step is finished and a checkpoint is written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class PendingSignal:
    """The number of the signal that was held back, or None."""

    def __init__(self) -> None:
        self.number: int | None = None


@contextmanager
def deferred_signals(*, launched: bool = False) -> Iterator[PendingSignal]:
    """Hold back the first SIGINT or SIGTERM while the body runs; it is delivered again when the body ends.

    A second signal takes effect at once. A signal that is ignored stays so. Nothing is held back outside the main
    thread, where Python sets no handlers.

    Args:
        launched: whether torchrun has started the process. SIGTERM is then held back as often as it comes: schedulers
            send it to all processes, and torchrun sends it to its own once more.
    """
    pending = PendingSignal()
    if threading.current_thread() is not threading.main_thread():
        yield pending
        return
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def hold(number: int, frame: FrameType | None) -> None:
        pending.number = number
        if not (launched and number == signal.SIGTERM):
            restore()

    for number in SIGNALS:
        if signal.getsignal(number) is signal.SIG_IGN:  # as SIGINT is in what a script runs with `&`
            continue
        before[number] = signal.signal(number, hold)
    try:
        yield pending
    finally:
        restore()
    if pending.number is not None:
        signal.raise_signal(pending.number)
