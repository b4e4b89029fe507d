"""Training data of DNA: intervals of genomes, those that are held out, and batches of their windows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from anymamba.base.errors import DataWarning
from anymamba.data.batches import Batch
from anymamba.data.dna import (
    DnaTokenizer,
    Genome,
    GenomeFile,
    GenomeWindows,
    Interval,
    Source,
    find_genomes,
    is_unknown,
    read_bed,
    whole_sequences,
)
from anymamba.training.config import DataConfig, GenomeConfig, TrainConfig
from anymamba.training.genome_splits import by_labels, held_out_ends, n_shared
from anymamba.training.length_warmup import described, stage_of, stages

NOT_COUNTED = -100


@dataclass(frozen=True)
class GenomeData:
    """Intervals of open genomes. The token of a base is its byte in FASTA, so there are as many tokens as bytes."""

    sources: tuple[Source, ...]
    tokenizer: DnaTokenizer
    notes: tuple[str, ...] = ()
    """What was found and skipped, one line each."""
    n_dropped: int | None = None
    """Of held-out data: the windows of an evaluation that are dropped for their N."""
    seed: int = 0
    """Of the windows to train on."""
    options: GenomeConfig = field(default_factory=GenomeConfig)
    """How the windows are read, and which are dropped."""
    _counted: dict[tuple[int, int, float], int] = field(default_factory=dict, repr=False, compare=False)
    """What `n_windows` has counted."""

    @property
    def n_documents(self) -> int:
        """Number of intervals."""
        return sum(len(intervals) for _, intervals in self.sources)

    @property
    def n_tokens(self) -> int:
        """Bases in all intervals."""
        return sum(self._sizes())

    @property
    def n_bytes(self) -> int:
        """The same number: a base is a byte."""
        return self.n_tokens

    def n_windows(self, length: int) -> int:
        """Windows to train on of a length in the first epoch; those with too many N are left out.

        Later epochs begin at other offsets, so their numbers may differ by a few. A genome that is read in place is
        read once, to count its N.
        """
        key = (length, self.seed, self.options.max_unknown)
        if key not in self._counted:
            drawn = self._n_drawn(length)
            may_drop = drawn > 0 and self.options.max_unknown < 1
            self._counted[key] = self._windows(length, None).count_kept() if may_drop else drawn
        return self._counted[key]

    def _n_drawn(self, length: int) -> int:
        """Windows of a length in an epoch, with those that are dropped."""
        return sum(size // length for size in self._sizes())

    def reading_notes(self, held_out: GenomeData | None) -> tuple[str, ...]:
        """What was found while the genomes were read, one line each."""
        sources = (*self.sources, *(held_out.sources if held_out is not None else ()))
        genomes = {id(genome): genome for genome, _ in sources}
        return tuple(f"{genome.source}: {note}" for genome in genomes.values() for note in genome.reading_notes())

    def _sizes(self) -> list[int]:
        return [interval.end - interval.start for _, intervals in self.sources for interval in intervals]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Bases of each interval."""
        return np.array(self._sizes(), np.int64)

    def read(self, number: int, start: int, stop: int) -> NDArray[np.uint8]:
        """The letters [start, stop) of an interval, on the plus strand; `reading_notes` does not count them."""
        for genome, intervals in self.sources:
            if number < len(intervals):
                interval = intervals[number]
                return genome.peek(interval.name, interval.start + start, interval.start + stop)
            number -= len(intervals)
        raise IndexError(f"there are only {self.n_documents} intervals")

    def run_notes(self, config: TrainConfig, held_out: GenomeData | None) -> tuple[str, ...]:
        """What a run reads, and which intervals have no window, one line each."""
        lines = [f"DNA: {self.n_documents:,} intervals; {self._rules()}", *self.notes, *self._short_notes(config)]
        short = 0 if held_out is None else held_out._n_shorter(config.context)
        if short:
            lines.append(f"{short:,} held-out intervals are shorter than {config.context:,} bases and have no window")
        if held_out is not None and held_out.n_dropped:
            lines.append(f"{held_out.n_dropped:,} held-out windows have too many N and are dropped")
        if config.length_warmup:
            lines.append(f"length warm-up: {described(stages(config, self.n_windows))}{self._kept_in_words(config)}")
        return tuple(lines)

    def _short_notes(self, config: TrainConfig) -> list[str]:
        """Which intervals to train on have no window, or none in the later stages of a length warm-up."""
        first = config.length_warmup_start if config.length_warmup else config.context
        without, short = self._n_shorter(first), self._n_shorter(config.context)
        lines = []
        if without:
            lines.append(f"{without:,} intervals to train on are shorter than {first:,} bases and have no window")
        if short > without:
            lines.append(
                f"{short - without:,} intervals to train on are shorter than {config.context:,} bases and have windows "
                "only in stages of shorter ones"
            )
        return lines

    def _n_shorter(self, length: int) -> int:
        return sum(size < length for size in self._sizes())

    def _kept_in_words(self, config: TrainConfig) -> str:
        """How many windows an epoch of each stage has, if some are dropped."""
        lengths = [stage.context for stage in stages(config, self.n_windows)]
        counts = [(self.n_windows(length), self._n_drawn(length)) for length in lengths]
        if all(kept == drawn for kept, drawn in counts):
            return ""
        told = ", ".join(f"{kept:,} of {drawn:,}" for kept, drawn in counts)
        return f"; windows that the first epoch keeps, the others have too many N: {told}"

    def _rules(self) -> str:
        strands = "both strands" if self.options.reverse_complement else "their own strands"
        case = "upper and lower case are one" if self.tokenizer.case == "fold" else "lower case is kept"
        return (
            f"{strands}, {case}, windows with more than {self.options.max_unknown:.0%} of N are dropped, other N are "
            "not predicted"
        )

    def batches(
        self, config: TrainConfig, position: dict[str, Any] | None, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        """Endless batches for training, from a position on; each process of `world_size` gets its rows.

        Raises ValueError if the batch size is no multiple of `world_size`.
        """
        if config.batch_size % world_size:
            raise ValueError(f"batch_size must be a multiple of the {world_size} processes, got {config.batch_size}")
        here: dict[str, Any] = position or {"batch": 0, "context": 0, "dropped": 0, "windows": None}
        found = stages(config, self.n_windows)
        windows: GenomeWindows | None = None
        while True:
            stage = stage_of(found, here["batch"] // config.accumulation)
            if windows is None or windows.length != stage.context:
                goes_on = here["context"] == stage.context
                windows = self._windows(stage.context, here["windows"] if goes_on else None)
            before = windows.dropped
            letters = windows.take(stage.batch_size).letters
            here = {
                "batch": here["batch"] + 1,
                "context": stage.context,
                "dropped": here["dropped"] + windows.dropped - before,
                "windows": windows.position,
            }
            mine = stage.batch_size // world_size
            yield self._batch(letters[rank * mine : (rank + 1) * mine], here)

    def require_known(self, config: TrainConfig) -> None:
        """Raise ValueError if all windows have too many N."""
        self._windows(config.context, None).take(1)

    def held_out_batches(self, config: TrainConfig) -> Iterator[Batch]:
        """The first windows, in order and on their own strands, up to `eval_tokens`; the same ones at every call."""
        for letters in _evaluated(self._in_order(config), config):
            yield self._batch(letters, {})

    def count_held_out(self, config: TrainConfig) -> tuple[int, int]:
        """The number of windows of an evaluation, and of those that it drops for their N."""
        if not self._n_drawn(config.context):
            return 0, 0
        windows = self._in_order(config)
        kept = sum(len(letters) for letters in _evaluated(windows, config))
        return kept, windows.dropped

    def _in_order(self, config: TrainConfig) -> GenomeWindows:
        """The windows for evaluations, from the first one on."""
        unknown = self.options.max_unknown
        return GenomeWindows(self.sources, config.context, shuffle=False, reverse_complement=False, max_unknown=unknown)

    def _windows(self, context: int, position: dict[str, Any] | None) -> GenomeWindows:
        return GenomeWindows(
            self.sources,
            context,
            seed=self.seed,
            reverse_complement=self.options.reverse_complement,
            max_unknown=self.options.max_unknown,
            position=position,
        )

    def _batch(self, letters: NDArray[np.uint8], position: dict[str, Any]) -> Batch:
        """Each base predicts the next one of its window, but no N."""
        rows, length = letters.shape
        ids = torch.from_numpy(self.tokenizer.encode_letters(letters).astype(np.int64))
        labels = torch.full_like(ids, NOT_COUNTED)
        labels[:, :-1] = ids[:, 1:]
        labels[:, :-1][torch.from_numpy(is_unknown(letters[:, 1:]))] = NOT_COUNTED
        offsets = torch.arange(rows + 1, dtype=torch.int32) * length
        return Batch(ids, labels, offsets, torch.zeros(rows, dtype=torch.bool), position)


def _evaluated(windows: GenomeWindows, config: TrainConfig) -> Iterator[NDArray[np.uint8]]:
    """The letters of the windows up to `eval_tokens`, at most a batch at once."""
    left = max(1, config.eval_tokens // config.context)
    for some in windows.once(config.batch_size):
        yield some.letters[:left]
        left -= len(some.letters)
        if left <= 0:
            return


def open_genomes(
    config: TrainConfig, tokenizer: DnaTokenizer, progress: Callable[[int, int | None], None] | None = None
) -> tuple[GenomeData, GenomeData | None]:
    """The intervals to train on, and those that are held out (None if there are none).

    Held out are the files of `eval_paths`; or the intervals with the label valid, if BED files have such labels; or the
    ends of intervals, `held_out_fraction` of their bases. With labels only the intervals with the label train are
    trained on. Raises ValueError if no window is left to train on.
    """
    data = config.data
    _refuse_options_of_text(data)
    opening = _Opening(data, progress)
    files = find_genomes(data.paths, data.exclude)
    training = opening.sources(files)
    held_out: list[Source] = []
    labelled = by_labels(training, others_held_out=bool(data.eval_paths))
    if labelled is not None:
        training, held_out, said = labelled
        opening.notes.append(said)
    if data.eval_paths:
        only = files[0].genome if len(files) == 1 else None
        held_out = opening.sources(find_genomes(data.eval_paths, data.exclude, only))
    elif labelled is None:
        training, held_out = held_out_ends(training, data.held_out_fraction, config.context)
    warn_of_shared(n_shared(training, held_out))
    return with_windows(
        GenomeData(tuple(training), tokenizer, tuple(opening.notes)), GenomeData(tuple(held_out), tokenizer), config
    )


class _Opening:
    """Opens each genome once, and notes what was found and skipped."""

    def __init__(self, data: DataConfig, progress: Callable[[int, int | None], None] | None) -> None:
        self._data, self._progress = data, progress
        self._opened: dict[Path, Genome] = {}
        self.notes: list[str] = []

    def sources(self, files: Sequence[GenomeFile]) -> list[Source]:
        """The genomes of some files, with the intervals of their BED files or all of their sequences."""
        return [(genome, self._intervals(genome, file)) for file in files for genome in [self._genome(file.genome)]]

    def _genome(self, path: Path) -> Genome:
        if path not in self._opened:
            genome = Genome.open(path, cache_dir=self._data.cache_dir, progress=self._progress)
            self.notes += [f"{path}: {note}" for note in genome.notes]
            self._opened[path] = genome
        return self._opened[path]

    def _intervals(self, genome: Genome, file: GenomeFile) -> list[Interval]:
        if not file.beds:
            return whole_sequences(genome)
        found: list[Interval] = []
        for bed in file.beds:
            intervals, skipped = read_bed(bed, genome, on_bad_line=self._data.on_bad_row)
            found += intervals
            self.notes += [f"{bed}: skipped {reason}: {n:,}" for reason, n in skipped.items()]
        return found


def warn_of_shared(n_bases: int) -> None:
    if n_bases:
        warnings.warn(
            f"{n_bases:,} bases are in intervals to train on and in held-out ones, so the held-out loss is too low; "
            "take intervals that do not overlap",
            DataWarning,
            stacklevel=3,
        )


def with_windows(
    training: GenomeData, held_out: GenomeData, config: TrainConfig
) -> tuple[GenomeData, GenomeData | None]:
    """Both, or None for held-out data without a window. Raises ValueError for training data without one."""
    training, held_out = (replace(d, seed=config.seed, options=config.data.genome) for d in (training, held_out))
    if not training._n_drawn(config.context):
        longest = max(training._sizes(), default=0)
        skipped = "".join(f"; {note}" for note in training.notes if "skipped" in note)
        raise ValueError(
            f"no interval to train on has {config.context:,} bases, the longest has {longest:,}; take a shorter "
            f"context (--context) or longer intervals{skipped}"
        )
    training.require_known(config)
    kept, dropped = held_out.count_held_out(config)
    if kept:
        return training, replace(held_out, n_dropped=dropped if config.eval_tokens else None)
    if config.data.held_out_fraction or config.data.eval_paths:
        because = f" ({dropped:,} windows have too many N)" if dropped else ""
        warnings.warn(
            f"nothing is held out, so there is no evaluation: no stretch of {config.context:,} bases without N is "
            f"left for it{because}; name intervals to evaluate on with eval_paths (--data.eval-paths valid.bed)",
            DataWarning,
            stacklevel=3,
        )
    return training, None


def _refuse_options_of_text(data: DataConfig) -> None:
    """Raise ValueError for options that DNA does not have."""
    default = DataConfig()
    for name in ("text_field", "piece", "workers"):
        if getattr(data, name) != getattr(default, name):
            raise ValueError(f"{name} is for text, and the data is DNA; leave it out")
