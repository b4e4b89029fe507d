"""Sequences of DNA as rows of token ids: one token a base, padded where their lengths differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from anymamba.data.tokenizer import Tokenizer
from anymamba.models.config import ModelConfig


class Rows(NamedTuple):
    """Sequences as rows."""

    ids: Int[Tensor, "rows length"]
    mask: Bool[Tensor, "rows length"] | None
    """True at the tokens; None if all rows are full."""


NO_BASES = "EFIJLOPQXZ"
"""Letters that are no base or ambiguity code."""


def require_bases(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Raise ValueError unless the tokenizer is one of DNA: one token a base, of the model's vocabulary, and none for
    the letters of other text.

    A tokenizer of text may have one token a letter, too, and then its model knows nothing of DNA.
    """
    if len(tokenizer.encode("ACGTN")) != 5:
        raise ValueError(
            f"the tokenizer {tokenizer.name} does not have one token a base; take a model that was trained on DNA "
            "(anymamba train --data genome.fa)"
        )
    largest = max(tokenizer.encode("ACGTNacgtn"))
    if largest >= config.padded_vocab_size:
        raise ValueError(
            f"the tokenizer {tokenizer.name} has the id {largest}, and the model a vocabulary of "
            f"{config.vocab_size}; give the model's own tokenizer"
        )
    if len({tuple(ids) for ids in tokenizer.encode_batch(list(NO_BASES))}) > 1:
        raise ValueError(
            f"the tokenizer {tokenizer.name} is one of text, not of DNA: it has different tokens for {NO_BASES[0]} and "
            f"{NO_BASES[1]}; take a model that was trained on a genome (anymamba train --data genome.fa), or give the "
            "tokenizer of DNA that it was trained with (--tokenizer)"
        )


def device_of(model: nn.Module) -> torch.device:
    """Where a model's weights are."""
    return next(model.parameters()).device


def encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Tensor]:
    """The ids of each sequence."""
    return [torch.from_numpy(np.asarray(ids, np.int64)) for ids in tokenizer.encode_batch(texts)]


def in_rows(sequences: Sequence[Tensor], device: torch.device, *, left: bool = False) -> Rows:
    """Rows of ids, padded with id 0 on the right, or on the left.

    Args:
        sequences: ids, at least one sequence.
    """
    lengths = [len(ids) for ids in sequences]
    longest = max(lengths)
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    mask = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        place = slice(longest - len(sequence), longest) if left else slice(0, len(sequence))
        ids[row, place] = sequence
        mask[row, place] = True
    return Rows(ids.to(device), None if min(lengths) == longest else mask.to(device))
