"""Training on genomes that the caller has opened: objects of pyfaidx, other mappings, or some of their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from anymamba.data.dna import DnaTokenizer, Genome, Interval, Source, whole_sequences
from anymamba.training.config import TrainConfig
from anymamba.training.genome_splits import by_labels, held_out_ends
from anymamba.training.genomes import GenomeData, with_windows

Given = Sequence[Any]
"""Open genomes, or what `Genome.open` takes, such as `pyfaidx.Fasta`; each alone or in a pair with its intervals."""


def given_genomes(config: TrainConfig, tokenizer: DnaTokenizer, given: Given) -> tuple[GenomeData, GenomeData | None]:
    """The intervals to train on, and those that are held out (None if there are none).

    Of a genome without intervals all sequences are read. Held out are the intervals with the label valid, or, if none
    has a label, the ends of intervals, `held_out_fraction` of their bases. Raises ValueError if the config names files,
    too, or if no window is left to train on.
    """
    data = config.data
    if data.paths or data.eval_paths:
        raise ValueError("genomes are given, and data.paths or data.eval_paths name files; take one of them")
    training = [_source(one) for one in given]
    notes = [f"{genome.source}: {note}" for genome, _ in training for note in genome.notes]
    held_out: list[Source] = []
    labelled = by_labels(training)
    if labelled is not None:
        training, held_out, said = labelled
        notes.append(said)
    else:
        training, held_out = held_out_ends(training, data.held_out_fraction, config.context)
    return with_windows(
        GenomeData(tuple(training), tokenizer, tuple(notes)), GenomeData(tuple(held_out), tokenizer), config
    )


def _source(one: Any) -> Source:
    """A genome and its intervals. Raises TypeError for what is neither a genome nor a pair."""
    genome, intervals = one if isinstance(one, tuple) else (one, None)
    if not isinstance(genome, Genome):
        genome = Genome.open(genome)
    found = whole_sequences(genome) if intervals is None else list(intervals)
    if not all(isinstance(interval, Interval) for interval in found):
        raise TypeError("a pair in genomes must be of a genome and its intervals")
    return genome, found
