"""The cache that `generate()` keeps between steps, and a filter of the ids that it may emit."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from anymamba.models.language_model import LanguageModelState
from anymamba.parts.state import select_rows


class AnyMambaCache:
    """The state between two calls, which `transformers` handles as its cache; each call returns a new one.

    It holds no positions, so `generate` with a cache reads all of its `input_ids` after that state.
    """

    is_compileable = False
    is_croppable = False
    is_linear = (True,)
    """For each layer, whether it has no positions; for such layers `generate` drops no ids."""

    def __init__(self, state: LanguageModelState) -> None:
        self.state = state

    def reorder_cache(self, beam_idx: Int[Tensor, " rows"]) -> None:
        """Select rows by index, for beam search."""
        self.state = select_rows(self.state, beam_idx)


class ExistingIds(LogitsProcessor):
    """Sets the scores of padding rows of the embedding to -inf; the ids of the vocabulary are unchanged."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __call__(self, input_ids: Tensor, scores: Float[Tensor, "rows padded_vocab"]) -> Tensor:
        padding = torch.arange(scores.shape[-1], device=scores.device) >= self.vocab_size
        return scores.masked_fill(padding, -math.inf)
