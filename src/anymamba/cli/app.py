"""`anymamba VERB`: imports and runs the verb, and turns errors into exit codes."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext

from anymamba.base.errors import one_line
from anymamba.console.output import say
from anymamba.console.signals import SignalHandler, end_message

VERBS = {
    "train": "train a language model on your files, fine-tune one, or resume a run",
    "generate": "continue prompts with a model",
    "chat": "hold a conversation with a model in the terminal; edit, undo, branch and save it",
    "serve": "serve a model to clients of OpenAI's API, with sessions and a page",
    "eval": "measure a model on files: bits per byte, nats per token, perplexity",
    "lm-eval": "run tasks of lm-eval (EleutherAI's evaluation harness) on a model",
    "dna": "score variants, embed regions and classify sequences with a model of DNA",
    "convert": "write a checkpoint in another format: hf, state-spaces, gguf",
    "bench": "measure how fast a model reads and generates here, beside the machine's limits",
    "download": "download a model of the Hugging Face hub into its cache, and check it",
    "cache": "show the cached tables of tokens, and delete them",
    "reproduce": "evaluate published weights on the tasks of the paper, beside its numbers",
    "experiment": "run one of the paper's experiments: results, charts and a report",
    "info": "versions, devices, threads, and which backend of each operator runs here",
    "completion": "print a script with which bash, zsh or fish completes verbs and flags",
    "demo": "train on the standard library for about three minutes, then compare and generate",
}
MODULES = {verb: f"anymamba.cli.{'evaluate' if verb == 'eval' else verb.replace('-', '_')}" for verb in VERBS}

DONE, FAILED, MISUSE = 0, 1, 2
MISUSED = (ValueError, TypeError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
FAILURES = (RuntimeError, OSError, ImportError, MemoryError)


def main(argv: Sequence[str] | None = None, signals: SignalHandler | None = None) -> int:
    """Run one command line and return its exit code.

    0 is done, 1 failed, 2 misuse, 130 Ctrl-C, 143 SIGTERM. ANYMAMBA_DEBUG=1 shows tracebacks.

    Args:
        argv: the words after `anymamba`; defaults to those of the process.
        signals: the handler of the process's signals, entered while the verb runs.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with signals or nullcontext():
            return run(arguments)
    except SystemExit as end:
        if isinstance(end.code, int | None):
            return end.code or DONE
        return complain(end, FAILED)
    except KeyboardInterrupt as end:
        code, line = end_message(end)
        say(line)
        if signals is not None:
            signals.told = True
        return code
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
        from anymamba.base import __version__

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


def complain(error: BaseException, code: int) -> int:
    """Print an error in one line; with ANYMAMBA_DEBUG=1 its traceback comes first."""
    if os.environ.get("ANYMAMBA_DEBUG") == "1":
        traceback.print_exception(error)
    say(f"error: {one_line(error)}")
    return code
