"""The lines of a conversation in a terminal, or from a pipe, and what Ctrl-C does to them."""

from __future__ import annotations

import io
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from anymamba.console.output import say

PROMPT, CONTINUED = "> ", ". "


class CtrlC:
    """Whether Ctrl-C has been pressed. While a reply is generated, the first one ends the reply and not the program."""

    def __init__(self) -> None:
        self.pressed = False
        self.replying = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self.replying or self.pressed:
            raise KeyboardInterrupt
        self.pressed = True

    @contextmanager
    def ends_reply(self) -> Iterator[None]:
        """While the body runs, Ctrl-C sets `pressed`; a second one raises KeyboardInterrupt."""
        self.pressed, self.replying = False, True
        try:
            yield
        finally:
            self.replying = False


@contextmanager
def handled_ctrl_c() -> Iterator[CtrlC]:
    """Handle Ctrl-C while the body runs. If it is ignored, or outside the main thread, it stays as it is."""
    ctrl_c = CtrlC()
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield ctrl_c
        return
    signal.signal(signal.SIGINT, ctrl_c)
    try:
        yield ctrl_c
    finally:
        signal.signal(signal.SIGINT, before)


def read_messages() -> Iterator[str]:
    """The lines of stdin; one that ends with a backslash goes on in the next line.

    In a terminal they can be edited. Ctrl-C discards a line, and a second one in a row raises KeyboardInterrupt.
    """
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  input() then edits lines
    elif isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # the byte tokenizer takes any bytes
    discarded = False
    while True:
        try:
            yield _read_message()
        except EOFError:
            return
        except KeyboardInterrupt:
            if discarded or not sys.stdin.isatty():
                raise
            say("\n(Ctrl-C again, Ctrl-D or /quit leaves)")
            discarded = True
            continue
        discarded = False


def _read_message() -> str:
    line = _read_line(PROMPT)
    while line.endswith("\\"):
        line = line[:-1] + "\n" + _read_line(CONTINUED)
    return line


def _read_line(prompt: str) -> str:
    if sys.stdin.isatty():
        return input(prompt)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n").removesuffix("\r")
