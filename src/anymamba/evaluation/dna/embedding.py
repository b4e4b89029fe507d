"""Embeds regions of a genome: the model's last hidden vectors, their mean, or the one of the last base."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from anymamba.base.sizes import require_sizes
from anymamba.data.dna import Genome, Interval
from anymamba.data.tokenizer import Tokenizer
from anymamba.evaluation.dna.sequences import Rows, device_of, encoded, in_rows, require_bases
from anymamba.models.language_model import LanguageModel

Pooling = Literal["mean", "last", "positions"]


def embed(
    model: LanguageModel,
    tokenizer: Tokenizer,
    genome: Genome,
    intervals: Iterable[Interval],
    *,
    pooling: Pooling = "mean",
    batch_size: int = 16,
    chunk: int = 8192,
) -> Iterator[NDArray[np.float32]]:
    """The vectors of regions, in order; those of strand "-" are read as their reverse complement.

    Args:
        model: a language model of DNA. A model of both strands gives the mean of both, at the same bases.
        tokenizer: its own, with one token a base.
        genome: where the regions are.
        intervals: the regions, each with at least one base.
        pooling: "mean" over all bases, the vector of the "last" base, or "positions": one a base.
        batch_size: regions that are read at once.
        chunk: bases of a region that a causal model reads at once, with its state carried; other models read regions
            whole.
    Returns an iterator over the regions, with (d_model,) numbers each, or (length, d_model) for positions.
    Raises ValueError for a tokenizer that is not one of DNA and, where it comes, for an empty region.
    """
    if pooling not in get_args(Pooling):
        raise ValueError(f"pooling must be one of {', '.join(get_args(Pooling))}, got {pooling!r}")
    require_sizes(batch_size=batch_size, chunk=chunk)
    require_bases(tokenizer, model.config)
    return _vectors(model, tokenizer, genome, intervals, pooling, batch_size, chunk)


def _vectors(
    model: LanguageModel,
    tokenizer: Tokenizer,
    genome: Genome,
    intervals: Iterable[Interval],
    pooling: Pooling,
    batch_size: int,
    chunk: int,
) -> Iterator[NDArray[np.float32]]:
    rest = iter(intervals)
    while some := list(islice(rest, batch_size)):
        texts = [genome.fetch(i.name, i.start, i.end, strand=i.strand) for i in some]
        for interval, text in zip(some, texts, strict=True):
            if not text:
                raise ValueError(f"the region {interval.name}:{interval.start:,}-{interval.end:,} has no base")
        yield from embed_texts(model, tokenizer, texts, pooling=pooling, chunk=chunk)


@torch.inference_mode()
def embed_texts(
    model: LanguageModel,
    tokenizer: Tokenizer,
    texts: list[str],
    *,
    pooling: Pooling = "mean",
    chunk: int = 8192,
) -> list[NDArray[np.float32]]:
    """The vectors of sequences that are read at once, each with at least one base; options as in `embed`."""
    rows = in_rows(encoded(tokenizer, texts), device_of(model))
    lengths = [len(text) for text in texts]
    if pooling == "positions":
        pieces = [vectors.float().cpu() for vectors, _ in _read(model, rows, chunk)]
        whole = torch.cat(pieces, 1).numpy()
        return [whole[i, :length] for i, length in enumerate(lengths)]
    size = torch.tensor(lengths, device=rows.ids.device)
    if pooling == "last" and model.config.complement:
        pooled = _last_of_both(model, rows, size)
    elif pooling == "last":
        pooled = _last(model, rows, size, chunk)
    else:
        pooled = _mean(model, rows, size, chunk)
    return list(pooled.float().cpu().numpy())


def _read(model: LanguageModel, rows: Rows, chunk: int) -> Iterator[tuple[Float[Tensor, "rows part width"], int]]:
    """The vectors of the rows in pieces, and where each begins."""
    length = rows.ids.shape[1]
    step = chunk if model.config.is_causal else length
    state: Any = None
    for start in range(0, length, step):
        part = slice(start, start + step)
        mask = None if rows.mask is None else rows.mask[:, part]
        hidden, state = model.hidden(rows.ids[:, part], state, attention_mask=mask)
        if model.config.complement:
            given, other = hidden.chunk(2, dim=-1)
            hidden = (given + other) / 2
        yield hidden, start


def _mean(model: LanguageModel, rows: Rows, size: Tensor, chunk: int) -> Tensor:
    total: Any = 0
    for hidden, start in _read(model, rows, chunk):
        wide = hidden.double()
        if rows.mask is not None:
            wide = wide.masked_fill(~rows.mask[:, start : start + wide.shape[1], None], 0)
        total = total + wide.sum(1)
    return total / size[:, None]


def _last(model: LanguageModel, rows: Rows, size: Tensor, chunk: int) -> Tensor:
    found: list[Any] = [None] * len(size)
    for hidden, start in _read(model, rows, chunk):
        for row, place in enumerate((size - 1 - start).tolist()):
            if 0 <= place < hidden.shape[1]:
                found[row] = hidden[row, place].clone()
    return torch.stack(found)


def _last_of_both(model: LanguageModel, rows: Rows, size: Tensor) -> Tensor:
    """The mean of the vectors at the end of each strand, which is the first base for the other one."""
    given, other = model.hidden(rows.ids, attention_mask=rows.mask)[0].chunk(2, dim=-1)
    return (given[torch.arange(len(size), device=size.device), size - 1] + other[:, 0]) / 2
