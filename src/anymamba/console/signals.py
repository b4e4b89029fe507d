"""Ctrl-C and SIGTERM: an exit code and one line, never a traceback, from a command's first moment to its last."""

from __future__ import annotations

import atexit
import os
import signal
from types import FrameType, TracebackType

EXIT_CODES = {signal.SIGINT: 128 + signal.SIGINT, signal.SIGTERM: 128 + signal.SIGTERM}
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
SHOW_CURSOR = b"\x1b[?25h"  # a progress bar hides the cursor of its terminal


class Terminated(KeyboardInterrupt):
    """SIGTERM as an exception: what cleans up after Ctrl-C then cleans up after SIGTERM, too."""


class SignalHandler:
    """What SIGINT and SIGTERM do to the process of a command.

    In a `with` block, where a verb works, the first signal raises KeyboardInterrupt or Terminated, so that the verb can
    clean up and say how to resume. These end the process at once: a second signal; a signal outside the block; and one
    during an import, because some libraries swallow what is raised there and others print it. A forked child takes the
    system's default action instead, so that pools and loaders that stop their workers get no tracebacks.
    """

    def __init__(self) -> None:
        self.process = os.getpid()
        self.working = False
        self.told = False
        """Whether the line that says what happened has been printed."""

    def install(self) -> None:
        """Handle both signals. One that is ignored stays so, as SIGINT is in a command that a script runs with `&`.

        Both are ignored after the last function of `atexit`: Python is about to restore the default action, which would
        replace the exit code.
        """
        for number in EXIT_CODES:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self)
                atexit.register(signal.signal, number, signal.SIG_IGN)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if not self.working or is_importing(frame):
            self.end_process(signal.Signals(number))
        self.working = False
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    def end_process(self, number: signal.Signals) -> None:
        """Leave without cleaning up: files are written atomically, and the next command sweeps what is left."""
        try:
            if os.isatty(2):
                os.write(2, SHOW_CURSOR)
            if not self.told:
                os.write(2, f"{WORDS[number]}\n".encode())
        finally:  # also where stderr is closed
            os._exit(EXIT_CODES[number])

    def __enter__(self) -> None:
        """Let the first signal raise while the body runs."""
        self.working = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.working = False


def is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported in a frame or in one of its callers."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def end_message(end: KeyboardInterrupt) -> tuple[int, str]:
    """The exit code of a command that a signal ended, and the line that says so, with what the verb adds."""
    number = signal.SIGTERM if isinstance(end, Terminated) else signal.SIGINT
    return EXIT_CODES[number], WORDS[number] + (f"; {end}" if str(end) else "")
