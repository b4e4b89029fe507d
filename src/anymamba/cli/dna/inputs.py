"""What the verbs of DNA share: opening a model and a genome, and telling what was skipped."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from anymamba.base.files import atomic_file
from anymamba.base.sizes import require_at_least
from anymamba.console.output import print_json, progress_bar, say, told_warnings
from anymamba.console.runtime import Runtime

if TYPE_CHECKING:
    from anymamba.data.dna import Genome


@contextmanager
def open_genome(fasta: Path) -> Iterator[Genome]:
    """A genome, with a progress bar while it is packed; what was found in the file, or read of it, goes to stderr."""
    from anymamba.data.dna import Genome

    with progress_bar("reading the genome") as show:
        genome = Genome.open(fasta, progress=lambda done, total: show(done, total))
    with genome:
        for note in genome.notes:
            say(f"{fasta}: {note}")
        yield genome
        for note in genome.reading_notes():
            say(f"{fasta}: {note}")


def exact(runtime: Runtime) -> Runtime:
    """The flags with float32 as the default: differences of likelihoods are small beside bfloat16's roundings."""
    if runtime.dtype is not None or runtime.weights is not None:
        return runtime
    return dataclasses.replace(runtime, dtype="float32")


def tell_skipped(path: Path, skipped: Mapping[str, int]) -> None:
    """Print how much of a file was skipped, one line a reason."""
    for reason, count in skipped.items():
        say(f"{path}: skipped {count:,} {reason}")


def require_new(out: Path | None, suffixes: tuple[str, ...]) -> None:
    """Raise unless a file to write has one of the suffixes and does not exist yet."""
    if out is None:
        return
    if not has_suffix(out, *suffixes):
        raise ValueError(f"--out must end with {' or '.join(suffixes)}, got {out}")
    if out.exists():
        raise FileExistsError(f"{out} exists; choose another file (--out), or delete it")


def has_suffix(out: Path | None, *suffixes: str) -> bool:
    """Whether a file to write has one of the suffixes, in any case; False for stdout."""
    return out is not None and out.suffix.lower() in suffixes


def write_results(
    options: Any, run: Callable[[Any], dict[str, object]], sizes: tuple[str, ...], suffixes: tuple[str, ...], what: str
) -> None:
    """Check the options that `score` and `embed` share, run the verb, and print its counts if --json asks for them.

    Args:
        sizes: options that must be at least 1.
        suffixes: of the file that `--out` names.
        what: the results, in words.
    """
    for name in sizes:
        require_at_least(f"--{name.replace('_', '-')}", getattr(options, name), 1)
    require_new(options.out, suffixes)
    if options.json and options.out is None:
        raise ValueError(f"--json prints counts in place of the {what}; name a file for these with --out")
    with told_warnings():
        counts = run(options)
    if options.json:
        print_json(counts)


@contextmanager
def lines_to(out: Path | None) -> Iterator[TextIO]:
    """A text file to write, which appears when it is complete, or stdout."""
    if out is None:
        yield sys.stdout
        return
    with (
        atomic_file(out) as temporary,
        open(temporary, "w", encoding="utf-8", errors="surrogateescape", newline="\n") as stream,
    ):
        yield stream
