"""`anymamba dna embed`: writes the vectors of regions as .npz or TSV."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from anymamba.cli.dna.inputs import exact, has_suffix, lines_to, open_genome, tell_skipped, write_results
from anymamba.console.flags import read_flags
from anymamba.console.output import progress_bar, say
from anymamba.console.runtime import Runtime, load_model, open_model

if TYPE_CHECKING:
    from anymamba.data.dna import Interval


@dataclass(frozen=True)
class EmbedOptions:
    """Write the vectors that a model of DNA has for regions of a genome.

    .npz holds vectors, names, starts, ends, strands and labels; for positions the vectors of all regions follow each
    other, and offsets says where each region begins. TSV has a line a region, for positions a line a base.
    """

    model: Path
    """Folder of a model of DNA (a run folder is one), or a name on the Hugging Face hub."""
    fasta: Path
    """The genome: FASTA, plain or compressed, or .2bit."""
    bed: Path | None = None
    """The regions, with strands; defaults to each sequence of the genome as a whole."""
    pooling: Literal["mean", "last", "positions"] = "mean"
    """The mean over all bases, the vector of the last base, or one a base."""
    out: Path | None = None
    """A new .npz or .tsv file; defaults to TSV on stdout."""
    batch_size: int = 16
    """Regions that are read at once."""
    chunk: int = 8192
    """Bases of a region that a causal model reads at once; the vectors do not depend on it."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a line of the BED file that is no interval."""
    tokenizer: Path | None = None
    """A tokenizer.json or a folder that holds one; defaults to the model's own."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print counts as one JSON object; needs --out."""
    runtime: tyro.conf.OmitArgPrefixes[Runtime] = field(default_factory=Runtime)


def command(arguments: Sequence[str]) -> None:
    """Run `anymamba dna embed`."""
    options = read_flags(EmbedOptions, "dna embed", arguments)
    write_results(options, run, ("batch_size", "chunk"), (".npz", ".tsv"), "vectors")


def run(options: EmbedOptions) -> dict[str, object]:
    """Embed the regions and write the result; return what was counted."""
    from anymamba.data.dna import read_bed, whole_sequences

    with open_genome(options.fasta) as genome:
        intervals, skipped = whole_sequences(genome), dict[str, int]()
        if options.bed is not None:
            intervals, skipped = read_bed(options.bed, genome, on_bad_line=options.on_bad_row)
            tell_skipped(options.bed, skipped)
        runtime = exact(options.runtime)
        checkpoint, tokenizer = open_model(options.model, options.tokenizer, runtime)
        from anymamba.evaluation.dna import embed

        model = load_model(checkpoint, runtime)
        vectors = embed(
            model,
            tokenizer,
            genome,
            intervals,
            pooling=options.pooling,
            batch_size=options.batch_size,
            chunk=options.chunk,
        )
        with progress_bar("embedding") as show:
            told = _told(vectors, len(intervals), show)
            if options.out is not None and has_suffix(options.out, ".npz"):
                _write_npz(options.out, intervals, list(told), options.pooling == "positions")
            else:
                _write_tsv(options.out, intervals, told)
    say(f"embedded {len(intervals):,} regions")
    return {"regions": len(intervals), "skipped": skipped, "width": model.config.d_model, "out": str(options.out)}


def _told(vectors: Iterator[Any], total: int, show: Any) -> Iterator[Any]:
    for number, vector in enumerate(vectors, 1):
        show(number, total, f"{number:,} regions")
        yield vector


def _write_npz(out: Path, intervals: Sequence[Interval], vectors: list[Any], by_base: bool) -> None:
    import numpy as np

    from anymamba.base.files import atomic_file

    arrays: dict[str, Any] = {
        "vectors": np.concatenate(vectors) if by_base else np.stack(vectors),
        "names": np.array([i.name for i in intervals]),
        "starts": np.array([i.start for i in intervals], np.int64),
        "ends": np.array([i.end for i in intervals], np.int64),
        "strands": np.array([i.strand for i in intervals]),
        "labels": np.array([i.label for i in intervals]),
    }
    if by_base:
        arrays["offsets"] = np.cumsum([0, *map(len, vectors)])
    with atomic_file(out) as temporary, open(temporary, "wb") as stream:
        np.savez(stream, **arrays)


def _write_tsv(out: Path | None, intervals: Sequence[Interval], vectors: Iterator[Any]) -> None:
    with lines_to(out) as stream:
        for i, (interval, found) in enumerate(zip(intervals, vectors, strict=True)):
            one_a_base = found.ndim == 2
            rows = found if one_a_base else found[None]
            if i == 0:
                head = ["position"] if one_a_base else []
                names = [f"v{k}" for k in range(rows.shape[1])]
                print("name", "start", "end", "strand", "label", *head, *names, sep="\t", file=stream)
            for k, row in enumerate(rows):
                base = interval.start + k if interval.strand == "+" else interval.end - 1 - k
                place = [base] if one_a_base else []
                print(*interval, *place, *(f"{value:.7g}" for value in row), sep="\t", file=stream)
