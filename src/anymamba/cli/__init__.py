"""The command line: one file a verb. Only here are device, dtype, threads, paths and seeds chosen."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; see `anymamba.cli.app.main`.

    Without `argv` the process is the command's: Ctrl-C and SIGTERM are handled from here on, before anything else is
    imported, until the process ends, and OpenMP's waiting is set. With it, both are the caller's.
    """
    signals = None
    if argv is None:
        from anymamba.console.signals import SignalHandler

        signals = SignalHandler()
        signals.install()
        from anymamba.console.openmp import watch_load

        watch_load()
    from anymamba.cli.app import main as run_command

    return run_command(sys.argv[1:] if argv is None else argv, signals)
