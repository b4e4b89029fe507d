"""`anymamba VERB`: imports and runs the verb, and turns errors into exit codes."""

from __future__ import annotations

import difflib
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

VERBS = {
    "train": "train a language model on your files, fine-tune one, or resume a run",
    "generate": "continue prompts with a model",
    "eval": "measure a model on files: bits per byte, nats per token, perplexity",
    "lm-eval": "run tasks of lm-eval (EleutherAI's evaluation harness) on a model",
    "convert": "write a checkpoint in another format: hf, state-spaces, gguf",
    "experiment": "run one of the paper's experiments: results, charts and a report",
    "info": "versions, device, threads, and which backend of each operator runs here",
    "demo": "train on the standard library for about three minutes, then compare and generate",
}
MODULES = {verb: f"anymamba.cli.{'evaluate' if verb == 'eval' else verb.replace('-', '_')}" for verb in VERBS}

DONE, FAILED, MISUSE = 0, 1, 2
MISUSED = (ValueError, TypeError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
FAILURES = (RuntimeError, OSError, ImportError, MemoryError)


class Terminated(KeyboardInterrupt):
    """SIGTERM as an exception. Code that cleans up after Ctrl-C then cleans up after SIGTERM, too."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    0 is done, 1 failed, 2 misuse, 130 Ctrl-C, 143 SIGTERM. ANYMAMBA_DEBUG=1 shows tracebacks.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with terminate_as_interrupt():
            return run(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else DONE if end.code is None else FAILED
    except Terminated as end:
        return interrupted(end, "terminated", 128 + signal.SIGTERM)
    except KeyboardInterrupt as end:
        return interrupted(end, "interrupted", 128 + signal.SIGINT)
    except BrokenPipeError:
        # the reader closed the pipe; without this the interpreter reports an error when it flushes stdout at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except MISUSED as error:
        return complain(error, MISUSE)
    except FAILURES as error:
        return complain(error, FAILED)


def run(arguments: list[str]) -> int:
    """Dispatch to a verb."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return DONE if arguments else MISUSE
    if arguments[0] in ("-V", "--version"):
        from anymamba.base.version import __version__

        print(f"anymamba {__version__}")
        return DONE
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the verbs are {', '.join(VERBS)}"
        raise ValueError(f"unknown verb {verb!r}; {hint}")
    importlib.import_module(MODULES[verb]).command(rest)
    sys.stdout.flush()
    return DONE


def overview() -> str:
    """What `anymamba --help` prints."""
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {summary}" for verb, summary in VERBS.items()]
    return "\n".join(
        [
            "usage: anymamba VERB [OPTIONS]",
            "",
            "Selective state space models: train, generate, evaluate.",
            "",
            "verbs:",
            *lines,
            "",
            "anymamba VERB --help lists the options of a verb; anymamba --version prints the version.",
        ]
    )


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Raise Terminated on SIGTERM while the body runs. Only the main thread can set handlers; others change nothing."""

    def handler(signum: int, frame: FrameType | None) -> NoReturn:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def interrupted(end: BaseException, word: str, code: int) -> int:
    """Print that a signal ended the command, with the verb's note (how to resume) if it has one."""
    note = f"; {end}" if str(end) else ""
    print(f"{word}{note}", file=sys.stderr)
    return code


def complain(error: BaseException, code: int) -> int:
    """Print an error in one line; with ANYMAMBA_DEBUG=1 its traceback comes first."""
    if os.environ.get("ANYMAMBA_DEBUG") == "1":
        traceback.print_exception(error)
    print(f"error: {one_line(error)}", file=sys.stderr)
    return code


def one_line(error: BaseException) -> str:
    """An error's message on one line; for an OSError `file: reason`."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
