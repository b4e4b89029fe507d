"""The data of a run, texts or genomes: opened, with its tokenizer, and read as batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from anymamba.data.batches import Batch, BatchStream
from anymamba.data.dna import DnaTokenizer, are_genomes
from anymamba.data.table import TokenTable
from anymamba.data.tokenizer import Tokenizer
from anymamba.models.checkpoints import find_tokenizer
from anymamba.training.config import GenomeConfig, TrainConfig
from anymamba.training.genomes import GenomeData, open_genomes
from anymamba.training.given_genomes import Given, given_genomes
from anymamba.training.length_warmup import stages, steps_of_epochs
from anymamba.training.tables import open_tables

TrainingData = TokenTable | GenomeData


def is_dna(config: TrainConfig, genomes: Given | None = None) -> bool:
    """Whether a run reads genomes: those that are given, or files."""
    return genomes is not None or are_genomes(config.data.paths)


def run_tokenizer(config: TrainConfig, own: str | Path | None = None, genomes: Given | None = None) -> Tokenizer:
    """The tokenizer of a run.

    Args:
        own: the folder that holds it; None: that of the config, of the model to start from, or of the kind of data.
        genomes: those that are given in place of files.
    Raises ValueError for options of DNA where the data is text.
    """
    given = config.data.tokenizer if own is None else own
    if not is_dna(config, genomes):
        if config.data.paths and (config.data.genome != GenomeConfig() or config.length_warmup):
            raise ValueError(
                "length_warmup and the options of data.genome are for DNA, and the data is text; leave them out"
            )
        return find_tokenizer(config.start_from, given)
    if given is None and config.start_from is None:
        return DnaTokenizer(config.data.genome.case)
    found = find_tokenizer(config.start_from, given)
    if not isinstance(found, DnaTokenizer):
        raise ValueError(
            f"the data is DNA and the tokenizer {found.name} is for text; leave --tokenizer out, or start from a "
            "model of DNA"
        )
    if config.data.genome.case not in (found.case, GenomeConfig().case):
        raise ValueError(f"data.genome.case is {config.data.genome.case!r}, and the tokenizer has {found.case!r}")
    return found


def open_data(
    config: TrainConfig,
    tokenizer: Tokenizer,
    progress: Callable[[int, int | None], None] | None = None,
    genomes: Given | None = None,
) -> tuple[TrainingData, TrainingData | None]:
    """The training data, and what is held out (None if nothing is).

    Args:
        genomes: those that are given in place of files.
    Raises ValueError if there is nothing to train on.
    """
    if isinstance(tokenizer, DnaTokenizer) and genomes is not None:
        return given_genomes(config, tokenizer, genomes)
    if isinstance(tokenizer, DnaTokenizer) and not config.data.paths:
        raise ValueError(
            "no training data: name files in data.paths (--data PATH); a run that was started with genomes from Python "
            "goes on with anymamba.training.trainer.resume(run, genomes=...)"
        )
    if isinstance(tokenizer, DnaTokenizer) and are_genomes(config.data.paths):
        return open_genomes(config, tokenizer, progress)
    return open_tables(config.data, tokenizer, progress)


def with_steps_of_epochs(config: TrainConfig, training: TrainingData) -> tuple[TrainConfig, TrainingData]:
    """Both with the steps of a length warm-up that has as many epochs at the context as at each length before it.

    Without a length warm-up they stay as they are.
    """
    if not isinstance(training, GenomeData) or not config.length_warmup:
        return config, training
    steps, epochs = steps_of_epochs(config, training.n_windows), config.length_warmup_epochs
    said = f"no --steps: {steps:,}, which are {epochs:g} epochs at each length, {config.context:,} included"
    return replace(config, steps=steps), replace(training, notes=(*training.notes, said))


def require_enough_steps(config: TrainConfig, training: TrainingData) -> None:
    """Raise ValueError if a length warm-up takes all steps before it reaches the context."""
    if isinstance(training, GenomeData):
        stages(config, training.n_windows)


def training_batches(
    data: TrainingData,
    config: TrainConfig,
    eos_id: int | None,
    position: dict[str, Any] | None,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Endless batches from a position on: the rows of this process of `world_size`."""
    if isinstance(data, GenomeData):
        return data.batches(config, position, rank, world_size)
    return iter(
        BatchStream(
            data,
            batch_size=config.batch_size,
            context=config.context,
            eos_id=eos_id,
            seed=config.seed,
            workers=config.data.workers,
            piece=config.data.piece,
            position=position,
            rank=rank,
            world_size=world_size,
        )
    )


def held_out_batches(data: TrainingData, config: TrainConfig, eos_id: int | None) -> Iterator[Batch]:
    """The first `eval_tokens` tokens; the same batches at every call."""
    if isinstance(data, GenomeData):
        return data.held_out_batches(config)
    stream = BatchStream(data, batch_size=config.batch_size, context=config.context, eos_id=eos_id, seed=0)
    tokens = min(config.eval_tokens, data.n_tokens)
    return islice(iter(stream), max(1, math.ceil(tokens / (config.batch_size * config.context))))
