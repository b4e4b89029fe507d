"""What `generate()` keeps between steps, and the ids that it may emit."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from anymamba.models.language_model import LanguageModelState
from anymamba.parts.state import select_rows


class AnyMambaCache:
    """The state between two calls, in the place where `transformers` keeps a cache; a call returns a new one.

    It holds no positions: `generate` reads the whole of its `input_ids` on top of a cache that it is given.
    """

    is_compileable = False
    is_croppable = False
    is_linear = (True,)
    """For each layer whether it is without positions; `generate` drops no ids for those."""

    def __init__(self, state: LanguageModelState) -> None:
        self.state = state

    def reorder_cache(self, beam_idx: Int[Tensor, " rows"]) -> None:
        """Rows by index, for beam search."""
        self.state = select_rows(self.state, beam_idx)


class ExistingIds(LogitsProcessor):
    """Lets pass the ids of the vocabulary, not the rows that fill the embedding up to a round number."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __call__(self, input_ids: Tensor, scores: Float[Tensor, "rows padded_vocab"]) -> Tensor:
        padding = torch.arange(scores.shape[-1], device=scores.device) >= self.vocab_size
        return scores.masked_fill(padding, -math.inf)
