"""Scores variants of a genome: the log-likelihood of the alternative against the reference allele in its context.

A causal model reads each strand. On the plus strand the bases before the alleles are read once, and the states after
them go on with each allele and the bases after it; on the minus strand the same holds for the reverse complement. The
score of a strand is

    log p(allele, bases after it | bases before it)   of ALT minus that of REF,

and the score of an allele is the mean of both strands, in nats. Insertions and deletions are scored in the same way:
the sum over more bases is then compared with one over fewer.

A model that was trained with masks reads the reference with the alleles' bases masked: log p(ALT) - log p(REF) at these
places. So it scores alleles of the length of REF only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from anymamba.base.sizes import require_sizes
from anymamba.data.dna import Genome, is_unknown, reverse_complement
from anymamba.data.dna.letters import as_dna
from anymamba.data.dna.vcf import BASES, Variant, read_allele
from anymamba.data.tokenizer import Tokenizer
from anymamba.evaluation.dna.sequences import device_of, encoded, in_rows, require_bases
from anymamba.models.checkpoints import Checkpoint, local_path
from anymamba.models.checkpoints.runs import trained_objective
from anymamba.models.language_model import LanguageModel
from anymamba.parts.state import select_rows
from anymamba.training.masking import Masking


class AlleleScore(NamedTuple):
    """The score of one alternative allele, in nats; positive where the model prefers it to REF."""

    score: float | None
    """The mean over the strands; None if the model cannot score the allele."""
    plus: float | None
    """That of the plus strand; None if there is no base before the variant."""
    minus: float | None
    """That of the minus strand; None if there is no base after the variant."""


NOT_SCORED = AlleleScore(None, None, None)


class _Window(NamedTuple):
    """The bases around a variant, and its alleles, REF first, on the plus strand."""

    before: str
    after: str
    alleles: tuple[str, ...]


def score(
    model: LanguageModel,
    tokenizer: Tokenizer,
    genome: Genome,
    variants: Iterable[Variant],
    *,
    context: int = 512,
    batch_size: int = 16,
    masked: bool | None = None,
) -> Iterator[list[AlleleScore]]:
    """Score the alternative alleles of variants, in order.

    Args:
        model: a language model of DNA.
        tokenizer: its own, with one token a base.
        genome: the reference.
        variants: places and alleles; `data.dna.vcf` reads them from a file. Names may have or lack "chr", and U is
            read as T.
        context: bases that are read on each side of the alleles.
        batch_size: variants that are read at once.
        masked: whether the model was trained with masks, as `trained_with_masks` finds it for a folder; defaults to
            whether it is not causal.
    Returns an iterator over the variants, with the scores of the alternative alleles of each. N and other letters in
    the context are read, but not counted.
    Raises ValueError if a model that is not causal is to be read as one, if the tokenizer is not one of DNA or, for
    masks, has no mask token. Where the variant comes, for a sequence or a range that the genome does not have, a REF
    that is not there, and alleles with letters other than A, C, G and T.
    """
    require_sizes(context=context, batch_size=batch_size)
    require_bases(tokenizer, model.config)
    masked = not model.config.is_causal if masked is None else masked
    if not masked and not model.config.is_causal:
        raise ValueError("the model is not causal, so it is scored with masks; leave masked=False (--objective) out")
    mask_id = Masking.of(tokenizer, 0).mask_id if masked else None
    return _scores(model, tokenizer, genome, variants, context, batch_size, mask_id)


def trained_with_masks(model: str | Path | Checkpoint) -> bool | None:
    """Whether the run that made a model trained it with masks; None if no run says so.

    Args:
        model: a run folder, `best` or a checkpoint in it, a name on the hub, or an opened checkpoint.
    Raises FileNotFoundError if there is no such model, CheckpointError for a run whose config cannot be read.
    """
    path = model.path if isinstance(model, Checkpoint) else local_path(model, weights=False)
    objective = trained_objective(path)
    return None if objective is None else objective == "mlm"


@torch.inference_mode()
def _scores(
    model: LanguageModel,
    tokenizer: Tokenizer,
    genome: Genome,
    variants: Iterable[Variant],
    context: int,
    batch_size: int,
    mask_id: int | None,
) -> Iterator[list[AlleleScore]]:
    rest = iter(variants)
    while some := list(islice(rest, batch_size)):
        windows = [_window(genome, variant, context) for variant in some]
        if mask_id is None:
            yield from _causal_scores(model, tokenizer, windows)
        else:
            yield from _masked_scores(model, tokenizer, windows, mask_id)


def _window(genome: Genome, variant: Variant, context: int) -> _Window:
    name, start, end = genome.resolve(variant.name), variant.start, variant.start + len(variant.ref)
    _require_letters(variant)
    there = as_dna(genome.fetch(name, start, end))
    if there.upper() != read_allele(variant.ref):
        raise ValueError(
            f"REF of {name}:{start + 1:,} is {variant.ref}, and {genome.source} has {there}; is it another assembly?"
        )
    # a soft-masked place stays so in all alleles, for tokenizers that keep the case
    alts = [alt.lower() if there.islower() else alt for alt in map(read_allele, variant.alts)]
    first, last = max(0, start - context), min(genome.lengths[name], end + context)
    before, after = genome.fetch(name, first, start), genome.fetch(name, end, last)
    return _Window(before, after, (there, *alts))


def _require_letters(variant: Variant) -> None:
    """Raise ValueError for an allele with other letters than bases, which a model would score as it reads them."""
    wrong = next((allele for allele in (variant.ref, *variant.alts) if set(read_allele(allele)) - BASES), None)
    if wrong is not None:
        raise ValueError(
            f"the allele {wrong!r} of {variant.name}:{variant.start + 1:,} has letters other than A, C, G and T; leave "
            "it out"
        )


def _reversed(window: _Window) -> _Window:
    alleles = tuple(reverse_complement(allele) for allele in window.alleles)
    return _Window(reverse_complement(window.after), reverse_complement(window.before), alleles)


# ------------------------------------------------------------------------------------------------- causal models


def _causal_scores(
    model: LanguageModel, tokenizer: Tokenizer, windows: Sequence[_Window]
) -> Iterator[list[AlleleScore]]:
    strands = [*windows, *map(_reversed, windows)]
    readable = [i for i, window in enumerate(strands) if window.before]
    found: dict[int, list[float]] = {}
    if readable:
        found = dict(zip(readable, _allele_nats(model, tokenizer, [strands[i] for i in readable]), strict=True))
    for i, window in enumerate(windows):
        plus, minus = found.get(i), found.get(i + len(windows))
        yield [
            _mean(*(None if nats is None else nats[0] - nats[k] for nats in (plus, minus)))
            for k in range(1, len(window.alleles))
        ]


def _mean(plus: float | None, minus: float | None) -> AlleleScore:
    known = [value for value in (plus, minus) if value is not None]
    return AlleleScore(sum(known) / len(known) if known else None, plus, minus)


def _allele_nats(model: LanguageModel, tokenizer: Tokenizer, windows: Sequence[_Window]) -> list[list[float]]:
    """-log p of each allele and the bases after it, for windows with bases before it.

    The bases before are read once for all alleles of a window.
    """
    device = device_of(model)
    before = in_rows(encoded(tokenizer, [window.before for window in windows]), device, left=True)
    hidden, state = model.hidden(before.ids, attention_mask=before.mask)
    texts = [allele + window.after for window in windows for allele in window.alleles]
    counts = [len(window.alleles) for window in windows]
    owner = torch.repeat_interleave(torch.arange(len(windows)), torch.tensor(counts)).to(device)
    nats = _continued(model, tokenizer, texts, hidden[owner, -1], select_rows(state, owner))
    return [part.tolist() for part in nats.split(counts)]


def _continued(
    model: LanguageModel, tokenizer: Tokenizer, texts: Sequence[str], last: Tensor, state: object
) -> Float[Tensor, " texts"]:
    """-log p of texts after the state and the last hidden vector of what was read before them."""
    device = device_of(model)
    rows = in_rows(encoded(tokenizer, texts), device)
    length = rows.ids.shape[1]
    if length == 0:
        return torch.zeros(len(texts), dtype=torch.float64)
    hidden = last[:, None]
    if length > 1:
        mask = None if rows.mask is None else rows.mask[:, :-1]
        after, _ = model.hidden(rows.ids[:, :-1], state, attention_mask=mask)  # type: ignore[arg-type]
        hidden = torch.cat([hidden, after], 1)
    counted = in_rows([_is_base(text) for text in texts], device).ids.bool()
    return (_token_nats(model, hidden, rows.ids) * counted).sum(1).cpu()


def _is_base(text: str) -> Tensor:
    known = ~is_unknown(np.frombuffer(text.encode("ascii"), np.uint8))
    return torch.from_numpy(known.astype(np.int64))


def _token_nats(model: LanguageModel, hidden: Tensor, ids: Tensor) -> Float[Tensor, "rows length"]:
    """-log p of each id from the vector at the position before it."""
    logits = model.logits(hidden)
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_p = torch.log_softmax(logits.to(wide), -1)
    return -log_p.gather(-1, ids[..., None])[..., 0].double()


# ------------------------------------------------------------------------------------------------- masked models


def _masked_scores(
    model: LanguageModel, tokenizer: Tokenizer, windows: Sequence[_Window], mask_id: int
) -> Iterator[list[AlleleScore]]:
    device = device_of(model)
    equivariant = bool(model.config.complement)  # then both strands have the same score
    strands = [*windows] if equivariant else [*windows, *map(_reversed, windows)]
    sequences = []
    for window in strands:
        (ids,) = encoded(tokenizer, [window.before + window.alleles[0] + window.after])
        ids[len(window.before) : len(window.before) + len(window.alleles[0])] = mask_id
        sequences.append(ids)
    rows = in_rows(sequences, device)
    hidden, _ = model.hidden(rows.ids, attention_mask=rows.mask)
    scores = [_at_masks(model, tokenizer, window, hidden[i]) for i, window in enumerate(strands)]
    for i in range(len(windows)):
        other = scores[i if equivariant else i + len(windows)]
        yield [
            NOT_SCORED if plus is None or minus is None else _mean(plus, minus)
            for plus, minus in zip(scores[i], other, strict=True)
        ]


def _at_masks(model: LanguageModel, tokenizer: Tokenizer, window: _Window, hidden: Tensor) -> list[float | None]:
    """log p(ALT) - log p(REF) at the masked places for each alternative allele; None for one of another length."""
    first, size = len(window.before), len(window.alleles[0])
    alleles = [allele for allele in window.alleles if len(allele) == size]
    ids = torch.stack(encoded(tokenizer, alleles)).to(hidden.device)
    nats = _token_nats(model, hidden[None, first : first + size].expand(len(alleles), -1, -1), ids).sum(1).tolist()
    scores = iter(nats[1:])
    return [nats[0] - next(scores) if len(allele) == size else None for allele in window.alleles[1:]]
