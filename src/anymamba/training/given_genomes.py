"""Training on genomes that the caller has opened: objects of pyfaidx, other mappings, or some of their intervals."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any

from anymamba.data.dna import DnaTokenizer, Genome, Interval, Source, whole_sequences
from anymamba.training.config import TrainConfig
from anymamba.training.genome_splits import by_labels, held_out_ends, n_shared
from anymamba.training.genomes import GenomeData, warn_of_shared, with_windows

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
    opened = _Opened()
    training = [opened.source(one) for one in _listed(given)]
    notes = [f"{genome.source}: {note}" for genome in opened.genomes for note in genome.notes]
    held_out: list[Source] = []
    labelled = by_labels(training)
    if labelled is not None:
        training, held_out, said = labelled
        notes.append(said)
    else:
        training, held_out = held_out_ends(training, data.held_out_fraction, config.context)
    warn_of_shared(n_shared(training, held_out))
    return with_windows(
        GenomeData(tuple(training), tokenizer, tuple(notes)), GenomeData(tuple(held_out), tokenizer), config
    )


def _listed(given: Any) -> list[Any]:
    """What is given, one by one. Raises TypeError for a genome that is in no list, ValueError if nothing is given."""
    if isinstance(given, Genome | str | PathLike) or hasattr(given, "keys"):
        raise TypeError("genomes must be a list; put the genome into one: genomes=[genome]")
    found = list(given)
    if not found:
        raise ValueError("genomes is empty; give at least one genome")
    return found


class _Opened:
    """Opens each object once, so that its intervals are those of one genome."""

    def __init__(self) -> None:
        self._by_id: dict[int, tuple[Any, Genome]] = {}

    @property
    def genomes(self) -> list[Genome]:
        return [genome for _, genome in self._by_id.values()]

    def source(self, one: Any) -> Source:
        """A genome and its intervals. Raises TypeError for what is neither a genome nor a pair."""
        given, intervals = one if isinstance(one, tuple) else (one, None)
        if id(given) not in self._by_id:
            self._by_id[id(given)] = (given, given if isinstance(given, Genome) else Genome.open(given))
        genome = self._by_id[id(given)][1]
        return genome, whole_sequences(genome) if intervals is None else _checked(genome, intervals)


def _checked(genome: Genome, intervals: Iterable[Any]) -> list[Interval]:
    """The intervals by the genome's own names. Raises TypeError or ValueError, naming it, for one that is not there."""
    found = []
    for interval in intervals:
        if not isinstance(interval, Interval):
            raise TypeError("a pair in genomes must be of a genome and its intervals")
        name = genome.resolve(interval.name)
        start, end, length = operator.index(interval.start), operator.index(interval.end), genome.lengths[name]
        if not 0 <= start < end <= length:
            raise ValueError(
                f"{name}:{start:,}-{end:,} is no interval of {genome.source}, where {name} has {length:,} bases"
            )
        found.append(interval._replace(name=name, start=start, end=end))
    return found
